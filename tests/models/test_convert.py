"""Weights under all known names give the same features as the model that they come from."""

import logging
import re
from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    ViTConfig,
    ViTModel,
)

from dinov2_eq.models import DinoVisionTransformer
from dinov2_eq.models.convert import adapt, infer_architecture, to_dinov2
from dinov2_eq.models.weight_files import read_weights

DIM, HEADS, DEPTH, PATCH, SIDE = 192, 3, 4, 14, 56
OWN = {"img_size": SIDE, "patch_size": PATCH, "embed_dim": DIM, "depth": DEPTH, "num_heads": HEADS}
TIMM = {"embed_dim": DIM, "depth": DEPTH, "num_heads": HEADS, "img_size": SIDE, "dynamic_img_size": True}
TIMM |= {"num_classes": 7}
HF = {"hidden_size": DIM, "num_hidden_layers": DEPTH, "num_attention_heads": HEADS, "intermediate_size": 4 * DIM}
HF |= {"image_size": SIDE, "patch_size": PATCH, "layer_norm_eps": 1e-6}


def randomised(model: nn.Module) -> nn.Module:
    """Fills all tensors with random values, so that none can be lost or exchanged unnoticed."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        parameter.data.normal_(centre, 0.1, generator=generator)
    return model.eval().requires_grad_(False)


def own_backbone(**arguments) -> DinoVisionTransformer:
    return randomised(DinoVisionTransformer(**{**OWN, "init_values": 1.0, **arguments}))


def images(height=42, width=84, channels=3):
    return torch.randn(2, channels, height, width, generator=torch.Generator().manual_seed(1))


def load(state, **changes) -> DinoVisionTransformer:
    """Builds the backbone that is inferred from the weights, and loads them."""
    weights = to_dinov2(state)
    backbone = DinoVisionTransformer(**{**infer_architecture(weights), **changes})
    fitted, notes = adapt(weights, backbone)
    assert set(notes) <= {"fresh mask token"}
    backbone.load_state_dict(fitted)
    return backbone.eval().requires_grad_(False)


def all_tokens(backbone, batch):
    features = backbone.forward_features(batch)
    parts = [features["x_norm_clstoken"].unsqueeze(1), features["x_norm_regtokens"], features["x_norm_patchtokens"]]
    return torch.cat(parts, dim=1)


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("vit_small_patch14_dinov2", {}),
        ("vit_small_patch14_reg4_dinov2", {}),
        ("vit_small_patch16_224", {"patch_size": 14, "qkv_bias": False}),
        ("vit_small_patch16_224", {"patch_size": 14, "reg_tokens": 3}),  # with positions for the registers
        ("vit_giant_patch14_dinov2", {"mlp_ratio": 2 * 176 / DIM}),  # SwiGLU
        ("vit_giant_patch14_reg4_dinov2", {"mlp_ratio": 2 * 96 / DIM}),
    ],
)
def test_timm(name, arguments, caplog):
    model = randomised(timm.create_model(name, **{**TIMM, **arguments}))
    with caplog.at_level(logging.INFO):
        backbone = load(model.state_dict(), interpolate_antialias=True, interpolate_offset=0.0)
    assert_close(all_tokens(backbone, images()), model.forward_features(images()))
    assert "left out: 2 tensors (head)" in caplog.text


HF_MODELS = [
    (Dinov2Model, Dinov2Config(**HF)),
    (Dinov2Model, Dinov2Config(**HF, use_swiglu_ffn=True)),
    (Dinov2WithRegistersModel, Dinov2WithRegistersConfig(**HF, num_register_tokens=2)),
    (Dinov2ForImageClassification, Dinov2Config(**HF)),
    (ViTModel, ViTConfig(**HF)),
    (ViTModel, ViTConfig(**HF, qkv_bias=False)),
]


@pytest.mark.parametrize("from_file", [False, True])  # files keep the names from before version 5
@pytest.mark.parametrize(("kind", "config"), HF_MODELS)
def test_hugging_face(kind, config, from_file, tmp_path):
    model = randomised(kind(config))
    state = model.state_dict()
    if from_file:
        model.save_pretrained(tmp_path)
        state = read_weights(tmp_path / "model.safetensors")
        assert any("attention.attention.query" in name for name in state)
    arguments = {"interpolate_pos_encoding": True} if kind is ViTModel else {}
    expected = getattr(model, "dinov2", model)(images(), **arguments).last_hidden_state
    backbone = load(state, interpolate_offset=0.0)
    assert_close(all_tokens(backbone, images()), expected)


def dino(state):
    del state["mask_token"]
    return {"head.mlp.0.weight": torch.zeros(2)} | state


def ibot(state):
    state["masked_embed"] = state.pop("mask_token")
    return {"head.last_layer2.weight_v": torch.zeros(2)} | state


def chunked(state):
    def rename(name):
        return re.sub(r"^blocks\.(\d+)\.", lambda match: f"blocks.{int(match[1]) // 2}.{match[1]}.", name)

    return {rename(name): tensor for name, tensor in state.items()}


def prefixed(prefix, state):
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def broken(state):
    return {name: tensor + 1 for name, tensor in state.items()}


def renamed(state, pattern, replacement):
    return {re.sub(pattern, replacement, name): tensor for name, tensor in state.items()}


CHECKPOINTS = {
    "DINOv2": lambda state: state,
    "DINOv2, chunked": chunked,
    "DINOv2's trainer": lambda state: {
        "teacher": {"dino_head.a": torch.zeros(1)} | prefixed("backbone.", chunked(state))
    },
    "DINO": dino,
    "DINO's trainer": lambda state: {
        "student": prefixed("module.backbone.", broken(dino(dict(state)))),
        "teacher": prefixed("backbone.", dino(dict(state))),
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 0.1}]},
        "epoch": 3,
    },
    "iBOT": lambda state: {"state_dict": ibot(state)},
    "timm's trainer": lambda state: {"state_dict": broken(state), "state_dict_ema": state},
    "DataParallel": lambda state: {"model": prefixed("module.", state)},
    "compiled": lambda state: {"model": prefixed("_orig_mod.", state)},
    "FSDP around chunks": lambda state: renamed(chunked(state), r"^(blocks\.\d+\.)", r"\1_fsdp_wrapped_module."),
    "our training": lambda state: {
        "model": prefixed("student.backbone.", broken(state)) | prefixed("teacher.backbone.", state),
        "optimizer": {"state": {f"student.backbone.{name}": {"exp_avg": tensor} for name, tensor in state.items()}},
    },
}


WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.", "module.")
# Names that wrappers leave inside of a backbone, and around it.
CHECKPOINTS |= {
    f"{wrapper}, {place}": partial(renamed, pattern=pattern, replacement=rf"\1{wrapper}")
    for wrapper in WRAPPERS
    for place, pattern in {
        "around": r"^()",
        "around each block": r"^(blocks\.\d+\.)",
        "in a block": r"(\.(?:attn|mlp)\.)",
        "around the patch embedding": r"^(patch_embed\.)",
        "everywhere": r"(\.|^)(?!\d)",
    }.items()
}


@pytest.mark.parametrize("checkpoint", CHECKPOINTS.values(), ids=CHECKPOINTS)
@pytest.mark.parametrize("registers", [0, 4])
def test_other_names(checkpoint, registers):
    model = own_backbone(num_register_tokens=registers, interpolate_offset=0.0)
    backbone = load(checkpoint(model.state_dict()), interpolate_offset=0.0, interpolate_antialias=False)
    assert torch.equal(all_tokens(backbone, images()), all_tokens(model, images()))


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"num_register_tokens": 4, "ffn_layer": "swiglu", "interpolate_antialias": True, "interpolate_offset": 0.0},
        {"mlp_ratio": 2.0, "init_values": None, "qkv_bias": False, "in_chans": 5, "ffn_bias": False},
        {"mlp_ratio": 3.0, "ffn_layer": "swiglu", "proj_bias": False, "ffn_bias": False, "depth": 11},
    ],
)
def test_architecture_from_weights(arguments):
    own = own_backbone(**arguments)
    architecture = infer_architecture(own.state_dict())
    inferred = DinoVisionTransformer(**architecture)
    assert inferred.load_state_dict(own.state_dict())
    assert (inferred.num_heads, inferred.patch_embed.num_patches) == (own.num_heads, own.patch_embed.num_patches)
    assert {key: architecture[key] for key in arguments} == arguments


def refusal(call, *arguments):
    with pytest.raises(ValueError) as caught:
        call(*arguments)
    return str(caught.value)


def test_unknown_names():
    assert "conv1.weight" in refusal(to_dinov2, {"conv1.weight": torch.zeros(1), "layer1": {}})
    assert "there are no tensors" in refusal(to_dinov2, {"model": {}, "epoch": 3})
    state = own_backbone().state_dict()
    text = refusal(to_dinov2, {"first": state, "second": state})
    assert "2 backbones, first., second." in text
    assert "2 backbones, first., first.module." in refusal(to_dinov2, {"first": state | prefixed("module.", state)})


@pytest.mark.parametrize(("dim", "heads"), [(60, 3), (128, 2), (1280, 16)])
def test_the_number_of_heads_is_not_guessed(dim, heads):
    """1280 is ViT-H's width, with heads of 80 channels."""
    state = own_backbone(embed_dim=dim, num_heads=heads, depth=1).state_dict()
    assert f"tokens of {dim} channels have no usual one" in refusal(infer_architecture, state)


