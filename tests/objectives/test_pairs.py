"""Pairs of images with known parameters: a data set and a method in a file of their own, from file to loss."""

import json
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from dinov2_eq.config.checks import objective_context
from dinov2_eq.config.load import load_config
from dinov2_eq.data.augmentations import MultiCrop
from dinov2_eq.data.datasets import DATASETS, PairDataset, UnreadableImage, build_dataset
from dinov2_eq.equivariance.pairing import NoPairing, RenderedPairing, TransformPairing
from dinov2_eq.objectives import OBJECTIVES
from dinov2_eq.objectives.base import Needs, Objective, ObjectiveSettings
from dinov2_eq.settings import CropsConfig, setting
from dinov2_eq.train.build import build_make_views, build_multi_crop, build_train_loader
from dinov2_eq.types import GLOBAL, ImagePair, Term
from tests.helpers import TINY, in_this_process

BROKEN, UNKNOWN = 5, 6  # one pair cannot be read; nobody knows theta of another


class Bars(PairDataset):
    """A red bar in a random pose, and a blue one, turned by one of eight angles."""

    data_string = "Bars"
    components = ("object", "angle")

    def __len__(self):
        return 16

    def name(self, index):
        return f"bar {index}"

    def read(self, index):
        return self.bar(20 * index, (255, 0, 0))

    def read_pair(self, index, generator):
        if index == BROKEN:
            raise UnreadableImage(self.name(index), "broken")
        step = int(torch.randint(8, (), generator=generator))
        second = self.bar(20 * index + 45 * step, (0, 0, 255))
        theta = None if index == UNKNOWN else torch.tensor([index, step * math.pi / 4])
        return ImagePair(self.read(index), second, theta)

    @staticmethod
    def bar(angle, colour):
        image = Image.new("RGB", (40, 40))
        image.paste(colour, (18, 0, 22, 40))
        return image.rotate(angle)


@dataclass
class PoseConfig(ObjectiveSettings):
    loss_weight: float = setting(0.0, "weight of the toy", interval="[0, inf)")
    at: float = setting(1.0, "fraction of theta that is compared", interval="[0, 1]")

    def weights(self):
        return {"pose": self.loss_weight}

    def needs(self):
        return Needs(theta=True, targets=(self.at,)) if self.loss_weight else Needs()

    def build(self, loss, context, dim):
        return Pose(dim, context.components.index("angle"))


class Pose(Objective):
    """Reads the turn from the class tokens of both views, where it is known."""

    def __init__(self, dim, column):
        super().__init__()
        self.column = column
        self.predictor = nn.Linear(2 * dim, 2)

    def forward(self, scene):
        angle, known = scene.views.theta[:, self.column], scene.views.known
        predicted = self.predictor(torch.cat(list(scene.student.tokens[GLOBAL].cls), dim=-1))
        wanted = torch.stack([angle.cos(), angle.sin()], dim=-1)
        return Term((predicted - wanted)[known].square().sum() / len(known), {"unknown": (~known).float().sum()})


@pytest.fixture(autouse=True)
def entries(monkeypatch):
    monkeypatch.setitem(OBJECTIVES, "pose", PoseConfig)
    monkeypatch.setitem(DATASETS, "Bars", Bars)


ALONE = [*TINY, "pose.loss_weight=1", "dino.loss_weight=0", "dino.koleo_loss_weight=0", "ibot.loss_weight=0"]
ALONE += ["equivariance.enabled=false", "train.dataset_path=Bars", "crops.horizontal_flip=0"]
STILL = ["crops.jitter=[0,0,0,0]", "crops.grey_prob=0", "crops.blur_prob=[0,0,0]", "crops.solarize_prob=0"]
STILL += ["crops.global_crops_scale=[1,1]", "train.batch_size_per_gpu=16"]


