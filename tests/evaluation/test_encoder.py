import json
import logging

import pytest
import torch

from dinov2_eq.config.load import load_config, to_dict, to_yaml
from dinov2_eq.evaluation.encoder import load_encoder, random_encoder
from dinov2_eq.models import build_backbone

OVERRIDES = ["student.depth=1", "crops.mean=[0.4,0.5,0.6]"]


def checkpoint(**changes):
    backbone = build_backbone("vit_tiny", patch_size=8, img_size=32, depth=1)
    weights = {f"backbone.{name}": tensor for name, tensor in backbone.state_dict().items()}
    weights["dino_head.last_layer.weight_v"] = torch.zeros(3, 3)
    return {"teacher": weights, "config": to_dict(load_config("debug", OVERRIDES)), "step": 7} | changes


def save(folder, content, step=7):
    path = folder / "eval" / f"training_{step}" / "teacher_checkpoint.pth"
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path


def message(path, *arguments, error=ValueError):
    with pytest.raises(error) as caught:
        load_encoder(path, *arguments)
    return str(caught.value)


def test_newest_checkpoint_of_a_run_folder(tmp_path, caplog):
    save(tmp_path, checkpoint(step=9), step=9)
    content = checkpoint(step=10)
    path = save(tmp_path, content, step=10)
    with caplog.at_level(logging.INFO, "dinov2_eq.evaluation.encoder"):
        encoder = load_encoder(tmp_path)
    assert encoder.step == 10 and load_encoder(path).step == 10 and load_encoder(path.parent).step == 10
    for name, tensor in encoder.backbone.state_dict().items():
        assert torch.equal(tensor, content["teacher"][f"backbone.{name}"])
    assert (encoder.image_size, encoder.mean) == (32, [0.4, 0.5, 0.6])
    assert not encoder.backbone.training and not any(weight.requires_grad for weight in encoder.backbone.parameters())
    number = len(encoder.backbone.state_dict())
    assert encoder.description["loaded_tensors"] == number and encoder.description["source"] == str(tmp_path)
    assert f"loaded {number} of {number} tensors" in caplog.text
    json.dumps(encoder.description)


def test_random_encoder_is_another_one_of_the_same_shape(tmp_path):
    encoder = load_encoder(save(tmp_path, checkpoint()))
    state = torch.random.get_rng_state()
    first, again, other = (random_encoder(encoder, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    weights = [each.backbone.state_dict()["pos_embed"] for each in (encoder, first, again, other)]
    assert torch.equal(weights[1], weights[2]) and weights[0].shape == weights[3].shape
    assert not torch.equal(weights[0], weights[1]) and not torch.equal(weights[1], weights[3])
    assert first.step == 0 and not first.backbone.training


def test_the_equivariant_half_comes_along(tmp_path):
    content = checkpoint()
    weight, bias = torch.randn(5, content["teacher"]["backbone.cls_token"].shape[-1]), torch.randn(5)
    assert load_encoder(save(tmp_path / "plain", content)).equivariant is None
    content["teacher"] |= {"projection.equivariant.weight": weight, "projection.equivariant.bias": bias}
    encoder = load_encoder(save(tmp_path / "split", content))
    tokens = torch.randn(2, weight.shape[1])
    torch.testing.assert_close(encoder.equivariant(tokens), tokens @ weight.T + bias)
    first, again = (random_encoder(encoder, 1).equivariant for _ in range(2))
    assert torch.equal(first.weight, again.weight) and first.weight.shape == weight.shape
    assert first.weight.std() == pytest.approx(0.02, rel=0.2) and not first.bias.any()
    assert encoder.invariant is None and random_encoder(encoder, 1).invariant is None  # it is the whole token

    content["teacher"] |= {"projection.invariant.weight": 2 * weight, "projection.invariant.bias": bias}
    encoder = load_encoder(save(tmp_path / "halves", content))
    torch.testing.assert_close(encoder.invariant(tokens), tokens @ (2 * weight).T + bias)
    torch.testing.assert_close(encoder.equivariant(tokens), tokens @ weight.T + bias)
    fresh = random_encoder(encoder, 1)
    assert fresh.invariant.weight.shape == weight.shape
    assert not torch.equal(fresh.invariant.weight, fresh.equivariant.weight)


def test_missing_files(tmp_path):
    assert "does not exist" in message(tmp_path / "typo", error=FileNotFoundError)
    assert "eval/training_<step>/teacher_checkpoint.pth" in message(tmp_path, error=FileNotFoundError)


def test_a_folder_with_an_export_is_told_how_to_be_given(tmp_path):
    (tmp_path / "model.safetensors").touch()
    assert message(tmp_path, error=FileNotFoundError).endswith(f"; or give {tmp_path}/model.safetensors")
    for content, source in {'{"model_type": "dinov2"}': "hf:", '{"architecture": "vit"}': "timm:local-dir:"}.items():
        (tmp_path / "config.json").write_text(content)
        assert message(tmp_path, error=FileNotFoundError).endswith(f"; or give {source}{tmp_path}")
    (tmp_path / "model.onnx").touch()
    assert "ONNX is written for other programs and not read back" in message(tmp_path / "model.onnx")


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"hello world"])
def test_damaged_files(tmp_path, damage):
    path = save(tmp_path, checkpoint())
    path.write_bytes(damage(path.read_bytes()))
    assert f"{path} is not a file of weights, or it was cut off" in message(path)


