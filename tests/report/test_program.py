"""`dinov2-eq report` from run folder to file, with a real backbone behind the feature maps."""

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from dinov2_eq.config.load import load_config, to_yaml
from dinov2_eq.config.schema import default_config
from dinov2_eq.models import build_backbone
from tools import report


def write_run(folder: Path, **architecture) -> None:
    architecture = architecture or {"arch": "vit_tiny", "patch_size": 4, "depth": 1}
    config = default_config()
    for name, value in architecture.items():
        setattr(config.student, name, value)
    config.crops.global_crops_size = 16
    for subfolder in ("samples", "eval/training_5"):
        (folder / subfolder).mkdir(parents=True)
    OmegaConf.save(config, folder / "config.yaml")
    views = np.random.default_rng(0).integers(0, 256, (3, 2, 16, 16, 3), dtype=np.uint8)
    arrays = dict(zip(("anchor_view", "base_view", "transformed_view"), views, strict=True))
    targets = {"intermediate_targets": views[:2], "reconstructions": views[1:], "fractions": np.array([1 / 3, 2 / 3])}
    np.savez(folder / "samples/step_0000005.npz", **arrays, **targets, theta=np.zeros((2, 3)))
    backbone = build_backbone(**architecture, img_size=16)
    teacher = {f"backbone.{name}": value for name, value in backbone.state_dict().items()}
    checkpoint = {"teacher": teacher, "config": asdict(config), "step": 5}
    torch.save(checkpoint, folder / "eval/training_5/teacher_checkpoint.pth")


def test_page_lies_beside_the_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "a")
    write_run(tmp_path / "b")
    report.main([str(tmp_path / "a"), str(tmp_path / "b")])
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    for letter in "AB":
        assert page.count(f"Run {letter}, image 1: features at 90 degrees") == 1
    assert "report.html" in capsys.readouterr().out


def test_output_names_the_file(tmp_path: Path) -> None:
    write_run(tmp_path / "a")
    report.main([str(tmp_path / "a"), "--output", str(tmp_path / "pages/one.html")])
    assert (tmp_path / "pages/one.html").is_file()
    assert not (tmp_path / "a/report.html").exists()


def test_a_residual_network(tmp_path: Path) -> None:
    write_run(tmp_path / "a", arch="resnet18")
    report.main([str(tmp_path / "a")])
    assert "Run A, image 1: features at 90 degrees" in (tmp_path / "a/report.html").read_text(encoding="utf-8")


def test_data_with_a_name_that_is_not_utf_8(tmp_path: Path) -> None:
    write_run(tmp_path / "a")
    config = load_config(str(tmp_path / "a/config.yaml"), ["train.dataset_path=Folder:root=/caf\udce9"])
    (tmp_path / "a/config.yaml").write_text(to_yaml(config))
    report.main([str(tmp_path / "a")])
    assert "/caf\\udce9" in (tmp_path / "a/report.html").read_text(encoding="utf-8")


def test_not_a_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a run folder"):
        report.main([str(tmp_path)])
