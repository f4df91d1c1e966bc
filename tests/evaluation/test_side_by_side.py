from pathlib import Path

import pytest
import torch

from dinov2_eq.evaluation.encoder import load_encoder
from dinov2_eq.evaluation.side_by_side import name_encoders, name_sources, with_untrained
from dinov2_eq.models import build_backbone

RANDOM = "random:vit_tiny/16@32"


def weights_file(folder: Path, seed: int) -> str:
    torch.manual_seed(seed)
    folder.mkdir()
    torch.save(build_backbone("vit_tiny", patch_size=16, img_size=32).state_dict(), folder / "weights.pth")
    return str(folder / "weights.pth")


def test_names_are_as_short_as_tells_them_apart(tmp_path, monkeypatch):
    for name in ("runs/a", "runs/b", "more/a"):
        (tmp_path / name).mkdir(parents=True)
    runs = [str(tmp_path / name) for name in ("runs/a", "runs/b")]
    assert name_sources([*runs, "timm:vit"]) == ["a", "b", "timm:vit"]
    assert name_sources([*runs, str(tmp_path / "more/a")]) == ["runs/a", "runs/b", "more/a"]
    monkeypatch.chdir(tmp_path)
    assert name_sources(["runs/a", "runs/b/"]) == ["a", "b"]
    for twice in (["runs/a", "runs/a/"], ["timm:vit", "timm:vit"]):
        with pytest.raises(ValueError, match="given twice"):
            name_sources(twice)


def test_one_alone_is_what_reports_of_runs_look_for(tmp_path):
    trained, untrained = load_encoder(weights_file(tmp_path / "a", 1)), load_encoder(RANDOM)
    assert list(name_encoders(["x"], [trained])) == ["trained"]
    assert list(name_encoders(["x"], [untrained])) == ["random-init"]


def test_one_untrained_twin_for_each_architecture(tmp_path):
    sources = [weights_file(tmp_path / name, seed) for seed, name in ((1, "a"), (2, "b"))]
    encoders = name_encoders(sources, [load_encoder(source) for source in sources])
    both = with_untrained(encoders)
    assert list(both) == ["a/weights.pth", "b/weights.pth", "random-init"]
    untrained = both["random-init"]
    assert untrained.description["loaded_tensors"] == 0
    assert not torch.equal(untrained.backbone.cls_token, both["a/weights.pth"].backbone.cls_token)
    other = {"other": load_encoder("random:vit_tiny/8@32")}
    assert list(with_untrained(encoders | other)) == [*encoders, "other", "random-init"]
    assert list(with_untrained(other)) == ["other"]
    assert list(with_untrained(encoders | {"same": untrained})) == [*encoders, "same"]
