"""Trained blocks that stand for runs of blocks (PPCL, arXiv 2511.16156): how they begin, how they are kept, and how they are switched.

A student of the run [u, v] begins as a copy of one of its blocks, ⌊(u + v)/2⌋ by default, stands at u, and takes what u took. On a MODEL
its layers hang below `student`, so that a LoRA that was made for the block at u finds nothing there to change.

File: safetensors, "<holder>.<u>.<parameter>" for every student; metadata "rectiflow_runs" holds the model's hash and how they began.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import input_error
from .apply import ATTACHMENT, SkipBlock, apply_plan, bytes_of, plan_of, stack_under
from .gates import StandIn
from .identity import NETWORK, model_hash, original_module, original_parameters
from .plan import PrunePlan, Run

__all__ = [
    "INITS", "SCHEDULED", "STUDENTS_FILE", "StudentBlock", "active_plan", "apply_runs", "copy_of", "in_fp32", "new_student",
    "read_students", "student_file", "weights_of", "with_students",
]  # fmt: skip

INITS = ("middle", "first", "last", "average", "fitted")  # fitted: the middle one, see fitted_students.py
STUDENTS_FILE = "students.safetensors"  # in the folder of the run that trained them
METADATA = "rectiflow_runs"
SCHEDULED = "rectiflow_scheduled_runs"
APPLY = "apply_model"
LARGEST_FILE = 64 << 30


class StudentBlock(nn.Module):
    """A trained block in the place of the first one of its run."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.student = module

    def __deepcopy__(self, memo):
        return self

    def forward(self, *args, **kwargs):
        return self.student(*args, **kwargs)


