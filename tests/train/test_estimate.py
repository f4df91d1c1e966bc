"""The estimate against what autograd keeps on a CPU, and against the tensors of a real run."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from dinov2_eq.config.load import load_config
from dinov2_eq.data.datasets import build_dataset
from dinov2_eq.models import build_backbone
from dinov2_eq.models.vision_transformer import kept_per_token
from dinov2_eq.train.build import (
    build_arch,
    build_make_views,
    build_optimizer,
    build_schedules,
    build_train_loader,
)
from dinov2_eq.train.estimate import GIB, count_parameters, estimate_memory, largest_unit, plan
from tests.helpers import tiny_config

META = torch.device("meta")


def kept_bytes(run, parameters):
    """Bytes that autograd keeps of `run()`, parameters and their converted copies aside."""
    parameters = list(parameters)
    stored = {id(parameter.untyped_storage()) for parameter in parameters}
    shapes = {tuple(parameter.shape) for parameter in parameters}
    storages = {}

    def pack(tensor):
        converted = tensor.dtype == torch.bfloat16 and not shapes.isdisjoint([tuple(tensor.shape), tensor.shape[::-1]])
        storage = tensor.untyped_storage()
        if id(storage) not in stored and not converted:
            storages[id(storage)] = storage  # kept alive, so that no id comes twice
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    return sum(storage.nbytes() for storage in storages.values()), result


@pytest.mark.parametrize("half_precision", [False, True])
@pytest.mark.parametrize("drop_path_rate", [0.0, 0.3])
@pytest.mark.parametrize("ffn_layer", ["mlp", "swiglu"])
def test_what_a_block_keeps(ffn_layer, drop_path_rate, half_precision):
    settings = {"patch_size": 14, "img_size": 14, "depth": 1, "ffn_layer": ffn_layer}
    [block] = build_backbone("vit_small", drop_path_rate=drop_path_rate, **settings).blocks
    tokens = torch.randn(130, 384, requires_grad=True) * 1
    with torch.autocast("cpu", torch.bfloat16, enabled=half_precision):
        measured, _ = kept_bytes(lambda: block(tokens, [(10, 7), (20, 3)]), block.parameters())
    assert measured / 130 == pytest.approx(kept_per_token(block, 2 if half_precision else 4), rel=0.02)


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_what_a_resnet_keeps(arch):
    backbone = build_backbone(arch, img_size=64)
    images = torch.randn(2, 3, 64, 64, requires_grad=True) * 1
    measured, _ = kept_bytes(lambda: backbone(images), [*backbone.parameters(), *backbone.buffers()])
    with META:
        stages = build_backbone(arch, img_size=64).kept_of_image(64, compute_bytes=4)
    assert len(stages) == 4 and 2 * sum(stage.inside for stage in stages) == pytest.approx(measured, rel=0.05)
    assert stages[1].input * 2 == 2 * 4 * {"resnet18": 64, "resnet50": 256}[arch] * 16 * 16


# In float32 alone: on a CPU autocast runs the decoders' upsampling in float32, on a GPU in bfloat16.
@pytest.mark.parametrize(
    ("decoder", "patch_size", "third_view"),
    [
        ("conv", 16, "view=second"),
        ("conv", 14, "third_view_share=1"),
        ("cross_attention", 16, "third_view_share=0.5"),
        ("self_attention", 16, "third_view_share=0.5"),
        ("self_attention", 16, "third_view_size=local"),
    ],
)
def test_activations_of_a_forward(decoder, patch_size, third_view):
    """Two blocks of ViT-S with heads and decoders of the usual proportions, on crops of 224 and 7 patches."""
    config = load_config(
        "vits16_eq",
        [
            f"equivariance.decoder={decoder}",
            f"equivariance.{third_view}",
            "equivariance.equivariant_dim=512",
            "equivariance.patch_dim=2048",
            f"student.patch_size={patch_size}",
            "student.depth=2",
            "dino.head_n_prototypes=4096",
            f"crops.local_crops_size={7 * patch_size}",
            "ibot.mask_ratio_min_max=[0.3,0.3]",
            "train.batch_size_per_gpu=2",
            "train.accumulation_steps=1",
            "train.dataset_path=Shapes:split=TRAIN:num=8:size=64",
        ],
    )
    arch = build_arch(config, torch.device("cpu"))
    batch = next(iter(build_train_loader(config, build_dataset(config.train.dataset_path), 0, 0)))
    views = build_make_views(config)(batch)
    scheduled = build_schedules(config).at(0)
    parameters = [*arch.student.parameters(), *arch.objectives.parameters()]
    estimate = estimate_memory(config, arch, half_precision=False)

    measured = {}
    measured["backbone"], scene = kept_bytes(lambda: arch.encode(views, scheduled), parameters)
    for part, names in {"heads": ("dino", "ibot"), "decoders": ("reconstruction",)}.items():
        terms = [arch.objectives[name] for name in names]
        measured[part], _ = kept_bytes(lambda terms=terms: [term(scene) for term in terms], parameters)
    for part, size in measured.items():
        assert estimate[part] * GIB == pytest.approx(size, rel=0.15), part


def test_weights_and_optimizer_are_exact():
    config = tiny_config()
    arch = build_arch(config, torch.device("cpu"))
    optimizer = build_optimizer(config, arch)
    trainable = [parameter for module in arch.trainable_modules().values() for parameter in module.parameters()]
    for parameter in trainable:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    moments = [moment for state in optimizer.state.values() for name, moment in state.items() if name != "step"]
    tensors = [*trainable, *(parameter.grad for parameter in trainable), *moments, *arch.teacher.parameters()]
    memory = estimate_memory(config, arch, half_precision=False)
    assert memory["weights and optimizer"] * GIB == sum(tensor.nbytes for tensor in tensors)
    assert memory["gathered weights"] == 0
    assert memory["total"] == pytest.approx(sum(size for part, size in memory.items() if part != "total"))


def test_what_sharding_saves():
    def memory(strategy, *overrides, world_size=8, nodes=2):
        config = load_config("vitl16_eq_short", [f"fsdp.strategy={strategy}", *overrides])
        return estimate_memory(config, build_arch(config, META), True, world_size, nodes)

    whole = memory("ddp", world_size=1, nodes=1)["weights and optimizer"]
    shards = {"ddp": 1, "hybrid": 4, "grad_op": 8, "full": 8}
    memories = {strategy: memory(strategy) for strategy in shards}
    for strategy, count in shards.items():
        assert memories[strategy]["weights and optimizer"] == pytest.approx(whole / count)
        assert memories[strategy]["backbone"] == memories["ddp"]["backbone"]
    arch = build_arch(load_config("vitl16_eq_short"), META)
    unit, trained = largest_unit(arch), sum(count_parameters(arch.trainable_modules()).values())
    assert unit == sum(parameter.numel() for parameter in arch.student["dino_head"].parameters())
    assert memories["full"]["gathered weights"] * GIB == 2 * unit * (2 + 4)
    assert memories["grad_op"]["gathered weights"] * GIB == 2 * trained + 2 * unit * 4

    recomputed = memory("full", "fsdp.activation_checkpointing=true")
    assert recomputed["backbone"] < memories["full"]["backbone"] / 5
    assert recomputed["heads"] == memories["full"]["heads"]


def test_plan_of_several_processes():
    config = tiny_config("train.accumulation_steps=2", "fsdp.strategy=hybrid")
    text = plan(config, build_arch(config, META), 24, False, world_size=4, nodes=2)
    batch = 4 * 2 * config.train.batch_size_per_gpu
    assert f"effective batch    {batch} images" in text and "fsdp.strategy=hybrid on 2 nodes" in text
    assert f"images seen        {batch * config.optim.steps:,}" in text
    assert "gathered weights" in text
    assert "fsdp.strategy" not in plan(config, build_arch(config, META), 24, False)
