"""A plan on a MODEL: blocks that are left out are exchanged for modules that hand their tokens on, students for trained blocks.

Every other block keeps its number, so that LoRAs, ControlNet residuals and block patches stay with the blocks they were made for, and
the weights of what is left out never reach the device.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any

from torch import nn

from ...errors import input_error
from ...families.stack import Stack, StackBlock, stack_of
from ..modules import bytes_of, seen_bytes
from .identity import NETWORK, model_hash, original_module
from .plan import PrunePlan

__all__ = ["ATTACHMENT", "TEXT_RUNS", "SkipBlock", "apply_plan", "bytes_of", "exchange", "plan_of", "size_change", "without_plan"]

ATTACHMENT = "rectiflow_prune_plan"
TEXT_RUNS = "rectiflow_text_runs"  # path of a run's first block → path of its last, where the text of a run is linear (text_runs.py)


class SkipBlock(nn.Module):
    """A block without weights: hands on the tokens that it is given, in the order of the block it stands for."""

    def __init__(self, block: StackBlock):
        super().__init__()
        self.block = block

    def __deepcopy__(self, memo):
        return self  # it has no state

    def forward(self, *args, **kwargs):
        return self.block.pack(self.block.read(args, kwargs))


def plan_of(model: Any) -> PrunePlan | None:
    """The plan that lies on MODEL `model`."""
    return model.get_attachment(ATTACHMENT)


def size_change(before: Any, after: Any) -> str:
    """What two MODELs weigh, in words."""
    whole, left = before.model_size(), after.model_size()
    return f"{whole / 1e6:.1f} MB → {left / 1e6:.1f} MB ({left / whole:.0%})"


def stack_under(model: Any, where: str) -> Stack:
    return stack_of(model.model.diffusion_model, where)


def apply_plan(model: Any, plan: PrunePlan, where: str, students: Mapping[str, nn.Module] | None = None) -> Any:
    """A clone of MODEL `model` that is what `plan` keeps of it. Widths are not touched; see compact.py.

    Args:
        students: path of a run's first block → trained block. Runs without one keep their first block as it was.
    Raises: NodeInputError for another model's plan, a second one, and a model with text that is linear over a run of blocks.
    """
    if plan_of(model) is not None:
        remedy = "Apply one plan that has both, or link the model before it."
        raise input_error(where, "model", "a model with a plan on it", "a model without one", remedy)
    if model.get_attachment(TEXT_RUNS):
        remedy = "Link Text to Linear behind this node."
        raise input_error(where, "model", "blocks that read the text of another one", "blocks with text of their own", remedy)
    stack = stack_under(model, where)
    plan.check(stack, model_hash(model), where)
    patched = model.clone()
    size = patched.model_size()
    for block in plan.removed(stack):
        size += exchange(patched, block.path, SkipBlock(block))
    for path, student in (students or {}).items():
        size += exchange(patched, path, student)
    patched.size = size
    patched.set_attachments(ATTACHMENT, plan)
    patched.patches_uuid = uuid.uuid4()  # an object patch alone does not tell the host that the network changes
    return patched


def exchange(patched: Any, path: str, module: nn.Module) -> int:
    """Put `module` at `path`; returns by how many bytes the model grows."""
    name, before = NETWORK + path, seen_bytes(patched, path)
    for inner in [other for other in patched.object_patches if other.startswith(f"{name}.")]:
        del patched.object_patches[inner]  # what was put into the block before would be put into `module`
    patched.add_object_patch(name, module)
    return bytes_of(module) - before


def without_plan(model: Any, plan: PrunePlan, where: str) -> Any:
    """A clone with every block in its place again."""
    whole = model.clone()
    for block in stack_under(model, where).blocks:
        module = whole.object_patches.pop(NETWORK + block.path, None)
        if module is not None:
            whole.size += bytes_of(original_module(whole, block.path)) - bytes_of(module)
    whole.remove_attachments(ATTACHMENT)
    whole.patches_uuid = uuid.uuid4()
    return whole
