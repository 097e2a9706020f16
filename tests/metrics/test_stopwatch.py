"""The stopwatch: counts that agree with what was asked, first and warm runs, stopped runs, and a picture that does not change."""

from __future__ import annotations

import time

import pytest
import torch
from rectiflow.errors import NodeInputError
from rectiflow.host import sampler_object
from rectiflow.host.embedded import run_graph
from rectiflow.host.embedded.execution.executor import PromptExecutor
from rectiflow.metrics.stopwatch import RunTimes, Stopwatch


def run(tiny, model, steps=2, cfg=1.0, seed=7, batch=1, callback=None, sampler="euler"):
    guider = tiny.guider(model, cfg)
    empty = tiny.empty(batch)["samples"]
    noise = tiny.noise(seed).generate_noise({"samples": empty})
    return guider.sample(noise, empty, sampler_object(sampler), tiny.sigmas(steps), callback=callback, disable_pbar=True, seed=seed)


def test_a_watched_run_is_bit_identical_and_the_model_is_left_alone(tiny):
    watched, stopwatch = tiny.node("RectiflowStopwatch", model=tiny.model)
    assert torch.equal(run(tiny, watched, cfg=3.0), run(tiny, tiny.model, cfg=3.0))
    assert len(stopwatch.runs) == 1


@pytest.mark.parametrize(("cfg", "sampler", "evaluations", "unconditional"), [
    (1.0, "euler", 3, 0), (3.0, "euler", 3, 6), (3.0, "heun", 5, 10),
])
def test_counts_are_what_the_solver_and_guidance_ask(tiny, cfg, sampler, evaluations, unconditional):
    """Euler 3 steps: 3 evaluations; Heun 2·3 − 1. Batch 2: two rows a condition and evaluation."""
    watched, stopwatch = tiny.node("RectiflowStopwatch", model=tiny.model)
    latent = run(tiny, watched, steps=3, cfg=cfg, batch=2, sampler=sampler)
    found = stopwatch.runs[0]
    assert (found.evaluations, found.conditional_rows, found.unconditional_rows) == (evaluations, 2 * evaluations, unconditional)
    assert found.calls in (evaluations, 2 * evaluations)  # both halves in one call where memory allows
    assert 0 < found.network_seconds <= found.seconds and found.finished
    report, seconds, _, asked, calls = tiny.node("RectiflowStopwatchReport", stopwatch=stopwatch, latent={"samples": latent})
    assert (seconds, asked, calls) == (found.seconds, evaluations, found.calls) and f"{evaluations} evaluations" in report


def test_calls_that_a_cache_before_it_answers_are_not_counted(tiny):
    answered = []

    def cache(executor, *args, **kwargs):
        if not answered:
            answered.append(executor(*args, **kwargs))
        return answered[0]

    cached = tiny.model.clone()
    cached.add_wrapper_with_key("apply_model", "cache", cache)
    inner, outer = Stopwatch(), Stopwatch()
    run(tiny, inner.watch(cached), steps=4)
    answered.clear()
    before = outer.watch(tiny.model)
    before.add_wrapper_with_key("apply_model", "cache", cache)
    run(tiny, before, steps=4)
    assert (inner.runs[0].evaluations, inner.runs[0].calls) == (4, 1)
    assert (outer.runs[0].evaluations, outer.runs[0].calls) == (4, 4)


def test_seconds_are_those_that_pass(tiny):
    watched, stopwatch = tiny.node("RectiflowStopwatch", model=tiny.model)
    start = time.perf_counter()
    run(tiny, watched, callback=lambda *step: time.sleep(0.05))
    passed = time.perf_counter() - start
    found = stopwatch.runs[0]
    assert 0.1 < found.seconds <= passed
    assert found.network_seconds < found.seconds - 0.1  # the callback's 2·0.05 s are the solver's, not the network's


