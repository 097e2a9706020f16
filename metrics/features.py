"""Feature distance: how differently a flow transformer sees two pictures, in the activations of its own blocks.

Both pictures are noised to one sigma with one noise, x = (1 − sigma)·x0 + sigma·noise, and pass the transformer once, in one batch. After
each chosen block the tokens f, g of the two at the same place are compared as LPIPS does ("The Unreasonable Effectiveness of Deep
Features as a Perceptual Metric", arXiv 1801.03924), by direction and without its learned weights:

    d = mean over blocks and tokens of ‖f/‖f‖ − g/‖g‖‖²/2 = 1 − cos(f, g)

0 for equal pictures, at most 2. The activations are taken through `patches_replace["dit"]`; they are compared where they arise and
only the distances, one number a token, are kept. An image encoder (CLIP, SigLIP, DINOv2) may be the eye instead: the tokens of its last
layer but one are compared in the same way.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, normalize

from ..errors import input_error

__all__ = [
    "Block", "FeatureFigures", "OneCall", "TokenDistances", "grid_weights", "measure_blocks", "parse_blocks", "token_distance",
    "vision_distances",
]

Block = tuple[str, int]  # ("double" or "single", index)
_PART = re.compile(r"(double|single)\s*:\s*([0-9]+)(?:\s*-\s*([0-9]+))?")
VISION_LAYER = "layer"  # in reports: "layer:-2"
_MOST_BLOCKS = 1000  # far above any transformer; a typing error must not make millions


def parse_blocks(text: str, where: str = "feature distance") -> tuple[Block, ...]:
    """"double:1-2, single:5" → (("double", 1), ("double", 2), ("single", 5))."""
    blocks: dict[Block, None] = {}
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        match = _PART.fullmatch(part)
        first, last = (int(match[2]), int(match[3] or match[2])) if match else (1, 0)
        if not first <= last < _MOST_BLOCKS:
            raise input_error(where, "blocks", part, "parts such as double:1-2 or single:5, joined by commas", "Name at least one block.")
        blocks |= {(match[1], index): None for index in range(first, last + 1)}
    if not blocks:
        raise input_error(where, "blocks", text, "parts such as double:1-2 or single:5, joined by commas", "Name at least one block.")
    return tuple(blocks)


def token_distance(features: Tensor, others: Tensor) -> Tensor:
    """1 − cos of tokens at the same place, `(b, n, d)` twice → `(b, n)` float32; equal tokens give exactly 0."""
    return (normalize(features.float(), dim=-1) - normalize(others.float(), dim=-1)).square().sum(-1) / 2


@dataclass(frozen=True)
class FeatureFigures:
    """by_block: block → the distance of every picture, `(b,)`; maps: distances of the tokens, mean over blocks, `(b, rows, columns)`."""

    by_block: dict[Block, Tensor]
    maps: Tensor

    @property
    def each(self) -> Tensor:
        """The distance of every picture, `(b,)`."""
        return torch.stack(list(self.by_block.values())).mean(0)

    def table(self) -> str:
        """A line a block and one of means, a column a picture."""
        lines = {f"{stream}:{index}": values for (stream, index), values in self.by_block.items()} | {"mean": self.each}
        return "\n".join(f"{name} " + " ".join(f"{float(value):.4f}" for value in values) for name, values in lines.items())


@dataclass
class TokenDistances:
    """What one measuring call leaves behind.

    blocks: the blocks to measure.
    pictures: rows a picture batch has; the model's batch holds twice as many, the references behind the pictures.
    found: block → one `(b, n)` tensor on the CPU a model call (a prompt of several conditions makes several).
    """

    blocks: tuple[Block, ...]
    pictures: int
    found: dict[Block, list[Tensor]] = field(default_factory=dict)
    tokens: int | None = None

    def take(self, block: Block, image_tokens: Tensor) -> None:
        """Compare the two halves of every condition's rows; `image_tokens`: `(k·2b, n, d)`."""
        for rows in image_tokens.detach().split(2 * self.pictures):
            self.found.setdefault(block, []).append(token_distance(*rows.split(self.pictures)).cpu())

    def by_block(self, where: str = "feature distance") -> dict[Block, Tensor]:
        """`(b, n)` of each block.

        Raises:
            NodeInputError: a block never answered, because the model has none of that number or no block hooks.
        """
        absent = [f"{stream}:{index}" for stream, index in self.blocks if (stream, index) not in self.found]
        if absent:
            remedy = "Choose other blocks; a model without block hooks, such as Lumina 2, cannot be measured."
            raise input_error(where, "blocks", ", ".join(absent), "blocks that the model has and offers to patches", remedy)
        return {block: torch.stack(self.found[block]).mean(0) for block in self.blocks}

    def grid(self, latent_size: tuple[int, int], where: str = "feature distance") -> tuple[int, int]:
        """Rows and columns of tokens for a latent (h, w): the patch size is the one that gives the number of tokens."""
        tokens = next(iter(self.found.values()))[0].shape[1]
        for patch in range(1, 33):
            rows, columns = (math.ceil(side / patch) for side in latent_size)
            if rows * columns == tokens:
                return rows, columns
        got = f"{tokens} tokens for a latent of {latent_size[1]}×{latent_size[0]}"
        raise input_error(where, "model", got, "models whose tokens are the squares of a grid", "Use another model.")

    def summary(self, latent_size: tuple[int, int], weights: Tensor | None = None, where: str = "feature distance") -> FeatureFigures:
        """The distances of every picture and block.

        Args:
            latent_size: (h, w) of the latents that were measured.
            weights: `(b, H, W)` of the pictures' pixels, a mask; None counts every token alike.
        """
        by_block = self.by_block(where)
        grid = self.grid(latent_size, where)
        shares = torch.ones(self.pictures, *grid) if weights is None else grid_weights(weights, grid)
        total = shares.sum(dim=(1, 2))
        if not bool((total > 0).all()):
            raise input_error(where, "mask", "a mask without pixels", "a region in every picture", "Draw a larger mask.")
        maps = {block: found.reshape(self.pictures, *grid) for block, found in by_block.items()}
        figures = {block: (found * shares).sum(dim=(1, 2)) / total for block, found in maps.items()}
        return FeatureFigures(figures, torch.stack(list(maps.values())).mean(0))


