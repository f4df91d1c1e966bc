"""How long a training step takes on this machine, and how many steps fit into a given time."""

import time
from operator import attrgetter
from statistics import median

import torch

from dinov2_eq.config.checks import LENGTHS
from dinov2_eq.config.schema import Config
from dinov2_eq.data.datasets import build_dataset
from dinov2_eq.distributed import pick_device
from dinov2_eq.train.build import build_train_loader, make_run
from dinov2_eq.train.meter import StepMeter
from dinov2_eq.train.step import train_step

WARM_UP_STEPS = 2  # not counted: allocations, kernels, and data-loading processes
TIMED_STEPS = 5


def seconds_per_step(config: Config) -> float:
    """Trains a few steps in memory and returns the median time of one, with its data.

    Raises:
        ValueError, OSError: data or modules cannot be used.
    """
    device = pick_device(config.train.device)
    dataset = build_dataset(config.train.dataset_path)
    run = make_run(config, device)
    batches = iter(build_train_loader(config, dataset, 0, config.train.num_workers))
    times, meter = [], StepMeter()
    for step in range(min(WARM_UP_STEPS + TIMED_STEPS, config.optim.steps)):
        began = time.perf_counter()
        train_step(run, step, batches, meter)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return median(times[WARM_UP_STEPS:] or times)


def settings_for(config: Config, steps: int) -> list[str]:
    """Returns overrides that make a run `steps` long, with warm-ups in proportion and one checkpoint in eight."""
    share = steps / config.optim.steps
    lengths = {key: min(round(share * attrgetter(key)(config)), steps) for key in LENGTHS}
    lengths = {"optim.steps": steps} | lengths | {"train.checkpoint_period_steps": max(steps // 8, 1)}
    return [f"{key}={value}" for key, value in lengths.items()]
