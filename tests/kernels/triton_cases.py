"""Every Triton kernel against its reference, on odd shapes: test_triton.py runs them in the interpreter, and on a device if there is one.

A case takes the device. `python -m rectiflow.tests.kernels.triton_cases` runs all on the CPU and prints what became of each as JSON.
"""

from __future__ import annotations

import json
import traceback

import torch
from rectiflow.kernels.block_sparse_attention import block_sparse_attention
from rectiflow.kernels.block_sparse_attention import reference as block_sparse_reference
from rectiflow.kernels.block_sparse_attention import torch_path as block_sparse_torch
from rectiflow.kernels.int8_gemm import int8_gemm_scaled
from rectiflow.kernels.int8_gemm import reference as gemm_reference
from rectiflow.kernels.norm_rope_write import norm_rope_write
from rectiflow.kernels.norm_rope_write import reference as norm_rope_reference
from rectiflow.kernels.quantise_tokens import NOTHING, Modulation, Turn, quantise_tokens
from rectiflow.kernels.quantise_tokens import reference as quantise_reference
from rectiflow.kernels.tlq_decode import reference as decode_reference
from rectiflow.kernels.tlq_decode import tlq_decode
from rectiflow.kernels.tlq_decode import torch_path as decode_torch
from rectiflow.kernels.token_gather import gather_tokens, scatter_tokens, write_tokens
from rectiflow.kernels.token_gather import reference as gather_reference
from rectiflow.tests.kernels.inputs import attention_inputs, coded, gemm_inputs, square_factor, tokens, turns
from rectiflow.tests.kernels.test_block_sparse import layout_of
from rectiflow.tests.kernels.test_block_sparse import tensors as block_tensors


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


def int8_gemm(device: str) -> None:
    shapes = ((5, 48, 19, torch.float32, 1e-6), (70, 130, 33, torch.float32, 1e-6), (3, 64, 17, torch.bfloat16, 8e-3))
    for m, k, n, dtype, tolerance in shapes:
        inputs = [part.to(device) for part in gemm_inputs(m, k, n)]
        for bias in (None, inputs[-1].to(dtype)):
            found = int8_gemm_scaled(*inputs[:-1], bias, dtype, backend="triton")
            close(found, gemm_reference(*inputs[:-1], bias, dtype), tolerance)  # one rounding of the dtype


def _equal_codes(found: tuple, expected: tuple, tolerance: float = 1e-5) -> None:
    """Scales to float32's rounding, and codes that differ by one only where the value lies at a border between two."""
    close(found[1], expected[1], tolerance)
    apart = (found[0].int() - expected[0].int()).abs()
    assert found[0].dtype == torch.int8 and apart.max() <= 1 and apart.float().mean() <= 5e-3


def quantise(device: str) -> None:
    for width, turn in turns(device):
        for dtype in (torch.float32, torch.bfloat16):
            x = tokens(5, width).to(device, dtype)
            for bits in (8, 4):
                # bf16 rotates on tensor cores of 10 bits behind the point where there are any
                _equal_codes(quantise_tokens(x, bits, turn, backend="triton"), quantise_reference(x, bits, turn), 1e-3)


def quantise_after_activation(device: str) -> None:
    x = (3 * tokens(3, 530)).to(device)
    x[0, :4] = torch.tensor([-40.0, 40.0, 0.0, -1e-3])
    for activation in ("gelu", "gelu_tanh", "silu"):
        _equal_codes(quantise_tokens(x, 8, activation=activation, backend="triton"), quantise_reference(x, 8, activation=activation))


def quantise_after_modulation(device: str) -> None:
    turn = Turn(matrix=square_factor().to(device), squared=True)
    for width, samples, how in ((512, 2, turn), (530, 1, NOTHING)):
        x = (tokens(6, width) + 3).to(device)
        modulation = Modulation(*(0.3 * tokens(samples, width, seed).to(device) for seed in (1, 2)))
        found = quantise_tokens(x, 8, how, modulation=modulation, backend="triton")
        _equal_codes(found, quantise_reference(x, 8, how, modulation=modulation), 1e-4)


