import logging
import math
import sys
import warnings

import pytest
import torch
from torch import Tensor

from dinov2_eq.layers import attention
from dinov2_eq.layers.attention import Attention, attend, attend_crops, block_diagonal_mask, choose_backend
from dinov2_eq.layers.cross_attention import CrossAttention

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh_choice():
    choose_backend.cache_clear()
    yield
    choose_backend.cache_clear()


def usable(backend: str) -> torch.device:
    """The device to test the backend on; skips the test if it does not run anywhere."""
    if backend == "sdpa":
        return CPU
    if not torch.cuda.is_available():
        pytest.skip("xformers has no kernel for the CPU, and there is no GPU here")
    device = torch.device("cuda")
    if choose_backend("auto", device, torch.float32) != "xformers":
        pytest.skip(f"xformers: {attention._why_xformers_fails(device, torch.float32)}")
    return device


def plain_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Slow attention, one query and head at a time: [N, heads, d], [M, heads, d] -> [N, heads, d]."""
    out = torch.zeros_like(query)
    for n in range(query.shape[0]):
        for head in range(query.shape[1]):
            scores = torch.stack([query[n, head] @ key[m, head] for m in range(key.shape[0])])
            weights = (scores / math.sqrt(query.shape[-1])).softmax(0)
            out[n, head] = sum(weights[m] * value[m, head] for m in range(key.shape[0]))
    return out


@pytest.mark.parametrize("backend", ["sdpa", "xformers"])
def test_attend_against_plain_softmax(backend):
    device = usable(backend)
    query, key, value = (torch.randn(2, length, 2, 8, device=device) for length in (5, 7, 7))
    expected = torch.stack([plain_attention(*sample) for sample in zip(query, key, value, strict=True)])
    torch.testing.assert_close(attend(query, key, value, backend), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("backend", ["sdpa", "xformers"])
def test_attend_crops_against_plain_softmax(backend):
    device = usable(backend)
    crop_shapes = [(2, 4), (1, 7), (3, 2)]
    query, key, value = torch.randn(3, 21, 2, 8, device=device)
    expected, start = torch.zeros_like(query), 0
    for batch, tokens in crop_shapes:
        for _ in range(batch):
            own = slice(start, start + tokens)
            expected[own] = plain_attention(query[own], key[own], value[own])
            start += tokens
    torch.testing.assert_close(attend_crops(query, key, value, crop_shapes, backend), expected, atol=1e-5, rtol=0)


def test_block_diagonal_mask():
    pytest.importorskip("xformers.ops", reason="xformers is not installed")
    crop_shapes = ((2, 4), (1, 7), (3, 2))
    with torch.inference_mode():
        mask = block_diagonal_mask(crop_shapes, CPU)
    blocks = [torch.ones(tokens, tokens) for batch, tokens in crop_shapes for _ in range(batch)]
    bias = mask.materialize((21, 21))
    assert not bias.is_inference()
    assert torch.equal(bias == 0, torch.block_diag(*blocks).bool())
    assert (bias[bias != 0] == -torch.inf).all()
    # With this bias one row of tokens gives what SDPA gives group by group.
    query, key, value = torch.randn(3, 21, 2, 8)
    row = [tensor.transpose(0, 1) for tensor in (query, key, value)]  # [heads, T, d]
    expected = torch.nn.functional.scaled_dot_product_attention(*row, attn_mask=bias).transpose(0, 1)
    torch.testing.assert_close(attend_crops(query, key, value, crop_shapes, "sdpa"), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("several", [False, True])
def test_xformers_call(monkeypatch, several):
    """Checks layout and bias of the call with a stand-in for the kernel, which the CPU lacks."""
    xops = pytest.importorskip("xformers.ops", reason="xformers is not installed")

    def kernel(query, key, value, attn_bias=None):  # [B, N, heads, d]
        bias = None if attn_bias is None else attn_bias.materialize((query.shape[1], key.shape[1]))
        heads_first = (tensor.transpose(1, 2) for tensor in (query, key, value))
        return torch.nn.functional.scaled_dot_product_attention(*heads_first, attn_mask=bias).transpose(1, 2)

    monkeypatch.setattr(xops, "memory_efficient_attention", kernel)
    crop_shapes = [(2, 4), (1, 7)] if several else [(3, 5)]
    query, key, value = torch.randn(3, 15, 2, 8)
    expected = attend_crops(query, key, value, crop_shapes, "sdpa")
    torch.testing.assert_close(attend_crops(query, key, value, crop_shapes, "xformers"), expected, atol=1e-5, rtol=0)
    layer, x = CrossAttention(16, 2, backend="xformers"), torch.randn(2, 4, 16)
    assert choose_backend("xformers", CPU, torch.float32) == "xformers"
    actual = layer(x, x)
    layer.backend = "sdpa"
    torch.testing.assert_close(actual, layer(x, x), atol=1e-5, rtol=0)


@pytest.mark.parametrize("bias", [True, False])
def test_attention_layer(bias):
    layer = Attention(16, 2, qkv_bias=bias, proj_bias=bias)
    assert (layer.qkv.bias is not None) == (layer.proj.bias is not None) == bias
    x = torch.randn(3, 5, 16)
    expected = []
    for sample in x:
        query, key, value = layer.qkv(sample).reshape(5, 3, 2, 8).unbind(1)  # order: q, k, v; then heads
        expected.append(layer.proj(plain_attention(query, key, value).reshape(5, 16)))
    torch.testing.assert_close(layer(x), torch.stack(expected), atol=1e-5, rtol=0)

    other = torch.randn(2, 3, 16)
    flat = torch.cat([x.flatten(0, 1), other.flatten(0, 1)])
    together = layer(flat, [(3, 5), (2, 3)])
    torch.testing.assert_close(together[:15].view(3, 5, 16), layer(x), atol=1e-5, rtol=0)
    torch.testing.assert_close(together[15:].view(2, 3, 16), layer(other), atol=1e-5, rtol=0)


def test_cross_attention_layer():
    layer = CrossAttention(16, 2)
    queries, context = torch.randn(3, 5, 16, requires_grad=True), torch.randn(3, 7, 16, requires_grad=True)
    expected = []
    for sample, other in zip(queries, context, strict=True):
        query = layer.query(sample).reshape(5, 2, 8)
        key, value = layer.key_value(other).reshape(7, 2, 2, 8).unbind(1)
        expected.append(layer.proj(plain_attention(query, key, value).reshape(5, 16)))
    actual = layer(queries, context)
    torch.testing.assert_close(actual, torch.stack(expected), atol=1e-5, rtol=0)
    actual.sum().backward()
    assert queries.grad.abs().sum() > 0 and context.grad.abs().sum() > 0


def test_auto_on_cpu_is_sdpa_and_logged_once(caplog):
    with caplog.at_level(logging.INFO, logger="dinov2_eq"), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose_backend("auto", CPU) == choose_backend("auto", CPU) == "sdpa"
    assert [record.message for record in caplog.records] == ["attention backend: sdpa on cpu with torch.bfloat16"]


def test_xformers_that_does_not_work(monkeypatch, caplog):
    monkeypatch.setattr(attention, "_why_xformers_fails", lambda device, dtype: "NotImplementedError: no operator")
    message = r"'xformers' cannot be used on cpu .*no operator.*choose 'sdpa' or 'auto'"
    with pytest.raises(ValueError, match=message):
        choose_backend("xformers", CPU)
    with caplog.at_level(logging.INFO, logger="dinov2_eq"):
        assert choose_backend("auto", torch.device("cuda")) == "sdpa"
    assert "attention backend: sdpa on cuda" in caplog.text and "no operator" in caplog.text


def test_xformers_that_works(monkeypatch):
    monkeypatch.setattr(attention, "_why_xformers_fails", lambda device, dtype: "")
    assert choose_backend("auto", torch.device("cuda")) == "xformers"
    assert choose_backend("auto", CPU) == "sdpa"
    assert choose_backend("sdpa", torch.device("cuda")) == "sdpa"


def test_xformers_trial_on_cpu():
    """On a CPU there is a reason and not a crash, whatever is installed."""
    with pytest.raises(ValueError, match=r"cannot be used on cpu with torch\.float32: .*Error: "):
        Attention(16, 2, backend="xformers")(torch.randn(1, 3, 16))


def test_xformers_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "xformers.ops", None)
    block_diagonal_mask.cache_clear()
    with pytest.raises(ValueError, match="ModuleNotFoundError"):
        choose_backend("xformers", CPU)


def test_unknown_backend():
    with pytest.raises(ValueError, match="Unknown attention backend 'flash'; available: auto, sdpa, xformers"):
        choose_backend("flash", CPU)


@pytest.mark.parametrize("layer", [Attention, CrossAttention])
def test_heads_must_divide(layer):
    with pytest.raises(ValueError, match="10 channels do not split into 3 heads"):
        layer(10, 3)
