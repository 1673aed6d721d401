"""Times by operation and stage: they add up, they change no integer; what the processor can do at most."""

from __future__ import annotations

import numpy as np
import pytest

from mdsnn.export import artifact
from mdsnn.kernels import native, profile
from mdsnn.kernels.engine import Engine
from mdsnn.kernels.errors import ConfigError
from mdsnn.kernels.network import IntegerNetwork

pytestmark = pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))


@pytest.fixture(scope="module")
def digits() -> IntegerNetwork:
    return artifact.load("builtin:digits")


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (3, 1, 8, 8), dtype=np.uint8)


@pytest.mark.parametrize("level", native.isa_levels() if native.missing() is None else ())
def test_a_timed_run_returns_the_same_and_its_stages_fit_in_the_whole(
    level: str, digits: IntegerNetwork, pixels: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MDSNN_ISA", level)
    backend = native.NativeBackend(digits)
    start = native.ticks()
    result, times = backend.timed(pixels)
    elapsed = native.ticks() - start
    want = Engine(digits, "native", 1).run(pixels)
    np.testing.assert_array_equal(result.logits, want.logits)
    assert result.activity.spikes_in.keys() == want.activity.spikes_in.keys()
    operations = backend.operations()
    assert times.shape == (len(operations), len(native.STAGES))
    gather, sums, epilogue, whole = times.T
    assert (times >= 0).all()
    assert (gather + sums + epilogue <= whole).all()
    assert 0 < whole.sum() <= elapsed
    fused = np.array([operation.conv is not None for operation in operations])
    assert fused.sum() == 9  # every convolution of the student
    assert (sums[fused] > 0).all()
    tiles = np.array([operation.method == "tiles" for operation in operations])
    assert (epilogue[fused & ~tiles] > 0).all()  # beside the products of tiles it runs unseen
    assert not times[~fused, :3].any()


def test_nothing_is_timed_unless_asked(digits: IntegerNetwork, pixels: np.ndarray) -> None:
    backend = native.NativeBackend(digits)
    _, times = backend.timed(pixels)
    before = times.copy()
    backend.run(pixels, False)
    np.testing.assert_array_equal(times, before)


def test_the_profile_names_every_operation_and_what_bounds_it(digits: IntegerNetwork, pixels: np.ndarray) -> None:
    found = profile.profile(digits, pixels, seconds=0.01)
    assert found.samples == 3
    convs = [layer for layer in found.layers if layer.work]
    assert [layer.name for layer in convs][:2] == ["stem", "groups.0.0.conv1"]
    assert sum(layer.total_ms for layer in found.layers) <= found.run_ms * 1.001
    for layer in convs:
        assert len(layer.ms) == len(profile.STAGES)
        assert min(layer.ms) >= 0.0
        rates = (found.ceilings.byte_adds, found.ceilings.pair_products, found.ceilings.tile_products)
        times = [1e3 * layer.work / rate for rate in rates if rate] + [
            1e3 * layer.weight_bytes / found.ceilings.weight_reads
        ]
        assert any(layer.ceiling_ms == pytest.approx(ms) for ms in times)
        assert layer.bound in ("work", "weights")
    with pytest.raises(ConfigError, match=r"seconds = 0 is not above 0"):
        profile.profile(digits, pixels, seconds=0)


def test_the_work_of_a_layer_is_its_spikes_times_its_weights_or_its_dense_products(
    digits: IntegerNetwork,
) -> None:
    assert profile._work(digits, "groups.0.0.conv1", "events, 8 bits", 100.0) == 100 * 16 * 9
    assert profile._work(digits, "groups.0.0.conv1", "events, 16 bits", 100.0) == 2 * 100 * 16 * 9
    assert profile._work(digits, "groups.1.0.conv1", "events, 8 bits", 100.0) == 100 * 32 * 9 / 4  # stride 2
    assert profile._work(digits, "groups.0.0.conv1", "tiles", 100.0) == 16 * 16 * 9 * 64 * 4
    assert profile._work(digits, "stem", "pairs", 0.0) == 16 * 9 * 64  # once: the same at every step


@pytest.mark.parametrize("level", native.isa_levels() if native.missing() is None else ())
def test_strain_tells_the_work_it_did(level: str) -> None:
    width = {"base": 16, "avx2": 32}.get(level, 64)
    assert native.strain(level, "byte_adds", 0, 10) == 10 * 8 * width
    assert native.strain(level, "pair_products", 0, 10) == 10 * 8 * width // 2
    assert native.strain(level, "reads", 10_000, 3) == 3 * (10_000 // (8 * width)) * 8 * width
    assert native.strain(level, "tile_products", 0, 10) == (10 * 4 * 16 * 16 * 64 if level == "amx" else 0)


def test_a_ceiling_is_a_rate_not_a_constant() -> None:
    found = profile.measure_ceilings(native.isa(), 1 << 16)
    assert 1e9 < found.pair_products < 1e13
    assert found.byte_adds > found.pair_products  # an addition of bytes is the cheaper one
    assert 1e8 < found.weight_reads < 1e13
