"""Translates training configs of DINOv2: replaces the keys that only DINOv2 has with their equivalents here.

A source is a name and its settings, {"optim.epochs": 100, ...}; later sources override earlier ones.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

EPOCH_LENGTH, EPOCH_STEPS = "train.OFFICIAL_EPOCH_LENGTH", 1250  # the key, and DINOv2's default
# Lengths in DINOv2's epochs: the key for steps here, and DINOv2's default.
EPOCHS = {
    "optim.epochs": ("optim.steps", 100),
    "optim.warmup_epochs": ("optim.warmup_steps", 10),
    "optim.freeze_last_layer_epochs": ("optim.freeze_last_layer_steps", 1),
    "teacher.warmup_teacher_temp_epochs": ("teacher.warmup_teacher_temp_steps", 30),
}
STEPS = {ours for ours, _ in EPOCHS.values()}
EVAL_PERIOD, WEIGHTS = "evaluation.eval_period_iterations", "MODEL.WEIGHTS"
ARCH, MEMORY_EFFICIENT = "student.arch", "_memeff"  # a suffix that DINOv2 ignores too

PARTS = [
    f"compute_precision.{network}.{part}"
    for network in ("teacher", "student")
    for part in ("backbone", "dino_head", "ibot_head")
]
STRATEGIES = {"NO_SHARD": "ddp", "SHARD_GRAD_OP": "grad_op", "FULL_SHARD": "full", "HYBRID_SHARD": "hybrid"}
# Settings of each part: the key here for all parts, the values here (None: no equivalent), and DINOv2's default.
OF_PARTS = {
    "sharding_strategy": ("fsdp.strategy", STRATEGIES, "SHARD_GRAD_OP"),
    "mixed_precision.param_dtype": ("compute_precision.dtype", {"fp16": None, "bf16": "bf16", "fp32": "fp32"}, "fp16"),
}
DEFAULTS = {"student.ffn_layer": "mlp", "train.dataset_path": "ImageNet:split=TRAIN"}  # that differ from the schema's
LARGEST = 10**12  # for lengths
NO_MEANING = {
    "compute_precision.grad_scaler": "bfloat16 needs no loss scaling",
    **{f"{part}.mixed_precision.reduce_dtype": "gradients are summed in float32" for part in PARTS},
    **{f"{part}.mixed_precision.buffer_dtype": "buffers stay float32" for part in PARTS},
    "train.saveckp_freq": "see train.checkpoint_period_steps",
    "train.cache_dataset": "nothing is cached",
    "train.output_dir": "see --output-dir",
    "student.block_chunks": "each block is sharded by itself",
    "optim.lr": "it follows from optim.base_lr and the batch",
}
KEYS = {
    EPOCH_LENGTH,
    *EPOCHS,
    EVAL_PERIOD,
    WEIGHTS,
    *(f"{part}.{setting}" for part in PARTS for setting in OF_PARTS),
    *NO_MEANING,
}

Source = tuple[str, dict[str, Any]]


class Reading(NamedTuple):
    """One setting of DINOv2 and its equivalent here."""

    place: int  # index of the source that it takes effect in
    words: str  # the setting as given, for messages
    key: str
    value: Any


class Translation(NamedTuple):
    sources: list[Source]  # without the keys that only DINOv2 has
    reading: list[str]  # a sentence on the equivalents, or none
    remarks: list[str]  # other sentences for the user


def translate(sources: Sequence[Source]) -> Translation:
    """Replaces the keys that only DINOv2 has with their equivalents here.

    A file with such a key counts as DINOv2's. Then DINOv2's defaults apply to keys that no source sets, and
    equivariance.enabled is false unless some source sets a key of "equivariance".

    Args:
        sources: the files, and the command line as the last one.

    Raises:
        ValueError: a value is invalid, or one source sets both a key of DINOv2 and its equivalent.
    """
    sources = [("DINOv2's defaults", {}), *sources]
    last = {key: place for place, (_, values) in enumerate(sources) for key in values}
    length = _number(*sources[last[EPOCH_LENGTH]], EPOCH_LENGTH, 1) if EPOCH_LENGTH in last else EPOCH_STEPS
    readings, untranslated = _meanings(sources, last, length)
    translated = _replace_keys(sources, readings)
    in_effect = [each for each in readings if not any(each.key in values for _, values in translated[each.place + 1 :])]
    left_out = _without_effect(sources, last, in_effect) | untranslated
    defaults, remark = _defaults_of_files(sources, last)
    translated[0][1].update(defaults)
    return Translation(translated, _in_words(in_effect, length), [*_by_reason(left_out), *remark])


def _meanings(
    sources: Sequence[Source], last: Mapping[str, int], epoch_length: float
) -> tuple[list[Reading], dict[str, str]]:
    """Returns the equivalents of the keys, and the reason for each setting that has none.

    Args:
        last: index of the last source that sets each key.
    """
    readings = [
        *(_default_lengths(epoch_length, last) if EPOCH_LENGTH in last else []),
        *(reading for place, source in enumerate(sources) for reading in _lengths(place, *source, epoch_length)),
        *_weights(sources, last),
    ]
    of_parts, untranslated = _of_parts(sources, last)
    return readings + of_parts, untranslated


def _replace_keys(sources: Sequence[Source], readings: Sequence[Reading]) -> list[Source]:
    """Returns the sources with DINOv2's keys replaced; raises ValueError if one sets a key and its equivalent."""
    translated = [(source, {key: values[key] for key in values if key not in KEYS}) for source, values in sources]
    for _, values in translated:
        if _is_memory_efficient(values):
            values[ARCH] = values[ARCH].removesuffix(MEMORY_EFFICIENT)
    for place, words, key, value in readings:
        source, values = translated[place]
        if values.get(key) not in (None, ""):
            raise ValueError(f"{source}: {words} and {key}={values[key]} set the same thing; remove one of them")
        values[key] = value
    return translated


