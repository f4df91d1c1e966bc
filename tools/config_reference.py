"""Writes docs/config.md, the reference of all settings."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from dinov2_eq.config.schema import default_config, sections_of
from dinov2_eq.models import BACKBONES

PAGE = Path(__file__).parents[1] / "docs" / "config.md"
HEAD = """\
# Settings

Every key of a training config, with its default. YAML files and `key=value` on the command line change them; whatever
is neither in these tables nor a key of [DINOv2](from_dinov2.md) is an error. A file may hold `base: NAME`, the path
(from its folder) of another file or the name of a packaged recipe, and then changes that; in a list,
`base: [A, B]`, later ones override earlier ones. Written by `python tools/config_reference.py` from the classes of the
sections.
"""


def main(argv: Sequence[str] | None = None) -> None:
    argparse.ArgumentParser(prog="tools/config_reference.py", description=__doc__).parse_args(argv)
    PAGE.write_text(reference())
    print(PAGE)


def reference() -> str:
    """Returns the whole page as Markdown."""
    parts = [HEAD]
    for section, settings in sections_of(default_config()).items():
        parts += [f"\n## {section}\n", "\n| key | default | allowed | meaning |\n|---|---|---|---|\n"]
        for each in fields(settings):
            name, default = f"{section}.{each.name}", written(getattr(settings, each.name))
            meaning = each.metadata["meaning"].replace("|", "\\|")
            parts.append(f"| `{name}` | `{default}` | {allowed(name, each.metadata)} | {meaning} |\n")
    return "".join(parts)


def allowed(name: str, rule: Mapping[str, Any]) -> str:
    if choices := tuple(BACKBONES) if name == "student.arch" else rule["choices"]:
        return ", ".join(f"`{written(choice)}`" for choice in choices)
    return f"`{rule['interval']}`" if rule["interval"] else ""


def written(value: object) -> str:
    """Returns a value as YAML writes it."""
    words = {None: "null", True: "true", False: "false", "": '""'}
    return words[value] if isinstance(value, (str, bool, type(None))) and value in words else str(value)


if __name__ == "__main__":
    main()
