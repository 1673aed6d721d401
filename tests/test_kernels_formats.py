"""The arithmetic contract against slow recomputations: loops over every n, exact rationals, other spellings.

Nothing here calls the code under test to compute what it should return.
"""

import math
import warnings
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mdsnn.kernels import formats
from mdsnn.kernels.errors import FormatError
from mdsnn.kernels.formats import Grid

BITS = range(2, 9)
GRIDS = st.builds(Grid, st.integers(5, 12), st.sampled_from([1, 2, 3, 8, 64]))
ALPHAS = st.one_of(
    st.floats(2.0**-9, 1.0), st.sampled_from([0.0, 1e-9, 2.0**-9, 0.05, 0.3, 0.5, 1.0, 3.0, math.tanh(1)])
)


def half_even(x: Fraction) -> int:
    return round(x)  # Python rounds rationals half to even, exactly


# ------------------------------------------------------------------------------------------------ widths, grid


@pytest.mark.parametrize("bits", BITS)
def test_delta_is_the_largest_symmetric_code(bits):
    assert formats.delta(bits) == {2: 1, 3: 3, 4: 7, 5: 15, 6: 31, 7: 63, 8: 127}[bits]


@pytest.mark.parametrize("bits", [1, 9, 0, -4, 4.0, True, "4", None, np.int64(4)])
def test_bits_outside_2_to_8_or_of_another_type_are_refused(bits):
    with pytest.raises(FormatError, match=r"bits = .* is outside 2\.\.8"):
        formats.delta(bits)
    with pytest.raises(FormatError, match="weight_bits = "):
        formats.check_bits(bits, "weight_bits")


@pytest.mark.parametrize(
    ("frac_bits", "clip", "named"),
    [
        (4, 8, "frac_bits"),
        (13, 8, "frac_bits"),
        (9.0, 8, "frac_bits"),
        (True, 8, "frac_bits"),
        (9, 0, "clip"),
        (9, 65, "clip"),
    ],
)
def test_a_grid_outside_its_limits_is_refused(frac_bits, clip, named):
    with pytest.raises(FormatError, match=named):
        Grid(frac_bits, clip)


def test_the_default_grid_is_the_designs():
    grid = Grid()
    assert (grid.frac_bits, grid.one, grid.saturation) == (9, 512, 4096)


@pytest.mark.parametrize(("bits", "name"), [(8, "int8"), (16, "int16"), (32, "int32"), (64, "int64")])
def test_narrowest_changes_exactly_at_the_ends_of_a_width(bits, name):
    top = 2 ** (bits - 1)
    assert formats.narrowest(-top, top - 1) == name
    if bits < 64:
        assert formats.narrowest(-top - 1, 0) != name
        assert formats.narrowest(0, top) != name
    else:
        for span in ((-top - 1, 0), (0, top)):
            with pytest.raises(FormatError, match="more than 64 bits"):
                formats.narrowest(*span)


# ------------------------------------------------------------------------------------------------------ weights


@pytest.mark.parametrize("bits", BITS)
def test_weight_codes_are_eq_3_element_by_element(bits):
    weight = np.random.default_rng(bits).normal(0, 0.7, (3, 2, 3, 3))
    codes, alpha = formats.weight_codes(weight, bits)
    top = 2 ** (bits - 1) - 1
    assert alpha == max(abs(float(np.tanh(w))) for w in weight.flat)
    for got, w in zip(codes.flat, weight.flat, strict=True):
        assert got == half_even(Fraction(float(np.tanh(w)) / alpha * top))
    assert codes.dtype == np.int8
    assert codes.shape == weight.shape
    assert np.abs(codes).max() == top


def test_ties_of_weight_codes_go_to_even():
    # 2 bits have one tie, 0.5; a tanh that is exactly half of the largest
    big = 1.0
    half = math.atanh(math.tanh(big) / 2)
    near = [half + k * math.ulp(half) for k in range(-8, 9)]
    exact = [w for w in near if float(np.tanh(w)) / float(np.tanh(big)) == 0.5]
    assert exact, "no double hits the tie"
    assert formats.weight_codes([big, exact[0], -exact[0]], 2)[0].tolist() == [1, 0, 0]


