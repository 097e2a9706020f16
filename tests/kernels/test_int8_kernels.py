"""The product of 8-bit integers and the quantiser of tokens on the torch path: closed forms, batches, bad inputs, compiled graphs."""

from __future__ import annotations

import pytest
import torch
from rectiflow.accel.quant.rotation import block_hadamard, convrot
from rectiflow.accel.quant.uniform import int8_rows, int_tokens
from rectiflow.kernels import int8_gemm, quantise_tokens
from rectiflow.kernels import int8_linear as int8_linear_module
from rectiflow.kernels import tlq_decode as tlq
from rectiflow.kernels.int8_gemm import int8_gemm_scaled
from rectiflow.kernels.int8_linear import Int8Weight, int8_linear, prepare_int8
from rectiflow.kernels.quantise_tokens import ACTIVATIONS, Modulation, Turn
from rectiflow.kernels.tlq_decode import tlq_decode
from rectiflow.tests.kernels.inputs import coded, gemm_inputs, square_factor, tokens, turns

quantise = quantise_tokens.quantise_tokens


@pytest.mark.parametrize("shape", [(1, 16, 8), (131, 70, 33), (300, 48, 19)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 8e-3)])  # one rounding of each
def test_product_against_float64(shape, dtype, tolerance):
    *inputs, bias = gemm_inputs(*shape)
    for added in (None, bias):
        found, expected = int8_gemm_scaled(*inputs, added, dtype), int8_gemm.reference(*inputs, added, dtype)
        torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


def test_sums_of_the_largest_codes_are_exact():
    """127²·k of one sign: beyond what bf16 or fp16 could add."""
    x, weight = torch.full((2, 4096), 127, dtype=torch.int8), torch.full((3, 4096), -127, dtype=torch.int8)
    found = int8_gemm_scaled(x, torch.ones(2, 1), weight, torch.ones(3))
    assert torch.equal(found, torch.full((2, 3), -(127.0**2) * 4096))


def test_processors_without_byte_products_get_the_same_numbers(monkeypatch):
    """Sums below 2^24 are the same bits, larger ones to a float32's rounding; the prepared form takes no path whose sums end at 32767."""
    for columns, tolerance in ((1040, 0.0), (4096, 1e-6)):
        x, weight = torch.full((131, columns), 127, dtype=torch.int8), torch.full((3, columns), -127, dtype=torch.int8)
        x[1::2] = torch.randint(-127, 128, (65, columns), generator=torch.Generator().manual_seed(0)).to(torch.int8)
        found = []
        for there in (False, True):
            monkeypatch.setattr(int8_gemm, "CPU_MULTIPLIES_BYTES", there)
            monkeypatch.setattr(int8_linear_module, "CPU_MULTIPLIES_BYTES", there)
            found.append(int8_gemm_scaled(x, torch.ones(131, 1), weight, torch.ones(3)))
            assert there or prepare_int8(weight, torch.ones(3)).packed is None
        torch.testing.assert_close(found[0], found[1], atol=0, rtol=tolerance)


@pytest.mark.parametrize("case", range(4))
@pytest.mark.parametrize("bits", [8, 4])
def test_codes_against_float64(case, bits):
    width, turn = turns()[case]
    x = tokens(131, width)
    codes, scale = quantise(x, bits, turn)
    expected_codes, expected_scale = quantise_tokens.reference(x, bits, turn)
    torch.testing.assert_close(scale, expected_scale, atol=0, rtol=1e-5)  # fp32 sums in another order
    apart = (codes.int() - expected_codes.int()).abs()
    assert apart.max() <= 1 and apart.float().mean() < 1e-3  # values at the border of two codes
    assert codes.abs().max() == (1 << (bits - 1)) - 1 and not codes[1].any()


def test_without_any_step_it_is_the_quantiser_of_activations():
    x = tokens(9, 70)
    for mine, theirs in zip(quantise(x), int_tokens(x, 8)):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_are_torchs(activation):
    x = 3 * tokens(131, 70)
    act = {"gelu": torch.nn.GELU(), "gelu_tanh": torch.nn.GELU("tanh"), "silu": torch.nn.SiLU(), "none": torch.nn.Identity()}[activation]
    assert torch.equal(quantise(x, activation=activation)[0], quantise(act(x))[0])


def test_modulation_is_an_adaptive_norm_and_batches_equal_singles():
    x, shift, gain = tokens(262, 512) + 3, tokens(2, 512, 1), 0.3 * tokens(2, 512, 2)
    turn = Turn(matrix=square_factor(), squared=True)
    normal = torch.nn.functional.layer_norm(x.view(2, 131, 512), (512,), eps=1e-6)
    plain = quantise((normal * (1 + gain[:, None]) + shift[:, None]).view(262, 512), 8, turn)
    joined = quantise(x, 8, turn, modulation=Modulation(shift, gain))
    assert (joined[0].int() - plain[0].int()).abs().max() <= 1
    torch.testing.assert_close(joined[1], plain[1], atol=0, rtol=1e-5)
    for i, rows in enumerate(x.view(2, 131, 512)):
        single = quantise(rows, 8, turn, modulation=Modulation(shift[i, None], gain[i, None]))
        assert torch.equal(single[0], joined[0].view(2, 131, 512)[i])


