"""Block-sparse attention against dense attention under the same mask: both paths, blocks of any length, masks, sums of exponentials."""

from __future__ import annotations

import pytest
import torch
from rectiflow.accel.attention.grouped import PATTERNS, GroupRule, group_layout
from rectiflow.kernels.block_sparse_attention import BlockLayout, block_sparse_attention, reference, torch_path

EQUAL = 1e-5  # of the issue; fp32 sums in another order
GRIDS = [((9, 7), (4, 3)), ((8, 12), (4, 4)), ((5, 6, 7), (2, 3)), ((3, 17), (2, 4))]


def tensors(tokens: int, batch: int = 2, heads: int = 3, width: int = 16, seed: int = 0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, heads, tokens, width, generator=generator).to(dtype) for _ in range(3)]


def layout_of(sides, group, pattern="block", radius=1, before=5, behind=3) -> BlockLayout:
    return group_layout(sides, GroupRule(pattern, (2, *group), radius), before, behind)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("sides, group", GRIDS)
def test_equals_dense_attention_under_the_mask(sides, group, pattern):
    layout = layout_of(sides, group, pattern, radius=0 if pattern == "block_and_cross" else 1)
    q, k, v = tensors(layout.tokens)
    torch.testing.assert_close(block_sparse_attention(q, k, v, layout), reference(q, k, v, layout), atol=EQUAL, rtol=0)


def test_equals_dense_attention_in_half_precision():
    layout = layout_of((9, 7), (4, 3))
    q, k, v = tensors(layout.tokens, dtype=torch.bfloat16)
    torch.testing.assert_close(block_sparse_attention(q, k, v, layout), reference(q, k, v, layout), atol=2e-2, rtol=0)


@pytest.mark.parametrize("axes", [1, 2, 3, 4])
@pytest.mark.parametrize("boolean", [True, False])
def test_masks_of_hosts_are_merged(axes, boolean):
    """(q, k), (b, q, k), (b, h, q, k), and one of keys alone; padding text is among the masked keys."""
    layout = layout_of((9, 7), (4, 3))
    q, k, v = tensors(layout.tokens)
    n = layout.tokens
    shape = {1: (2, 1, n), 2: (n, n), 3: (2, n, n), 4: (2, 3, n, n)}[axes]
    allowed = torch.rand(shape, generator=torch.Generator().manual_seed(1)) > 0.3
    allowed[..., 2] = True  # some text is always seen, so that no query is left without keys
    mask = allowed if boolean else torch.where(allowed, 0.25, -1e4)
    torch.testing.assert_close(block_sparse_attention(q, k, v, layout, mask), reference(q, k, v, layout, mask), atol=EQUAL, rtol=0)


def test_sums_of_exponentials():
    layout = layout_of((9, 7), (4, 3), "cross")
    q, k, v = tensors(layout.tokens)
    out, lse = torch_path(q, k, v, layout, with_lse=True)
    scores = (q @ k.transpose(-1, -2) / 4.0).masked_fill(~layout.mask(), -torch.inf)
    torch.testing.assert_close(lse, scores.logsumexp(-1), atol=EQUAL, rtol=0)
    torch.testing.assert_close(out, reference(q, k, v, layout), atol=EQUAL, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_scores_do_not_overflow(dtype):
    """Scores up to ±200: exp would be infinite in every precision."""
    layout = layout_of((8, 12), (4, 4))
    q, k, v = tensors(layout.tokens)
    q = q / q.norm(dim=-1, keepdim=True) * 200.0 * 4.0
    k = k / k.norm(dim=-1, keepdim=True)
    out, lse = torch_path(q.to(dtype), k.to(dtype), v.to(dtype), layout, with_lse=True)
    assert out.isfinite().all() and lse.isfinite().all() and lse.max() > 100.0


def test_memory_is_linear_in_kept_blocks():
    """Twice the rows of the grid at one radius: twice the pairs, and no intermediate tensor with a pair of tokens an element."""
    small, large = (layout_of((rows, 32), (4, 4), before=0, behind=0) for rows in (64, 128))
    assert large.pairs / small.pairs == pytest.approx(2.0, rel=0.03)
    q, k, v = tensors(large.tokens, 1, 1)
    with torch.profiler.profile(profile_memory=True, record_shapes=False) as seen:
        block_sparse_attention(q, k, v, large)
    most = max(event.cpu_memory_usage for event in seen.events())
    kept_keys = sum(large.keys) * q.shape[-1] * q.element_size()
    assert most <= 3 * kept_keys < large.tokens**2 * q.element_size() / 2


@pytest.mark.parametrize("wrong", [
    lambda: BlockLayout((torch.arange(3), torch.arange(2, 5)), ((0,), (1,))),
    lambda: BlockLayout((torch.arange(3), torch.arange(3, 5)), ((0,), ())),
    lambda: BlockLayout((torch.arange(3), torch.arange(3, 5)), ((0, 0), (1,))),
    lambda: block_sparse_attention(*tensors(7), layout_of((9, 7), (4, 3))),
    lambda: block_sparse_attention(*tensors(71), layout_of((9, 7), (4, 3)), backend="fast"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(wrong):
    with pytest.raises(ValueError):
        wrong()