def source_of(run: Run, init: str) -> int:
    return {"first": run.first, "last": run.last}.get(init, (run.first + run.last) // 2)


def new_student(model: Any, run: Run, init: str = "middle") -> nn.Module:
    """A block with weights of its own, as the model was loaded, without what hangs on the model now.

    init: which block of the run it copies; "average" is the structure of the middle one with the mean of all, "fitted" begins as "middle".
    """
    weights = dict(original_parameters(model))
    paths = [f"{run.holder}.{index}" for index in range(run.first, run.last + 1)] if init == "average" else []
    source = f"{run.holder}.{source_of(run, init)}"
    student = _bare_copy(original_module(model, source))
    for name, value in list(student.named_parameters()):
        others = [weights[f"{path}.{name}"] for path in paths if f"{path}.{name}" in weights] or [weights[f"{source}.{name}"]]
        mean = torch.stack([other.detach().float() for other in others]).mean(0).to(value.dtype)
        module = student.get_submodule(name.rpartition(".")[0])
        setattr(module, name.rpartition(".")[2], nn.Parameter(mean.clone(), requires_grad=False))
    return student


def _bare_copy(module: nn.Module) -> nn.Module:
    """A copy with weights of its own, that can learn, and without what hangs on the layers."""
    made = copy.deepcopy(module)
    made.__dict__.pop("forward", None)
    for inner in made.modules():
        for name in ("weight_function", "bias_function"):
            if hasattr(inner, name):
                setattr(inner, name, [])
        for name, value in list(inner.named_parameters(recurse=False)):
            setattr(inner, name, nn.Parameter(value.detach().clone(), requires_grad=False))
    return made


def in_fp32(student: nn.Module, device: torch.device) -> list[tuple[nn.Module, bool]]:
    """Move the student there, its weights as fp32 that its own layers cast to what they are given; layers and whether they cast before."""
    casting = [(module, module.comfy_cast_weights) for module in student.modules() if hasattr(module, "comfy_cast_weights")]
    for module, _ in casting:
        module.comfy_cast_weights = True
    student.float().to(device)
    return casting


def copy_of(student: StudentBlock) -> StudentBlock:
    """Another student with the same weights."""
    return StudentBlock(_bare_copy(student.student))


def weights_of(students: Mapping[str, StudentBlock]) -> dict[str, Tensor]:
    """"<holder>.<u>.<parameter>" → values on the CPU."""
    named = ((path, *entry) for path, each in students.items() for entry in each.student.named_parameters())
    return {f"{path}.{name}": value.detach().cpu() for path, name, value in named}


def with_students(model: Any, students: Mapping[str, StudentBlock]) -> Any:
    """A clone of MODEL `model`, on which students lie, with these in their places."""
    if not students:
        return model
    changed = model.clone()
    for path, student in students.items():
        changed.add_object_patch(NETWORK + path, student)
    changed.patches_uuid = uuid.uuid4()
    return changed


def student_file(plan: PrunePlan, init: str, weights: Mapping[str, Tensor]) -> bytes:
    """The file with the students of `plan`. weights: "<holder>.<u>.<parameter>" → values."""
    from safetensors.torch import save

    about = {"model": plan.model, "init": init, "runs": [dataclasses.asdict(run) for run in plan.runs]}
    # One entry: safetensors writes several in an order of chance, and equal students shall be equal files.
    return save({name: value.contiguous() for name, value in weights.items()}, {METADATA: json.dumps(about)})


def read_students(file: Path, plan: PrunePlan, model: Any, where: str) -> dict[str, StudentBlock]:
    """Path → student of every run of `plan`, from a file that holds these and perhaps others.

    Raises: NodeInputError for a file that is damaged, another model's, or without one of the runs.
    """
    from safetensors import SafetensorError, safe_open

    allowed, remedy = "the file that Distill Runs wrote with this plan", "Distill the runs again, or put the file back in its folder."

    def refuse(got: str) -> Exception:
        return input_error(where, "plan", got, allowed, remedy)

    try:
        if file.stat().st_size > LARGEST_FILE:
            raise refuse(f"{file.name} of more than {LARGEST_FILE >> 30} GiB")
        with torch.inference_mode(False), safe_open(str(file), framework="pt") as opened:
            about = json.loads((opened.metadata() or {}).get(METADATA, "null"))
            tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        raise refuse(f"{file.parent.name}/{file.name}, which cannot be read ({error})") from None
    if not isinstance(about, dict) or about.get("model") != plan.model or about.get("init") not in INITS:
        raise refuse(f"{file.parent.name}/{file.name}, students of another model")
    written = about.get("runs")
    students = {}
    for run in plan.runs:
        if run.path not in plan.students:
            continue
        if not isinstance(written, list) or dataclasses.asdict(run) not in written:
            raise refuse(f"{file.parent.name}/{file.name}, which has no student of {run.path} to {run.last}")
        with torch.inference_mode(False):
            module = new_student(model, run, about["init"])
        values = {name[len(run.path) + 1 :]: value for name, value in tensors.items() if name.startswith(f"{run.path}.")}
        expected = dict(module.named_parameters())
        if {name: value.shape for name, value in values.items()} != {name: value.shape for name, value in expected.items()}:
            raise refuse(f"{file.parent.name}/{file.name}, whose weights of {run.path} have other shapes")
        with torch.no_grad():
            for name, value in expected.items():
                value.copy_(values[name])
        students[run.path] = StudentBlock(module)
    return students


def active_plan(plan: PrunePlan, chosen: str, where: str) -> PrunePlan:
    """The plan with some of its runs: "all", "none", or numbers such as "0, 2" in the order of the plan.

    Raises: NodeInputError for what names no run.
    """
    text = chosen.strip().lower()
    numbers = range(len(plan.runs)) if text == "all" else []
    if text not in ("all", "none"):
        parts = [part.strip() for part in text.split(",")]
        if not all(part.isdecimal() and len(part) < 6 and int(part) < len(plan.runs) for part in parts):
            allowed = f"all, none, or numbers from 0 to {len(plan.runs) - 1} with commas"
            raise input_error(where, "active_runs", chosen, allowed, "Correct the list; the report numbers the runs.")
        numbers = sorted({int(part) for part in parts})
    runs = tuple(plan.runs[number] for number in numbers)
    return dataclasses.replace(plan, runs=runs, students={run.path: plan.students[run.path] for run in runs if run.path in plan.students})


def apply_runs(
    model: Any, plan: PrunePlan, students: Mapping[str, nn.Module], where: str, sigmas: tuple[float, float] | None = None
) -> Any:
    """A clone of MODEL `model` with the runs of `plan` replaced, at every sigma or from sigmas[0] down to sigmas[1] alone.

    With a range both students and original blocks are kept in memory. The plan's other parts are applied as they are.
    """
    if sigmas is None or not plan.runs:
        return apply_plan(model, plan, where, students)
    if plan_of(model) is not None or plan.kept or plan.width:
        allowed = "a whole model and a plan of runs alone, where runs have a range"
        raise input_error(where, "start_percent", "a range", allowed, "Set the range to 0 and 1, or take the other parts out of the plan.")
    stack = stack_under(model, where)
    plan.check(stack, model_hash(model), where)
    patched, switch = model.clone(), _Switch(*sigmas)
    size = patched.model_size()
    for run in plan.runs:
        for index in range(run.first, run.last + 1):
            block = stack.at(f"{run.holder}.{index}")
            student = students.get(block.path)
            if index == run.first and student is None:
                continue
            original, extra = original_module(model, block.path), {} if student is None else {"student": student}
            patched.add_object_patch(NETWORK + block.path, StandIn(original, switch.between(original, student or SkipBlock(block)), extra))
            size += 0 if student is None else bytes_of(student)
    patched.size = size
    patched.set_attachments(ATTACHMENT, plan)
    patched.set_attachments(SCHEDULED, sigmas)
    patched.add_wrapper_with_key(APPLY, SCHEDULED, switch.around_call)
    patched.patches_uuid = uuid.uuid4()
    return patched


class _Switch:
    """Which of two blocks answers, decided anew by the sigma of every model call; outside of a call the original."""

    def __init__(self, high: float, low: float):
        self.high, self.low = high, low
        self.on = False

    def __deepcopy__(self, memo):
        return self

    def around_call(self, executor, x, t, *args, **kwargs):
        self.on = self.low <= float(t.max()) <= self.high
        try:
            return executor(x, t, *args, **kwargs)
        finally:
            self.on = False

    def between(self, original: nn.Module, other: nn.Module) -> Callable:
        forward = type(original).forward

        def either(*args, **kwargs):
            return other(*args, **kwargs) if self.on else forward(original, *args, **kwargs)

        return either
