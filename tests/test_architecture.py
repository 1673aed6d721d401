"""The import table: who may import whom, read from the sources, and what a light install must be able to do."""

import ast
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mdsnn.export import artifact
from mdsnn.kernels.engine import run
from planted import seeded_case

ROOT = Path(__file__).parent.parent
FOLDERS = {"mdsnn": "mdsnn", "kernels": "mdsnn.kernels", "export": "mdsnn.export", "hwsim": "mdsnn.hwsim"}
TRAINING = (
    "mdsnn.layers",
    "mdsnn.freeze",
    "mdsnn.models",
    "mdsnn.checkpoint",
    "mdsnn.quantizers",
    "mdsnn.train",
    "mdsnn.neurons",
)
GROUND = tuple(f"mdsnn.kernels.{name}" for name in ("formats", "errors", "files", "container"))

MAY_IMPORT: dict[str, tuple[str, ...]] = {
    # what of ours each part may import; the first key that a module's name starts with rules
    "mdsnn.kernels": ("mdsnn.kernels",),
    "mdsnn.export.lower": ("mdsnn.kernels", "mdsnn.export", *TRAINING),
    "mdsnn.export": ("mdsnn.kernels", "mdsnn.export"),
    "mdsnn.hwsim": ("mdsnn.kernels", "mdsnn.hwsim", "mdsnn.export.artifact"),
    "mdsnn.cli": ("mdsnn",),
    "mdsnn.__main__": ("mdsnn.cli",),
    "mdsnn": (*GROUND, "mdsnn"),
}
NOT_OF_MDSNN = ("mdsnn.export", "mdsnn.hwsim", "mdsnn.cli")
"""`mdsnn` is the name of the training folder and of the whole; these are the other rooms."""

THIRD_PARTY: dict[str, set[str]] = {
    "mdsnn.kernels": {"numpy", "numba", "cffi"},
    "mdsnn.export.artifact": {"numpy"},
    "mdsnn.export.verify": {"numpy"},
    "mdsnn.export.vectors": {"numpy"},
    "mdsnn.export.onnx": {"numpy", "onnx", "onnxruntime"},
    "mdsnn.export": {"numpy", "torch"},
    "mdsnn.hwsim": {"numpy", "pydantic", "jinja2", "scipy", "rich", "joblib", "dask"},
}


def sources() -> dict[str, Path]:
    """Module name -> file, of every Python file in the four folders."""
    found = {}
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join((package, *(part for part in parts if part != "__init__")))] = path
    return found


