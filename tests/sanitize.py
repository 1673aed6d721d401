"""Run the C engine under AddressSanitizer and UBSan: python tests/sanitize.py [--networks 150] [--thread]

Compiles the same sources with the sanitizers and warnings as errors, then replays planted networks in it, every
instruction set of this machine, comparing whole traces with the reference. Any report ends the process with a status
that is not 0. `--thread` does the same with ThreadSanitizer, 8 threads on one network and 3 on one sample. Needs gcc.
Not a test file: sanitizers must be loaded before Python, so this script runs itself again under LD_PRELOAD.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

WARNINGS = ("-Wall", "-Wextra", "-Wconversion", "-Werror")
MODULE = "mdsnn_sanitized"


def build(folder: str, thread: bool) -> str:
    """Compile the sanitized module into `folder`; its path."""
    from mdsnn.kernels import build_native

    source = os.path.join(os.path.dirname(os.path.abspath(build_native.__file__)), "src")
    for name in build_native.SOURCES:
        path = os.path.join(source, name)
        subprocess.run(["gcc", "-std=c11", "-O2", *WARNINGS, "-c", path, "-o", os.devnull], check=True)
    kinds = ("-fsanitize=thread",) if thread else ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    flags = ("-O1", "-g", "-fno-wrapv", "-fno-omit-frame-pointer", *kinds)
    builder = build_native.make_builder(source, MODULE, flags, optional=False)
    return str(builder.compile(tmpdir=folder))


def library(name: str) -> str:
    """Where gcc keeps a sanitizer's runtime."""
    found = subprocess.run(["gcc", f"-print-file-name={name}"], check=True, capture_output=True, text=True)
    return os.path.realpath(found.stdout.strip())


def replay(path: str, networks: int, thread: bool) -> None:
    """Run planted networks in the module at `path`, in this process."""
    spec = importlib.util.spec_from_file_location(MODULE, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["mdsnn.kernels._native"] = module

    sys.path.insert(0, str(Path(__file__).parent))
    from mdsnn.kernels import Engine, native
    from planted import assert_same_bits, assert_same_trace, seeded_case

    reason = native.missing()
    if reason is not None:
        raise SystemExit(reason)
    for level in native.isa_levels():
        os.environ["MDSNN_ISA"] = level
        for seed in range(networks):
            wide = {} if seed % 5 else {"max_channels": 130, "max_timesteps": 32}
            network, pixels = seeded_case(seed, **wide)
            want = Engine(network, "reference", 1).run(pixels, trace=True).trace
            engine = Engine(network, "native", 1)
            engine._backend._parts = 3  # a small sample is one thread's otherwise
            if thread:
                with ThreadPoolExecutor(8) as pool:
                    alone = [pool.submit(engine.run, pixels, trace=True) for _ in range(8)]
                    shared = [pool.submit(engine._backend.run, pixels, True, 3) for _ in range(4)]
                    results = [task.result() for task in (*alone, *shared)]
            else:
                results = [engine.run(pixels, trace=True), engine._backend.run(pixels, True, 3)]
                engine.run(pixels)
                images = network.input.coding == "image"
                stream = engine.stream(pixels) if images else engine.stream(samples=pixels.shape[1])
                for t in range(network.timesteps):
                    stream.step(*(() if images else (pixels[t],)))
            for result in results:
                assert_same_trace(result.trace, want)
            short = engine._backend.run(pixels, False, 3)  # the LIFs' short ways
            assert_same_bits(short.logits, results[0].logits, f"logits of network {seed} in parts")
        print(f"{level}: {networks} networks, no report", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--networks", type=int, default=150)
    parser.add_argument("--thread", action="store_true", help="ThreadSanitizer instead, 8 threads a network")
    parser.add_argument("--module", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.module:
        replay(options.module, options.networks, options.thread)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        path = build(folder, options.thread)
        runtimes = ["libtsan.so"] if options.thread else ["libasan.so", "libubsan.so"]
        environment = {
            **os.environ,
            "LD_PRELOAD": " ".join(map(library, runtimes)),
            "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0",  # the interpreter's own leaks are not ours
            "UBSAN_OPTIONS": "print_stacktrace=1",
            "TSAN_OPTIONS": "report_bugs=1:halt_on_error=1:ignore_noninstrumented_modules=1",
            "OMP_NUM_THREADS": "1",
            "PYTHONMALLOC": "malloc",  # so that every array has its own guarded allocation
        }
        again = [sys.executable, __file__, "--module", path, "--networks", str(options.networks)]
        return subprocess.run([*again, *(["--thread"] if options.thread else [])], env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
