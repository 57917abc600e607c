"""The shape of the source: floors, sizes, documentation, package list, light imports, doctests."""

from __future__ import annotations

import ast
import configparser
import doctest
import importlib
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

import edgetrain as et

ROOT = Path(__file__).parents[1]
FOLDERS = ("edgetrain", "models", "device_profiles")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "edgetrain" else ("edgetrain", *parts)
    return ".".join(parts).removesuffix(".__init__")


FILES = {module_name(path): path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))}
EVERY_FILE = pytest.mark.parametrize("name", FILES)

# ---- floors ----------------------------------------------------------------------------------------------------------

# A unit is a module, or a whole sub-package. It imports itself and units of lower floors, nothing else.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("errors", "_version", "hostinfo", "device_profiles", "bench_load", "forking", "files",
     "random_streams", "unbroken", "tensors"),
    ("arrays", "schema", "settings", "bench_process", "units", "accounting", "losses", "densities"),
    ("devices", "kernels", "sparse_index"),
    ("graph", "calibration"),
    ("choice",),
    ("ops", "optim", "data", "models", "graph_json", "history", "torch_network", "policies"),
    ("keeping", "arguments", "onnx_io"),
    ("autodiff", "memory", "catalog", "bench_torch", "bench_jax", "bench_tinygrad", "bench_mnn",
     "bench_onert", "bench_onnxruntime", "fitting", "filters"),
    ("plan", "parameters", "checkpoint", "reference", "stream", "pooled_errors"),
    ("lowering_core", "executor", "runs"),
    ("lowering_winograd", "lowering_sparse"),
    ("lowering_few",),
    ("lowering_products", "combining", "lanes"),
    ("lowering_pruned", "pruning"),
    ("lowering_elements", "saved_activations"),
    ("lowering_pooled",),
    ("lowering_listed",),
    ("lowering",),
    ("lowering_channels", "sparsity"),
    ("plans", "diagnosis", "learner_state"),
    ("learner",),
    ("layer_report", "verify", "bench", "bench_ops", "bench_tiles"),
    ("bench_contenders", "kernel_table"),
    ("cli",),
    ("__main__",),
)
COARSE = tuple(f"| {number}" for number in range(9))  # rows of the table of docs/architecture.md
FLOOR = {unit: number for number, units in enumerate(FLOORS) for unit in units}
# Imports inside functions that go up, each with the reason why the other way round is worse.
UPWARD = {
    ("graph", "ops"): "Graph.add checks a node with its operator; operators are described in terms of nodes",
    ("checkpoint", "learner"): "load_checkpoint returns a Learner; Learner.save and load are methods of the contract",
}


def unit_of(module: str) -> str:
    """Return ``ops`` for ``edgetrain.ops.conv``, and an empty name for ``edgetrain`` itself."""
    return (module + ".").split(".")[1]


