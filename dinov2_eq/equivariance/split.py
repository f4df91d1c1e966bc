"""Token projection and split: z = [z_inv ; z_equi] = [W_inv t ; W_equi t] (arXiv 2503.18753, section 3)."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

PREFIX = "projection."


class TokenSplit(nn.Module):
    """Two linear maps of a token: `invariant` for the base losses, `equivariant` for the decoders.

    Together they are the paper's projection to d_patch = invariant_dim + equivariant_dim channels, cut in two; as two
    maps, each reader computes its own part only.

    Args:
        invariant_dim: None (ours): the base losses read the whole token, without a projection.
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


def projection_of(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """Returns the projection's weights in a teacher checkpoint or release; {}: its tokens were never split."""
    content = checkpoint.get("teacher", checkpoint)
    weights = {name.removeprefix(PREFIX): tensor for name, tensor in content.items() if name.startswith(PREFIX)}
    # Weights of others may use the prefix for something else.
    return weights if weights.keys() >= {"equivariant.weight", "equivariant.bias"} else {}


def split_like(weights: Mapping[str, Tensor], dim: int) -> TokenSplit:
    """Builds a split with the parts that `weights`, from `projection_of`, are of; it does not load them."""
    invariant = weights.get("invariant.bias")
    return TokenSplit(dim, None if invariant is None else len(invariant), len(weights["equivariant.bias"]))


class NoSplit(nn.Module):
    """The plain base method: the whole token is invariant."""

    def __init__(self) -> None:
        super().__init__()
        self.invariant = nn.Identity()

    def init_weights(self) -> None:
        """Does nothing: there are no weights."""
