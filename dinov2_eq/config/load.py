"""Config = schema defaults < YAML file < `key=value` overrides; whatever the schema does not know is an error."""

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from dinov2_eq.config.checks import check
from dinov2_eq.config.schema import Config


def load_config(config_file: str | None, overrides: Sequence[str] = ()) -> Config:
    """Reads, merges and checks a training config.

    Args:
        config_file: path of a YAML file, name of a packaged recipe such as `debug`, or None for the defaults.
        overrides: `section.key=value`, YAML syntax on the right.

    Raises:
        FileNotFoundError: no such file or recipe.
        ValueError: unknown key, wrong type or a combination that cannot run; the message names key, value and fix.
    """
    merged = OmegaConf.structured(Config)
    sources = _read_with_bases(find_recipe(config_file)) if config_file else []
    sources.append(("command line", _parse_overrides(overrides)))
    for source, values in sources:
        _reject_unknown_keys(values, merged, source)
        try:
            merged.merge_with(values)
        except OmegaConfBaseException as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"{source}: wrong value for {error.full_key}: {reason}") from None
    config: Config = OmegaConf.to_object(merged)
    check(config)
    return config


def find_recipe(config_file: str) -> Path:
    """Path of a YAML file given as a path or as the name of a packaged recipe."""
    if Path(config_file).is_file():
        return Path(config_file)
    folder = Path(str(resources.files("dinov2_eq.configs"))) / "train"
    recipes = {str(path.relative_to(folder).with_suffix("")): path for path in sorted(folder.rglob("*.yaml"))}
    if config_file in recipes:
        return recipes[config_file]
    raise FileNotFoundError(
        f"--config-file {config_file}: no such file; packaged recipes are {', '.join(recipes)} "
        "(name one, or give a path)"
    )


def to_dict(config: Config) -> dict[str, Any]:
    """Plain nested dict of a config, ready for YAML, JSON or a checkpoint."""
    return asdict(config)


def to_yaml(config: Config) -> str:
    return OmegaConf.to_yaml(to_dict(config))


def _read_with_bases(path: Path) -> list[tuple[str, DictConfig]]:
    """The file, after the file that its key `base` names (relative to it), and so on."""
    values = _read_yaml(path)
    base = values.pop("base", None)
    return [*(_read_with_bases(path.parent / base) if base else []), (str(path), values)]


def _read_yaml(path: Path) -> DictConfig:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such config file")
    try:
        values = OmegaConf.load(path)
    except YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(values, DictConfig):
        raise ValueError(f"{path} must hold sections of keys, such as 'train:' with 'seed: 0' below it")
    return values


def _parse_overrides(overrides: Sequence[str]) -> DictConfig:
    values = OmegaConf.create()
    for override in overrides:
        if "=" not in override:
            raise ValueError(f"Override {override!r} has no '='; write section.key=value, for example optim.steps=1000")
        try:
            values.merge_with_dotlist([override])
        except (YAMLError, OmegaConfBaseException):
            raise ValueError(
                f"Override {override!r}: what follows '=' is not valid YAML; close every bracket and quote, "
                "for example crops.blur_prob=[0.0,0.9,0.5]"
            ) from None
    return values


def _leaves(values: Any, prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        full_key = f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _leaves(value, f"{full_key}.")
        else:
            yield full_key


def _reject_unknown_keys(values: DictConfig, schema: DictConfig, source: str) -> None:
    known = list(_leaves(OmegaConf.to_container(schema)))
    for key in _leaves(OmegaConf.to_container(values)):
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.7)
            hint = f" Did you mean {near[0]!r}?" if near else " See 'dinov2-eq train --print-config' for all keys."
            raise ValueError(f"{source}: unknown key {key!r}.{hint}")
