"""The table of faults names tests that exist."""

import ast
import re
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def test_every_row_names_its_tests():
    rows = re.findall(r"^\| .* \|$", (ROOT / "docs" / "reliability.md").read_text().partition("## The table")[2], re.M)
    assert len(rows) > 15
    for row in rows[1:]:
        named = re.findall(r"`([\w/]+\.py)::(test_\w+)`", row.split("|")[-2])
        assert named, row
        for file, test in named:
            path = ROOT / file if "/" in file else HERE / file
            functions = (node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef))
            assert test in functions, f"{path} has no {test}"
