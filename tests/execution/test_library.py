"""The embedded host as a library: make_host and run_graph."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from PIL import Image
from rectiflow.host.embedded import NodeExecutionError, PromptError, RunInterrupted, current_host, make_host, run_graph, use_host
from rectiflow.host.embedded.execution.executor import PromptExecutor
from rectiflow.tests.execution.toy_nodes import graph, toy_classes

PICTURE = graph(
    m=("SolidMask", {"value": 0.5, "width": 16, "height": 24}), i=("MaskToImage", {"mask": "m.0"}),
    out=("SaveImage", {"images": "i.0", "filename_prefix": "sub/grey"}),
)  # fmt: skip


@pytest.fixture(scope="module")
def shared_host(tmp_path_factory):
    return make_host(tmp_path_factory.mktemp("base"))


@pytest.fixture
def host(shared_host):
    log: list = []
    shared_host.registry.add(toy_classes(log))
    shared_host.interrupt.clear()
    return shared_host


def test_importing_the_package_loads_neither_torch_nor_nodes():
    source = "import sys, rectiflow.host.embedded as e; e.announce(); print('torch' in sys.modules, 'numpy' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False", "False"]


def test_a_host_knows_core_nodes_and_this_pack(host):
    assert "rectiflow_embedded_host" in sys.modules
    assert {"SaveImage", "KSampler", "RectiflowLoadTiny"} <= set(host.registry)
    assert host.registry.failures == {}
    assert host.registry.object_info("SaveImage")["python_module"] == "nodes"
    assert host.registry.object_info("RectiflowLoadTiny")["python_module"] == "custom_nodes.rectiflow"


def test_every_folder_can_be_given(tmp_path):
    pack = tmp_path / "packs" / "extra"
    pack.mkdir(parents=True)
    (pack / "__init__.py").write_text("NODE_CLASS_MAPPINGS = {'FromExtra': int}")
    (tmp_path / "paths.yaml").write_text("more:\n  base_path: elsewhere\n  vae: vaes\n")
    names = ("output", "input", "temp", "user", "models")
    folders = {f"{name}_directory": tmp_path / f"my_{name}" for name in names}
    host = make_host(tmp_path, **folders, extra_model_paths=[tmp_path / "paths.yaml"], custom_nodes=[tmp_path / "packs"])
    for name in names[:-1]:
        assert getattr(host.paths, f"{name}_directory") == str(tmp_path / f"my_{name}")
    assert host.paths.get_folder_paths("vae") == [str(tmp_path / "my_models" / "vae"), str(tmp_path / "elsewhere" / "vaes")]
    assert "FromExtra" in host.registry
    assert sorted(path.name for path in tmp_path.iterdir()) == ["packs", "paths.yaml"]  # nothing is created


def test_a_graph_writes_a_picture_that_carries_it(host):
    result = run_graph(PICTURE, host)
    (file,) = result.files
    assert file.parent == Path(host.paths.output_directory, "sub") and file.name.startswith("grey_")
    assert result.outputs["out"]["images"][0]["filename"] == file.name
    with Image.open(file) as picture:
        assert picture.size == (16, 24)
        assert json.loads(picture.text["prompt"]) == PICTURE
    assert set(result.node_seconds) == {"m", "i", "out"} and 0 < sum(result.node_seconds.values()) <= result.seconds
    assert result.cached == () and result.history["status"]["completed"]
    again = run_graph(file, host)  # the graph out of its own picture
    assert len(again.files) == 1 and again.files[0] != file


def test_the_callers_graph_is_not_changed(host):
    prompt = graph(n=("Number", {"value": "5"}), out=("Show", {"value": "n.0"}))
    assert run_graph(prompt, host).outputs["out"] == {"value": [5]}
    assert prompt["n"]["inputs"]["value"] == "5"


def test_results_are_kept_between_runs_of_one_executor(host):
    executor = PromptExecutor(host)
    assert run_graph(PICTURE, executor=executor).cached == ()
    assert run_graph(PICTURE, executor=executor).cached == ("m", "i", "out")


def test_events_are_heard(host):
    heard = []
    run_graph(PICTURE, host, on_event=lambda event, data: heard.append(event))
    assert heard[0] == "execution_start" and heard[-1] == "execution_success" and heard.count("executing") == 3


def test_targets_and_cache_modes(host):
    prompt = graph(n=("Number", {"value": 1}), a=("Show", {"value": "n.0"}), b=("Show", {"value": 2}))
    for cache in ("classic", "none", "lru:3", None):
        assert list(run_graph(prompt, host, cache, targets=["b"]).outputs) == ["b"]
    with pytest.raises(ValueError, match="classic, none, lru:N"):
        run_graph(prompt, host, "some")


def test_an_invalid_graph_is_told_node_by_node(host):
    with pytest.raises(PromptError) as caught:
        run_graph(graph(s=("Add", {"a": "x", "b": 5000}), out=("Show", {"value": "s.0"})), host)
    lines = str(caught.value).split("\n")
    assert lines[0] == "Prompt outputs failed validation"
    assert lines[1].startswith("  node s (Add): Failed to convert an input value to a INT value: a, x")
    assert lines[2] == "  node s (Add): Value 5000 bigger than max of 1000: b"
    assert caught.value.error["type"] == "prompt_outputs_failed_validation" and set(caught.value.node_errors) == {"s"}
    with pytest.raises(PromptError, match="nearest known classes: Number"):
        run_graph({"1": {"class_type": "Numbr", "inputs": {}}}, host)
    with pytest.raises(PromptError):  # one good output does not excuse a bad one
        run_graph(graph(out=("Show", {"value": 1}), s=("Add", {"a": "x", "b": 1}), bad=("Show", {"value": "s.0"})), host)


def test_a_failing_node_is_an_exception_with_its_place(host):
    with pytest.raises(NodeExecutionError, match=r"node f \(Fail\): cannot take 3") as caught:
        run_graph(graph(f=("Fail", {"value": 3}), out=("Show", {"value": "f.0"})), host)
    error = caught.value
    assert (error.node_id, error.node_type, error.message, error.exception_type) == ("f", "Fail", "cannot take 3", "RuntimeError")
    assert any("toy_nodes" in line for line in error.traceback)


def test_an_interruption_from_another_thread(host):
    threading.Timer(0.1, host.interrupt.set).start()
    with pytest.raises(RunInterrupted, match="node w"):
        run_graph(graph(w=("Wait", {"value": 1, "seconds": 10.0}), out=("Show", {"value": "w.0"})), host)
    assert run_graph(graph(out=("Show", {"value": 1})), host).outputs["out"] == {"value": [1]}


@pytest.mark.skipif(os.name == "nt", reason="signals are sent differently there")
def test_ctrl_c_stops_the_run_and_the_handler_is_given_back(host):
    before = signal.getsignal(signal.SIGINT)
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        run_graph(graph(w=("Wait", {"value": 1, "seconds": 10.0}), out=("Show", {"value": "w.0"})), host)
    assert signal.getsignal(signal.SIGINT) is before
    assert run_graph(graph(out=("Show", {"value": 1})), host).outputs["out"] == {"value": [1]}


def test_a_notebook_with_a_running_loop_can_run_graphs(host):
    async def cell():
        with use_host(host):
            return run_graph(graph(w=("Wait", {"value": 1, "seconds": 0.01}), out=("Show", {"value": "w.0"})))

    assert asyncio.run(cell()).outputs["out"] == {"value": [1]}


def test_two_hosts_live_side_by_side(host, tmp_path):
    other = make_host(tmp_path)
    first, second = run_graph(PICTURE, host), run_graph(PICTURE, other)
    assert Path(host.paths.output_directory) in first.files[0].parents
    assert tmp_path in second.files[0].parents
    with use_host(other):
        assert current_host() is other and run_graph(PICTURE).files[0].parent == tmp_path / "output" / "sub"
    assert "Number" in host.registry and "Number" not in other.registry
