"""The palettes' nodes on the tiny model: outputs, regions, reports, refusals, help pages."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from rectiflow.errors import NodeInputError
from rectiflow.host import InterruptProcessingException
from rectiflow.metrics.heat_map import QUANTITIES
from rectiflow.metrics.reports import REGIONS
from rectiflow.nodes import compare, metrics
from rectiflow.nodes.declare import Node
from rectiflow.samplers.model_shift import SCHEDULERS
from rectiflow.samplers.registry import SOLVERS

NODES = [
    value for module in (metrics, compare) for value in vars(module).values()
    if isinstance(value, type) and issubclass(value, Node) and value.TITLE and value.__module__ == module.__name__
]
DOCS = Path(metrics.__file__).parent.parent / "web" / "docs"


@pytest.mark.parametrize("node", NODES)
def test_help_page_knows_every_input(node):
    page = (DOCS / f"{node.__name__}.md").read_text(encoding="utf-8")
    for declared in node.INPUTS:
        assert declared.name in page, declared.name
    assert "## Reference" in page and "## Graph" in page and node.__name__ in page


def test_drop_downs_and_texts_offer_what_the_rooms_have():
    offered = {declared.name: declared for node in NODES for declared in node.INPUTS}
    assert offered["region"].type == REGIONS and offered["quantity"].type == QUANTITIES
    assert offered["scheduler"].type == SCHEDULERS
    assert all(name in offered["solvers"].options["tooltip"] for name in SOLVERS)


def test_numbers_are_of_the_chosen_region_and_the_report_has_all(tiny):
    cat = tiny.picture()
    changed = cat.clone()
    changed[:, 16:48, 16:48] = 0.3
    mask = torch.zeros(1, 64, 64)
    mask[:, 16:48, 16:48] = 1
    figures = {}
    for region in REGIONS:
        report, psnr, ssim, mse = tiny.node(
            "RectiflowPictureMetrics", image=changed, reference=cat, window="gaussian", region=region, mask=mask
        )
        figures[region] = psnr, ssim, mse
        assert all(f"\n{name} " in report for name in REGIONS)
    assert figures["outside"][0] == math.inf and figures["outside"][2] == 0
    assert figures["mask"][2] / 4 == pytest.approx(figures["whole"][2])
    no_mask = tiny.node("RectiflowPictureMetrics", image=changed, reference=cat, window="gaussian", region="mask")
    assert no_mask[1:] == figures["whole"]


def test_a_region_that_nobody_asked_for_may_be_empty(tiny):
    cat, full = tiny.picture(), torch.ones(1, 64, 64)
    inputs = {"image": cat * 0.5, "reference": cat, "window": "uniform", "mask": full}
    report, *_ = tiny.node("RectiflowPictureMetrics", region="mask", **inputs)
    assert "outside" not in report
    with pytest.raises(NodeInputError, match="Picture Metrics: input 'mask'"):
        tiny.node("RectiflowPictureMetrics", region="outside", **inputs)


def test_alpha_is_left_out_and_a_batch_shares_its_reference(tiny):
    cat = tiny.picture()
    with_alpha = torch.cat([cat, torch.rand(1, 64, 64, 1)], dim=-1)
    report, psnr, *_ = tiny.node(
        "RectiflowPictureMetrics", image=with_alpha.expand(3, -1, -1, -1), reference=cat, window="gaussian", region="whole"
    )
    assert psnr == math.inf and "mean" in report


def test_the_difference_picture_states_its_scale(tiny):
    cat = tiny.picture()
    heat, scale = tiny.node("RectiflowDifferencePicture", image=cat * 0.5, reference=cat, quantity="absolute", full_scale=0.0)
    assert heat.shape == cat.shape and scale == pytest.approx(0.5, abs=1e-6)
    assert tiny.node("RectiflowDifferencePicture", image=cat * 0.5, reference=cat, quantity="signed", full_scale=0.3)[1] == 0.3


def test_the_inversion_report_measures_pictures_or_latents_and_drift(tiny):
    cat = tiny.picture()
    latent = {"samples": tiny.vae.encode(cat)}
    off = {"samples": latent["samples"] + 0.1}
    report, mse, psnr, ssim, drift = tiny.node(
        "RectiflowInversionReport", window="gaussian", source_latent=latent, latent=off, last_denoised=off
    )
    spread = float(latent["samples"].max() - latent["samples"].min())
    assert mse == pytest.approx(0.01, rel=1e-4) and psnr == pytest.approx(20 * math.log10(spread / 0.1), abs=1e-3)
    assert drift == pytest.approx(0.1, rel=1e-4) and 0.9 < ssim < 1 and "\nlatent " in report
    report, _, psnr, _, drift = tiny.node(
        "RectiflowInversionReport", window="gaussian", source_image=cat, image=cat, source_latent=latent, latent=off
    )
    assert psnr == math.inf and math.isnan(drift) and "\nlatent " in report and "not measured" in report
    video = {"samples": latent["samples"].unsqueeze(2).repeat(1, 1, 3, 1, 1)}
    assert tiny.node("RectiflowInversionReport", window="uniform", source_latent=video, latent=video)[2] == math.inf


@pytest.mark.parametrize(("inputs", "message"), [
    ({}, "'image'"),
    ({"source_image": torch.zeros(1, 64, 64, 3)}, "'image'"),
    ({"source_latent": {"samples": torch.rand(1, 4, 16, 16)}, "latent": {"samples": torch.rand(1, 4, 16, 12)}}, "'latent'"),
    ({"source_latent": {"samples": torch.zeros(1, 4, 16, 16)}, "latent": {"samples": torch.rand(1, 4, 16, 16)}}, "'source_latent'"),
])
def test_inversion_reports_that_cannot_be_written(tiny, inputs, message):
    with pytest.raises(NodeInputError, match=f"Inversion Report: input {message}"):
        tiny.node("RectiflowInversionReport", window="gaussian", **inputs)


def test_guidance_bends_the_paths_of_the_tiny_model(tiny):
    """Measured: S is about twice as large at cfg 3 as at cfg 1."""
    found = {}
    for cfg in (1.0, 3.0):
        value, relative, table, curve = tiny.node(
            "RectiflowFlowStraightness", noise=tiny.noise(), guider=tiny.guider(cfg=cfg), sigmas=tiny.sigmas(6), latent_image=tiny.empty(2)
        )
        found[cfg] = value
        assert 0 < relative < 1 and curve.shape == (1, 480, 880, 3) and "2 paths, 13 model calls" in table
    assert found[3.0] > 1.2 * found[1.0]


def test_straightness_needs_a_schedule(tiny):
    for sigmas in (torch.zeros(0), tiny.sigmas(3).flip(0)):
        with pytest.raises(NodeInputError, match="Flow Straightness: input 'sigmas'"):
            tiny.node("RectiflowFlowStraightness", noise=tiny.noise(), guider=tiny.guider(), sigmas=sigmas, latent_image=tiny.empty())


def test_solvers_side_by_side(tiny):
    watched, stopwatch = tiny.node("RectiflowStopwatch", model=tiny.model)
    grid, plot, table, report = tiny.node(
        "RectiflowSolverCompare", noise=tiny.noise(), guider=tiny.guider(watched), latent_image=tiny.empty(1, 4), vae=tiny.vae,
        solvers="euler, rk4", nfe="2, 7", scheduler="uniform", reference_steps=4, scale=1,
    )  # fmt: skip
    lines = [line.split(",") for line in table.splitlines()]
    assert lines[0] == ["solver", "budget", "steps", "nfe", "seconds", "rmse", "psnr"]
    assert [line[:4] for line in lines[1:]] == [["euler", "2", "2", "2"], ["euler", "7", "7", "7"], ["rk4", "7", "2", "7"]]
    counted = [run.evaluations for run in stopwatch.runs]
    assert counted == [15, 7, 2, 7, 7]  # both references (4N − 1), then the rows: the stopwatch counts the same
    assert float(lines[2][5]) < float(lines[1][5])
    assert grid.shape[2] > 3 * 16 and plot.shape == (1, 480, 880, 3) and "reference: RK4, 4 steps" in report


@pytest.mark.parametrize(("changed", "message"), [({"solvers": "euler, dopri"}, "'solvers'"), ({"nfe": "many"}, "'nfe'")])
def test_comparisons_that_cannot_be_run(tiny, changed, message):
    inputs = {"solvers": "euler", "nfe": "2", "scheduler": "uniform", "reference_steps": 4, "scale": 1, **changed}
    with pytest.raises(NodeInputError, match=f"Solver Compare: input {message}"):
        tiny.node(
            "RectiflowSolverCompare", noise=tiny.noise(), guider=tiny.guider(), latent_image=tiny.empty(), vae=tiny.vae, **inputs
        )


def test_a_request_to_stop_ends_a_comparison_within_a_step(tiny, metrics_host):
    """Asked in the third evaluation; the next one does not come, and the stopwatch has no run left open."""
    watched, stopwatch = tiny.node("RectiflowStopwatch", model=tiny.model)
    asked = []

    def stop_in_the_third(executor, *args, **kwargs):
        asked.append(1)
        if len(asked) == 3:
            metrics_host.interrupt.set()
        return executor(*args, **kwargs)

    watched.add_wrapper_with_key("predict_noise", "stop", stop_in_the_third)
    sockets = {"noise": tiny.noise(), "guider": tiny.guider(watched), "latent_image": tiny.empty(1, 4), "vae": tiny.vae}
    try:
        with pytest.raises(InterruptProcessingException):
            tiny.node(
                "RectiflowSolverCompare", **sockets, solvers="euler", nfe="4", scheduler="uniform", reference_steps=4, scale=1
            )
    finally:
        metrics_host.interrupt.clear()
    assert len(asked) <= 4 and [run.finished for run in stopwatch.runs] == [False]
