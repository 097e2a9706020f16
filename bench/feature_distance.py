"""How far drawn pictures of any size are from real ones in the eyes of the tiny model: a kernel distance between its features.

A picture of f times the training side is seen in two views of the training side, 64×64, where the model knows what it sees: `whole`, the
picture made smaller by areas, which shows layout; `part`, four squares cut from it at its own scale, which show what is drawn. A view is
encoded, noised to sigma 0.3 with one noise and passed once without a prompt; its feature is the mean over image tokens behind the blocks
BLOCKS, 3·256 numbers, each shifted and divided by mean and deviation over the real pictures.

Distance: the unbiased estimate of the squared maximum mean discrepancy with k(x, y) = (x·y/d + 1)³ (KID, Bińkowski et al., arXiv
1801.01401), which, other than Fréchet's, has no bias from few pictures and needs no covariance of 768 numbers from 8 of them. It may come
out below zero where both sets are alike.

The judge is the model that drew, but never at the size or with the positions that are tried, so no way to stretch them is nearer to it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

BLOCKS = (("double_block", 1), ("double_block", 2), ("single_block", 2))
SIGMA, SEED = 0.3, 0
SIDE, PARTS, BATCH = 64, 4, 64


def views(pictures: torch.Tensor) -> dict[str, torch.Tensor]:
    """(n, 3, s, s) → whole (n, 1, 3, 64, 64), part (n, 4, 3, 64, 64): squares at places that the size alone decides."""
    room = pictures.shape[-1] - SIDE + 1
    places = torch.randint(room, (PARTS, 2), generator=torch.Generator().manual_seed(SEED)).tolist()
    parts = torch.stack([pictures[..., y : y + SIDE, x : x + SIDE] for y, x in places], dim=1)
    return {"whole": F.interpolate(pictures, size=(SIDE, SIDE), mode="area")[:, None], "part": parts}


class Judge:
    """The plain tiny model of `tiny` (tests' TinyRuns) as a feature extractor."""

    def __init__(self, tiny):
        self.tiny, self.found = tiny, {}
        self.model = tiny.model.clone()
        for kind, index in (("double_block", 0), *BLOCKS):
            self.model.set_model_patch_replace(self._keeping((kind, index)), "dit", kind, index)

    def _keeping(self, key):
        def patch(args, extra):
            out = extra["original_block"](args)
            if key[0] == "double_block":
                self.tokens = args["img"].shape[1]  # a single block holds text and image in one sequence
            if key in BLOCKS:
                self.found[key] = out["img"][:, -self.tokens :].float().mean(dim=1)
            return out

        return patch

    @torch.inference_mode()
    def features(self, pictures: torch.Tensor) -> torch.Tensor:
        """(n, v, 3, 64, 64) in 0…1 → (n, v, 768)."""
        rows = [self._seen(batch) for batch in pictures.flatten(0, 1).split(BATCH)]
        return torch.cat(rows).unflatten(0, pictures.shape[:2])

    def _seen(self, pictures: torch.Tensor) -> torch.Tensor:
        from rectiflow.host import CFGGuider
        from rectiflow.metrics.features import OneCall

        guider = CFGGuider(self.model)
        guider.set_conds(self.tiny.conditioning(""), self.tiny.conditioning(""))
        guider.set_cfg(1.0)
        latent = self.tiny.vae.encode(pictures.movedim(1, -1))
        noise = self.tiny.noise([SEED]).expand_as(latent)
        guider.sample(noise, latent, OneCall(), torch.tensor([SIGMA, 0.0]), disable_pbar=True, seed=0)
        return torch.cat([self.found[key] for key in BLOCKS], dim=-1).clone()


def kernel_distance(ours: torch.Tensor, real: torch.Tensor) -> float:
    """Unbiased squared MMD of two sets of features, (n, v, d) and (m, v, d) for the same v views of each picture.

    Views of one picture are not independent: pairs within a set are of different pictures.
    """
    mean, deviation = real.flatten(0, 1).mean(0), real.flatten(0, 1).std(0)
    ours, theirs = ((rows.double() - mean) / deviation for rows in (ours, real))

    def mean_kernel(a: torch.Tensor, b: torch.Tensor, same: bool) -> float:
        values = (torch.einsum("nvd,mwd->nmvw", a, b) / a.shape[-1] + 1.0).pow(3).mean(dim=(2, 3))  # (n, m)
        return float(values.sum() - values.diagonal().sum()) / (len(a) * (len(a) - 1)) if same else float(values.mean())

    return mean_kernel(ours, ours, True) + mean_kernel(theirs, theirs, True) - 2.0 * mean_kernel(ours, theirs, False)
