"""The same random weights give the same tokens as in timm and in transformers."""

import pytest
import torch
from timm.layers import SwiGLUPacked
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from dinov2_eq.models import DinoVisionTransformer

DIM, DEPTH, HEADS, SWIGLU_WIDTH = 64, 2, 2, 176
SIZES = [(224, 224), (518, 518), (518, 392), (196, 224)]


def backbone(**arguments) -> DinoVisionTransformer:
    arguments = {"img_size": 224, "init_values": 1.0, "interpolate_offset": 0.0, **arguments}
    model = DinoVisionTransformer(patch_size=14, embed_dim=DIM, depth=DEPTH, num_heads=HEADS, **arguments).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        parameter.data.normal_(centre, 0.1, generator=generator)  # so that no tensor can be exchanged unnoticed
    return model


def images(size: tuple[int, int]) -> Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))


def as_timm(model: DinoVisionTransformer, swiglu: bool) -> nn.Module:
    registers = model.num_register_tokens
    arguments = {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU, "mlp_ratio": 2 * SWIGLU_WIDTH / DIM} if swiglu else {}
    oracle = VisionTransformer(
        img_size=224,
        patch_size=14,
        embed_dim=DIM,
        depth=DEPTH,
        num_heads=HEADS,
        init_values=1.0,
        num_classes=0,
        dynamic_img_size=True,
        reg_tokens=registers,
        no_embed_class=registers > 0,
        **arguments,
    ).eval()
    state = {name.replace("w12", "fc1").replace("w3", "fc2"): value for name, value in model.state_dict().items()}
    del state["mask_token"]
    if registers:
        state["reg_token"] = state.pop("register_tokens")
        state["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
        state["pos_embed"] = state["pos_embed"][:, 1:]
    oracle.load_state_dict(state)
    return oracle


def as_transformers(model: DinoVisionTransformer, swiglu: bool) -> nn.Module:
    arguments = {"hidden_size": DIM, "num_hidden_layers": DEPTH, "num_attention_heads": HEADS, "image_size": 224}
    arguments |= {"patch_size": 14, "use_swiglu_ffn": swiglu, "layer_norm_eps": 1e-6}
    if model.num_register_tokens:
        arguments["num_register_tokens"] = model.num_register_tokens
        oracle = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**arguments)).eval()
    else:
        oracle = Dinov2Model(Dinov2Config(**arguments)).eval()
    names = {
        "pos_embed": "position_embeddings",
        "patch_embed.proj": "patch_embeddings.projection",
        "attn.proj": "attention.o_proj",
        "ls1.gamma": "layer_scale1.lambda1",
        "ls2.gamma": "layer_scale2.lambda1",
        "mlp.w3": "mlp.down_proj",
        "blocks.": "encoder.layer.",
    }
    state = {}
    for name, value in model.state_dict().items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        if name.startswith("norm."):
            state[f"layernorm.{name.removeprefix('norm.')}"] = value
        elif ".attn.qkv." in name:
            for letter, part in zip("qkv", value.chunk(3), strict=True):
                state[name.replace("attn.qkv", f"attention.{letter}_proj")] = part
        elif ".mlp.w12." in name:
            for half, part in zip(("gate", "up"), value.chunk(2), strict=True):
                state[name.replace("w12", f"{half}_proj")] = part
        else:
            state[name if name.startswith("encoder") else f"embeddings.{name}"] = value
    oracle.load_state_dict(state)
    return oracle


def all_tokens(features: dict) -> Tensor:
    parts = [features["x_norm_clstoken"].unsqueeze(1), features["x_norm_regtokens"], features["x_norm_patchtokens"]]
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("registers", "ffn_layer"), [(0, "mlp"), (4, "mlp"), (0, "swiglufused"), (4, "swiglu")])
@torch.no_grad()
def test_timm(size, registers, ffn_layer):
    model = backbone(num_register_tokens=registers, ffn_layer=ffn_layer, interpolate_antialias=True)
    expected = as_timm(model, swiglu=ffn_layer != "mlp").forward_features(images(size))
    torch.testing.assert_close(all_tokens(model.forward_features(images(size))), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("registers", "ffn_layer"), [(0, "mlp"), (4, "swiglu")])
@torch.no_grad()
def test_transformers(size, registers, ffn_layer):
    # transformers antialiases the position table in the model with registers only.
    model = backbone(num_register_tokens=registers, ffn_layer=ffn_layer, interpolate_antialias=registers > 0)
    expected = as_transformers(model, swiglu=ffn_layer != "mlp")(images(size), output_hidden_states=True)
    features = model.forward_features(images(size))
    torch.testing.assert_close(all_tokens(features), expected.last_hidden_state, atol=1e-5, rtol=0)

    first, second = model.get_intermediate_layers(images(size), n=2, norm=False)
    torch.testing.assert_close(first, expected.hidden_states[1][:, 1 + registers :], atol=1e-5, rtol=0)
    torch.testing.assert_close(second, expected.hidden_states[2][:, 1 + registers :], atol=1e-5, rtol=0)


@torch.no_grad()
def test_transformers_masks():
    model = backbone()
    masks = torch.rand(2, 256, generator=torch.Generator().manual_seed(2)) < 0.4
    expected = as_transformers(model, swiglu=False)(images((224, 224)), bool_masked_pos=masks).last_hidden_state
    actual = all_tokens(model.forward_features(images((224, 224)), masks))
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
