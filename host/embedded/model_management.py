"""Devices, dtypes, memory and interruption under ComfyUI's names: each function asks the current host (see memory.MemoryManager)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from .context import current_host
from .memory import CPU, INFERENCE_MEMORY, RESERVED_MEMORY, MemoryManager, soft_empty_cache, system_memory

__all__ = [
    "MemoryManager", "soft_empty_cache", "system_memory", "OOM_EXCEPTION", "get_torch_device", "get_torch_device_name", "is_device_cpu",
    "is_device_cuda", "is_device_mps", "cpu_mode", "mps_mode", "intermediate_device", "unet_offload_device", "unet_inital_load_device",
    "text_encoder_device", "text_encoder_offload_device", "text_encoder_initial_device", "vae_device", "vae_offload_device",
    "dtype_size", "unet_dtype", "unet_manual_cast", "should_use_fp16", "should_use_bf16", "vae_dtype", "text_encoder_dtype",
    "supports_cast", "device_supports_non_blocking", "cast_to", "cast_to_device", "xformers_enabled", "pytorch_attention_enabled",
    "pytorch_attention_flash_attention", "force_upcast_attention_dtype", "module_size", "get_free_memory", "get_total_memory",
    "extra_reserved_memory", "minimum_inference_memory", "load_models_gpu", "load_model_gpu", "loaded_models", "free_memory",
    "unload_all_models", "InterruptProcessingException", "interrupt_current_processing", "processing_interrupted",
    "throw_exception_if_processing_interrupted",
]  # fmt: skip

OOM_EXCEPTION = torch.OutOfMemoryError


# Devices ------------------------------------------------------------------------------------------------------------------


def get_torch_device() -> torch.device:
    """Where models of the current host run."""
    return current_host().memory.device


def get_torch_device_name(device: torch.device) -> str:
    return f"{device} {torch.cuda.get_device_name(device)}" if device.type == "cuda" else device.type


def is_device_cpu(device: Any) -> bool:
    return getattr(device, "type", None) == "cpu"


def is_device_cuda(device: Any) -> bool:
    return getattr(device, "type", None) == "cuda"


def is_device_mps(device: Any) -> bool:
    return getattr(device, "type", None) == "mps"


def cpu_mode() -> bool:
    return is_device_cpu(get_torch_device())


def mps_mode() -> bool:
    return is_device_mps(get_torch_device())


def intermediate_device() -> torch.device:
    """Where LATENT and IMAGE rest between nodes."""
    return CPU


def unet_offload_device() -> torch.device:
    return CPU


def unet_inital_load_device(parameters: int, dtype: torch.dtype) -> torch.device:
    """Where weights are read to: straight to the device when they fit beside what lies there."""
    device = get_torch_device()
    return device if not is_device_cpu(device) and parameters * dtype_size(dtype) < get_free_memory(device) / 2 else CPU


def text_encoder_device() -> torch.device:
    device = get_torch_device()
    return device if is_device_cuda(device) else CPU


def text_encoder_offload_device() -> torch.device:
    return CPU


def text_encoder_initial_device(load_device: torch.device, offload_device: torch.device, model_size: int = 0) -> torch.device:
    return offload_device


def vae_device() -> torch.device:
    return get_torch_device()


def vae_offload_device() -> torch.device:
    return CPU


# Dtypes -------------------------------------------------------------------------------------------------------------------

_ALL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def dtype_size(dtype: torch.dtype) -> int:
    return dtype.itemsize


def unet_dtype(
    device: torch.device | None = None, model_params: int = 0, supported_dtypes: Iterable[torch.dtype] = _ALL_DTYPES,
    weight_dtype: torch.dtype | None = None,
) -> torch.dtype:  # fmt: skip
    """The dtype a diffusion model's weights are kept in (see MemoryManager.weights_dtype)."""
    memory = current_host().memory
    return memory.weights_dtype(supported_dtypes, weight_dtype, device or memory.device)


def unet_manual_cast(
    weight_dtype: torch.dtype, inference_device: torch.device, supported_dtypes: Iterable[torch.dtype] = _ALL_DTYPES
) -> torch.dtype | None:
    """The dtype to compute in when it is not the weights' own, else None (see MemoryManager.compute_dtype)."""
    return current_host().memory.compute_dtype(weight_dtype, inference_device, supported_dtypes)


def should_use_fp16(
    device: torch.device | None = None, model_params: int = 0, prioritize_performance: bool = True, manual_cast: bool = False
) -> bool:
    memory = current_host().memory
    return memory.computes_in(torch.float16, device or memory.device)


