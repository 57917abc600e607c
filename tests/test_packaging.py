"""The wheel: what is in it, and whether it works when installed, from another directory."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import edgetrain as et

ROOT = Path(__file__).parents[1]
NEEDED = ("edgetrain", "models", "device_profiles", "setup.cfg", "pyproject.toml", "README.md", "LICENSE")


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command without anything that points to the source tree; return what it wrote."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PIP"))}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Build the wheel from a copy, so that nothing is left in the source tree."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in NEEDED:
        origin = ROOT / name
        copy = shutil.copytree if origin.is_dir() else shutil.copy
        options = {"ignore": shutil.ignore_patterns("__pycache__")} if origin.is_dir() else {}
        copy(origin, source / name, **options)
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, source, cwd=source)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def contents(wheel) -> dict[str, int]:
    """Size of every file by name."""
    with zipfile.ZipFile(wheel) as archive:
        return {info.filename: info.file_size for info in archive.infolist()}


def in_tree(folder: str, suffix: str) -> set[str]:
    prefix = "" if folder == "edgetrain" else "edgetrain/"
    return {prefix + str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob(f"*{suffix}")}


@pytest.mark.parametrize("folder", ["edgetrain", "models", "device_profiles"])
def test_every_module_is_in_the_wheel(contents, folder):
    assert in_tree(folder, ".py") <= contents.keys()


def test_every_profile_is_in_the_wheel(contents):
    assert in_tree("device_profiles", ".toml") <= contents.keys()
    assert "edgetrain/device_profiles/raspberrypi4.toml" in contents


def test_the_data_set_and_the_typing_marker_are_in_the_wheel(contents):
    assert "edgetrain/py.typed" in contents
    data = [name for name in contents if name.startswith("edgetrain/data/fashion_mnist_subset/")]
    assert sum(contents[name] for name in data) > 2**20


def test_nothing_else_is_in_the_wheel(contents):
    tops = {name.split("/")[0] for name in contents}
    version = et.__version__
    assert tops == {"edgetrain", f"edgetrain-{version}.dist-info"}
    assert not [name for name in contents if name.endswith((".pyc", ".nbi", ".nbc"))]


def test_the_wheel_is_pure_python_and_small(wheel):
    assert wheel.name == f"edgetrain-{et.__version__}-py3-none-any.whl"
    assert wheel.stat().st_size <= 7 * 2**20


def test_the_licence_travels_along(contents):
    assert any(name.endswith("LICENSE") for name in contents)


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """Return the folder of programs of an environment that has the wheel, and this one's other packages."""
    home = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", home, cwd=home)
    programs = home / "bin"
    run(sys.executable, "-m", "pip", "--python", programs / "python", "install", "--quiet", "--no-deps", "--no-index",
        wheel, cwd=home)  # fmt: skip
    (own,) = home.glob("lib/python*/site-packages")
    others = dict.fromkeys(sysconfig.get_path(kind) for kind in ("purelib", "platlib"))
    (own / "others.pth").write_text("\n".join(others))
    return programs


_USE = """
import numpy as np
import edgetrain as et
from edgetrain.data.embedded import load_embedded
from edgetrain.devices import list_profiles
graph = et.Graph("tiny", input_shape=(3,))
graph.set_outputs([graph.add("Gemm", ["input", graph.parameter("w", np.ones((2, 3)))], transB=1)])
learner = et.Learner(graph, "raspberrypi4", batch_size=4, threads=1)
step = learner.partial_fit(np.eye(3, dtype=np.float32), np.array([0, 1, 0]))
images = load_embedded("test")
print(et.__file__, et.models.lenet5().parameter_count, step.instances_trained, len(images), *list_profiles())
"""


def test_an_installed_wheel_trains_from_another_directory(installed, tmp_path):
    place, *counts = run(installed / "python", "-W", "error", "-c", _USE, cwd=tmp_path).split()
    assert Path(place).is_relative_to(installed.parent)
    assert counts[:3] == ["61706", "3", "2000"]
    assert {"raspberrypi4", "generic-x86_64", "generic-aarch64"} <= set(counts[3:])


@pytest.mark.parametrize("command", [["edgetrain"], ["python", "-m", "edgetrain"]], ids=["program", "module"])
def test_the_command_line_of_an_installed_wheel(installed, tmp_path, command):
    assert et.__version__ in run(installed / command[0], *command[1:], "version", cwd=tmp_path)
