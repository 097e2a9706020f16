"""What a cache can keep, told before a run, and a run as a picture."""

from __future__ import annotations

import pytest
import torch
from rectiflow.accel.cache.inspection import inspect_model
from rectiflow.accel.cache.report import CacheLog, RunRecord, VisitRecord
from rectiflow.accel.cache.timeline import FORECAST, FULL, LEFT, MIXED, ROW, TOP, timeline
from rectiflow.errors import NodeInputError
from rectiflow.nodes import NODE_CLASS_MAPPINGS as NODES


def test_bytes_told_beforehand_are_the_bytes_kept(tiny, cached):
    """One condition, order 1: two factors."""
    for target in ("output", "last_block"):
        model, log = cached(target, interval=3, order=1)
        tiny.sample("noto cat on blue", tiny.noise([1]), steps=6, cfg=1.0, model=model)
        told = inspect_model(tiny.model, 64, 64)
        assert told.latent == tuple(tiny.noise([1]).shape[1:])
        assert log.last.peak_bytes == 2 * told.bytes_per_factor(target)


def test_inspection_names_family_blocks_and_targets(tiny):
    (text,) = NODES["RectiflowCacheInspect"]().execute(model=tiny.model, width=64, height=64)
    assert "Flux" in text and "double:0-" in text and "text before the image" in text
    assert all(f"{target}: " in text for target in ("output", "last_block", "block_delta", "modules")) and "condition: " not in text
    network = tiny.model.model.diffusion_model
    assert f"{4 * len(network.double_blocks) + len(network.single_blocks)} outputs of attention and MLP" in text


def test_the_timeline_shows_each_visit_in_its_colour():
    record = RunRecord("policy", "output", 3, finished=True)
    record.visits = [
        VisitRecord(0, 1.0, 0.0, "full", "warm-up", full=2), VisitRecord(1, 0.6, 1.0, "forecast", "interval", forecast=2),
        VisitRecord(2, 0.3, 2.0, "forecast", "forecast, without history in part", full=1, forecast=1),
    ]  # fmt: skip
    picture = timeline(record)
    assert picture.shape[0] == 1 and picture.shape[-1] == 3 and picture.dtype == torch.float32

    def colour(column: int, row: int) -> tuple[int, ...]:
        return tuple((picture[0, TOP + ROW * row + 8, LEFT + 22 * column + 8] * 255).round().int().tolist())

    assert [colour(column, 0) for column in range(3)] == [FULL, FORECAST, MIXED]
    assert [colour(2, row) for row in (1, 2)] == [FULL, FORECAST]


def test_a_timeline_of_a_cache_that_has_not_run_is_refused():
    with pytest.raises(NodeInputError, match="a cache that has not run"):
        NODES["RectiflowCacheTimeline"]().execute(report=CacheLog(), after=None)


def test_the_timeline_node_draws_a_run_and_gives_its_json(tiny, cached):
    model, log = cached("output", interval=2)
    tiny.sample("noto cat on blue", tiny.noise([1]), steps=6, model=model)
    picture, raw = NODES["RectiflowCacheTimeline"]().execute(report=log, after=None)
    assert picture.min() >= 0 and picture.max() == 1 and '"visits"' in raw