def should_use_bf16(
    device: torch.device | None = None, model_params: int = 0, prioritize_performance: bool = True, manual_cast: bool = False
) -> bool:
    memory = current_host().memory
    return memory.computes_in(torch.bfloat16, device or memory.device)


def vae_dtype(device: torch.device | None = None, allowed_dtypes: Iterable[torch.dtype] = ()) -> torch.dtype:
    memory = current_host().memory
    return next((dtype for dtype in allowed_dtypes if memory.computes_in(dtype, device or memory.device)), torch.float32)


def text_encoder_dtype(device: torch.device | None = None) -> torch.dtype:
    """fp16 halves the memory of a text encoder on every device; its layers cast up where they compute in fp32."""
    return torch.float16


def supports_cast(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether weights may be kept in `dtype` on the device and cast when used."""
    return dtype in _ALL_DTYPES or (dtype.itemsize == 1 and dtype.is_floating_point and not is_device_mps(device))


def device_supports_non_blocking(device: Any) -> bool:
    """Only copies to a CUDA device are ordered with what follows; a copy to the host could be read before it has arrived."""
    return is_device_cuda(device)


def cast_to(
    weight: torch.Tensor, dtype: torch.dtype | None = None, device: torch.device | None = None, non_blocking: bool = False,
    copy: bool = False, stream: Any = None,
) -> torch.Tensor:  # fmt: skip
    """`weight` in another dtype and place; the tensor itself when nothing changes and no copy is asked for."""
    return weight.to(device=weight.device if device is None else device, dtype=dtype or weight.dtype, non_blocking=non_blocking, copy=copy)


def cast_to_device(tensor: torch.Tensor, device: torch.device, dtype: torch.dtype | None, copy: bool = False) -> torch.Tensor:
    return cast_to(tensor, dtype=dtype, device=device, non_blocking=device_supports_non_blocking(device), copy=copy)


def xformers_enabled() -> bool:
    return False


def pytorch_attention_enabled() -> bool:
    return True


def pytorch_attention_flash_attention() -> bool:
    """Whether attention needs memory linear in the tokens, which the memory estimates depend on."""
    return is_device_cuda(get_torch_device())


def force_upcast_attention_dtype() -> dict[torch.dtype, torch.dtype] | None:
    """fp16 attention overflows on Apple's GPUs, so it is computed in fp32 there."""
    return {torch.float16: torch.float32} if mps_mode() else None


# Memory -------------------------------------------------------------------------------------------------------------------


def module_size(module: torch.nn.Module) -> int:
    """Bytes of a module's parameters and buffers."""
    return sum(tensor.nelement() * tensor.element_size() for tensor in module.state_dict().values())


def get_free_memory(dev: torch.device | None = None, torch_free_too: bool = False):
    memory = current_host().memory
    free = memory.free(dev or memory.device)
    return (free, free) if torch_free_too else free


def get_total_memory(dev: torch.device | None = None, torch_total_too: bool = False):
    memory = current_host().memory
    total = memory.total(dev or memory.device)
    return (total, total) if torch_total_too else total


def extra_reserved_memory() -> int:
    return RESERVED_MEMORY


def minimum_inference_memory() -> int:
    return INFERENCE_MEMORY + RESERVED_MEMORY


def load_models_gpu(
    models: Iterable[Any], memory_required: float = 0, force_patch_weights: bool = False,
    minimum_memory_required: float | None = None, force_full_load: bool = False,
) -> None:  # fmt: skip
    current_host().memory.load(models, memory_required, force_patch_weights)


def load_model_gpu(model: Any) -> None:
    load_models_gpu([model])


def loaded_models(only_currently_used: bool = False) -> list[Any]:
    """The patchers whose models lie on their load devices, most recently used first."""
    return [entry.patcher for entry in current_host().memory.loaded if entry.patcher is not None]


def free_memory(memory_required: float, device: torch.device, keep_loaded: Iterable[Any] = ()) -> list[Any]:
    return current_host().memory.free_memory(memory_required, device, keep_loaded)


def unload_all_models() -> None:
    free_memory(float("inf"), get_torch_device())


# Interruption -------------------------------------------------------------------------------------------------------------


class InterruptProcessingException(Exception):
    """The user stopped the run. Not an error: the executor reports it as an interruption."""


def interrupt_current_processing(value: bool = True) -> None:
    """Ask the running prompt to stop at its next step, or take the request back."""
    flag = current_host().interrupt
    if value:
        flag.set()
    else:
        flag.clear()


def processing_interrupted() -> bool:
    return current_host().interrupt.is_set()


def throw_exception_if_processing_interrupted() -> None:
    """Raise InterruptProcessingException once for each request to stop."""
    flag = current_host().interrupt
    if flag.is_set():
        flag.clear()
        raise InterruptProcessingException
