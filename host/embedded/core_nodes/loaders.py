"""Nodes that load model files. The drop-downs list what is in the model folders; a name outside them is refused before a run."""

from __future__ import annotations

from ....errors import input_error
from .. import folder_paths
from .declare import CLIP, MODEL, CoreNode, SchemaNode, combo, files, number, tip

_DEVICE = {"device": combo("default", "cpu", advanced=True)}
_CLIP_TYPES = (
    "stable_diffusion", "stable_cascade", "sd3", "stable_audio", "mochi", "ltxv", "pixart", "cosmos", "lumina2", "wan", "hidream",
    "chroma", "ace", "omnigen2", "qwen_image", "hunyuan_image",
)  # fmt: skip
_STRENGTH = (1.0, -100.0, 100.0, 0.01)
# scale and shift between a tiny autoencoder's latents and its model's latent space
_TAESD = {"taesd": (0.18215, 0.0), "taesdxl": (0.13025, 0.0), "taesd3": (1.5305, 0.0609), "taef1": (0.3611, 0.1159)}


class CheckpointLoaderSimple(CoreNode):
    """Model, text encoder and VAE of one file; what the file does not hold is None."""

    DISPLAY_NAME = "Load Checkpoint"
    DESCRIPTION = "Loads a diffusion model checkpoint, diffusion models are used to denoise latents."
    CATEGORY = "loaders"
    REQUIRED = {"ckpt_name": files("checkpoints", tooltip="The name of the checkpoint (model) to load.")}
    RETURN_TYPES = ("MODEL", "CLIP", "VAE")
    OUTPUT_TOOLTIPS = (
        "The model used for denoising latents.",
        "The CLIP model used for encoding text prompts.",
        "The VAE model used for encoding and decoding images to and from latent space.",
    )
    FUNCTION = "load_checkpoint"

    def load_checkpoint(self, ckpt_name):
        from .. import sd

        path = folder_paths.get_full_path_or_raise("checkpoints", ckpt_name)
        embeddings = folder_paths.get_folder_paths("embeddings")
        return sd.load_checkpoint_guess_config(path, output_vae=True, output_clip=True, embedding_directory=embeddings)[:3]


class UNETLoader(CoreNode):
    """A diffusion model alone; the fp8 choices store its weights in 8 bits, `_fast` also multiplies in them."""

    DISPLAY_NAME = "Load Diffusion Model"
    CATEGORY = "advanced/loaders"
    REQUIRED = {
        "unet_name": files("diffusion_models"),
        "weight_dtype": combo("default", "fp8_e4m3fn", "fp8_e4m3fn_fast", "fp8_e5m2"),
    }
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "load_unet"

    def load_unet(self, unet_name, weight_dtype):
        import torch

        from .. import sd

        options = {}
        if weight_dtype != "default":
            options["dtype"] = torch.float8_e5m2 if weight_dtype == "fp8_e5m2" else torch.float8_e4m3fn
        if weight_dtype == "fp8_e4m3fn_fast":
            options["fp8_optimizations"] = True
        path = folder_paths.get_full_path_or_raise("diffusion_models", unet_name)
        return (sd.load_diffusion_model(path, model_options=options),)


def _load_clip(names: tuple[str, ...], kind: str, device: str = "default"):
    import torch

    from .. import sd

    options = {}
    if device == "cpu":
        options["load_device"] = options["offload_device"] = torch.device("cpu")
    clip = sd.load_clip(
        ckpt_paths=[folder_paths.get_full_path_or_raise("text_encoders", name) for name in names],
        embedding_directory=folder_paths.get_folder_paths("embeddings"),
        clip_type=getattr(sd.CLIPType, kind.upper(), sd.CLIPType.STABLE_DIFFUSION),
        model_options=options,
    )
    return (clip,)


class CLIPLoader(CoreNode):
    """One text encoder."""

    DISPLAY_NAME = "Load CLIP"
    DESCRIPTION = (
        "[Recipes]\n\nstable_diffusion: clip-l\nstable_cascade: clip-g\nsd3: t5 xxl/ clip-g / clip-l\nstable_audio: t5 base\n"
        "mochi: t5 xxl\ncosmos: old t5 xxl\nlumina2: gemma 2 2B\nwan: umt5 xxl\n hidream: llama-3.1 (Recommend) or t5\n"
        "omnigen2: qwen vl 2.5 3B"
    )
    CATEGORY = "advanced/loaders"
    REQUIRED = {"clip_name": files("text_encoders"), "type": combo(*_CLIP_TYPES)}
    OPTIONAL = _DEVICE
    RETURN_TYPES = ("CLIP",)
    FUNCTION = "load_clip"

    def load_clip(self, clip_name, type="stable_diffusion", device="default"):
        return _load_clip((clip_name,), type, device)


class DualCLIPLoader(CoreNode):
    """Two text encoders as one; their order does not matter."""

    DESCRIPTION = (
        "[Recipes]\n\nsdxl: clip-l, clip-g\nsd3: clip-l, clip-g / clip-l, t5 / clip-g, t5\nflux: clip-l, t5\n"
        "hidream: at least one of t5 or llama, recommended t5 and llama\nhunyuan_image: qwen2.5vl 7b and byt5 small"
    )
    CATEGORY = "advanced/loaders"
    REQUIRED = {
        "clip_name1": files("text_encoders"),
        "clip_name2": files("text_encoders"),
        "type": combo("sdxl", "sd3", "flux", "hunyuan_video", "hidream", "hunyuan_image"),
    }
    OPTIONAL = _DEVICE
    RETURN_TYPES = ("CLIP",)
    FUNCTION = "load_clip"

    def load_clip(self, clip_name1, clip_name2, type, device="default"):
        return _load_clip((clip_name1, clip_name2), type, device)


