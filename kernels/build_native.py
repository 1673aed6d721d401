"""Builds the C engine's extension, mdsnn.kernels._native, through cffi in API mode.

The declarations come out of src/mdsnn.h, so each stands once. setup.py names `builder`; the extension is optional: a
machine without a working compiler still installs, and the engine then takes Numba or NumPy. The instruction sets are
chosen at run time (src/run.c), so nothing here depends on the machine that builds.
"""

from __future__ import annotations

import os
import re

import cffi

SOURCES = ("run.c", "isa_base.c", "isa_avx2.c", "isa_avx512.c", "isa_amx.c")
"""What is compiled; the operator families are included by the isa_*.c files."""
FLAGS = ("-std=c11", "-O3")


def contract(header: str) -> str:
    """The C declarations of a header, without the preprocessor's lines and comments."""
    text = re.sub(r"/\*.*?\*/", "", header, flags=re.DOTALL)
    return "\n".join(line for line in text.splitlines() if not line.startswith("#"))


def make_builder(folder: str, module: str, flags: tuple[str, ...] = (), optional: bool = True) -> cffi.FFI:
    """A cffi builder of `module` from the C sources in `folder`; `flags` go to the compiler and the linker."""
    with open(os.path.join(folder, "mdsnn.h"), encoding="utf-8") as file:
        declarations = contract(file.read())
    ffi = cffi.FFI()
    ffi.cdef(declarations)
    ffi.set_source(
        module,
        '#include "mdsnn.h"',
        sources=[os.path.join(folder, source) for source in SOURCES],
        depends=sorted(os.path.join(folder, name) for name in os.listdir(folder) if name.endswith((".h", ".c"))),
        include_dirs=[folder],
        extra_compile_args=[*FLAGS, *flags],
        extra_link_args=list(flags),
        optional=optional,
    )
    return ffi


_here = os.path.dirname(os.path.abspath(__file__))
# setuptools wants paths below the folder of setup.py, where it runs
builder = make_builder(os.path.relpath(os.path.join(_here, "src")), "mdsnn.kernels._native")

if __name__ == "__main__":
    builder.compile(verbose=True)
