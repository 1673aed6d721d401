"""TensorBoard's copy of a run's metrics; metrics.csv and metrics.jsonl stay the record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mdsnn.kernels.errors import MissingError, StorageError

FOLDER = "tensorboard"


class Board:
    """Event files in RUN/tensorboard: a scalar for every number of a row, at its epoch.

    A run that goes on replaces what an earlier process left there by one file with the whole history, so that no row
    stands twice. TensorBoard appends to its files, so they alone of a run's files may be cut short by a kill.
    raises  MissingError if tensorboard is not installed, StorageError if the folder cannot be written
    """

    def __init__(self, run: Path, history: Sequence[Mapping[str, Any]]) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as fault:
            raise MissingError(
                "event files for TensorBoard need the package tensorboard: pip install tensorboard; or leave them out,"
                " metrics.csv holds the same numbers"
            ) from fault
        folder = run / FOLDER
        try:
            for path in folder.glob("events.out.tfevents.*"):
                path.unlink()
            self._writer = SummaryWriter(str(folder), purge_step=0)
        except OSError as fault:
            raise StorageError(f"{fault.filename or folder}: {fault.strerror or fault}") from fault
        for row in history:
            self.add(row)

    def add(self, row: Mapping[str, Any]) -> None:
        """Add the numbers of one epoch, and hand them to the disk."""
        for name, value in row.items():
            if name != "epoch" and isinstance(value, int | float):
                self._writer.add_scalar(name, value, row["epoch"])
        self._writer.flush()

    def close(self) -> None:
        """No more rows."""
        self._writer.close()