def grid_weights(weights: Tensor, grid: tuple[int, int]) -> Tensor:
    """Pixel weights `(b, h, w)` averaged over each token's pixels: `(b, rows, columns)` float32."""
    return adaptive_avg_pool2d(weights.float().unsqueeze(1), grid).squeeze(1)


def measure_blocks(model: Any, distances: TokenDistances) -> Any:
    """A clone of MODEL `model` whose chosen blocks report to `distances`; what stood in their patch slots still runs, inside.

    Image tokens come first in Flux's single blocks' row from the right: text, then image.
    """
    patched = model.clone()
    slots = patched.model_options["transformer_options"].get("patches_replace", {}).get("dit", {})
    for stream, index in dict.fromkeys([("double", 0), *distances.blocks]):
        patch = _reporting((stream, index), distances, slots.get((f"{stream}_block", index)))
        patched.set_model_patch_replace(patch, "dit", f"{stream}_block", index)
    return patched


def _reporting(block: Block, distances: TokenDistances, earlier):
    def patch(args: dict, extra: dict) -> dict:
        out = extra["original_block"](args) if earlier is None else earlier(args, extra)
        if block[0] == "double":
            distances.tokens = args["img"].shape[1]  # single blocks hold text and image in one sequence
        if block in distances.blocks:
            image = out["img"] if block[0] == "double" else out["img"][:, -distances.tokens :]
            distances.take(block, image)
        return out

    return patch


def vision_distances(clip_vision: Any, pictures: Tensor, references: Tensor, where: str) -> tuple[TokenDistances, tuple[int, int]]:
    """The tokens of an image encoder's last layer but one, compared, and the size of their grid. The picture is squeezed into a square.

    Args:
        clip_vision: CLIP_VISION of the host.
        pictures, references: `(b, h, w, 3)` in 0…1.
    """
    states = [clip_vision.encode_image(pixels, crop=False)["penultimate_hidden_states"] for pixels in (pictures, references)]
    tokens = states[0].shape[1]
    side = math.isqrt(tokens)
    first = tokens - side * side  # a class token stands before those of the picture
    if first > 1:
        got = f"{tokens} tokens"
        raise input_error(where, "clip_vision", got, "a square of tokens, and a class token at most", "Use CLIP, SigLIP or DINOv2.")
    distances = TokenDistances(((VISION_LAYER, -2),), len(pictures))
    distances.take((VISION_LAYER, -2), torch.cat(states)[:, first:])
    return distances, (side, side)


class OneCall:
    """A SAMPLER that noises the latent to sigmas[0], asks the model once and hands the noised latent back."""

    inpaint_options = MappingProxyType({})

    def max_denoise(self, guider, sigmas) -> bool:
        return False

    def sample(self, guider, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False):
        """What a host's guider calls; tensors `(b, …)` in model space."""
        x = guider.inner_model.model_sampling.noise_scaling(sigmas[0], noise, latent_image)
        guider(x, sigmas[0] * x.new_ones([x.shape[0]]), model_options=extra_args.get("model_options", {}), seed=extra_args.get("seed"))
        return x
