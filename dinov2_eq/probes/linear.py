"""Linear classification of frozen features as in DINOv2: a grid of heads that are trained together in one pass."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dinov2_eq.distributed import is_distributed
from dinov2_eq.probes.accuracy import ClassHits, count_hits

LEARNING_RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)
NUM_BLOCKS = (1, 4)
REFERENCE_BATCH = 256  # learning rates are given for a global batch of this size
INITIAL_STD = 0.01
MOMENTUM = 0.9


class HeadSpec(NamedTuple):
    """Identifies a head of the grid by its input and its learning rate."""

    num_blocks: int  # how many of the last blocks give their class token
    avgpool: bool  # whether the mean patch token of the last block is added
    learning_rate: float  # for a batch of `REFERENCE_BATCH` images

    @property
    def name(self) -> str:
        return f"classifier_{self.num_blocks}_blocks_avgpool_{self.avgpool}_lr_{self.learning_rate}"


class HeadGrid(nn.Module):
    """Linear heads for each number of blocks, with and without the mean patch token, at each learning rate.

    Heads that read the same input share one weight tensor. They start from equal weights, drawn from N(0, 0.01) with
    `seed`, which do not depend on the other heads of the grid.

    Args:
        embed_dim: D of the backbone.
    """

    def __init__(
        self,
        embed_dim: int,
        num_classes: int,
        learning_rates: Sequence[float] = LEARNING_RATES,
        num_blocks: Sequence[int] = NUM_BLOCKS,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.max_blocks = max(num_blocks)
        self.embed_dim = embed_dim
        self.rates = list(dict.fromkeys(learning_rates))
        self.inputs = [(n, avgpool) for n in dict.fromkeys(num_blocks) for avgpool in (False, True)]
        self.specs = [HeadSpec(n, avgpool, rate) for n, avgpool in self.inputs for rate in self.rates]
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for n, avgpool in self.inputs:
            weight = torch.empty(num_classes, (n + avgpool) * embed_dim)
            weight.normal_(std=INITIAL_STD, generator=torch.Generator().manual_seed(seed))
            self.weights.append(nn.Parameter(weight.repeat(len(self.rates), 1, 1)))  # [rates, C, D_in]
            self.biases.append(nn.Parameter(torch.zeros(len(self.rates), num_classes)))

    def columns(self, num_blocks: int, avgpool: bool) -> slice:
        """Columns of `block_features` of the last `max_blocks` blocks that a head reads; they are contiguous."""
        return slice((self.max_blocks - num_blocks) * self.embed_dim, (self.max_blocks + avgpool) * self.embed_dim)

    def forward(self, features: Tensor) -> Tensor:
        """features [B, (max_blocks + 1) * D] -> scores [B, H, C], heads in the order of `specs`."""
        scores = [
            F.linear(features[:, self.columns(*input)], weight.flatten(0, 1), bias.flatten()).unflatten(1, bias.shape)
            for input, weight, bias in zip(self.inputs, self.weights, self.biases, strict=True)
        ]
        return torch.cat(scores, dim=1)

    @torch.no_grad()
    def score(self, features: Tensor, labels: Tensor, classes: Tensor | None = None) -> ClassHits:
        """Counts the correct predictions of all heads, in the order of `specs`; see `count_hits`.

        Args:
            classes: [M] int64, the only classes to choose from; `labels` and the counts then use indices into it.
        """
        chosen = slice(None) if classes is None else classes
        by_input = [
            count_hits(weight[:, chosen], bias[:, chosen], features[:, self.columns(*input)], labels)
            for input, weight, bias in zip(self.inputs, self.weights, self.biases, strict=True)
        ]
        return ClassHits(
            torch.cat([hits.top1 for hits in by_input]), torch.cat([hits.top5 for hits in by_input]), by_input[0].total
        )

    @torch.no_grad()
    def diverged(self) -> list[str]:
        """Names of the heads whose weights are NaN or infinite."""
        finite = torch.cat([weight.flatten(1).isfinite().all(dim=1) for weight in self.weights]).tolist()
        return [spec.name for spec, is_finite in zip(self.specs, finite, strict=True) if not is_finite]


class GridTraining:
    """Trains all heads of a grid with SGD and momentum on the sum of their losses; each rate decays to 0 as a cosine.

    With several processes, all of them construct one and call `update` together, each with its part of the batch.

    Args:
        global_batch_size: images per update, over all processes.
        num_steps: total number of updates.
    """

    def __init__(self, grid: HeadGrid, global_batch_size: int, num_steps: int) -> None:
        self.grid = grid
        self.num_steps = num_steps
        self.step = 0  # updates done
        self._model = DistributedDataParallel(grid) if is_distributed() else grid
        # Scaling a head's loss by its rate and using rate 1 is the same as using its rate, with momentum too.
        rates = torch.tensor([spec.learning_rate for spec in grid.specs]) * global_batch_size / REFERENCE_BATCH
        self._rates = rates.to(grid.weights[0].device)
        self._optimizer = torch.optim.SGD(grid.parameters(), lr=1.0, momentum=MOMENTUM, weight_decay=0)

    def update(self, features: Tensor, labels: Tensor) -> None:
        """Makes one step.

        Args:
            features: [B, (max_blocks + 1) * D], see `block_features`.
            labels: [B] int64, on the device of the grid.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = (1 + math.cos(math.pi * self.step / self.num_steps)) / 2
        scores = self._model(features)  # [B, H, C]
        targets = labels[:, None].expand(scores.shape[:2])  # [B, H]
        losses = F.cross_entropy(scores.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
        self._optimizer.zero_grad()
        (losses.mean(dim=0) @ self._rates).backward()
        self._optimizer.step()
        self.step += 1

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "num_steps": self.num_steps,
            "heads": self.grid.state_dict(),
            "optimizer": self._optimizer.state_dict(),
        }

    def load_heads(self, state: dict[str, Any]) -> None:
        """Loads the heads from a `state_dict`, for scoring without further training."""
        self.step, self.num_steps = state["step"], state["num_steps"]
        self.grid.load_state_dict(state["heads"])

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.load_heads(state)
        self._optimizer.load_state_dict(state["optimizer"])
