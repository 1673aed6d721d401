"""Wires: what IR drop makes of a crossbar's conductances.

Rows are driven from the left, columns are held at 0 V at the bottom, inactive rows are driven at 0 V. Such a crossbar
is a linear circuit, so whatever the input, its column currents are `effective_conductance(G)` transposed, times the
row voltages: one sparse factorization a crossbar, in float64 (float32 is off by up to 15 levels on such meshes).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mdsnn.kernels.errors import ConfigError, MissingError


def effective_conductance(
    g: npt.NDArray[np.float64], row_resistance: float, column_resistance: float
) -> npt.NDArray[np.float64]:
    """Current of each column for 1 V on one row and 0 V on the others, with resistive wires.

    g                  (rows, columns) S, conductances of the cells, all at least 0
    row_resistance     ohm of row wire from the driver to the first cell and between cells, at least 0
    column_resistance  ohm of column wire between cells and from the last cell to the converter, at least 0
    returns            (rows, columns) S; g itself where both resistances are 0
    raises             ConfigError   for a negative or non-finite resistance
                       MissingError  if scipy is not installed
    """
    for what, value in (("row", row_resistance), ("column", column_resistance)):
        if not (np.isfinite(value) and value >= 0):
            raise ConfigError(f"a {what} wire of {value} ohm a cell is not at least 0 and finite")
    if row_resistance == column_resistance == 0:
        return g.copy()
    try:
        from scipy.sparse import coo_array
        from scipy.sparse.linalg import splu
    except ImportError as fault:
        raise MissingError("IR drop needs scipy: pip install 'mdsnn[report]'") from fault
    rows, columns = g.shape
    # unknowns: the row-wire node and the column-wire node of each cell, where its wire has a resistance
    count = rows * columns
    a = np.arange(count).reshape(rows, columns) if row_resistance else None
    start = count if row_resistance else 0
    b = start + np.arange(count).reshape(rows, columns) if column_resistance else None
    size = start + (count if column_resistance else 0)
    ends: list[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.float64]]] = []
    diagonal: npt.NDArray[np.float64] = np.zeros(size)
    drive = np.zeros((size, rows))  # current injected for 1 V on a row

    def link(one: npt.NDArray[np.int64], two: npt.NDArray[np.int64], value: npt.NDArray[np.float64]) -> None:
        ends.append((one.ravel(), two.ravel(), value.ravel()))
        np.add.at(diagonal, one.ravel(), value.ravel())
        np.add.at(diagonal, two.ravel(), value.ravel())

    if a is not None:
        wire = 1.0 / row_resistance
        link(a[:, :-1], a[:, 1:], np.full((rows, columns - 1), wire))
        diagonal[a[:, 0]] += wire
        drive[a[:, 0], np.arange(rows)] += wire
    if b is not None:
        wire = 1.0 / column_resistance
        link(b[:-1], b[1:], np.full((rows - 1, columns), wire))
        diagonal[b[-1]] += wire
    if a is not None and b is not None:
        link(a, b, g)
    elif a is not None:  # the columns are at 0 V everywhere
        diagonal[a] += g
    elif b is not None:  # the rows are at the driver's voltage everywhere
        diagonal[b] += g
        for row in range(rows):
            drive[b[row], row] += g[row]
    one = np.concatenate([e[0] for e in ends])
    two = np.concatenate([e[1] for e in ends])
    joined = np.concatenate([e[2] for e in ends])
    at = np.arange(size)
    matrix = coo_array(
        (np.concatenate([diagonal, -joined, -joined]), (np.concatenate([at, one, two]), np.concatenate([at, two, one])))
    )
    voltages = splu(matrix.tocsc()).solve(drive)
    if b is not None:
        out: npt.NDArray[np.float64] = (voltages[b[-1]] / column_resistance).T
        return out
    assert a is not None  # one of the two resistances is above 0
    out = np.einsum("ijk,ij->kj", voltages[a], g)
    return out
