"""The measures of the card on encoders whose answers are known."""

import pytest
import torch
from torch import nn

from dinov2_eq.data.datasets import build_dataset
from dinov2_eq.evaluation.encoder import Encoder
from dinov2_eq.evaluation.probe_transforms import build_probe_transform
from dinov2_eq.evaluation.report_card import (
    ANGLES_DEG,
    Extracted,
    Probes,
    angle_curve,
    cosine_rows,
    score_transforms,
    summarise,
    turned_settings,
    turned_theta,
    upright,
)
from dinov2_eq.evaluation.transformed_pairs import PairFeatures, draw_theta, extract_pairs, settings_of
from dinov2_eq.probes.transform_regression import scale_targets

CPU = torch.device("cpu")
SIZE = 16
TASKS = ("rotation", "se2", "crop", "flip")


class FixedFeatures(nn.Module):
    """Class token and one patch token, both what `features` makes of the images."""

    def __init__(self, features) -> None:
        super().__init__()
        self.features = features

    def forward(self, images, is_training=False):
        rows = self.features(images)
        return {"x_norm_clstoken": rows, "x_norm_patchtokens": rows[:, None]}


ENCODERS = {
    "pixels": lambda images: images.flatten(1),
    "blind": lambda images: torch.ones(len(images), 4),
}


@pytest.fixture(scope="module")
def extracted():
    encoders = {
        name: Encoder(FixedFeatures(features), SIZE, [0.0] * 3, [1.0] * 3, {}, 0, {})
        for name, features in ENCODERS.items()
    }
    transforms = {task: build_probe_transform(task, min_crop_share=0.2) for task in TASKS}
    settings = [setting for task in TASKS for setting in settings_of(task, transforms[task], SIZE)]
    parts, turned = [], turned_settings(SIZE)
    for split, number, further in (("TRAIN", 60, []), ("VAL", 40, turned)):
        theta = {task: draw_theta(task, transforms[task], number, 1, split) for task in TASKS}
        parts.append(
            extract_pairs(
                encoders,
                [*settings, *further],
                theta | turned_theta(number),
                build_dataset(f"Shapes:split={split}:num={number}:size={SIZE}"),
                range(number),
                appearances=[upright(SIZE)],
                device=CPU,
                batch_size=32,
                num_workers=0,
            )
        )
    return Extracted(settings, turned, *parts)


def test_pixels_find_themselves_upright_and_lose_themselves_with_the_angle(extracted):
    labels = torch.arange(60) % 4, torch.arange(40) % 4
    curve = angle_curve("pixels", extracted, "cls", labels, 5, CPU)
    recall = dict(zip(ANGLES_DEG, curve["recall_at_1"], strict=True))
    assert recall[0] == 1.0 and recall[180] < 0.9
    assert len(curve["knn_top1"]) == 24 and all(0 <= accuracy <= 100 for accuracy in curve["knn_top1"])
    assert "knn_top1" not in angle_curve("pixels", extracted, "cls", None, 5, CPU)


def test_an_encoder_that_ignores_its_input(extracted):
    curve = angle_curve("blind", extracted, "both", None, 5, CPU)
    assert curve["recall_at_1"] == pytest.approx([1 / 40] * 24)
    rows = cosine_rows("blind", extracted, ["cls", "both"])
    assert [row["cosine"] for row in rows] == pytest.approx([1.0] * len(rows))
    assert [row["cosine_of_others"] for row in rows] == pytest.approx([1.0] * len(rows))
    assert len(rows) == 2 * len(extracted.settings)


def test_pixels_change_with_the_transform_and_more_with_the_image(extracted):
    rows = {(row["task"], row["border"]): row for row in cosine_rows("pixels", extracted, ["cls"])}
    row = rows["rotation", "masked"]
    assert row["cosine_of_others"] < row["cosine"] < 1


