"""Prompts and what is written into a CONDITIONING: a list of [tensor (b, tokens, width), dict] that is copied, never changed."""

from __future__ import annotations

import logging

from ....errors import input_error
from .declare import CLIP, CONDITIONING, IMAGE, LATENT, MASK, VAE, CoreNode, SchemaNode, boolean, combo, integer, number, text, tip
from .inpaint import grey_out_mask, on_latent_grid

_FLUX = "comfy_extras.nodes_flux"
_PROMPT = {"multiline": True, "dynamicPrompts": True}
_LUMINA_SYSTEM_PROMPTS = {
    "superior": "You are an assistant designed to generate superior images with the superior "
    "degree of image-text alignment based on textual prompts or user prompts.",
    "alignment": "You are an assistant designed to generate high-quality images with the "
    "highest degree of image-text alignment based on textual prompts.",
}


def _set_values(conditioning: list, values: dict, append: bool = False) -> list:
    from ..node_helpers import conditioning_set_values

    return conditioning_set_values(conditioning, values, append=append)


def _require_clip(node: str, clip) -> None:
    if clip is None:
        remedy = "A checkpoint without a text encoder gives none: load one with Load CLIP and connect it here."
        raise input_error(node, "clip", None, "a text encoder", remedy)


class CLIPTextEncode(CoreNode):
    """A prompt, encoded."""

    DISPLAY_NAME = "CLIP Text Encode (Prompt)"
    DESCRIPTION = (
        "Encodes a text prompt using a CLIP model into an embedding that can be used to guide the diffusion model towards generating "
        "specific images."
    )
    CATEGORY = "conditioning"
    REQUIRED = {
        "text": text(**_PROMPT, tooltip="The text to be encoded."),
        "clip": tip(CLIP, "The CLIP model used for encoding the text."),
    }
    RETURN_TYPES = ("CONDITIONING",)
    OUTPUT_TOOLTIPS = ("A conditioning containing the embedded text used to guide the diffusion model.",)
    FUNCTION = "encode"

    def encode(self, clip, text):
        _require_clip(self.DISPLAY_NAME, clip)
        return (clip.encode_from_tokens_scheduled(clip.tokenize(text)),)


class CLIPTextEncodeLumina2(SchemaNode):
    """A prompt behind one of Lumina-Image 2's two published system prompts."""

    DISPLAY_NAME = "CLIP Text Encode for Lumina2"
    DESCRIPTION = (
        "Encodes a system prompt and a user prompt using a CLIP model into an embedding that can be used to guide the diffusion model "
        "towards generating specific images."
    )
    CATEGORY = "conditioning"
    RELATIVE_PYTHON_MODULE = "comfy_extras.nodes_lumina2"
    REQUIRED = {
        "system_prompt": combo(
            *_LUMINA_SYSTEM_PROMPTS,
            tooltip="Lumina2 provide two types of system prompts:"
            f"Superior: {_LUMINA_SYSTEM_PROMPTS['superior']} Alignment: {_LUMINA_SYSTEM_PROMPTS['alignment']}",
        ),
        "user_prompt": text(tooltip="The text to be encoded.", **_PROMPT),
        "clip": tip(CLIP, "The CLIP model used for encoding the text."),
    }
    RETURN_TYPES = ("CONDITIONING",)
    OUTPUT_TOOLTIPS = ("A conditioning containing the embedded text used to guide the diffusion model.",)
    FUNCTION = "execute"

    def execute(self, clip, user_prompt, system_prompt):
        _require_clip(self.DISPLAY_NAME, clip)
        prompt = f"{_LUMINA_SYSTEM_PROMPTS[system_prompt]} <Prompt Start> {user_prompt}"
        return (clip.encode_from_tokens_scheduled(clip.tokenize(prompt)),)


def _tokens_of(node: str, clip, prompt: str, part: str) -> list:
    tokens = clip.tokenize(prompt)
    if part not in tokens:
        allowed = f"a text encoder with the part '{part}'; this one has {', '.join(sorted(tokens))}"
        raise input_error(node, "clip", type(clip).__name__, allowed, "Load the encoders that the inputs name.")
    return tokens[part]


class CLIPTextEncodeFlux(SchemaNode):
    """Two prompts for Flux's two encoders, with the guidance value that its distilled model takes."""

    CATEGORY = "advanced/conditioning/flux"
    RELATIVE_PYTHON_MODULE = _FLUX
    REQUIRED = {"clip": CLIP, "clip_l": text(**_PROMPT), "t5xxl": text(**_PROMPT), "guidance": number(3.5, 0.0, 100.0, 0.1)}
    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "execute"

    def execute(self, clip, clip_l, t5xxl, guidance):
        _require_clip("CLIPTextEncodeFlux", clip)
        tokens = dict(clip.tokenize(clip_l))
        tokens["t5xxl"] = _tokens_of("CLIPTextEncodeFlux", clip, t5xxl, "t5xxl")
        return (clip.encode_from_tokens_scheduled(tokens, add_dict={"guidance": guidance}),)


