"""Compile the Triton kernels ahead of time, without a device: `python bench/kernels.py --aot`. Writes bench/results/kernels_aot.csv.

Every kernel module names its forms in `aot_forms()`. A row is one form for one architecture: registers a thread, bytes of shared memory a
program, and bytes spilled to local memory, which must be none; the exit status says so.
"""

from __future__ import annotations

import argparse
import importlib
import re
import subprocess
import tempfile
from pathlib import Path

from table import write_table

MODULES = ("block_sparse_triton",)
ARCHITECTURES = (80, 89, 90, 100)
HEADER = ["kernel", "sm", "registers", "shared_bytes", "spill_bytes"]


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


def compiled(name: str, kernel, types: dict, constants: dict, options: dict, sm: int) -> list:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {argument: types.get(argument, "constexpr") for argument in kernel.arg_names}
    # As at a launch: allocations are aligned, and strides are multiples of a head's width. Without this, rows are read channel by channel.
    aligned = [i for i, argument in enumerate(kernel.arg_names) if argument.endswith("_ptr") or argument.startswith("stride_")]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    made = triton.compile(ASTSource(kernel, signature, constants, attributes), target=GPUTarget("cuda", sm, 32), options=options)
    registers, spilled = _report(made.asm["ptx"], sm)
    return [name, f"sm_{sm}", registers, made.metadata.shared, spilled]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--aot", action="store_true", required=True, help="compile for sm_80, sm_89, sm_90 and sm_100")
    parser.parse_args()
    rows = []
    for module in MODULES:
        for form in importlib.import_module(f"rectiflow.kernels.{module}").aot_forms():
            rows += [compiled(*form, sm) for sm in ARCHITECTURES]
    write_table("kernels_aot", HEADER, rows)
    return int(any(row[-1] for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
