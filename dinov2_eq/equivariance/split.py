"""Token projection and split: z = W t + b = [z_inv ; z_equi] (Wang et al., arXiv 2503.18753, section 3)."""

from torch import Tensor, nn

from dinov2_eq.types import TokenFeatures


class TokenSplit(nn.Module):
    """Projects tokens linearly to `patch_dim` channels; the last `equivariant_dim` of them are the equivariant part.

    The base losses see the invariant part only, the decoders the equivariant part only.
    """

    def __init__(self, dim: int, patch_dim: int, equivariant_dim: int) -> None:
        super().__init__()
        self.sizes = (patch_dim - equivariant_dim, equivariant_dim)
        self.linear = nn.Linear(dim, patch_dim)

    def init_weights(self) -> None:
        nn.init.trunc_normal_(self.linear.weight, std=0.02)
        nn.init.zeros_(self.linear.bias)

    def forward(self, tokens: Tensor) -> TokenFeatures:
        """tokens [..., D] -> invariant [..., D_inv], equivariant [..., D_equi]"""
        invariant, equivariant = self.linear(tokens).split(self.sizes, dim=-1)
        return TokenFeatures(invariant, equivariant)


class NoSplit(nn.Module):
    """The plain base method: the whole token is invariant."""

    def init_weights(self) -> None:
        pass

    def forward(self, tokens: Tensor) -> TokenFeatures:
        return TokenFeatures(tokens, None)
