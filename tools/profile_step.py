"""What the task costs: time of a training step without it, as control, and with it, taken in turn in one process."""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import repeat
from statistics import median

import torch

from dinov2_eq.config.load import load_config
from dinov2_eq.config.schema import Config
from dinov2_eq.data.datasets import build_dataset
from dinov2_eq.data.loaders import to_device
from dinov2_eq.distributed import pick_device
from dinov2_eq.train.build import build_train_loader, make_run
from dinov2_eq.train.meter import StepMeter
from dinov2_eq.train.step import train_step

VARIANTS = {
    "disabled": ["equivariance.enabled=false"],
    "control": ["equivariance.enabled=true", "equivariance.loss_weight=0"],
    "task": ["equivariance.enabled=true"],
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tools/profile_step.py", description=__doc__)
    parser.add_argument(
        "--config-file", required=True, help="YAML file or packaged recipe, with a positive loss_weight"
    )
    parser.add_argument("--steps", type=int, default=20, help="of each variant, after two that do not count")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = build_parser().parse_intermixed_args(argv)
    configs = {name: load_config(args.config_file, [*args.overrides, *more]) for name, more in VARIANTS.items()}
    device = pick_device(configs["task"].train.device)
    steps = {name: build_step(config, device) for name, config in configs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(args.steps + 2):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds[name].append(time.perf_counter() - began)
    medians = {name: median(times[2:]) for name, times in seconds.items()}
    images = configs["task"].train.batch_size_per_gpu * configs["task"].train.accumulation_steps
    result = {
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"cpu, {torch.get_num_threads()} threads",
        "images_per_second": {name: images / value for name, value in medians.items()},
        "cost_percent_over_disabled": {
            name: 100 * (value / medians["disabled"] - 1) for name, value in medians.items()
        },
    }
    print(json.dumps(result, indent=1))


def build_step(config: Config, device: torch.device) -> Callable[[], None]:
    """Returns a function that does one step as training does, on one batch that is already on the device."""
    run = make_run(config, device)
    dataset = build_dataset(config.train.dataset_path)
    batch = to_device(next(iter(build_train_loader(config, dataset, start_step=0, num_workers=0))), device)
    return partial(train_step, run, 0, repeat(batch), StepMeter())


if __name__ == "__main__":
    main()
