"""Writes the README.md (model card) of an export: contents, loading code, checks, measurements and limits."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dinov2_eq.data.datasets.base import DataError
from dinov2_eq.data.datasets.data_string import parse_data_string
from dinov2_eq.hub.backbones import entry_point_of
from dinov2_eq.models.convert import backbone_arguments

LICENCE = "Apache-2.0"
LIBRARIES = {"timm": "timm", "hf": "transformers"}  # names of the libraries on Hugging Face's pages
SHORT_RECIPE_IMAGES = 125_000 * 2048  # images seen in DINOv2's ViT-L/16 short recipe
CHECK_COLUMNS = {
    "difference": "difference, computed alike",
    "difference_as_trained": "difference to the checkpoint",
    "largest": "largest feature",
}
# Schemes such as "timm:local-dir:", then a path that starts at a root, at ~, or at . or ..
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
    """Shortens each path in a config or data string to its last part, so that nothing about the machine remains."""
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
    if match := PLACE.fullmatch(text):
        return match[1] + match[2]
    return RELATIVE_FILE.sub(r"\1", text) if RELATIVE_FILE.fullmatch(text) else text


def _last_part(place: str) -> str:
    """The last part of a path; a URL is returned unchanged."""
    return place if "://" in place else re.split(r"[/\\]", place.rstrip("/\\"))[-1]


def loading_code(target: str, file: str, config: Mapping[str, Any]) -> str:
    """Python code that loads an export in its own folder and computes class_token [B, D], patch_tokens [B, N, D]."""
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
    """The model card in Markdown, with the header that Hugging Face's pages read.

    Args:
        target: format of the export.
        code: from `loading_code`.
        encoder: config, step (None: unknown) and parameters.
        run: processes (None: unknown), environment, knn (step and percent, or None) and results, by file name.
        checks: for each image size the height, width and the keys of `CHECK_COLUMNS`.
        note: a remark about this format.
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
        "The backbone of the teacher from self-supervised training with dinov2_eq. It maps images to a class token and "
        f"patch tokens. {'Heads' if target == 'hub' else 'Heads, projection'} and decoders are not included.",
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
        "The largest difference between features on random images: compared with the checkpoint computed alike, that "
        "is with the precision and position resizing of this format, and compared with the checkpoint itself.",
        "",
        *_table(("pixels", *CHECK_COLUMNS.values()), check_rows(checks)),
        "",
        "## Measured",
        "",
        *_results(run, step),
        "",
        "## Limits",
        "",
        *_limits(config, step, run),
        "",
        f"Licence: {LICENCE}, like the code that trained it. The training data has its own terms.",
        "",
    ]
    return "\n".join(lines)


def check_rows(checks: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Table rows, one per image size: the size and the numbers of `CHECK_COLUMNS`."""
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
        ("images", f"{size} x {size} in training; pixels in [0, 1] minus {crops['mean']}, divided by {crops['std']}"),
        ("data", f"`{train['dataset_path']}`"),
        ("steps", "unknown" if step is None else f"{step:,} of {config['optim']['steps']:,}"),
        ("images per step", _batch_words(train, run["processes"])),
        ("seed", str(train["seed"])),
        ("equivariance task", equivariance),
        ("trained with", ", ".join(code) or "unknown"),
    ]


def _batch_words(train: Mapping[str, Any], processes: int | None) -> str:
    own = train["batch_size_per_gpu"] * train["accumulation_steps"]
    if processes is None:
        return f"{own:,} in each process; the number of processes is unknown"
    return f"{own * processes:,}, over {processes} process{'es' if processes > 1 else ''}"


def numbers_in(value: Any, names: tuple[str, ...] = ()) -> Iterator[tuple[str, float]]:
    """Yields all numbers in a nested results file, each with the words on the path to it."""
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
    """Numbers in the results files of a run, by file, without files about another step."""
    return {
        name: list(numbers_in(results.get("results", results.get("summary"))))
        for name, results in run["results"].items()
        if results.get("encoder", {}).get("step") == step
    }


def _results(run: Mapping[str, Any], step: int | None) -> list[str]:
    lines, measured = [], measurements(run, step)
    if run["knn"]:
        lines += [f"During training, k-NN at step {run['knn']['step']:,}: {run['knn']['top1']:.2f} % top-1.", ""]
    for name, results in run["results"].items():
        if name not in measured:
            lines += [f"`{name}` is about another step and not shown.", ""]
            continue
        protocol = without_paths(results.get("protocol", {}))
        data = [f"`{protocol[key]}`" for key in ("train_dataset", "val_dataset") if key in protocol]
        rows = [(words, f"{number:.4g}") for words, number in measured[name]]
        lines += [f"`{name}`, {' and '.join(data)}:", "", *_table(("measurement", "value"), rows), ""]
    return lines[:-1] or ["Nothing: there are no results in the run folder."]


def _limits(config: Mapping[str, Any], step: int | None, run: Mapping[str, Any]) -> list[str]:
    train, lines = config["train"], []
    if step is not None and run["processes"] is not None:
        seen = step * train["batch_size_per_gpu"] * train["accumulation_steps"] * run["processes"]
        if seen < SHORT_RECIPE_IMAGES:
            lines.append(
                f"- This was a small run: it saw {seen:,} images, DINOv2's short recipe sees {SHORT_RECIPE_IMAGES:,}. "
                "Its features cannot compete with those of published backbones."
            )
    return [
        *lines,
        "- It is not a classifier or detector: a head has to be trained on the features.",
        "- It was only evaluated on what is listed above, not on other kinds of images and not for biases or safety.",
    ]


def to_json(content: Mapping[str, Any]) -> str:
    """Indented JSON; raises ValueError for NaN and infinity."""
    return json.dumps(content, indent=2, allow_nan=False) + "\n"