def runtime_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """Walk a file without what only type checkers read."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        yield node
        yield from runtime_nodes(node)


def imported(name: str) -> set[str]:
    """Return the modules of the package that a file imports, at its top or inside functions."""
    found: set[str] = set()
    package = name if FILES[name].name == "__init__.py" else name.rpartition(".")[0]
    for node in runtime_nodes(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(part for part in (package if node.level else "", node.module) if part)
            submodules = {f"{base}.{alias.name}" for alias in node.names} & FILES.keys()
            found |= submodules or {base}
    return {module for module in found if module.split(".")[0] == "edgetrain"}


@pytest.mark.parametrize("name", [name for name in FILES if name != "edgetrain"])
def test_a_file_imports_from_lower_floors_only(name):
    own = unit_of(name)
    wrong = [
        module
        for module in imported(name)
        if (unit := unit_of(module)) != own and (own, unit) not in UPWARD and FLOOR.get(unit, -1) >= FLOOR[own]
    ]
    assert wrong == [], f"{name} is on floor {FLOOR[own]}"


def test_the_root_package_imports_nothing_but_its_version():
    assert imported("edgetrain") == {"edgetrain._version"}


def test_every_unit_has_a_floor_and_every_floor_exists():
    assert {unit_of(name) for name in FILES} - {""} == FLOOR.keys()


def test_the_table_of_architecture_md_has_every_file_and_its_floors_hold():
    rows = [line.split("|") for line in (ROOT / "docs/architecture.md").read_text().splitlines() if line[:3] in COARSE]
    names = {name.rstrip("/").removesuffix(".py"): int(row[1]) for row in rows for name in row[2].split("`")[1::2]}
    assert set(names) - set(FLOOR) == {"bench*"}
    names |= {"models": 2, "device_profiles": 0}  # as the sentence behind the table says
    floor = {unit: next(number for name, number in names.items() if fnmatch(unit, name)) for unit in FLOOR}
    for name in FILES.keys() - {"edgetrain"}:
        for unit in {unit_of(module) for module in imported(name)} - {""}:
            assert floor[unit_of(name)] >= floor[unit] or (unit_of(name), unit) in UPWARD, (name, unit)


def test_every_exception_is_needed():
    used = {(unit_of(name), unit_of(module)) for name in FILES for module in imported(name)}
    assert UPWARD.keys() <= used


def test_a_module_level_import_is_never_an_exception():
    tops = {(unit_of(name), unit_of(module)) for name in FILES for module in _top_imports(name)}
    assert not tops & UPWARD.keys()


def _top_imports(name: str) -> list[str]:
    nodes = ast.parse(FILES[name].read_text()).body
    return [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module and not node.level]


# ---- files -----------------------------------------------------------------------------------------------------------


@EVERY_FILE
def test_a_file_has_at_most_600_lines(name):
    assert len(FILES[name].read_text().splitlines()) <= 600


@EVERY_FILE
def test_only_the_command_line_prints(name):
    calls = [node for node in ast.walk(ast.parse(FILES[name].read_text())) if isinstance(node, ast.Call)]
    prints = [call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]
    assert prints == [] or unit_of(name) == "cli"


@EVERY_FILE
def test_nobody_configures_logging_or_warnings(name):
    text = FILES[name].read_text()
    assert "basicConfig" not in text
    assert "simplefilter" not in text


@EVERY_FILE
def test_no_kernel_has_inline_assembly(name):
    """On processors whose assembler Numba does not load, all but x86, LLVM would end the process: use an intrinsic."""
    text = FILES[name].read_text()
    assert ".asm(" not in text
    assert "InlineAsm" not in text


def undocumented(body: list[ast.stmt], prefix: str) -> list[str]:
    """Return public classes, functions and methods without a docstring.

    Functions inside functions are private; the setter of a property is documented by its getter.
    """
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    named = [node for node in body if isinstance(node, kinds) and not node.name.startswith("_")]
    public = [node for node in named if not any(ast.unparse(d).endswith(".setter") for d in node.decorator_list)]
    missing = [f"{prefix}.{node.name}" for node in public if not ast.get_docstring(node)]
    for node in public:
        if isinstance(node, ast.ClassDef):
            missing += undocumented(node.body, f"{prefix}.{node.name}")
    return missing


@EVERY_FILE
def test_everything_public_has_a_docstring(name):
    tree = ast.parse(FILES[name].read_text())
    assert undocumented(tree.body, name) == []
    assert ast.get_docstring(tree) or not tree.body


@EVERY_FILE
def test_what_a_public_function_raises_itself_is_in_its_docstring(name):
    tree = ast.parse(FILES[name].read_text())
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]
    bodies = [tree.body, *(one.body for one in classes)]
    functions = [node for body in bodies for node in body if isinstance(node, ast.FunctionDef)]
    public = [one for one in functions if not one.name.startswith("_") and ast.get_docstring(one)]
    silent = [one.name for one in public if set(raised(one)) & ERRORS and "Raises:" not in str(ast.get_docstring(one))]
    assert silent == []


ERRORS = {name for name in vars(et.errors) if name.endswith("Error")}


def raised(function: ast.FunctionDef) -> list[str]:
    """Return the names of the classes that a function makes errors of, those of functions in it included."""
    raises = [node.exc for node in ast.walk(function) if isinstance(node, ast.Raise)]
    return [call.func.id for call in raises if isinstance(call, ast.Call) and isinstance(call.func, ast.Name)]


@pytest.mark.parametrize("name", [name for name in FILES if name != "edgetrain.__main__"])
def test_examples_in_docstrings_run(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


# ---- packages and names ----------------------------------------------------------------------------------------------


def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def test_the_package_list_equals_the_tree():
    listed = setup_cfg()["options"]["packages"].split()
    assert listed == sorted(name for name, path in FILES.items() if path.name == "__init__.py")


def test_nothing_but_edgetrain_is_installed_at_the_top():
    assert {name.split(".")[0] for name in setup_cfg()["options"]["packages"].split()} == {"edgetrain"}


@pytest.mark.parametrize("name", et.__all__)
def test_public_names_resolve(name):
    assert getattr(et, name) is not None
    assert name in dir(et)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'edgetrain' has no attribute 'Trainer'"):
        _ = et.Trainer


HEAVY = {"numba", "onnx", "onnxruntime", "torch", "safetensors", "typer", "rich"}
LIGHT = {
    "edgetrain": HEAVY | {"numpy"},
    "edgetrain.models": HEAVY,
    "edgetrain.cli": HEAVY | {"numpy"},
    "edgetrain.devices": HEAVY,
    "edgetrain.optim": HEAVY,
    "edgetrain.data": HEAVY,
    "edgetrain.filters": HEAVY,
    "edgetrain.policies": HEAVY | {"edgetrain.filters"},
    "edgetrain.ops": HEAVY,
}


@pytest.mark.parametrize("module", LIGHT)
def test_an_import_stays_light(module):
    code = f"import edgetrain, sys; __import__('{module}'); sys.stdout.write(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert not LIGHT[module] & set(done.stdout.split())
