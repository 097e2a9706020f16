"""Closed forms of the shared layers: rotations, attention and its override, patches, time embedding, casting layers."""

from __future__ import annotations

import math

import pytest
import torch
from rectiflow.host.embedded.ldm import ops
from rectiflow.host.embedded.ldm.attention import get_attention_function, optimized_attention
from rectiflow.host.embedded.ldm.common import (
    EmbedND,
    apply_rope,
    finite_in_half,
    modulate,
    pad_to_patch_size,
    patchify,
    rope,
    timestep_embedding,
    unpatchify,
)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Rotations


def positions(*values: float) -> torch.Tensor:
    return torch.tensor([values])


def test_rope_is_a_rotation_by_position_times_frequency():
    table = rope(positions(0, 1, 5.5), 8, 10000)
    for n, pos in enumerate((0, 1, 5.5)):
        for i in range(4):
            angle = pos * 10000 ** (-2 * i / 8)
            expected = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
            torch.testing.assert_close(table[0, n, i], expected, rtol=0, atol=1e-7)  # fp32 rounding of exact values


def test_rope_keeps_lengths_and_position_zero():
    x = random(2, 3, 4, 16)
    table = EmbedND(16, 10000, (4, 6, 6))(random(2, 4, 3, seed=1) * 20)
    torch.testing.assert_close(apply_rope(x, table).norm(dim=-1), x.norm(dim=-1), rtol=1e-5, atol=0)  # one fp32 product
    origin = EmbedND(16, 10000, (4, 6, 6))(torch.zeros(2, 4, 3))
    assert torch.equal(apply_rope(x, origin), x)


def test_rope_scores_depend_on_relative_positions_only():
    q, k = random(1, 1, 1, 16), random(1, 1, 1, 16, seed=1)
    embed = EmbedND(16, 10000, (4, 6, 6))

    def score(a: list[float], b: list[float]) -> float:
        at = [apply_rope(x, embed(torch.tensor([[ids]]))) for x, ids in ((q, a), (k, b))]
        return float((at[0] * at[1]).sum())

    assert score([0, 3, 7], [0, 1, 2]) == pytest.approx(score([4, 13, 30], [4, 11, 25]), rel=1e-5)


def test_any_table_gives_what_the_fast_one_gives():
    """A gathered, cast or copied table takes the matrix form, which must agree with the complex one."""
    x = random(2, 3, 5, 12)
    table = EmbedND(12, 10000, (4, 4, 4))(random(2, 5, 3, seed=1) * 9)
    fast = apply_rope(x, table)
    assert table.stride()[-2:] == (1, 2), "the table is laid out for the complex product"
    torch.testing.assert_close(apply_rope(x, table.contiguous()), fast, rtol=1e-5, atol=1e-6)  # two roundings against one
    torch.testing.assert_close(apply_rope(x, table.double()).float(), fast, rtol=1e-5, atol=1e-6)
    order = torch.tensor([3, 1, 0])
    torch.testing.assert_close(apply_rope(x[:, :, order], table[:, :, order]), fast[:, :, order], rtol=1e-5, atol=1e-6)


def test_a_scaled_table_scales():
    x, table = random(1, 2, 3, 12), EmbedND(12, 10000, (4, 4, 4))(random(1, 3, 3, seed=1))
    torch.testing.assert_close(apply_rope(x, table * 1.5), apply_rope(x, table) * 1.5, rtol=1e-6, atol=1e-6)


def test_strided_inputs_and_half_precision():
    x = random(1, 5, 3, 12).transpose(1, 2)  # (1, 3, 5, 12) as attention makes it
    table = EmbedND(12, 10000, (4, 4, 4))(random(1, 5, 3, seed=1))
    assert torch.equal(apply_rope(x, table), apply_rope(x.contiguous(), table))
    half = apply_rope(x.bfloat16(), table)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half, apply_rope(x.bfloat16().float(), table).bfloat16(), rtol=0, atol=0)


