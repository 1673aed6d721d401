"""The loops over memory against their definitions in torch: the same bits forward and backward, and in alpha."""

from __future__ import annotations

import copy
import multiprocessing

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mdsnn import loops
from mdsnn.kernels.formats import Grid
from mdsnn.layers import LIF
from mdsnn.quantizers import fake_quantize_weight, round_to_grid
from mdsnn.surrogate import Rectangle, Triangle


@pytest.fixture(autouse=True)
def _any_size(monkeypatch):
    monkeypatch.setattr(loops, "SMALLEST", 1)


def assert_same_bits(got, want, what):
    """Equal dtype, shape and bits; every NaN counts as the same NaN, for its payload is the processor's choice."""
    assert (got is None) == (want is None), what
    if want is None:
        return
    got, want = got.detach().contiguous(), want.detach().contiguous()
    assert (got.dtype, got.shape) == (want.dtype, want.shape), what
    differ = (got.view(torch.int32) != want.view(torch.int32)) & ~(got.isnan() & want.isnan())
    if differ.any():
        place = tuple(differ.nonzero()[0].tolist())
        text = f"{what}: {int(differ.sum())} of {differ.numel()} differ; first at {place}"
        pytest.fail(f"{text}: got {float(got[place])!r}, want {float(want[place])!r}")


def gradients(lif, x, gs, gh, batches):
    """What training sees of a layer over some batches: spikes, taps, input gradients and alpha after each."""
    seen = {}
    for batch in range(batches):
        x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        s = lif(x)
        read = [(s, gs), (lif.last_h, gh)] if lif.tap else [(s, gs)]
        torch.autograd.backward([value for value, _ in read], [gradient for _, gradient in read])
        seen |= {f"s {batch}": s, f"h {batch}": lif.last_h, f"gx {batch}": x.grad, f"alpha {batch}": lif.alpha}
        seen = {name: None if value is None else value.detach().clone() for name, value in seen.items()}
    return seen


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_the_fused_lif_is_its_steps_bit_for_bit(data):
    draw = data.draw
    reset, alpha = draw(st.sampled_from(["hard", "soft"])), draw(st.sampled_from(["ema", "dynamic"]))
    spike = draw(st.sampled_from([Triangle(), Rectangle(), Triangle(1.3, 0.7), Rectangle(0.3, 2.0)]))
    bits, tau = draw(st.sampled_from([32, 2, 4, 8])), draw(st.sampled_from([0.5, 0.3, 1.0]))
    timesteps = draw(st.integers(1, 5))
    lif = LIF(timesteps, tau, 0.45, reset, spike, bits, alpha=alpha, detach_reset=draw(st.booleans()))
    lif.train(draw(st.booleans()))
    lif.alpha.fill_(draw(st.sampled_from([0.6, 1.0, 0.0])))
    lif.alpha_batches.fill_(draw(st.integers(0, 1)))
    lif.tap = draw(st.booleans())
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    shape = (draw(st.integers(1, 3)), draw(st.integers(1, 70)), draw(st.integers(1, 9)), draw(st.integers(1, 9)))
    x = torch.randn(draw(st.sampled_from([1, timesteps])), *shape, generator=generator)
    gs, gh = (torch.randn(timesteps, *shape, generator=generator) for _ in range(2))
    flat = x.view(-1)
    corners = [0.0, -0.0, 0.45, -0.45, 1e-40, -9.0]
    if draw(st.booleans()):
        corners += [float("inf"), float("-inf"), float("nan")]
    places = torch.randint(0, flat.numel(), (len(corners),), generator=generator)
    flat[places] = torch.tensor(corners)
    layout = draw(st.sampled_from(["contiguous", "channels last", "strided"]))
    if layout == "channels last":
        x = x.movedim(2, -1).contiguous().movedim(-1, 2)
    elif layout == "strided":
        x = x.mT.contiguous().mT
    fused, stepwise = copy.deepcopy(lif), copy.deepcopy(lif)
    assert fused._neuron(x) is not None
    stepwise._neuron = lambda _: None
    got, want = gradients(fused, x, gs, gh, 2), gradients(stepwise, x, gs, gh, 2)
    for name, value in want.items():
        assert_same_bits(got[name], value, f"{lif}, {layout}: {name}")


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**32 - 1), grid=st.builds(Grid, st.integers(5, 12), st.integers(1, 8)), nan=st.booleans())
def test_fused_rounding_is_torchs_bit_for_bit(seed, grid, nan):
    generator = torch.Generator().manual_seed(seed)
    shape = [int(n) for n in torch.randint(1, 9, (4,), generator=generator)]
    y, g = (torch.randn(shape, generator=generator) * grid.clip for _ in range(2))
    corners = [0.0, -0.0, 0.5, -0.5, 1.5, grid.saturation, -grid.saturation - 0.5, grid.saturation + 0.5]
    y.view(-1)[: len(corners)] = (torch.tensor(corners) / grid.one)[: y.numel()]
    if nan:
        y.view(-1)[-1] = float("nan")
    for order in ("contiguous", "channels last", "strided", "upstream strided"):
        x = y.clone()
        x = x.contiguous(memory_format=torch.channels_last) if order == "channels last" else x
        x = x.mT.contiguous().mT if order == "strided" else x
        upstream = g.mT.contiguous().mT if order == "upstream strided" else g
        results = []
        for smallest in (1, 1 << 30):
            loops.SMALLEST = smallest
            leaf = x.detach().requires_grad_()
            out = round_to_grid(leaf, grid)
            out.backward(upstream)
            results.append((out, leaf.grad))
        for got, want, what in zip(*results, ("value", "gradient"), strict=True):
            assert_same_bits(got, want, f"{order}: {what}")


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**32 - 1), bits=st.integers(2, 8), kind=st.sampled_from(["", "nan", "inf", "zero", "ties"]))
def test_fused_weights_are_eq_3s_bit_for_bit(seed, bits, kind):
    generator = torch.Generator().manual_seed(seed)
    shape = [int(n) for n in torch.randint(1, 9, (4,), generator=generator)]
    w, g = (torch.randn(shape, generator=generator) * 0.3 for _ in range(2))
    if kind == "zero":
        w.zero_()
    elif kind == "ties":
        w.copy_(torch.randint(-3, 4, shape, generator=generator) * 1e-3)
    elif kind:
        w.view(-1)[0] = float(kind)
    for order in (torch.contiguous_format, torch.channels_last):
        results = []
        for smallest in (1, 1 << 30):
            loops.SMALLEST = smallest
            leaf = w.detach().clone(memory_format=order).requires_grad_()
            out = fake_quantize_weight(leaf, bits)
            out.backward(g)
            results.append((out, leaf.grad))
        for got, want, what in zip(*results, ("value", "gradient"), strict=True):
            assert_same_bits(got, want, f"{order}: {what}")


