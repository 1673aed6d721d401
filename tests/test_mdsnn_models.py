"""MS-ResNet and VGG of any depth and width build, run, train, and are rebuilt by their config."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch

from mdsnn.kernels.errors import ConfigError, FormatError
from mdsnn.layers import LIF, Block, Group, QuantBatchNorm2d, QuantConv2d, Readout, ShortcutQuant, taps
from mdsnn.models import MODELS, build, ms_resnet, ms_resnet18, ms_resnet34, vgg, vgg9, vgg16

STUDENT = {"weight_bits": 4, "membrane_bits": 4, "bn_bits": 8}


def pixels(n, c, size, seed=0):
    return torch.randint(0, 256, (n, c, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def names(model, where):
    paths = {module: name for name, module in model.named_modules()}
    return [paths[lif] for lif in taps(model, where)]


@pytest.mark.parametrize("options", [{}, STUDENT], ids=["teacher", "student"])
@pytest.mark.parametrize(
    "make",
    [
        lambda o: ms_resnet((1,), (4,), size=8, **o),
        lambda o: ms_resnet((1, 2, 1), (4, 4, 6), size=8, **o),
        lambda o: ms_resnet((2, 1), (3, 8), size=9, stem="imagenet", reset="soft", surrogate="rectangle", **o),
        lambda o: vgg((1, 2), (4, 6), hidden=8, size=8, **o),
        lambda o: vgg((1,), (4,), hidden=8, size=8, quantize="pre_fire", alpha="learned", **o),
        lambda o: vgg((1, 1), (4, 6), hidden=(8, 5), size=8, pool="sum", norm="tdbn", **o),
    ],
)
def test_it_runs_and_every_parameter_gets_a_gradient(make, options):
    model = make({"generator": torch.Generator().manual_seed(0), "classes": 7, **options})
    x = pixels(8, 3, model.config["size"][0])
    model(x)  # the first batch sets every alpha
    logits = model(x)
    assert logits.shape == (8, 7)
    torch.nn.functional.cross_entropy(logits, torch.arange(8) % 7).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize("coding", ["image", "events"])
def test_config_rebuilds_the_model_from_json(coding):
    model = ms_resnet((1, 1), (4, 6), in_channels=2, size=(8, 10), coding=coding, width=0.7, **STUDENT)
    again = build(json.loads(json.dumps(model.config)))
    assert again.config == model.config
    again.load_state_dict(model.state_dict())
    x = torch.randint(0, 256, (4, 3, 2, 8, 10) if coding == "events" else (3, 2, 8, 10), dtype=torch.uint8)
    assert torch.equal(model.eval()(x), again.eval()(x))
    assert str(again) == str(model)


def test_vgg_is_rebuilt_too():
    model = vgg((1,), (4,), hidden=5, in_channels=1, size=8, **STUDENT)
    assert build(json.loads(json.dumps(model.config))).config == model.config


@pytest.mark.parametrize(("make", "blocks"), [(ms_resnet18, [2, 2, 2, 2]), (ms_resnet34, [3, 4, 6, 3])])
def test_the_paper_networks(make, blocks):
    with torch.device("meta"):
        convs = sum(blocks) * 2 + 1
        model = make(weight_bits=4, membrane_bits=4, bn_bits=8, mean=(0.5,) * 3)
    assert [len(group) for group in model.groups] == blocks
    layers = [m for m in model.modules() if isinstance(m, QuantConv2d)]
    assert len(layers) == convs + 3  # three groups change the shape
    assert len([m for m in model.modules() if isinstance(m, LIF)]) == convs
    assert names(model, "group") == ["groups.1.0.lif1", "groups.2.0.lif1", "groups.3.0.lif1", "lif"]
    assert len(taps(model, "block")) == sum(blocks)
    assert len(taps(model, "conv")) == convs


@pytest.mark.parametrize(("stem", "sides"), [("cifar", [32, 32, 16]), ("imagenet", [16, 8, 4])])
def test_stems_and_groups_halve_the_size(stem, sides):
    model, seen = ms_resnet((1, 1), (4, 6), stem=stem), []
    for module in (model.stem, *model.groups):
        module.register_forward_hook(lambda _, given, out: seen.append(tuple(out.shape[-3:])))
    model(pixels(2, 3, 32))
    assert seen == [(c, side, side) for c, side in zip((4, 4, 6), sides, strict=True)]


def test_taps_are_the_same_places_in_teacher_and_student():
    for where in ("conv", "block", "group"):
        assert names(ms_resnet((1, 1), (4, 6)), where) == names(ms_resnet((1, 1), (4, 6), **STUDENT), where)
        assert names(vgg(), where) == names(vgg(**STUDENT), where)


def test_a_student_starts_from_its_teachers_weights():
    teacher, student = ms_resnet((1, 1), (4, 6)), ms_resnet((1, 1), (4, 6), **STUDENT)
    student.load_state_dict(teacher.state_dict())
    assert torch.equal(student.stem.weight, teacher.stem.weight)


def test_bits_go_where_they_belong():
    model = ms_resnet((1, 1), (4, 6), weight_bits=3, membrane_bits=5, bn_bits=7, stem_bits=6, shortcut_bits=4)
    convs = {n: m.weight_bits for n, m in model.named_modules() if isinstance(m, QuantConv2d)}
    assert convs.pop("stem") == 6
    assert set(convs.values()) == {3}
    kinds = {LIF: 5, QuantBatchNorm2d: 7, ShortcutQuant: 4}
    for kind, bits in kinds.items():
        assert {m.bits for m in model.modules() if isinstance(m, kind)} == {bits}
    assert model.readout.weight_bits == 6
    teacher = ms_resnet((1, 1), (4, 6))
    for module in teacher.modules():
        for key in ("bits", "weight_bits"):
            assert getattr(module, key, 32) == 32
        assert getattr(module, "output_grid", None) is None


@pytest.mark.parametrize(
    ("make", "fault", "message"),
    [
        (lambda: ms_resnet((1, 1), (4,)), ConfigError, r"widths = \[4\] must be 2 whole numbers"),
        (lambda: ms_resnet((0, 1), (4, 4)), ConfigError, r"blocks = \[0, 1\]"),
        (lambda: ms_resnet((), ()), ConfigError, r"blocks = \[\]"),
        (lambda: ms_resnet(stem="patch"), ConfigError, "'patch' is not one of cifar, imagenet"),
        (lambda: ms_resnet(coding="rate"), ConfigError, "'rate' is not one of image, events"),
        (lambda: ms_resnet(bits=4), ConfigError, "unknown model options: bits; known: classes"),
        (lambda: ms_resnet(surrogate="atan"), ConfigError, "'atan' is not one of"),
        (lambda: ms_resnet(classes=0), ConfigError, "classes = 0"),
        (lambda: ms_resnet(weight_bits=9), FormatError, r"weight_bits = 9 is outside 2\.\.8"),
        (lambda: ms_resnet(membrane_bits=1), FormatError, r"membrane bits = 1 is outside 2\.\.8"),
        (lambda: ms_resnet(grid={"frac_bits": 4}), FormatError, r"frac_bits = 4 is outside"),
        (lambda: vgg((1, 1, 1), (4, 4, 4), size=4), ConfigError, "cannot be halved 3 times"),
        (
            lambda: build({"model": "resnet"}),
            ConfigError,
            "'resnet' is not one of ms_resnet, ms_resnet18",
        ),
        (lambda: ms_resnet(norm="ln"), ConfigError, "norm 'ln' is not one of bn, tdbn"),
        (lambda: vgg(pool="mean"), ConfigError, "pool 'mean' is not one of max, sum"),
        (lambda: vgg(hidden=()), ConfigError, "hidden"),
        (lambda: vgg16(size=16), ConfigError, "cannot be halved 5 times"),
        (lambda: build({}), ConfigError, "None is not one of"),
    ],
)
def test_options_outside_their_range_are_refused(make, fault, message):
    with pytest.raises(fault, match=message):
        make()


def test_the_readout_is_last_in_every_model():
    for make in MODELS.values():
        assert isinstance(list(make().modules())[-1], Readout)


@pytest.mark.parametrize(("make", "convs", "linears"), [(vgg9, 7, 2), (vgg16, 13, 3)])
def test_the_vggs_of_the_literature(make, convs, linears):
    with torch.device("meta"):
        model = make(weight_bits=4, membrane_bits=4, bn_bits=8, mean=(0.5,) * 3)
    kinds = [type(m).__name__ for m in model.modules()]
    assert kinds.count("QuantConv2d") == convs
    assert kinds.count("QuantLinear") + kinds.count("Readout") == linears
    assert kinds.count("SpikeMaxPool2d") == len(model.config["widths"])
    assert build(json.loads(json.dumps(model.config | {"size": [32, 32]}))).config == model.config


@pytest.mark.parametrize("where", ["block", "group"])
@pytest.mark.parametrize(
    "make",
    [
        lambda o: ms_resnet18(widths=(2, 3, 4, 5), **o),
        lambda o: ms_resnet34(widths=(2, 3, 4, 5), **o),
        lambda o: ms_resnet((1, 2), (3, 4), **o),
        lambda o: vgg16(widths=(2, 2, 2, 2, 2), hidden=(4,), **o),
    ],
    ids=["resnet18", "resnet34", "small", "vgg16"],
)
def test_a_tap_reads_what_its_block_or_group_delivers(make, where):
    """At t = 0 the membrane is the input itself: h of the tap is the block's or the group's output, bit for bit."""
    model = make({"size": 32, "timesteps": 2, **STUDENT})
    kind = Block if where == "block" else Group
    delivered = []
    lifs = taps(model, where)
    for module in model.modules():
        if isinstance(module, kind):
            module.register_forward_hook(lambda _module, _inputs, output: delivered.append(output))
    for lif in lifs:
        lif.tap = True
    model(pixels(2, 3, 32))
    assert len(lifs) == len(delivered)
    for lif, output in zip(lifs, delivered, strict=True):
        assert lif.last_h.shape == (2, *output.shape[1:])
        assert torch.equal(lif.last_h[0], output[0])


@pytest.mark.parametrize("where", ["conv", "block", "group"])
@pytest.mark.parametrize("options", [{}, STUDENT, {**STUDENT, "quantizer": "mint"}], ids=["teacher", "tanh", "mint"])
def test_recomputed_blocks_train_to_the_same_bits(options, where):
    """Losses, gradients, statistics, scales and taps over three updates, the first of which starts the scales."""
    options = {"size": 8, "statistics_bits": 16 if where == "conv" else 32, **options}
    plain = ms_resnet((2, 1), (3, 4), generator=torch.Generator().manual_seed(0), **options)
    again = ms_resnet((2, 1), (3, 4), checkpoint_activations=True, **options)
    again.load_state_dict(plain.state_dict())
    assert again.config == plain.config | {"checkpoint_activations": True}
    seen = []
    for model in (plain, again):
        lifs, rows = taps(model, where), []
        for lif in lifs:
            lif.tap = True
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(3):
            loss = model(pixels(4, 3, 8, seed=step)).square().sum() + sum(lif.last_h.square().mean() for lif in lifs)
            optimizer.zero_grad()
            loss.backward()
            rows += [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
            optimizer.step()
        seen.append([*rows, *(x.clone() for x in model.state_dict().values())])
    assert len(seen[0]) == len(seen[1])
    for got, want in zip(seen[1], seen[0], strict=True):
        assert torch.equal(got, want)


def test_recomputed_blocks_keep_less():
    kept = []
    for recompute in (False, True):
        total = 0

        def pack(x):
            nonlocal total
            total += x.numel()
            return x

        model = ms_resnet((2, 2), (4, 4), size=8, checkpoint_activations=recompute)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            model(pixels(4, 3, 8))
        kept.append(total)
    assert kept[1] < 0.5 * kept[0]


@pytest.mark.parametrize(
    "options",
    [
        {"norm": "tdbn"},
        STUDENT,
        pytest.param({**STUDENT, "quantizer": "mint"}, marks=pytest.mark.slow),
        pytest.param({**STUDENT, "alpha": "dynamic", "reset": "soft"}, marks=pytest.mark.slow),
    ],
    ids=["teacher", "tanh", "mint", "dynamic"],
)
def test_training_is_one_graph_of_torch_compile(options) -> None:
    """No value is looked at on the way, from the first batch on; the same bits as eager, its statistics too."""
    torch._dynamo.reset()
    eager = ms_resnet((1,), (3,), size=6, timesteps=2, **options).train()
    model = copy.deepcopy(eager)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for seed in range(3):
        x = torch.randint(0, 256, (2, 3, 6, 6), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
        for network, call in ((eager, eager), (model, compiled)):
            network.lif.tap = True
            loss = call(x).square().mean() + network.lif.last_h.mean()
            loss.backward()
    for name, value in eager.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    gradients = {name: p.grad for name, p in model.named_parameters()}
    for name, parameter in eager.named_parameters():
        assert (gradients[name] is None) == (parameter.grad is None), name
        assert parameter.grad is None or torch.equal(gradients[name], parameter.grad), name


@pytest.mark.parametrize("options", [{}, STUDENT, {**STUDENT, "quantizer": "mint"}], ids=["teacher", "tanh", "mint"])
def test_a_step_of_training_looks_at_no_value(options) -> None:
    """A GPU would have to wait for it: tensors without values do, once the first batch is through."""
    model = ms_resnet((1, 1), (3, 4), size=6, timesteps=2, **options).train()
    model(pixels(2, 3, 6))
    model = model.to("meta")
    model.lif.tap = True
    (model(pixels(2, 3, 6).to("meta")).square().mean() + model.lif.last_h.mean()).backward()
    assert all(p.grad is not None for p in model.parameters() if p.ndim > 1)


def test_a_lif_knows_after_loading_whether_its_scale_has_begun() -> None:
    x = torch.rand(2, 1, 2, 3, 3)
    lif, other = LIF(2, bits=4).train(), LIF(2, bits=4).train()
    lif(x)
    other.load_state_dict(lif.state_dict())
    other(10 * x)
    peak = torch.tanh((10 * x).abs().amax())
    assert float(other.alpha) < 0.95 * float(peak)  # a step towards it, not the peak itself
    other.load_state_dict(LIF(2, bits=4).state_dict())
    other(0.01 * x)
    assert float(other.alpha) < 0.05


def test_tdbn_scales_gamma_by_the_threshold():
    """gamma is multiplied by v_th, and by sqrt(1/2) on branches that are added (arXiv 2011.05280, Eqs. 5 and 13)."""
    model = ms_resnet((1, 1), (4, 6), norm="tdbn", v_th=0.4, size=8)
    gains = {n: m.gain for n, m in model.named_modules() if isinstance(m, QuantBatchNorm2d)}
    added = 0.4 * np.sqrt(0.5)
    assert gains.pop("stem_bn") == 0.4
    assert gains == {n: pytest.approx(0.4 if n.endswith("bn1") else added) for n in gains}
    plain = copy.deepcopy(model)
    for module in plain.modules():
        if isinstance(module, QuantBatchNorm2d):
            module.weight.data.mul_(module.gain)
            module.gain = 1.0
    x = pixels(4, 3, 8)
    assert torch.allclose(model(x), plain(x), atol=1e-6)
    with pytest.raises(ConfigError, match="BN gain = 0"):
        QuantBatchNorm2d(3, gain=0.0)
