"""Measurements on features of images and transformed images: R2 of the transform, invariance, angle curves."""

from collections.abc import Iterator, Sequence
from statistics import fmean, stdev
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dinov2_eq.distributed import gather_objects, get_rank, get_world_size
from dinov2_eq.equivariance.transforms import build_transform
from dinov2_eq.evaluation.transformed_pairs import Appearance, PairFeatures, Setting
from dinov2_eq.probes.invariance import mean_cosine, mean_cosine_of_others, recall_at_1
from dinov2_eq.probes.knn import knn_accuracy
from dinov2_eq.probes.transform_regression import R2Scores, r2_scores, regress_transform

TASKS = ("rotation", "translation", "color_jitter", "blur")  # of the papers; the means run over these
# For each task, a mean takes the first of these borders that the task has.
MEANS = {"mean_border_free": ("canvas", "none"), "mean_zeros": ("zeros", "none"), "mean_masked": ("masked",)}
ANGLES_DEG = tuple(range(0, 360, 15))


class Extracted(NamedTuple):
    """Features of encoders that agree on image size."""

    settings: list[Setting]
    turned: list[Setting]  # one for each of `ANGLES_DEG`; []: no curves
    train: PairFeatures
    val: PairFeatures


class Probes(NamedTuple):
    """Which heads are trained for each encoder and setting."""

    heads: Sequence[str]
    tokens: Sequence[str]
    num_seeds: int
    hidden_dim: int
    epochs: int


def upright(image_size: int) -> Appearance:
    """Returns an appearance with a disc that holds real pixels at every rotation angle."""
    return Appearance(image_size, (image_size - 1) / 2)


def turned_settings(image_size: int) -> list[Setting]:
    """Returns the settings that rotate the image by each of `ANGLES_DEG` and show a disc of it."""
    rotation = build_transform("rotation")
    return [Setting(f"angle_{angle}", "masked", rotation, upright(image_size)) for angle in ANGLES_DEG]


def turned_theta(num_images: int) -> dict[str, Tensor]:
    """Returns the angles [1, N, 1] in degrees of each of the `turned_settings`, by task."""
    return {f"angle_{angle}": torch.full((1, num_images, 1), float(angle)) for angle in ANGLES_DEG}


def score_transforms(
    extracted: dict[str, Extracted],
    targets: tuple[dict[str, Tensor], dict[str, Tensor]],
    probes: Probes,
    device: torch.device,
) -> Iterator[list[dict[str, Any]]]:
    """Computes R2 for each encoder, setting, choice of tokens and head; the processes share the work.

    Args:
        extracted: by name of the encoder.
        targets: [draws * N, P] by task, for the training and for the held-out pairs; see `scale_targets`.

    Yields:
        one row for each head, of one encoder, setting and choice of tokens; in the same order in all processes.
    """
    jobs = [
        (name, setting, tokens)
        for name, found in extracted.items()
        for setting in found.settings
        for tokens in probes.tokens
    ]
    for start in range(0, len(jobs), get_world_size()):
        together = jobs[start : start + get_world_size()]
        rows = []
        if get_rank() < len(together):
            name, setting, tokens = together[get_rank()]
            parts = extracted[name].train, extracted[name].val
            pairs = [part.pairs(name, setting, tokens).to(device) for part in parts]
            rows = [
                make_row(name, setting, tokens, head, _train_heads(head, pairs, setting.task, targets, probes))
                for head in probes.heads
            ]
        yield from gather_objects(rows)[: len(together)]


def _train_heads(
    head: str,
    pairs: Sequence[Tensor],
    task: str,
    targets: tuple[dict[str, Tensor], dict[str, Tensor]],
    probes: Probes,
) -> list[R2Scores]:
    scores = []
    for seed in range(probes.num_seeds):
        options = {"seed": seed, "head": head, "hidden_dim": probes.hidden_dim, "epochs": probes.epochs}
        predicted = regress_transform(pairs[0], targets[0][task], pairs[1], **options)
        scores.append(r2_scores(predicted.cpu(), targets[1][task]))
    return scores


def make_row(encoder: str, setting: Setting, tokens: str, head: str, scores: Sequence[R2Scores]) -> dict[str, Any]:
    """Averages scores over the seeds of a head; with several seeds, adds the standard deviation of `r2_pooled`."""
    pooled = [score.pooled for score in scores]
    components = [fmean(values) for values in zip(*(score.components for score in scores), strict=True)]
    row = {
        "encoder": encoder,
        "task": setting.task,
        "border": setting.border,
        "tokens": tokens,
        "head": head,
        "r2_pooled": fmean(pooled),
        "r2_mean": fmean(score.mean for score in scores),
        "r2_components": dict(zip(setting.transform.components, components, strict=True)),
    }
    return row | ({"r2_pooled_std": stdev(pooled), "r2_pooled_by_seed": pooled} if len(pooled) > 1 else {})


def summarise(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Averages over the four standard tasks for each encoder, tokens and head; skips those that lack a task."""
    summary = []
    for kind in dict.fromkeys((row["encoder"], row["tokens"], row["head"]) for row in rows):
        of_kind = [row for row in rows if (row["encoder"], row["tokens"], row["head"]) == kind]
        found = {(row["task"], row["border"]): row for row in of_kind}
        if not set(TASKS) <= {task for task, _ in found}:
            continue
        for name, borders in MEANS.items():
            chosen = [next(found[task, border] for border in borders if (task, border) in found) for task in TASKS]
            mean = dict(zip(("encoder", "tokens", "head"), kind, strict=True)) | {"name": name}
            mean |= {key: fmean(row[key] for row in chosen) for key in ("r2_pooled", "r2_mean")}
            if "r2_pooled_by_seed" in chosen[0]:
                by_seed = zip(*(row["r2_pooled_by_seed"] for row in chosen), strict=True)
                mean["r2_pooled_std"] = stdev(map(fmean, by_seed))
            summary.append(mean)
    return summary


def cosine_rows(name: str, found: Extracted, tokens: Sequence[str]) -> list[dict[str, Any]]:
    """Returns, for each setting, the cosine of held-out I and g(I), and the cosine of different images."""
    return [
        {
            "encoder": name,
            "task": setting.task,
            "border": setting.border,
            "tokens": kind,
            "cosine": mean_cosine(images, found.val.of_transformed(name, setting, kind)),
            "cosine_of_others": mean_cosine_of_others(images),
        }
        for setting in found.settings
        for kind in tokens
        for images in [found.val.of_images(name, setting.appearance, kind)]
    ]


def angle_curve(
    name: str,
    found: Extracted,
    tokens: str,
    labels: tuple[Tensor, Tensor] | None,
    k: int,
    device: torch.device,
) -> dict[str, Any]:
    """Measures, over `ANGLES_DEG`, whether a rotated held-out image retrieves its upright self, and its class by k-NN.

    All processes must call it.

    Args:
        labels: [N] of the training images, [M] of the held-out ones; None: no k-NN.
        k: neighbours among the upright training images.
    """
    appearance = found.turned[0].appearance
    train, val = (part.of_images(name, appearance, tokens).to(device) for part in (found.train, found.val))
    curve: dict[str, Any] = {"encoder": name, "tokens": tokens, "recall_at_1": []}
    if labels:
        curve["knn_top1"] = []
    for setting in found.turned:
        turned = found.val.of_transformed(name, setting, tokens).to(device)
        curve["recall_at_1"].append(recall_at_1(turned, val))
        if labels:
            curve["knn_top1"].append(knn_accuracy(train, labels[0], turned, labels[1], [k])[k]["top1"])
    return curve
