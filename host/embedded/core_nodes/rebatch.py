"""Regrouping a list of latents into batches of one size."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["rebatch_latents"]


class _One(NamedTuple):
    """A single sample (1, c, h, w) with its mask (1, 1, 8h, 8w) or None and its place in the noise."""

    sample: object
    mask: object
    index: int


def _singles(latents: list[dict]):
    offset = 0
    for latent in latents:
        samples, masks = latent["samples"], latent.get("noise_mask")
        count = samples.shape[0]
        index = latent.get("batch_index", range(offset, offset + count))
        offset += count
        for i in range(count):
            mask = None if masks is None else masks[i % masks.shape[0]].reshape(1, 1, *masks.shape[-2:])
            yield _One(samples[i : i + 1], mask, index[i])


def rebatch_latents(latents: list[dict], batch_size: int) -> list[dict]:
    """Batches of at most `batch_size`, in order. A change of size starts a new batch. Samples without a mask beside samples with
    one count as fully masked (1, everything is repainted); a batch whose masks are all 1 carries none."""
    batches: list[list[_One]] = []
    for single in _singles(latents):
        last = batches[-1] if batches else None
        if last is None or len(last) == batch_size or last[-1].sample.shape != single.sample.shape:
            batches.append([])
        batches[-1].append(single)
    return [_joined(batch) for batch in batches]


def _joined(batch: list[_One]) -> dict:
    import torch
    import torch.nn.functional as F

    samples = torch.cat([single.sample for single in batch])
    joined = {"samples": samples, "batch_index": [single.index for single in batch]}
    if any(single.mask is not None for single in batch):
        size = next(single.mask for single in batch if single.mask is not None).shape[-2:]
        full = torch.ones(1, 1, *size)
        masks = [full if single.mask is None else single.mask for single in batch]
        masks = torch.cat([mask if mask.shape[-2:] == size else F.interpolate(mask, size=size, mode="bilinear") for mask in masks])
        if masks.mean() != 1.0:
            joined["noise_mask"] = masks
    return joined
