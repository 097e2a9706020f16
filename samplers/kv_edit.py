"""KV-Edit, "Training-Free Image Editing for Precise Background Preservation", arXiv 2502.17363.

Only what a mask covers is drawn again. The picture's own path x_src(s) is known at every sigma; there the model is asked about it under the
source prompt and its keys and values are kept for one step. Then the target prompt is asked, with the picture's K and V at all image
tokens outside the mask, in every block:

    v = v_target(x; K, V = [text, background of x_src, fresh foreground])        x' = M·(x + h·v) + (1 − M)·x_src(s')

The path is Euler's inversion under the source prompt, or, without inversion, (1 − s)·picture + s·n with one noise n.

What we do differently: the published code keeps K and V of a whole inversion (over 40 GB for FLUX) and sends only the foreground's tokens
through the blocks. We keep the path's states, which are a few latents, and make K and V again one sigma at a time, at the very sigma where
they are used; and all tokens run, since a host offers no way to leave some out. What the background's own rows give is thrown away, so the
foreground's numbers are the same (a test changes the background and sees no difference).
"""

from __future__ import annotations

import logging
from types import MappingProxyType

import torch
import torch.nn.functional as F

from ..errors import input_error
from ..families.blocks import BlockKey, BlockLayout, block_layout
from .attention_values import ValueHook, ValueVisit
from .inversion import inversion_sigmas
from .solvers import sample_euler
from .source_target import SideModel, picture_mask, seeded_noise, two_sided
from .walk import check_sigmas

__all__ = ["STARTS", "KVEditSampler", "token_mask"]

NAME = "KV-Edit Sampler"
STARTS = ("inverted", "noise", "inversion_free")
PATCHES = (1, 2, 4)  # latent cells a token side, of every family that is known


