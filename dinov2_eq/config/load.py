"""Loads a config: schema defaults < YAML file < `key=value` overrides. A key that the schema lacks is an error.

Files and overrides written for DINOv2 work unchanged; see `config.dinov2`.
"""

import difflib
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dinov2_eq.config.checks import check
from dinov2_eq.config.dinov2 import EPOCH_LENGTH, EPOCH_STEPS, KEYS, Source, translate
from dinov2_eq.config.schema import Config, default_config
from dinov2_eq.config.yaml_files import dump_yaml, parse_override, read_yaml

COMMAND_LINE = "command line"
SIMILAR = 0.7  # least difflib ratio of two keys, and of their words, for a suggestion
# Units by the last word of a key, for suggestions of a key with another unit.
UNITS = {
    "steps": f"which counts optimizer steps (an epoch of DINOv2 has {EPOCH_STEPS})",
    "epochs": f"which counts epochs of {EPOCH_LENGTH} steps, by default {EPOCH_STEPS}",
    "iterations": "which counts optimizer steps",
    "s": "which is in seconds",
    "deg": "which is in degrees",
}

logger = logging.getLogger(__name__)

Keys = tuple[Any, ...]  # the path to a value, from the section down


def load_config(
    config_file: str | None, overrides: Sequence[str] = (), tell: Callable[[str], None] = logger.warning
) -> Config:
    """Reads, merges and checks a training config.

    Args:
        config_file: path of a YAML file, name of a packaged recipe such as `debug`, or None for the defaults.
        overrides: `section.key=value`, YAML syntax on the right.
        tell: called with each sentence on how settings that only DINOv2 has were read.

    Raises:
        OSError: the file or recipe does not exist or cannot be read.
        ValueError: invalid YAML, unknown keys, a wrong type or a combination that cannot run; the message names file,
            key, value and fix.
    """
    found = _read_with_bases(find_recipe(config_file)) if config_file else []
    typed: dict[Keys, Any] = {}
    for override in overrides:
        typed |= _leaves(parse_override(override))
    defaults = OmegaConf.structured(default_config())
    sources, reading, remarks = translate(_checked([*found, (COMMAND_LINE, typed)], defaults))
    config = _merge(defaults, sources)
    try:
        check(config)
    except ValueError as error:
        raise ValueError("\n".join([f"{config_file or COMMAND_LINE}: {error}", *reading])) from None
    for sentence in (*reading, *remarks):
        tell(sentence)
    return config


def find_recipe(name: str, folder: Path = Path(), flag: str = "--config-file", kind: str = "train") -> Path:
    """Finds a YAML file by its path or recipe name.

    Args:
        name: path, or name of a packaged recipe.
        folder: base of a relative path.
        flag: where the name was given, for the error message.
        kind: folder of the packaged recipes below `configs`.

    Raises:
        FileNotFoundError: neither a file nor a recipe.
    """
    path = folder / name
    if path.is_file():
        return path
    packaged = Path(str(resources.files("dinov2_eq.configs"))) / kind
    recipes = {str(path.relative_to(packaged).with_suffix("")): path for path in sorted(packaged.rglob("*.yaml"))}
    if name in recipes:
        return recipes[name]
    what = "a folder" if path.is_dir() else "no such file"
    raise FileNotFoundError(
        f"{flag} {name}: {what}; packaged recipes are {', '.join(recipes)} (name one, or give the path of a YAML file)"
    )


def to_dict(config: Config) -> dict[str, Any]:
    """Converts a config to plain nested dicts, for YAML, JSON or a checkpoint."""
    return asdict(config)


def to_yaml(config: Config) -> str:
    return dump_yaml(to_dict(config))


