"""The labelled grid: where pictures land, what captions say, and what bad input is told."""

from __future__ import annotations

import pytest
import torch
from rectiflow.errors import NodeInputError
from rectiflow.metrics.picture_grid import GridLayout, captions_for, picture_grid
from rectiflow.nodes.pictures import RectiflowPictureGrid
from rectiflow.tiny.pictures import PICTURES, load_picture

COLOURS = torch.eye(3)


def plain(colour: int, height: int = 4, width: int = 6) -> torch.Tensor:
    return COLOURS[colour].expand(height, width, 3)


def grid(labels: str = "", **given):
    widgets = {"columns": 0, "scale": 1, "method": "nearest", "gap": 2, "font_size": 10, "dark": False}
    return RectiflowPictureGrid().execute(labels=labels, **{**widgets, **given})[0]


def test_pictures_without_captions_stand_exactly_in_their_cells():
    result = grid(columns=2, image_1=plain(0)[None], image_3=torch.stack([plain(1), plain(2)]))
    assert result.shape == (1, 2 + 2 * (4 + 2), 2 + 2 * (6 + 2), 3)
    expected = torch.ones_like(result[0])
    expected[2:6, 2:8], expected[2:6, 10:16], expected[8:12, 2:8] = COLOURS[0], COLOURS[1], COLOURS[2]
    torch.testing.assert_close(result[0], expected, atol=0, rtol=0)


def test_nearest_enlargement_repeats_pixels():
    picture = torch.rand(3, 2, 3, generator=torch.Generator().manual_seed(0))
    result = grid(scale=5, gap=0, image_1=picture[None])
    torch.testing.assert_close(result[0], picture.repeat_interleave(5, 0).repeat_interleave(5, 1), atol=0, rtol=0)


@pytest.mark.parametrize("method", ["nearest", "bilinear", "bicubic"])
def test_every_method_stays_in_range(method):
    picture = torch.rand(1, 8, 8, 3, generator=torch.Generator().manual_seed(1)).round()
    result = grid(scale=3, method=method, image_1=picture)
    assert result.min() >= 0 and result.max() <= 1 and result.dtype == torch.float32


def test_smaller_pictures_are_centred():
    result = grid(gap=0, columns=2, image_1=plain(0, 6, 6)[None], image_2=plain(1, 2, 4)[None])
    torch.testing.assert_close(result[0, 2:4, 7:11], plain(1, 2, 4), atol=0, rtol=0)
    assert (result[0, :2, 6:] == 1).all()


@pytest.mark.parametrize("dark", [False, True])
def test_captions_are_drawn_below_and_pictures_stay_untouched(dark):
    images = {"image_1": plain(0, 20, 60)[None], "image_2": plain(1, 20, 60)[None]}
    bare = grid(columns=2, dark=dark, **images)
    lettered = grid("Euler\nHeun", columns=2, dark=dark, **images)
    assert lettered.shape[1] > bare.shape[1]
    torch.testing.assert_close(lettered[0, 2:22, 2:62], plain(0, 20, 60), atol=0, rtol=0)
    paper = lettered[0, 0, 0]
    for left in (2, 64):
        strip = lettered[0, 22:-2, left : left + 60]
        assert ((strip - paper).abs().amax(-1) > 0.5).any()


def test_long_captions_break_at_spaces_and_cut_single_words():
    one = grid("word", image_1=plain(0, 20, 60)[None])
    three = grid("several words that do not fit", image_1=plain(0, 20, 60)[None])
    cut = grid("m" * 200, image_1=plain(0, 20, 60)[None])
    assert three.shape[1] > one.shape[1]
    assert cut.shape == one.shape


@pytest.mark.parametrize(
    ("sizes", "slots", "lines", "expected"),
    [
        ([1, 1], [1, 2], ["a", "b"], ["a", "b"]),
        ([1, 1], [1, 3], ["a", "b", "c"], ["a", "c"]),
        ([1, 1], [1, 2], ["a"], ["a", ""]),
        ([3], [1], ["a"], ["a 1", "a 2", "a 3"]),
        ([3], [1], ["a", "b", "c"], ["a", "b", "c"]),
        ([3], [1], [""], ["", "", ""]),
        ([2, 1], [1, 2], ["a", "b"], ["a 1", "a 2", "b"]),
        ([1, 1], [2, 3], ["a", "b"], ["b", ""]),
    ],
)
def test_which_line_belongs_to_which_picture(sizes, slots, lines, expected):
    assert captions_for(sizes, slots, lines) == expected


@pytest.mark.parametrize("count", range(1, 10))
def test_the_automatic_grid_is_the_smallest_square(count):
    side = next(number for number in range(1, 5) if number * number >= count)
    result = picture_grid([plain(0)] * count, [""] * count, GridLayout(gap=0))
    assert result.shape == (1, -(-count // side) * 4, min(side, count) * 6, 3)


def test_no_picture_and_absurd_sizes_are_told_what_to_do():
    with pytest.raises(NodeInputError, match="image_1"):
        grid()
    with pytest.raises(NodeInputError, match="scale"):
        grid(scale=32, image_1=torch.zeros(1, 8, 1024, 3))


@pytest.mark.parametrize("name", PICTURES)
def test_example_pictures_are_real_and_masked(name):
    image, mask = load_picture(name)
    assert image.shape == (1, 64, 64, 3) and mask.shape == (1, 64, 64)
    assert image.std() > 0.1 and torch.equal(image[0, 0, 0], torch.ones(3))
    assert set(mask.unique().tolist()) == {0.0, 1.0} and 0.1 < mask.mean() < 0.5
