"""Angles between photographs, and retrieval."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from dinov2_eq.data.datasets import DataError
from tools import uses

WEIGHTS = str(Path(__file__).parents[2] / "weights/cifar10_simclr_se2.safetensors")
VAL = ["--val-dataset", "Shapes:split=VAL:size=48", "--max-images", "100"]


def table(text):
    """Returns the last two columns of each row, by its first two."""
    rows = [line.split() for line in text.splitlines()[2:-1]]
    return {" ".join(row[:-2]): [float(cell) for cell in row[-2:]] for row in rows}


def test_the_angle_between_two_photographs(tmp_path, capsys):
    given = ["--encoder", WEIGHTS, "--train-dataset", "Shapes:split=TRAIN:size=48", *VAL, "--draws", "2"]
    uses.main(["angle", *given, "--output", f"{tmp_path}/angle.png"])
    rows = table(capsys.readouterr().out)
    error, share = rows["trained equi_grid2"]
    assert error < 0.7 * rows["(always 0)"][0] and share > rows["(always 0)"][1]
    assert (tmp_path / "angle.png").stat().st_size > 10_000
    written = json.loads((tmp_path / "angle.json").read_text())
    assert written["draws"] == 2 and float(written["rows"][-1]["within 10 degrees, %"]) == rows["(always 0)"][1]


def test_retrieval(tmp_path, capsys):
    uses.main(["retrieval", "--encoder", WEIGHTS, *VAL, "--output", f"{tmp_path}/found/images.png"])
    rows = table(capsys.readouterr().out)
    assert rows["(chance)"] == [20, pytest.approx(10, abs=1)]
    assert rows["trained grid2"][0] > 30 and rows["trained cls"][1] > 15
    assert (tmp_path / "found/images.png").stat().st_size > 10_000


def test_canvases_are_turned_around_their_centre():
    photographs = uses.Photographs(torch.rand(2, 3, 12, 12), size=6)
    centre = photographs.canvases[..., 3:9, 3:9]
    torch.testing.assert_close(photographs.turned(torch.zeros(2)), centre)
    for degrees, quarters in ((90.0, 1), (-90.0, -1)):  # positive is counter-clockwise
        turned = photographs.turned(torch.full((2,), degrees))
        torch.testing.assert_close(turned, torch.rot90(centre, quarters, (2, 3)), atol=1e-4, rtol=0)


def test_encoders_of_two_sizes(tmp_path):
    sources = ["random:vit_tiny/16@32", "random:vit_tiny/16@64"]
    with pytest.raises(ValueError, match=r"images of \[32, 64\] pixels; compare those of one size"):
        uses.main(["retrieval", "--encoder", *sources, *VAL, "--output", f"{tmp_path}/none.png"])


def test_retrieval_needs_classes(tmp_path):
    Image.new("RGB", (48, 48)).save(tmp_path / "one.png")
    given = ["--encoder", "random:vit_tiny/16@32", "--val-dataset", f"Folder:root={tmp_path}"]
    with pytest.raises(DataError, match="retrieval needs labels"):
        uses.main(["retrieval", *given, "--output", f"{tmp_path}/none.png"])
    assert not (tmp_path / "none.png").exists()
