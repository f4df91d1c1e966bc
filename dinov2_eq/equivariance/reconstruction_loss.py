"""L_recon = (1 / K) sum_k mean((u_hat_k - u_k)^2), k = 1..K (Wang et al., arXiv 2503.18753, section 3)."""

import torch.nn.functional as F
from torch import Tensor


def reconstruction_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """Mean squared error over the K intermediate targets, in float32.

    Both are [K, B, C, H, W]. The mean runs over images, channels and pixels, and the targets are normalised with the
    data's mean and standard deviation: predicting the mean colour everywhere costs about 1, whatever K and the image
    size are. That fixes the meaning of lambda: at lambda = 1 a useless decoder weighs as much as one nat of the base
    losses, which are cross-entropies of several nats.

        loss = 0
        for k in range(K):                       # one decoder for each intermediate target
            loss += mse(predicted[k], target[k])
        return loss / K
    """
    return F.mse_loss(predicted.float(), target.float())
