"""What wraps a transformer for the sampler: latent scaling, conditions → network inputs, dtypes, memory estimates.

Attribute names are those that nodes written for ComfyUI reach for: model_sampling, latent_format, diffusion_model, model_config,
current_patcher, manual_cast_dtype.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch

from ...errors import input_error
from .conds import CONDConstant, CONDCrossAttn, CONDList, CONDNoiseShape, CONDRegular
from .latent_formats import LatentFormat
from .model_management import cast_to_device, dtype_size, pytorch_attention_flash_attention
from .model_sampling import CONST, EPS, V_PREDICTION, ModelSamplingDiscrete, ModelSamplingDiscreteFlow, ModelSamplingFlux
from .patcher_extension import WrapperExecutor, WrappersMP, get_all_wrappers
from .utils import common_upscale, resize_to_batch_size, upscale_dit_mask

__all__ = ["BaseModel", "Flux", "Lumina2", "ModelConfig", "ModelType", "SD3", "model_sampling"]

MIB = 1024**2


class ModelType(Enum):
    """Prediction and noise schedule together; the numbers are ComfyUI's."""

    EPS = 1
    V_PREDICTION = 2
    FLOW = 6
    FLUX = 8


_SAMPLING = {
    ModelType.EPS: (ModelSamplingDiscrete, EPS),
    ModelType.V_PREDICTION: (ModelSamplingDiscrete, V_PREDICTION),
    ModelType.FLOW: (ModelSamplingDiscreteFlow, CONST),
    ModelType.FLUX: (ModelSamplingFlux, CONST),
}


@dataclass(frozen=True)
class ModelConfig:
    """What is known of a model apart from its weights.

    unet_config: sizes under the names of the transformer's parameters, with "image_model" as the family.
    memory_usage_factor: bytes a latent cell costs while sampling, relative to the formula in BaseModel.memory_required.
    manual_cast_dtype: what layers compute in where the weights are kept in another dtype, else None.
    """

    image_model: str
    unet_config: dict[str, Any]
    latent_format: LatentFormat
    model_type: ModelType
    sampling_settings: dict[str, float] = field(default_factory=dict)
    memory_usage_factor: float = 2.0
    supported_inference_dtypes: tuple[torch.dtype, ...] = (torch.float16, torch.bfloat16, torch.float32)
    manual_cast_dtype: torch.dtype | None = None


def model_sampling(model_config: ModelConfig, model_type: ModelType) -> torch.nn.Module:
    """The model_sampling object: a table of sigmas joined with the meaning of the model's output."""
    return type("ModelSampling", _SAMPLING[model_type], {})(model_config)