@pytest.mark.parametrize("given", [
    (4, 1100, 0, True), (4, 1100, 0, False), (4, 1056, 33, False), (4, 21, 7, False), (3, 88, 11, True), (3, 88, 11, False),
    (2, 21, 0, False), (6, 50, 0, True), (8, 33, 0, False),
])  # fmt: skip
def test_decoded_weights_against_codes_one_by_one(given):
    bits, columns, groups, row_books = given
    packed, book, scale, group_scale = coded(300, columns, bits, groups, row_books)
    expected = tlq.reference(packed, book, bits, columns, scale, group_scale)
    numbers, _ = tlq_decode(packed, book, bits, columns, scale, group_scale, torch.float32)
    torch.testing.assert_close(numbers.double(), expected, atol=0, rtol=1e-6)
    codes, row = tlq_decode(packed, book, bits, columns, scale, group_scale)
    half = row.double() / 2 if groups else torch.zeros_like(row)  # groups are rounded to 8 bits of the row
    assert (((codes.double() * row) - expected).abs() <= half + 1e-6 * expected.abs().amax(1, keepdim=True)).all()
    half_way = tlq_decode(packed[100:130], book[100:130] if row_books else book, bits, columns, scale[100:130],
                          None if group_scale is None else group_scale[100:130])  # fmt: skip
    assert torch.equal(half_way[0], codes[100:130])


@pytest.mark.parametrize("rotation", [convrot(512), block_hadamard(384, seed=3)])
def test_a_rotated_layer_is_the_plain_one_up_to_its_codes(rotation):
    """The rotation cancels between tokens and weights: what is left is the rounding of 8 bits, here 45 dB and more below."""
    width = 512 if rotation.kind == "convrot" else 384
    x, weight = tokens(33, width), tokens(40, width, 5)
    matrix = rotation.blocks[0][1]
    turn = Turn(None, rotation.signs, matrix) if rotation.kind == "hadamard_block" else Turn(matrix=square_factor(), squared=True)
    torch.testing.assert_close(turn.apply(x), rotation.apply(x), atol=2e-5, rtol=1e-5)
    exact = x @ weight.t()
    found = int8_linear(x, Int8Weight(*int8_rows(rotation.apply(weight))), turn=turn)
    assert 10 * torch.log10(exact.square().sum() / (found - exact).square().sum()) > 34
    prepared = int8_linear(x, prepare_int8(*int8_rows(rotation.apply(weight))), turn=turn)
    torch.testing.assert_close(prepared, found, atol=1e-3, rtol=1e-5)


def test_operators_are_whole_in_a_compiled_graph():
    """Each is one opaque node with known shapes: TorchCompileModel does not break its graph there."""
    *inputs, bias = gemm_inputs(5, 48, 19)
    torch.library.opcheck(torch.ops.rectiflow.int8_gemm_scaled.default, (*inputs, bias, torch.bfloat16))
    x, (width, turn) = tokens(5, 96), turns()[2]
    given = (x, 8, turn.smooth, turn.signs, turn.matrix, False, "none", None, None, 0.0)
    torch.library.opcheck(torch.ops.rectiflow.quantise_tokens.default, given)
    for groups, checks in ((0, "ALL"), (11, "test_faketensor")):  # opcheck itself has no sums of 8-bit floats
        packed, book, scale, group_scale = coded(5, 88, 3, groups, False)
        given = (packed, book, 3, 88, scale, group_scale, torch.int8)
        torch.library.opcheck(torch.ops.rectiflow.tlq_decode.default, given, test_utils=checks)
    taken = ([tokens(5, 6).view(1, 5, 6)] * 2, torch.tensor([[3, 1]]))
    torch.library.opcheck(torch.ops.rectiflow.gather_tokens.default, (*taken, 1))
    written = [torch.zeros(1, 5, 6), torch.ones(1, 5, 6)], torch.tensor([[3, 1]]), [torch.ones(1, 2, 6), torch.zeros(1, 2, 6)], 1
    torch.library.opcheck(torch.ops.rectiflow.write_tokens.default, written)
    graph = torch.compile(lambda a: int8_gemm_scaled(*quantise(a, 8, turn), torch.ones(7, width, dtype=torch.int8), torch.ones(7)),
                          fullgraph=True, backend="eager")  # fmt: skip
    torch.testing.assert_close(graph(x), int8_gemm_scaled(*quantise(x, 8, turn), torch.ones(7, width, dtype=torch.int8), torch.ones(7)))


@pytest.mark.parametrize("wrong", [
    lambda: int8_gemm_scaled(torch.zeros(2, 4), torch.ones(2), torch.zeros(3, 4), torch.ones(3)),
    lambda: int8_gemm_scaled(*gemm_inputs(2, 5, 3)[:2], *gemm_inputs(2, 4, 3)[2:4]),
    lambda: int8_gemm_scaled(*gemm_inputs(2, 5, 3)[:4], backend="fast"),
    lambda: quantise(tokens(4, 100), turn=turns()[2][1]),
    lambda: quantise(tokens(4, 96), 9),
    lambda: quantise(tokens(4, 96), activation="relu"),
    lambda: quantise(tokens(4, 96), modulation=Modulation(torch.zeros(3, 96), torch.zeros(3, 96))),
    lambda: quantise(tokens(4, 96), backend="fast"),
    lambda: tlq_decode(*coded(3, 21, 4, 0, False)[:2], 4, 29, torch.ones(3, 1)),
    lambda: tlq_decode(*coded(3, 21, 4, 0, False)[:2], 4, 21, torch.ones(3, 1), torch.ones(3, 4)),
    lambda: tlq_decode(*coded(3, 21, 4, 0, False)[:2], 4, 21, torch.ones(3, 1), backend="fast"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(wrong):
    with pytest.raises(ValueError):
        wrong()
