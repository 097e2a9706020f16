"""Norm, rotation and cache write in one pass against the steps a model takes, and what does not fit."""

from __future__ import annotations

import pytest
import torch
from rectiflow.host.embedded.ldm.common import apply_rope, rope
from rectiflow.host.embedded.ldm.ops import rms_norm
from rectiflow.kernels.norm_rope_write import QKNorm, norm_rope_write, reference
from rectiflow.tests.kernels.inputs import attention_inputs


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])  # bf16: one rounding in place of two
@pytest.mark.parametrize("case", range(3))
def test_equals_its_steps(case, dtype, tolerance):
    (q, k, v), place, rotations, norm, text, given = attention_inputs("cpu", dtype)[case]
    mine, theirs = ([part.clone() for part in given] for _ in range(2))
    found = norm_rope_write(q, k, v, *mine, place, rotations, norm, text)
    torch.testing.assert_close(found, reference(q, k, v, *theirs, place, rotations, norm, text), atol=tolerance, rtol=tolerance)
    for one, two in zip(mine, theirs):
        torch.testing.assert_close(one, two, atol=tolerance, rtol=tolerance)


def test_part_of_the_tokens_completes_a_cache_to_what_a_dense_pass_makes():
    """Fill the cache with every token by the host's own norm and rotation, then write 9 of 20 again: nothing changes."""
    generator = torch.Generator().manual_seed(0)
    qkv, scale = torch.randn(3, 2, 3, 20, 16, generator=generator), 1 + 0.1 * torch.randn(2, 16, generator=generator)
    pe = rope(torch.arange(20.0)[None], 16, 1e4)[:, None]
    q, k = (apply_rope(rms_norm(x, weight), pe) for x, weight in zip(qkv, scale))
    cache = k.clone(), qkv[2].clone()
    place = torch.tensor([[0, 1, 2, 5, 8, 9, 13, 17, 19]])
    rows = [x[:, :, place[0]] for x in qkv]
    found = norm_rope_write(*rows, *cache, place, pe[0][:, place[0]], QKNorm(scale[None, 0], scale[None, 1]))
    torch.testing.assert_close(found, q[:, :, place[0]], atol=2e-6, rtol=1e-6)
    torch.testing.assert_close(cache[0], k, atol=2e-6, rtol=1e-6)
    assert torch.equal(cache[1], qkv[2])


def test_operator_is_whole_in_a_compiled_graph():
    (q, k, v), place, rotations, norm, text, caches = attention_inputs("cpu", torch.float32)[0]
    given = (q, k, v, *caches, place, rotations, norm.q, norm.k, 1e-6, text)
    torch.library.opcheck(torch.ops.rectiflow.norm_rope_write.default, given)


@pytest.mark.parametrize("wrong", ["cache", "place", "rotations", "backend"])
def test_what_does_not_fit_is_refused(wrong):
    (q, k, v), place, rotations, norm, text, caches = attention_inputs("cpu", torch.float32)[0]
    given = {"place": place, "rotations": rotations, "norm": norm, "text": text}
    if wrong == "cache":
        caches = caches[0], caches[1][:, :, 1:]
    elif wrong == "backend":
        given["backend"] = "fast"
    else:
        given[wrong] = given[wrong][:, 1:]
    with pytest.raises(ValueError, match="norm_rope_write"):
        norm_rope_write(q, k, v, *caches, **given)
