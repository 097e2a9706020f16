"""Measure the embedded host: `python bench/host.py [SECTION…] [--quick]`. Prints a table per section, writes bench/results/host_*.csv.

    graph    what the graph engine itself costs per node, on 200 nodes that do nothing: one chain, and 40 groups of five. With
             COMFYUI_PATH naming a checkout (and COMFYUI_PYTHON its Python) ComfyUI runs the same, round by round in turn with ours.
    steps    seconds a step of the tiny model at 64×64 and 256×256, Euler with CFG 3, in turn with ComfyUI's own Flux class as above.
    run      seconds of a warm `./rectiflow run workflows/api/text_to_image.json` and what they are spent on.
    memory   resident memory of running text_to_image, above a bare `import torch`.

A section is a function that takes `Options` and returns a `Table`; a new one is added to SECTIONS.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from table import machine, write_table

HERE = Path(__file__).resolve().parent
TEXT_TO_IMAGE = HERE.parent / "workflows" / "api" / "text_to_image.json"
GRAPH_NODES = 200
GRAPH_SHAPES = ("chain", "groups")
GRAPH_GOAL_MS = 0.2
STEPS = {64: 20, 256: 3}  # side of the picture in pixels → steps a round
MEMORY_GOAL_MIB = 700


@dataclass(frozen=True)
class Options:
    quick: bool = False


@dataclass(frozen=True)
class Table:
    header: Sequence[str]
    rows: Sequence[Sequence]
    notes: Sequence[str] = ()


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    low, middle, high = statistics.quantiles(values, n=4)
    return low, middle, high


class Child:
    """A process that answers each round with a line of JSON."""

    def __init__(self, python: str, script: str, host: str, *arguments: str):
        command = [python, str(HERE / script), host, *arguments]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.host = host
        self.versions = self._answer()

    def round(self, order: str = "go") -> dict[str, float]:
        self._process.stdin.write(f"{order}\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> dict:
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.host} stopped:\n{self._process.stderr.read()}")
        return json.loads(line)


def both_hosts(script: str, *arguments: str) -> list[Child]:
    """The embedded host's process, and ComfyUI's where COMFYUI_PATH names one."""
    children = [Child(sys.executable, script, "embedded", *arguments)]
    if os.environ.get("COMFYUI_PATH"):
        children.append(Child(os.environ.get("COMFYUI_PYTHON", sys.executable), script, "comfyui", *arguments))
    return children


def graph(options: Options) -> Table:
    """Milliseconds per node that validation and execution add to a node's own work."""
    children = both_hosts("graph_overhead.py", str(GRAPH_NODES))
    rounds = 8 if options.quick else 25
    rows, notes = [], []
    for shape in GRAPH_SHAPES:
        samples: dict[str, list[dict[str, float]]] = {child.host: [] for child in children}
        for number in range(rounds + 2):
            for child in children:
                answer = child.round(shape)
                if number >= 2:  # the first rounds warm the interpreter's caches up
                    samples[child.host].append(answer)
        rows += [row for child in children for row in _graph_rows(shape, child, samples[child.host])]
        medians = {host: statistics.median(1000 * answer["run"] / GRAPH_NODES for answer in taken) for host, taken in samples.items()}
        ours = medians["embedded"]
        notes.append(f"{shape}: {ours:.4f} ms, goal of {GRAPH_GOAL_MS} ms {'met' if ours <= GRAPH_GOAL_MS else 'missed'}")
        if "comfyui" in medians:
            notes[-1] += f"; ComfyUI {medians['comfyui']:.4f} ms, {medians['comfyui'] / ours:.1f} times ours"
    for child in children:
        child.close()
    return Table("shape measure host version ms_per_node quartile_1 quartile_3 nodes rounds python torch machine".split(), rows, notes)


def _graph_rows(shape: str, child: Child, taken: list[dict[str, float]]) -> list[list]:
    about, rows = child.versions, []
    for measure in ("validate", "run", "run_cached"):
        low, middle, high = spread([1000 * answer[measure] / GRAPH_NODES for answer in taken])
        shown = [f"{value:.4f}" for value in (middle, low, high)]
        place = [GRAPH_NODES, len(taken), about["python"], about["torch"], machine()]
        rows.append([shape, measure, child.host, about["version"], *shown, *place])
    return rows


