import torch.nn.functional as F
from torch import Tensor, nn


class SwiGLUFFN(nn.Module):
    """A gated feed-forward layer (Shazeer, arXiv 2002.05202): w3(silu(gate) * value), with gate and value from w12.

    To match the number of weights of an `Mlp`, the width is two thirds of `hidden_dim`, rounded up to a multiple of 8.
    """

    def __init__(self, dim: int, hidden_dim: int, bias: bool = True) -> None:
        super().__init__()
        width = (int(hidden_dim * 2 / 3) + 7) // 8 * 8
        self.w12 = nn.Linear(dim, 2 * width, bias=bias)
        self.w3 = nn.Linear(width, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)
