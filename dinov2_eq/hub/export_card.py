"""The README.md beside an export: what it is, how to load it, how it was checked, what was measured, what it is not."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dinov2_eq.data.datasets.base import DataError
from dinov2_eq.data.datasets.data_string import parse_data_string
from dinov2_eq.hub.backbones import entry_point_of
from dinov2_eq.models.convert import backbone_arguments

LICENCE = "Apache-2.0"
LIBRARIES = {"timm": "timm", "hf": "transformers"}  # as Hugging Face's pages call them
SHORT_RECIPE_IMAGES = 125_000 * 2048  # that DINOv2's ViT-L/16 short recipe shows
CHECK_COLUMNS = {
    "difference": "difference, computed alike",
    "difference_as_trained": "difference to the checkpoint",
    "largest": "largest feature",
}
# Schemes such as "timm:local-dir:", then a path that begins at a root, at home or at the folder here or above.
PLACE = re.compile(r"((?:\w[\w-]+:)*)(?!//)(?:~|[A-Za-z]:|\.{1,2})?[/\\](?:.*[/\\])?(.*)")
RELATIVE_FILE = re.compile(r"[^\s:]+[/\\]([^\s:/\\]+\.\w+)")
PREPARE = """\
import torch

images = torch.rand(1, 3, {size}, {size})  # RGB in [0, 1]; sides are multiples of {patch}
mean, std = (torch.tensor(values).view(3, 1, 1) for values in ({mean}, {std}))
images = (images - mean) / std
"""
LOAD = {
    "backbone": """\
from dinov2_eq.models import build_backbone

backbone = build_backbone({arguments}).eval()
backbone.load_state_dict(torch.load("{file}", weights_only=True))
with torch.inference_mode():
    features = backbone(images, is_training=True)
class_token, patch_tokens = features["x_norm_clstoken"], features["x_norm_patchtokens"]
""",
    "safetensors": """\
from dinov2_eq.evaluation.encoder import load_encoder

backbone = load_encoder("{file}").backbone
with torch.inference_mode():
    features = backbone(images, is_training=True)
class_token, patch_tokens = features["x_norm_clstoken"], features["x_norm_patchtokens"]
""",
    "hub": """\
backbone = torch.hub.load("PATH OF A CHECKOUT", "{entry_point}", source="local", weights="{file}")
with torch.inference_mode():
    features = backbone(images, is_training=True)
class_token, patch_tokens = features["x_norm_clstoken"], features["x_norm_patchtokens"]
""",
    "timm": """\
import timm

model = timm.create_model("local-dir:.", pretrained=True).eval()
with torch.inference_mode():
    tokens = model.forward_features(images)
class_token, patch_tokens = tokens[:, 0], tokens[:, {prefix}:]
""",
    "hf": """\
from transformers import AutoModel

model = AutoModel.from_pretrained(".").eval()
with torch.inference_mode():
    tokens = model(pixel_values=images).last_hidden_state
class_token, patch_tokens = tokens[:, 0], tokens[:, {prefix}:]
""",
    "onnx": """\
import onnxruntime

