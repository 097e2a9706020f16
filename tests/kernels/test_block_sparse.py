"""Block-sparse attention against dense attention under the same mask: both paths, blocks of any length, masks, sums of exponentials."""

from __future__ import annotations

import pytest
import torch
from rectiflow.accel.attention.grouped import PATTERNS, GroupRule, group_layout
from rectiflow.kernels import block_layout
from rectiflow.kernels.attention_lse import attention_with_lse, from_scores
from rectiflow.kernels.block_sparse_attention import BlockLayout, block_sparse_attention, reference, torch_path

EQUAL = 1e-5  # of the issue; fp32 sums in another order
GRIDS = [((9, 7), (4, 3)), ((8, 12), (4, 4)), ((5, 6, 7), (2, 3)), ((3, 17), (2, 4))]


def tensors(tokens: int, batch: int = 2, heads: int = 3, width: int = 16, seed: int = 0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, heads, tokens, width, generator=generator).to(dtype) for _ in range(3)]


def layout_of(sides, group, pattern="block", radius=1, before=5, behind=3) -> BlockLayout:
    return group_layout(sides, GroupRule(pattern, (2, *group), radius), before, behind)


@pytest.fixture(params=["together", "in turns"])
def path(request, monkeypatch):
    """Both ways of the torch path, on blocks that would all go the first."""
    if request.param == "in turns":
        monkeypatch.setattr(block_layout, "LARGE", 1)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("sides, group", GRIDS)
def test_equals_dense_attention_under_the_mask(sides, group, pattern):
    layout = layout_of(sides, group, pattern, radius=0 if pattern == "block_and_cross" else 1)
    q, k, v = tensors(layout.tokens)
    torch.testing.assert_close(block_sparse_attention(q, k, v, layout), reference(q, k, v, layout), atol=EQUAL, rtol=0)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("pattern, group", [("block", (4, 3)), ("cross", (2, 2))])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_equals_dense_attention_in_half_precision(dtype, pattern, group):
    layout = layout_of((9, 11), group, pattern)
    q, k, v = tensors(layout.tokens, dtype=dtype)
    torch.testing.assert_close(block_sparse_attention(q, k, v, layout), reference(q, k, v, layout), atol=2e-2, rtol=0)


@pytest.mark.usefixtures("path")
def test_heads_that_threads_do_not_divide(monkeypatch):
    """Five heads on two threads, from a host's tensor (b, n, h, d), with a mask for each head."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    layout = layout_of((9, 7), (4, 3))
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors(layout.tokens, heads=5))
    mask = torch.randn(2, 5, layout.tokens, layout.tokens, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(block_sparse_attention(q, k, v, layout, mask), reference(q, k, v, layout, mask), atol=EQUAL, rtol=0)


def test_a_large_block_finds_most_of_its_keys_in_place():
    """Of 8 × 8 groups each sees 4 to 9; little more than a third of these 484 is copied, and every turn finds what it sees."""
    layout = group_layout((128, 128), GroupRule("block"))
    turns = layout.plan.turns
    held = torch.full((max(len(turn.keys) for turn in turns),), -1)
    for turn in turns:
        for place, tokens in turn.new:
            held[place : place + len(tokens)] = tokens
        assert torch.equal(held[: len(turn.keys)], turn.keys)
    copied = sum(len(tokens) for turn in turns for _, tokens in turn.new)
    assert len(turns) == 64 and copied < 0.4 * sum(layout.keys)


@pytest.mark.parametrize("boolean", [True, False])
def test_gradients_are_those_of_dense_attention(boolean):
    layout = layout_of((9, 7), (4, 3))
    mask = torch.rand(2, 1, layout.tokens, generator=torch.Generator().manual_seed(1))
    mask = mask > 0.3 if boolean else mask
    found = []
    for attention in (block_sparse_attention, reference):
        given = [x.requires_grad_() for x in tensors(layout.tokens)]
        found.append(torch.autograd.grad(attention(*given, layout, mask).square().sum(), given))
    for ours, dense in zip(*found):
        torch.testing.assert_close(ours, dense, atol=EQUAL, rtol=1e-4)


@pytest.mark.usefixtures("path")
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


@pytest.mark.parametrize("sides, group", [((12, 14), (2, 2)), ((9, 11), (2, 3)), ((7, 8, 9), (2, 2))])
@pytest.mark.parametrize("masked", [False, True])
def test_a_cross_of_small_groups_is_a_sum_over_lines(sides, group, masked):
    """Rows and columns less the groups that both have seen, of a clip planes, lines and groups; nearly all mass on a query's own group."""
    layout = layout_of(sides, group, "cross")
    assert layout.in_terms and len(layout.terms) == 2 ** len(sides) - 1
    q, k, v = tensors(layout.tokens)
    k = k + 4.0 * q
    mask = torch.rand(2, 1, *[layout.tokens] * 2, generator=torch.Generator().manual_seed(1)) > 0.5 if masked else None
    if masked:
        mask[:, :, 9] = False
    out, lse = torch_path(q, k, v, layout, mask, with_lse=True)
    seen = layout.mask() if mask is None else layout.mask() & mask
    scores = (q @ k.transpose(-1, -2) / 4.0).masked_fill(~seen, -torch.inf)
    torch.testing.assert_close(out, reference(q, k, v, layout, mask), atol=EQUAL, rtol=0)
    torch.testing.assert_close(lse, scores.logsumexp(-1), atol=EQUAL, rtol=1e-6)


