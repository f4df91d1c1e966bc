"""Writes docs/config.md, the reference of all settings, from dinov2_eq/config/schema.py."""

import argparse
import ast
import inspect
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import fields
from io import StringIO
from pathlib import Path

from dinov2_eq.config import schema
from dinov2_eq.config.checks import CHOICES, INTERVALS
from dinov2_eq.config.load import to_dict
from dinov2_eq.config.schema import Config

PAGE = Path(__file__).parents[1] / "docs" / "config.md"
HEAD = """\
# Settings

Every key of a training config, with its default. YAML files and `key=value` on the command line change them; whatever
is neither in these tables nor a key of [DINOv2](from_dinov2.md) is an error. A file may hold `base: NAME`, the path
(from its folder) of another file or the name of a packaged recipe, and then changes that. Written by
`python tools/config_reference.py` from `dinov2_eq/config/schema.py`.
"""


def main(argv: Sequence[str] | None = None) -> None:
    argparse.ArgumentParser(prog="tools/config_reference.py", description=__doc__).parse_args(argv)
    PAGE.write_text(reference())
    print(PAGE)


def reference() -> str:
    """The whole page as Markdown."""
    comments = dict(field_comments())
    parts = [HEAD]
    for section, values in to_dict(Config()).items():
        owner = next(field.type for field in fields(Config) if field.name == section).__name__
        parts += [f"\n## {section}\n", "\n| key | default | allowed | meaning |\n|---|---|---|---|\n"]
        for key, value in values.items():
            name = f"{section}.{key}"
            meaning = comments.get((owner, key), "").replace("|", "\\|")
            parts.append(f"| `{name}` | `{written(value)}` | {allowed(name)} | {meaning} |\n")
    return "".join(parts)


def allowed(name: str) -> str:
    if name in CHOICES:
        return ", ".join(f"`{written(choice)}`" for choice in CHOICES[name])
    return f"`{INTERVALS[name]}`" if name in INTERVALS else ""


def written(value: object) -> str:
    """As in YAML."""
    words = {None: "null", True: "true", False: "false", "": '""'}
    return words[value] if isinstance(value, (str, bool, type(None))) and value in words else str(value)


def field_comments() -> Iterator[tuple[tuple[str, str], str]]:
    """((class, field), comment) for each field of the schema; the comment stands on one of its lines."""
    source = inspect.getsource(schema)
    comments = {
        token.start[0]: token.string.removeprefix("#").strip()
        for token in tokenize.generate_tokens(StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    for node in ast.parse(source).body:
        for line in node.body if isinstance(node, ast.ClassDef) else []:
            if isinstance(line, ast.AnnAssign):
                found = [comments[number] for number in range(line.lineno, line.end_lineno + 1) if number in comments]
                yield (node.name, line.target.id), " ".join(found)


if __name__ == "__main__":
    main()
