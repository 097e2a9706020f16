"""The port's names inside ComfyUI (0.3.64 or newer). Its twin on the embedded host is embedded/port.py; both export the same names."""

from __future__ import annotations

from typing import Any

import comfy.model_management
import comfy.ops
import comfy.sd
import comfy.supported_models
import comfy.utils
import torch
from comfy.cli_args import args
from comfy.latent_formats import LatentFormat
from comfy.model_management import (
    InterruptProcessingException,
    get_torch_device,
    intermediate_device,
    load_models_gpu,
)
from comfy.model_management import throw_exception_if_processing_interrupted as throw_if_interrupted
from comfy.model_patcher import ModelPatcher
from comfy.model_sampling import CONST, EPS, ModelSamplingDiscreteFlow, ModelSamplingFlux
from comfy.patcher_extension import CallbacksMP, WrappersMP
from comfy.sample import fix_empty_latent_channels, prepare_noise, sample_custom
from comfy.samplers import (
    KSAMPLER,
    SAMPLER_NAMES,
    SCHEDULER_NAMES,
    CFGGuider,
    Sampler,
    calc_cond_batch,
    calculate_sigmas,
    cfg_function,
    sampler_object,
)
from comfy.sd import load_lora_for_models
from comfy.utils import ProgressBar, common_upscale
from comfy_execution.utils import get_executing_context
from comfyui_version import __version__ as HOST_VERSION
from folder_paths import get_full_path, get_input_directory, get_output_directory, get_save_image_path, get_temp_directory
from latent_preview import prepare_callback
from node_helpers import conditioning_set_values

__all__ = [
    "HOST", "HOST_VERSION", "ModelPatcher", "WrappersMP", "CallbacksMP", "Sampler", "KSAMPLER", "CFGGuider", "calc_cond_batch",
    "cfg_function", "sampler_object", "calculate_sigmas", "prepare_noise", "fix_empty_latent_channels", "sample_custom", "ProgressBar",
    "throw_if_interrupted", "InterruptProcessingException", "common_upscale", "conditioning_set_values", "prepare_callback",
    "get_torch_device", "intermediate_device", "load_models_gpu", "get_save_image_path", "get_output_directory", "get_input_directory",
    "get_temp_directory", "metadata_enabled", "LatentFormat", "ModelSamplingDiscreteFlow", "ModelSamplingFlux", "CONST", "EPS",
    "SAMPLER_NAMES", "SCHEDULER_NAMES", "build_flux_model", "load_lora_for_models", "running_prompt",
    "get_full_path", "load_diffusion_model_state_dict",
]  # fmt: skip

HOST = "comfyui"


def running_prompt() -> str:
    """The id of the graph run that this thread works for; empty outside of one."""
    context = get_executing_context()
    return "" if context is None else context.prompt_id


def metadata_enabled() -> bool:
    """Whether pictures carry their prompt and workflow."""
    return not args.disable_metadata


def build_flux_model(
    state_dict: dict[str, torch.Tensor], sizes: dict[str, Any], latent_format: LatentFormat, dtype: torch.dtype | None = None
) -> ModelPatcher:
    """A Flux transformer of any size as a MODEL; the stock loader knows hidden width 3072 only.

    Args:
        state_dict: Flux checkpoint keys without a prefix; left as it is.
        sizes: the constructor arguments of Flux (in_channels, hidden_size, num_heads, depth, axes_dim, …). With guidance_embed False the
            flow's shift is 1 and the model is given sigma, as for Flux Schnell.
        latent_format: how the codec's latents are scaled.
        dtype: of the weights; None lets the host choose.

    Raises: ValueError naming the keys that are missing or unknown.
    """
    kind = comfy.supported_models.Flux if sizes["guidance_embed"] else comfy.supported_models.FluxSchnell
    config = kind({"image_model": "flux", **sizes})
    config.latent_format = latent_format
    load_device = get_torch_device()
    if dtype is None:
        dtype = comfy.model_management.unet_dtype(
            model_params=comfy.utils.calculate_parameters(state_dict),
            supported_dtypes=list(config.supported_inference_dtypes),
            weight_dtype=comfy.utils.weight_dtype(state_dict),
        )
    config.set_inference_dtype(dtype, comfy.model_management.unet_manual_cast(dtype, load_device, config.supported_inference_dtypes))
    offload_device = comfy.model_management.unet_offload_device()
    model = config.get_model(state_dict, "", device=offload_device)
    expected = model.diffusion_model.state_dict().keys()
    if expected != state_dict.keys():
        missing, unknown = sorted(expected - state_dict.keys()), sorted(state_dict.keys() - expected)
        raise ValueError(f"these weights are not a Flux model of the given sizes: missing {missing[:5]}, unknown {unknown[:5]}")
    model.load_model_weights(dict(state_dict), "")
    return ModelPatcher(model, load_device=load_device, offload_device=offload_device)


def load_diffusion_model_state_dict(sd: dict[str, torch.Tensor], model_options: dict[str, Any] | None = None) -> ModelPatcher | None:
    """MODEL from a state dict, with or without a checkpoint's prefix; None where it holds no transformer that this host knows.

    Linear layers hold the tensors they are given: no second copy is made, and a weight that is one number spread over its shape takes no
    memory. model_options: "dtype" of the weights.
    """
    options = dict(model_options or {})
    if "dtype" in options:
        cast = comfy.model_management.unet_manual_cast(options["dtype"], get_torch_device())
        options["custom_operations"] = _adopting(comfy.ops.disable_weight_init if cast is None else comfy.ops.manual_cast)
    return comfy.sd.load_diffusion_model_state_dict(sd, options)


def _adopting(operations: type) -> type:
    """ComfyUI's `operations` with linear layers that take a state dict's tensors as they are.

    Parameters ask for a gradient as those of `operations` do: torch folds a product over strided input by that flag, and with another form
    of it the last bits would not be those of the model that was saved.
    """

    class Linear(operations.Linear):
        def __init__(self, in_features: int, out_features: int, bias: bool = True, device=None, dtype: torch.dtype | None = None):
            super().__init__(1, 1, bias=bias, device=device, dtype=dtype)
            self.in_features, self.out_features = in_features, out_features
            for name, own in list(self.named_parameters(recurse=False)):
                setattr(self, name, torch.nn.Parameter(own.new_empty(0), requires_grad=own.requires_grad))

        def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs):
            for name, shape in (("weight", (self.out_features, self.in_features)), ("bias", (self.out_features,))):
                own, given = getattr(self, name), state_dict.get(prefix + name)
                if own is None:
                    continue
                if given is None:
                    missing_keys.append(prefix + name)
                elif tuple(given.shape) != shape:
                    error_msgs.append(f"size mismatch for {prefix}{name}: {tuple(given.shape)} in the file, {shape} in the model")
                else:
                    setattr(self, name, torch.nn.Parameter(given.to(own.dtype), requires_grad=own.requires_grad))

    return type("AdoptingOperations", (operations,), {"Linear": Linear})
