"""Tiny model palette: the small trained model as MODEL, CLIP and VAE, an empty latent of its size, and its list of words."""

from __future__ import annotations

from .declare import Node, Output, integer, socket

MAX_RESOLUTION = 16384


def tiny_latent(codec):
    """The latent format of the tiny model, for a host's model around its transformer."""
    from ..host import LatentFormat
    from ..tiny.codec import CELL

    factors, offsets = codec.preview_factors()

    class TinyLatent(LatentFormat):
        """The codec's output is the model's own space: nothing is shifted or scaled."""

        latent_channels = codec.basis.shape[1]
        spacial_downscale_ratio = CELL
        latent_rgb_factors = factors
        latent_rgb_factors_bias = offsets

    return TinyLatent()


class RectiflowLoadTiny(Node):
    """Loads the small trained model that ships with Rectiflow: 64×64 pictures of 125 things from prompts like "noto cat on blue"."""

    TITLE = "Load Tiny Model"
    GROUP = "tiny model"
    SEARCH_ALIASES = ["checkpoint", "emoji", "test model"]
    INPUTS = ()
    OUTPUTS = (
        Output("MODEL", "model", "A Flux-type transformer of 13.4 million parameters, flow shift 1."),
        Output("CLIP", "clip", "Its text encoder; a prompt reads: style thing on colour."),
        Output("VAE", "vae", "Its linear codec: 4×4 pixels are one latent cell of 16 channels."),
    )

    def run(self):
        import torch

        from ..host import ModelPatcher, build_flux_model, intermediate_device, load_models_gpu
        from ..tiny.clip import TinyCLIP, TinyTextEncoder
        from ..tiny.codec import LinearCodec
        from ..tiny.placement import Placement
        from ..tiny.text import Vocabulary
        from ..tiny.vae import TinyVAE
        from ..tiny.weights import FLUX_SIZES, load_weights

        weights = load_weights()
        codec = LinearCodec(weights.codec_basis, weights.codec_scale, weights.codec_mean)

        def placed(module) -> Placement:
            patcher = ModelPatcher(module, load_device=codec.basis.device, offload_device=codec.basis.device)
            return Placement(patcher, lambda patcher: load_models_gpu([patcher]), intermediate_device())

        encoder = TinyTextEncoder(weights.text_embedding, weights.style_embedding)
        with torch.inference_mode(False):  # graphs run in inference mode, whose weights no later node could train
            model = build_flux_model(weights.transformer, FLUX_SIZES, tiny_latent(codec))
        return (model, TinyCLIP(encoder, Vocabulary.load(), placed(encoder)), TinyVAE(codec, placed(codec)))


class RectiflowEmptyLatent(Node):
    """An empty latent of the size and channel count that the linked VAE works with, whatever its ratio is."""

    TITLE = "Empty Latent for VAE"
    GROUP = "tiny model"
    SEARCH_ALIASES = ["empty latent image", "size"]
    INPUTS = (
        socket("vae", "VAE", "Decides the pixels of a latent cell and the channels."),
        integer("width", 64, 8, MAX_RESOLUTION, "Width of the picture in pixels.", step=8),
        integer("height", 64, 8, MAX_RESOLUTION, "Height of the picture in pixels.", step=8),
        integer("batch_size", 1, 1, 4096, "Pictures in one run."),
    )
    OUTPUTS = (Output("LATENT", "latent", "Zeros of the right shape."),)

    def run(self, vae, width: int, height: int, batch_size: int):
        import torch

        from ..host import intermediate_device

        ratio = vae.spacial_compression_decode()
        cells = (batch_size, vae.latent_channels, height // ratio, width // ratio)
        return ({"samples": torch.zeros(cells, device=intermediate_device())},)


class RectiflowTinyWords(Node):
    """Lists every style, colour and thing that the tiny model knows; link it to Preview Any."""

    TITLE = "Tiny Model Words"
    GROUP = "tiny model"
    SEARCH_ALIASES = ["vocabulary", "prompt help", "tokens"]
    INPUTS = ()
    OUTPUTS = (Output("STRING", "words", "The vocabulary as text."),)

    def run(self):
        from ..tiny.text import Vocabulary

        return (Vocabulary.load().listing(),)
