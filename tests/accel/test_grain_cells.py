"""Cells of grains: what merging, putting back, places, masks and weights compute, in closed form."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from rectiflow.accel.attention.heads import weighted_keys
from rectiflow.accel.region.cells import grain_cells
from rectiflow.accel.region.grid import TokenGrid
from rectiflow.host.embedded.ldm.common import EmbedND

CLOSE = {"atol": 1e-5, "rtol": 0}


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def grid_of(*sides: int) -> TokenGrid:
    return TokenGrid(sides, (1,) * len(sides))


def drawn(grid: TokenGrid, batch: int = 1, seed: int = 0) -> torch.Tensor:
    """How fine each token is, (batch, n); about half of the cells are coarse, in clips alike in every frame."""
    frame = torch.rand(batch, math.prod(grid.sides[-2:]), generator=torch.Generator().manual_seed(seed))
    return frame.repeat(1, math.prod(grid.sides[:-2]))


@pytest.mark.parametrize("sides, side, batch", [((6, 8), 2, 1), ((7, 10), 3, 2), ((2, 5, 7), 2, 3), ((9, 9), 4, 1)])
def test_a_merged_cell_is_the_mean_of_its_tokens_and_every_token_is_in_one_place(sides, side, batch):
    grid = grid_of(*sides)
    maps = drawn(grid, batch)
    cells = grain_cells(maps, grid, side)
    x = random(2 * batch, grid.count, 5)  # two conditions
    merged = cells.merge(x)
    rows, columns = sides[-2:]
    assert merged.shape[1] == cells.merged == grid.count - (side**2 - 1) * cells.coarse.shape[1] * cells.frames
    for sample_ in range(2 * batch):
        own = sample_ % batch
        fine, coarse = cells.fine[own], cells.coarse[own]
        both = torch.cat((fine, coarse.flatten()))
        assert torch.equal(both.sort().values, torch.arange(rows * columns))
        for cell in coarse:
            down, across = cell // columns, cell % columns
            assert int(down.max() - down.min()) == int(across.max() - across.min()) == side - 1
            assert float(maps[own][cell].mean()) < 0.5
        frames = x[sample_].view(cells.frames, rows * columns, 5)
        expected = torch.cat((frames[:, fine], frames[:, coarse].mean(dim=2)), dim=1).flatten(0, 1)
        torch.testing.assert_close(merged[sample_], expected, **CLOSE)
        middle = cells.merge(x, "centre")[sample_].view(cells.frames, -1, 5)[:, len(fine) :]
        assert torch.equal(middle, frames[:, coarse[:, (side // 2) * side + side // 2]])


def test_pictures_of_a_batch_have_one_number_of_tokens():
    """The third picture has two coarse cells, so the others keep their two with least detail."""
    grid = grid_of(6, 8)
    maps = drawn(grid, 3)
    maps[2] = 1.0
    maps[2, [0, 1, 8, 9, 20, 21, 28, 29]] = 0.1
    cells = grain_cells(maps, grid, 2)
    assert cells.coarse.shape == (3, 2, 4) and cells.coarse[2].tolist() == [[0, 1, 8, 9], [20, 21, 28, 29]]
    means = F.avg_pool2d(maps[0].view(1, 1, 6, 8), 2).flatten()
    places = [int(cell[0]) // 16 * 4 + int(cell[0]) % 8 // 2 for cell in cells.coarse[0]]
    assert sorted(places) == sorted(means.argsort()[:2].tolist())


@pytest.mark.parametrize("side", [2, 3, 4])
def test_copy_is_exact_for_a_function_of_tokens_on_cells_constant_inside(side):
    """Done 3. Bit for bit, whatever the number of equal tokens in the mean."""
    grid = grid_of(2, 13, 12)
    cells = grain_cells(drawn(grid, 2), grid, side)
    x = random(2, grid.count, 16)
    frames = x.view(4, -1, 16)
    for frame, coarse in zip(frames, cells.coarse.repeat_interleave(2, dim=0)):
        frame[coarse] = frame[coarse[:, :1]]

    def of_tokens(z):
        return torch.tanh(3 * z) + z * z

    entered = cells.merge(x)
    assert torch.equal(cells.put_back(of_tokens(entered), entered, x, "copy"), of_tokens(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_delta_of_nothing_leaves_the_tokens_bit_for_bit(dtype):
    """Done 4."""
    grid = grid_of(7, 10)
    cells = grain_cells(drawn(grid, 2), grid, 2)
    x = random(4, grid.count, 16).to(dtype)
    entered = cells.merge(x)
    assert torch.equal(cells.put_back(entered.clone(), entered, x, "delta"), x)
    moved = cells.put_back(entered + 1.0, entered, x, "delta")
    torch.testing.assert_close(moved, x + 1.0, atol=1e-5 if dtype == torch.float32 else 0.05, rtol=0)


@pytest.mark.parametrize("side", [2, 3, 4, 5])
def test_a_cell_turns_by_the_angle_of_its_centre(side):
    """Against the embedder at fractional places; text, fine tokens and references keep their rotations bit for bit."""
    embed = EmbedND(32, 10000, (8, 12, 12))
    rows, columns, text, extra = 11, 12, 3, 4
    places = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"), dim=-1).flatten(0, 1).float()
    image = torch.cat((torch.zeros(len(places), 1), places), dim=1)
    ids = torch.cat((torch.zeros(text, 3), image, torch.ones(extra, 3)))
    cells = grain_cells(drawn(grid_of(rows, columns), 2), grid_of(rows, columns), side)
    pe = embed(ids[None])
    axis = next(axis for axis in (1, 2) if pe.shape[axis] == len(ids))
    joint = cells.joint(text, extra, 4, pe.device)
    found, first = (joint.rotations(pe, axis, how) for how in ("centre", "first"))
    for sample_ in range(4):
        own = cells.coarse[sample_ % 2]
        centres = torch.cat((ids[:text], image[cells.fine[sample_ % 2]], image[own].mean(dim=1), ids[-extra:]))
        torch.testing.assert_close(found[sample_ : sample_ + 1], embed(centres[None]), atol=2e-6, rtol=0)
        corners = torch.cat((ids[:text], image[cells.fine[sample_ % 2]], image[own[:, 0]], ids[-extra:]))
        assert torch.equal(first[sample_ : sample_ + 1], embed(corners[None]))
    kept = text + cells.fine.shape[1]
    assert torch.equal(found.narrow(axis, 0, kept), first.narrow(axis, 0, kept))


@pytest.mark.parametrize("by_channel", [True, False])
@pytest.mark.parametrize("masked", ["none", "added", "bool"])
def test_weighted_keys_equal_dense_attention_where_keys_are_constant_per_cell(by_channel, masked):
    """Done 5, for text and fine queries, and for queries that are constant in cells themselves."""
    grid = grid_of(6, 10)
    cells = grain_cells(drawn(grid), grid, 2)
    text, extra = 5, 3
    x = random(1, text + grid.count + extra, 3 * 32, seed=1)
    image = x[0, text : text + grid.count]
    image[cells.coarse[0]] = image[cells.coarse[0][:, :1]]
    q, k, v = (part.transpose(1, 2) for part in x.unflatten(-1, (3, 2, 16)).unbind(2))
    joint = cells.joint(text, extra, 1, x.device)
    mask = None
    if masked != "none":
        rows = random(1, 1, x.shape[1], 1, seed=2).expand(-1, -1, -1, x.shape[1]).clone()
        rows[:, :, :, [1, -1]] = -2.0  # keys of a text token and of a reference
        places = torch.arange(x.shape[1])
        places[joint.cells[0].flatten()] = joint.cells[0, :, :1].expand(-1, 4).flatten()
        rows = rows[:, :, places]
        mask = rows > -1.0 if masked == "bool" else rows
        mask[..., 2] = True if masked == "bool" else 0.0  # every query sees something
    dense = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    few = [x_[:, :, joint.first[0]] for x_ in (q, k, v)]

    def default(q, k, v, mask):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    merged_mask = None if mask is None else joint.mask(mask)
    found = weighted_keys(default, *few, joint.log_weights(k), merged_mask, by_channel)
    torch.testing.assert_close(found, dense[:, :, joint.first[0]], **CLOSE)
    if masked == "none":
        plain = default(*few, None)
        assert (plain - dense[:, :, joint.first[0]]).abs().max() > 1e-2
