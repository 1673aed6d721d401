"""Eqs. 5-9 against their formulas in float64 NumPy and SciPy."""

import numpy as np
import pytest
import torch
from scipy.special import rel_entr, softmax

from mdsnn import distill
from mdsnn.kernels.errors import ConfigError, TrainingError


def draw(*shape: int, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64) * scale


def by_scipy(a: np.ndarray, b: np.ndarray, tau_a: float, tau_b: float, direction: str) -> float:
    """Eq. 6: the softmax over C*H*W of each sample, the mean over samples."""
    p = softmax(a.reshape(len(a), -1) / tau_a, axis=1)
    q = softmax(b.reshape(len(b), -1) / tau_b, axis=1)
    terms = rel_entr(p, q) if direction == "forward" else rel_entr(q, p)
    return float(tau_a * tau_b * terms.sum(axis=1).mean())


@pytest.mark.parametrize("direction", ["forward", "literal"])
@pytest.mark.parametrize("tau", [1.0, 4.0, (2.0, 5.0)])
@pytest.mark.parametrize("shape", [(5, 10), (3, 4, 5, 6)])
def test_kl_distance_is_eq_6(shape, tau, direction):
    a, b = draw(*shape), draw(*shape, seed=1)
    tau_a, tau_b = tau if isinstance(tau, tuple) else (tau, tau)
    expected = by_scipy(a.numpy(), b.numpy(), tau_a, tau_b, direction)
    assert distill.kl_distance(a, b, tau, direction).item() == pytest.approx(expected, rel=1e-11)
    assert expected > 0.01


def test_the_two_directions_differ_and_equal_inputs_are_at_distance_0():
    a, b = draw(4, 7), draw(4, 7, seed=1)
    assert distill.kl_distance(a, b).item() != pytest.approx(
        distill.kl_distance(a, b, direction="literal").item(), rel=1e-3
    )
    assert distill.kl_distance(a, a).item() == pytest.approx(0.0, abs=1e-14)


def test_the_gradient_of_forward_kl_is_tau_times_the_difference_of_softmaxes():
    # d/db of tau^2 * KL(softmax(a/tau) || softmax(b/tau)), mean over N: tau * (softmax(b/tau) - softmax(a/tau)) / N
    a, b = draw(3, 6), draw(3, 6, seed=1).requires_grad_()
    distill.kl_distance(a, b, 4.0).backward()
    expected = 4.0 * (softmax(b.detach().numpy() / 4, axis=1) - softmax(a.numpy() / 4, axis=1)) / 3
    np.testing.assert_allclose(b.grad.numpy(), expected, rtol=1e-10)


@pytest.mark.parametrize("kind", ["kl", "mse"])
def test_membrane_loss_sums_over_taps_and_steps_step_j_against_step_j(kind):
    teacher = [draw(4, 3, 2, 2, 2, seed=s) for s in (0, 1)]
    student = [draw(2, 3, 2, 2, 2, seed=s) for s in (2, 3)]  # two steps against the first two of four
    expected = 0.0
    for whole, h in zip(teacher, student, strict=True):
        for step in range(2):
            a, b = whole[step].numpy(), h[step].numpy()
            expected += by_scipy(a, b, 4.0, 4.0, "forward") if kind == "kl" else float(((a - b) ** 2).mean())
    assert distill.membrane_loss(teacher, student, kind).item() == pytest.approx(expected, rel=1e-11)


def test_no_gradient_flows_into_the_teacher():
    teacher, student = draw(2, 3, 4).requires_grad_(), draw(2, 3, 4, seed=1).requires_grad_()
    z_t, z_s = draw(3, 5).requires_grad_(), draw(3, 5, seed=1).requires_grad_()
    labels = torch.tensor([0, 1, 4])
    distill.total_loss("CLK", z_s, labels, z_t, [teacher], [student]).total.backward()
    assert teacher.grad is None
    assert z_t.grad is None
    assert student.grad.abs().sum() > 0
    assert z_s.grad.abs().sum() > 0


@pytest.mark.parametrize("name", ["CLK", "CLM", "CL"])
def test_total_loss_is_eq_7(name):
    teacher, student = [draw(2, 3, 4)], [draw(2, 3, 4, seed=1)]
    z_t, z_s, labels = draw(3, 5), draw(3, 5, seed=1), torch.tensor([0, 1, 4])
    loss = distill.total_loss(name, z_s, labels, z_t, teacher, student, weights=(2.0, 3.0, 5.0), tau=3.0, logit_tau=2.0)
    ce = float(-np.log(softmax(z_s.numpy(), axis=1)[np.arange(3), labels.numpy()]).mean())
    logit = by_scipy(z_t.numpy(), z_s.numpy(), 2.0, 2.0, "forward")
    a, b = teacher[0].numpy(), student[0].numpy()
    membrane = {
        "CLK": sum(by_scipy(a[t], b[t], 3.0, 3.0, "forward") for t in range(2)),
        "CLM": sum(float(((a[t] - b[t]) ** 2).mean()) for t in range(2)),
        "CL": 0.0,
    }[name]
    parts = [loss.cross_entropy.item(), loss.logit.item(), loss.membrane.item()]
    assert parts == pytest.approx([ce, logit, membrane], rel=1e-11)
    assert loss.total.item() == pytest.approx(2 * ce + 3 * logit + 5 * membrane, rel=1e-11)


def test_the_default_weights_are_the_papers_1_3_1():
    z_t, z_s, labels = draw(3, 5), draw(3, 5, seed=1), torch.tensor([0, 1, 4])
    loss = distill.total_loss("CLM", z_s, labels, z_t, [draw(1, 3, 4)], [draw(1, 3, 4, seed=1)])
    parts = loss.cross_entropy + 3 * loss.logit + loss.membrane
    assert loss.total.item() == pytest.approx(parts.item(), rel=1e-12)


def test_misfits_are_refused_in_words():
    with pytest.raises(TrainingError, match="2 teacher taps against 1"):
        distill.membrane_loss([draw(1, 2, 3)] * 2, [draw(1, 2, 3)])
    with pytest.raises(TrainingError, match="not 0"):
        distill.membrane_loss([], [])
    with pytest.raises(TrainingError, match="3 timesteps cannot learn from a teacher of 2"):
        distill.membrane_loss([draw(2, 2, 3)], [draw(3, 2, 3)])
    with pytest.raises(TrainingError, match=r"tap 0: teacher \[1, 2, 4\], student \[1, 2, 3\]"):
        distill.membrane_loss([draw(1, 2, 4)], [draw(1, 2, 3)])
    with pytest.raises(TrainingError, match="equal shapes"):
        distill.kl_distance(draw(2, 3), draw(2, 4))
    with pytest.raises(ConfigError, match="'KLC' is none of CLK, CLM, CL"):
        distill.total_loss("KLC", draw(1, 2), torch.tensor([0]), draw(1, 2))
    with pytest.raises(ConfigError, match="'backward' is none of forward, literal"):
        distill.kl_distance(draw(1, 2), draw(1, 2), direction="backward")
    with pytest.raises(ConfigError, match="temperature"):
        distill.kl_distance(draw(1, 2), draw(1, 2), 0.0)
