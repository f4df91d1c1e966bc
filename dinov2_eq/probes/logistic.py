"""Logistic regression on frozen features, over DINOv2's grid of regularisation strengths."""

from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

C_GRID = tuple((10 ** np.linspace(-6, 5, 45)).tolist())
MAX_LINE_SEARCHES = 50
GRADIENT_TOLERANCE = 1e-10  # largest component, of the mean loss of an image, in the units of `fit_logistic`
LOSS_TOLERANCE = 1e-16  # change from step to step
HISTORY = 10


class LogisticFit(NamedTuple):
    """Scores of an image, [C], are weight @ (features - centre) + bias.

    Subtract first, see `centred`: features that are nearly alike lose their differences in large products otherwise.
    """

    weight: Tensor  # [C, D]
    bias: Tensor  # [C]
    centre: Tensor  # [D] float64: the mean of the training features
    num_iterations: int
    converged: bool  # False: stopped at the largest number of iterations

    def centred(self, features: Tensor) -> Tensor:
        """features - centre of [n, D], in the precision of the fit."""
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

    That is scikit-learn's `LogisticRegression(C=strength)`, and cuML's: a smaller strength regularises more. The
    search does not depend on where the features lie and how much they vary: they are centred, which the free bias
    makes up for, and weights are found in units in which no second derivative exceeds 1. It begins where zero weights
    are best, at the logarithms of the class frequencies, and goes down the gradient by one such unit. Where features
    are nearly alike, or the penalty is strong, this is the minimum.

    Args:
        features: [N, D]; loss and gradient are computed on their device.
        labels: [N] int64 in 0 .. num_classes - 1.
        dtype: float32 or float64, of that computation.
    """
    num_images, dim = features.shape
    centre = features.double().mean(dim=0)
    rows = (features.double() - centre).to(dtype)
    targets = labels.to(rows.device)[:, None]
    decay = 1 / (strength * num_images)
    # Second derivatives of the mean cross-entropy are at most half of this mean square.
    unit = (rows.double().square().sum(dim=1).mean().item() / 2 + decay) ** -0.5

    def loss_and_gradient(flat: np.ndarray) -> tuple[float, np.ndarray]:
        """Of the mean over images, as a function of weight / unit and bias, [C * (D + 1)]."""
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
    start[:, dim] = log_frequencies - log_frequencies.mean()
    start = start.flatten() - loss_and_gradient(start.flatten())[1]
    found = minimize(
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
    parameters = torch.from_numpy(found.x).to(rows).view(num_classes, dim + 1)
    weight, bias = unit * parameters[:, :dim], parameters[:, dim].clone()
    return LogisticFit(weight, bias, centre, found.nit, found.nit < max_iterations)
