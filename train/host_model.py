"""A host's MODEL as something that can be trained: called inside a sampling run, so that conditions, hooks and devices are its own.

The loop runs as the SAMPLER of a guider, as the core's own trainer does: the guider loads the model, prepares conditions and cleans up
after itself, whatever happens inside. Each example has a condition of its own; those that can be joined share a call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from ..families.arch import arch_spec
from .params import NETWORK, Additions, block_prefix

__all__ = ["HostTrainee", "checkpoint_blocks", "ordinary", "own_modules", "taken_off", "train_inside", "trainable_weights", "watch_blocks"]

NORMS = frozenset((functional.layer_norm, functional.rms_norm, functional.group_norm, torch.rms_norm, torch.layer_norm))
TOKENS = ("img", "txt", "x", "context")  # what blocks call the tokens they change
LEAST_SIGMA = 1e-3  # below it (x − denoised)/sigma is rounding


def ordinary(value: Any) -> Any:
    """A copy whose tensors may take part in a backward pass, also where they were made in inference mode."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: ordinary(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(ordinary(entry) for entry in value)
    return value


def trainable_weights(patcher: Any) -> None:
    """Give weights that were made in inference mode an equal twin that was not; one at a time, values and names stay.

    Autograd cannot keep an inference tensor for the backward pass, and graph engines load models in that mode.
    """
    network = patcher.get_model_object("diffusion_model")
    for module in network.modules():
        for name, value in list(module.named_parameters(recurse=False)):
            if value.is_inference():
                setattr(module, name, nn.Parameter(value.clone(), requires_grad=False))
        for name, value in list(module.named_buffers(recurse=False)):
            if value.is_inference():
                module.register_buffer(name, value.clone())
    network.requires_grad_(False)


def own_modules(student: Any, teacher: Any) -> tuple[str, ...] | None:
    """Keys of the modules that MODEL `student` has in place of those of `teacher`, a MODEL on the same network; None where they differ in
    more than that, so that no exchange of modules makes one of the other."""
    if not _same(student.patches, teacher.patches) or not _same(student.weight_wrapper_patches, teacher.weight_wrapper_patches):
        return None
    mine, theirs = ({key: value for key, value in model.object_patches.items() if key.startswith(NETWORK)} for model in (student, teacher))
    own = tuple(key for key in mine if key not in theirs)
    held = all(mine.get(key) is value for key, value in theirs.items()) and all(isinstance(mine[key], nn.Module) for key in own)
    return own if held else None


