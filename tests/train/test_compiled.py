"""What torch.compile makes of the network while it learns: the same gradients."""

from __future__ import annotations

import shutil

import pytest
import torch
from rectiflow.host.embedded.ldm.flux import Flux, FluxParams
from rectiflow.tiny.weights import FLUX_SIZES
from rectiflow.train.recipes.tiny import TinyTrainee, initialise

SIZES = {**FLUX_SIZES, "hidden_size": 32, "num_heads": 2, "axes_dim": [4, 6, 6], "depth": 1, "depth_single_blocks": 1}


def gradients(compiled: bool) -> dict[str, torch.Tensor]:
    model = TinyTrainee(Flux(FluxParams(**SIZES)), 4, torch.float32, compiled)
    initialise(model, 0)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in model.parameters():  # modulation and the last layer begin at zero, where most gradients vanish
            value.add_(torch.randn(value.shape, generator=draw) * 0.05)
    x, sigma = torch.randn((2, 16, 8, 8), generator=draw), torch.tensor([0.2, 0.7])
    model.velocity(x, sigma, [((1, 2, 0, 0, 0, 0, 0, 0), 0), None]).square().mean().backward()
    return {name: value.grad for name, value in model.params().items() if value.grad is not None}


@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++ compiler")
def test_a_compiled_network_learns_by_the_same_gradients():
    """1e-3 of a gradient's norm: fused sums round otherwise, fp32. A complex product's gradient without its conjugate is off by half."""
    plain, compiled = gradients(False), gradients(True)
    assert set(plain) == set(compiled)
    for name, gradient in plain.items():
        assert float((compiled[name] - gradient).norm()) <= 1e-3 * float(gradient.norm()) + 1e-9, name
