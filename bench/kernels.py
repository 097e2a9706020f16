"""The Triton kernels compiled ahead of time, and what the kernels reach: `python bench/kernels.py --aot`, `--cpu`, `--cuda`.

--aot needs no device and writes bench/results/kernels_aot.csv. Every kernel module names its forms in `aot_forms()`. A row is one form for
one architecture: registers a thread, bytes of shared memory a program, and bytes spilled to local memory, which must be none; the exit
status says so.

--cpu and --cuda write bench/results/kernels_cpu.csv and kernels_cuda.csv: each kernel's time, bytes and operations a second, and their
share of what a plain copy and a plain product of the same kind reach in the same run.
"""

from __future__ import annotations

import argparse
import importlib
import math
import re
import subprocess
import tempfile
import time
from pathlib import Path

from table import write_table

MODULES = ("block_sparse_triton", "norm_rope_write", "token_gather", "int8_gemm", "quantise_tokens", "tlq_decode")
ARCHITECTURES = (80, 89, 90, 100)
AOT_HEADER = ["kernel", "sm", "registers", "shared_bytes", "spill_bytes"]
TIME_HEADER = ["kernel", "shape", "ms", "gb_s", "of_copy", "gflop_s", "of_product", "weight_bytes", "clock"]


def _report(ptx: str, sm: int) -> tuple[int, int]:
    """(registers a thread, bytes spilled) as the assembler of the toolkit that Triton carries reports them."""
    from triton import knobs

    tool = knobs.nvidia.ptxas_blackwell if sm >= 100 and hasattr(knobs.nvidia, "ptxas_blackwell") else knobs.nvidia.ptxas
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        target = re.search(r"\.target\s+(sm_\w+)", ptx).group(1)
        command = [tool.path, "-v", f"-arch={target}", str(source), "-o", str(Path(folder) / "kernel.cubin")]
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stderr
    registers = int(re.search(r"Used (\d+) registers", said).group(1))
    return registers, sum(int(size) for size in re.findall(r"(\d+) bytes spill", said))


def compiled(form, sm: int) -> list:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = form.kernel.arg_names
    signature = {argument: form.types.get(argument, "constexpr") for argument in names}
    # As at a launch: allocations and strides are aligned. Without this, rows are read channel by channel.
    aligned = [i for i, argument in enumerate(names) if argument.endswith("_ptr") or argument in form.aligned]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = ASTSource(form.kernel, signature, dict(form.constants), attributes)
    made = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=dict(form.options))
    registers, spilled = _report(made.asm["ptx"], sm)
    return [form.name, f"sm_{sm}", registers, made.metadata.shared, spilled]


def ahead_of_time() -> int:
    rows = []
    for module in MODULES:
        forms = importlib.import_module(f"rectiflow.kernels.{module}").aot_forms
        rows += [compiled(form, sm) for sm in ARCHITECTURES for form in forms(sm // 10)]
    write_table("kernels_aot", AOT_HEADER, rows)
    return int(any(row[-1] for row in rows))


# Times ----------------------------------------------------------------------------------------------------------------------


def seconds(cases: list, device: str, rounds: int) -> list[float]:
    """The least time of each case over rounds that take all in turn. CPU: process time, which other processes disturb least."""
    import torch

    best = [math.inf] * len(cases)
    for case in cases:
        case.run()  # compiles, and takes the memory
    for _ in range(rounds):
        for i, case in enumerate(cases):
            if device == "cuda":
                before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                before.record()
                case.run()
                after.record()
                after.synchronize()
                best[i] = min(best[i], before.elapsed_time(after) / 1e3)
            else:
                start = time.process_time()
                case.run()
                best[i] = min(best[i], time.process_time() - start)
    return best


def timed(device: str, rounds: int) -> int:
    """Milliseconds, bandwidth and FLOP/s of every kernel, and their share of what a copy and a product reach in the same run."""
    import torch
    from kernel_cases import ceilings, kernels

    if device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device here: nothing was measured")
        return 2
    torch.manual_seed(0)
    roofs = ceilings(device)
    cases = [*roofs, *kernels(device)]
    times = seconds(cases, device, rounds)
    copy = roofs[0].nbytes / times[0]
    products = {case.kind: case.flops / spent for case, spent in zip(roofs, times) if case.flops}
    rows = []
    for case, spent in zip(cases, times):
        product = f"{case.flops / spent / products[case.kind]:.2f}" if case.flops else ""
        speed = f"{case.flops / spent / 1e9:.0f}" if case.flops else ""
        moved = [f"{case.nbytes / spent / 1e9:.1f}", f"{case.nbytes / spent / copy:.2f}"]
        rows.append([case.name, case.shape, f"{spent * 1e3:.3f}", *moved, speed, product, case.weight_bytes or ""])
    clock = {"cpu": "process time", "cuda": "CUDA events"}[device]
    write_table(f"kernels_{device}", TIME_HEADER, [[*row, f"{clock}, least of {rounds}"] for row in rows])
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--aot", action="store_true", help="compile for sm_80, sm_89, sm_90 and sm_100; no device is needed")
    what.add_argument("--cpu", action="store_true", help="time the torch paths on this processor")
    what.add_argument("--cuda", action="store_true", help="time the Triton kernels on this machine's CUDA device")
    parser.add_argument("--rounds", type=int, default=20)
    given = parser.parse_args()
    return ahead_of_time() if given.aot else timed("cuda" if given.cuda else "cpu", given.rounds)


if __name__ == "__main__":
    raise SystemExit(main())