@pytest.mark.parametrize("bits", [32, 4])
def test_the_fused_lif_in_several_threads(bits, monkeypatch):
    """Pieces of memory go to threads; the result does not depend on how many."""
    monkeypatch.setattr(loops, "_CHUNK", 100)
    generator = torch.Generator().manual_seed(0)
    x, gs = (torch.randn(3, 2, 5, 9, 11, generator=generator) for _ in range(2))
    results = []
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        results.append(gradients(LIF(3, bits=bits), x, gs, None, 2))
    for name, value in results[0].items():
        assert_same_bits(results[1][name], value, name)


def _child(queue):
    x = torch.randn(2, 2, 5, 9, 11, generator=torch.Generator().manual_seed(1))
    queue.put(float(LIF(2)(x).sum()))


def test_a_forked_child_has_threads_of_its_own(monkeypatch):
    monkeypatch.setattr(loops, "_CHUNK", 100)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    _child(queue)
    want = queue.get(timeout=60)
    child = context.Process(target=_child, args=(queue,))
    child.start()
    assert queue.get(timeout=60) == want
    child.join()


def test_an_evaluation_keeps_no_membranes():
    lif, x = LIF(4, bits=4).eval(), torch.randn(4, 2, 3, 5, 5, generator=torch.Generator().manual_seed(2))
    kept = lif(x.clone().requires_grad_())
    with torch.no_grad():
        assert torch.equal(lif(x), kept)
    assert lif.last_h is None


@pytest.mark.parametrize(
    ("options", "tap"),
    [
        ({"quantize": "pre_fire", "bits": 4}, False),
        ({"alpha": "learned", "bits": 4}, False),
        ({}, "state"),
        ({"surrogate": type("Own", (Triangle,), {})()}, False),
    ],
)
def test_what_the_loops_cannot_do_goes_step_by_step(options, tap):
    lif, x = LIF(2, **options), torch.randn(2, 1, 2, 3, 3)
    lif.tap = tap
    assert lif._neuron(x) is None
    assert lif._neuron(x.double()) is None
    assert LIF(2)._neuron(x) is not None
    assert lif(x).shape == x.shape


def test_without_numba_torch_does_it(monkeypatch):
    monkeypatch.setattr(loops, "numba", None)
    assert LIF(2)._neuron(torch.zeros(2, 1, 1, 1, 1)) is None