def test_views_are_the_images_of_a_pair():
    config = load_config("debug", [*ALONE, *STILL])
    batch = next(iter(build_train_loader(config, build_dataset("Bars"), 0, 0)))
    views = build_make_views(config)(batch)
    assert batch.skipped == ("bar 5: broken",)
    unknown = [row for row, known in enumerate(views.known) if not known]
    assert len(unknown) == 2 and (views.theta[unknown] == 0).all()  # its own place, and the place of the broken pair
    torch.testing.assert_close(views.targets[0], views.groups[GLOBAL].images[1])
    std, mean = (torch.tensor(list(values))[:, None, None] for values in (config.crops.std, config.crops.mean))
    first, second = (views.groups[GLOBAL].images * std + mean) * 255  # [B, 3, H, W]
    size = config.crops.global_crops_size
    for row in range(16):
        if row not in unknown:
            index, angle = views.theta[row].tolist()
            for pixels, pose, colour in (
                (first[row], 20 * index, (255, 0, 0)),
                (second[row], 20 * index + math.degrees(angle), (0, 0, 255)),
            ):
                image = Bars.bar(pose, colour).resize((size, size), Image.Resampling.BICUBIC)
                assert np.abs(pixels.movedim(0, -1).numpy() - np.asarray(image, dtype=float)).mean() < 2


def test_training_on_pairs(tmp_path):
    assert in_this_process(["train", "--config-file", "debug", "--output-dir", str(tmp_path), *ALONE]) == 0
    rows = [json.loads(line) for line in (tmp_path / "training_metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 6 and {name for name in rows[0] if name.startswith("loss/")} == {"loss/pose"}
    assert sum(row["unknown"] for row in rows) > 0


def test_data_without_theta_are_refused(tmp_path, capsys):
    shapes = "train.dataset_path=Shapes:size=32"
    assert in_this_process(["train", "--config-file", "debug", "--output-dir", str(tmp_path), *ALONE, shapes]) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert "pose reads theta, which leads from one view to the other, and nothing gives it" in message
    assert "train.dataset_path='Shapes:size=32' has no pairs of images" in message and "Traceback" not in message


@pytest.mark.parametrize(
    ("overrides", "kind", "components"),
    [
        (["train.dataset_path=Shapes"], NoPairing, ()),
        (["train.dataset_path=Bars:any=key", "crops.horizontal_flip=0"], RenderedPairing, ("object", "angle")),
        (["equivariance.enabled=true", "equivariance.transform=rotation"], TransformPairing, ("angle_deg",)),
    ],
)
def test_the_data_give_the_second_view_where_there_is_no_transform(overrides, kind, components):
    config = load_config("debug", ["equivariance.enabled=false", "train.dataset_path=Bars", *overrides])
    assert type(config.pairing()) is kind and objective_context(config).components == components
    multi_crop = build_multi_crop(config)
    assert type(multi_crop.pairing) is kind


def test_theta_of_a_transform_will_do():
    config = load_config(
        "debug", [*ALONE, "train.dataset_path=Shapes", "equivariance.enabled=true", "equivariance.loss_weight=0"]
    )
    assert config.needs().theta and len(objective_context(config).components) == 3


def test_mirrored_pairs_are_refused():
    with pytest.raises(ValueError, match=r"crops\.horizontal_flip=0\.5 mirrors images of a pair"):
        MultiCrop(CropsConfig(), RenderedPairing(("angle",)), num_local=0)


def test_between_the_images_there_is_nothing():
    config = load_config("debug", [*ALONE, "pose.at=0.5"])
    batch = next(iter(build_train_loader(config, build_dataset("Bars"), 0, 0)))
    with pytest.raises(ValueError, match=r"no view at 0\.5 of theta; only 1, the second image, exists"):
        build_make_views(config)(batch)


def test_the_names_of_the_parameters_must_fit():
    multi_crop = MultiCrop(CropsConfig(horizontal_flip=0), RenderedPairing(("angle",)), num_local=0)
    generator = torch.Generator().manual_seed(0)
    with pytest.raises(
        ValueError, match=r"theta of a pair of images has shape \[2\], not one number for each of angle"
    ):
        multi_crop(Bars().read_pair(0, generator), generator)
