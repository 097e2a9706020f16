"""Reading the weight file: the transformer in Flux's layout, two embedding tables, the codec's matrices."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

__all__ = ["FLUX_SIZES", "TinyWeights", "WEIGHTS_FILE", "load_weights"]

WEIGHTS_FILE = Path(__file__).with_name("tiny-emoji-flux.safetensors")

# The constructor arguments of the Flux class on either host, under the names that both use.
FLUX_SIZES = {
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": 2,
    "vec_in_dim": 64,
    "context_in_dim": 128,
    "hidden_size": 256,
    "mlp_ratio": 4.0,
    "num_heads": 4,
    "depth": 3,
    "depth_single_blocks": 6,
    "axes_dim": [8, 28, 28],
    "theta": 10000,
    "qkv_bias": True,
    "guidance_embed": False,
}


@dataclass(frozen=True)
class TinyWeights:
    """The file's tensors, by the part that uses them.

    transformer: Flux checkpoint keys without a prefix → fp16 tensors.
    text_embedding: (144, 128), one row a token; row 0 is padding.
    style_embedding: (3, 64), the pooled vector of twemoji, noto and no style.
    codec_basis: (48, 16), codec_scale: (16,), codec_mean: (48,); see codec.LinearCodec.
    """

    transformer: dict[str, torch.Tensor]
    text_embedding: torch.Tensor
    style_embedding: torch.Tensor
    codec_basis: torch.Tensor
    codec_scale: torch.Tensor
    codec_mean: torch.Tensor


def load_weights(path: Path = WEIGHTS_FILE) -> TinyWeights:
    """Read the weights as ordinary tensors, also when called from inside `torch.inference_mode()` as graph engines do.

    Tensors born in inference mode could never take part in a backward pass, which training and steering need.
    """
    with torch.inference_mode(False):
        tensors = load_file(str(path), device="cpu")
    return TinyWeights(
        text_embedding=tensors.pop("text.embedding"),
        style_embedding=tensors.pop("style.embedding"),
        codec_basis=tensors.pop("codec.basis"),
        codec_scale=tensors.pop("codec.scale"),
        codec_mean=tensors.pop("codec.mean"),
        transformer=tensors,
    )
