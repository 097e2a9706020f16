"""Conditions: what is repeated, cut, joined and refused."""

from __future__ import annotations

import pytest
import torch
from rectiflow.host.embedded.conds import CONDConstant, CONDCrossAttn, CONDList, CONDNoiseShape, CONDRegular


def numbered(*shape):
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)


def test_regular_repeats_and_joins():
    cond = CONDRegular(numbered(1, 3)).process_cond(batch_size=2, area=None)
    assert cond.cond.shape == (2, 3) and type(cond) is CONDRegular
    other = CONDRegular(torch.ones(2, 3))
    assert cond.can_concat(other) and not cond.can_concat(CONDRegular(torch.ones(2, 4)))
    assert cond.concat([other, other]).shape == (6, 3) and cond.size() == [2, 3]


def test_noise_shape_follows_the_area():
    cond = CONDNoiseShape(numbered(1, 1, 4, 5)).process_cond(batch_size=2, area=[2, 3, 1, 2])
    assert torch.equal(cond.cond, numbered(1, 1, 4, 5)[:, :, 1:3, 2:5].repeat(2, 1, 1, 1))
    assert CONDNoiseShape(numbered(1, 1, 4, 5)).process_cond(batch_size=1, area=None).cond.shape == (1, 1, 4, 5)


def attention(query, states):
    return torch.softmax(query @ states.T, dim=-1) @ states


def test_cross_attention_joins_lengths_without_changing_attention():
    short, long = torch.randn(1, 2, 4, generator=torch.Generator().manual_seed(0)), numbered(1, 3, 4) / 10
    joined = CONDCrossAttn(short).concat([CONDCrossAttn(long)])
    assert joined.shape == (2, 6, 4)
    query = torch.ones(5, 4)
    for original, padded in zip((short[0], long[0]), joined):
        torch.testing.assert_close(attention(query, padded), attention(query, original))


@pytest.mark.parametrize(
    ("one", "other", "joinable"), [((1, 2, 4), (1, 8, 4), True), ((1, 2, 4), (1, 9, 4), False), ((1, 2, 4), (1, 2, 5), False)]
)
def test_cross_attention_refuses_what_does_not_fit_or_grows_too_long(one, other, joinable):
    assert CONDCrossAttn(torch.zeros(one)).can_concat(CONDCrossAttn(torch.zeros(other))) is joinable


def test_constant_joins_equal_values_only():
    cond = CONDConstant(3.5).process_cond(batch_size=4)
    assert cond.cond == 3.5 and cond.concat([CONDConstant(3.5)]) == 3.5 and cond.size() == [1]
    assert cond.can_concat(CONDConstant(3.5)) and not cond.can_concat(CONDConstant(4.0))


def test_list_joins_place_by_place():
    cond = CONDList([numbered(1, 2, 2), numbered(1, 2, 3)]).process_cond(batch_size=2)
    assert [entry.shape for entry in cond.cond] == [(2, 2, 2), (2, 2, 3)]
    joined = cond.concat([cond])
    assert [entry.shape for entry in joined] == [(4, 2, 2), (4, 2, 3)]
    assert cond.size() == [1, 2, 10]  # 2·2·2 + 2·2·3 elements in 2 channels
    assert not cond.can_concat(CONDList([torch.zeros(2, 2, 2)]))
    assert CONDList([]).process_cond(batch_size=2).size() == [1, 1, 0]