def token_mask(mask: torch.Tensor, tokens: int, shape: torch.Size) -> torch.Tensor:
    """Which image tokens hold anything of a mask `(b, 1, …, h, w)`: `(b, tokens)` bool.

    Tokens lie row by row, frame after frame, in squares of 1, 2 or 4 cells; cells that a square has beyond the border are not masked.

    Args:
        tokens: image tokens of one row of the model's batch. shape: of the latent, `(b, c, h, w)` or `(b, c, t, h, w)`.

    Raises:
        NodeInputError: no such square gives this number of tokens.
    """
    frames = shape[2] if len(shape) == 5 else 1
    covered = (mask > 0).float().expand(-1, 1, *shape[2:]).reshape(-1, frames, *shape[-2:])  # (b, t, h, w)
    for size in PATCHES:
        rows, columns = -(-shape[-2] // size), -(-shape[-1] // size)
        if rows * columns * frames == tokens:
            padded = F.pad(covered, (0, columns * size - shape[-1], 0, rows * size - shape[-2]))
            return F.max_pool2d(padded, size).flatten(1) > 0
    remedy = "Leave out nodes that drop or add tokens, such as reference pictures."
    raise input_error(NAME, "model", f"{tokens} image tokens for {tuple(shape[2:])}", "one token for 1, 2 or 4 latent cells a side", remedy)


class _Background:
    """K and V of one evaluation of the source, and their way into the target's evaluation at the same sigma."""

    def __init__(self, layout: BlockLayout, mask: torch.Tensor, shape: torch.Size, store: str):
        self.layout, self.mask, self.shape, self.store = layout, mask, shape, store
        self.blocks = layout.every()
        self.turns = 1 if layout.text == "apart" else 2  # where text is apart, a block's second attention is to it
        self.kept: dict[tuple[BlockKey, int], tuple[torch.Tensor, torch.Tensor]] = {}
        self._tokens: torch.Tensor | None = None
        self._announced = False

    def keep(self, visit: ValueVisit) -> None:
        """Of the source's positive condition, image tokens only."""
        mine = [rows for kind, rows in visit.parts() if kind == 0]
        if not mine:
            return
        if len(mine) > 1 or (visit.key, visit.turn) in self.kept:
            remedy = "Connect one prompt without combined or regional parts."
            raise input_error(NAME, "source", "more than one condition at a sigma", "one condition", remedy)
        span = self._image(visit)
        place = torch.device("cpu") if self.store == "cpu" else visit.v.device
        k, v = (x[mine[0]].narrow(visit.axis, *span).detach().to(place, copy=True) for x in (visit.k, visit.v))
        self.kept[visit.key, visit.turn] = k, v
        if not self._announced:
            self._announced = True
            size = len(self.blocks) * (k.nbytes + v.nbytes)
            logging.info("Rectiflow: KV-Edit holds keys and values of one step, %.1f MiB on %s", size / 2**20, place)

    def replace(self, visit: ValueVisit) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V with the source's background in every part of the batch; new tensors."""
        span, fresh = self._image(visit), self._foreground(visit)
        changed = []
        for x, source in zip((visit.k, visit.v), self.kept[visit.key, visit.turn]):
            out, source = x.clone(), source.to(x)
            masked = fresh.reshape(len(fresh), *[1] * (visit.axis - 1), -1, *[1] * (x.ndim - 1 - visit.axis))
            for _, rows in visit.parts():
                part = out[rows].narrow(visit.axis, *span)
                part.copy_(torch.where(masked, part, source))
            changed.append(out)
        return changed[0], changed[1]

    def _image(self, visit: ValueVisit) -> tuple[int, int]:
        """(start, length) of the image tokens."""
        if self.layout.text == "apart":
            return 0, visit.v.shape[visit.axis]
        if visit.text is None:
            raise input_error(NAME, "model", self.layout.family, "a model that tells its text tokens", "Use another editing method.")
        return (visit.text if self.layout.text == "first" else 0), visit.v.shape[visit.axis] - visit.text

    def _foreground(self, visit: ValueVisit) -> torch.Tensor:
        if self._tokens is None:
            self._tokens = token_mask(self.mask, self._image(visit)[1], self.shape).to(visit.v.device)
        return self._tokens


class KVEditSampler:
    """The SAMPLER of KV-Edit; its latent is the picture, its guider a Source Target Guider, its schedule falls to 0.

    With N = steps − skip: 3·N evaluations, 2·N without inversion. Outside the mask the result is the picture to the last bit.

    Args:
        mask: `(b or 1, h, w)`, 1 where the target is drawn; None takes the latent's noise mask.
        skip: first steps that are left out, so that the edit starts below sigmas[0] and keeps more of what the mask covers.
        start: one of STARTS. "inverted": the covered part starts from its inverted state; "noise": from the picture noised by a drawn
            noise, which at sigma 1 is that noise alone; "inversion_free": so does the whole picture, and nothing is inverted.
        store: "device" or "cpu", where K and V of a step lie.
    """

    inpaint_options = MappingProxyType({})

    def __init__(self, mask: torch.Tensor | None = None, skip: int = 0, start: str = "inverted", seed: int = 0, store: str = "device"):
        if start not in STARTS:
            raise input_error(NAME, "start", start, ", ".join(STARTS), "Pick one of them.")
        self.mask, self.skip, self.start, self.seed, self.store = mask, skip, start, seed, store

    def max_denoise(self, guider, sigmas) -> bool:
        return False

    @torch.no_grad()
    def sample(self, guider, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False):
        """`latent_image`: `(b, …)` in model space, the picture; `noise` is not used. What the host's guider calls."""
        guider = two_sided(guider, NAME)
        sigmas = self._falling(sigmas)
        if self.mask is None and denoise_mask is None:
            raise input_error(NAME, "mask", "none", "a mask, or a latent with a noise mask", "Connect the part that shall change.")
        mask = denoise_mask[:, :1] if self.mask is None else picture_mask(self.mask, latent_image, NAME)
        if not bool(mask.any()):
            return latent_image.clone()
        options = {key: extra_args.get(key) for key in ("model_options", "seed")}
        drawn = next(seeded_noise(latent_image, self.seed))
        path = self._path(guider, sigmas, latent_image, drawn, options)
        first = (1 - sigmas[0]) * latent_image + sigmas[0] * drawn if self.start == "noise" else path[0]
        x = torch.lerp(path[0], first, mask.to(path[0]))
        layout = block_layout(guider.inner_model.diffusion_model, NAME)
        background = _Background(layout, mask, latent_image.shape, self.store)
        for index, (s, s_next) in enumerate(zip(sigmas[:-1], sigmas[1:])):
            denoised = self._target(guider, background, path[index], x, s, options)
            x = x + (s_next - s) * (x - denoised) / s
            x = torch.where(mask == 0, path[index + 1], torch.lerp(path[index + 1], x, mask.to(x)))
            if callback is not None:
                callback(self.skip + index, denoised, x, self.skip + len(sigmas) - 1)
        return x

    def _falling(self, sigmas: torch.Tensor) -> torch.Tensor:
        sigmas = check_sigmas(sigmas, NAME)
        if not bool((sigmas[1:] < sigmas[:-1]).all()) or len(sigmas) < 2 or sigmas[-1] != 0:
            remedy = "Connect the whole schedule you would sample with."
            raise input_error(NAME, "sigmas", "a schedule that does not fall to 0", "falling sigmas that end at 0", remedy)
        if not 0 <= self.skip < len(sigmas) - 1:
            raise input_error(NAME, "skip", self.skip, f"0 to {len(sigmas) - 2}", "Lower skip, or use more steps.")
        return sigmas[self.skip :]

    def _path(self, guider, sigmas, picture, drawn, options) -> list[torch.Tensor]:
        """The picture at every sigma; at 0 it is the picture itself."""
        if self.start == "inversion_free":
            return [(1 - s) * picture + s * drawn for s in sigmas[:-1]] + [picture]
        rising = inversion_sigmas(sigmas, where=NAME)
        states: list[torch.Tensor] = []
        lowest = (1 - rising[0]) * picture
        top = sample_euler(SideModel(guider), lowest, rising, options, lambda state: states.append(state["x"]), disable=True)
        return [top, *states[:0:-1], picture]

    def _target(self, guider, background: _Background, source, x, s, options) -> torch.Tensor:
        """denoised of x under the target prompt, with the background's K and V of `source` at the same sigma."""
        rows = s * x.new_ones([len(x)])
        background.kept.clear()
        hook = ValueHook(background.blocks, background.keep, background.turns)
        try:
            guider.source(source, rows, hook.options(options["model_options"]), options["seed"])
            hook.check(NAME)
            hook = ValueHook(background.blocks, background.replace, background.turns)
            denoised = guider(x, rows, model_options=hook.options(options["model_options"]), seed=options["seed"])
            hook.check(NAME)
        finally:
            background.kept.clear()
        return denoised
