"""Reads and writes YAML.

A string may hold bytes that are not UTF-8, such as an old file name. Python represents them as lone surrogates, which
YAML does not allow; they are written as `!!binary`, which any YAML reader accepts.
"""

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import MarkedYAMLError

from dinov2_eq.files import read_bytes

ONE_CHARACTER_PER_BYTE = "cp437"  # ASCII below 0x80; printable, and so valid in YAML, from there on


def read_yaml(path: Path, *, resolve: bool = False) -> dict[Any, Any]:
    """Reads the table in a YAML file as plain dictionaries and lists.

    Args:
        resolve: replace each `${...}` by the value it refers to in this file.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is not YAML, or not a table with at least one key; the message names the file.
    """
    raw = read_bytes(path)
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path} is not valid YAML: byte 0x{raw[error.start]:02x} in line {line} is not UTF-8; save it as UTF-8"
        ) from None
    content: Any = None
    try:
        content = OmegaConf.to_container(OmegaConf.load(io.StringIO(text)), resolve=resolve)
    except OSError:  # raised by OmegaConf if the file holds only a number
        pass
    except OmegaConfBaseException as error:
        reason = str(error).partition("\n")[0]  # the other lines are OmegaConf internals
        raise ValueError(f"{path} cannot be used: {reason}") from None
    except Exception as error:  # YAML's own, and what its constructors make of values such as !!int ""
        raise ValueError(f"{path} is not valid YAML: {_reason(error, text)}") from None
    if not isinstance(content, dict) or not content:
        found = "nothing" if not text.strip() or content == {} else repr(text.strip().splitlines()[0])
        raise ValueError(
            f"{path} must hold sections of keys, such as 'train:' with 'seed: 0' below it, but holds {found}"
        )
    return _map_leaves(content, lambda leaf: _from_bytes(leaf) if isinstance(leaf, bytes) else leaf)


def parse_override(override: str) -> dict[Any, Any]:
    """Parses `section.key=value` from a command line into a table; the value is YAML.

    Raises:
        ValueError: there is no "=", or what follows is not YAML.
    """
    if "=" not in override:
        raise ValueError(f"Override {override!r} has no '='; write section.key=value, for example optim.steps=1000")
    is_unicode = _is_unicode(override)
    text = override if is_unicode else _to_bytes(override).decode(ONE_CHARACTER_PER_BYTE)
    try:
        content = OmegaConf.to_container(OmegaConf.from_dotlist([text]))
    except Exception:  # as in `read_yaml`
        raise ValueError(
            f"Override {override!r}: what follows '=' is not valid YAML; close every bracket and quote, "
            "for example crops.blur_prob=[0.0,0.9,0.5]"
        ) from None
    if is_unicode:
        return content
    return _map_leaves(
        content,
        lambda leaf: _from_bytes(leaf.encode(ONE_CHARACTER_PER_BYTE)) if isinstance(leaf, str) else leaf,
    )


def dump_yaml(content: Mapping[str, Any]) -> str:
    """Returns YAML text that `read_yaml` reads back as `content`."""
    return OmegaConf.to_yaml(
        _map_leaves(content, lambda leaf: leaf if not isinstance(leaf, str) or _is_unicode(leaf) else _to_bytes(leaf))
    )


def _reason(error: Exception, text: str) -> str:
    """Says what is wrong with the YAML, and in which line."""
    if isinstance(error, MarkedYAMLError) and error.problem and error.problem_mark:
        number = error.problem_mark.line
        line = next(iter(text.splitlines()[number:]), "")
        return f"{error.problem} in line {number + 1}: {line!r}"
    return " ".join(str(error).split()) or type(error).__name__


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _to_bytes(text: str) -> bytes:
    return text.encode(errors="surrogateescape")


def _from_bytes(raw: bytes) -> str:
    return raw.decode(errors="surrogateescape")


def _map_leaves(content: Any, change: Callable[[Any], Any]) -> Any:
    """Applies `change` to keys and values at any depth."""
    if isinstance(content, Mapping):
        return {change(key): _map_leaves(value, change) for key, value in content.items()}
    if isinstance(content, list):
        return [_map_leaves(value, change) for value in content]
    return change(content)
