"""Attention in float32 under the CPU's autocast: what it computes, where it holds, its cost."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from t2i_align.generators.attention import float32_on_cpu
from t2i_align.generators.diffusers_folder import ASSETS
from t2i_align.train import trace

attend = nn.functional.scaled_dot_product_attention
BF16 = torch.bfloat16


def qkv(dtype: torch.dtype = BF16) -> list[Tensor]:
    """Four queries' heads over two of keys and values, in bfloat16's numbers."""
    rng = torch.Generator().manual_seed(0)
    shapes = ((2, 4, 24, 16), (2, 2, 12, 16), (2, 2, 12, 16))
    drawn = (torch.randn(s, generator=rng).bfloat16().to(dtype) for s in shapes)
    return [x.requires_grad_() for x in drawn]


@pytest.mark.parametrize("masked", [False, True])
def test_it_is_attention_in_float32_rounded_once(masked: bool) -> None:
    """Value and gradients, with a mask and grouped heads too; float32 inputs likewise."""
    mask = torch.linspace(-2, 2, 24 * 12).view(24, 12).bfloat16() if masked else None
    exact = qkv(torch.float32)
    float_mask = None if mask is None else mask.float()
    wanted = attend(*exact, attn_mask=float_mask, scale=0.3, enable_gqa=True)
    wanted.square().sum().backward()
    for dtype in (BF16, torch.float32):
        given = qkv(dtype)
        with float32_on_cpu(), torch.autocast("cpu", BF16):
            found = attend(*given, attn_mask=mask, scale=0.3, enable_gqa=True)
        assert found.dtype == BF16 and torch.equal(found, wanted.bfloat16())
        found.float().square().sum().backward()
        for a, b in zip(given, exact, strict=True):
            assert a.grad is not None and b.grad is not None
            torch.testing.assert_close(a.grad.float(), b.grad, rtol=0.02, atol=0.02)


def test_it_holds_in_the_block_and_under_autocast_alone() -> None:
    """Blocks may be nested; after them torch's own rule is back to the bit."""
    q, k, v = qkv(torch.float32)
    plain = attend(q, k, v, enable_gqa=True)

    def under_autocast() -> Tensor:
        with torch.autocast("cpu", BF16):
            return attend(q, k, v, enable_gqa=True)

    before, exact = under_autocast(), plain.bfloat16()
    assert not torch.equal(before, exact)  # what the block changes can be seen here
    with float32_on_cpu():
        assert torch.equal(attend(q, k, v, enable_gqa=True), plain)
        with float32_on_cpu():
            assert torch.equal(under_autocast(), exact)
        assert torch.equal(under_autocast(), exact)
    assert torch.equal(under_autocast(), before)


def test_recomputed_blocks_see_the_same() -> None:
    """The backward pass runs outside of autocast; a block recomputed there must not fall back."""
    gradients = []
    for recompute in (False, True):
        q, k, v = qkv(torch.float32)

        def block(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attend(q, k, v, enable_gqa=True).float().square()

        with float32_on_cpu():
            with torch.autocast("cpu", BF16):
                if recompute:
                    out = checkpoint(block, q, k, v, use_reentrant=False)
                else:
                    out = block(q, k, v)
            out.sum().backward()
        gradients.append(q.grad)
    assert gradients[0] is not None and gradients[1] is not None
    assert torch.equal(gradients[0], gradients[1])


def test_the_memory_plan_knows_of_it() -> None:
    """q, k, v kept in float32, the output in float32 and once more in bfloat16, the log-sum-exp."""
    q = torch.empty(2, 4, 1000, 16, device="meta", requires_grad=True)
    live = trace.Live([q])
    with live, trace.Precision(BF16, "cpu"):
        low = q.bfloat16()
        out = attend(low, low, low)
        assert out.dtype == BF16
        numbers = q.numel()
        made = 2 * numbers + 3 * 4 * numbers + 4 * numbers + 2 * numbers + 4 * 2 * 4 * 1000
        assert live.bytes == made


@pytest.mark.bench
def test_a_step_of_the_bundled_network(capsys: pytest.CaptureFixture[str]) -> None:
    """Forward and backward of 32 pictures, with and without, in turns."""
    net: Any = UNet2DConditionModel.from_pretrained(ASSETS / "scenes_sdxl" / "unet")
    net.to(memory_format=torch.channels_last)
    x, text = torch.randn(32, 4, 16, 16), torch.randn(32, 16, net.config.cross_attention_dim)
    pooled = net.config.projection_class_embeddings_input_dim
    pooled -= 6 * net.config.addition_time_embed_dim
    more = {"text_embeds": torch.randn(32, pooled), "time_ids": torch.zeros(32, 6)}

    def step() -> float:
        start = time.perf_counter()
        with torch.autocast("cpu", BF16):
            out = net(x, 500, text, added_cond_kwargs=more).sample
        out.float().square().mean().backward()
        return time.perf_counter() - start

    step()
    own, ours = [], []
    for _ in range(5):
        own.append(step())
        with float32_on_cpu():
            ours.append(step())
    with capsys.disabled():
        print(
            f"\n{torch.get_num_threads()} threads: torch's own {min(own):.3f} s, in float32 "
            f"{min(ours):.3f} s, ratio {min(own) / min(ours):.2f}"
        )
    assert min(ours) < min(own)
