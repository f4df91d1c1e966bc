"""Token projection and split: z = [z_inv ; z_equi] = [W_inv t ; W_equi t] (arXiv 2503.18753, section 3)."""

from torch import nn


class TokenSplit(nn.Module):
    """Projects tokens linearly to d_patch channels, of which the last `equivariant_dim` are the equivariant part.

    The two parts are two linear maps, so that each reader computes its own only: the base losses `invariant`, the
    decoders `equivariant`. Together they are one projection cut in two.

    Args:
        invariant_dim: None: the invariant part is the whole token, without a projection.
    """

    def __init__(self, dim: int, invariant_dim: int | None, equivariant_dim: int) -> None:
        super().__init__()
        self.invariant = nn.Identity() if invariant_dim is None else nn.Linear(dim, invariant_dim)
        self.equivariant = nn.Linear(dim, equivariant_dim)

    def init_weights(self) -> None:
        for linear in (self.invariant, self.equivariant):
            if isinstance(linear, nn.Linear):
                nn.init.trunc_normal_(linear.weight, std=0.02)
                nn.init.zeros_(linear.bias)


class NoSplit(nn.Module):
    """The plain base method: the whole token is invariant."""

    def __init__(self) -> None:
        super().__init__()
        self.invariant = nn.Identity()

    def init_weights(self) -> None:
        """Does nothing: there are no weights."""
