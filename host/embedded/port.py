"""The port's names on the embedded host. Its twin inside ComfyUI is host/comfyui.py; both export the same names."""

from __future__ import annotations

from typing import Any

import torch

from .context import current_host
from .execution.progress import get_executing_context
from .folder_paths import get_full_path, get_input_directory, get_output_directory, get_save_image_path, get_temp_directory
from .latent_formats import LatentFormat
from .latent_preview import prepare_callback
from .lora_files import load_lora_for_models
from .model_management import (
    InterruptProcessingException,
    get_torch_device,
    intermediate_device,
    load_models_gpu,
)
from .model_management import throw_exception_if_processing_interrupted as throw_if_interrupted
from .model_patcher import ModelPatcher
from .model_sampling import CONST, EPS, ModelSamplingDiscreteFlow, ModelSamplingFlux
from .node_helpers import conditioning_set_values
from .patcher_extension import CallbacksMP, WrappersMP
from .sample import fix_empty_latent_channels, prepare_noise, sample_custom
from .samplers import (
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
from .utils import ProgressBar, common_upscale

__all__ = [
    "HOST", "HOST_VERSION", "ModelPatcher", "WrappersMP", "CallbacksMP", "Sampler", "KSAMPLER", "CFGGuider", "calc_cond_batch",
    "cfg_function", "sampler_object", "calculate_sigmas", "prepare_noise", "fix_empty_latent_channels", "sample_custom", "ProgressBar",
    "throw_if_interrupted", "InterruptProcessingException", "common_upscale", "conditioning_set_values", "prepare_callback",
    "get_torch_device", "intermediate_device", "load_models_gpu", "get_save_image_path", "get_output_directory", "get_input_directory",
    "get_temp_directory", "metadata_enabled", "LatentFormat", "ModelSamplingDiscreteFlow", "ModelSamplingFlux", "CONST", "EPS",
    "SAMPLER_NAMES", "SCHEDULER_NAMES", "build_flux_model", "load_lora_for_models", "running_prompt",
    "get_full_path", "load_diffusion_model_state_dict",
]  # fmt: skip

HOST = "embedded"
HOST_VERSION = "0.3.64"  # the ComfyUI whose interface this host offers


def running_prompt() -> str:
    """The id of the graph run that this thread works for; empty outside of one."""
    context = get_executing_context()
    return "" if context is None else context.prompt_id


def metadata_enabled() -> bool:
    """Whether pictures carry their prompt and workflow."""
    return not current_host().settings.disable_metadata


def build_flux_model(
    state_dict: dict[str, torch.Tensor], sizes: dict[str, Any], latent_format: LatentFormat, dtype: torch.dtype | None = None
) -> ModelPatcher:
    """A Flux transformer of any size as a MODEL.

    Args:
        state_dict: Flux checkpoint keys without a prefix; left as it is.
        sizes: the constructor arguments of Flux (in_channels, hidden_size, num_heads, depth, axes_dim, …). With guidance_embed False the
            flow's shift is 1 and the model is given sigma, as for Flux Schnell.
        latent_format: how the codec's latents are scaled.
        dtype: of the weights; None lets the host choose.

    Raises: ValueError naming the keys that are missing or unknown.
    """
    from . import sd

    return sd.build_flux_model(state_dict, sizes, latent_format, dtype=dtype)


def load_diffusion_model_state_dict(sd: dict[str, torch.Tensor], model_options: dict[str, Any] | None = None) -> ModelPatcher | None:
    """MODEL from a state dict, with or without a checkpoint's prefix; None where it holds no transformer that this host knows."""
    from . import sd as loaders

    return loaders.load_diffusion_model_state_dict(sd, model_options)