def decode_twin_log(device: str) -> None:
    for given in ((1100, 4, 0, True), (1056, 4, 33, False), (88, 3, 11, False), (21, 2, 0, False), (50, 6, 0, True)):
        columns, bits = given[:2]
        packed, book, scale, group_scale = (part if part is None else part.to(device) for part in coded(5, *given))
        codes, top = tlq_decode(packed, book, bits, columns, scale, group_scale, backend="triton")
        expected = decode_torch(packed, book, bits, columns, scale, group_scale)
        assert torch.equal(codes, expected[0]) and torch.equal(top, expected[1])
        for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 8e-3)):
            numbers, _ = tlq_decode(packed, book, bits, columns, scale, group_scale, dtype, backend="triton")
            close(numbers, decode_reference(packed, book, bits, columns, scale, group_scale).to(dtype), tolerance)


def move_tokens(device: str) -> None:
    """Several tensors in one launch, with axes between batch and tokens, an index a sample or one for all, and 8-bit floats."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(device)  # noqa: E731
    for index in (torch.tensor([[5, 0, 3], [1, 6, 2]], device=device), torch.tensor([[4, 1, 6]], device=device)):
        xs = [draw(2, 7, 5), draw(2, 7, 3, 2), draw(2, 7, 300).bfloat16(), draw(2, 7, 4), draw(2, 7, 1), draw(2, 7, 2)]
        for found, x in zip(gather_tokens(xs, index, backend="triton"), xs):
            assert torch.equal(found, gather_reference(x, index, 1))
        heads = draw(2, 3, 7, 4), draw(2, 3, 7, 4)
        taken = gather_tokens(heads, index, 2, backend="triton")
        assert all(torch.equal(found, gather_reference(x, index, 2)) for found, x in zip(taken, heads))
        for dtype in (torch.float32, torch.float8_e4m3fn):
            caches = [draw(2, 3, 7, 4).to(dtype) for _ in heads]
            expected = [part.clone() for part in caches]
            write_tokens(expected, index, [part.to(dtype) for part in taken], 2, backend="torch")
            write_tokens(caches, index, [part.to(dtype) for part in taken], 2, backend="triton")
            assert all(torch.equal(one.float(), two.float()) for one, two in zip(caches, expected))
        scattered = scatter_tokens(taken[0], index, 9, 2, backend="triton")
        assert torch.equal(scattered, scatter_tokens(taken[0], index, 9, 2, backend="torch"))


def norm_rope_write_cache(device: str) -> None:
    for dtype, tolerance in ((torch.float32, 2e-6), (torch.bfloat16, 2e-2)):  # bf16: one rounding where the reference has two
        for given in attention_inputs(device, dtype):
            caches = [part.clone() for part in given[-1]], [part.clone() for part in given[-1]]
            found = norm_rope_write(*given[0], *caches[0], given[1], *given[2:-1], backend="triton")
            expected = norm_rope_reference(*given[0], *caches[1], given[1], *given[2:-1])
            close(found, expected, tolerance)
            for one, two in zip(*caches):
                close(one, two, tolerance)


def block_sparse(device: str) -> None:
    """Blocks that no tile divides, text before and behind, a mask of keys that is added and one of bools, sums of exponentials."""
    bias = torch.zeros(2, 1, 71)
    bias[1, 0, 1:3] = -1e4
    cases = [((9, 7), (4, 3), "block", 16, None), ((9, 7), (4, 3), "cross", 32, bias), ((9, 7), (4, 3), "block", 16, bias == 0)]
    for sides, group, pattern, width, mask in [*cases, ((3, 70), (3, 66), "block", 16, None)]:
        layout = layout_of(sides, group, pattern, radius=0)
        q, k, v = (part.to(device) for part in block_tensors(layout.tokens, 2, 1, width))
        mask = None if mask is None else mask.to(device)
        out, lse = block_sparse_attention(q, k, v, layout, mask, with_lse=True, backend="triton")
        close(out, block_sparse_reference(q, k, v, layout, mask), 1e-5)
        close(lse, block_sparse_torch(q, k, v, layout, mask, with_lse=True)[1], 1e-5)


ALL = (
    block_sparse, norm_rope_write_cache, move_tokens, int8_gemm, quantise, quantise_after_activation, quantise_after_modulation,
    decode_twin_log,
)  # fmt: skip
CASES = {case.__name__: case for case in ALL}


def main() -> None:
    said = {}
    for name, case in CASES.items():
        try:
            case("cpu")
            said[name] = ""
        except Exception:
            said[name] = traceback.format_exc()
    print(json.dumps(said))


if __name__ == "__main__":
    main()
