"""Imports only go to lower floors, and files stay readable."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "dinov2_eq"
FLOORS = [
    {"types", "files", "exits", "settings"},
    {"waiting"},
    {"distributed"},
    {"layers"},
    {"equivariance", "logging", "probes"},
    {"models", "data", "fsdp", "checkpointer"},
    {"objectives"},
    {"config"},
    {"train", "evaluation", "report", "hub"},
    {"eval"},
    {"run"},
]
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}


def imported_modules(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def test_imports_only_go_down():
    for path in PACKAGE.rglob("*.py"):
        here = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if here == "__init__":
            continue
        for module in imported_modules(path):
            if module.startswith("dinov2_eq."):
                there = module.split(".")[1]
                assert there == here or FLOOR_OF[there] < FLOOR_OF[here], f"{path}: {here} must not import {there}"


def test_the_library_imports_no_program_and_programs_not_each_other():
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "eval").glob("*.py"), *(ROOT / "tools").glob("*.py")]:
        for module in imported_modules(path):
            parts = module.split(".")
            assert parts[0] not in ("eval", "tools", "tests"), f"{path} imports {module}"
            assert parts[:2] != ["dinov2_eq", "tools"], f"{path} imports {module}"


def test_no_file_grows_too_long():
    folders = (PACKAGE, ROOT / "eval", ROOT / "tools", ROOT / "tests")
    lengths = {path: len(path.read_text().splitlines()) for folder in folders for path in folder.rglob("*.py")}
    long = {str(path.relative_to(ROOT)): length for path, length in lengths.items() if length > 400}
    assert not long