def _in_words(in_effect: Sequence[Reading], epoch_length: float) -> list[str]:
    """Returns [a sentence on how DINOv2's settings were read], or []."""
    words = [f"{each.words} is {each.key}={each.value}" for each in in_effect]
    if _has_lengths(in_effect):
        words.insert(0, f"an epoch is {epoch_length} steps")
    return [f"DINOv2's settings are read as follows: {'; '.join(words)}"] if words else []


def _has_lengths(in_effect: Sequence[Reading]) -> bool:
    return any(each.key in STEPS for each in in_effect)


def _without_effect(sources: Sequence[Source], last: Mapping[str, int], in_effect: Sequence[Reading]) -> dict[str, str]:
    """Returns the settings that have no effect whatever their value, each with the reason."""
    left_out = {_short(key): reason for key, reason in NO_MEANING.items() if key in last}
    for _, values in sources:
        if _is_memory_efficient(values):
            left_out[f"{ARCH}={values[ARCH]}"] = f"{MEMORY_EFFICIENT} has no effect"
    if EPOCH_LENGTH in last and not _has_lengths(in_effect):
        left_out[EPOCH_LENGTH] = "all lengths are given in steps"
    return left_out


def _defaults_of_files(sources: Sequence[Source], last: Mapping[str, int]) -> tuple[dict[str, Any], list[str]]:
    """Returns the defaults that apply if a file is DINOv2's, and a sentence if they switch the equivariance off."""
    files = [source for source, values in sources[:-1] if values.keys() & KEYS]
    if not files:
        return {}, []
    if any(key.startswith("equivariance.") for key in last):
        return DEFAULTS, []
    sentence = (
        f"{' and '.join(files)}: a config of DINOv2, so equivariance.enabled=false (the plain method); "
        "set equivariance.enabled=true to add the reconstruction task"
    )
    return DEFAULTS | {"equivariance.enabled": False}, [sentence]


def _default_lengths(epoch_length: float, last: Mapping[str, int]) -> Iterator[Reading]:
    for theirs, (ours, default) in EPOCHS.items():
        if theirs not in last:
            yield Reading(0, f"{theirs}={default} by default", ours, round(default * epoch_length))


def _lengths(place: int, source: str, values: Mapping[str, Any], epoch_length: float) -> Iterator[Reading]:
    for theirs, (ours, _) in EPOCHS.items():
        if theirs in values:
            epochs = _number(source, values, theirs, 0)
            yield Reading(place, f"{theirs}={epochs}", ours, round(epochs * epoch_length))
    if EVAL_PERIOD in values:
        period = _number(source, values, EVAL_PERIOD, -LARGEST)
        yield Reading(place, f"{EVAL_PERIOD}={period}", "evaluation.eval_period_steps", max(round(period), 0))


def _weights(sources: Sequence[Source], last: Mapping[str, int]) -> Iterator[Reading]:
    if WEIGHTS in last and (weights := sources[last[WEIGHTS]][1][WEIGHTS]) not in (None, ""):
        yield Reading(last[WEIGHTS], f"{WEIGHTS}={weights}", "student.pretrained_weights", weights)


def _of_parts(sources: Sequence[Source], last: Mapping[str, int]) -> tuple[list[Reading], dict[str, str]]:
    """Translates the settings that DINOv2 has for each part; returns the same as `_meanings`."""
    readings, untranslated = [], {}
    for setting, (ours, meanings, default) in OF_PARTS.items():
        keys = [f"{part}.{setting}" for part in PARTS]
        found = {key: sources[last[key]][1][key] for key in keys if key in last}
        for key, value in found.items():
            if value not in tuple(meanings):
                raise ValueError(f"{sources[last[key]][0]}: {key}={value!r} is not one of {', '.join(meanings)}")
        if not found:
            continue
        values = sorted({found.get(key, default) for key in keys})
        words = f"{_short(keys[0])}={' and '.join(values)}"
        if len(values) > 1:
            untranslated[words] = f"{ours} applies to all parts"
        elif meanings[values[0]] is None:
            untranslated[words] = f"no {values[0]} here, see {ours}"
        else:
            readings.append(Reading(max(last[key] for key in found), words, ours, meanings[values[0]]))
    return readings, untranslated


def _is_memory_efficient(values: Mapping[str, Any]) -> bool:
    return str(values.get(ARCH)).endswith(MEMORY_EFFICIENT)


def _by_reason(left_out: Mapping[str, str]) -> list[str]:
    """Returns [a sentence with "key, other key (reason); ..."], or []."""
    keys = {why: ", ".join(key for key in left_out if left_out[key] == why) for why in left_out.values()}
    words = "; ".join(f"{those} ({why})" for why, those in keys.items())
    return [f"DINOv2's settings that have no effect here: {words}"] if words else []


def _short(key: str) -> str:
    """Replaces network and part in a key by *: "compute_precision.*.*.sharding_strategy"."""
    return re.sub(r"^compute_precision\.\w+\.\w+\.", "compute_precision.*.*.", key)


def _number(source: str, values: Mapping[str, Any], key: str, low: float) -> float:
    if type(values[key]) not in (int, float) or not low <= values[key] <= LARGEST:
        raise ValueError(f"{source}: {key}={values[key]!r} must be a number in [{low}, {LARGEST}]")
    return values[key]
