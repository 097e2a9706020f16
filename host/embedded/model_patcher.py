"""MODEL: a network shared between nodes, and what one branch of the graph wants changed on it.

A patcher never changes the network when a node calls it. Weights and attributes are exchanged when the model is loaded for a run and
given back when another clone, or nobody, needs it. Clones share the network and the backups of what was exchanged.
"""

from __future__ import annotations

import copy
import sys
import uuid
import zlib
from collections import namedtuple
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import torch

from ...errors import input_error
from .lora import calculate_weight
from .model_management import cast_to_device, module_size
from .model_options import (
    PatcherOptions,
    create_model_options_clone,
    set_model_options_patch_replace,
    set_model_options_post_cfg_function,
    set_model_options_pre_cfg_function,
)
from .patcher_extension import CallbacksMP, WrappersMP
from .utils import copy_to_param, get_attr, set_attr, set_attr_param

__all__ = [
    "ModelPatcher", "create_model_options_clone", "set_model_options_patch_replace", "set_model_options_post_cfg_function",
    "set_model_options_pre_cfg_function", "string_to_seed", "get_key_weight",
]  # fmt: skip

Backup = namedtuple("Backup", ["weight", "inplace_update"])


def string_to_seed(data: str) -> int:
    """A number that depends on a weight's name only, for roundings that need randomness."""
    return zlib.crc32(data.encode())


def get_key_weight(model: torch.nn.Module, key: str) -> tuple[torch.Tensor, Callable | None, Callable | None]:
    """(weight, set function, convert function): a layer that stores its weight encoded offers set_<name> and convert_<name>."""
    path, _, name = key.rpartition(".")
    layer = get_attr(model, path) if path else model
    return getattr(layer, name), getattr(layer, f"set_{name}", None), getattr(layer, f"convert_{name}", None)


def _split_key(key: Any) -> tuple[str, Any, Callable | None]:
    """A patch key is a weight's name, or (name, (axis, start, length)[, function]) for a part of it."""
    if isinstance(key, str):
        return key, None, None
    return key[0], key[1], key[2] if len(key) > 2 else None


