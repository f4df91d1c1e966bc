from torch import Tensor, nn

from dinov2_eq.layers.attention import attend, check_heads, choose_backend


class CrossAttention(nn.Module):
    """Multi-head attention from one set of tokens to another."""

    def __init__(self, dim: int, num_heads: int, backend: str = "auto") -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = check_heads(dim, num_heads)
        self.backend = backend
        self.query = nn.Linear(dim, dim)
        self.key_value = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, queries: Tensor, context: Tensor) -> Tensor:
        """Maps queries [B, N, D] and context [B, M, D] -> [B, N, D]."""
        query = self.query(queries).unflatten(-1, (self.num_heads, self.head_dim))  # [B, N, heads, d]
        key_value = self.key_value(context).unflatten(-1, (2, self.num_heads, self.head_dim))
        key, value = key_value.unbind(2)  # [B, M, heads, d]
        backend = choose_backend(self.backend, query.device, query.dtype)
        return self.proj(attend(query, key, value, backend).flatten(2))
