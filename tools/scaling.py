"""Estimates memory and throughput on 1 to 512 GPUs from operation counts and data-sheet figures.

Nothing here runs on a GPU. Parameters and floating-point operations are counted on torch's meta device, activations are
measured on the CPU, and all assumed figures are in `ASSUMPTIONS`.
"""

import argparse
import json
import math
import platform
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from dinov2_eq.config.load import load_config
from dinov2_eq.config.schema import Config
from dinov2_eq.evaluation.results import write_results
from dinov2_eq.fsdp import STRATEGIES
from dinov2_eq.models import ARCHS, build_backbone
from dinov2_eq.models.vision_transformer import kept_per_token
from dinov2_eq.report.row_table import markdown
from dinov2_eq.train.build import build_arch
from dinov2_eq.train.estimate import count_parameters, estimate_memory, views_by_size
from dinov2_eq.train.ssl_meta_arch import SSLMetaArch
from dinov2_eq.types import GLOBAL, LOCAL, PATH, Group, Scene, ViewBatch

BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"
MODELS = {
    "ViT-L/16": ("vitl16_short", []),
    "ViT-L/16, task": ("vitl16_eq_short", []),
    "ViT-L/16, task of the papers": ("vitl16_eq_paper", []),
    "ViT-g/14, task": (
        "vitl16_eq_short",
        ["student.arch=vit_giant2", "student.patch_size=14", "crops.local_crops_size=98", "student.drop_path_rate=0.4"],
    ),
}
UNITS = {"TFLOP/s": 1e12, "TB/s": 1e12, "GB/s": 1e9, "GB": 1e9, "us": 1e-6, "": 1}
# (value, unit, source)
ASSUMPTIONS = {
    "peak": (989, "TFLOP/s", "H100 and H200 SXM data sheets, bfloat16 without sparsity"),
    "memory_h100": (80, "GB", "H100 SXM data sheet"),
    "memory_h200": (141, "GB", "H200 SXM data sheet"),
    "memory_bandwidth": (3.35, "TB/s", "H100 SXM data sheet; 4.8 for H200"),
    "nvlink": (450, "GB/s", "H100 and H200 SXM data sheets: 900 over both directions"),
    "network": (50, "GB/s", "DGX H100 user guide: a 400 Gb/s adapter for each GPU"),
    "gpus_per_node": (8, "", "DGX and HGX H100 and H200"),
    "utilisation": (0.4, "", "assumed, of the peak; to be replaced by a measurement"),
    "link_utilisation": (0.7, "", "assumed, of the links' speed; `dinov2-eq doctor` measures them"),
    "latency": (10, "us", "assumed, of a collective for each doubling of the processes"),
    "usable_memory": (0.9, "", "assumed; the rest is the driver's, nccl's and lost in gaps"),
}
ASSUMED = {name: value * UNITS[unit] for name, (value, unit, _) in ASSUMPTIONS.items()}
GLOBAL_BATCH = 2048
RUNS = ((1, GLOBAL_BATCH), (8, GLOBAL_BATCH), (64, GLOBAL_BATCH), (512, GLOBAL_BATCH), (512, 8 * GLOBAL_BATCH))
COUNTED_IMAGES = 20  # chosen so that stochastic depth keeps a whole number of them
GIB = 1024**3


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tools/scaling.py", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("docs/results/scaling.json"), help="JSON file")
    parser.add_argument(
        "--document", type=Path, default=Path("docs/scaling.md"), help="Markdown file whose tables are replaced"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    results = {
        "command": "python tools/scaling.py",
        "environment": {"torch": torch.__version__, "device": f"cpu, {platform.machine()}"},
        "measured_on_a_gpu": "nothing",
        "assumptions": {
            name: dict(zip(("value", "unit", "source"), row, strict=True)) for name, row in ASSUMPTIONS.items()
        },
        "models": [{**count(name), **measure_block(name)} for name in MODELS],
        "largest_batch": [row for name in MODELS for row in largest_batches(name)],
    }
    models = results["models"]
    results["runs"] = [run(model, gpus, batch) for model in models for gpus, batch in RUNS]
    results["strategies"] = [communication_of(model, strategy, 64) for model in models for strategy in STRATEGIES]
    results = rounded(results)
    write_results(args.output, results)
    before, _, rest = args.document.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    args.document.write_text(f"{before}{BEGIN}\n{tables(results)}\n{END}{after}", encoding="utf-8")
    print(f"{args.output} and the tables of {args.document} are written")


def config_of(model: str, *overrides: str) -> Config:
    recipe, settings = MODELS[model]
    return load_config(recipe, [*settings, *overrides])


@cache
def arch_of(name: str) -> SSLMetaArch:
    """Returns the networks and objectives, without memory for their weights."""
    return build_arch(config_of(name), torch.device("meta"))


def flops(function: Callable[[], Any]) -> tuple[float, Any]:
    with FlopCounterMode(display=False) as counter:
        result = function()
    return counter.get_total_flops(), result


def forward_and_backward(function: Callable[[], Tensor]) -> float:
    forward, output = flops(function)
    return forward + flops(lambda: output.sum().backward())[0]


def count(name: str) -> dict[str, Any]:
    """Counts parameters and floating-point operations of one image in one step (multiply and add count as two)."""
    config, arch = config_of(name), arch_of(name)
    crops, path, images = config.crops, config.needs().path, COUNTED_IMAGES
    sides, student = {GLOBAL: crops.global_crops_size, LOCAL: crops.local_crops_size}, config.student
    views = {GLOBAL: (2, images), LOCAL: (crops.local_crops_number, images)}
    if path:
        sides[PATH] = sides[LOCAL if path.local_size else GLOBAL]
        views[PATH] = (len(path.fractions), round(images * path.share))
    patches = (crops.global_crops_size // student.patch_size) ** 2
    with torch.device("meta"):
        groups = {each: Group(torch.empty(*shape, 3, sides[each], sides[each])) for each, shape in views.items()}
        groups[GLOBAL] = groups[GLOBAL]._replace(masks=torch.zeros(2, images, patches, dtype=torch.bool))
        forward, encoded = flops(lambda: arch.student(groups))
        everything = [part.sum() for group, tokens in encoded.tokens.items() for part in tokens[: 1 + (group != LOCAL)]]
        backward, _ = flops(lambda: sum(everything).backward())
        with torch.no_grad():
            teacher, targets = flops(lambda: arch.teacher({GLOBAL: Group(groups[GLOBAL].images)}))
        share = config.ibot.mask_sample_probability * sum(config.ibot.mask_ratio_min_max) / 2
        masked, width = round(2 * images * share * patches), encoded.tokens[GLOBAL].cls.shape[-1]
        heads = decoders = 0.0
        for number, taught in (((2 + crops.local_crops_number) * images, 2 * images), (masked, masked)):
            heads += forward_and_backward(
                lambda number=number: encoded.logits("dino_head", torch.empty(number, width, requires_grad=True))
            )
            with torch.no_grad():
                heads += flops(lambda taught=taught: targets.logits("dino_head", torch.empty(taught, width)))[0]
        if "reconstruction" in arch.objectives:
            for group, tokens in encoded.tokens.items():
                encoded.tokens[group] = tokens._replace(patches=tokens.patches.detach().requires_grad_())
            rebuilt = PATH if path else GLOBAL
            pixels, rows = groups[rebuilt].images[:0], torch.arange(views[rebuilt][1])
            batch = ViewBatch(groups, torch.empty(0), torch.empty(0), pixels, rows)
            scene = Scene(batch, encoded, teacher=None, teacher_temp=1.0)
            decoders = forward_and_backward(lambda: arch.objectives["reconstruction"].reconstruct(scene))
    counted = {"student forward": forward, "student backward": backward, "teacher": teacher}
    per_image = {part: number / images for part, number in (counted | {"heads": heads, "decoders": decoders}).items()}
    extra = 1 + student.num_register_tokens
    tokens = sum(number * ((side // student.patch_size) ** 2 + extra) for side, number in views_by_size(config).items())
    return {
        "name": name,
        "config": {"config_file": MODELS[name][0], "overrides": MODELS[name][1]},
        "parameters": count_parameters(arch.trainable_modules()),
        "teacher_parameters": sum(parameter.numel() for parameter in arch.teacher.parameters()),
        "units": arch.student["backbone"].n_blocks + len(arch.trainable_modules()),  # gathered one after the other
        "tokens_per_image": round(tokens),
        "flops_per_image": per_image | {"total": sum(per_image.values())},
    }


def measure_block(name: str) -> dict[str, float]:
    """Measures the bytes that autograd keeps for one token in one block at full width, in bfloat16 on the CPU."""
    student = config_of(name).student
    backbone = build_backbone(
        student.arch,
        patch_size=student.patch_size,
        img_size=student.patch_size,  # only the block is measured, on tokens of its own
        depth=1,
        drop_path_rate=student.drop_path_rate,
        layerscale=student.layerscale,
    )
    [block] = backbone.blocks
    weights = {tuple(parameter.shape) for parameter in block.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        if weights.isdisjoint([tuple(tensor.shape), tuple(tensor.shape[::-1])]):
            storages[id(tensor.untyped_storage())] = tensor.untyped_storage()  # kept alive, so that ids stay unique
        return tensor

    shapes = [(10, 29), (20, 11)]
    num_tokens = sum(batch * length for batch, length in shapes)
    tokens = torch.randn(num_tokens, ARCHS[student.arch].embed_dim, requires_grad=True) * 1
    with torch.autocast("cpu", torch.bfloat16), saved_tensors_hooks(keep, lambda tensor: tensor):
        block(tokens, shapes)
    measured = sum(storage.nbytes() for storage in storages.values()) / len(tokens)
    return {"kept_bytes_per_token_and_block": measured, "kept_bytes_by_formula": kept_per_token(block, compute_bytes=2)}


def memory(name: str, batch: int, gpus: int, strategy: str, checkpointing: bool = False) -> dict[str, float]:
    """Estimated memory of each GPU in GiB, by purpose."""
    overrides = [f"train.batch_size_per_gpu={batch}", f"fsdp.strategy={strategy}"]
    config = config_of(name, *overrides, f"fsdp.activation_checkpointing={str(checkpointing).lower()}")
    return estimate_memory(config, arch_of(name), True, gpus, nodes(gpus))


def nodes(gpus: int) -> int:
    return math.ceil(gpus / ASSUMED["gpus_per_node"])


@cache
def largest_batch(name: str, gpus: int, card: str, checkpointing: bool) -> int:
    """Number of images that fit in one forward; 0: not even one."""
    limit = ASSUMED["usable_memory"] * ASSUMED[f"memory_{card}"] / GIB
    first, second = (memory(name, batch, gpus, "grad_op", checkpointing)["total"] for batch in (1, 2))
    return max(0, int((limit - first) / (second - first)) + 1)  # memory is linear in the batch


def largest_batches(name: str) -> list[dict[str, Any]]:
    return [
        {
            "model": name,
            "gpus": gpus,
            "checkpointing": checkpointing,
            **{card: largest_batch(name, gpus, card, checkpointing) for card in ("h100", "h200")},
        }
        for gpus in (1, 8, 64)
        for checkpointing in (False, True)
    ]


def seconds_to_send(size: float, processes: int, bandwidth: float, collectives: int) -> float:
    """Returns the time of all-gathers or reduce-scatters of `size` bytes in all; an all-reduce is one of each."""
    if processes == 1:
        return 0.0
    wire = size * (processes - 1) / processes / (bandwidth * ASSUMED["link_utilisation"])
    return wire + collectives * ASSUMED["latency"] * math.log2(processes)


def communication(model: Mapping[str, Any], strategy: str, gpus: int) -> dict[str, float]:
    """Bytes that each process sends in one forward and backward, and the seconds that this takes.

    Parameters are gathered in bfloat16, once if they are kept until the backward pass, otherwise twice. Gradients are
    summed in float32 in every backward. The teacher is gathered once. Between nodes, each GPU's adapter carries its
    part of a ring, so a node sends with all adapters.
    """
    replicas, shards = STRATEGIES[strategy].mesh_shape(gpus, min(gpus, ASSUMED["gpus_per_node"]))
    trained, teacher, units = sum(model["parameters"].values()), model["teacher_parameters"], model["units"]
    times = 2 if STRATEGIES[strategy].reshard else 1
    gathered = 2 * (times * trained + teacher) if shards > 1 else 0
    scattered = 4 * trained if shards > 1 else 0
    reduced = 2 * 4 * trained / shards if replicas > 1 else 0
    within = ASSUMED["nvlink"]
    across = min(within, ASSUMED["network"] * ASSUMED["gpus_per_node"])
    # The replicas of hybrid form as many simultaneous rings between nodes as a node has GPUs.
    replica_link = ASSUMED["network"] if shards > 1 else (across if nodes(gpus) > 1 else within)
    shard_link = across if shards > ASSUMED["gpus_per_node"] else within
    seconds = seconds_to_send(gathered + scattered, shards, shard_link, (times + 2) * units)
    seconds += seconds_to_send(reduced, replicas, replica_link, 2 * units)
    return {"gathered_bytes": gathered, "scattered_bytes": scattered, "all_reduced_bytes": reduced, "seconds": seconds}


def communication_of(model: Mapping[str, Any], strategy: str, gpus: int) -> dict[str, Any]:
    weights = memory(model["name"], 1, gpus, strategy)
    return {
        "model": model["name"],
        "strategy": strategy,
        "gpus": gpus,
        "weights_gib": weights["weights and optimizer"] + weights["gathered weights"],
        **communication(model, strategy, gpus),
    }


class Split(NamedTuple):
    """How the images of a step are split on one GPU."""

    batch: int  # images in one forward
    accumulation: int
    checkpointing: bool


def choose_split(name: str, gpus: int, global_batch: int) -> Split:
    """Chooses the largest power of two that fits an H100; with activation checkpointing if fewer than 16 images fit."""
    share = global_batch // gpus
    fitting = {wanted: largest_batch(name, gpus, "h100", wanted) for wanted in (False, True)}
    checkpointing = fitting[False] < min(share, 16)
    batch = min(share, 2 ** int(math.log2(fitting[checkpointing])))
    return Split(batch, share // batch, checkpointing)


def run(model: Mapping[str, Any], gpus: int, global_batch: int, strategy: str = "grad_op") -> dict[str, Any]:
    """Estimates one optimizer step on H100s: forwards, what is sent meanwhile, and the update of the weights."""
    split = choose_split(model["name"], gpus, global_batch)
    parts = model["flops_per_image"]
    per_image = parts["total"] + (parts["student forward"] if split.checkpointing else 0)
    computing = split.batch * per_image / (ASSUMED["peak"] * ASSUMED["utilisation"])
    sending = communication(model, strategy, gpus)["seconds"]
    # AdamW reads weight, gradient and two moments and writes all but the gradient (7 values), clipping reads and writes
    # the gradient (2), and the teacher's update reads both networks and writes one (3).
    shards = STRATEGIES[strategy].mesh_shape(gpus, ASSUMED["gpus_per_node"])[1]
    moved = 4 * (9 * sum(model["parameters"].values()) + 3 * model["teacher_parameters"]) / shards
    update = moved / ASSUMED["memory_bandwidth"]
    hidden = split.accumulation * max(computing, sending) + update
    in_turn = split.accumulation * (computing + sending) + update
    steps = 125000 * GLOBAL_BATCH // global_batch
    return {
        "model": model["name"],
        "gpus": gpus,
        "global_batch": global_batch,
        **split._asdict(),
        "memory_gib": memory(model["name"], split.batch, gpus, strategy, split.checkpointing)["total"],
        "computing_s": computing,
        "sending_s": sending,
        "update_s": update,
        "images_per_second": global_batch / hidden,
        "images_per_second_in_turn": global_batch / in_turn,
        "steps": steps,
        "hours": steps * hidden / 3600,
    }


def rounded(value: Any) -> Any:
    """Rounds every float in nested results to four significant digits."""
    return json.loads(json.dumps(value), parse_float=lambda text: float(f"{float(text):.4g}"))


def table(header: str, rows: Sequence[Sequence[Any]]) -> str:
    return markdown(header.split(" | "), [[str(cell) for cell in row] for row in rows]).rstrip()


def tables(results: Mapping[str, Any]) -> str:
    """All tables of the document, in Markdown."""
    assumed = [
        (name, f"{row['value']:g} {row['unit']}".strip(), row["source"]) for name, row in results["assumptions"].items()
    ]
    pieces = []
    for model in results["models"]:
        tera = {part: f"{number / 1e12:.3f}" for part, number in model["flops_per_image"].items()}
        trained = f"{sum(model['parameters'].values()) / 1e6:.0f} M"
        kept = f"{model['kept_bytes_per_token_and_block'] / 1e3:.1f} ({model['kept_bytes_by_formula'] / 1e3:.1f})"
        pieces.append((model["name"], trained, model["tokens_per_image"], *tera.values(), kept))
    runs = [
        (
            f"{row['model']}, {row['gpus']}",
            f"{row['batch']} x {row['accumulation']} = {row['global_batch'] // row['gpus']}",
            row["global_batch"],
            "yes" if row["checkpointing"] else "no",
            f"{row['memory_gib']:.0f}",
            f"{1e3 * row['computing_s']:.0f}",
            f"{1e3 * row['sending_s']:.0f}",
            f"{row['images_per_second_in_turn']:,.0f} to {row['images_per_second']:,.0f}",
            f"{row['images_per_second'] / row['gpus']:.0f}",
            f"{row['hours']:,.1f}",
        )
        for row in results["runs"]
    ]
    batches = [
        (f"{row['model']}, {row['gpus']}", "yes" if row["checkpointing"] else "no", row["h100"], row["h200"])
        for row in results["largest_batch"]
    ]
    strategies = [
        (
            f"{row['model']}, {row['strategy']}",
            f"{row['weights_gib']:.1f}",
            *(f"{row[part] / 1e9:.2f}" for part in ("gathered_bytes", "scattered_bytes", "all_reduced_bytes")),
            f"{1e3 * row['seconds']:.0f}",
        )
        for row in results["strategies"]
    ]
    parts = " | ".join(results["models"][0]["flops_per_image"])
    row = next(row for row in results["runs"] if row["gpus"] == 8)
    peak, share = (results["assumptions"][name]["value"] for name in ("peak", "utilisation"))
    tera, update = results["models"][0]["flops_per_image"]["total"] / 1e12, 1e3 * row["update_s"]
    example = (
        f"The second row: {row['batch']} x {tera:.3f} TFLOP / ({peak:g} TFLOP/s x {share:g}) = "
        f"{1e3 * row['computing_s']:.0f} ms, with {1e3 * row['sending_s']:.0f} ms of sending meanwhile, "
        f"{row['accumulation']} times; {update:.1f} ms of update: {row['images_per_second']:,.0f} images/s."
    )
    return "\n\n".join(
        [
            "**Assumed**",
            table("what | value | source", assumed),
            "**Counted and measured.** TFLOP of one image in one step; activations in kB for each token and block",
            table(f"model | trained | tokens | {parts} | kept (formula)", pieces),
            "**Largest batch of one forward**",
            table("model, GPUs | checkpointing | 80 GB | 141 GB", batches),
            "**Runs on H100s, `fsdp.strategy=grad_op`**",
            table(
                "model, GPUs | images of a GPU | of a step | checkpointing | GiB | computing, ms | sending, ms "
                "| images/s | images/s of a GPU | hours",
                runs,
            ),
            example,
            "**Strategies on 64 GPUs.** GB through each process in one forward and backward",
            table("model, strategy | weights, GiB | gathered | scattered | all-reduced | ms", strategies),
        ]
    )


if __name__ == "__main__":
    main()
