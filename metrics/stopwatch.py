"""Seconds and model calls of sampling runs, counted from inside through wrappers, the first run apart from the warm ones.

What is counted, from the whole to the part: a run (OUTER_SAMPLE: loading, all steps, unloading), an evaluation (PREDICT_NOISE: the solver
asks for one denoised latent; its number is the NFE), a call of the network (APPLY_MODEL: guidance makes one or two an evaluation), and
the rows in it, conditional and unconditional. The wrappers only watch; the result of a run is bit-identical with and without them.

On CUDA the device works behind the host's back: runs end with a synchronisation, and calls are timed by events in the stream, so
that measuring them does not make the host wait. Other accelerators are synchronised around every call.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch

__all__ = ["DeviceClock", "PeakMemory", "RunTimes", "Stopwatch"]

KEY = "rectiflow_stopwatch"


@dataclass(frozen=True)
class RunTimes:
    """One sampling run: seconds in all and inside the network, and what it asked of the network. `finished` is False after an error."""

    seconds: float
    network_seconds: float
    evaluations: int
    calls: int
    conditional_rows: int
    unconditional_rows: int
    finished: bool

    def line(self) -> str:
        share = self.network_seconds / self.seconds if self.seconds else 0.0
        return (
            f"{self.seconds:.3f} s, of it {share:.1%} in the network; {self.evaluations} evaluations, {self.calls} network calls, "
            f"rows {self.conditional_rows} conditional + {self.unconditional_rows} unconditional{'' if self.finished else '; not finished'}"
        )


class PeakMemory:
    """The most memory that tensors took on a CUDA device since this object was made. Other devices keep no such count."""

    def __init__(self, device: torch.device):
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def text(self) -> str:
        """In MiB, "-" where it is not known."""
        return f"{torch.cuda.max_memory_allocated(self.device) / 2**20:.1f}" if self.device.type == "cuda" else "-"


class DeviceClock:
    """Time spans on one device: `start` gives a mark, `stop` closes its span, `seconds` adds all of them up."""

    def __init__(self, device: torch.device):
        self.device = device
        self.spans: list[tuple[Any, Any]] = []

    def synchronise(self) -> None:
        """Wait for the device. A back end that torch cannot wait for (DirectML) is timed as the host sees it."""
        wait = getattr(getattr(torch, self.device.type, None), "synchronize", None)
        if self.device.type != "cpu" and wait is not None:
            wait()

    def start(self) -> Any:
        return self._mark()

    def stop(self, mark: Any) -> None:
        self.spans.append((mark, self._mark()))

    def _mark(self) -> Any:
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self.device))
            return event
        self.synchronise()
        return time.perf_counter()

    def seconds(self) -> float:
        """Only after `synchronise`: a CUDA event has no time before the device has reached it."""
        if self.device.type == "cuda":
            return sum(start.elapsed_time(end) for start, end in self.spans) / 1000
        return sum(end - start for start, end in self.spans)


@dataclass
class _OpenRun:
    clock: DeviceClock
    evaluations: int = 0
    calls: int = 0
    rows: list[int] = field(default_factory=lambda: [0, 0])  # conditional, unconditional


class Stopwatch:
    """Measures every sampling run of the models it watches and keeps one RunTimes a run, oldest first.

    It outlives a run on purpose: what ComfyUI's graph cache keeps of a node's outputs is what makes the second run of a graph warm,
    and the stopwatch is kept with them. Runs inside a run (a guider that samples within a step) are kept on a stack.
    """

    def __init__(self) -> None:
        self.runs: list[RunTimes] = []
        self._open: list[_OpenRun] = []

    def watch(self, model: Any) -> Any:
        """A clone of MODEL `model` that reports here. Wrappers added before it see more calls than it does: link caches before it."""
        watched = model.clone()
        for kind, wrapper in (("outer_sample", self._run), ("predict_noise", self._evaluation), ("apply_model", self._call)):
            watched.add_wrapper_with_key(kind, KEY, wrapper)
        return watched

    def _run(self, executor, *args, **kwargs):
        clock = DeviceClock(torch.device(executor.class_obj.model_patcher.load_device))
        run = _OpenRun(clock)
        self._open.append(run)
        clock.synchronise()
        start, finished = time.perf_counter(), False
        try:
            result = executor(*args, **kwargs)
            finished = True
            return result
        finally:
            self._open.remove(run)
            clock.synchronise()
            seconds = time.perf_counter() - start
            self.runs.append(RunTimes(seconds, clock.seconds(), run.evaluations, run.calls, *run.rows, finished))

    def _evaluation(self, executor, *args, **kwargs):
        if self._open:
            self._open[-1].evaluations += 1
        return executor(*args, **kwargs)

    def _call(self, executor, *args, **kwargs):
        if not self._open:
            return executor(*args, **kwargs)
        run = self._open[-1]
        run.calls += 1
        chunks = _cond_or_uncond(args, kwargs)
        each = args[0].shape[0] // max(len(chunks), 1)
        for chunk in chunks:
            run.rows[chunk] += each
        mark = run.clock.start()
        try:
            return executor(*args, **kwargs)
        finally:
            run.clock.stop(mark)

    @property
    def warm(self) -> list[RunTimes]:
        """Finished runs after the first."""
        return [run for run in self.runs[1:] if run.finished]

    def warm_seconds(self) -> float:
        """Mean seconds of the warm runs; NaN before there is one."""
        return fmean(run.seconds for run in self.warm) if self.warm else float("nan")

    def report(self) -> str:
        """The first run, the warm runs together and the last one, a line each."""
        if not self.runs:
            return "no run yet"
        lines = [f"first run: {self.runs[0].line()}"]
        if self.warm:
            seconds = [run.seconds for run in self.warm]
            lines.append(
                f"warm runs: {len(seconds)}, mean {fmean(seconds):.3f} s, fastest {min(seconds):.3f} s, slowest {max(seconds):.3f} s"
            )
        if len(self.runs) > 1:
            lines.append(f"last run: {self.runs[-1].line()}")
        else:
            lines.append("no warm run yet: run the graph again with another seed")
        return "\n".join(lines)


def _cond_or_uncond(args: tuple, kwargs: dict) -> list[int]:
    """The chunks of a network call, 0 conditional and 1 unconditional; the options are the last dictionary among the arguments."""
    options = kwargs.get("transformer_options")
    if options is None:
        options = next((value for value in reversed(args) if isinstance(value, dict)), {})
    return list(options.get("cond_or_uncond", ()))
