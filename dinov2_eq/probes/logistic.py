"""Logistic regression on frozen features, over DINOv2's grid of regularisation strengths."""

from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

C_GRID = tuple((10 ** np.linspace(-6, 5, 45)).tolist())
MAX_LINE_SEARCHES = 50
GRADIENT_TOLERANCE = 1e-6  # on the largest component, for the mean loss per image and the scaled weights
LOSS_TOLERANCE = 1e-14  # relative change
HISTORY = 10
MAX_ROWS = 2**16  # rows that are converted to float64 at once: 512 MiB for D = 1024


class LogisticFit(NamedTuple):
    """A classifier whose scores [C] of an image are weight @ (features - centre) + bias.

    Subtract the centre first, see `centred`; otherwise rounding hides the differences of features that are nearly
    alike.
    """

    weight: Tensor  # [C, D]
    bias: Tensor  # [C]
    centre: Tensor  # [D] float64: the mean of the training features
    num_iterations: int
    converged: bool  # False: stopped at the maximum number of iterations

    def centred(self, features: Tensor) -> Tensor:
        """Subtracts the centre from features [n, D], and converts them to the precision of the fit."""
        return (features.double() - self.centre.to(features.device)).to(self.weight.dtype)


def fit_logistic(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    strength: float,
    max_iterations: int = 1000,
    dtype: torch.dtype = torch.float64,
) -> LogisticFit:
    """Minimises sum of cross-entropies + |weight|^2 / (2 * strength) with L-BFGS; the bias is free.

    Equivalent to `LogisticRegression(C=strength)` of scikit-learn and cuML: a smaller strength regularises more.

    The result does not depend on the mean of the features or on how little they vary. They are centred, which the free
    bias compensates, and the weight of each column is scaled to its variance. The search starts from the best bias for
    zero weights (the logarithms of the class frequencies) plus one safe gradient step. If features are nearly alike,
    or the penalty is strong, that step already reaches the minimum.

    Args:
        features: [N, D]; loss and gradient are computed on their device.
        labels: [N] int64 in 0 .. num_classes - 1.
        dtype: float32 or float64, for loss and gradient.
    """
    num_images, dim = features.shape
    centre = sum(part.double().sum(dim=0) for part in features.split(MAX_ROWS)) / num_images
    rows = torch.empty_like(features, dtype=dtype)
    for part, original in zip(rows.split(MAX_ROWS), features.split(MAX_ROWS), strict=True):
        part.copy_(original.double() - centre)
    targets = labels.to(rows.device)[:, None]
    decay = 1 / (strength * num_images)
    variance = sum(part.double().square().sum(dim=0) for part in rows.split(MAX_ROWS)) / num_images
    unit = (variance + decay).rsqrt()  # [D]
    # Bounds the curvature: that of a mean cross-entropy is at most half of the mean square of its inputs.
    curvature = (unit.square() * variance).sum().item() / 2 + (unit.square() * decay).max().item()
    unit = unit.to(dtype)

    def loss_and_gradient(flat: np.ndarray) -> tuple[float, np.ndarray]:
        """Computes the mean loss per image and its gradient, as functions of weight / unit and bias: [C * (D + 1)]."""
        parameters = torch.from_numpy(flat).to(rows).view(num_classes, dim + 1)
        weight, bias = unit * parameters[:, :dim], parameters[:, dim]
        log_probs = torch.addmm(bias, rows, weight.T).log_softmax(dim=1)
        loss = -log_probs.gather(1, targets).mean() + decay / 2 * weight.square().sum()
        residual = log_probs.exp().scatter_add_(1, targets, -log_probs.new_ones(targets.shape)) / num_images
        gradient = torch.empty_like(parameters)
        gradient[:, :dim] = unit * (residual.T @ rows + decay * weight)
        gradient[:, dim] = residual.sum(dim=0)
        return loss.item(), gradient.flatten().double().cpu().numpy()

    start = np.zeros((num_classes, dim + 1))
    log_frequencies = labels.bincount(minlength=num_classes).clamp(min=0.5).double().log().cpu()
    start[:, dim] = log_frequencies - log_frequencies.mean()  # here the gradient of the bias is 0
    start = start.flatten() - loss_and_gradient(start.flatten())[1] / curvature
    minimum = minimize(
        loss_and_gradient,
        start,
        jac=True,
        method="L-BFGS-B",
        options={
            "maxiter": max_iterations,
            "maxfun": 2 * MAX_LINE_SEARCHES * max_iterations,
            "maxls": MAX_LINE_SEARCHES,
            "maxcor": HISTORY,
            "gtol": GRADIENT_TOLERANCE,
            "ftol": LOSS_TOLERANCE,
        },
    )
    parameters = torch.from_numpy(minimum.x).to(rows).view(num_classes, dim + 1)
    weight, bias = unit * parameters[:, :dim], parameters[:, dim].clone()
    return LogisticFit(weight, bias, centre, minimum.nit, minimum.nit < max_iterations)