def test_shared_ids_give_one_table():
    ids = random(1, 5, 3)
    embed = EmbedND(12, 10000, (4, 4, 4))
    shared, single = embed(ids.expand(4, -1, -1)), embed(ids)
    assert shared.shape == (4, 1, 5, 6, 2, 2) and shared.stride(0) == 0
    assert torch.equal(shared[3:], single)
    assert torch.equal(embed(ids.repeat(4, 1, 1)), shared)


# Attention


def naive(q, k, v, mask=None):
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    return torch.softmax(scores if mask is None else scores + mask, dim=-1) @ v


@pytest.mark.parametrize("mask_shape", [None, (6, 6), (2, 6, 6), (2, 1, 6), (2, 3, 6, 6)])
def test_attention_equals_the_formula(mask_shape):
    q, k, v = (random(2, 3, 6, 8, seed=i) for i in range(3))
    mask = None if mask_shape is None else random(*mask_shape, seed=4)
    full = None if mask is None else {2: mask, 3: mask[:, None] if mask.ndim == 3 else None, 4: mask}[mask.ndim]
    expected = naive(q, k, v, full)  # (b, h, n, d)
    out = optimized_attention(q, k, v, 3, mask=mask, skip_reshape=True)
    torch.testing.assert_close(out, expected.transpose(1, 2).flatten(2), rtol=1e-5, atol=1e-6)
    kept = optimized_attention(q, k, v, 3, mask=mask, skip_reshape=True, skip_output_reshape=True)
    torch.testing.assert_close(kept, expected, rtol=1e-5, atol=1e-6)
    flat = [t.transpose(1, 2).flatten(2) for t in (q, k, v)]
    torch.testing.assert_close(optimized_attention(*flat, 3, mask=mask), out, rtol=1e-5, atol=1e-6)


def test_override_stands_in_once_and_can_call_on():
    q, k, v = (random(1, 2, 4, 8, seed=i) for i in range(3))
    seen = []

    def override(func, *args, **kwargs):
        seen.append((len(args), sorted(kwargs)))
        return func(*args, **kwargs) * 2

    options = {"optimized_attention_override": override}
    out = optimized_attention(q, k, v, 2, skip_reshape=True, transformer_options=options)
    assert seen == [(4, ["_inside_attn_wrapper", "skip_reshape", "transformer_options"])]
    assert torch.equal(out, optimized_attention(q, k, v, 2, skip_reshape=True) * 2)
    assert set(options) == {"optimized_attention_override"}


def test_attention_by_name():
    assert get_attention_function("optimized") is get_attention_function("pytorch") is optimized_attention
    with pytest.raises(ValueError, match="allowed: optimized, pytorch"):
        get_attention_function("sage")