class CLIPTextEncodeSD3(SchemaNode):
    """Three prompts for SD3's three encoders; an empty one can stay without tokens."""

    CATEGORY = "advanced/conditioning"
    RELATIVE_PYTHON_MODULE = "comfy_extras.nodes_sd3"
    REQUIRED = {
        "clip": CLIP,
        "clip_l": text(**_PROMPT),
        "clip_g": text(**_PROMPT),
        "t5xxl": text(**_PROMPT),
        "empty_padding": combo("none", "empty_prompt"),
    }
    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "execute"

    def execute(self, clip, clip_l, clip_g, t5xxl, empty_padding):
        _require_clip("CLIPTextEncodeSD3", clip)
        tokens = dict(clip.tokenize(clip_g))
        for part, prompt in (("g", clip_g), ("l", clip_l), ("t5xxl", t5xxl)):
            empty = not prompt and empty_padding == "none"
            tokens[part] = [] if empty else list(_tokens_of("CLIPTextEncodeSD3", clip, prompt, part))
        for short, long in (("l", "g"), ("g", "l")):  # both CLIP encoders must give equally many chunks
            while len(tokens[short]) < len(tokens[long]):
                tokens[short] += _tokens_of("CLIPTextEncodeSD3", clip, "", short)
        return (clip.encode_from_tokens_scheduled(tokens),)


class CLIPSetLastLayer(CoreNode):
    """A text encoder that stops at an earlier layer."""

    DISPLAY_NAME = "CLIP Set Last Layer"
    CATEGORY = "conditioning"
    REQUIRED = {"clip": CLIP, "stop_at_clip_layer": integer(-1, -24, -1, 1)}
    RETURN_TYPES = ("CLIP",)
    FUNCTION = "set_last_layer"

    def set_last_layer(self, clip, stop_at_clip_layer):
        _require_clip(self.DISPLAY_NAME, clip)
        clip = clip.clone()
        clip.clip_layer(stop_at_clip_layer)
        return (clip,)


class ConditioningCombine(CoreNode):
    """Both conditionings; their predictions are averaged."""

    DISPLAY_NAME = "Conditioning (Combine)"
    CATEGORY = "conditioning"
    REQUIRED = {"conditioning_1": CONDITIONING, "conditioning_2": CONDITIONING}
    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "combine"

    def combine(self, conditioning_1, conditioning_2):
        return (conditioning_1 + conditioning_2,)


def _only_first(node: str, conditioning: list):
    if len(conditioning) > 1:
        logging.warning("%s: conditioning_from holds %d entries, only the first is used", node, len(conditioning))
    return conditioning[0]


class ConditioningAverage(CoreNode):
    """strength · to + (1 − strength) · from, of the tokens and of the pooled vectors; `from` is cut or zero-padded to `to`'s tokens."""

    CATEGORY = "conditioning"
    REQUIRED = {
        "conditioning_to": CONDITIONING,
        "conditioning_from": CONDITIONING,
        "conditioning_to_strength": number(1.0, 0.0, 1.0, 0.01),
    }
    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "addWeighted"

    def addWeighted(self, conditioning_to, conditioning_from, conditioning_to_strength):
        import torch

        tokens_from, options_from = _only_first("ConditioningAverage", conditioning_from)
        pooled_from = options_from.get("pooled_output")
        strength = conditioning_to_strength
        averaged = []
        for tokens_to, options_to in conditioning_to:
            count = tokens_to.shape[1]
            other = torch.nn.functional.pad(tokens_from[:, :count], (0, 0, 0, max(0, count - tokens_from.shape[1])))  # (b, count, width)
            options = dict(options_to)
            if pooled_from is not None:
                pooled_to = options_to.get("pooled_output", pooled_from)
                options["pooled_output"] = pooled_from if pooled_to is None else pooled_to * strength + pooled_from * (1.0 - strength)
            averaged.append([tokens_to * strength + other * (1.0 - strength), options])
        return (averaged,)


class ConditioningConcat(CoreNode):
    """The tokens of `from` behind those of every entry of `to`."""

    DISPLAY_NAME = "Conditioning (Concat)"
    CATEGORY = "conditioning"
    REQUIRED = {"conditioning_to": CONDITIONING, "conditioning_from": CONDITIONING}
    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "concat"

    def concat(self, conditioning_to, conditioning_from):
        import torch

        tokens_from, _ = _only_first(self.DISPLAY_NAME, conditioning_from)
        return ([[torch.cat((tokens, tokens_from), 1), dict(options)] for tokens, options in conditioning_to],)


class ConditioningSetMask(CoreNode):
    """The part of the picture that a conditioning guides."""

    DISPLAY_NAME = "Conditioning (Set Mask)"
    CATEGORY = "conditioning"
    REQUIRED = {
        "conditioning": CONDITIONING,
        "mask": MASK,
        "strength": number(1.0, 0.0, 10.0, 0.01),
        "set_cond_area": combo("default", "mask bounds"),
    }
    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "append"

    def append(self, conditioning, mask, set_cond_area, strength):
        mask = mask if mask.ndim >= 3 else mask.unsqueeze(0)
        values = {"mask": mask, "set_area_to_bounds": set_cond_area != "default", "mask_strength": strength}
        return (_set_values(conditioning, values),)