class ModelPatcher(PatcherOptions):
    """One branch's view of a model.

    Args:
        model: what the sampler calls (BaseModel) or any module; `.device` is set on it.
        load_device, offload_device: where it runs and where it rests.
        size: bytes of the weights, 0 to count them.
        weight_inplace_update: write patched weights into the old storage instead of exchanging the parameter.
    """

    def __init__(self, model: Any, load_device: Any, offload_device: Any, size: int = 0, weight_inplace_update: bool = False):
        self.model = model
        self.size = size
        self.load_device = load_device
        self.offload_device = offload_device
        self.weight_inplace_update = weight_inplace_update
        self.force_cast_weights = False
        self.parent: ModelPatcher | None = None

        self.model_options: dict[str, Any] = {"transformer_options": {}}
        self.attachments: dict[str, Any] = {}
        self.additional_models: dict[str, list[ModelPatcher]] = {}
        self.callbacks = CallbacksMP.init_callbacks()
        self.wrappers = WrappersMP.init_wrappers()
        self.injections: dict[str, list] = {}
        self.is_injected = False
        self.skip_injection = False

        self.patches: dict[str, list[tuple]] = {}
        self.weight_wrapper_patches: dict[str, list[Callable]] = {}
        self.object_patches: dict[str, Any] = {}
        self.backup: dict[str, Backup] = {}
        self.object_patches_backup: dict[str, Any] = {}
        self.patches_uuid = uuid.uuid4()

        for name, value in (("device", offload_device), ("model_loaded_weight_memory", 0), ("current_weight_patches_uuid", None)):
            if getattr(model, name, None) is None:
                setattr(model, name, value)
        self.model_size()

    # Identity

    def clone(self) -> ModelPatcher:
        """A second view of the same network: options deep-copied, lists copied, backups shared."""
        new = self.__class__(self.model, self.load_device, self.offload_device, self.size, weight_inplace_update=self.weight_inplace_update)
        new.parent = self
        new.force_cast_weights = self.force_cast_weights
        new.model_options = copy.deepcopy(self.model_options)
        new.patches = {key: list(patches) for key, patches in self.patches.items()}
        new.patches_uuid = self.patches_uuid
        new.weight_wrapper_patches = dict(self.weight_wrapper_patches)
        new.object_patches = dict(self.object_patches)
        new.backup = self.backup
        new.object_patches_backup = self.object_patches_backup
        self._copy_options_to(new)
        for callback in self.get_all_callbacks(CallbacksMP.ON_CLONE):
            callback(self, new)
        return new

    def is_clone(self, other: Any) -> bool:
        return self.model is getattr(other, "model", None)

    def clone_has_same_weights(self, clone: ModelPatcher) -> bool:
        """Whether both would put the same weights and the same kinds of wrappers on the network."""
        if not self.is_clone(clone):
            return False
        for mine, theirs in ((self.attachments, clone.attachments), (self.additional_models, clone.additional_models),
                             (self.injections, clone.injections)):  # fmt: skip
            if mine.keys() != theirs.keys():
                return False
        for mine, theirs in ((self.callbacks, clone.callbacks), (self.wrappers, clone.wrappers)):
            if any(len(keys) != len(theirs.get(kind, {})) for kind, keys in mine.items()):
                return False
        return self.patches_uuid == clone.patches_uuid or not (self.patches or clone.patches)

    # Sizes and dtypes

    def model_size(self) -> int:
        """Bytes of the weights."""
        if self.size <= 0:
            self.size = module_size(self.model)
        return self.size

    def loaded_size(self) -> int:
        return self.model.model_loaded_weight_memory

    def current_loaded_device(self) -> Any:
        return self.model.device

    def memory_required(self, input_shape: list[int]) -> float:
        return self.model.memory_required(input_shape=input_shape)

    def model_dtype(self) -> torch.dtype | None:
        return self.model.get_dtype() if hasattr(self.model, "get_dtype") else None

    def set_model_compute_dtype(self, dtype: torch.dtype | None) -> None:
        """Let layers cast their weights to `dtype` at each call; None computes in the stored dtype."""
        self.add_object_patch("manual_cast_dtype", dtype)
        if dtype is not None:
            self.force_cast_weights = True
        self.patches_uuid = uuid.uuid4()

    # Objects

    def add_object_patch(self, name: str, obj: Any) -> None:
        """Exchange `model.<dotted name>` for `obj` while this patcher's model is loaded."""
        self.object_patches[name] = obj

    def get_model_object(self, name: str) -> Any:
        """`model.<dotted name>` as this patcher sees it, whichever clone is loaded at the moment."""
        if name in self.object_patches:
            return self.object_patches[name]
        if name in self.object_patches_backup:
            return self.object_patches_backup[name]
        return get_attr(self.model, name)

    # Weights

    def add_patches(self, patches: dict, strength_patch: float = 1.0, strength_model: float = 1.0) -> list:
        """Register weight patches (see lora.calculate_weight for their forms); returns the keys that exist in the model.

        A key is a weight's name, or (name, (axis, start, length)[, function]) for a part of the weight.
        """
        with self.use_ejected():
            known = self.model.state_dict()
        taken = []
        for key, patch in patches.items():
            name, offset, function = _split_key(key)
            if name in known:
                self.patches.setdefault(name, []).append((strength_patch, patch, strength_model, offset, function))
                taken.append(key)
        self.patches_uuid = uuid.uuid4()
        return taken

    def add_weight_wrapper(self, name: str, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Send a layer's weight or bias through `function` at every call of the layer."""
        self.weight_wrapper_patches[name] = self.weight_wrapper_patches.get(name, []) + [function]
        self.patches_uuid = uuid.uuid4()

    def model_state_dict(self, filter_prefix: str | None = None) -> dict[str, torch.Tensor]:
        with self.use_ejected():
            weights = self.model.state_dict()
        return {key: weight for key, weight in weights.items() if filter_prefix is None or key.startswith(filter_prefix)}

    def get_key_patches(self, filter_prefix: str | None = None) -> dict[str, list]:
        """Name → [(unpatched weight, convert function), patches…], the form that model merging passes on."""
        result = {}
        for key in self.model_state_dict(filter_prefix):
            weight, _, convert = get_key_weight(self.model, key)
            if key in self.backup:
                weight = self.backup[key].weight
            result[key] = [(weight, convert or (lambda tensor, **_: tensor))] + self.patches.get(key, [])
        return result

    def patch_weight_to_device(self, key: str, device_to: Any = None, inplace_update: bool = False) -> None:
        """Apply this patcher's patches to one weight, in fp32, and keep the old one in `backup`; a second call changes nothing."""
        if key not in self.patches:
            return
        weight, set_weight, convert = get_key_weight(self.model, key)
        inplace_update = self.weight_inplace_update or inplace_update
        if key not in self.backup:
            self.backup[key] = Backup(weight.to(device=self.offload_device, copy=inplace_update), inplace_update)
        original = self.backup[key].weight
        patched = cast_to_device(original, weight.device if device_to is None else device_to, torch.float32, copy=True)
        if convert is not None:
            patched = convert(patched, inplace=True)
        patched = calculate_weight(self.patches[key], patched, key)
        if set_weight is not None:
            set_weight(patched, inplace_update=inplace_update, seed=string_to_seed(key))
        elif inplace_update:
            copy_to_param(self.model, key, patched.to(weight.dtype))
        else:
            set_attr_param(self.model, key, patched.to(weight.dtype))

    # Loading

    def patch_model(
        self, device_to: Any = None, lowvram_model_memory: float = 0, load_weights: bool = True, force_patch_weights: bool = False
    ) -> Any:
        """Exchange objects, then weights unless told otherwise, then run the injections."""
        with self.use_ejected():
            for name, obj in self.object_patches.items():
                previous = set_attr(self.model, name, obj)
                self.object_patches_backup.setdefault(name, previous)
            if load_weights:
                self.load(device_to, lowvram_model_memory, force_patch_weights=force_patch_weights, full_load=True)
        self.inject_model()
        return self.model

    def load(
        self, device_to: Any = None, lowvram_model_memory: float = 0, force_patch_weights: bool = False, full_load: bool = False
    ) -> None:
        """Put all weights, patched, on `device_to`.

        This host loads whole models, whatever the last three arguments say; ON_LOAD callbacks are given them.
        """
        with self.use_ejected():
            for name, layer in self.model.named_modules():
                self._set_weight_functions(name, layer)
            present = self.model.state_dict().keys() if self.patches else ()
            for key in self.patches:
                if key in present:  # not a weight of a block that an object patch has taken out
                    self.patch_weight_to_device(key, device_to=device_to)
            if device_to is not None:
                self.model.to(device_to)
                self.model.device = device_to
            self.model.model_loaded_weight_memory = self.model_size()
            self.model.current_weight_patches_uuid = self.patches_uuid
            for callback in self.get_all_callbacks(CallbacksMP.ON_LOAD):
                callback(self, device_to, lowvram_model_memory, force_patch_weights, full_load)

    def _set_weight_functions(self, name: str, layer: Any) -> None:
        """Give a casting layer the wrappers of its weight and bias, and let it cast when a compute dtype is forced."""
        wrapped = [f"{name}.{part}" for part in ("weight", "bias") if f"{name}.{part}" in self.weight_wrapper_patches]
        if not hasattr(layer, "comfy_cast_weights"):
            if wrapped:
                raise TypeError(f"{wrapped[0]}: a {type(layer).__name__} cannot wrap its weights; only layers that cast their weights can")
            return
        _reset_weight_functions(layer)
        layer.weight_function.extend(self.weight_wrapper_patches.get(f"{name}.weight", []))
        layer.bias_function.extend(self.weight_wrapper_patches.get(f"{name}.bias", []))
        if self.force_cast_weights:
            layer.prev_comfy_cast_weights = layer.comfy_cast_weights
            layer.comfy_cast_weights = True

    def unpatch_model(self, device_to: Any = None, unpatch_weights: bool = True) -> None:
        """Undo `patch_model`: the network has its own objects and, with `unpatch_weights`, its own weights on `device_to`."""
        self.eject_model()
        if unpatch_weights:
            for key, backup in self.backup.items():
                (copy_to_param if backup.inplace_update else set_attr_param)(self.model, key, backup.weight)
            self.backup.clear()
            for layer in self.model.modules():
                if hasattr(layer, "comfy_cast_weights"):
                    _reset_weight_functions(layer)
            self.model.current_weight_patches_uuid = None
            if device_to is not None:
                self.model.to(device_to)
                self.model.device = device_to
            self.model.model_loaded_weight_memory = 0
        for name, original in self.object_patches_backup.items():
            set_attr(self.model, name, original)
        self.object_patches_backup.clear()

    def partially_load(self, device_to: Any, extra_memory: float = 0, force_patch_weights: bool = False) -> float:
        """Make the network this patcher's: objects always, weights only where another clone's patches lie on it.

        Returns the bytes that were put on the device.
        """
        with self.use_ejected(skip_and_inject_on_exit_only=True):
            current = self.model.current_weight_patches_uuid
            stale = current is not None and (current != self.patches_uuid or force_patch_weights)
            self.unpatch_model(self.offload_device, unpatch_weights=stale)
            self.patch_model(load_weights=False)
            if self.model.model_loaded_weight_memory > 0:
                return 0
            try:
                self.load(device_to, extra_memory, force_patch_weights=force_patch_weights, full_load=True)
            except Exception:
                self.detach()
                raise
            return self.model.model_loaded_weight_memory

    def detach(self, unpatch_all: bool = True) -> Any:
        """Take this patcher off the network; with `unpatch_all` move the network, as it was, to the offload device."""
        self.eject_model()
        self.model_patches_to(self.offload_device)
        if unpatch_all:
            self.unpatch_model(self.offload_device)
        for callback in self.get_all_callbacks(CallbacksMP.ON_DETACH):
            callback(self, unpatch_all)
        return self.model

    @contextmanager
    def use_ejected(self, skip_and_inject_on_exit_only: bool = False):
        """Work on the network without its injections; they return at the end if they were there, or always with the argument."""
        skipped, was_injected = self.skip_injection, self.is_injected
        self.skip_injection = self.skip_injection or skip_and_inject_on_exit_only
        self.eject_model()
        try:
            yield
        finally:
            self.skip_injection = skipped
            if was_injected or skip_and_inject_on_exit_only:
                self.inject_model()

    # One run

    def pre_run(self) -> None:
        if hasattr(self.model, "current_patcher"):
            self.model.current_patcher = self
        for callback in self.get_all_callbacks(CallbacksMP.ON_PRE_RUN):
            callback(self)

    def prepare_state(self, timestep: torch.Tensor) -> None:
        """Before each batch of conditions, with its sigmas (b,)."""
        for callback in self.get_all_callbacks(CallbacksMP.ON_PREPARE_STATE):
            callback(self, timestep)

    def apply_hooks(self, hooks: Any, transformer_options: dict | None = None, force_apply: bool = False) -> dict:
        """A fresh transformer_options for one model call. Conditions with hooks were refused before the run."""
        if hooks is not None:
            raise input_error("conditioning", "hooks", hooks, "conditions without hooks", "Remove the hook nodes or run in ComfyUI.")
        return {} if transformer_options is None else transformer_options

    def cleanup(self) -> None:
        if hasattr(self.model, "current_patcher"):
            self.model.current_patcher = None
        for callback in self.get_all_callbacks(CallbacksMP.ON_CLEANUP):
            callback(self)

    def __del__(self):
        # A clone that vanishes while its injections are in the network takes them along.
        if "patches_uuid" in self.__dict__ and not sys.is_finalizing():
            self.detach(unpatch_all=False)


def _reset_weight_functions(layer: Any) -> None:
    if hasattr(layer, "prev_comfy_cast_weights"):
        layer.comfy_cast_weights = layer.prev_comfy_cast_weights
        del layer.prev_comfy_cast_weights
    layer.weight_function = []
    layer.bias_function = []
