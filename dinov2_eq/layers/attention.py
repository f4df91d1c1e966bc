"""Multi-head attention (Vaswani et al., arXiv 1706.03762) for crops of several sizes, and the choice of its kernel."""

import functools
import logging
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "sdpa", "xformers")

CropShapes = Sequence[tuple[int, int]]  # (batch, tokens) of each group of equal crops


@functools.cache
def choose_backend(name: str, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> str:
    """Chooses the attention kernel for `device` and queries of `dtype`; the choice is cached and logged once.

    Args:
        name: "sdpa" (torch), "xformers", or "auto": xformers on a GPU if it is installed and works, otherwise SDPA.

    Returns:
        "sdpa" or "xformers".

    Raises:
        ValueError: unknown name, or "xformers" where it cannot be used.
    """
    if name not in BACKENDS:
        raise ValueError(f"Unknown attention backend {name!r}; available: {', '.join(BACKENDS)}")
    if name == "sdpa" or (name == "auto" and device.type != "cuda"):
        backend, reason = "sdpa", ""
    else:
        obstacle = _why_xformers_fails(device, dtype)
        if obstacle and name == "xformers":
            raise ValueError(
                f"attention backend 'xformers' cannot be used on {device} with {dtype}: {obstacle}. Install an "
                "xformers build that matches this torch and run on a GPU it supports, or choose 'sdpa' or 'auto'"
            )
        backend, reason = ("sdpa", f" (xformers: {obstacle})") if obstacle else ("xformers", "")
    logger.info("attention backend: %s on %s with %s%s", backend, device, dtype, reason)
    return backend


def _why_xformers_fails(device: torch.device, dtype: torch.dtype) -> str:
    """Tries a tiny forward and backward pass; returns the first line of the error, or "" if xformers works."""
    try:
        with torch.inference_mode(False), torch.enable_grad():
            probe = torch.zeros(16, 1, 64, device=device, dtype=dtype, requires_grad=True)
            attend_crops(probe, probe, probe, ((2, 4), (1, 8)), "xformers").sum().backward()
    # A build for another torch, or an operator without a kernel for this device, raises any of these.
    except (ImportError, OSError, AttributeError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}".splitlines()[0].strip()
    return ""


def attend(query: Tensor, key: Tensor, value: Tensor, backend: str) -> Tensor:
    """Computes softmax(q k / sqrt(d)) v for each head.

    Args:
        query: [B, N, heads, d].
        key, value: [B, M, heads, d].
        backend: "sdpa" or "xformers", from `choose_backend`.

    Returns:
        [B, N, heads, d]
    """
    if backend == "xformers":
        from xformers.ops import memory_efficient_attention

        return memory_efficient_attention(query, key, value)
    heads_first = (tensor.transpose(1, 2) for tensor in (query, key, value))  # [B, heads, ., d]
    return F.scaled_dot_product_attention(*heads_first).transpose(1, 2)


@functools.lru_cache(maxsize=32)
def block_diagonal_mask(crop_shapes: tuple[tuple[int, int], ...], device: torch.device) -> Any:
    """Makes the xformers bias that restricts attention to each sequence when all are concatenated in one row."""
    from xformers.ops import fmha

    lengths = [tokens for batch, tokens in crop_shapes for _ in range(batch)]
    with torch.inference_mode(False):  # the cached mask may be used in training later
        return fmha.BlockDiagonalMask.from_seqlens(lengths, device=device)


def attend_crops(query: Tensor, key: Tensor, value: Tensor, crop_shapes: CropShapes, backend: str) -> Tensor:
    """Computes attention within each sequence of several groups of crops, which are concatenated in [T, heads, d].

    start = 0
    for batch, tokens in crop_shapes:
        for _ in range(batch):
            own = slice(start, start + tokens)
            out[own] = attend(query[own], key[own], value[own])
            start += tokens

    SDPA needs one call per group, xformers one for all groups.
    """
    if backend == "xformers" and len(crop_shapes) > 1:
        from xformers.ops import memory_efficient_attention

        mask = block_diagonal_mask(tuple(crop_shapes), query.device)
        return memory_efficient_attention(query[None], key[None], value[None], attn_bias=mask)[0]
    sizes = [batch * tokens for batch, tokens in crop_shapes]
    attended = []
    for shape, *group in zip(crop_shapes, query.split(sizes), key.split(sizes), value.split(sizes), strict=True):
        rows = (tensor.unflatten(0, shape) for tensor in group)  # [B, N, heads, d]
        attended.append(attend(*rows, backend).flatten(0, 1))
    return torch.cat(attended)


def check_heads(dim: int, num_heads: int) -> int:
    """Number of channels per head; raises ValueError if `dim` does not split evenly."""
    if dim % num_heads:
        raise ValueError(f"{dim} channels do not split into {num_heads} heads; give a multiple of the number of heads")
    return dim // num_heads


class Attention(nn.Module):
    """Multi-head self-attention with scale d ** -0.5, where d is the number of channels per head."""

    def __init__(
        self, dim: int, num_heads: int, qkv_bias: bool = True, proj_bias: bool = True, backend: str = "auto"
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = check_heads(dim, num_heads)
        self.backend = backend
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim, bias=proj_bias)

    def forward(self, x: Tensor, crop_shapes: CropShapes | None = None) -> Tensor:
        """Maps x [B, N, D] -> [B, N, D]; with `crop_shapes`, the tokens of several groups, [T, D] -> [T, D]."""
        shapes = [(x.shape[0], x.shape[1])] if crop_shapes is None else crop_shapes
        query, key, value = self.qkv(x).view(-1, 3, self.num_heads, self.head_dim).unbind(1)  # [T, heads, d]
        backend = choose_backend(self.backend, query.device, query.dtype)
        return self.proj(attend_crops(query, key, value, shapes, backend).reshape(x.shape))
