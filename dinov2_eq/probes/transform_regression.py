"""Measures how well frozen features predict the transform that took an image I to g(I).

A small head reads the features of both images and regresses the parameters of g; the score is R2 on held-out images.
The protocol follows arXiv 2503.18753 (table 1), and SIE (arXiv 2302.10283) for details that it leaves open.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import r2_score
from torch import Tensor, nn

HEADS = ("mlp", "linear")
BATCH_SIZE = 256
LEARNING_RATE = 1e-3


class R2Scores(NamedTuple):
    """Coefficients of determination, 1 - residual / total sum of squares."""

    pooled: float  # all components together, around one common mean (SIE's definition)
    mean: float  # mean of `components`
    components: list[float]  # each around its own mean, so that predicting the mean scores 0


def r2_scores(predicted: Tensor, target: Tensor) -> R2Scores:
    """Scores predictions [N, A] of A parameters against their targets [N, A].

    If the components have different means, even a constant prediction gets a positive pooled R2, but not a positive
    mean R2.

    Raises:
        ValueError: a component of the target does not vary.
    """
    predictions, targets = (values.double().cpu().numpy() for values in (predicted, target))
    ranges = np.ptp(targets, axis=0)
    if not ranges.all():  # scikit-learn would score 0 or 1
        raise ValueError(f"R2 needs targets that vary; the ranges of the components are {ranges.tolist()}.")
    components = r2_score(targets, predictions, multioutput="raw_values")
    return R2Scores(r2_score(targets.ravel(), predictions.ravel()), components.mean().item(), components.tolist())


def scale_targets(theta: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Maps parameters [N, A] from the ranges [low, high], both [A], to [-1, 1].

    Raises:
        ValueError: an empty range.
    """
    if not (high > low).all():
        raise ValueError(f"There is nothing to regress: a range is empty (low {low.tolist()}, high {high.tolist()}).")
    return (theta - (low + high) / 2) / ((high - low) / 2)


def regress_transform(
    train_pairs: Tensor,
    train_targets: Tensor,
    val_pairs: Tensor,
    *,
    seed: int,
    head: str = "mlp",
    hidden_dim: int = 1024,
    epochs: int = 50,
) -> Tensor:
    """Trains a head on pairs, on their device, and returns its predictions for the held-out pairs.

    The inputs are z-scored with the training statistics, see `z_scored`. Adam with a constant learning rate minimises
    the mean squared error. All randomness comes from `seed`.

    Args:
        train_pairs: [N, 2D] features of I and of g(I), concatenated.
        train_targets: [N, A], see `scale_targets`.
        val_pairs: [M, 2D].
        head: "mlp" (2D -> hidden_dim -> hidden_dim -> A with ReLU) or "linear".

    Returns:
        [M, A] on the device of the pairs.
    """
    generator = torch.Generator().manual_seed(seed)
    device, targets = train_pairs.device, train_targets.float().to(train_pairs.device)
    inputs, val_inputs = (rows.float() for rows in z_scored(train_pairs, val_pairs))
    network = build_head(head, inputs.shape[1], hidden_dim, targets.shape[1], generator).to(device)
    fit_head(network, lambda: (inputs, targets), F.mse_loss, epochs, generator)
    with torch.no_grad():
        return network(val_inputs)


def fit_head(
    network: nn.Module,
    draw: Callable[[], tuple[Tensor, Tensor]],
    loss: Callable[[Tensor, Tensor], Tensor],
    epochs: int,
    generator: torch.Generator,
) -> None:
    """Trains a network with Adam at a constant learning rate, in batches of 256 in random order.

    Args:
        draw: returns the inputs [N, ...] and targets [N, ...] of the next epoch, on the device of the network.
        loss: of the outputs and the targets of a batch.
    """
    optimizer = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE, fused=True)
    for _ in range(epochs):
        inputs, targets = draw()
        for batch in torch.randperm(len(inputs), generator=generator).to(inputs.device).split(BATCH_SIZE):
            cost = loss(network(inputs[batch]), targets[batch])
            optimizer.zero_grad()
            cost.backward()
            optimizer.step()


def z_scored(train: Tensor, *others: Tensor) -> list[Tensor]:
    """Scales `train` [N, D] and others [M, D] so that each column has mean 0 and standard deviation 1 over `train`.

    In float64, so that columns that hardly vary keep their information. A constant column of `train` is only shifted.
    """
    std, mean = torch.std_mean(train.double(), dim=0)
    std = torch.where(train.amax(dim=0) > train.amin(dim=0), std, 1.0)
    return [(rows.double() - mean) / std for rows in (train, *others)]


def build_head(head: str, in_dim: int, hidden_dim: int, out_dim: int, generator: torch.Generator) -> nn.Sequential:
    """Builds the regression head, with torch's default initialisation drawn from `generator`.

    Raises:
        ValueError: unknown head.
    """
    if head not in HEADS:
        raise ValueError(f"Unknown head {head!r}; available: {', '.join(HEADS)}")
    widths = (in_dim, hidden_dim, hidden_dim, out_dim) if head == "mlp" else (in_dim, out_dim)
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(widths):
        linear = nn.utils.skip_init(nn.Linear, fan_in, fan_out)
        for parameter in linear.parameters():
            nn.init.uniform_(parameter, -(fan_in**-0.5), fan_in**-0.5, generator=generator)
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1])
