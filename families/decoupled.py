"""Models in two parts: an encoder makes a condition s for every token, a decoder turns latent and s into the velocity.

"DDT: Decoupled Diffusion Transformer", arXiv 2504.05741. Such a class offers its encoder as one block patch, which is all that sharing s
needs of it:

    encoder_blocks, decoder_blocks                     its two stacks
    patches_replace["dit"][("encoder", 0)]             around the whole encoder: {"img": tokens (b, n, d), "vec", "transformer_options"}
                                                       → {"img": s (b, n, d)}, as the decoder reads it: behind the activation closing s
"""

from __future__ import annotations

from typing import Any

from .arch import ArchSpec
from .blocks import BlockKey, BlockLayout

__all__ = ["ENCODER", "decoupled_spec"]

ENCODER: BlockKey = ("encoder", 0)


def decoupled_spec(transformer: Any) -> ArchSpec | None:
    """The encoder of `transformer` as a stack of one block; None for a model that is not in two parts."""
    if not (hasattr(transformer, "encoder_blocks") and hasattr(transformer, "decoder_blocks")):
        return None
    counts = {"encoder": len(transformer.encoder_blocks), "decoder": len(transformer.decoder_blocks)}
    return ArchSpec(BlockLayout("Decoupled", counts, "apart"), (ENCODER,))
