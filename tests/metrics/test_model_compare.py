"""Model Compare: equal models are equal, what a cache saves is counted, figures follow from the runs."""

from __future__ import annotations

import csv
import io
import math

import pytest
import torch
from rectiflow.host import sampler_object
from rectiflow.metrics.model_sheet import model_row, model_table, shrunk
from rectiflow.metrics.stopwatch import RunTimes


def compared(tiny, rounds=1, batch=1, labels="plain\nsame\nhalf", **models):
    sockets = {
        "noise": tiny.noise(), "positive": tiny.prompt("noto cat on white"), "negative": tiny.prompt(""),
        "latent_image": tiny.empty(batch, 16), "sampler": sampler_object("euler"), "sigmas": tiny.sigmas(6), "vae": tiny.vae,
    }  # fmt: skip
    return tiny.node("RectiflowModelCompare", **sockets, cfg=2.0, labels=labels, rounds=rounds, scale=1, **models)


def test_equal_models_are_equal_and_a_cache_is_counted(tiny):
    half, report = tiny.node(
        "RectiflowIntervalCache", model=tiny.model, interval=2, warmup_steps=0, tail_steps=0, granularity="last_block", blocks="",
        start_percent=0.0, end_percent=1.0, store_dtype="same", store_device="model", max_mib=512,
    )[:2]  # fmt: skip
    grid, table, text, _ = compared(tiny, rounds=2, batch=2, model_1=tiny.model, model_2=tiny.model.clone(), model_4=half)
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [row["label"] for row in rows] == ["plain", "same", "model 4"]
    assert [float(row["psnr"]) for row in rows[:2]] == [math.inf] * 2 and [float(row["features"]) for row in rows[:2]] == [0.0, 0.0]
    assert float(rows[0]["speed"]) == 1.0 and all(float(row["seconds"]) > 0 for row in rows)
    assert rows[0]["calls"] == rows[1]["calls"] == "6"
    assert 10 < float(rows[2]["psnr"]) < 60 and 0 < float(rows[2]["features"]) < 1
    assert float(rows[0]["mib"]) == pytest.approx(tiny.model.model_size() / 2**20, abs=1e-3)
    assert grid.shape[0] == 1 and "median of 2 runs" in table and "against plain" in table
    assert len(report.runs) == 3


def test_the_grid_shows_what_each_model_draws(tiny):
    grid, _, _, latents = compared(tiny, model_1=tiny.model, model_2=tiny.model)
    found = grid[0, 8 : 8 + 64, 8 : 8 + 64]
    guider = tiny.guider(cfg=2.0)
    latent = tiny.empty(1, 16)
    sampler = sampler_object("euler")
    drawn = guider.sample(tiny.noise().generate_noise(latent), latent["samples"], sampler, tiny.sigmas(6), disable_pbar=True, seed=7)
    assert torch.equal(latents["samples"], torch.cat([drawn, drawn]))
    # 8-bit captions and pictures: half a level
    torch.testing.assert_close(found, tiny.vae.decode(drawn)[0].float().clamp(0, 1), atol=0.5 / 255 + 1e-4, rtol=0)


def test_medians_and_the_speed_they_give():
    def run(seconds):
        return RunTimes(seconds, seconds, 4, 3, 4, 4, True)

    row = model_row("half", 3 << 20, [run(1.0), run(9.0), run(2.0)], [run(4.0)], (30.0, 0.9, 0.1))
    assert (row.mib, row.seconds, row.speed, row.calls) == (3.0, 2.0, 2.0, 3)
    assert "half" in model_table([row], 3) and "2.00×" in model_table([row], 3)


@pytest.mark.parametrize("size, expected", [((64, 64), (64, 64)), ((1024, 768), (128, 96)), ((200, 136), (96, 64)), ((8, 8), (8, 8))])
def test_pictures_are_averaged_down(size, expected):
    pictures = torch.rand(2, *size, 3, generator=torch.Generator().manual_seed(0))
    small = shrunk(pictures)
    assert small.shape[1:3] == expected
    factor = -(-max(size) // 128)
    torch.testing.assert_close(small[:, 0, 0], pictures[:, :factor, :factor].mean(dim=(1, 2)) if min(expected) > 8 else pictures[:, 0, 0])
