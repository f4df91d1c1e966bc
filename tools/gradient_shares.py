"""How hard each loss term pulls on the backbone: gradient norms of the unweighted terms at a run's newest checkpoint.

This is what a weight such as lambda means in practice; the values of the losses do not say it.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from dinov2_eq.checkpointer import Checkpointer
from dinov2_eq.config.load import load_config
from dinov2_eq.data.datasets import build_dataset
from dinov2_eq.train.build import build_train_loader, make_run


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tools/gradient_shares.py", description=__doc__)
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
    weights = arch.state_dict()
    checkpointer.load(step, {"model": weights})
    arch.load_state_dict(weights)
    scheduled = run.schedules.at(step - 1)
    batches = iter(build_train_loader(config, build_dataset(config.train.dataset_path), step, 0))
    parameters = list(arch.student["backbone"].parameters())
    norms: dict[str, float] = dict.fromkeys(arch.objectives, 0.0)
    for _ in range(args.batches):
        losses = run.forward(next(batches), scheduled).losses
        for name, loss in losses.items():
            gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
            squares = sum(gradient.square().sum() for gradient in gradients if gradient is not None)
            norms[name] += squares.sqrt().item() / args.batches
    weights = {name: arch.loss_weights[name] for name in norms}
    print(json.dumps({"run": args.run.name, "step": step, "gradient_norm": norms, "weight": weights}, indent=1))


if __name__ == "__main__":
    main()