def test_other_checkpoints(tmp_path):
    path = save(tmp_path, {"model": {}})
    assert f"{path}: No vision transformer is named in these weights: there are no tensors" in message(path)
    assert "it is not a dict" in message(save(tmp_path, torch.zeros(2)))


def test_config_file_for_a_checkpoint_without_config(tmp_path, caplog):
    """As DINOv2's training writes it."""
    content = checkpoint()
    del content["config"], content["step"]
    path = save(tmp_path, content)
    with caplog.at_level(logging.INFO, "dinov2_eq.evaluation.encoder"):
        assert load_encoder(path).mean[0] == 0.485
    assert "its architecture is inferred" in caplog.text
    config_file = tmp_path / "config.yaml"
    config_file.write_text(to_yaml(load_config("debug", OVERRIDES)))
    encoder = load_encoder(path, str(config_file))
    assert encoder.step is None and encoder.mean == [0.4, 0.5, 0.6]


def test_config_file_beside_a_checkpoint_with_config(tmp_path):
    path = save(tmp_path, checkpoint())
    config_file = tmp_path / "config.yaml"
    config_file.write_text(to_yaml(load_config("debug", [*OVERRIDES, "optim.base_lr=1", "student.drop_path_rate=0.2"])))
    load_encoder(path, str(config_file))  # nothing in it concerns the encoder
    config_file.write_text(to_yaml(load_config("debug", ["student.depth=1", "student.patch_size=4"])))
    text = message(path, str(config_file))
    assert "patch_size 8 and 4" in text and "mean [0.4, 0.5, 0.6] and [0.485" in text and "depth" not in text


def test_config_that_lacks_or_exceeds_what_is_known(tmp_path):
    assert "lacks 'crops'" in message(save(tmp_path, checkpoint(config={"student": {"arch": "vit_tiny"}})))
    config = checkpoint()["config"]
    config["student"]["block_chunks"] = 4
    assert "student.block_chunks, which this version does not know" in message(
        save(tmp_path, checkpoint(config=config))
    )


def test_weights_of_another_architecture(tmp_path):
    content = checkpoint()
    content["config"]["student"].update(depth=2, patch_size=4)
    text = message(save(tmp_path, content))
    own, built = (build_backbone("vit_tiny", patch_size=8, img_size=32, depth=d).state_dict() for d in (1, 2))
    assert f"loaded {len(own) - 2} of {len(built)} tensors" in text
    assert f"{len(built) - len(own)} missing (blocks.1.attn.proj.bias, " in text and ", ...)" in text
    assert "2 of another shape (patch_embed.proj.weight, pos_embed)" in text


def test_the_untrained_twin_of_a_file(tmp_path):
    path = save(tmp_path, checkpoint())
    twin, expected = load_encoder(f"random:{tmp_path}"), random_encoder(load_encoder(path), 0)
    for name, tensor in twin.backbone.state_dict().items():
        assert torch.equal(tensor, expected.backbone.state_dict()[name])
    assert (twin.image_size, twin.mean, twin.step) == (32, [0.4, 0.5, 0.6], 0)
    described = {key: twin.description[key] for key in ("source", "loaded_tensors", "random_seed", "checkpoint")}
    assert described == {"source": f"random:{tmp_path}", "loaded_tensors": 0, "random_seed": 0, "checkpoint": None}
