"""One optimizer step, shared by training, profiling and tests."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from dinov2_eq.data.loaders import to_device
from dinov2_eq.data.seeding import Stream, seed_for
from dinov2_eq.distributed import get_rank, get_world_size
from dinov2_eq.train.finite import clip_gradients, require_finite
from dinov2_eq.train.meter import StepMeter, average_over_processes
from dinov2_eq.train.param_groups import apply_schedule
from dinov2_eq.train.schedules import ScheduledValues, Schedules
from dinov2_eq.train.ssl_meta_arch import SSLMetaArch
from dinov2_eq.types import CollatedBatch, StepOutput, ViewBatch


@dataclass(frozen=True)
class Run:
    """Everything that a step needs; `train.build.make_run` builds it from a config."""

    arch: SSLMetaArch
    optimizer: torch.optim.Optimizer
    schedules: Schedules
    make_views: Callable[[CollatedBatch], ViewBatch]
    device: torch.device
    half_precision: bool  # networks run under bfloat16 autocast
    accumulation_steps: int  # forwards in one step
    clip_grad: float  # largest gradient norm; 0: no clipping
    clip_grad_per: str  # "module" or "tensor"
    seed: int

    def forward(self, batch: CollatedBatch, scheduled: ScheduledValues) -> StepOutput:
        """Makes the views of a batch and computes all losses."""
        views = self.make_views(to_device(batch, self.device))
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.half_precision):
            return self.arch(views, scheduled)


def train_step(run: Run, step: int, batches: Iterator[CollatedBatch], meter: StepMeter) -> ScheduledValues:
    """Updates the weights once, from `run.accumulation_steps` batches.

    Args:
        step: number of updates before this one; it determines schedules and random numbers.
        meter: collects losses, gradient norms and waiting times.

    Returns:
        The values of this step's schedules.

    Raises:
        NonFiniteError: a loss or gradient is NaN or infinite; the weights are unchanged.
    """
    torch.manual_seed(seed_for(Stream.DROP_PATH, run.seed, step, get_rank()))
    scheduled = run.schedules.at(step)
    apply_schedule(run.optimizer.param_groups, scheduled)
    run.optimizer.zero_grad()
    outputs = []
    for _ in range(run.accumulation_steps):
        with meter.waiting():
            batch = next(batches)
        output = run.forward(batch, scheduled)
        outputs.append(average_over_processes(output))
        meter.add(outputs[-1], len(batch.anchor_crops) * get_world_size())
        (output.total / run.accumulation_steps).backward()
    require_finite(outputs, step)
    meter.end_step(clip_gradients(run.arch.trainable_modules(), run.clip_grad, run.clip_grad_per, step))
    run.optimizer.step()
    run.arch.end_step(scheduled.teacher_momentum)
    return scheduled
