"""Linear operators: adjoints at odd sizes, norms, closed forms, noise that is drawn once."""

from __future__ import annotations

import pytest
import torch
from rectiflow.errors import NodeInputError
from rectiflow.samplers.operators import (
    Blur,
    Chain,
    Downsample,
    Grayscale,
    Identity,
    Mask,
    gaussian_kernel,
    measure,
    motion_kernel,
)

GENERATOR = torch.Generator().manual_seed(11)
HOLE = torch.ones(1, 20, 24)
HOLE[:, 5:12, 3:20] = 0
SOFT = torch.rand(1, 9, 13, generator=GENERATOR)
CASES = {
    "identity": Identity(),
    "mask": Mask(HOLE),
    "soft mask": Mask(SOFT),
    "downsample 2": Downsample(2),
    "downsample 4": Downsample(4),
    "gaussian": Blur(gaussian_kernel(7, 1.3)),
    "motion": Blur(motion_kernel(9, 30.0)),
    "lopsided kernel": Blur(torch.rand(3, 5, generator=GENERATOR)),
    "signed kernel": Blur(torch.tensor([[0.0, -1.0, 0.0], [-1.0, 4.0, -1.0], [0.0, -1.0, 0.0]])),
    "grayscale": Grayscale(),
    "chain": Chain((Blur(gaussian_kernel(5, 1.0)), Grayscale(), Downsample(2))),
    "mask after downsample": Chain((Downsample(2), Mask(HOLE))),
}
SHAPES = [(2, 3, 16, 24), (1, 3, 17, 23), (1, 3, 2, 9, 11)]


def drawn(shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", CASES)
def test_adjoint(name, shape):
    """<A x, y> = <x, Aᵀ y>; float64 sums of at most 1200 products."""
    x = drawn(shape)
    operator = CASES[name].fitted(shape[-2:], x)
    y = drawn((*shape[:-2], *operator.measured_size(shape[-2:]))).flip(-1)
    measured, back = operator.forward(x), operator.adjoint(y, shape[-2:])
    assert measured.shape == y.shape and back.shape == x.shape
    assert float((measured * y).sum()) == pytest.approx(float((x * back).sum()), abs=1e-10)


@pytest.mark.parametrize("name", CASES)
def test_norm_bounds_the_largest_eigenvalue(name):
    """Power iteration from below; equal within a tenth where the operator is no chain and no soft mask."""
    x = drawn((1, 3, 24, 24)).abs()
    operator = CASES[name].fitted((24, 24), x)
    for _ in range(60):
        x = operator.adjoint(operator.forward(x), (24, 24))
        largest = float(x.norm())
        x = x / largest
    assert largest <= operator.norm2 * (1 + 1e-9)
    if "chain" not in name and "signed" not in name:
        assert largest > 0.9 * operator.norm2


@pytest.mark.parametrize("name", ["identity", "mask", "downsample 2", "downsample 4", "grayscale"])
def test_tight_operators_are_met_in_one_step(name):
    x, truth = drawn((1, 3, 16, 24)), drawn((1, 3, 16, 24)).flip(-1)
    operator = CASES[name].fitted((16, 24), x)
    y = operator.forward(truth)
    met = x - operator.adjoint(operator.forward(x) - y, (16, 24)) / operator.norm2
    torch.testing.assert_close(operator.forward(met), y, rtol=0, atol=1e-12)


def test_a_latent_cell_is_known_only_when_all_of_it_is():
    known = torch.ones(1, 16, 16)
    known[:, 6, 9] = 0
    fitted = Mask(known).fitted((4, 4), torch.zeros(1))
    expected = torch.ones(1, 4, 4)
    expected[:, 1, 2] = 0
    assert torch.equal(fitted.known, expected)


def test_kernels():
    for kernel in (gaussian_kernel(11, 2.0), motion_kernel(11, 0.0), motion_kernel(11, 37.0)):
        assert float(kernel.sum()) == pytest.approx(1.0)
        torch.testing.assert_close(kernel, kernel.flip(0, 1), rtol=0, atol=1e-6)  # both are even
    along = motion_kernel(9, 0.0)
    assert float(along[4].sum()) == pytest.approx(1.0) and float(along[4].max() / along[4].min()) < 3
    assert torch.equal(motion_kernel(9, 90.0).argmax(1), torch.full((9,), 4))
    rising = motion_kernel(9, 45.0)  # counter-clockwise: up to the right
    assert rising[2, 6] > 0.05 and rising[6, 6] == 0


def test_measuring_a_picture():
    image = torch.rand(2, 17, 24, 3, generator=GENERATOR)
    assert measure(Downsample(4), image).shape == (2, 4, 6, 3)
    torch.testing.assert_close(measure(Grayscale(), image)[..., 1], image @ torch.tensor([0.299, 0.587, 0.114]))
    noisy = measure(Identity(), image, 0.1, seed=4)
    assert torch.equal(noisy, measure(Identity(), image, 0.1, seed=4))
    assert float((noisy - image).std()) == pytest.approx(0.1, rel=0.05)
    torch.testing.assert_close(measure(Identity(), image[1:], 0.1, seed=5), noisy[1:])  # picture 1 draws from seed 4 + 1


def test_refusals():
    with pytest.raises(NodeInputError, match="factor"):
        Downsample(32).forward(torch.zeros(1, 3, 16, 16))
    with pytest.raises(NodeInputError, match="kind"):
        Grayscale().forward(torch.zeros(1, 16, 8, 8))
    for kernel in (torch.ones(4, 4), torch.zeros(3, 3), torch.ones(3)):
        with pytest.raises(NodeInputError, match="kernel"):
            Blur(kernel)