def test_the_first_run_stands_apart_and_a_stopped_one_does_not_count(tiny):
    watched, stopwatch = tiny.node("RectiflowStopwatch", model=tiny.model)
    assert stopwatch.report() == "no run yet" and stopwatch.warm_seconds() != stopwatch.warm_seconds()
    run(tiny, watched)
    assert stopwatch.warm == [] and "no warm run yet" in stopwatch.report()
    for seed in (1, 2):
        run(tiny, watched, seed=seed)

    def stop(*step):
        raise InterruptedError

    with pytest.raises(InterruptedError):
        run(tiny, watched, callback=stop)
    assert [found.finished for found in stopwatch.runs] == [True, True, True, False]
    assert stopwatch.warm_seconds() == pytest.approx((stopwatch.runs[1].seconds + stopwatch.runs[2].seconds) / 2)
    assert "warm runs: 2" in stopwatch.report() and "not finished" in stopwatch.report()
    run(tiny, watched)
    assert stopwatch.runs[-1].evaluations == 2  # nothing of the stopped run is left


def test_two_stopwatches_on_one_model_count_the_same(tiny):
    one, first = tiny.node("RectiflowStopwatch", model=tiny.model)
    both, second = tiny.node("RectiflowStopwatch", model=one)
    run(tiny, both)
    assert first.runs[0].calls == second.runs[0].calls == 2 and first.runs[0].seconds >= second.runs[0].seconds


def test_a_line_names_every_count():
    line = RunTimes(2.0, 1.5, 10, 20, 30, 40, True).line()
    assert line == "2.000 s, of it 75.0% in the network; 10 evaluations, 20 network calls, rows 30 conditional + 40 unconditional"


def test_a_report_without_a_run_says_what_to_link(tiny):
    with pytest.raises(NodeInputError, match="Stopwatch Report: input 'stopwatch'"):
        tiny.node("RectiflowStopwatchReport", stopwatch=Stopwatch(), latent=tiny.empty())


def timed_graph(seed: int) -> dict:
    """Two samplers on one model, each with a stopwatch of its own."""
    graph = {
        "1": ("RectiflowLoadTiny", {}),
        "2": ("CLIPTextEncode", {"text": "noto cat on white", "clip": ["1", 1]}),
        "3": ("RectiflowEmptyLatent", {"vae": ["1", 2], "width": 32, "height": 32, "batch_size": 1}),
    }
    for place, steps in ((10, 2), (20, 3)):
        watch, sampler, report, text = (str(place + offset) for offset in range(4))
        graph[watch] = ("RectiflowStopwatch", {"model": ["1", 0]})
        graph[sampler] = ("KSampler", {
            "model": [watch, 0], "seed": seed, "steps": steps, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple",
            "positive": ["2", 0], "negative": ["2", 0], "latent_image": ["3", 0], "denoise": 1.0,
        })
        graph[report] = ("RectiflowStopwatchReport", {"stopwatch": [watch, 1], "latent": [sampler, 0]})
        graph[text] = ("PreviewAny", {"source": [report, 0]})
    return {key: {"class_type": kind, "inputs": inputs} for key, (kind, inputs) in graph.items()}


def test_a_second_run_of_the_graph_is_warm_and_two_stopwatches_are_two(metrics_host):
    """The graph cache keeps the stopwatch between the runs, and keeps equal nodes apart that it would give one output otherwise."""
    executor = PromptExecutor(metrics_host)
    first, second = (run_graph(timed_graph(seed), executor=executor).outputs for seed in (1, 2))
    for text, evaluations in (("13", 2), ("23", 3)):
        assert f"{evaluations} evaluations" in first[text]["text"][0] and "no warm run yet" in first[text]["text"][0]
        assert "warm runs: 1," in second[text]["text"][0]
    again = run_graph(timed_graph(2), executor=executor)
    assert "13" not in again.outputs or again.outputs["13"]["text"] == second["13"]["text"]  # nothing ran, so the report stays
