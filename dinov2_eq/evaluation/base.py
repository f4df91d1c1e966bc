"""Base class of the evaluations, and what each of them does before and after it measures."""

import argparse
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from dinov2_eq.data.loaders import make_eval_loader
from dinov2_eq.evaluation.command_line import (
    encoder_of,
    evaluation_processes,
    extraction_settings,
    goes_on,
    protocol_of,
)
from dinov2_eq.evaluation.encoder import Encoder, load_encoder
from dinov2_eq.evaluation.features import FeatureExtractor, FeatureStore
from dinov2_eq.evaluation.results import publish, results_folder


class Measured(NamedTuple):
    """Result of an evaluation."""

    results: dict[str, Any]  # entries of the results file
    protocol: dict[str, Any]  # how they were obtained, besides flags and machine
    table: str  # for the terminal


class Evaluation(ABC):
    """Evaluation of one or more encoders; `run` calls `open`, `load` and `measure` in this order, in every process.

    Args:
        args: flags of the program, from a parser made by `evaluation_parser`.
        device: where networks run.
    """

    file_name: ClassVar[str]  # of the results file
    make_loader: Callable[..., Iterable[Tensor]] = staticmethod(make_eval_loader)  # images as the encoder sees them

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        self.args = args
        self.device = device
        sources = encoder_of(args)
        self.sources = [sources] if isinstance(sources, str) else list(sources)
        self.folder = results_folder(self.sources[0], args.output_dir)

    @abstractmethod
    def open(self) -> None:
        """Opens the data; raises ValueError or OSError if the data or the flags cannot be used."""

    def load(self) -> None:
        """Loads what is evaluated; raises ValueError if it does not fit the flags."""
        self.encoder: Encoder = load_encoder(self.sources[0], self.args.config_file)

    @abstractmethod
    def measure(self) -> Measured:
        """Computes the numbers."""

    def extractor(self, encoder: Encoder | None = None) -> FeatureExtractor:
        """Returns a feature extractor, which reuses the features in `--features-dir`; None: of the loaded encoder."""
        encoder = self.encoder if encoder is None else encoder
        store = FeatureStore(self.args.features_dir, encoder) if self.args.features_dir else None
        settings = extraction_settings(self.args)
        return FeatureExtractor(encoder, self.device, **settings, make_loader=self.make_loader, store=store)

    def published(self, results: dict[str, Any]) -> None:  # noqa: B027, few need it
        """Runs after the results file was written, with its contents."""


def run(kind: type[Evaluation], args: argparse.Namespace) -> None:
    """Evaluates, writes the results file and prints the table; a dry run stops before measuring.

    Raises:
        ValueError, OSError: flags, data or weights cannot be used.
    """
    with evaluation_processes(args) as device:
        started = time.perf_counter()
        evaluation = kind(args, device)
        evaluation.open()
        evaluation.load()
        if not goes_on(args, evaluation.folder):
            return
        found = evaluation.measure()
        protocol = protocol_of(args, device, started) | found.protocol
        results = {"protocol": protocol, **found.results}
        publish(evaluation.folder / kind.file_name, results, found.table)
        evaluation.published(results)
