"""A model's own sense of sigma, replaced on a clone. Put these before a scheduler node: it reads the replaced table."""

from __future__ import annotations

from ....errors import input_error
from .declare import MAX_RESOLUTION, MODEL, CoreNode, combo, integer, number

_MODULE = "comfy_extras.nodes_model_advanced"
_SHIFT_RANGE = (0.0, 100.0, 0.01)


def _as_flow(model, table: str, **parameters):
    """A clone of `model` that predicts a velocity (CONST) on the named table of model_sampling."""
    from .. import model_sampling

    class ModelSamplingAdvanced(getattr(model_sampling, table), model_sampling.CONST):
        pass

    sampling = ModelSamplingAdvanced(model.model.model_config)
    sampling.set_parameters(**parameters)
    patched = model.clone()
    patched.add_object_patch("model_sampling", sampling)
    return (patched,)


class ModelSamplingSD3(CoreNode):
    """sigma = shift·u / (1 + (shift − 1)·u), the model is given 1000·sigma."""

    CATEGORY = "advanced/model"
    RELATIVE_PYTHON_MODULE = _MODULE
    REQUIRED = {"model": MODEL, "shift": number(3.0, *_SHIFT_RANGE)}
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "patch"

    def patch(self, model, shift, multiplier=1000):
        if not shift > 0:
            raise input_error(type(self).__name__, "shift", shift, "a number above 0 up to 100", "A shift of 0 leaves no noise at all.")
        return _as_flow(model, "ModelSamplingDiscreteFlow", shift=shift, multiplier=multiplier)


class ModelSamplingAuraFlow(ModelSamplingSD3):
    """As ModelSamplingSD3, but the model is given sigma itself."""

    REQUIRED = {"model": MODEL, "shift": number(1.73, *_SHIFT_RANGE)}
    FUNCTION = "patch_aura"

    def patch_aura(self, model, shift):
        return self.patch(model, shift, multiplier=1.0)


class ModelSamplingFlux(CoreNode):
    """Flux's shift for a picture size: mu goes from base_shift at 256 tokens to max_shift at 4096, a token being 16×16 pixels."""

    CATEGORY = "advanced/model"
    RELATIVE_PYTHON_MODULE = _MODULE
    REQUIRED = {
        "model": MODEL,
        "max_shift": number(1.15, *_SHIFT_RANGE),
        "base_shift": number(0.5, *_SHIFT_RANGE),
        "width": integer(1024, 16, MAX_RESOLUTION, 8),
        "height": integer(1024, 16, MAX_RESOLUTION, 8),
    }
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "patch"

    def patch(self, model, max_shift, base_shift, width, height):
        slope = (max_shift - base_shift) / (4096 - 256)
        mu = (width * height / (8 * 8 * 2 * 2)) * slope + (base_shift - slope * 256)
        return _as_flow(model, "ModelSamplingFlux", shift=mu)


class ModelComputeDtype(CoreNode):
    """The number format that a model computes in."""

    CATEGORY = "advanced/debug/model"
    RELATIVE_PYTHON_MODULE = _MODULE
    REQUIRED = {"model": MODEL, "dtype": combo("default", "fp32", "fp16", "bf16")}
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "patch"

    def patch(self, model, dtype):
        from ..node_helpers import string_to_torch_dtype

        patched = model.clone()
        patched.set_model_compute_dtype(string_to_torch_dtype(dtype))
        return (patched,)
