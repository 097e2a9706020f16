"""Wrappers and callbacks: the named places where a node may stand around the host's own functions.

A wrapper is `f(executor, *args, **kwargs)` and goes on with `executor(*args, **kwargs)`. Wrappers are stored as
{type: {key: [functions]}}; the first added stands outermost.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = [
    "CallbacksMP", "WrappersMP", "WrapperExecutor", "PatcherInjection", "add_callback", "add_callback_with_key",
    "get_callbacks_with_key", "get_all_callbacks", "add_wrapper", "add_wrapper_with_key", "get_wrappers_with_key",
    "get_all_wrappers", "copy_nested_dicts", "merge_nested_dicts",
]  # fmt: skip

Registry = dict[str, dict[str | None, list[Callable]]]


class CallbacksMP:
    """Kinds of callback. The two hook kinds never fire here: this host refuses conditions that carry hooks."""

    ON_CLONE = "on_clone"
    ON_LOAD = "on_load_after"
    ON_DETACH = "on_detach_after"
    ON_CLEANUP = "on_cleanup"
    ON_PRE_RUN = "on_pre_run"
    ON_PREPARE_STATE = "on_prepare_state"
    ON_APPLY_HOOKS = "on_apply_hooks"
    ON_REGISTER_ALL_HOOK_PATCHES = "on_register_all_hook_patches"
    ON_INJECT_MODEL = "on_inject_model"
    ON_EJECT_MODEL = "on_eject_model"

    @classmethod
    def init_callbacks(cls) -> Registry:
        return {}


class WrappersMP:
    """Kinds of wrapper, from the whole run (OUTER_SAMPLE) inward to the network's forward (DIFFUSION_MODEL)."""

    OUTER_SAMPLE = "outer_sample"
    PREPARE_SAMPLING = "prepare_sampling"
    SAMPLER_SAMPLE = "sampler_sample"
    PREDICT_NOISE = "predict_noise"
    CALC_COND_BATCH = "calc_cond_batch"
    APPLY_MODEL = "apply_model"
    DIFFUSION_MODEL = "diffusion_model"

    @classmethod
    def init_wrappers(cls) -> Registry:
        return {}


def _registry(group: str, options: dict, is_model_options: bool, create: bool) -> Registry:
    """The wrappers or callbacks of a transformer_options dict, or of the one inside a model_options dict."""
    if is_model_options:
        options = options.setdefault("transformer_options", {}) if create else options.get("transformer_options", {})
    return options.setdefault(group, {}) if create else options.get(group, {})


def _add(group: str, kind: str, key: str | None, function: Callable, options: dict, is_model_options: bool) -> None:
    _registry(group, options, is_model_options, create=True).setdefault(kind, {}).setdefault(key, []).append(function)


def _get_with_key(group: str, kind: str, key: str | None, options: dict, is_model_options: bool) -> list[Callable]:
    return list(_registry(group, options, is_model_options, create=False).get(kind, {}).get(key, []))


def _get_all(group: str, kind: str, options: dict, is_model_options: bool) -> list[Callable]:
    by_key = _registry(group, options, is_model_options, create=False).get(kind, {})
    return [function for functions in by_key.values() for function in functions]


def add_callback(call_type: str, callback: Callable, transformer_options: dict, is_model_options: bool = False) -> None:
    _add("callbacks", call_type, None, callback, transformer_options, is_model_options)


def add_callback_with_key(call_type: str, key: str, callback: Callable, transformer_options: dict, is_model_options: bool = False) -> None:
    _add("callbacks", call_type, key, callback, transformer_options, is_model_options)


def get_callbacks_with_key(call_type: str, key: str, transformer_options: dict, is_model_options: bool = False) -> list[Callable]:
    return _get_with_key("callbacks", call_type, key, transformer_options, is_model_options)


def get_all_callbacks(call_type: str, transformer_options: dict, is_model_options: bool = False) -> list[Callable]:
    return _get_all("callbacks", call_type, transformer_options, is_model_options)


def add_wrapper(wrapper_type: str, wrapper: Callable, transformer_options: dict, is_model_options: bool = False) -> None:
    _add("wrappers", wrapper_type, None, wrapper, transformer_options, is_model_options)


def add_wrapper_with_key(wrapper_type: str, key: str, wrapper: Callable, transformer_options: dict, is_model_options: bool = False) -> None:
    _add("wrappers", wrapper_type, key, wrapper, transformer_options, is_model_options)


def get_wrappers_with_key(wrapper_type: str, key: str, transformer_options: dict, is_model_options: bool = False) -> list[Callable]:
    return _get_with_key("wrappers", wrapper_type, key, transformer_options, is_model_options)


def get_all_wrappers(wrapper_type: str, transformer_options: dict, is_model_options: bool = False) -> list[Callable]:
    return _get_all("wrappers", wrapper_type, transformer_options, is_model_options)


class WrapperExecutor:
    """Runs `original` inside its wrappers, outermost first.

    The host starts it with `execute`; a wrapper receives it and continues by calling it. `class_obj` is the object whose
    method is wrapped (guider, sampler, model), None for a plain function. Each call makes the executor of the next level, so
    a wrapper may call on more than once.
    """

    def __init__(self, original: Callable, class_obj: Any, wrappers: list[Callable], idx: int):
        if idx > len(wrappers):
            raise IndexError(f"wrapper {idx} of {len(wrappers)} does not exist: an executor was called past the wrapped function")
        self.original = original
        self.class_obj = class_obj
        self.wrappers = list(wrappers)
        self.idx = idx
        self.is_last = idx == len(wrappers)

    def __call__(self, *args, **kwargs):
        return WrapperExecutor(self.original, self.class_obj, self.wrappers, self.idx + 1).execute(*args, **kwargs)

    def execute(self, *args, **kwargs):
        if self.is_last:
            return self.original(*args, **kwargs)
        return self.wrappers[self.idx](self, *args, **kwargs)

    @classmethod
    def new_executor(cls, original: Callable, wrappers: list[Callable], idx: int = 0) -> WrapperExecutor:
        return cls(original, None, wrappers, idx)

    @classmethod
    def new_class_executor(cls, original: Callable, class_obj: Any, wrappers: list[Callable], idx: int = 0) -> WrapperExecutor:
        return cls(original, class_obj, wrappers, idx)


class PatcherInjection:
    """A pair of functions of the patcher: `inject` changes the loaded model, `eject` undoes it."""

    def __init__(self, inject: Callable, eject: Callable):
        self.inject = inject
        self.eject = eject


def copy_nested_dicts(input_dict: dict) -> dict:
    """Copy dicts all the way down and lists one level; every other value is shared."""
    copied = {}
    for key, value in input_dict.items():
        if isinstance(value, dict):
            value = copy_nested_dicts(value)
        elif isinstance(value, list):
            value = list(value)
        copied[key] = value
    return copied


def merge_nested_dicts(dict1: dict, dict2: dict, copy_dict1: bool = True) -> dict:
    """Put `dict2` into `dict1`: lists are joined, nested dicts merged, other values replaced.

    Inside a nested dict the entries of `dict2` come first, which is why a patcher's own wrappers stand outside those that
    someone wrote straight into transformer_options.
    """
    merged = copy_nested_dicts(dict1) if copy_dict1 else dict1
    for key, value in dict2.items():
        if isinstance(value, dict):
            merged[key] = merge_nested_dicts(value, merged.get(key, {}))
        elif isinstance(value, list):
            merged[key] = merged.get(key, []) + value
        else:
            merged[key] = value
    return merged
