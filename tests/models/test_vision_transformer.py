import numpy as np
import pytest
import torch
from torch import Tensor

from dinov2_eq.models import ARCHS, DinoVisionTransformer, build_backbone


def tiny(**arguments) -> DinoVisionTransformer:
    torch.manual_seed(0)
    arguments = {"img_size": 32, "init_values": 1.0, **arguments}
    return DinoVisionTransformer(patch_size=8, embed_dim=32, depth=3, num_heads=2, **arguments).eval()


def crops(*sizes: tuple[int, int, int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(batch, 3, height, width, generator=generator) for batch, height, width in sizes]


def test_state_dict_names_and_shapes():
    with torch.device("meta"):
        model = build_backbone("vit_small", patch_size=14, img_size=518, num_register_tokens=4)
    dim = 384
    block = {
        "norm1.weight": (dim,),
        "norm1.bias": (dim,),
        "attn.qkv.weight": (3 * dim, dim),
        "attn.qkv.bias": (3 * dim,),
        "attn.proj.weight": (dim, dim),
        "attn.proj.bias": (dim,),
        "ls1.gamma": (dim,),
        "norm2.weight": (dim,),
        "norm2.bias": (dim,),
        "mlp.fc1.weight": (4 * dim, dim),
        "mlp.fc1.bias": (4 * dim,),
        "mlp.fc2.weight": (dim, 4 * dim),
        "mlp.fc2.bias": (dim,),
        "ls2.gamma": (dim,),
    }
    expected = {
        "cls_token": (1, 1, dim),
        "pos_embed": (1, 1370, dim),
        "register_tokens": (1, 4, dim),
        "mask_token": (1, dim),
        "patch_embed.proj.weight": (dim, 3, 14, 14),
        "patch_embed.proj.bias": (dim,),
        "norm.weight": (dim,),
        "norm.bias": (dim,),
    }
    expected |= {f"blocks.{index}.{name}": shape for index in range(12) for name, shape in block.items()}
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == expected


@pytest.mark.parametrize(
    ("arch", "arguments", "num_parameters", "num_tensors"),
    [
        ("vit_small", {}, 22_056_576, 175),
        ("vit_small", {"num_register_tokens": 4}, 22_056_576 + 1_536, 176),
        ("vit_base", {}, 86_580_480, 175),
        ("vit_large", {}, 304_368_640, 343),
        ("vit_large", {"ffn_layer": "swiglufused"}, 304_794_880, 343),
        ("vit_giant2", {}, 1_136_480_768, 567),
    ],
)
def test_parameter_counts(arch, arguments, num_parameters, num_tensors):
    with torch.device("meta"):
        model = build_backbone(arch, patch_size=14, img_size=518, **arguments)
    assert sum(parameter.numel() for parameter in model.parameters()) == num_parameters
    assert len(model.state_dict()) == num_tensors


def test_giant_swiglu_shapes():
    with torch.device("meta"):
        block = build_backbone("vit_giant2", patch_size=14, img_size=224, depth=1).blocks[0]
    assert block.mlp.w12.weight.shape == (8192, 1536)
    assert block.mlp.w3.weight.shape == (1536, 4096)


def test_attributes():
    model = build_backbone("vit_tiny", patch_size=16, img_size=64, depth=2, layerscale=0.0, num_register_tokens=3)
    assert (model.embed_dim, model.num_heads, model.patch_size, model.n_blocks) == (192, 3, 16, 2)
    assert (model.num_tokens, model.num_register_tokens, len(model.blocks)) == (1, 3, 2)
    assert not any("gamma" in name for name in model.state_dict())


@pytest.mark.parametrize(("uniform", "expected"), [(True, [0.3, 0.3, 0.3]), (False, [0.0, 0.15, 0.3])])
def test_drop_path_rates(uniform, expected):
    model = tiny(drop_path_rate=0.3, drop_path_uniform=uniform)
    assert [block.drop_path_rate for block in model.blocks] == pytest.approx(expected)


def test_init_weights_sets_every_parameter_after_meta():
    with torch.device("meta"):
        model = tiny(num_register_tokens=2, init_values=1e-5, ffn_layer="swiglu")
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(torch.nan)
    model.init_weights()
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all(), name
    assert model.pos_embed.std().item() == pytest.approx(0.02, rel=0.2)
    assert model.blocks[0].attn.qkv.weight.std().item() == pytest.approx(0.02, rel=0.2)
    assert model.cls_token.abs().max() < 1e-5
    assert model.mask_token.count_nonzero() == 0
    assert (model.blocks[0].ls1.gamma == 1e-5).all()
    before = model.pos_embed.clone()
    model.init_weights()
    assert not torch.equal(before, model.pos_embed), "a second call starts afresh"


def test_forward_features_shapes_and_forward():
    model = tiny(num_register_tokens=2)
    (x,) = crops((3, 32, 24))
    features = model.forward_features(x)
    assert {name: value.shape for name, value in features.items() if name != "masks"} == {
        "x_norm_clstoken": (3, 32),
        "x_norm_regtokens": (3, 2, 32),
        "x_norm_patchtokens": (3, 12, 32),
        "x_prenorm": (3, 15, 32),
    }
    assert features["masks"] is None
    assert torch.equal(model(x), features["x_norm_clstoken"])
    assert model(x, is_training=True).keys() == features.keys()
    assert torch.equal(model.norm(features["x_prenorm"])[:, 0], features["x_norm_clstoken"])
    assert [out.shape for out in model([x, x[:1]])] == [(3, 32), (1, 32)]


@pytest.mark.parametrize("registers", [0, 2])
def test_list_equals_separate_forwards_with_gradients(registers):
    model = tiny(num_register_tokens=registers)
    views = crops((4, 32, 32), (6, 16, 24))
    masks = [torch.rand(4, 16) < 0.5, None]
    together = model.forward_features(views, masks)
    separate = [model.forward_features(view, mask) for view, mask in zip(views, masks, strict=True)]
    for actual, expected in zip(together, separate, strict=True):
        for name in ("x_norm_clstoken", "x_norm_regtokens", "x_norm_patchtokens", "x_prenorm"):
            torch.testing.assert_close(actual[name], expected[name], atol=1e-5, rtol=0)

    parameters = dict(model.named_parameters())
    gradients = []
    for outputs in (together, separate):
        loss = sum(out["x_norm_patchtokens"].square().mean() + out["x_norm_clstoken"].sum() for out in outputs)
        gradients.append(torch.autograd.grad(loss, list(parameters.values())))
    for name, actual, expected in zip(parameters, *gradients, strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
        if not name.endswith("attn.qkv.bias"):  # keys' bias cancels in the softmax
            assert actual.abs().max() > 0, name


def test_masks_replace_tokens():
    model = tiny()
    torch.nn.init.normal_(model.mask_token)
    (x,) = crops((2, 32, 32))
    masks = torch.zeros(2, 16, dtype=torch.bool)
    masks[0, 3] = masks[1, 7:] = True
    plain, masked = model.prepare_tokens_with_masks(x), model.prepare_tokens_with_masks(x, masks)
    expected = plain.clone()
    for sample, patch in masks.nonzero().tolist():
        expected[sample, 1 + patch] = model.mask_token[0] + model.pos_embed[0, 1 + patch]
    torch.testing.assert_close(masked, expected)

    # What lies under a mask does not reach the output.
    changed = x.clone()
    changed[0, :, 0:8, 24:32] = 7.0  # patch 3
    assert torch.equal(model(x, masks), model(changed, masks))
    assert not torch.equal(model(x), model(changed))


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("registers", [0, 2])
@torch.no_grad()
def test_intermediate_layers_against_loop_over_blocks(norm, registers):
    model = tiny(num_register_tokens=registers)
    (x,) = crops((2, 32, 24))
    tokens, states = model.prepare_tokens_with_masks(x), []
    for block in model.blocks:
        tokens = block(tokens)
        states.append(model.norm(tokens) if norm else tokens)

    for n, indices in [(1, [2]), (2, [1, 2]), ([0, 2], [0, 2]), ((1,), [1])]:
        for reshape in (False, True):
            pairs = model.get_intermediate_layers(x, n, reshape=reshape, return_class_token=True, norm=norm)
            patches_only = model.get_intermediate_layers(x, n, reshape=reshape, norm=norm)
            assert isinstance(pairs, tuple) and len(pairs) == len(patches_only) == len(indices)
            for (patches, cls_token), alone, index in zip(pairs, patches_only, indices, strict=True):
                expected = states[index][:, 1 + registers :]  # [B, N, D]
                if reshape:
                    expected = expected.reshape(2, 4, 3, 32).permute(0, 3, 1, 2)
                assert torch.equal(patches, expected) and torch.equal(alone, expected)
                assert torch.equal(cls_token, states[index][:, 0])


@pytest.mark.parametrize("n", [4, [0, 3], [-1]])
def test_intermediate_layers_unknown_block(n):
    with pytest.raises(ValueError, match="the model has 3 blocks"):
        tiny().get_intermediate_layers(crops((1, 32, 32))[0], n)


def cubic(distance: float) -> float:
    """Keys' kernel with a = -0.75, the one of F.interpolate without antialiasing."""
    distance = abs(distance)
    if distance <= 1:
        return 1.25 * distance**3 - 2.25 * distance**2 + 1
    return -0.75 * (distance**3 - 5 * distance**2 + 8 * distance - 4) if distance < 2 else 0.0


def bicubic_weights(source: int, target: int, scale: float) -> np.ndarray:
    weights = np.zeros((target, source))
    for row in range(target):
        centre = (row + 0.5) / scale - 0.5
        base = int(np.floor(centre))
        for tap in range(base - 1, base + 3):
            weights[row, min(max(tap, 0), source - 1)] += cubic(centre - tap)
    return weights


@pytest.mark.parametrize("offset", [0.0, 0.1])
@pytest.mark.parametrize("grid", [(7, 7), (3, 9), (8, 16), (4, 1)])
def test_position_interpolation_against_bicubic_matrices(offset, grid):
    model = tiny(interpolate_offset=offset)  # a table of 4 x 4
    rows, columns = (bicubic_weights(4, length, (length + offset) / 4) for length in grid)
    table = model.pos_embed[0, 1:].detach().double().numpy().reshape(4, 4, 32)
    expected = np.einsum("ru,cv,uvd->rcd", rows, columns, table).reshape(-1, 32)
    positions = model.interpolate_pos_encoding(grid)
    assert torch.equal(positions[:, :1], model.pos_embed[:, :1])
    np.testing.assert_allclose(positions[0, 1:].detach().numpy(), expected, atol=1e-6)


def test_position_interpolation_options():
    native, small = (4, 4), (2, 3)
    model = tiny()
    assert torch.equal(model.interpolate_pos_encoding(native), model.pos_embed)
    # As many tokens as the table, but not square: interpolated.
    assert not torch.allclose(model.interpolate_pos_encoding((2, 8)), model.pos_embed)
    variants = [
        tiny(interpolate_offset=offset, interpolate_antialias=antialias).interpolate_pos_encoding(small)
        for offset in (0.0, 0.1)
        for antialias in (False, True)
    ]
    for index, variant in enumerate(variants):
        assert all(not torch.allclose(variant, other, atol=1e-6) for other in variants[index + 1 :])
    assert model.bfloat16().interpolate_pos_encoding(small).dtype == torch.bfloat16


def test_position_interpolation_sizes():
    with torch.device("meta"):
        model = DinoVisionTransformer(518, 14, embed_dim=4, depth=0, num_heads=1)
    model.to_empty(device="cpu").init_weights()
    for side in range(1, 300, 7):
        assert model.interpolate_pos_encoding((side, 300 - side)).shape == (1, 1 + side * (300 - side), 4)


def test_stochastic_depth_trains_and_is_off_in_eval():
    model = tiny(drop_path_rate=0.5, drop_path_uniform=True)
    views = crops((4, 32, 32), (6, 16, 16))
    assert torch.equal(model(views)[0], model(views)[0])
    model.train()
    torch.manual_seed(0)
    first = model(views)
    second = model(views)
    assert not torch.equal(first[0], second[0])
    torch.manual_seed(0)
    assert torch.equal(model(views)[1], first[1]), "the default generator governs what is dropped"
    sum(out.square().sum() for out in second).backward()
    assert all(p.grad.isfinite().all() for name, p in model.named_parameters() if name != "mask_token")


def test_autocast():
    model = tiny(drop_path_rate=0.3, num_register_tokens=1).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model.forward_features(crops((4, 32, 32), (6, 16, 16)), [torch.ones(4, 16, dtype=torch.bool), None])
    assert all(out["x_norm_patchtokens"].isfinite().all() for out in outputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = tiny()(crops((4, 32, 32))[0])
    torch.testing.assert_close(low.float(), tiny()(crops((4, 32, 32))[0]), atol=0.1, rtol=0)


@pytest.mark.parametrize(("height", "width"), [(32, 30), (31, 32), (4, 4)])
def test_image_not_made_of_patches(height, width):
    with pytest.raises(ValueError, match=rf"{height} x {width} pixels .* patches of 8"):
        tiny()(torch.zeros(1, 3, height, width))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"img_size": 30}, "30 x 30 pixels"),
        ({"drop_path_rate": 1.0}, r"drop_path_rate must be in \[0, 1\), got 1.0"),
        ({"interpolate_offset": -0.1}, r"interpolate_offset must be in \[0, 1\)"),
        ({"ffn_layer": "moe"}, "Unknown ffn_layer 'moe'; available: mlp, swiglu"),
    ],
)
def test_constructor_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny(**arguments)


def test_wrong_masks():
    with pytest.raises(ValueError, match=r"masks have shape \(2, 9\).*\(2, 16\) patches"):
        tiny()(torch.zeros(2, 3, 32, 32), torch.zeros(2, 9, dtype=torch.bool))


def test_unknown_architecture():
    with pytest.raises(ValueError, match="Unknown architecture 'vit_smal'; available: " + ", ".join(ARCHS)):
        build_backbone("vit_smal", patch_size=16, img_size=224)
