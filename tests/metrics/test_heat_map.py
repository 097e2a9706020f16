"""Heat maps: what is shown where, the scale, colours that grow brighter."""

from __future__ import annotations

import pytest
import torch
from rectiflow.errors import NodeInputError
from rectiflow.metrics.heat_map import QUANTITIES, difference, heat_map
from rectiflow.tests.metrics.pictures import blob


def test_differences_lie_where_the_pictures_differ():
    reference = blob().float().unsqueeze(0)
    image = reference.clone()
    image[:, 30:34, 30:34] += 0.1
    inside = torch.zeros(1, 40, 52, dtype=torch.bool)
    inside[:, 30:34, 30:34] = True
    for quantity, value in (("absolute", 0.1), ("signed", 0.1)):
        found = difference(image, reference, quantity)
        assert found[inside].tolist() == pytest.approx([value] * 16, abs=1e-6)
        assert float(found[~inside].abs().max()) == 0
    structure = difference(image, reference, "structure")
    assert structure.shape == (1, 40, 52)
    assert float(structure[:, :20, :20].abs().max()) < 1e-9 < 0.01 < float(structure[inside].max())
    darker = difference(reference, image, "signed")
    assert darker[inside].tolist() == pytest.approx([-0.1] * 16, abs=1e-6)


@pytest.mark.parametrize("quantity", QUANTITIES)
def test_equal_pictures_show_nothing(quantity):
    picture = blob().unsqueeze(0)
    values = difference(picture, picture, quantity)
    assert float(values.abs().max()) < 1e-9


def test_colours_grow_brighter_with_the_value():
    colours, scale = heat_map(torch.linspace(0, 1, 256).reshape(1, 1, 256))
    luminance = colours[0, 0] @ torch.tensor([0.2126, 0.7152, 0.0722])
    assert scale == 1 and bool((luminance[1:] > luminance[:-1]).all())
    assert float(colours.min()) >= 0 and float(colours.max()) <= 1


def test_signed_values_are_blue_white_red():
    colours, _ = heat_map(torch.tensor([[[-1.0, 0.0, 1.0]]]), signed=True)
    blue, white, red = colours[0, 0]
    assert blue[2] > blue[0] and float(white.std()) == 0 and red[0] > red[2]


def test_the_scale_is_the_largest_magnitude_unless_one_is_given():
    values = torch.tensor([[[0.1, -0.4]]])
    assert heat_map(values, signed=True)[1] == pytest.approx(0.4)
    colours, scale = heat_map(values.abs(), full_scale=0.2)
    assert scale == 0.2 and torch.equal(colours[0, 0, 1], heat_map(torch.ones(1, 1, 1))[0][0, 0, 0])  # above it: the last colour
    assert torch.equal(heat_map(torch.zeros(1, 2, 2))[0][0, 0, 0], torch.tensor([0, 0, 8]) / 255)


def test_an_unknown_quantity_is_refused():
    with pytest.raises(NodeInputError, match="absolute, signed, structure"):
        difference(torch.zeros(1, 12, 12, 3), torch.zeros(1, 12, 12, 3), "relative")