# Patches and embeddings


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("size", [(4, 6), (2, 2), (8, 2)])
def test_unpatchify_undoes_patchify(size, channels_last):
    x = random(3, 5, *size)
    tokens = patchify(x, 2, channels_last)
    assert tokens.shape == (3, size[0] * size[1] // 4, 20)
    assert torch.equal(unpatchify(tokens, 2, size[0] // 2, size[1] // 2, channels_last), x)


def test_patch_order():
    x = torch.arange(16.0).reshape(1, 1, 4, 4) + torch.tensor([0.0, 100.0]).reshape(1, 2, 1, 1)
    assert patchify(x, 2)[0, 1].tolist() == [2, 3, 6, 7, 102, 103, 106, 107]
    assert patchify(x, 2, channels_last=True)[0, 1].tolist() == [2, 102, 3, 103, 6, 106, 7, 107]


def test_padding_wraps_around():
    x = torch.arange(15.0).reshape(1, 1, 3, 5)
    padded = pad_to_patch_size(x, 2)
    assert padded.shape == (1, 1, 4, 6)
    assert torch.equal(padded[..., :3, :5], x)
    assert torch.equal(padded[..., 3, :5], x[..., 0, :]) and torch.equal(padded[..., :3, 5], x[..., :, 0])
    assert pad_to_patch_size(padded, 2) is padded


def test_timestep_embedding_formula():
    t = torch.tensor([0.25, 1.0])
    out = timestep_embedding(t, 8, time_factor=1000.0)
    for row, value in enumerate((250.0, 1000.0)):
        angles = [value * 10000 ** (-i / 4) for i in range(4)]
        expected = [math.cos(a) for a in angles] + [math.sin(a) for a in angles]
        assert out[row].tolist() == pytest.approx(expected, abs=1e-4)  # fp32 angles of up to 1000
    assert timestep_embedding(t.bfloat16(), 8).dtype == torch.bfloat16


def test_modulate():
    x, shift, scale = random(2, 3, 4), random(2, 1, 4, seed=1), random(2, 1, 4, seed=2)
    torch.testing.assert_close(modulate(x, shift, scale), x * (1 + scale) + shift)
    assert torch.equal(modulate(x, torch.zeros(2, 1, 4), torch.zeros(2, 1, 4)), x)


def test_only_fp16_is_cut_to_its_range():
    x = torch.tensor([1.0, float("inf"), -float("inf"), float("nan")])
    assert finite_in_half(x.half()).tolist() == [1.0, 65504.0, -65504.0, 0.0]
    assert finite_in_half(x) is x


# Casting layers

LAYERS = {
    "Linear": (lambda: ops.Linear(8, 4), (2, 8)),
    "Conv2d": (lambda: ops.Conv2d(8, 4, 3, padding=1), (1, 8, 5, 5)),
    "GroupNorm": (lambda: ops.GroupNorm(2, 8), (2, 8, 3, 3)),
    "LayerNorm": (lambda: ops.LayerNorm(8), (2, 8)),
    "RMSNorm": (lambda: ops.RMSNorm(8, eps=1e-6), (2, 8)),
}


def filled(make):
    layer = make()
    for i, parameter in enumerate(layer.parameters()):
        parameter.data.copy_(random(*parameter.shape, seed=i))
    return layer


@pytest.mark.parametrize("name", LAYERS)
def test_layers_cast_their_weights_to_the_input(name):
    make, shape = LAYERS[name]
    layer, x = filled(make), random(*shape, seed=9)
    expected = getattr(torch.nn, name).forward(layer, x)
    torch.testing.assert_close(layer(x), expected)
    narrow = filled(make).bfloat16()
    rounded = filled(make).bfloat16().float()
    assert torch.equal(narrow(x), rounded(x)), "bf16 weights, fp32 input: the weights are cast up"
    assert narrow.weight.dtype == torch.bfloat16


def test_fp8_weights_compute_in_the_inputs_dtype():
    layer = filled(LAYERS["Linear"][0])
    layer.weight.data = layer.weight.data.to(torch.float8_e4m3fn)
    x = random(2, 8)
    torch.testing.assert_close(layer(x), x @ layer.weight.float().T + layer.bias)


@pytest.mark.parametrize("name", LAYERS)
def test_weight_functions_run_in_order_on_a_copy(name):
    make, shape = LAYERS[name]
    layer, x = filled(make), random(*shape, seed=9)
    plain, stored = layer(x), layer.weight.clone()
    layer.weight_function = [lambda weight: weight.mul_(2), lambda weight: weight + 1]
    changed = filled(make)
    changed.weight.data.mul_(2).add_(1)
    assert torch.equal(layer(x), changed(x))
    assert torch.equal(layer.weight, stored), "a function that writes in place meets a copy"
    layer.weight_function = []
    assert torch.equal(layer(x), plain)


def test_layers_carry_what_a_patcher_looks_for():
    first, second = ops.Linear(2, 2), ops.Linear(2, 2)
    assert first.comfy_cast_weights and first.weight_function == first.bias_function == []
    assert first.weight_function is not second.weight_function
    assert not first.weight.requires_grad
