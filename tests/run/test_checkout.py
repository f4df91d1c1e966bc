"""A checkout runs as it is, without being installed, from any working directory."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy elsewhere of what git has, and an interpreter's flags that hide the installed package."""
    folder = tmp_path_factory.mktemp("checkout") / "copy"
    for name in ("dinov2_eq", "eval", "tools", "configs", "weights"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def run(*words, cwd, **variables):
    """An editable installation works through a finder that only `site` starts; packages are found by PYTHONPATH."""
    packages = [path for path in sys.path if path.endswith("site-packages")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*packages, *variables.values()])}
    command = [sys.executable, "-S", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=120)


def test_the_installed_package_is_hidden(tmp_path):
    assert "No module named 'dinov2_eq'" in run("-c", "import dinov2_eq", cwd=tmp_path).stderr


@pytest.mark.parametrize("name", ["knn", "all"])
def test_programs_run_as_scripts(checkout, tmp_path, name):
    found = run(checkout / "eval" / f"{name}.py", "--help", cwd=tmp_path)
    assert found.returncode == 0 and f"dinov2-eq eval {name}" in found.stdout, found.stderr


def test_every_program_has_a_script():
    programs = {path.name for path in (ROOT / "dinov2_eq" / "eval").glob("*.py")} - {"__init__.py"}
    assert programs == {path.name for path in (ROOT / "eval").glob("*.py")}


def test_the_console_program_finds_recipes_and_tools(checkout):
    found = run("-m", "dinov2_eq.run.cli", "train", "--config-file", "debug", "--print-config", cwd=checkout)
    assert found.returncode == 0 and "vit_tiny" in found.stdout, found.stderr
    found = run("-m", "dinov2_eq.run.cli", "doctor", "--help", cwd=checkout)
    assert found.returncode == 0 and "dinov2-eq doctor" in found.stdout, found.stderr