def test_zero_weights_have_codes_0_and_alpha_1():
    codes, alpha = formats.weight_codes(np.zeros((2, 3)), 4)
    assert (codes.tolist(), alpha) == ([[0, 0, 0], [0, 0, 0]], 1.0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused_with_their_place(bad):
    with pytest.raises(FormatError, match="1 NaN or infinite values, the first at flat index 2"):
        formats.weight_codes([[0.0, 1.0], [bad, 0.0]], 4)


@given(st.lists(st.integers(-8, 7), min_size=1, max_size=33))
def test_nibbles_round_trip_and_lie_as_documented(codes):
    packed = formats.pack_nibbles(np.array(codes, np.int8))
    by_hand = [0] * ((len(codes) + 1) // 2)
    for i, code in enumerate(codes):
        by_hand[i // 2] += (code % 16) << (4 * (i % 2))
    assert packed.dtype == np.uint8
    assert packed.tolist() == by_hand
    back = formats.unpack_nibbles(packed, len(codes))
    assert back.dtype == np.int8
    assert back.tolist() == codes


@pytest.mark.parametrize("count", [1, 6, 7, 8, 13, 14, 15, 1001])
def test_nibbles_of_many_blocks_are_those_of_one(count, monkeypatch):
    codes = np.random.default_rng(count).integers(-8, 8, count).astype(np.int8)
    packed = formats.pack_nibbles(codes)
    for block in (1, 3, 4, 500, 501):
        monkeypatch.setattr(formats, "_BLOCK", block)
        assert formats.unpack_nibbles(packed, count).tolist() == codes.tolist()


def test_all_256_bytes_unpack_to_two_signed_nibbles():
    codes = formats.unpack_nibbles(np.arange(256, dtype=np.uint8), 512)
    for byte in range(256):
        for half, nibble in enumerate((byte & 15, byte >> 4)):
            assert codes[2 * byte + half] == (nibble if nibble < 8 else nibble - 16)


def test_nibbles_of_the_wrong_count_or_with_a_dirty_end_are_refused():
    for count in (0, 1, 2, 5, 6):
        with pytest.raises(FormatError, match="cannot hold exactly"):
            formats.unpack_nibbles(np.zeros(2, np.uint8), count)
    with pytest.raises(FormatError, match="padding nibble"):
        formats.unpack_nibbles(np.array([0, 0x10], np.uint8), 3)


# -------------------------------------------------------------------------------------------------------- input


@pytest.mark.parametrize(
    ("mean", "std"), [(0.0, 1.0), (0.3081, 0.1307), (0.5, 0.25), (1.0, 0.01), (0.0, 1e-300), (-3.0, 1e9)]
)
def test_the_image_table_is_its_formula_on_all_256_pixels(mean, std):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # 1e-300 overflows on its way into the clamp
        table = formats.image_table([mean, 0.5], [std, 0.5])
    assert table.dtype == np.int8
    assert table.shape == (2, 256)
    for pixel in range(256):
        real = (pixel / 255 - mean) / std * 32 + 0.5
        want = min(max(real, -128.0), 127.0) if math.isinf(real) else min(max(math.floor(real), -128), 127)
        assert table[0, pixel] == want


@pytest.mark.parametrize(
    ("mean", "std"),
    [([0.5], [0.0]), ([0.5], [-1.0]), ([0.5, 0.5], [1.0]), ([[0.5]], [[1.0]]), ([np.nan], [1.0]), ([0.5], [np.inf])],
)
def test_an_image_table_of_bad_statistics_is_refused(mean, std):
    with pytest.raises(FormatError):
        formats.image_table(mean, std)


def test_event_counts_saturate_at_127_and_never_wrap():
    table = formats.event_table(3)
    assert table.dtype == np.int8
    assert [row.tolist() for row in table] == [[min(n, 127) for n in range(256)]] * 3


# -------------------------------------------------------------------------------------------- accumulators, BN


@given(st.data())
@settings(max_examples=60)
def test_accumulator_bounds_are_reached_and_never_passed(data):
    c_out, fan_in = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4))
    lo, hi = data.draw(st.sampled_from([(0, 1), (-3, 2), (0, 4), (-2, 2)]))
    weight = np.array(
        data.draw(st.lists(st.integers(-7, 7), min_size=c_out * fan_in, max_size=c_out * fan_in)), np.int8
    )
    weight = weight.reshape(c_out, fan_in)
    inputs = np.array(np.meshgrid(*[np.arange(lo, hi + 1)] * fan_in)).reshape(fan_in, -1)
    every = weight.astype(np.int64) @ inputs
    got_lo, got_hi = formats.accumulator_bounds(weight, lo, hi)
    assert got_lo.tolist() == every.min(axis=1).tolist()
    assert got_hi.tolist() == every.max(axis=1).tolist()


def test_accumulator_bounds_of_many_blocks_are_those_of_one(monkeypatch):
    weight = np.random.default_rng(0).integers(-127, 128, (7, 5, 3, 3)).astype(np.int8)
    whole = formats.accumulator_bounds(weight, -128, 127)
    for block in (1, 4, 45, 46, 100):
        monkeypatch.setattr(formats, "_BLOCK", block)
        for got, want in zip(formats.accumulator_bounds(weight, -128, 127), whole, strict=True):
            assert got.tolist() == want.tolist()


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int64])
@pytest.mark.parametrize("code", [-128, -127, 127])
def test_accumulator_bounds_of_extreme_codes(dtype, code):
    weight = np.full((2, 300_000), code, dtype)  # more than one block a row
    weight[1, ::2] = 1
    lo, hi = formats.accumulator_bounds(weight, 0, 127)
    plus, minus = (300_000 * code, 0) if code > 0 else (0, 300_000 * code)
    half = 150_000 * 127
    assert lo.tolist() == [127 * minus, 127 * minus // 2]
    assert hi.tolist() == [127 * plus, 127 * plus // 2 + half]


SCALES = st.one_of(
    st.floats(-2.0, 2.0),
    st.floats(-1e-6, 1e-6),
    st.floats(-1e4, 1e4),
    st.sampled_from([0.0, 2.0**-30, 31.9999 / 512, 32 / 512, 64.0, 2.0**21]),
)
BIASES = st.one_of(st.floats(-8.0, 8.0), st.floats(-1e6, 1e6), st.sampled_from([0.0, -0.5 / 512, 0.5 / 512]))


@given(SCALES, BIASES, st.integers(0, 5_000_000), st.integers(0, 5_000_000), GRIDS)
@example(0.06249, 0.0, 0, 0, Grid())
@example(64.0, 0.0, 0, 2_000_000, Grid())
@settings(max_examples=300)
def test_affine_constants_are_exact_and_their_shift_is_the_largest(scale, bias, below, above, grid):
    """A and B by exact rationals, and g by trying every one."""
    reach = max(below, above)
    f = grid.frac_bits

    def constants(g: int) -> tuple[int, int]:
        a = half_even(Fraction(scale) * 2 ** (f + g))
        return a, half_even(Fraction(bias) * 2 ** (f + g)) + (2 ** (g - 1) if g else 0)

    fits = [
        g
        for g in range(25)
        if abs(constants(g)[0]) < 2**15 and abs(constants(g)[0]) * reach + abs(constants(g)[1]) < 2**31
    ]
    g = max(fits, default=0)
    a, b = constants(g)
    if abs(a) >= 2**31 or abs(a) * reach >= 2**61 or abs(b) >= 2**61:
        with pytest.raises(FormatError, match="beyond a 32-bit multiplier"):
            formats.affine_constants([scale], [bias], [-below], [above], grid)
        return
    affine = formats.affine_constants([scale], [bias], [-below], [above], grid)
    assert (affine.multiplier[0], affine.offset[0], affine.shift[0]) == (a, b, g)
    if a:
        assert affine.rounding == (grid.saturation + abs(bias) * grid.one) / (2.0 * abs(a))


@pytest.mark.parametrize(("below_limit", "g"), [(1, 4), (0, 3)])
def test_the_shift_falls_exactly_where_the_product_reaches_2_to_the_31(below_limit, g):
    bias = (2**31 - 2**3 - below_limit) / 2 ** (9 + 4)  # at g = 4, B = 2**31 - below_limit
    affine = formats.affine_constants([0.0], [bias], [0], [9], Grid())
    assert affine.shift[0] == g
    assert below_limit == 0 or affine.offset[0] == 2**31 - 1


@given(st.floats(-0.2, 0.2), st.floats(-2.0, 2.0), st.integers(1, 200))
@settings(max_examples=60)
def test_the_affine_form_is_within_its_stated_rounding_of_the_real_one(scale, bias, reach):
    """Against round-half-up of the exact real value: off by at most the recorded rounding, plus the one floor."""
    grid = Grid()
    affine = formats.affine_constants([scale], [bias], [-reach], [reach], grid)
    a, b, g = int(affine.multiplier[0]), int(affine.offset[0]), int(affine.shift[0])
    for acc in range(-reach, reach + 1):
        exact = (Fraction(scale) * acc + Fraction(bias)) * grid.one
        if abs(exact) > grid.saturation:
            continue
        bound = Fraction(affine.rounding) + Fraction(1, 2) + Fraction(1, 2 ** max(g, 1))
        assert abs(((a * acc + b) >> g) - exact) <= bound


@pytest.mark.parametrize(("acc", "want"), [(0, 0), (1, 1), (2, 1), (3, 2), (-1, 0), (-2, -1), (-3, -1)])
def test_the_affine_form_rounds_half_up_once(acc, want):
    grid = Grid()
    affine = formats.affine_constants([0.5 / 512], [0.0], [-4], [4], grid)  # half a grid step per unit
    a, b, g = int(affine.multiplier[0]), int(affine.offset[0]), int(affine.shift[0])
    assert (a * acc + b) >> g == want


def test_a_dead_channel_takes_no_bits_from_its_neighbour():
    affine = formats.affine_constants([300.0, 0.001], [0.0, 0.0], [0, 0], [9, 9], Grid())
    alone = formats.affine_constants([0.001], [0.0], [0], [9], Grid())
    assert affine.shift[0] == 0
    assert affine.shift[1] == alone.shift[0] > 10


@pytest.mark.parametrize(
    ("scale", "bias", "lo", "hi"),
    [([np.nan], [0.0], [0], [1]), ([1.0], [np.inf], [0], [1]), ([1e308], [0.0], [0], [1]), ([0.0], [1e300], [0], [1]),
     ([1.0, 2.0], [0.0], [0, 0], [1, 1]), ([1.0], [0.0], [0, 0], [1, 1]), ([[1.0]], [[0.0]], [[0]], [[1]])],
)  # fmt: skip
def test_bn_constants_that_no_width_holds_are_refused(scale, bias, lo, hi):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(FormatError):
            formats.affine_constants(scale, bias, lo, hi, Grid())


@given(st.lists(st.tuples(st.integers(-(2**15), 2**15), st.integers(-(2**30), 2**30), st.integers(0, 24),
                          st.integers(-40, 0), st.integers(0, 40)), min_size=1, max_size=4), GRIDS)  # fmt: skip
@settings(max_examples=60)
def test_the_dense_table_is_the_affine_form_at_every_accumulator(rows, grid):
    table = formats.dense_table(*(np.array(column) for column in zip(*rows, strict=True)), grid)
    c, want = grid.saturation, []
    for a, b, g, lo, hi in rows:
        want += [min(max((a * acc + b) // 2**g, -c), c) for acc in range(lo, hi + 1)]
    assert table.dtype == np.int32
    assert table.tolist() == want


# ---------------------------------------------------------------------------------------------------- membranes


def membrane_quantizer(n: int, alpha: float, bits: int, frac_bits: int) -> int:
    """MD-SNN Eq. 3 on the grid, one value."""
    top = 2 ** (bits - 1) - 1
    return half_even(Fraction(min(max(float(np.tanh(n / 2**frac_bits)) / alpha, -1.0), 1.0) * top))


@given(ALPHAS, st.sampled_from(BITS), st.integers(5, 9))
@settings(max_examples=40, deadline=None)
def test_thresholds_equal_requantizing_every_n(alpha, bits, frac_bits):
    """Both ways: each threshold is the least n of its code, and counting thresholds gives every n's code."""
    grid, top = Grid(frac_bits), 2 ** (bits - 1) - 1
    clamped = min(max(alpha, 2.0**-frac_bits), 1.0)
    assert formats.clamp_alpha(alpha, grid) == clamped
    thresholds = formats.requantize_thresholds(alpha, bits, grid)
    reach = 4 * grid.one if clamped < 0.999 else 9 * grid.one
    codes = [membrane_quantizer(n, clamped, bits, frac_bits) for n in range(-reach, reach + 1)]
    assert thresholds.dtype == np.int32
    assert thresholds.tolist() == [
        next(n for n, code in zip(range(-reach, reach + 1), codes, strict=True) if code >= j)
        for j in range(-top + 1, top + 1)
    ]
    counted = -top
    waiting = thresholds.tolist()
    for n, code in zip(range(-reach, reach + 1), codes, strict=True):
        while waiting and waiting[0] <= n:
            waiting.pop(0)
            counted += 1
        assert counted == code, f"n = {n}"


def test_a_coarse_grid_skips_codes_by_equal_thresholds():
    thresholds = formats.requantize_thresholds(2.0**-5, 8, Grid(5))
    assert len(set(thresholds.tolist())) < len(thresholds)
    assert np.all(np.diff(thresholds) >= 0)


@given(ALPHAS, st.sampled_from([0.5, 0.25, 1.0, 0.9, 1 / 3]), st.sampled_from(BITS), GRIDS)
def test_decode_is_its_formula_at_every_code(alpha, tau, bits, grid):
    clamped = min(max(alpha, 2.0**-grid.frac_bits), 1.0)
    top = 2 ** (bits - 1) - 1
    want = [math.floor(tau * clamped * q / top * 2**grid.frac_bits + 0.5) for q in range(-top, top + 1)]
    table = formats.decode_table(alpha, tau, bits, grid)
    assert table.dtype == np.int32
    assert table.tolist() == want
    assert table[top] == 0


@pytest.mark.parametrize("tau", [0.0, -0.5, 1.01, np.nan])
def test_a_tau_outside_0_to_1_is_refused(tau):
    with pytest.raises(FormatError, match="tau"):
        formats.decode_table(0.5, tau, 4, Grid())


@pytest.mark.parametrize("alpha", [np.nan, np.inf])
def test_an_alpha_that_is_not_finite_is_refused(alpha):
    with pytest.raises(FormatError, match="alpha"):
        formats.clamp_alpha(alpha, Grid())


@given(st.one_of(st.floats(1e-3, 4.0), st.integers(1, 4000).map(lambda n: n / 512)), st.integers(5, 12))
def test_the_threshold_code_splits_every_h_where_the_real_threshold_does(v_th, frac_bits):
    grid = Grid(frac_bits)
    strict = formats.threshold_code(v_th, grid)
    inclusive = formats.threshold_code(v_th, grid, inclusive=True)
    middle = int(v_th * grid.one)
    for h in (-1, 0, *range(max(middle - 3, 0), middle + 4)):
        assert (h > strict) == (Fraction(h, grid.one) > Fraction(v_th))
        assert (h > inclusive) == (Fraction(h, grid.one) >= Fraction(v_th))


@pytest.mark.parametrize("v_th", [0.0, -0.5, np.nan, np.inf, 2.0**22])
def test_a_threshold_that_no_grid_holds_is_refused(v_th):
    with pytest.raises(FormatError, match="v_th"):
        formats.threshold_code(v_th, Grid())


@pytest.mark.parametrize(("v_th", "want"), [(0.5, 256), (0.3, 154), (1 / 1024 * 3, 2), (5 / 1024, 2)])
def test_the_soft_reset_subtracts_the_nearest_code_ties_to_even(v_th, want):
    assert formats.soft_reset_code(v_th, Grid()) == want


@pytest.mark.parametrize("v_th", [0.0, 1 / 2048, -1.0, np.nan, 2.0**30])
def test_a_soft_reset_of_nothing_or_too_much_is_refused(v_th):
    with pytest.raises(FormatError, match="v_th"):
        formats.soft_reset_code(v_th, Grid())


@given(st.floats(0.01, 0.9), st.floats(0.0, 1.0), st.sampled_from(BITS))
def test_pre_fire_spikes_where_the_decoded_code_passes_the_threshold(v_th, share, bits):
    alpha = min(1.0, v_th * (1.05 + share))
    top = 2 ** (bits - 1) - 1
    q_th = formats.pre_fire_code(v_th, alpha, bits, Grid())
    assert 0 <= q_th < top
    for q in range(-top, top + 1):
        real = alpha * q / top
        if abs(real - v_th) > 1e-9:  # at the last bit the quotient's own rounding decides
            assert (q > q_th) == (real > v_th)


@pytest.mark.parametrize(
    ("v_th", "alpha"), [(0.5, 0.5), (0.6, 0.5), (1.0, 7.0), (0.0, 0.5), (-1.0, 0.5), (np.nan, 0.5)]
)
def test_a_pre_fire_neuron_that_never_or_always_fires_is_refused(v_th, alpha):
    with pytest.raises(FormatError, match="v_th"):
        formats.pre_fire_code(v_th, alpha, 4, Grid())


# --------------------------------------------------------------------------------------- shortcut and classifier


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("frac_bits", range(5, 13))
def test_a_shortcuts_codes_span_about_8_whatever_their_width(bits, frac_bits):
    shift = formats.shortcut_shift(bits, Grid(frac_bits))
    assert 2**shift * 2 ** (bits - 1) == 8 * 2**frac_bits
    assert bits != 8 or shift == frac_bits - 4


def test_the_classifiers_bias_is_rounded_once_in_units_of_its_codes():
    bias, alpha, summed = [0.1, -0.25, 0.0], 0.8, 4 * 8 * 8
    codes = formats.classifier_bias(bias, alpha, 8, summed)
    assert codes.dtype == np.int64
    assert codes.tolist() == [round(b * summed * 127 / alpha) for b in bias]


@pytest.mark.parametrize("bias", [np.nan, np.inf, 1e9, 1e300])
def test_a_classifiers_bias_beyond_32_bits_is_refused(bias):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(FormatError, match="classifier's bias"):
            formats.classifier_bias([0.0, bias], 1e-10, 8, 256)