class ConditioningSetTimestepRange(CoreNode):
    """The part of the sampling, as fractions of its way, in which a conditioning is used."""

    CATEGORY = "advanced/conditioning"
    REQUIRED = {"conditioning": CONDITIONING, "start": number(0.0, 0.0, 1.0, 0.001), "end": number(1.0, 0.0, 1.0, 0.001)}
    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "set_range"

    def set_range(self, conditioning, start, end):
        return (_set_values(conditioning, {"start_percent": start, "end_percent": end}),)


class ConditioningZeroOut(CoreNode):
    """Tokens and pooled vector replaced by zeros."""

    CATEGORY = "advanced/conditioning"
    REQUIRED = {"conditioning": CONDITIONING}
    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "zero_out"

    def zero_out(self, conditioning):
        import torch

        zeroed = []
        for tokens, options in conditioning:
            zeros = {
                key: torch.zeros_like(options[key]) for key in ("pooled_output", "conditioning_lyrics") if options.get(key) is not None
            }
            zeroed.append([torch.zeros_like(tokens), {**options, **zeros}])
        return (zeroed,)


class FluxGuidance(SchemaNode):
    """The guidance value that a guidance-distilled Flux model takes as an input."""

    CATEGORY = "advanced/conditioning/flux"
    RELATIVE_PYTHON_MODULE = _FLUX
    REQUIRED = {"conditioning": CONDITIONING, "guidance": number(3.5, 0.0, 100.0, 0.1)}
    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "execute"

    def execute(self, conditioning, guidance):
        return (_set_values(conditioning, {"guidance": guidance}),)


class FluxDisableGuidance(SchemaNode):
    """No guidance input at all, also for a model that has one."""

    DESCRIPTION = "This node completely disables the guidance embed on Flux and Flux like models"
    CATEGORY = "advanced/conditioning/flux"
    RELATIVE_PYTHON_MODULE = _FLUX
    REQUIRED = {"conditioning": CONDITIONING}
    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "execute"

    def execute(self, conditioning):
        return (_set_values(conditioning, {"guidance": None}),)


class FluxKontextMultiReferenceLatentMethod(SchemaNode):
    """How several reference latents are placed in Flux's position grid."""

    CATEGORY = "advanced/conditioning/flux"
    RELATIVE_PYTHON_MODULE = _FLUX
    REQUIRED = {"conditioning": CONDITIONING, "reference_latents_method": combo("offset", "index", "uxo/uno")}
    RETURN_TYPES = ("CONDITIONING",)
    EXPERIMENTAL = True
    FUNCTION = "execute"

    def execute(self, conditioning, reference_latents_method):
        method = "uxo" if reference_latents_method == "uxo/uno" else reference_latents_method
        return (_set_values(conditioning, {"reference_latents_method": method}),)


class ReferenceLatent(SchemaNode):
    """One more picture that an editing model looks at."""

    DESCRIPTION = (
        "This node sets the guiding latent for an edit model. If the model supports it you can chain multiple to set multiple "
        "reference images."
    )
    CATEGORY = "advanced/conditioning/edit_models"
    RELATIVE_PYTHON_MODULE = "comfy_extras.nodes_edit_model"
    REQUIRED = {"conditioning": CONDITIONING}
    OPTIONAL = {"latent": LATENT}
    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "execute"

    def execute(self, conditioning, latent=None):
        if latent is not None:
            conditioning = _set_values(conditioning, {"reference_latents": [latent["samples"]]}, append=True)
        return (conditioning,)


class InpaintModelConditioning(CoreNode):
    """For models trained to fill: the greyed-out picture and its mask go into both conditionings, the whole picture into the latent."""

    CATEGORY = "conditioning/inpaint"
    REQUIRED = {
        "positive": CONDITIONING,
        "negative": CONDITIONING,
        "vae": VAE,
        "pixels": IMAGE,
        "mask": MASK,
        "noise_mask": boolean(
            True,
            tooltip="Add a noise mask to the latent so sampling will only happen within the mask. Might improve results or completely "
            "break things depending on the model.",
        ),
    }
    RETURN_TYPES = ("CONDITIONING", "CONDITIONING", "LATENT")
    RETURN_NAMES = ("positive", "negative", "latent")
    FUNCTION = "encode"

    def encode(self, positive, negative, pixels, vae, mask, noise_mask=True):
        cropped, mask = on_latent_grid(pixels, mask, 8)
        concat = {"concat_latent_image": vae.encode(grey_out_mask(cropped, mask)), "concat_mask": mask}
        latent = {"samples": vae.encode(pixels)}
        if noise_mask:
            latent["noise_mask"] = mask
        return (_set_values(positive, concat), _set_values(negative, concat), latent)