def test_terms_hold_every_pair_once():
    """As a matrix of counts; and a cross of few lines, which share most of their groups, is not made of terms."""
    layout = layout_of((7, 8, 9), (2, 2), "cross")
    counts = torch.zeros(layout.tokens, layout.tokens, dtype=torch.long)
    for term in layout.terms:
        here = slice(term.first, term.first + term.layout.tokens)
        counts[here, here] += term.sign * term.layout.mask()
    assert torch.equal(counts, layout.mask().long())
    assert not layout_of((4, 4, 4), (2, 2), "cross", before=0, behind=0).in_terms


@pytest.mark.usefixtures("path")
def test_sums_of_exponentials():
    layout = layout_of((9, 7), (4, 3), "cross")
    q, k, v = tensors(layout.tokens)
    out, lse = torch_path(q, k, v, layout, with_lse=True)
    scores = (q @ k.transpose(-1, -2) / 4.0).masked_fill(~layout.mask(), -torch.inf)
    torch.testing.assert_close(lse, scores.logsumexp(-1), atol=EQUAL, rtol=0)
    torch.testing.assert_close(out, reference(q, k, v, layout), atol=EQUAL, rtol=0)


@pytest.mark.parametrize("boolean", [True, False])
@pytest.mark.parametrize("axes", [1, 4])
def test_a_query_without_keys_has_no_output_and_no_sum(axes, boolean):
    """By torch's kernel for the CPU and by scores, which other devices take."""
    q, k, v = tensors(7)
    seen = torch.rand((2, 1, 7) if axes == 1 else (2, 3, 7, 7), generator=torch.Generator().manual_seed(2)) > 0.3
    seen[0, ..., 0, :] = False
    mask = seen if boolean else torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)
    out, lse = attention_with_lse(q, k, v, mask)
    added = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)
    for ours, scores in zip((out, lse), from_scores(q, k, v, added if axes == 4 else added[:, None])):
        torch.testing.assert_close(ours, scores, atol=EQUAL, rtol=0)
    assert bool((lse[0, :, 0] == -torch.inf).all()) and bool((out[0, :, 0] == 0).all()) and bool(lse[1].isfinite().all())


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_scores_do_not_overflow(dtype):
    """Scores up to ±200: exp would be infinite in every precision."""
    layout = layout_of((8, 12), (4, 4))
    q, k, v = tensors(layout.tokens)
    q = q / q.norm(dim=-1, keepdim=True) * 200.0 * 4.0
    k = k / k.norm(dim=-1, keepdim=True)
    out, lse = torch_path(q.to(dtype), k.to(dtype), v.to(dtype), layout, with_lse=True)
    assert out.isfinite().all() and lse.isfinite().all() and lse.max() > 100.0


@pytest.mark.usefixtures("path")
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