session = onnxruntime.InferenceSession("{file}", providers=["CPUExecutionProvider"])
class_token, patch_tokens = session.run(["class_token", "patch_tokens"], {{"images": images.numpy()}})
""",
}


def without_paths(value: Any) -> Any:
    """The same config or data string, with no more of a path than its last part: nothing of the machine it ran on."""
    if isinstance(value, str):
        return _without_path(value)
    if isinstance(value, Mapping):
        return {key: without_paths(item) for key, item in value.items()}
    return [without_paths(item) for item in value] if isinstance(value, list) else value


def _without_path(text: str) -> str:
    try:
        name, options = parse_data_string(text)
    except DataError:
        options = {}
    if options:
        short = {key: "::".join(map(_last_part, value.split("::"))) for key, value in options.items()}
        return ":".join(
            [name, *(f"{key}={value!r}" if ":" in value else f"{key}={value}" for key, value in short.items())]
        )
    if found := PLACE.fullmatch(text):
        return found[1] + found[2]
    return RELATIVE_FILE.sub(r"\1", text) if RELATIVE_FILE.fullmatch(text) else text


def _last_part(place: str) -> str:
    """Returns the last part of a path; a URL stays as it is."""
    return place if "://" in place else re.split(r"[/\\]", place.rstrip("/\\"))[-1]


def loading_code(target: str, file: str, config: Mapping[str, Any]) -> str:
    """Python that loads an export in its own folder; it ends with class_token [B, D] and patch_tokens [B, N, D]."""
    student, crops = config["student"], config["crops"]
    arguments = {**backbone_arguments(student), "img_size": crops["global_crops_size"]}
    arch, patch_size, registers = (student[name] for name in ("arch", "patch_size", "num_register_tokens"))
    entry_point = entry_point_of(arch, patch_size, registers) if target == "hub" else None
    return f"{PREPARE}\n{LOAD[target]}".format(
        size=crops["global_crops_size"],
        patch=patch_size,
        mean=crops["mean"],
        std=crops["std"],
        arguments=", ".join(f"{name}={value!r}" for name, value in arguments.items()),
        prefix=1 + registers,
        file=file,
        entry_point=entry_point,
    )


def model_card(
    target: str,
    code: str,
    encoder: Mapping[str, Any],
    run: Mapping[str, Any],
    checks: Sequence[Mapping[str, Any]],
    note: str,
) -> str:
    """Markdown, with the head that Hugging Face's pages read.

    Args:
        target: format of the export.
        code: from `loading_code`.
        encoder: config, step (None: unknown) and parameters.
        run: processes (None: unknown), environment, knn (step and percent, or None) and results, by file name.
        checks: of each image size height, width and the keys of `CHECK_COLUMNS`.
        note: what is to be known of this format.
    """
    config, step = without_paths(encoder["config"]), encoder["step"]
    student = config["student"]
    head = {"license": LICENCE.lower(), "pipeline_tag": "image-feature-extraction"}
    if target in LIBRARIES:
        head["library_name"] = LIBRARIES[target]
    title = f"{student['arch']}/{student['patch_size']}"
    lines = [
        "---",
        *(f"{key}: {value}" for key, value in head.items()),
        "---",
        "",
        f"# {title}, {'unknown step' if step is None else f'step {step}'}: {target}",
        "",
        "The backbone of the teacher of a self-supervised training with dinov2_eq: images in, class token and patch "
        f"tokens out. {'Heads' if target == 'hub' else 'Heads, projection'} and decoders are not in it.",
        "",
        *_table(("", ""), _facts(config, step, encoder["parameters"], run)),
        "",
        "## Load it",
        "",
        "In the folder of this file:",
        "",
        f"```python\n{code}```",
        "",
        note,
        "",
        "## Checked",
        "",
        "On random images, the largest difference between any two features: to the checkpoint computed alike, which "
        "means with the precision and the resizing of positions that this format has, and to the checkpoint itself.",
        "",
        *_table(("pixels", *CHECK_COLUMNS.values()), check_rows(checks)),
        "",
        "## Measured",
        "",
        *_results(run, step),
        "",
        "## What it is not",
        "",
        *_limits(config, step, run),
        "",
        f"Licence: {LICENCE}, as the code that trained it. The training data has terms of its own.",
        "",
    ]
    return "\n".join(lines)


def check_rows(checks: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """A row for each size of image: the size, and the numbers of `CHECK_COLUMNS`."""
    return [
        [f"{check['height']} x {check['width']}", *(f"{check[key]:.2g}" for key in CHECK_COLUMNS)] for check in checks
    ]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]


def _facts(config: Mapping[str, Any], step: int | None, parameters: int, run: Mapping[str, Any]) -> list[Sequence[str]]:
    student, crops, train, task = (config[name] for name in ("student", "crops", "train", "equivariance"))
    shape = [f"patches of {student['patch_size']} pixels", f"{student['num_register_tokens']} registers"]
    for name in ("depth", "ffn_layer"):
        if student[name] is not None:
            shape.append(f"{name} {student[name]}")
    size = crops["global_crops_size"]
    equivariance = "disabled: the plain base method"
    if task["enabled"]:
        kinds = ("transform", "loss_weight", "border", "decoder", "num_intermediates", "patch_dim", "equivariant_dim")
        equivariance = ", ".join(f"{kind} {task[kind]}" for kind in kinds)
    environment = run["environment"]
    code = [f"{name} {environment[name]}" for name in ("dinov2_eq", "commit", "torch", "device") if name in environment]
    return [
        ("architecture", ", ".join([student["arch"], *shape])),
        ("parameters", f"{parameters:,}"),
        ("images", f"{size} x {size} in training; pixels in [0, 1] less {crops['mean']}, over {crops['std']}"),
        ("data", f"`{train['dataset_path']}`"),
        ("steps", "unknown" if step is None else f"{step:,} of {config['optim']['steps']:,}"),
        ("images a step", _batch_words(train, run["processes"])),
        ("seed", str(train["seed"])),
        ("equivariance task", equivariance),
        ("trained with", ", ".join(code) or "unknown"),
    ]


def _batch_words(train: Mapping[str, Any], processes: int | None) -> str:
    own = train["batch_size_per_gpu"] * train["accumulation_steps"]
    if processes is None:
        return f"{own:,} of each process; their number is unknown"
    return f"{own * processes:,}, of {processes} process{'es' if processes > 1 else ''}"


def numbers_in(value: Any, names: tuple[str, ...] = ()) -> Iterator[tuple[str, float]]:
    """All numbers of a results file's tree, each with the words that lead to it."""
    if isinstance(value, Mapping):
        words = names + tuple(str(item) for item in value.values() if isinstance(item, str))
        for key, item in value.items():
            yield from numbers_in(item, (*words, str(key)))
    elif isinstance(value, list):
        for item in value:
            yield from numbers_in(item, names)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield ": ".join(map(without_paths, names)), value