def steps(options: Options) -> Table:
    """Seconds a step of the tiny model, both hosts in turn so that the machine's moods fall on both alike."""
    children = both_hosts("tiny_steps.py")
    rounds = 3 if options.quick else 9
    rows, notes = [], []
    for side, count in STEPS.items():
        samples: dict[str, list[float]] = {child.host: [] for child in children}
        for number in range(rounds + 1):
            for child in children:
                seconds = child.round(f"{side} {count}")["seconds"]
                if number:  # the first round loads weights and chooses kernels
                    samples[child.host].append(seconds)
        for child in children:
            low, middle, high = spread(samples[child.host])
            about = child.versions
            shown = [f"{value:.4f}" for value in (middle, low, high)]
            rows.append([f"{side}x{side}", child.host, about["version"], *shown, count, rounds, about["python"], about["torch"], machine()])
        if len(children) == 2:
            ratio = statistics.median(samples["comfyui"]) / statistics.median(samples["embedded"])
            notes.append(f"{side}×{side}: ComfyUI takes {ratio:.2f} times our time a step (goal: 1 or more)")
    for child in children:
        child.close()
    return Table("size host version seconds_per_step quartile_1 quartile_3 steps rounds python torch machine".split(), rows, notes)


def run(options: Options) -> Table:
    """Wall clock of the README's first command once .venv stands, split by what the command itself reports."""
    command = [str(HERE.parent / "rectiflow"), "run", str(TEXT_TO_IMAGE), "--json", "--out"]
    rounds = 3 if options.quick else 9
    sampler = next(key for key, node in json.loads(TEXT_TO_IMAGE.read_text()).items() if node["class_type"] == "KSampler")
    taken: dict[str, list[float]] = {part: [] for part in ("whole command", "start and imports", "graph engine", "sampling", "other nodes")}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(rounds + 1):
            started = time.perf_counter()
            answer = subprocess.run([*command, folder], check=True, capture_output=True, text=True)
            whole = time.perf_counter() - started
            if not number:  # the first round reads files from the disk
                continue
            report = json.loads(answer.stdout)
            inside, sampling = report["seconds"], report["node_seconds"][sampler]
            nodes = sum(report["node_seconds"].values())
            parts = (whole, whole - inside, inside - nodes, sampling, nodes - sampling)
            for part, seconds in zip(taken, parts, strict=True):
                taken[part].append(seconds)
    middle = statistics.median(taken["whole command"])
    rows = []
    for part, seconds in taken.items():
        low, median, high = spread(seconds)
        rows.append([part, f"{median:.4f}", f"{low:.4f}", f"{high:.4f}", f"{100 * median / middle:.1f}", rounds, machine()])
    return Table("part seconds quartile_1 quartile_3 percent rounds machine".split(), rows)


def memory(options: Options) -> Table:
    """MiB above a bare torch import, after each run and at the highest point so far, in a process of its own."""
    child = Child(sys.executable, "resident_memory.py", "embedded")
    about = child.versions
    rows, peaks = [], []
    for run in range(1, (2 if options.quick else 6) + 1):
        answer = child.round()
        peaks.append(answer["peak"])
        shown = [f"{value:.0f}" for value in (answer["now"], answer["peak"], about["bare_torch"])]
        rows.append([run, *shown, about["version"], about["python"], about["torch"], machine()])
    child.close()
    verdict = "met" if max(peaks) <= MEMORY_GOAL_MIB else "missed"
    notes = [f"goal of {MEMORY_GOAL_MIB} MiB above the import {verdict} with {max(peaks):.0f} MiB at the peak"]
    return Table("run mib_now mib_peak bare_torch_mib version python torch machine".split(), rows, notes)


SECTIONS: dict[str, Callable[[Options], Table]] = {"graph": graph, "steps": steps, "run": run, "memory": memory}


def show(name: str, table: Table) -> None:
    write_table(f"host_{name}", table.header, table.rows)
    for note in table.notes:
        print(f"  {note}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"{', '.join(SECTIONS)}; all by default")
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    arguments = parser.parse_args()
    unknown = set(arguments.sections) - set(SECTIONS)
    if unknown:
        parser.error(f"no section {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    for name in arguments.sections or SECTIONS:
        show(name, SECTIONS[name](Options(quick=arguments.quick)))


if __name__ == "__main__":
    main()
