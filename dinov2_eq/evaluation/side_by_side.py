"""Several encoders in one evaluation: their names, and their untrained twins."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dinov2_eq.evaluation.encoder import Encoder, random_encoder

TRAINED, UNTRAINED = "trained", "random-init"  # names that reports of runs look for
RANDOM_SEED = 0


def name_sources(sources: Sequence[str]) -> list[str]:
    """Returns short names: paths relative to the folder that holds them all, other sources unchanged.

    Raises:
        ValueError: a source is given twice.
    """
    is_path = {source: Path(source).exists() for source in sources}
    paths = {source: Path(source).resolve() for source in sources if is_path[source]}
    if len({paths.get(source, source) for source in sources}) < len(sources):
        raise ValueError(f"An encoder is given twice: {', '.join(sources)}. Name each once.")
    parent = os.path.commonpath([path.parent for path in paths.values()]) if paths else ""
    return [paths[source].relative_to(parent).as_posix() if is_path[source] else source for source in sources]


def name_encoders(sources: Sequence[str], encoders: Sequence[Encoder]) -> dict[str, Encoder]:
    """Names encoders; one alone is "trained", or "random-init" if nothing was loaded. Raises as `name_sources`."""
    if len(encoders) == 1:
        return {UNTRAINED if is_untrained(encoders[0]) else TRAINED: encoders[0]}
    return dict(zip(name_sources(sources), encoders, strict=True))


def is_untrained(encoder: Encoder) -> bool:
    return encoder.description["loaded_tensors"] == 0


def with_untrained(encoders: Mapping[str, Encoder]) -> dict[str, Encoder]:
    """Adds an encoder with random weights for each architecture that has none yet."""
    kinds = {_architecture(encoder): name for name, encoder in encoders.items() if is_untrained(encoder)}
    twins = {}
    for name, encoder in encoders.items():
        if _architecture(encoder) not in kinds:
            kinds[_architecture(encoder)] = name
            twins[name] = random_encoder(encoder, RANDOM_SEED)
    called = (lambda name: UNTRAINED) if len(twins) == 1 else (lambda name: f"{UNTRAINED} as {name}")
    return {**encoders, **{called(name): twin for name, twin in twins.items()}}


def _architecture(encoder: Encoder) -> tuple[Any, ...]:
    shapes = tuple((name, tuple(tensor.shape)) for name, tensor in encoder.backbone.state_dict().items())
    return encoder.image_size, tuple(encoder.mean), tuple(encoder.std), shapes
