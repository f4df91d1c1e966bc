"""How well frozen features tell which transform took an image I to g(I).

A small head reads the features of both images and regresses the parameters of g; the score is R2 on held-out images.
The protocol is that of arXiv 2503.18753 (table 1), in the details it leaves open that of SIE (arXiv 2302.10283).
"""

from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEADS = ("mlp", "linear")
BATCH_SIZE = 256
LEARNING_RATE = 1e-3


class R2Scores(NamedTuple):
    pooled: float  # all components together, around one mean for all: SIE's definition
    mean: float  # mean of `components`
    components: list[float]  # each around its own mean: predicting the mean scores 0


def r2_scores(predicted: Tensor, target: Tensor) -> R2Scores:
    """R2 = 1 - RSS / TSS; predicted and target are [N, P].

    Where the components have different means, a constant prediction already gets a positive pooled R2; `mean` is safe
    from that.

    Raises:
        ValueError: a component of the target does not vary.
    """
    predicted, target = predicted.double(), target.double()
    residual = (target - predicted).square()  # [N, P]
    total = (target - target.mean(dim=0)).square().sum(dim=0)  # [P]
    if (total == 0).any():
        raise ValueError(f"R2 needs targets that vary; the sums of squares of the components are {total.tolist()}.")
    components = 1 - residual.sum(dim=0) / total
    pooled = 1 - residual.sum() / (target - target.mean()).square().sum()
    return R2Scores(pooled.item(), components.mean().item(), components.tolist())


def scale_targets(theta: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Parameters [N, P] in the ranges [low, high], both [P], mapped to [-1, 1] component by component.

    Raises:
        ValueError: an empty range.
    """
    if not (high > low).all():
        raise ValueError(f"Nothing to regress: a range is empty (low {low.tolist()}, high {high.tolist()}).")
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
    """Trains a head on pairs and returns its predictions for the held-out pairs, after the last epoch.

    The inputs are z-scored with the training statistics, in float64, however little they vary; Adam at a constant rate
    minimises the mean squared error. Everything random comes from `seed`.

    Args:
        train_pairs: [N, 2D] features of I and of g(I), concatenated; computed on their device.
        train_targets: [N, P], see `scale_targets`.
        val_pairs: [M, 2D].
        head: "mlp", 2D -> hidden_dim -> hidden_dim -> P with ReLU; or "linear".

    Returns:
        [M, P] on the device of the pairs.
    """
    generator = torch.Generator().manual_seed(seed)
    device, targets = train_pairs.device, train_targets.float().to(train_pairs.device)
    inputs, val_inputs = (rows.float() for rows in z_scored(train_pairs, val_pairs))
    network = build_head(head, inputs.shape[1], hidden_dim, targets.shape[1], generator).to(device)
    optimizer = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE, fused=True)
    for _ in range(epochs):
        for batch in torch.randperm(len(inputs), generator=generator).to(device).split(BATCH_SIZE):
            loss = F.mse_loss(network(inputs[batch]), targets[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        return network(val_inputs)


def z_scored(train: Tensor, *others: Tensor) -> list[Tensor]:
    """`train` [N, D] and others [M, D] in float64, each column with mean 0 and standard deviation 1 over `train`.

    Float64, because columns that hardly vary would lose what they tell. A column that is the same in all rows of
    `train` is only shifted.
    """
    std, mean = torch.std_mean(train.double(), dim=0)
    std = torch.where(train.amax(dim=0) > train.amin(dim=0), std, 1.0)
    return [(rows.double() - mean) / std for rows in (train, *others)]


def build_head(head: str, in_dim: int, hidden_dim: int, out_dim: int, generator: torch.Generator) -> nn.Sequential:
    """The regression head, with torch's default initialisation drawn from `generator`.

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
