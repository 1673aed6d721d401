"""Packaging: four top-level folders under one import name, and an optional C extension.

The folders `kernels`, `export` and `hwsim` install as `mdsnn.kernels`, `mdsnn.export` and `mdsnn.hwsim`. A machine
without a C compiler still installs: the extension is optional, and the engine then takes Numba or NumPy (see
`mdsnn doctor`).
"""

import atexit
import os
import shutil
import tempfile

from setuptools import setup

NATIVE = os.path.join("kernels", "build_native.py")

# a build folder of its own each time: one left by an earlier build would ship modules and extensions that are gone
BUILD = tempfile.mkdtemp(prefix="mdsnn-build-")
atexit.register(shutil.rmtree, BUILD, ignore_errors=True)

setup(
    options={"build": {"build_base": BUILD}},
    packages=["mdsnn", "mdsnn.cli", "mdsnn.models", "mdsnn.kernels", "mdsnn.export", "mdsnn.hwsim"],
    package_dir={"mdsnn": "mdsnn", "mdsnn.kernels": "kernels", "mdsnn.export": "export", "mdsnn.hwsim": "hwsim"},
    package_data={
        "mdsnn": ["assets/*", "py.typed"],
        "mdsnn.kernels": ["src/*.c", "src/*.h"],
        "mdsnn.hwsim": ["chips/*.toml", "templates/*"],
    },
    cffi_modules=[f"{NATIVE}:builder"],
)
