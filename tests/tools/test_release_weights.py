import json

import pytest
import torch

from dinov2_eq.config.load import load_config, to_dict
from dinov2_eq.files import file_sha256
from dinov2_eq.hub.manifest import read_manifest
from dinov2_eq.models import build_backbone
from dinov2_eq.models.weight_files import read_metadata, read_weights
from tools.release_weights import main

ABOUT = ["--data", "pictures", "--notes", "for a test"]
OVERRIDES = ["student.depth=1", "train.dataset_path=Shapes:split=TRAIN:num=24:size=32"]


def run(folder, *, scale=1.0, **changes):
    backbone = build_backbone("vit_tiny", patch_size=changes.get("patch_size", 8), img_size=32, depth=1)
    teacher = {f"backbone.{name}": scale * tensor for name, tensor in backbone.state_dict().items()}
    teacher |= {"projection.invariant.weight": torch.zeros(3, 192), "dino_head.mlp.0.weight": torch.zeros(2)}
    config = to_dict(load_config("debug", OVERRIDES))
    config["student"].update(changes)
    path = folder / "eval" / "training_7" / "teacher_checkpoint.pth"
    path.parent.mkdir(parents=True)
    torch.save({"teacher": teacher, "config": config, "step": 7}, path)
    return folder


def test_file_and_manifest(tmp_path, capsys):
    output = tmp_path / "weights"
    more = [
        "--output",
        str(output),
        "--result",
        "20-NN top-1 %=31.5",
        "--result",
        "a = b=2",
        "--url",
        "https://example.org/w",
    ]
    main([str(run(tmp_path / "run")), "mine", *ABOUT, *more, "--default"])
    release, file = read_manifest(output)["mine"], output / "mine.safetensors"
    assert (release.entry_point, release.default, release.steps) == ("dinov2_eq_vitt8", True, 7)
    assert (release.size, release.sha256) == (file.stat().st_size, file_sha256(file))
    assert (release.contains, release.url) == (["backbone", "projection"], "https://example.org/w")
    assert release.results == {"20-NN top-1 %": 31.5, "a = b": 2.0}
    assert (release.architecture["depth"], release.architecture["img_size"]) == (1, 32)
    tensors = read_weights(file)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16} and "dino_head.mlp.0.weight" not in tensors
    config = json.loads(read_metadata(file)["config"])
    assert config["train"]["dataset_path"] == "Shapes:split=TRAIN:num=24:size=32" and config["student"]["depth"] == 1
    printed = capsys.readouterr().out
    assert float(printed.split()[-1]) > 0.999 and "dinov2_eq_vitt8, backbone, projection" in printed

    main([str(tmp_path / "run"), "other", *ABOUT, "--output", str(output)])
    main([str(tmp_path / "run"), "mine", *ABOUT, "--output", str(output), "--default"])  # once more
    assert list(read_manifest(output)) == ["mine", "other"] and read_manifest(output)["mine"].results == {}
    with pytest.raises(ValueError, match="mine is already the default of dinov2_eq_vitt8"):
        main([str(tmp_path / "run"), "other", *ABOUT, "--output", str(output), "--default"])


def test_refusals(tmp_path, capsys):
    output = ["--output", str(tmp_path / "weights")]
    for name, arguments, reason in (
        ("odd", {"patch_size": 4}, "No entry point for vit_tiny with patches of 4"),
        ("large", {"scale": 1e7}, "values above 65504"),
        ("small", {"scale": 1e-9}, "Nothing was released: .* is 0.0000, but must be"),
    ):
        with pytest.raises(ValueError, match=reason):
            main([str(run(tmp_path / name, **arguments)), name, *ABOUT, *output])
    torch.save({"model": {}}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="not a teacher checkpoint with config"):
        main([str(tmp_path / "weights.pth"), "other", *ABOUT, *output])
    assert not (tmp_path / "weights").exists()
    with pytest.raises(SystemExit):
        main(["run", "name", *ABOUT, "--result", "good"])
    assert "write NAME=NUMBER, got 'good'" in capsys.readouterr().err
