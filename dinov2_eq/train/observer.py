"""Periodic output of a run: log lines, metrics, pictures, online k-NN, teacher checkpoints."""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from dinov2_eq.config.schema import Config
from dinov2_eq.data.datasets import ImageDataset
from dinov2_eq.distributed import is_main_process
from dinov2_eq.logging import MetricLogger, first_value, progress_bar
from dinov2_eq.train.build import build_train_loader
from dinov2_eq.train.meter import StepMeter
from dinov2_eq.train.online_knn import KNN_TOP1, OnlineKnn
from dinov2_eq.train.run_folder import write_teacher
from dinov2_eq.train.samples import SampleWriter
from dinov2_eq.train.step import Run

logger = logging.getLogger(__name__)

Action = Callable[[int], Mapping[str, float] | None]


class Observer:
    """Logs a run and calls its periodic actions after each step; never changes the training."""

    def __init__(
        self,
        steps: int,
        start: int,
        log_period: int,
        metrics: MetricLogger | None,
        actions: Sequence[tuple[int, Action]],
    ) -> None:
        """
        Args:
            steps: length of the run.
            start: steps already done, if the run was resumed.
            log_period: steps between two log lines.
            metrics: None on all but the main process.
            actions: pairs of a period in steps and an action. An action gets the number of finished steps and returns
                values to log; it also runs at the end.
        """
        self.steps = steps
        self.log_period = log_period
        self.metrics = metrics
        self.actions = actions
        self.bar = progress_bar(total=steps, initial=start, unit="step")

    def after_step(self, done: int, meter: StepMeter, more: Mapping[str, float]) -> None:
        """Logs and calls actions when due; `done` counts finished steps, `more` is logged with the meter's values."""
        self.bar.update()
        if done % self.log_period == 0 or done == self.steps:
            values = {**meter.summary(), **more}
            logger.info("%s", meter.line(values, done, self.steps))
            self._log(done, values)
            meter.reset()
        with meter.paused():
            self.act(done)

    def act(self, done: int) -> None:
        """Calls every action that is due after `done` steps."""
        for period, action in self.actions:
            if done % period == 0 or done == self.steps:
                self._log(done, action(done) or {})

    def close(self) -> None:
        self.bar.close()
        if self.metrics:
            self.metrics.close()

    def _log(self, done: int, values: Mapping[str, float]) -> None:
        if self.metrics and values:
            self.metrics.log(done, values)


def build_observer(
    config: Config, folder: Path, run: Run, dataset: ImageDataset, knn: OnlineKnn | None, start: int
) -> Observer:
    """Builds the observer of a run from its config; `start` is the number of steps done before the run was resumed."""
    evaluation, steps = config.evaluation, config.optim.steps
    actions: list[tuple[int, Action]] = []
    if knn:
        measured = first_value(folder, KNN_TOP1) if start and is_main_process() else []

        def measure_knn(done: int) -> Mapping[str, float]:
            values = knn.measure(run.arch.evaluated["backbone"], run.device)
            measured.append(values[KNN_TOP1])
            if config.student.pretrained_weights and measured[-1] < measured[0]:
                logger.warning(
                    "k-NN top-1 %.2f %% is below the %.2f %% of student.pretrained_weights: lower optim.base_lr, "
                    "lengthen optim.freeze_backbone_steps, or wait",
                    measured[-1],
                    measured[0],
                )
            return values

        actions.append((evaluation.knn_period_steps, measure_knn))
    if evaluation.sample_period_steps > 0:
        samples = _build_samples(config, folder, run, dataset)
        actions.append((evaluation.sample_period_steps, samples.write))

    def write_evaluated(done: int) -> None:
        if done > 0:
            write_teacher(folder, run.arch.evaluated, config, done)

    actions.append((evaluation.eval_period_steps or steps, write_evaluated))
    metrics = MetricLogger(folder, start) if is_main_process() else None
    return Observer(steps, start, config.train.log_period_steps, metrics, actions)


def _build_samples(config: Config, folder: Path, run: Run, dataset: ImageDataset) -> SampleWriter:
    needs = config.needs()
    batch = next(iter(build_train_loader(config, dataset, start_step=0, num_workers=0)))
    return SampleWriter(folder / "samples", batch, run, config.crops, config.pairing(), needs.shown, needs.path)
