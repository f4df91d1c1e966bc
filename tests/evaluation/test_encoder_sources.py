"""Encoders that no run of ours left: each answers as evaluations ask, with its own pixels and size."""

import json
import logging
from pathlib import Path

import pytest
import timm
import torch
from timm.models import save_for_hf
from transformers import (
    Dinov2Config,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    ViTConfig,
    ViTMAEConfig,
    ViTMAEModel,
    ViTModel,
)

from dinov2_eq.config.load import load_config, to_dict, to_yaml
from dinov2_eq.evaluation.encoder import Encoder, load_encoder, random_encoder
from dinov2_eq.models import build_backbone
from dinov2_eq.models.convert import describe_misfit
from dinov2_eq.models.foreign_backbones import IMAGENET_MEAN, IMAGENET_STD, TimmBackbone
from dinov2_eq.models.weight_files import write_safetensors

SMALL = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 96}
SMALL |= {"image_size": 56, "patch_size": 14}


def refusal(source, *arguments):
    with pytest.raises(ValueError) as caught:
        load_encoder(source, *arguments)
    return str(caught.value)


def images(encoder: Encoder) -> torch.Tensor:
    size = encoder.image_size
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def check(encoder: Encoder, source: str) -> tuple[torch.Tensor, torch.Tensor]:
    """What every encoder must do; returns its class token and patch tokens."""
    backbone, number = encoder.backbone, len(encoder.backbone.state_dict())
    assert not backbone.training and not any(weight.requires_grad for weight in backbone.parameters())
    description = encoder.description
    assert (description["source"], description["loaded_tensors"]) == (source, number)
    assert (description["embed_dim"], description["image_size"]) == (backbone.embed_dim, encoder.image_size)
    assert description["parameters"] == sum(weight.numel() for weight in backbone.parameters())
    json.dumps(description)
    features = backbone(images(encoder), is_training=True)
    cls_token, patches = features["x_norm_clstoken"], features["x_norm_patchtokens"]
    assert cls_token.shape == (2, backbone.embed_dim)
    assert patches.shape == (2, (encoder.image_size // backbone.patch_size) ** 2, backbone.embed_dim)
    assert torch.equal(backbone(images(encoder)), cls_token)
    first, last = backbone.get_intermediate_layers(images(encoder), 2, return_class_token=True)
    torch.testing.assert_close(last[0], patches, atol=1e-5, rtol=0)
    torch.testing.assert_close(last[1], cls_token, atol=1e-5, rtol=0)
    assert first[0].shape == patches.shape and not torch.allclose(first[0], patches, atol=1e-3)
    only = backbone.get_intermediate_layers(images(encoder), [0, 1])
    assert len(only) == 2 and only[0].shape == patches.shape

    untrained = random_encoder(encoder, 5)
    assert untrained.description["loaded_tensors"] == 0 and untrained.description["random_seed"] == 5
    states = [each.backbone.state_dict() for each in (encoder, untrained, random_encoder(encoder, 5))]
    assert states[0].keys() == states[1].keys()
    weights = [next(tensor for name, tensor in state.items() if "qkv" in name or "q_proj" in name) for state in states]
    assert torch.equal(weights[1], weights[2]) and not torch.equal(weights[0], weights[1])
    return cls_token, patches


def test_timm(tmp_path, caplog):
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=3, reg_tokens=2, num_classes=5).eval()
    model.pretrained_cfg["input_size"] = (3, 64, 64)
    save_for_hf(model, tmp_path, model_args={"img_size": 64, "depth": 3, "reg_tokens": 2})
    source = f"timm:local-dir:{tmp_path}"
    with caplog.at_level(logging.INFO, "dinov2_eq.evaluation.encoder"):
        encoder = load_encoder(source)
    number = len(encoder.backbone.state_dict())
    assert f"loaded {number} of {number} tensors of the backbone from {source}" in caplog.text
    assert (encoder.image_size, encoder.mean, encoder.std) == (64, [0.5] * 3, [0.5] * 3)
    cls_token, patches = check(encoder, source)
    with torch.no_grad():
        tokens = model.forward_features(images(encoder))
    assert torch.equal(cls_token, tokens[:, 0]) and torch.equal(patches, tokens[:, 3:])


@torch.no_grad()
def test_timm_with_random_weights():
    encoder, again = (load_encoder("random:timm:test_vit") for _ in range(2))
    assert (encoder.step, encoder.description["loaded_tensors"], encoder.description["random_seed"]) == (0, 0, 0)
    assert torch.equal(encoder.backbone(images(encoder)), again.backbone(images(encoder)))


@torch.no_grad()
def test_timm_without_class_token():
    small = {"img_size": 32, "embed_dim": 64, "depth": 1, "num_heads": 1, "num_classes": 0}
    backbone = TimmBackbone(timm.create_model("vit_base_patch16_siglip_224", **small)).eval()
    features = backbone(torch.randn(2, 3, 32, 32), is_training=True)
    assert features["x_norm_patchtokens"].shape == (2, 4, 64)
    assert torch.equal(features["x_norm_clstoken"], features["x_norm_patchtokens"].mean(1))
    pixels = torch.randn(2, 3, 32, 32)
    ((_, cls_token),) = backbone.get_intermediate_layers(pixels, 1, return_class_token=True)
    torch.testing.assert_close(cls_token, backbone(pixels), atol=1e-5, rtol=0)


def test_timm_refusals():
    assert "timm:nonsense cannot be loaded: Unknown model (nonsense)" in refusal("timm:nonsense")
    assert "ResNet has no patch tokens" in refusal("random:timm:test_resnet")
    maps = timm.create_model("swin_tiny_patch4_window7_224", img_size=32, embed_dim=24, depths=(1, 1), num_heads=(1, 1))
    with pytest.raises(ValueError, match=r"gives maps of shape \(1, 4, 4, 48\) and no tokens"):
        TimmBackbone(maps)(torch.zeros(1, 3, 32, 32))


@pytest.mark.parametrize("kind", ["dinov2_with_registers", "vit"])
def test_hugging_face(tmp_path, kind):
    if kind == "vit":
        model = ViTModel(ViTConfig(**SMALL)).eval()
    else:
        model = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**SMALL, num_register_tokens=3)).eval()
        processing = {"crop_size": {"height": 42, "width": 42}, "size": {"shortest_edge": 49}}
        processing |= {
            "image_mean": [0.1, 0.2, 0.3],
            "image_std": [0.4, 0.5, 0.6],
            "image_processor_type": "BitImageProcessor",
        }
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(processing))
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.1)
    model.save_pretrained(tmp_path)
    encoder = load_encoder(f"hf:{tmp_path}")
    if kind == "vit":
        assert (encoder.image_size, encoder.mean, encoder.std) == (56, IMAGENET_MEAN, IMAGENET_STD)
    else:
        assert (encoder.image_size, encoder.mean, encoder.std) == (42, [0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    cls_token, patches = check(encoder, f"hf:{tmp_path}")
    with torch.no_grad():
        tokens = model(images(encoder)).last_hidden_state
    assert torch.equal(cls_token, tokens[:, 0]) and torch.equal(patches, tokens[:, -patches.shape[1] :])


def test_hugging_face_refusals(tmp_path):
    assert f"hf:{tmp_path} cannot be loaded" in refusal(f"hf:{tmp_path}")
    ViTMAEModel(ViTMAEConfig(**SMALL)).save_pretrained(tmp_path)
    assert "only some of the patches are seen" in refusal(f"hf:{tmp_path}")
    ViTModel(ViTConfig(**SMALL)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"num_hidden_layers": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "tensors; missing are layers.3." in refusal(f"hf:{tmp_path}")
    Dinov2Config(**SMALL).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"model_type": "bert"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "is no vision transformer" in refusal(f"random:hf:{tmp_path}")


HUBCONF = """
import torch
from dinov2_eq.models import build_backbone
dependencies = ["torch"]

def tiny(pretrained=True):
    torch.manual_seed(int(pretrained))
    return build_backbone("vit_tiny", patch_size=14, img_size=28, depth=2)

def prepared(pretrained=True):
    model = tiny(pretrained)
    model.preprocessing = {"image_size": 28, "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    return model

def classifier(pretrained=True):
    return torch.nn.Linear(2, 2)

def wrong(pretrained=True):
    model = tiny()
    model.embed_dim = 5
    return model
"""


def test_hub(tmp_path):
    (tmp_path / "hubconf.py").write_text(HUBCONF)
    encoder = load_encoder(f"hub:{tmp_path}:tiny")
    assert (encoder.image_size, encoder.mean, encoder.std) == (224, IMAGENET_MEAN, IMAGENET_STD)
    own = load_encoder(f"hub:{tmp_path}:prepared")
    assert (own.image_size, own.mean, own.std) == (28, [0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    with torch.no_grad():
        assert torch.equal(own.backbone(images(own)), encoder.backbone(images(own)))
    assert own.description["loaded_tensors"] == len(own.backbone.state_dict())
    untrained = load_encoder(f"random:hub:{tmp_path}:tiny")
    assert untrained.description["loaded_tensors"] == 0
    assert untrained.backbone.state_dict().keys() == encoder.backbone.state_dict().keys()


def test_a_release_with_fewer_blocks_than_its_entry_point():
    source = f"hub:{Path(__file__).parents[2]}:dinov2_eq_vitt8"
    trained, untrained = load_encoder(source), load_encoder(f"random:{source}")
    assert describe_misfit(trained.backbone.state_dict(), untrained.backbone.state_dict()) == ""
    assert trained.image_size == untrained.image_size == 32


def test_hub_refusals(tmp_path):
    (tmp_path / "hubconf.py").write_text(HUBCONF)
    assert "write hub:REPO:NAME" in refusal("hub:dinov2_vits14")
    assert "cannot be loaded: Cannot find callable nonsense" in refusal(f"hub:{tmp_path}:nonsense")
    assert "fails on an image of" in refusal(f"hub:{tmp_path}:classifier")
    assert "(1, 5)" in refusal(f"hub:{tmp_path}:wrong")


def test_random_architectures():
    encoder = load_encoder("random:vit_tiny/8@32")
    assert (encoder.image_size, encoder.step, encoder.config) == (32, 0, {})
    assert encoder.description["random_seed"] == 0 and encoder.description["source"] == "random:vit_tiny/8@32"
    again, other = load_encoder("random:vit_tiny/8@32"), random_encoder(encoder, 1)
    tables = [each.backbone.state_dict()["pos_embed"] for each in (encoder, again, other)]
    assert torch.equal(tables[0], tables[1]) and not torch.equal(tables[0], tables[2])
    assert load_encoder("random:vit_tiny/16").image_size == 224
    for source in ("random:vit_tiny", "random:vit_tiny/8@", "random:nonsense:x"):
        assert "write random:ARCH/PATCH" in refusal(source)
    assert "Unknown architecture 'vit_nano'" in refusal("random:vit_nano/8")
    assert "multiples of the patch size" in refusal("random:vit_tiny/8@30")
    assert "has a config of its own" in refusal("random:vit_tiny/8", "debug")


def tiny_weights(**arguments):
    return build_backbone("vit_tiny", patch_size=8, img_size=32, depth=2, layerscale=1.0, **arguments).state_dict()


def test_files_of_other_projects(tmp_path, caplog):
    state, path = tiny_weights(), tmp_path / "weights.pth"
    del state["mask_token"]
    torch.save({"student": {}, "teacher": {f"backbone.{name}": tensor for name, tensor in state.items()}}, path)
    with caplog.at_level(logging.INFO, "dinov2_eq.evaluation.encoder"):
        encoder = load_encoder(path)
    check(encoder, str(path))
    assert "architecture is inferred, and images have 32 pixels" in caplog.text and "(fresh mask token)" in caplog.text
    for name, tensor in state.items():
        assert torch.equal(encoder.backbone.state_dict()[name], tensor)
    torch.save(tiny_weights() | {"pos_embed": torch.zeros(1, 1 + 37**2, 192)}, path)
    assert load_encoder(path).image_size == 224  # a table for 296 pixels


def test_a_file_of_others_for_grey_images(tmp_path):
    """Images are read with three channels, and all of a grey one are alike."""
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, in_chans=1, num_classes=0).eval()
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    grey = torch.randn(2, 1, 32, 32)
    with torch.no_grad():
        found = load_encoder(tmp_path / "weights.pth").backbone(grey.expand(-1, 3, -1, -1))
        torch.testing.assert_close(found, model(grey), atol=1e-4, rtol=0)


def test_positions_without_one_of_the_class_token_are_told(tmp_path, caplog):
    """25 may also be 4 x 6 patches and a class token."""
    torch.save(tiny_weights() | {"pos_embed": torch.zeros(1, 25, 192)}, tmp_path / "weights.pth")
    load_encoder(tmp_path / "weights.pth")
    assert "25 positions are taken for 5 x 5 patches, and the class token has none" in caplog.text


def test_a_file_of_others_that_is_not_whole(tmp_path):
    state = tiny_weights()
    del state["blocks.1.norm1.bias"]
    torch.save(state, tmp_path / "weights.pth")
    expected = f"{tmp_path}/weights.pth: The weights belong to another architecture: loaded"
    assert refusal(tmp_path / "weights.pth").startswith(expected)


def test_files_of_other_projects_with_a_config(tmp_path):
    path, config_file = tmp_path / "weights.pth", tmp_path / "config.yaml"
    torch.save(tiny_weights() | {"pos_embed": torch.zeros(1, 1 + 36, 192)}, path)
    config_file.write_text(to_yaml(load_config("debug", ["student.depth=2", "crops.mean=[0.4,0.5,0.6]"])))
    encoder = load_encoder(path, str(config_file))
    assert (encoder.image_size, encoder.mean) == (32, [0.4, 0.5, 0.6])
    for contradiction in ("student.depth=3", "student.patch_size=16", "student.num_register_tokens=4"):
        config_file.write_text(to_yaml(load_config("debug", ["student.depth=2", contradiction])))
        text = refusal(path, str(config_file))
        assert f"The weights of {path} belong to another architecture than the config describes: loaded" in text


def test_released_files_carry_their_config(tmp_path):
    path, state = tmp_path / "release.safetensors", tiny_weights(num_register_tokens=1)
    overrides = ["student.depth=2", "student.num_register_tokens=1", "crops.mean=[0.4,0.5,0.6]"]
    config = to_dict(load_config("debug", overrides))
    tensors = {f"backbone.{name}": tensor for name, tensor in state.items()} | {"projection.a": torch.zeros(1)}
    write_safetensors(path, tensors, {"config": json.dumps(config), "step": "12"})
    encoder = load_encoder(path)
    check(encoder, str(path))
    assert (encoder.step, encoder.mean, encoder.config) == (12, [0.4, 0.5, 0.6], config)
    del tensors["backbone.norm.bias"]
    write_safetensors(path, tensors, {"config": json.dumps(config), "step": "12"})
    assert "another architecture than the config describes" in refusal(path)