def test_turned_images_show_the_same_disc(extracted):
    shown = extracted.val.of_images("pixels", upright(SIZE), "cls").unflatten(1, (3, SIZE, SIZE))
    turned = [
        extracted.val.of_transformed("pixels", each, "cls").unflatten(1, shown.shape[1:]) for each in extracted.turned
    ]
    torch.testing.assert_close(turned[0], shown)
    torch.testing.assert_close(turned[6], shown.rot90(dims=(2, 3)))  # counter-clockwise
    offset = torch.arange(SIZE) - (SIZE - 1) / 2
    outside = torch.hypot(offset[:, None], offset[None, :]) > (SIZE - 1) / 2
    assert outside[0, 0] and not outside[1, SIZE // 2]
    for images in (shown, *turned):
        assert (images[:, :, outside] == 0).all()


def of_theta(shuffled: bool = False) -> tuple[Extracted, tuple[dict, dict]]:
    """An encoder whose features of g(I) are theta itself, or that of another pair."""
    transform = build_probe_transform("se2", min_crop_share=0.2)
    settings = settings_of("se2", transform, SIZE)[:1]
    generator = torch.Generator().manual_seed(0)
    parts, targets = [], []
    for number in (2048, 512):
        theta = scale_targets(transform.sample(number, generator), transform.low, transform.high)
        seen = theta[torch.randperm(number, generator=generator)] if shuffled else theta
        features = {
            ("it", settings[0].appearance): torch.zeros(1, number, 6),
            ("it", settings[0]): seen.repeat(1, 2)[None],
        }
        parts.append(PairFeatures(features, ["cls", "mean"], {}))
        targets.append({"se2": theta})
    return Extracted(settings, [], *parts), tuple(targets)


PROBES = Probes(["mlp", "linear"], ["both"], 2, 64, 100)


def test_an_encoder_whose_features_are_theta_scores_one():
    found, targets = of_theta()
    groups = list(score_transforms({"it": found}, targets, PROBES, CPU))
    assert [[(row["tokens"], row["head"]) for row in rows] for rows in groups] == [
        [(tokens, head) for head in PROBES.heads] for tokens in PROBES.tokens
    ]
    for row in (row for rows in groups for row in rows):
        assert row["r2_pooled"] > 0.98 and row["r2_mean"] > 0.98 and min(row["r2_components"].values()) > 0.97
        assert list(row["r2_components"]) == ["angle_deg", "shift_x", "shift_y"]
        assert len(row["r2_pooled_by_seed"]) == 2 and 0 < row["r2_pooled_std"] < 0.02


def test_shuffled_pairs_and_blind_features_score_nothing(extracted):
    found, targets = of_theta(shuffled=True)
    (rows,) = score_transforms({"it": found}, targets, Probes(["linear"], ["both"], 1, 8, 100), CPU)
    assert rows[0]["r2_pooled"] == pytest.approx(0, abs=0.05)
    blind = extracted._replace(settings=extracted.settings[:1])
    transform = extracted.settings[0].transform
    targets = tuple(
        {
            "rotation": scale_targets(
                draw_theta("rotation", transform, number, 1, split)[0], transform.low, transform.high
            )
        }
        for split, number in (("TRAIN", 60), ("VAL", 40))
    )
    (rows,) = score_transforms({"blind": blind}, targets, Probes(["linear"], ["cls"], 1, 8, 1000), CPU)
    assert rows[0]["r2_pooled"] == pytest.approx(0, abs=0.1)


def test_means_keep_heads_and_tokens_apart_and_carry_the_spread():
    def row(task, border, head, values):
        return {
            "encoder": "it",
            "task": task,
            "border": border,
            "tokens": "cls",
            "head": head,
            "r2_pooled": sum(values) / 2,
            "r2_mean": 0.5,
            "r2_pooled_by_seed": values,
        }

    borders = {"rotation": "canvas", "translation": "canvas", "color_jitter": "none", "blur": "none"}
    rows = []
    for head, values in (("mlp", [0.2, 0.4]), ("linear", [0.1, 0.1])):
        rows += [row(task, border, head, values) for task, border in borders.items()]
        rows += [row(task, "masked", head, [0.0, 0.0]) for task in borders]
        rows += [row(task, "zeros", head, [1.0, 1.0]) for task in ("rotation", "translation")]
        rows.append(row("crop", "none", head, [9.0, 9.0]))  # not among the four
    means = {(mean["head"], mean["name"]): mean for mean in summarise(rows)}
    assert means["mlp", "mean_border_free"]["r2_pooled"] == pytest.approx(0.3)
    assert means["mlp", "mean_border_free"]["r2_pooled_std"] == pytest.approx(0.2 / 2**0.5)
    assert means["linear", "mean_border_free"]["r2_pooled"] == pytest.approx(0.1)
    assert means["linear", "mean_zeros"]["r2_pooled"] == pytest.approx((1 + 1 + 0.1 + 0.1) / 4)
    assert means["mlp", "mean_masked"]["r2_pooled"] == 0 and len(means) == 6