def measurements(run: Mapping[str, Any], step: int | None) -> dict[str, list[tuple[str, float]]]:
    """Numbers of the run's results files, by file; none of files that are of another step."""
    return {
        name: list(numbers_in(found.get("results", found.get("summary"))))
        for name, found in run["results"].items()
        if found.get("encoder", {}).get("step") == step
    }


def _results(run: Mapping[str, Any], step: int | None) -> list[str]:
    lines, measured = [], measurements(run, step)
    if run["knn"]:
        lines += [f"During training, k-NN at step {run['knn']['step']:,}: {run['knn']['top1']:.2f} % top-1.", ""]
    for name, found in run["results"].items():
        if name not in measured:
            lines += [f"`{name}` is of another step and left out.", ""]
            continue
        protocol = without_paths(found.get("protocol", {}))
        data = [f"`{protocol[key]}`" for key in ("train_dataset", "val_dataset") if key in protocol]
        rows = [(words, f"{number:.4g}") for words, number in measured[name]]
        lines += [f"`{name}`, {' and '.join(data)}:", "", *_table(("measurement", "value"), rows), ""]
    return lines[:-1] or ["Nothing: no results lie in the run's folder."]


def _limits(config: Mapping[str, Any], step: int | None, run: Mapping[str, Any]) -> list[str]:
    train, lines = config["train"], []
    if step is not None and run["processes"] is not None:
        seen = step * train["batch_size_per_gpu"] * train["accumulation_steps"] * run["processes"]
        if seen < SHORT_RECIPE_IMAGES:
            lines.append(
                f"- A small run: it was shown {seen:,} images, DINOv2's short recipe shows {SHORT_RECIPE_IMAGES:,}. "
                "Its features are not those of published backbones."
            )
    return [
        *lines,
        "- No classifier and no detector: a head has to be trained on the features.",
        "- Not evaluated on anything but what is listed above; not on other kinds of images, not for biases or safety.",
    ]


def to_json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2, allow_nan=False) + "\n"