def imports(module: str, path: Path) -> set[tuple[str, bool]]:
    """(absolute name, whether it was written with dots) of everything a file imports, also inside functions."""
    found: set[tuple[str, bool]] = set()
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {(alias.name, False) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                found.add((whole if whole in MODULES else base, bool(node.level)))
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in ("importlib.import_module", "import_module", "__import__") and node.args:
                first = node.args[0]
                if isinstance(first, ast.Constant) and isinstance(first.value, str):
                    dotted = first.value.startswith(".")
                    found.add((package + first.value if dotted else first.value, dotted))
    return found


MODULES = sources()


def within(name: str, parts: tuple[str, ...] | set[str]) -> bool:
    return any(name == part or name.startswith(part + ".") for part in parts)


def rule(table: dict[str, tuple[str, ...]] | dict[str, set[str]], module: str) -> tuple[str, ...] | set[str] | None:
    return next((allowed for part, allowed in table.items() if within(module, (part,))), None)


def faults_of(module: str, found: set[tuple[str, bool]]) -> list[str]:
    faults = []
    own = next(part for part in ("mdsnn.kernels", "mdsnn.export", "mdsnn.hwsim", "mdsnn") if within(module, (part,)))
    allowed, third = rule(MAY_IMPORT, module), rule(THIRD_PARTY, module)
    assert allowed is not None
    for name, dotted in sorted(found):
        top = name.partition(".")[0]
        if top == "mdsnn":
            if not within(name, allowed):
                faults.append(f"{module} imports {name}")
            elif own == "mdsnn" and not within(module, ("mdsnn.cli", "mdsnn.__main__")):
                ours = not within(name, NOT_OF_MDSNN) and not within(name, ("mdsnn.kernels",))
                faults += [] if ours or within(name, GROUND) else [f"{module} imports {name}"]
            if own != "mdsnn" and within(name, (own,)) != dotted:
                faults.append(f"{module} imports {name}: a dot inside a folder, `mdsnn.` across a border")
        elif top not in sys.stdlib_module_names and third is not None and top not in third:
            faults.append(f"{module} imports {top}")
    return faults


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_what_the_table_allows(module):
    assert faults_of(module, imports(module, MODULES[module])) == []


@pytest.mark.parametrize(
    ("module", "name", "dotted"),
    [
        ("mdsnn.kernels.engine", "mdsnn.layers", False), ("mdsnn.kernels.engine", "torch", False),
        ("mdsnn.kernels.engine", "mdsnn.export.artifact", False),
        ("mdsnn.kernels.engine", "mdsnn.kernels.errors", False),
        ("mdsnn.layers", "mdsnn.kernels.engine", False), ("mdsnn.layers", "mdsnn.kernels", False),
        ("mdsnn.layers", "mdsnn.export.artifact", False), ("mdsnn.train", "mdsnn.hwsim", False),
        ("mdsnn.train", "mdsnn.cli.train", True), ("mdsnn.export.verify", "mdsnn.layers", False),
        ("mdsnn.export.verify", "torch", False), ("mdsnn.export.artifact", "onnx", False),
        ("mdsnn.export.lower", "mdsnn.hwsim", False), ("mdsnn.hwsim.cost", "mdsnn.export.verify", False),
        ("mdsnn.hwsim.cost", "torch", False), ("mdsnn.hwsim.cost", "mdsnn.layers", False),
        ("mdsnn.hwsim.cost", "mdsnn.hwsim.cells", False), ("mdsnn.hwsim.cost", "mdsnn.kernels.formats", True),
    ],
)  # fmt: skip
def test_the_table_would_catch(module, name, dotted):
    assert faults_of(module, {(name, dotted)})


def test_the_reader_of_imports_sees_all_of_them(tmp_path):
    path = tmp_path / "engine.py"
    path.write_text(
        "import a.b\nfrom . import errors\nfrom .formats import x\nfrom mdsnn.export import artifact, verify\n"
        "def f():\n    import torch\n    from .. import layers\n    import_module('onnx')\n"
        "if TYPE_CHECKING:\n    from mdsnn.train import y\n"
    )
    assert imports("mdsnn.kernels.engine", path) == {
        ("a.b", False), ("mdsnn.kernels.errors", True), ("mdsnn.kernels.formats", True), ("torch", False),
        ("mdsnn.export.artifact", False), ("mdsnn.export.verify", False), ("mdsnn.layers", True), ("onnx", False),
        ("mdsnn.train", False),
    }  # fmt: skip
    assert len(MODULES) > 30


# -------------------------------------------------------------------------------------------- the light install

BLOCK = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
BLOCKED = set(sys.argv.pop(1).split(","))
sys.meta_path.insert(0, Missing())
"""
EXTRAS = (
    "torch,torchvision,spikingjelly,sklearn,numba,onnx,onnxruntime,scipy,pydantic,jinja2,rich,joblib,dask,distributed"
)


def python(code: str, *words: str, blocked: str = EXTRAS) -> str:
    done = subprocess.run([sys.executable, "-c", BLOCK + code, blocked, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_mdsnn_imports_nothing():
    code = "before = set(sys.modules)\nimport mdsnn\nprint(sorted(set(sys.modules) - before))"
    assert python(code) == "['mdsnn']"


@pytest.mark.parametrize(
    "extra", [EXTRAS, "torch", "numba", "onnx,onnxruntime", "sklearn,scipy", "pydantic,jinja2,rich"]
)
def test_the_rooms_below_training_open_without(extra):
    code = "import mdsnn.kernels, mdsnn.kernels.engine, mdsnn.hwsim, mdsnn.export.artifact, mdsnn.export.verify"
    python(code + "\nimport mdsnn.kernels.native, mdsnn.export.vectors", blocked=extra)


def test_an_error_class_costs_no_numpy():
    assert python("import mdsnn.kernels.errors\nprint('numpy' in sys.modules)") == "False"


_RUN = """
import numpy as np
from mdsnn.export import artifact
from mdsnn.kernels import Engine
network = artifact.load(sys.argv[1])
print(Engine(network, "reference").run(np.load(sys.argv[2])).logits.tolist())
"""


def test_an_artifact_runs_where_only_numpy_is(tmp_path):
    network, pixels = seeded_case(3, max_channels=8)
    artifact.save(network, tmp_path / "net.mdsnn")
    np.save(tmp_path / "pixels.npy", pixels)
    out = python(_RUN, str(tmp_path / "net.mdsnn"), str(tmp_path / "pixels.npy"), blocked=EXTRAS + ",cffi,PIL,click")
    assert out == str(run(network, pixels, kernels="reference").logits.tolist())


def test_no_module_below_training_touches_torch_when_it_is_there(tmp_path):
    code = (
        "import mdsnn.kernels.engine, mdsnn.kernels.reference, mdsnn.hwsim\n"
        "import mdsnn.export.artifact, mdsnn.export.verify\n"
        "print(sorted({name.partition('.')[0] for name in sys.modules} & set(sys.argv[1].split(','))))"
    )
    assert python(code, "torch,onnx,onnxruntime,sklearn,numba,spikingjelly", blocked="nothing") == "[]"


# ----------------------------------------------------------------------------------------------------- packaging


def test_no_file_stands_where_packaging_breaks():
    assert not (ROOT / "conftest.py").exists()
    assert not list((ROOT / "tests").rglob("__init__.py"))
    assert [path for path in (ROOT / "tests").rglob("test_*.py") if path.parent.name != "tests"] == []


def test_setup_lists_every_package():
    listed: set[str] = set()
    for node in ast.walk(ast.parse((ROOT / "setup.py").read_text("utf-8"))):
        if isinstance(node, ast.keyword) and node.arg == "packages":
            listed = set(ast.literal_eval(node.value))
    there = {name for name, path in MODULES.items() if path.name == "__init__.py"}
    assert there == listed
    for name, path in MODULES.items():
        assert path.name == "__init__.py" or name.rpartition(".")[0] in listed, f"{path} is in no package"


def test_the_public_modules_read_no_environment_but_the_documented():
    """Results may depend on MDSNN_ENGINE, MDSNN_THREADS and MDSNN_ISA alone."""
    named: set[str] = set()
    for module, path in MODULES.items():
        if within(module, ("mdsnn.kernels", "mdsnn.export", "mdsnn.hwsim")):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                text = ast.unparse(node) if isinstance(node, ast.Call | ast.Subscript) else ""
                if text.startswith(("os.environ.get(", "os.environ[", "os.getenv(")):
                    named.add(text.split("'")[1])
    assert named <= {"MDSNN_ENGINE", "MDSNN_THREADS", "MDSNN_ISA"}
    assert "MDSNN_ENGINE" in named