class TripleCLIPLoader(SchemaNode):
    """SD3's three text encoders as one."""

    DESCRIPTION = "[Recipes]\n\nsd3: clip-l, clip-g, t5"
    CATEGORY = "advanced/loaders"
    RELATIVE_PYTHON_MODULE = "comfy_extras.nodes_sd3"
    REQUIRED = {f"clip_name{number}": files("text_encoders") for number in (1, 2, 3)}
    RETURN_TYPES = ("CLIP",)
    FUNCTION = "execute"

    def execute(self, clip_name1, clip_name2, clip_name3):
        return _load_clip((clip_name1, clip_name2, clip_name3), "sd3")


def _tiny_autoencoder_file(name: str, part: str) -> str | None:
    """The file of a tiny autoencoder's "encoder" or "decoder" in the folder vae_approx."""
    candidates = folder_paths.get_filename_list("vae_approx")
    return next((file for file in candidates if file.startswith(f"{name}_{part}.")), None)


class VAELoader(CoreNode):
    """A latent codec: a file of the folder vae, or a tiny autoencoder whose two halves lie in vae_approx."""

    DISPLAY_NAME = "Load VAE"
    CATEGORY = "loaders"
    REQUIRED = {"vae_name": lambda: combo(*VAELoader.vae_list())}
    RETURN_TYPES = ("VAE",)
    FUNCTION = "load_vae"

    @staticmethod
    def vae_list() -> list[str]:
        whole = [name for name in _TAESD if all(_tiny_autoencoder_file(name, part) for part in ("encoder", "decoder"))]
        return [*folder_paths.get_filename_list("vae"), *whole, "pixel_space"]

    @staticmethod
    def load_taesd(name: str) -> dict:
        """Both halves in one state dict, with the scale and shift of the latents."""
        import torch

        from ..utils import load_torch_file

        weights = {}
        for part in ("encoder", "decoder"):
            file = _tiny_autoencoder_file(name, part)
            if file is None:
                remedy = f"Put {name}_{part}.safetensors into the folder vae_approx."
                raise input_error("Load VAE", "vae_name", name, "an autoencoder of which both halves are installed", remedy)
            half = load_torch_file(folder_paths.get_full_path_or_raise("vae_approx", file))
            weights |= {f"taesd_{part}.{key}": tensor for key, tensor in half.items()}
        weights["vae_scale"], weights["vae_shift"] = (torch.tensor(value) for value in _TAESD[name])
        return weights

    def load_vae(self, vae_name):
        import torch

        from .. import sd
        from ..utils import load_torch_file

        if vae_name == "pixel_space":
            weights = {"pixel_space_vae": torch.tensor(1.0)}
        elif vae_name in _TAESD:
            weights = self.load_taesd(vae_name)
        else:
            weights = load_torch_file(folder_paths.get_full_path_or_raise("vae", vae_name))
        vae = sd.VAE(sd=weights)
        vae.throw_exception_if_invalid()
        return (vae,)


class LoraLoader(CoreNode):
    """Low-rank changes on a model and its text encoder."""

    DISPLAY_NAME = "Load LoRA"
    DESCRIPTION = (
        "LoRAs are used to modify diffusion and CLIP models, altering the way in which latents are denoised such as applying styles. "
        "Multiple LoRA nodes can be linked together."
    )
    CATEGORY = "loaders"
    REQUIRED = {
        "model": tip(MODEL, "The diffusion model the LoRA will be applied to."),
        "clip": tip(CLIP, "The CLIP model the LoRA will be applied to."),
        "lora_name": files("loras", tooltip="The name of the LoRA."),
        "strength_model": number(*_STRENGTH, tooltip="How strongly to modify the diffusion model. This value can be negative."),
        "strength_clip": number(*_STRENGTH, tooltip="How strongly to modify the CLIP model. This value can be negative."),
    }
    RETURN_TYPES = ("MODEL", "CLIP")
    OUTPUT_TOOLTIPS = ("The modified diffusion model.", "The modified CLIP model.")
    FUNCTION = "load_lora"

    def load_lora(self, model, clip, lora_name, strength_model, strength_clip):
        from .. import sd
        from ..utils import load_torch_file

        if strength_model == 0 and strength_clip == 0:
            return (model, clip)
        weights = load_torch_file(folder_paths.get_full_path_or_raise("loras", lora_name), safe_load=True)
        return sd.load_lora_for_models(model, clip, weights, strength_model, strength_clip)


class LoraLoaderModelOnly(LoraLoader):
    """Low-rank changes on a model alone."""

    DISPLAY_NAME = None
    DESCRIPTION = LoraLoader.DESCRIPTION
    REQUIRED = {"model": MODEL, "lora_name": files("loras"), "strength_model": number(*_STRENGTH)}
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "load_lora_model_only"

    def load_lora_model_only(self, model, lora_name, strength_model):
        return (self.load_lora(model, None, lora_name, strength_model, 0)[0],)
