"""How hard each loss term pulls on the backbone, and which way: gradients at a run's newest checkpoint.

The norms of the unweighted terms say what a weight such as lambda means in practice; the values of the losses do not.
The cosine of a term's gradient with the weighted sum of all others says whether they agree (1), ignore each other (0)
or work against each other (-1), in each layer: 0 embeds the patches, the last is the final norm.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean as mean

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov2_eq.checkpointer import Checkpointer
from dinov2_eq.config.load import load_config
from dinov2_eq.data.datasets import build_dataset
from dinov2_eq.train.build import build_train_loader, make_run


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tools/gradient_shares.py", description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path, help="run folder with a checkpoint")
    parser.add_argument("--batches", type=int, default=4, help="mean over so many batches")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    config = load_config(str(args.run / "config.yaml"))
    device = torch.device("cpu")
    run = make_run(config, device)
    arch = run.arch
    checkpointer = Checkpointer(args.run / "checkpoints", config.train.keep_checkpoints)
    step = checkpointer.newest_whole()
    if step is None:
        raise ValueError(f"{args.run} has no checkpoint")
    state = arch.state_dict()
    checkpointer.load(step, {"model": state})
    arch.load_state_dict(state)
    scheduled = run.schedules.at(step - 1)
    batches = iter(build_train_loader(config, build_dataset(config.train.dataset_path), step, 0))
    parameters = dict(arch.student["backbone"].named_parameters())
    layers = [arch.student["backbone"].layer_of(name) for name in parameters]
    weights = {name: arch.loss_weights[name] for name in arch.objectives}
    norms, cosines = [], []
    for _ in range(args.batches):
        losses = run.forward(next(batches), scheduled).losses
        gradients = {
            name: torch.autograd.grad(loss, list(parameters.values()), retain_graph=True, materialize_grads=True)
            for name, loss in losses.items()
        }
        flat = {name: by_layer(gradient, layers) for name, gradient in gradients.items()}
        norms.append({name: torch.cat([*layer.values()]).norm().item() for name, layer in flat.items()})
        cosines.append({name: cosines_with_others(name, flat, weights) for name in flat})
    results = {
        "run": args.run.name,
        "step": step,
        "gradient_norm": {name: mean([batch[name] for batch in norms]) for name in weights},
        "weight": weights,
        "cosine_with_others": {
            name: {layer: mean([batch[name][layer] for batch in cosines]) for layer in cosines[0][name]}
            for name in weights
        },
    }
    print(json.dumps(results, indent=1))


def by_layer(gradient: Sequence[Tensor], layers: Sequence[int]) -> dict[int, Tensor]:
    """Joins the gradients of the parameters of each layer to one vector."""
    return {
        layer: torch.cat([part.flatten() for part, its in zip(gradient, layers, strict=True) if its == layer])
        for layer in sorted(set(layers))
    }


def cosines_with_others(
    name: str, gradients: Mapping[str, Mapping[int, Tensor]], weights: Mapping[str, float]
) -> dict[int, float]:
    """Returns, by layer, the cosine of a term's gradient with the weighted sum of those of all other terms."""
    others = [other for other in gradients if other != name]
    return {
        layer: F.cosine_similarity(
            own, sum((weights[other] * gradients[other][layer] for other in others), torch.zeros_like(own)), dim=0
        ).item()
        for layer, own in gradients[name].items()
    }


if __name__ == "__main__":
    main()
