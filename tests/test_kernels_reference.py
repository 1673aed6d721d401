"""The NumPy definition against naive loops and trajectories worked out by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mdsnn.kernels import reference
from mdsnn.kernels.formats import Grid, accumulator_bounds, affine_constants, dense_table, requantize_thresholds
from planted import assert_same_bits

SEEDS = st.integers(0, 2**32 - 1)


def padded(x: np.ndarray, c: int, y: int, z: int) -> int:
    """x[c, y, z] as a Python integer, 0 outside."""
    _, height, width = x.shape
    return int(x[c, y, z]) if 0 <= y < height and 0 <= z < width else 0


def naive_conv(x: np.ndarray, weight: np.ndarray, stride: int, padding: int, groups: int) -> np.ndarray:
    """Seven loops over Python integers."""
    n, c_in, height, width = x.shape
    c_out, per_group, kh, kw = weight.shape
    out = np.zeros(
        (n, c_out, (height + 2 * padding - kh) // stride + 1, (width + 2 * padding - kw) // stride + 1), np.int64
    )
    for s, o, y, z in np.ndindex(*out.shape):
        first = (o // (c_out // groups)) * (c_in // groups)
        out[s, o, y, z] = sum(
            int(weight[o, c, i, j]) * padded(x[s], first + c, y * stride + i - padding, z * stride + j - padding)
            for c, i, j in np.ndindex(per_group, kh, kw)
        )
    return out


@st.composite
def conv_cases(draw):
    groups, per_group, out_per_group = (
        draw(st.sampled_from([1, 1, 2, 3])),
        draw(st.integers(1, 3)),
        draw(st.integers(1, 3)),
    )
    kh, kw = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    padding = draw(st.integers(0, min(kh, kw) - 1))
    height = draw(st.integers(max(1, kh - 2 * padding), 5))
    width = draw(st.integers(max(1, kw - 2 * padding), 5))
    rng = np.random.default_rng(draw(SEEDS))
    span = draw(st.sampled_from([(0, 1), (-128, 127), (127, 127)]))
    x = rng.integers(span[0], span[1] + 1, (draw(st.integers(1, 2)), groups * per_group, height, width))
    weight = rng.integers(-127, 128, (groups * out_per_group, per_group, kh, kw)).astype(np.int8)
    return x, weight, draw(st.integers(1, 3)), padding, groups


@given(conv_cases())
@settings(max_examples=60, deadline=None)
def test_conv2d_is_seven_loops(case):
    assert_same_bits(reference.conv2d(*case), naive_conv(*case), "accumulators [N,C,H,W]")


def test_conv2d_does_not_flip_its_kernel():
    x = np.array([[[[1, 0, 0]]]])
    weight = np.array([[[[5, 7]]]], np.int8)
    assert reference.conv2d(x, weight, 1, 0, 1).tolist() == [[[[5, 0]]]]


@given(SEEDS, st.integers(1, 4), st.integers(1, 9))
def test_linear_and_readout_are_sums_of_products(seed, out, width):
    rng = np.random.default_rng(seed)
    x = rng.integers(-128, 128, (2, width, 1, 1))
    weight, bias = rng.integers(-127, 128, (out, width)).astype(np.int8), rng.integers(-999, 999, out).astype(np.int32)
    want = [
        [sum(int(w) * int(v) for w, v in zip(row, sample, strict=True)) for row in weight] for sample in x[:, :, 0, 0]
    ]
    assert reference.linear(x, weight)[:, :, 0, 0].tolist() == want
    with_bias = [[value + int(b) for value, b in zip(sample, bias, strict=True)] for sample in want]
    assert reference.readout(x, weight, bias).tolist() == with_bias


@given(SEEDS, st.sampled_from([(0, 1), (-4, 3), (0, 9)]), st.floats(1e-3, 1e3))
@settings(max_examples=60)
def test_bn_affine_and_bn_dense_agree_on_every_reachable_accumulator(seed, span, magnitude):
    grid, channels = Grid(), 5
    rng = np.random.default_rng(seed)
    weight = rng.integers(-7, 8, (channels, 6)).astype(np.int8)
    weight[0] = 0
    lo, hi = accumulator_bounds(weight, *span)
    affine = affine_constants(rng.normal(0, magnitude / 10, channels), rng.normal(0, 1, channels), lo, hi, grid)
    constants = affine.multiplier, affine.offset, affine.shift
    table = dense_table(*constants, lo, hi, grid)
    for channel in range(channels):
        for acc in range(int(lo[channel]), int(hi[channel]) + 1):
            x = lo.copy()
            x[channel] = acc
            x = x[None, :, None, None]
            got = reference.bn_affine(x, *constants, grid.saturation)
            assert_same_bits(reference.bn_dense(x, table, lo, hi), got, f"channel {channel}, acc {acc}")
            a, b, g = (int(constant[channel]) for constant in constants)
            assert got[0, channel, 0, 0] == min(max((a * acc + b) // 2**g, -grid.saturation), grid.saturation)


def test_bn_affine_floors_below_zero_and_clamps_at_both_ends():
    acc = np.array([-9, -3, -1, 0, 1, 3, 9]).reshape(-1, 1, 1, 1)
    y = reference.bn_affine(acc, np.array([3]), np.array([0]), np.array([1], np.uint8), 5)
    assert y.ravel().tolist() == [-5, -5, -2, 0, 1, 4, 5]


def test_input_table_reads_the_row_of_the_channel():
    table = np.stack([np.arange(256) - 128, 127 - np.arange(256)]).astype(np.int8)
    pixels = np.array([[[[0, 255]], [[0, 255]]]], np.uint8)
    assert reference.input_table(pixels, table).tolist() == [[[[-128, 127]], [[127, -128]]]]


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("shift", [1, 3, 5])
def test_requantize_rounds_half_up_and_clips(bits, shift):
    top = 2 ** (bits - 1) - 1
    x = np.arange(-3 * (top + 2) * 2**shift, 3 * (top + 2) * 2**shift)
    want = [min(max((int(v) + 2 ** (shift - 1)) // 2**shift, -top), top) for v in x]
    assert reference.requantize(x, shift, bits).tolist() == want


@given(SEEDS, st.integers(1, 4), st.integers(1, 3), st.integers(0, 2), st.integers(1, 5), st.integers(1, 5))
@settings(max_examples=80)
def test_max_pool_skips_padding(seed, kernel, stride, padding, height, width):
    padding = min(padding, kernel // 2)
    if kernel > min(height, width) + 2 * padding:
        return
    x = np.random.default_rng(seed).integers(0, 2, (2, 3, height, width))
    out = reference.max_pool(x, kernel, stride, padding)
    assert out.shape[2:] == (
        (height + 2 * padding - kernel) // stride + 1,
        (width + 2 * padding - kernel) // stride + 1,
    )
    for n, c, y, z in np.ndindex(*out.shape):
        window = [
            int(x[n, c, i, j])
            for i in range(y * stride - padding, y * stride - padding + kernel)
            for j in range(z * stride - padding, z * stride - padding + kernel)
            if 0 <= i < height and 0 <= j < width
        ]
        assert out[n, c, y, z] == max(window)


@given(SEEDS, st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.booleans())
@settings(max_examples=80)
def test_sum_pool_counts_padding_as_0(seed, kernel_height, kernel_width, stride, pad):
    padding = min(kernel_height, kernel_width) // 2 if pad else 0
    x = np.random.default_rng(seed).integers(0, 10, (2, 2, 4, 5))
    out = reference.sum_pool(x, kernel_height, kernel_width, stride, padding)
    for n, c, y, z in np.ndindex(*out.shape):
        assert out[n, c, y, z] == sum(
            padded(x[n], c, y * stride + i - padding, z * stride + j - padding)
            for i, j in np.ndindex(kernel_height, kernel_width)
        )


# ---------------------------------------------------------------------------------------------------------- LIF

# 2 bits: codes -1, 0, 1; thresholds -4 and 6: q = -1 below -4, 0 in -4..5, 1 from 6 on; a code is worth 8
LIF = {"decode": np.array([-8, 0, 8], np.int32), "thresholds": np.array([-4, 6], np.int32), "bits": 2, "v_th": 10}


def steps(inputs: list[int], **options) -> list[tuple[int, int, int]]:
    """(h, s, q) after each input, from q = 0."""
    settings = {"reset": "hard", "v_soft": 0, "quantize": "post_reset", "q_th": 0, **LIF, **options}
    q, seen = np.array([0]), []
    for x in inputs:
        h, s, q = reference.lif_step(np.array([x]), q, **settings)
        seen.append((int(h[0]), int(s[0]), int(q[0])))
    return seen


def test_lif_hard_reset_by_hand():
    assert steps([5, 6, 2, 3, 10, 11, -4, -5, -3, 18]) == [
        (5, 0, 0),  # below 6: code 0
        (6, 0, 1),  # on the threshold: code 1
        (10, 0, 1),  # 2 + 8 = v_th, which does not fire
        (11, 1, 0),  # 3 + 8 > v_th: fires, u = 0
        (10, 0, 1),
        (19, 1, 0),
        (-4, 0, 0),  # on the lower threshold
        (-5, 0, -1),
        (-11, 0, -1),  # -3 - 8
        (10, 0, 1),  # 18 - 8
    ]


def test_lif_soft_reset_by_hand():
    assert steps([10, 3, 16, 30, 11], reset="soft", v_soft=10) == [
        (10, 0, 1),
        (11, 1, 0),  # u = 11 - 10 = 1
        (16, 1, 1),  # u = 6: the code survives the reset
        (38, 1, 1),  # 30 + 8; u = 28
        (19, 1, 1),  # 11 + 8; u = 9
    ]


def test_lif_pre_fire_by_hand():
    # q_th = 0: a spike is code 1, that is h >= 6; v_th plays no part
    assert steps([5, 6, 5, -5, 14, -9, 3], quantize="pre_fire", q_th=0) == [
        (5, 0, 0),
        (6, 1, 0),  # code 1 > q_th: fires, q = 0
        (5, 0, 0),
        (-5, 0, -1),
        (6, 1, 0),  # 14 - 8
        (-9, 0, -1),
        (-5, 0, -1),  # 3 - 8
    ]


def test_a_skipped_code_counts_both_thresholds():
    assert [q for _, _, q in steps([2, 3], thresholds=np.array([3, 3], np.int32))] == [-1, -1]  # h = 2, 3 - 8
    assert steps([3], thresholds=np.array([3, 3], np.int32)) == [(3, 0, 1)]


@pytest.mark.parametrize("bits", range(2, 9))
def test_membrane_code_counts_the_thresholds_passed(bits):
    thresholds = requantize_thresholds(0.4, bits, Grid())
    u = np.arange(-2000, 2001)
    want = [-(2 ** (bits - 1) - 1) + sum(1 for t in thresholds.tolist() if t <= value) for value in u.tolist()]
    assert reference.membrane_code(u, thresholds, bits).tolist() == want


def test_residual_add_does_not_clip():
    assert reference.residual_add(np.array([4096]), np.array([4096])).tolist() == [8192]
