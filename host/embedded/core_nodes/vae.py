"""Between pictures (b, h, w, c) in 0..1 and latents (b, c, h, w): encoding, decoding, and encoding with a hole."""

from __future__ import annotations

from ....errors import input_error
from .declare import IMAGE, LATENT, MASK, VAE, CoreNode, integer, tip
from .inpaint import grey_out_mask, grow_mask, on_latent_grid


def _require_vae(node: str, vae) -> None:
    if vae is None:
        raise input_error(node, "vae", None, "a VAE", "A checkpoint without a VAE gives none: load one with Load VAE and connect it here.")


def _frames_in_batch(images):
    """(b, t, h, w, c) of a video codec as (b · t, h, w, c)."""
    return images.reshape(-1, *images.shape[-3:]) if images.ndim == 5 else images


class VAEDecode(CoreNode):
    """A latent as a picture."""

    DISPLAY_NAME = "VAE Decode"
    DESCRIPTION = "Decodes latent images back into pixel space images."
    CATEGORY = "latent"
    REQUIRED = {
        "samples": tip(LATENT, "The latent to be decoded."),
        "vae": tip(VAE, "The VAE model used for decoding the latent."),
    }
    RETURN_TYPES = ("IMAGE",)
    OUTPUT_TOOLTIPS = ("The decoded image.",)
    FUNCTION = "decode"

    def decode(self, vae, samples):
        _require_vae(self.DISPLAY_NAME, vae)
        return (_frames_in_batch(vae.decode(samples["samples"])),)


class VAEEncode(CoreNode):
    """A picture as a latent; alpha is dropped."""

    DISPLAY_NAME = "VAE Encode"
    CATEGORY = "latent"
    REQUIRED = {"pixels": IMAGE, "vae": VAE}
    RETURN_TYPES = ("LATENT",)
    FUNCTION = "encode"

    def encode(self, vae, pixels):
        _require_vae(self.DISPLAY_NAME, vae)
        return ({"samples": vae.encode(pixels[..., :3])},)


def _temporal(verb: str) -> dict:
    frames = f"Only used for video VAEs: Amount of frames to {verb} at a time."
    return {
        "temporal_size": integer(64, 8, 4096, 4, tooltip=frames),
        "temporal_overlap": integer(8, 4, 4096, 4, tooltip="Only used for video VAEs: Amount of frames to overlap."),
    }


class VAEDecodeTiled(CoreNode):
    """As VAEDecode, tile by tile; sizes are in pixels, the overlap is at most a quarter of the tile."""

    DISPLAY_NAME = "VAE Decode (Tiled)"
    CATEGORY = "_for_testing"
    REQUIRED = {
        "samples": LATENT,
        "vae": VAE,
        "tile_size": integer(512, 64, 4096, 32),
        "overlap": integer(64, 0, 4096, 32),
        **_temporal("decode"),
    }
    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "decode"

    def decode(self, vae, samples, tile_size, overlap=64, temporal_size=64, temporal_overlap=8):
        _require_vae(self.DISPLAY_NAME, vae)
        overlap = min(overlap, tile_size // 4)
        ratio = vae.spacial_compression_decode()
        tiles = {"tile_x": tile_size // ratio, "tile_y": tile_size // ratio, "overlap": overlap // ratio}
        return (_frames_in_batch(vae.decode_tiled(samples["samples"], **tiles)),)


class VAEEncodeTiled(CoreNode):
    """As VAEEncode, tile by tile."""

    DISPLAY_NAME = "VAE Encode (Tiled)"
    CATEGORY = "_for_testing"
    REQUIRED = {
        "pixels": IMAGE,
        "vae": VAE,
        "tile_size": integer(512, 64, 4096, 64),
        "overlap": integer(64, 0, 4096, 32),
        **_temporal("encode"),
    }
    RETURN_TYPES = ("LATENT",)
    FUNCTION = "encode"

    def encode(self, vae, pixels, tile_size, overlap, temporal_size=64, temporal_overlap=8):
        _require_vae(self.DISPLAY_NAME, vae)
        return ({"samples": vae.encode_tiled(pixels[..., :3], tile_x=tile_size, tile_y=tile_size, overlap=overlap)},)


class VAEEncodeForInpaint(CoreNode):
    """The picture with grey where the mask is, and a noise mask at pixel resolution that reaches a little further."""

    DISPLAY_NAME = "VAE Encode (for Inpainting)"
    CATEGORY = "latent/inpaint"
    REQUIRED = {"pixels": IMAGE, "vae": VAE, "mask": MASK, "grow_mask_by": integer(6, 0, 64, 1)}
    RETURN_TYPES = ("LATENT",)
    FUNCTION = "encode"

    def encode(self, vae, pixels, mask, grow_mask_by=6):
        _require_vae(self.DISPLAY_NAME, vae)
        pixels, mask = on_latent_grid(pixels, mask, vae.downscale_ratio)
        grown = grow_mask(mask, grow_mask_by) if grow_mask_by else mask
        return ({"samples": vae.encode(grey_out_mask(pixels, mask)), "noise_mask": grown.round()},)