def test_what_does_not_fit_is_refused():
    model = own_backbone()
    state = model.state_dict()
    total = len(state)
    half = dict(list(state.items())[: total // 2])
    assert f"loaded {total // 2} of {total} tensors; {total - total // 2} missing" in refusal(adapt, half, model)
    assert "without 'pos_embed'" in refusal(infer_architecture, {"patch_embed.proj.weight": torch.zeros(64, 3, 8, 8)})
    text = refusal(adapt, own_backbone(embed_dim=128, num_heads=2).state_dict(), model)
    assert f"loaded 0 of {total} tensors" in text and f"{total} of another shape" in text
    assert "unexpected (blocks.3.attn.proj.bias" in refusal(adapt, state, own_backbone(depth=3))
    assert "missing (blocks.4.attn.proj.bias" in refusal(adapt, state, own_backbone(depth=5))
    with_registers = own_backbone(num_register_tokens=4).state_dict()
    assert "1 unexpected (register_tokens)" in refusal(adapt, with_registers, model)
    assert "1 of another shape (register_tokens)" in refusal(adapt, with_registers, own_backbone(num_register_tokens=2))
    oblong = state | {"pos_embed": torch.zeros(1, 1 + 8, DIM)}
    for check in (partial(adapt, backbone=model), infer_architecture):
        assert "of 9 entries is not for a class token and a square grid of patches" in refusal(check, oblong)
    odd = timm.create_model("vit_small_patch16_224", **{**TIMM, "patch_size": PATCH}, qk_norm=True).state_dict()
    assert "unexpected (blocks.0.attn.k_norm.bias" in refusal(adapt, to_dinov2(odd), own_backbone(init_values=None))


def adapted(state, **arguments):
    backbone = own_backbone(**arguments)
    fitted, notes = adapt(state, backbone)
    backbone.load_state_dict(fitted)
    return backbone, notes


def test_nothing_changes_where_all_fits():
    state = own_backbone().state_dict()
    fitted, notes = adapt(state, own_backbone())
    assert notes == [] and fitted.keys() == state.keys()
    assert all(torch.equal(fitted[name], state[name]) for name in state)


@pytest.mark.parametrize("how", [{}, {"interpolate_offset": 0.0, "interpolate_antialias": True}])
@pytest.mark.parametrize("side", [28, 98])
def test_another_image_size_gives_the_features_of_the_original_at_that_size(how, side):
    original = own_backbone(**how)
    resized, notes = adapted(original.state_dict(), img_size=side, **how)
    assert notes == [f"16 positions became {side // PATCH} x {side // PATCH}"]
    assert_close(all_tokens(resized, images(side, side)), all_tokens(original, images(side, side)))


def smooth_patches(size):
    """Images [64, 3, size, size] of a few slow waves, sampled at the centres of the pixels."""
    generator = torch.Generator().manual_seed(2)
    coarse = torch.randn(64, 3, 4, 4, generator=generator, dtype=torch.float64)
    return F.interpolate(F.interpolate(coarse, 56, mode="bicubic"), size, mode="bilinear", antialias=True).float()


@pytest.mark.parametrize(("patch", "tolerance"), [(16, 0.03), (28, 0.03), (8, 0.1)])
def test_a_resized_patch_kernel_sees_the_same_in_resized_patches(patch, tolerance):
    original = own_backbone()
    kernel = original.patch_embed.proj.weight
    smooth = F.interpolate(torch.randn(*kernel.shape[:2], 4, 4, generator=torch.Generator().manual_seed(3)), PATCH)
    state = original.state_dict() | {"patch_embed.proj.weight": smooth}
    original.load_state_dict(state)
    other, notes = adapted(state, patch_size=patch, img_size=4 * patch)
    assert notes == [f"patches of 14 pixels became {patch}"]
    expected, actual = original.patch_embed(smooth_patches(PATCH)), other.patch_embed(smooth_patches(patch))
    assert (actual - expected).norm() / expected.norm() < tolerance
    naive = F.conv2d(
        smooth_patches(patch), F.interpolate(smooth, patch, mode="bicubic"), state["patch_embed.proj.bias"]
    )
    assert (naive.flatten(1) - expected.flatten(1)).norm() / expected.norm() > 0.1


def test_a_larger_patch_kernel_is_exact_for_enlarged_patches():
    original = own_backbone()
    other, _ = adapted(original.state_dict(), patch_size=16, img_size=64)
    enlarged = F.interpolate(images(14, 14), 16, mode="bicubic", antialias=True)
    assert_close(other.patch_embed(enlarged), original.patch_embed(images(14, 14)))


def test_other_numbers_of_channels():
    original = own_backbone()
    state, grey = original.state_dict(), images(channels=1)
    expected = all_tokens(original, grey.expand(-1, 3, -1, -1))
    one, notes = adapted(state, in_chans=1)
    assert notes == ["3 input channels became 1"]
    assert_close(all_tokens(one, grey), expected)
    six, _ = adapted(state, in_chans=6)
    assert_close(all_tokens(six, images().repeat(1, 2, 1, 1)), all_tokens(original, images()))
    back, _ = adapted(one.state_dict(), in_chans=3)
    assert_close(all_tokens(back, grey.expand(-1, 3, -1, -1)), expected)
    four, _ = adapted(state, in_chans=4)
    weight = state["patch_embed.proj.weight"]
    assert_close(four.patch_embed.proj.weight, torch.cat([weight, weight[:, :1]], dim=1) * 0.75)


def test_what_the_backbone_has_and_the_file_does_not():
    plain = own_backbone(init_values=None)
    state = plain.state_dict()
    del state["mask_token"]
    target = DinoVisionTransformer(**OWN, init_values=1e-5, num_register_tokens=4).eval()
    own_registers = target.register_tokens.detach().clone()
    fitted, notes = adapt(state, target)
    assert notes == ["8 LayerScales of 1", "fresh mask token", "fresh register tokens"]
    assert torch.equal(fitted["register_tokens"], own_registers)
    scaled, _ = adapted(state)
    assert_close(all_tokens(scaled, images()), all_tokens(plain, images()))