def _read_with_bases(path: Path, above: tuple[Path, ...] = ()) -> list[tuple[str, dict[Keys, Any]]]:
    """Reads a file and, before it, the files or recipes that its key `base` names, relative to it, and their bases.

    A file that several of them are based on is read once, the first time, and does not undo what came after it.
    """
    chain = (*above, path)
    if path.resolve() in [other.resolve() for other in above]:
        raise ValueError(f"{above[0]}: base is circular: {' -> '.join(map(str, chain))}; remove one of them")
    values = read_yaml(path)
    bases: dict[Path, tuple[str, dict[Keys, Any]]] = {}
    if "base" in values:
        base = values.pop("base")
        names = base if isinstance(base, list) else [base]
        if not names or not all(isinstance(name, str) and name for name in names):
            raise ValueError(
                f"{path}: base={base!r} must be the path of a YAML file or the name of a packaged recipe, or a list of "
                "these, in which later ones override earlier ones"
            )
        for name in names:
            for source, leaves in _read_with_bases(find_recipe(name, path.parent, f"{path}: base:"), chain):
                bases.setdefault(Path(source).resolve(), (source, leaves))
    return [*bases.values(), (str(path), _leaves(values))]


def _leaves(values: Any, above: Keys = ()) -> dict[Keys, Any]:
    """Flattens nested tables to {("train", "seed"): 0, ...}; an empty table is a value."""
    if not isinstance(values, Mapping) or (not values and above):
        return {above: values}
    leaves: dict[Keys, Any] = {}
    for key, value in values.items():
        leaves |= _leaves(value, (*above, key))
    return leaves


def _checked(sources: Sequence[tuple[str, Mapping[Keys, Any]]], schema: Any) -> list[Source]:
    """Joins the keys of all sources to "section.key"; raises ValueError that lists every unknown key."""
    known = [*(".".join(keys) for keys in _leaves(OmegaConf.to_container(schema))), *sorted(KEYS)]
    mistakes = [mistake for source, values in sources for mistake in _mistakes(source, values, known)]
    if mistakes:
        raise ValueError("\n".join(mistakes))
    return [(source, {".".join(keys): value for keys, value in values.items()}) for source, values in sources]


def _mistakes(source: str, values: Mapping[Keys, Any], known: Sequence[str]) -> Iterator[str]:
    for keys, value in values.items():
        name = ".".join(map(str, keys))
        is_written_out = keys == tuple(name.split("."))
        below = next((key for key in known if key.startswith(f"{name}.")), None)
        if is_written_out and below:
            held = "nothing" if value in (None, {}) else repr(value)
            yield f"{source}: {name!r} is a section with keys below it, such as {below!r}, but holds {held}"
        elif name in known and not is_written_out:
            section, _, key = name.partition(".")
            yield f"{source}: {name!r} is not one key; write '{section}:', and '{key}: ...' below it"
        elif name not in known:
            yield f"{source}: unknown key {name!r}.{_hint(name, known)}"


def _hint(name: str, known: Sequence[str]) -> str:
    """Suggests a key whose words all resemble those of `name`, or differ only in the unit, which is then named."""
    for key in difflib.get_close_matches(name, known, n=3, cutoff=SIMILAR):
        words, theirs = re.split(r"[._]", name), re.split(r"[._]", key)
        strange = [word for word in words if not difflib.get_close_matches(word, theirs, n=1, cutoff=SIMILAR)]
        if not strange:
            return f" Did you mean {key!r}?"
        if strange == words[-1:] and theirs[-1] in UNITS:
            return f" Did you mean {key!r}, {UNITS[theirs[-1]]}?"
    return " See 'dinov2-eq train --print-config' for all keys."


def _merge(config: Any, sources: Sequence[Source]) -> Config:
    """Applies the sources in order; raises ValueError for a value of the wrong type or an unknown `${...}`."""
    origin = {}
    for source, values in sources:
        for key, value in values.items():
            origin[key] = source
            try:
                OmegaConf.update(config, key, value, merge=False)
            except OmegaConfBaseException as error:
                reason = "it is empty" if value is None else _reason(error)
                raise ValueError(f"{source}: wrong value for {key}: {reason}") from None
    try:
        return OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        key = str(error.full_key).partition("[")[0]
        raise ValueError(f"{origin.get(key)}: wrong value for {key}: {_reason(error)}") from None


def _reason(error: OmegaConfBaseException) -> str:
    return str(error).partition("\n")[0]  # the other lines are OmegaConf internals
