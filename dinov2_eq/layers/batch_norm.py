"""Batch normalisation over the images of all processes."""

import torch
from torch import Tensor, nn

from dinov2_eq.distributed import is_distributed, sum_with_gradient


class SyncBatchNorm(nn.SyncBatchNorm):
    """`torch.nn.SyncBatchNorm` that also runs on CPUs; on one process it is plain batch normalisation.

    Input [N, C] or [N, C, ...]; every process may hold another N.
    """

    def forward(self, input: Tensor) -> Tensor:
        if input.is_cuda or not (self.training and is_distributed()):
            return super().forward(input)
        axes = [axis for axis in range(input.ndim) if axis != 1]
        values = input.float()
        own_count = values.new_full((1,), values.numel() / values.shape[1])
        sums = sum_with_gradient(torch.cat([values.sum(axes), own_count]))
        count, mean = sums[-1], sums[:-1] / sums[-1]
        shape = [1, -1] + [1] * (input.ndim - 2)
        centred = values - mean.view(shape)
        var = sum_with_gradient(centred.square().sum(axes)) / count
        if self.track_running_stats:
            with torch.no_grad():
                self.num_batches_tracked += 1
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(var * count / (count - 1), self.momentum)
        normed = centred * torch.rsqrt(var + self.eps).view(shape)
        if self.affine:
            normed = normed * self.weight.view(shape) + self.bias.view(shape)
        return normed.to(input.dtype)
