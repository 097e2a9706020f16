"""How the given part of a masked run is shown to the model: noised, clean with times of its own, or clean under the common time.

VDT, arXiv 2305.13311, shows given positions clean, I = (1 − M)·known + M·x, under one time for all; that is right for a model trained so.
For flow models in general:

    noised        known = s·noise + (1 − s)·latent: any flow model; both parts carry the same noise level.
    clean_t0      known = latent, and the time is s·M for each frame or token: models that take such times (Wan 2.2 5B, LTX-Video, Cosmos
                  Predict 2), which bring it themselves.
    clean_shared  known = latent under the common time s: VDT proper, for models trained that way.

The host asks two methods of the model at every call of a masked run, also between the stages of a step: `scale_latent_inpaint` for
the known part and `process_timestep` for the times. A mode is a pair of object patches on those two, so the run's own latent, mask and
batch are used and nothing of a run is kept in the patch.
"""

from __future__ import annotations

from typing import Any

import torch

from ..errors import input_error

__all__ = ["KNOWN_MODES", "has_frame_times", "present_known"]

KNOWN_MODES = ("auto", "noised", "clean_t0", "clean_shared")


def has_frame_times(base_model: Any) -> bool:
    """Whether the model takes a time for every frame or token: its class overrides `process_timestep`."""
    return _overrides(base_model, "process_timestep")


def _overrides(base_model: Any, method: str) -> bool:
    """Whether the class of the model has a method of its own in the place of the host's BaseModel."""
    owner = next((cls for cls in type(base_model).__mro__ if method in vars(cls)), None)
    return owner is not None and owner.__name__ != "BaseModel"


class _NoisedLatent:
    """s·noise + (1 − s)·latent, by the noise scaling of the model as it is patched."""

    def __init__(self, model_sampling: Any):
        self.model_sampling = model_sampling

    def __call__(self, sigma: torch.Tensor, noise: torch.Tensor, latent_image: torch.Tensor, **kwargs) -> torch.Tensor:
        return self.model_sampling.noise_scaling(sigma.reshape(-1, *[1] * (noise.ndim - 1)), noise, latent_image)


def _clean_latent(latent_image: torch.Tensor, **kwargs) -> torch.Tensor:
    return latent_image


def _common_time(timestep: torch.Tensor, *args, **kwargs) -> torch.Tensor:
    return timestep


def present_known(model: Any, mode: str, where: str = "MaskedVideoCondition") -> Any:
    """A clone of the MODEL that shows known positions as `mode` says; `auto` is the model's own way.

    Raises:
        NodeInputError: unknown mode, or clean_t0 on a model that has one time for all positions.
    """
    if mode not in KNOWN_MODES:
        raise input_error(where, "known", mode, ", ".join(KNOWN_MODES), "Pick one of them.")
    base_model = model.model
    if mode == "clean_t0" and not has_frame_times(base_model):
        kind = f"clean_t0 on {type(base_model).__name__}, which has one time for all frames"
        allowed = "clean_t0 on Wan 2.2 5B, LTX-Video or Cosmos Predict 2; noised on every flow model"
        raise input_error(where, "known", kind, allowed, "Choose auto.")
    patched = model.clone()
    if mode == "clean_shared":
        patched.add_object_patch("scale_latent_inpaint", _clean_latent)
    elif mode == "noised" and _overrides(base_model, "scale_latent_inpaint"):
        patched.add_object_patch("scale_latent_inpaint", _NoisedLatent(model.get_model_object("model_sampling")))
    if mode in ("noised", "clean_shared") and has_frame_times(base_model):
        patched.add_object_patch("process_timestep", _common_time)
    return patched
