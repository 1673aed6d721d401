"""Verify a finished demo's student in every executor, and copy it into the package as builtin:digits.

Usage: python benchmarks/ship_digits.py runs/demo
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np

from mdsnn.cli.verify import check
from mdsnn.data import digits
from mdsnn.kernels.files import write_bytes

ASSETS = Path(__file__).parent.parent / "mdsnn" / "assets"
SAMPLES = 64


def _npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=False)
    return stream.getvalue()


def main(demo: Path) -> int:
    """Ship `demo`'s student.mdsnn with the first 64 test digits; 1 if its executors disagree."""
    artifact = demo / "student.mdsnn"
    outcome = check(str(artifact), checkpoint=str(demo / "student" / "model.ckpt"), save_dir=str(demo))
    print(f"{outcome['compared']} integers compared, {outcome['differing']} differ")
    if not outcome["agrees"] or outcome["constants"]:
        return 1
    data = digits()
    ASSETS.mkdir(exist_ok=True)
    write_bytes(ASSETS / "digits.mdsnn", artifact.read_bytes(), force=True)
    write_bytes(ASSETS / "digits_pixels.npy", _npy(data.test_x[:SAMPLES]), force=True)
    write_bytes(ASSETS / "digits_labels.npy", _npy(data.test_y[:SAMPLES].astype(np.uint8)), force=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/demo")))