def _same(a: Any, b: Any) -> bool:
    """Equal containers of identical things and equal plain values; tensors are the same where they are one object."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(value, b[key]) for key, value in a.items())
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    return a is b or isinstance(a, (bool, int, float, str)) and a == b


@contextmanager
def taken_off(patcher: Any, additions: Additions, own: Sequence[str]) -> Iterator[None]:
    """Inside, the network that MODEL `patcher` lies on has its first modules at the keys `own`, and what learns is switched off."""

    def put(key: str, module: nn.Module) -> None:
        parent, _, name = key.rpartition(".")
        setattr(patcher.model.get_submodule(parent), name, module)

    with additions.switched_off():
        for key in reversed(own):
            put(key, patcher.object_patches_backup[key].to(patcher.load_device))
        try:
            yield
        finally:
            for key in own:
                put(key, patcher.object_patches[key])


class HostTrainee:
    """A MODEL inside a running guider. Made by `train_inside`.

    Args:
        guider: with inner_model and conds "positive" (one an example, or one for all) and "negative" (the empty one, may be missing).
        options: model_options of the run. additions: what learns; None for a frozen model.
        about: what must be equal when a run is resumed.
    """

    def __init__(self, guider: Any, options: dict, additions: Additions | None, about: dict[str, Any]):
        self.model = guider.inner_model
        self.positive = [ordinary_inputs(entry) for entry in guider.conds.get("positive", [])]
        self.negative = [ordinary_inputs(entry) for entry in guider.conds.get("negative", [])]
        self.options = options.get("transformer_options", {})
        self.additions, self.about = additions, about
        self.device = guider.model_patcher.load_device
        self.features: dict[tuple[str, int], Tensor] = {}
        self.rows: list[int] = []  # of the batch, in the present call of the network
        self.alone: Callable[[], AbstractContextManager] = nullcontext  # for a teacher on the network of the one that learns

    def describe(self) -> dict[str, Any]:
        return dict(self.about)

    def params(self) -> dict[str, nn.Parameter]:
        return self.additions.params() if self.additions else {}

    def velocity(self, x: Tensor, sigma: Tensor, cond: list[Any]) -> Tensor:
        """(x − denoised)/sigma. cond: numbers of prompts, None for the empty one."""
        with self.alone():
            return self._velocity(x, sigma, cond)

    def _velocity(self, x: Tensor, sigma: Tensor, cond: list[Any]) -> Tensor:
        x, sigma = x.to(self.device), sigma.to(self.device)
        inputs = [self.negative[0] if key is None else self.positive[key] for key in cond]
        parts = []
        for rows in _joinable(inputs):
            self.rows = rows
            parts.append((rows, self._denoised(x[rows], sigma[rows], [inputs[row] for row in rows])))
        if len(parts) == 1:
            denoised = parts[0][1]
        else:
            order = torch.tensor([row for rows, _ in parts for row in rows], device=self.device)
            denoised = torch.cat([part for _, part in parts])[torch.argsort(order)]
        s = sigma.clamp(min=LEAST_SIGMA).view(-1, *[1] * (x.ndim - 1))
        return ((x - denoised.float()) / s).float()

    def _denoised(self, x: Tensor, sigma: Tensor, inputs: list[dict[str, Any]]) -> Tensor:
        joined = {name: first.concat([entry[name] for entry in inputs[1:]]) for name, first in inputs[0].items()}
        options = {**self.options, "sigmas": sigma, "cond_or_uncond": [0] * len(inputs)}
        with PrivateNorms():
            return self.model.apply_model(x, sigma, **joined, transformer_options=options)


def ordinary_inputs(entry: dict[str, Any]) -> dict[str, Any]:
    """The network inputs of one prepared condition for one latent."""
    inputs = {}
    for name, value in entry["model_conds"].items():
        single = value.process_cond(batch_size=1, area=None)
        single.cond = ordinary(single.cond)
        inputs[name] = single
    return inputs


def _joinable(inputs: list[dict[str, Any]]) -> list[list[int]]:
    """Rows whose conditions fit into one call, in groups."""
    groups: list[list[int]] = []
    for row, entry in enumerate(inputs):
        for group in groups:
            first = inputs[group[0]]
            if first.keys() == entry.keys() and all(first[name].can_concat(entry[name]) for name in entry):
                group.append(row)
                break
        else:
            groups.append([row])
    return groups


class _Inside:
    """A SAMPLER that runs `body` where a solver would run, and hands the latent back."""

    inpaint_options = MappingProxyType({})

    def __init__(self, body: Callable[[Any, dict], None]):
        self.body = body

    def max_denoise(self, guider, sigmas) -> bool:
        return False

    def sample(self, guider, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False):
        self.body(guider, extra_args.get("model_options", {}))
        return noise


def train_inside(guider: Any, like: Tensor, additions: Additions | None, about: dict, body: Callable[[HostTrainee], None]) -> None:
    """Call `body` with the guider's model as a trainee, inside a run of the guider.

    like: a latent (1, c, …) of the data's size, in no particular space. Gradients are on and tensors ordinary inside.
    """

    def inside(running: Any, options: dict) -> None:
        if additions is not None:
            additions.to(torch.device(guider.model_patcher.load_device))
        body(HostTrainee(running, options, additions, about))

    with torch.inference_mode(False), torch.enable_grad():
        zeros = torch.zeros(like.shape)
        guider.sample(zeros, zeros.clone(), _Inside(inside), torch.tensor([1.0, 0.0]), disable_pbar=True, seed=0)


class PrivateNorms(TorchFunctionMode):
    """Inside, a norm reads a copy of its input.

    Blocks of a host add to their tokens in place after a norm has read them. The norm keeps its input for the backward pass, which autograd
    then refuses; where blocks are computed twice it could not even see it.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in NORMS and args and isinstance(args[0], Tensor) and args[0].requires_grad:
            args = (args[0].clone(), *args[1:])
        return function(*args, **(kwargs or {}))


def checkpoint_blocks(patcher: Any) -> int:
    """Let every block of MODEL `patcher` run again in the backward pass instead of keeping what it made; returns how many there are.

    The blocks' own forwards are exchanged, as object patches: what a block-replace hook is given as the original block belongs to the
    loop of the forward pass, and is another block by the time of the backward pass.
    """
    network = patcher.get_model_object("diffusion_model")
    arch = arch_spec(network)
    blocks = arch.blocks if arch else ()
    for kind, index in blocks:
        name = f"{NETWORK}{block_prefix(network, kind, index)}forward"
        patcher.add_object_patch(name, _recomputed(patcher.get_model_object(name)))
    return len(blocks)


def _recomputed(forward: Callable) -> Callable:
    def run(*args, **kwargs):
        args = [value.clone() if isinstance(value, Tensor) else value for value in args]  # what is kept must not be added to in place
        kwargs = {name: kwargs[name].clone() if name in TOKENS and isinstance(kwargs[name], Tensor) else kwargs[name] for name in kwargs}
        with PrivateNorms():
            return forward(*args, **kwargs)

    def recomputed(*args, **kwargs):
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(run, *args, use_reentrant=False, **kwargs)

    return recomputed


def watch_blocks(patcher: Any, blocks: tuple[tuple[str, int], ...], into: Callable[[], dict]) -> None:
    """Put the image tokens that `blocks` of MODEL `patcher` hand on into the dictionary that `into` gives, at every call."""
    slots = patcher.model_options["transformer_options"].get("patches_replace", {}).get("dit", {})
    for key in blocks:
        patcher.set_model_patch_replace(_watched(key, slots.get(key), into), "dit", *key)


def _watched(key: tuple[str, int], earlier: Callable | None, into: Callable[[], dict]) -> Callable:
    def patch(args: dict, extra: dict) -> dict:
        out = extra["original_block"](args) if earlier is None else earlier(args, extra)
        into()[key] = out["img"].clone()  # later blocks may add to it in place
        return out

    return patch
