"""What a node writes on a MODEL: guidance hooks, block patches, wrappers, callbacks, injections, attachments.

None of it touches weights. `model_options` is deep-copied with each clone of the patcher; wrappers, callbacks and injections are
shared objects in lists of the clone's own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from .patcher_extension import CallbacksMP, PatcherInjection, copy_nested_dicts

__all__ = [
    "PatcherOptions", "create_model_options_clone", "set_model_options_patch_replace", "set_model_options_pre_cfg_function",
    "set_model_options_post_cfg_function",
]  # fmt: skip


def create_model_options_clone(orig_model_options: dict) -> dict:
    """A copy whose dicts and lists may be changed; the values in them are shared."""
    return copy_nested_dicts(orig_model_options)


def set_model_options_patch_replace(
    model_options: dict, patch: Callable, name: str, block_name: str, number: int, transformer_index: int | None = None
) -> dict:
    """Put `patch` into transformer_options["patches_replace"][name][(block_name, number[, transformer_index])]; the last one wins."""
    block = (block_name, number) if transformer_index is None else (block_name, number, transformer_index)
    options = dict(model_options["transformer_options"])
    replacements = dict(options.get("patches_replace", {}))
    replacements[name] = {**replacements.get(name, {}), block: patch}
    options["patches_replace"] = replacements
    model_options["transformer_options"] = options
    return model_options


def _append_function(model_options: dict, key: str, function: Callable, disable_cfg1_optimization: bool) -> dict:
    model_options[key] = model_options.get(key, []) + [function]
    if disable_cfg1_optimization:
        model_options["disable_cfg1_optimization"] = True
    return model_options


def set_model_options_post_cfg_function(model_options: dict, post_cfg_function: Callable, disable_cfg1_optimization: bool = False) -> dict:
    return _append_function(model_options, "sampler_post_cfg_function", post_cfg_function, disable_cfg1_optimization)


def set_model_options_pre_cfg_function(model_options: dict, pre_cfg_function: Callable, disable_cfg1_optimization: bool = False) -> dict:
    return _append_function(model_options, "sampler_pre_cfg_function", pre_cfg_function, disable_cfg1_optimization)


class PatcherOptions:
    """The part of a ModelPatcher that is options; the fields are made by ModelPatcher."""

    model_options: dict[str, Any]
    attachments: dict[str, Any]
    additional_models: dict[str, list]
    callbacks: dict[str, dict[str | None, list[Callable]]]
    wrappers: dict[str, dict[str | None, list[Callable]]]
    injections: dict[str, list[PatcherInjection]]
    is_injected: bool
    skip_injection: bool

    # Guidance

    def set_model_sampler_cfg_function(self, sampler_cfg_function: Callable, disable_cfg1_optimization: bool = False) -> None:
        """Replace guidance. The function gets one dict and returns x − denoised; one with three parameters gets (cond, uncond, scale)."""
        if len(inspect.signature(sampler_cfg_function).parameters) == 3:

            def from_dict(args: dict):
                return sampler_cfg_function(args["cond"], args["uncond"], args["cond_scale"])

            self.model_options["sampler_cfg_function"] = from_dict
        else:
            self.model_options["sampler_cfg_function"] = sampler_cfg_function
        if disable_cfg1_optimization:
            self.model_options["disable_cfg1_optimization"] = True

    def set_model_sampler_post_cfg_function(self, post_cfg_function: Callable, disable_cfg1_optimization: bool = False) -> None:
        self.model_options = set_model_options_post_cfg_function(self.model_options, post_cfg_function, disable_cfg1_optimization)

    def set_model_sampler_pre_cfg_function(self, pre_cfg_function: Callable, disable_cfg1_optimization: bool = False) -> None:
        self.model_options = set_model_options_pre_cfg_function(self.model_options, pre_cfg_function, disable_cfg1_optimization)

    def set_model_sampler_calc_cond_batch_function(self, sampler_calc_cond_batch_function: Callable) -> None:
        self.model_options["sampler_calc_cond_batch_function"] = sampler_calc_cond_batch_function

    def set_model_unet_function_wrapper(self, unet_wrapper_function: Callable) -> None:
        self.model_options["model_function_wrapper"] = unet_wrapper_function

    def set_model_denoise_mask_function(self, denoise_mask_function: Callable) -> None:
        self.model_options["denoise_mask_function"] = denoise_mask_function

    # Inside the network

    def set_model_patch(self, patch: Callable, name: str) -> None:
        patches = self.model_options["transformer_options"].setdefault("patches", {})
        patches[name] = patches.get(name, []) + [patch]

    def set_model_patch_replace(
        self, patch: Callable, name: str, block_name: str, number: int, transformer_index: int | None = None
    ) -> None:
        self.model_options = set_model_options_patch_replace(self.model_options, patch, name, block_name, number, transformer_index)

    def set_model_attn1_patch(self, patch: Callable) -> None:
        self.set_model_patch(patch, "attn1_patch")

    def set_model_attn2_patch(self, patch: Callable) -> None:
        self.set_model_patch(patch, "attn2_patch")

    def set_model_attn1_replace(self, patch: Callable, block_name: str, number: int, transformer_index: int | None = None) -> None:
        self.set_model_patch_replace(patch, "attn1", block_name, number, transformer_index)

    def set_model_attn2_replace(self, patch: Callable, block_name: str, number: int, transformer_index: int | None = None) -> None:
        self.set_model_patch_replace(patch, "attn2", block_name, number, transformer_index)

    def set_model_attn1_output_patch(self, patch: Callable) -> None:
        self.set_model_patch(patch, "attn1_output_patch")

    def set_model_attn2_output_patch(self, patch: Callable) -> None:
        self.set_model_patch(patch, "attn2_output_patch")

    def set_model_input_block_patch(self, patch: Callable) -> None:
        self.set_model_patch(patch, "input_block_patch")

    def set_model_input_block_patch_after_skip(self, patch: Callable) -> None:
        self.set_model_patch(patch, "input_block_patch_after_skip")

    def set_model_output_block_patch(self, patch: Callable) -> None:
        self.set_model_patch(patch, "output_block_patch")

    def set_model_emb_patch(self, patch: Callable) -> None:
        self.set_model_patch(patch, "emb_patch")

    def set_model_forward_timestep_embed_patch(self, patch: Callable) -> None:
        self.set_model_patch(patch, "forward_timestep_embed_patch")

    def set_model_double_block_patch(self, patch: Callable) -> None:
        self.set_model_patch(patch, "double_block")

    def set_model_post_input_patch(self, patch: Callable) -> None:
        self.set_model_patch(patch, "post_input")

    def _option_functions(self) -> list[tuple[Any, Any]]:
        """(container, place) of every function in the options that may own tensors or models."""
        options = self.model_options["transformer_options"]
        places = [(functions, i) for functions in options.get("patches", {}).values() for i in range(len(functions))]
        places += [(blocks, block) for blocks in options.get("patches_replace", {}).values() for block in blocks]
        if "model_function_wrapper" in self.model_options:
            places.append((self.model_options, "model_function_wrapper"))
        return places

    def model_patches_to(self, device: Any) -> None:
        """Call `.to(device or dtype)` on the patches that have it."""
        for container, place in self._option_functions():
            if hasattr(container[place], "to"):
                container[place] = container[place].to(device)

    def model_patches_models(self) -> list:
        """Further models that patches bring and want loaded beside this one."""
        functions = [container[place] for container, place in self._option_functions()]
        return [model for function in functions if hasattr(function, "models") for model in function.models()]

    # Callbacks and wrappers

    def add_callback(self, call_type: str, callback: Callable) -> None:
        self.add_callback_with_key(call_type, None, callback)

    def add_callback_with_key(self, call_type: str, key: str | None, callback: Callable) -> None:
        self.callbacks.setdefault(call_type, {}).setdefault(key, []).append(callback)

    def remove_callbacks_with_key(self, call_type: str, key: str | None) -> None:
        self.callbacks.get(call_type, {}).pop(key, None)

    def get_callbacks(self, call_type: str, key: str | None) -> list[Callable]:
        return self.callbacks.get(call_type, {}).get(key, [])

    def get_all_callbacks(self, call_type: str) -> list[Callable]:
        return [callback for callbacks in self.callbacks.get(call_type, {}).values() for callback in callbacks]

    def add_wrapper(self, wrapper_type: str, wrapper: Callable) -> None:
        self.add_wrapper_with_key(wrapper_type, None, wrapper)

    def add_wrapper_with_key(self, wrapper_type: str, key: str | None, wrapper: Callable) -> None:
        self.wrappers.setdefault(wrapper_type, {}).setdefault(key, []).append(wrapper)

    def remove_wrappers_with_key(self, wrapper_type: str, key: str | None) -> None:
        self.wrappers.get(wrapper_type, {}).pop(key, None)

    def get_wrappers(self, wrapper_type: str, key: str | None) -> list[Callable]:
        return self.wrappers.get(wrapper_type, {}).get(key, [])

    def get_all_wrappers(self, wrapper_type: str) -> list[Callable]:
        return [wrapper for wrappers in self.wrappers.get(wrapper_type, {}).values() for wrapper in wrappers]

    # Attachments, further models, injections

    def set_attachments(self, key: str, attachment: Any) -> None:
        self.attachments[key] = attachment

    def remove_attachments(self, key: str) -> None:
        self.attachments.pop(key, None)

    def get_attachment(self, key: str) -> Any | None:
        return self.attachments.get(key)

    def set_additional_models(self, key: str, models: list) -> None:
        self.additional_models[key] = models

    def remove_additional_models(self, key: str) -> None:
        self.additional_models.pop(key, None)

    def get_additional_models_with_key(self, key: str) -> list:
        return self.additional_models.get(key, [])

    def get_additional_models(self) -> list:
        return [model for models in self.additional_models.values() for model in models]

    def get_nested_additional_models(self) -> list:
        """The additional models, theirs, and so on; each once, so that a circle ends."""
        found = list(self.get_additional_models())
        for model in found:
            found.extend(further for further in model.get_additional_models() if further not in found)
        return found

    def set_injections(self, key: str, injections: list[PatcherInjection]) -> None:
        self.injections[key] = injections

    def remove_injections(self, key: str) -> None:
        self.injections.pop(key, None)

    def get_injections(self, key: str) -> list[PatcherInjection] | None:
        return self.injections.get(key)

    def inject_model(self) -> None:
        if self.is_injected or self.skip_injection:
            return
        for injections in self.injections.values():
            for injection in injections:
                injection.inject(self)
                self.is_injected = True
        if self.is_injected:
            for callback in self.get_all_callbacks(CallbacksMP.ON_INJECT_MODEL):
                callback(self)

    def eject_model(self) -> None:
        if not self.is_injected:
            return
        for injections in self.injections.values():
            for injection in injections:
                injection.eject(self)
        self.is_injected = False
        for callback in self.get_all_callbacks(CallbacksMP.ON_EJECT_MODEL):
            callback(self)

    def _copy_options_to(self, clone: PatcherOptions) -> None:
        """Everything but model_options, with the sharing rules of the module docstring."""
        for key, attachment in self.attachments.items():
            copy = getattr(attachment, "on_model_patcher_clone", None)
            clone.attachments[key] = attachment if copy is None else copy()
        clone.additional_models = {key: [model.clone() for model in models] for key, models in self.additional_models.items()}
        clone.callbacks = {kind: {key: list(functions) for key, functions in keys.items()} for kind, keys in self.callbacks.items()}
        clone.wrappers = {kind: {key: list(functions) for key, functions in keys.items()} for kind, keys in self.wrappers.items()}
        clone.injections = {key: list(injections) for key, injections in self.injections.items()}
        clone.is_injected = self.is_injected
        clone.skip_injection = self.skip_injection
