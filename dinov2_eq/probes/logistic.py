"""Logistic regression on frozen features, over DINOv2's grid of regularisation strengths."""

from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

C_GRID = tuple((10 ** np.linspace(-6, 5, 45)).tolist())
MAX_LINE_SEARCHES = 50
GRADIENT_TOLERANCE = 1e-6  # largest component, of the mean loss of an image
LOSS_TOLERANCE = 1e-14  # relative change
HISTORY = 10


class LogisticFit(NamedTuple):
    weight: Tensor  # [C, D]
    bias: Tensor  # [C]
    num_iterations: int
    converged: bool  # False: stopped at the largest number of iterations


def fit_logistic(
    features: Tensor, labels: Tensor, num_classes: int, strength: float, max_iterations: int = 1000
) -> LogisticFit:
    """Minimises sum of cross-entropies + |weight|^2 / (2 * strength) with L-BFGS, from zero; the bias is free.

    That is scikit-learn's `LogisticRegression(C=strength)`, and cuML's: a smaller strength regularises more.

    Args:
        features: [N, D] float32 or float64; loss and gradient are computed on their device, in their precision.
        labels: [N] int64 in 0 .. num_classes - 1.
    """
    num_images, dim = features.shape
    targets = labels.to(features.device)[:, None]
    decay = 1 / (strength * num_images)

    def loss_and_gradient(flat: np.ndarray) -> tuple[float, np.ndarray]:
        """Of the mean over images, as a function of weight and bias, [C * (D + 1)]."""
        parameters = torch.from_numpy(flat).to(features).view(num_classes, dim + 1)
        weight, bias = parameters[:, :dim], parameters[:, dim]
        log_probs = torch.addmm(bias, features, weight.T).log_softmax(dim=1)
        loss = -log_probs.gather(1, targets).mean() + decay / 2 * weight.square().sum()
        residual = log_probs.exp().scatter_add_(1, targets, -log_probs.new_ones(targets.shape)) / num_images
        gradient = torch.empty_like(parameters)
        gradient[:, :dim] = residual.T @ features + decay * weight
        gradient[:, dim] = residual.sum(dim=0)
        return loss.item(), gradient.flatten().double().cpu().numpy()

    found = minimize(
        loss_and_gradient,
        np.zeros(num_classes * (dim + 1)),
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
    parameters = torch.from_numpy(found.x).to(features).view(num_classes, dim + 1)
    return LogisticFit(parameters[:, :dim].clone(), parameters[:, dim].clone(), found.nit, found.nit < max_iterations)