def _converted(value: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """A condition's tensors on the model's device, floats in its compute dtype; token numbers and other values as they are."""
    if isinstance(value, list):
        return [_converted(entry, dtype, device) for entry in value]
    if not isinstance(value, torch.Tensor):
        return value
    return cast_to_device(value, device, None if value.dtype in (torch.int, torch.long) else dtype)


class BaseModel(torch.nn.Module):
    """A network with everything a sampler needs to call it."""

    # Conditions whose size adds to the memory estimate.
    memory_usage_factor_conds: tuple[str, ...] = ()

    def __init__(self, model_config: ModelConfig, diffusion_model: torch.nn.Module):
        super().__init__()
        self.model_config = model_config
        self.latent_format = model_config.latent_format
        self.manual_cast_dtype = model_config.manual_cast_dtype
        self.model_type = model_config.model_type
        self.memory_usage_factor = model_config.memory_usage_factor
        self.diffusion_model = diffusion_model
        self.model_sampling = model_sampling(model_config, model_config.model_type)
        self.device: torch.device | None = None
        self.current_patcher: Any = None
        self.adm_channels = model_config.unet_config.get("vec_in_dim", 0)
        self.concat_keys: tuple[str, ...] = ()
        logging.debug("%s: weights %s, computes in %s", type(self).__name__, self.get_dtype(), self.manual_cast_dtype or self.get_dtype())

    # Calling the network

    def apply_model(
        self, x: torch.Tensor, t: torch.Tensor, c_concat: torch.Tensor | None = None, c_crossattn: torch.Tensor | None = None,
        control: dict | None = None, transformer_options: dict | None = None, **kwargs,
    ) -> torch.Tensor:  # fmt: skip
        """x (b, c, h, w) at sigmas t (b,) → denoised (b, c, h, w), through the APPLY_MODEL wrappers.

        c_concat: channels that join x. c_crossattn: text states (b, n, d). kwargs: the other conditions, tensors or lists of them.
        """
        options = {} if transformer_options is None else transformer_options
        wrappers = get_all_wrappers(WrappersMP.APPLY_MODEL, options)
        executor = WrapperExecutor.new_class_executor(self._apply_model, self, wrappers)
        return executor.execute(x, t, c_concat, c_crossattn, control, options, **kwargs)

    def _apply_model(self, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **kwargs):
        sigma = t
        xc = self.model_sampling.calculate_input(sigma, x)
        if c_concat is not None:
            xc = torch.cat((xc, cast_to_device(c_concat, xc.device, xc.dtype)), dim=1)
        dtype = self.manual_cast_dtype or self.get_dtype()
        xc = xc.to(dtype)
        context = None if c_crossattn is None else cast_to_device(c_crossattn, xc.device, dtype)
        conds = {name: _converted(value, dtype, xc.device) for name, value in kwargs.items()}
        timestep = self.process_timestep(self.model_sampling.timestep(t).float(), x=x, **conds)
        options = {} if transformer_options is None else transformer_options
        out = self.diffusion_model(xc, timestep, context=context, control=control, transformer_options=options, **conds)
        return self.model_sampling.calculate_denoised(sigma, out.float(), x)

    def process_timestep(self, timestep: torch.Tensor, **kwargs) -> torch.Tensor:
        """The time (b,) the network is given; a hook for models that see other times."""
        return timestep

    def get_dtype(self) -> torch.dtype:
        return self.diffusion_model.dtype

    # Conditions

    def encode_adm(self, **kwargs) -> torch.Tensor | None:
        """The pooled text vector (b, d)."""
        return None

    def concat_cond(self, **kwargs) -> torch.Tensor | None:
        """Channels (b, c, h, w) that join the latent; models that were trained without any have none."""
        return None

    def extra_conds(self, **kwargs) -> dict[str, CONDRegular]:
        """A conditioning entry and the facts of the run (noise, device, latent_image, …) → inputs of the network by name."""
        out: dict[str, CONDRegular] = {}
        concat = self.concat_cond(**kwargs)
        if concat is None:
            concat = kwargs.get("noise_concat")
        if concat is not None:
            out["c_concat"] = CONDNoiseShape(concat)
        adm = self.encode_adm(**kwargs)
        if adm is not None:
            out["y"] = CONDRegular(adm)
        if kwargs.get("cross_attn") is not None:
            out["c_crossattn"] = self._text(kwargs["cross_attn"])
        if kwargs.get("cross_attn_controlnet") is not None:
            out["crossattn_controlnet"] = CONDCrossAttn(kwargs["cross_attn_controlnet"])
        return out

    def _text(self, states: torch.Tensor) -> CONDRegular:
        return CONDCrossAttn(states)

    def extra_conds_shapes(self, **kwargs) -> dict[str, list[int]]:
        """Sizes of conditions that count in the memory estimate before they exist."""
        return {}

    # Latents

    def process_latent_in(self, latent: torch.Tensor) -> torch.Tensor:
        return self.latent_format.process_in(latent)

    def process_latent_out(self, latent: torch.Tensor) -> torch.Tensor:
        return self.latent_format.process_out(latent)

    def scale_latent_inpaint(self, sigma: torch.Tensor, noise: torch.Tensor, latent_image: torch.Tensor, **kwargs) -> torch.Tensor:
        """The kept part of the picture at noise level sigma (b,)."""
        per_sample = sigma.reshape([sigma.shape[0]] + [1] * (noise.ndim - 1))
        return self.model_sampling.noise_scaling(per_sample, noise, latent_image)

    # Memory and saving

    def memory_required(self, input_shape: list[int], cond_shapes: dict[str, list] | None = None) -> float:
        """Bytes of activations for a latent of `input_shape` and the conditions of `cond_shapes`.

        Linear in the latent's area; the factors are those measured for ComfyUI, so that both hosts split batches alike.
        """
        shapes = [input_shape]
        for name in self.memory_usage_factor_conds:
            shapes += (cond_shapes or {}).get(name) or []
        area = sum(shape[0] * math.prod(shape[2:]) for shape in shapes)
        if pytorch_attention_flash_attention():
            return area * dtype_size(self.manual_cast_dtype or self.get_dtype()) * 0.01 * self.memory_usage_factor * MIB
        return area * 0.15 * self.memory_usage_factor * MIB

    def state_dict_for_saving(self, clip_state_dict: dict | None = None, vae_state_dict: dict | None = None) -> dict[str, torch.Tensor]:
        """One checkpoint that both hosts load again."""
        own = self.diffusion_model.state_dict()
        parts = (("model.diffusion_model.", own), ("vae.", vae_state_dict), ("text_encoders.", clip_state_dict))
        return {prefix + key: tensor for prefix, tensors in parts for key, tensor in (tensors or {}).items()}


def _pooled(model: str, conds: dict[str, Any]) -> torch.Tensor | None:
    if "pooled_output" not in conds:
        raise input_error(
            model, "conditioning", sorted(key for key in conds if key in ("cross_attn", "guidance", "prompt_type")),
            "a conditioning with a pooled_output", "Encode the prompt with the text encoder of this model family.",
        )  # fmt: skip
    return conds["pooled_output"]


class Flux(BaseModel):
    memory_usage_factor_conds = ("ref_latents",)

    def encode_adm(self, **kwargs) -> torch.Tensor | None:
        return _pooled("Flux", kwargs)

    def _text(self, states: torch.Tensor) -> CONDRegular:
        return CONDRegular(states)  # image tokens see positions of text tokens, so repeating text would change the result

    def concat_cond(self, **kwargs) -> torch.Tensor | None:
        """Control models see a second latent, fill models also a mask of 8 × 8 channels; plain Flux has none."""
        patch = self.diffusion_model.patch_size
        channels = self.diffusion_model.img_in.weight.shape[1] // (patch * patch)
        own = self.model_config.unet_config["out_channels"]
        if channels <= own:
            return None
        noise, device = kwargs["noise"], kwargs["device"]
        image = kwargs.get("concat_latent_image")
        if image is None:
            image = torch.zeros_like(noise)
        image = common_upscale(image.to(device), noise.shape[-1], noise.shape[-2], "bilinear", "center")
        image = self.process_latent_in(resize_to_batch_size(image, noise.shape[0]))
        if channels <= own * 2:
            return image
        mask = kwargs.get("concat_mask", kwargs.get("denoise_mask"))
        if mask is None:
            mask = torch.ones_like(noise)[:, :1]
        mask = torch.mean(mask, dim=1, keepdim=True).to(device)
        mask = common_upscale(mask, noise.shape[-1] * 8, noise.shape[-2] * 8, "bilinear", "center")
        mask = torch.nn.functional.pixel_unshuffle(mask, 8)  # (b, 64, h, w): the mask at pixel resolution
        return torch.cat((image, resize_to_batch_size(mask, noise.shape[0])), dim=1)

    def extra_conds(self, **kwargs) -> dict[str, CONDRegular]:
        out = super().extra_conds(**kwargs)
        mask = kwargs.get("attention_mask")
        if mask is not None:
            patch = self.diffusion_model.patch_size
            grid = tuple(math.ceil(side / patch) for side in kwargs["noise"].shape[2:4])
            out["attention_mask"] = CONDRegular(upscale_dit_mask(mask, kwargs["attention_mask_img_shape"], grid))
        guidance = kwargs.get("guidance", 3.5)
        if guidance is not None:
            out["guidance"] = CONDRegular(torch.FloatTensor([guidance]))
        references = kwargs.get("reference_latents")
        if references is not None:
            out["ref_latents"] = CONDList([self.process_latent_in(latent) for latent in references])
            if kwargs.get("reference_latents_method") is not None:
                out["ref_latents_method"] = CONDConstant(kwargs["reference_latents_method"])
        return out

    def extra_conds_shapes(self, **kwargs) -> dict[str, list[int]]:
        references = kwargs.get("reference_latents")
        if references is None:
            return {}
        return {"ref_latents": [1, 16, sum(math.prod(latent.size()) for latent in references) // 16]}


class SD3(BaseModel):
    def encode_adm(self, **kwargs) -> torch.Tensor | None:
        return _pooled("SD3", kwargs)

    def _text(self, states: torch.Tensor) -> CONDRegular:
        return CONDRegular(states)


class Lumina2(BaseModel):
    def _text(self, states: torch.Tensor) -> CONDRegular:
        return CONDRegular(states)

    def extra_conds(self, **kwargs) -> dict[str, CONDRegular]:
        out = super().extra_conds(**kwargs)
        mask = kwargs.get("attention_mask")
        if mask is not None:
            used = int(mask.sum())
            if used != mask.numel():
                out["attention_mask"] = CONDRegular(mask)
            out["num_tokens"] = CONDConstant(max(1, used))
        return out


MODEL_CLASSES: dict[str, Callable[..., BaseModel]] = {"flux": Flux, "sd3": SD3, "lumina2": Lumina2}
