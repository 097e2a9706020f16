"""rectiflow.client and `run --server` against a server in another process; against ComfyUI too when COMFYUI_PATH names one."""

from __future__ import annotations

import copy
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rectiflow.client import Client, ClientError, ExecutionFailed, ExecutionInterrupted, OutputFile, Preview, PromptRejected
from rectiflow.tests.cli.conftest import WORKFLOWS, id_of, node_of
from rectiflow.tests.contract.comfyui_server import ComfyUIServer

START_SECONDS = 60


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """Address of our server."""
    folder = tmp_path_factory.mktemp("server")
    log = folder / "log"
    command = [sys.executable, "-m", "rectiflow", "serve", "--port", "0", "--cpu", "--base-directory", str(folder)]
    with log.open("wb") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream, cwd=folder)
    try:
        yield wait_for_address(process, log)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def wait_for_address(process: subprocess.Popen, log: Path) -> str:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        found = re.search(r"http://127\.0\.0\.1:\d+", log.read_text(encoding="utf-8"))
        if found:
            return found.group()
        assert process.poll() is None, log.read_text(encoding="utf-8")
        time.sleep(0.1)
    raise AssertionError(log.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def comfyui_address(tmp_path_factory):
    checkout = os.environ.get("COMFYUI_PATH")
    if not checkout:
        pytest.skip("COMFYUI_PATH does not name a ComfyUI checkout")
    with ComfyUIServer(Path(checkout), os.environ.get("COMFYUI_PYTHON", sys.executable), tmp_path_factory.mktemp("comfyui")) as server:
        yield f"http://127.0.0.1:{server.port}"


@pytest.fixture(params=["ours", pytest.param("comfyui_address", marks=pytest.mark.comfyui)])
def address(request) -> str:
    return request.getfixturevalue(request.param)


@pytest.fixture
def client(address):
    with Client(address) as connected:
        yield connected


def endless(graph: dict) -> dict:
    graph = copy.deepcopy(graph)
    node_of(graph, "KSampler")["inputs"].update(steps=10_000, seed=time.monotonic_ns() % 2**32)
    return graph


def fresh(graph: dict) -> dict:
    """With a seed that no run before had, so that nothing comes from the server's cache."""
    graph = copy.deepcopy(graph)
    node_of(graph, "KSampler")["inputs"]["seed"] = time.monotonic_ns() % 2**32
    return graph


def test_run_and_fetch(client, graph):
    events, previews = [], []
    finished = client.run(fresh(graph), on_event=events.append, on_preview=previews.append)
    (file,) = finished.files
    assert (file.node_id, file.type) == (id_of(graph, "SaveImage"), "output")
    with Image.open(io.BytesIO(client.download(file))) as picture:
        assert picture.size == (384, 384)
    progress = [event.data["value"] for event in events if event.type == "progress" and event.data["node"] == id_of(graph, "KSampler")]
    assert progress == [1, 2]
    assert [event.data["node"] for event in events if event.type == "executing"][-1] is None
    assert finished.seconds > 0 and client.history(finished.prompt_id)["status"]["completed"]
    assert all(isinstance(preview, Preview) and preview.image for preview in previews)


def test_everything_from_the_cache_is_still_an_answer(client, graph):
    graph = fresh(graph)
    first = client.run(graph)
    second = client.run(graph)
    assert [file.filename for file in second.files] == [file.filename for file in first.files]


def test_the_workflow_gets_into_the_picture(client, graph):
    finished = client.run(fresh(graph), workflow={"nodes": [], "links": [], "version": 0.4})
    with Image.open(io.BytesIO(client.download(finished.files[0]))) as picture:
        assert json.loads(picture.text["workflow"])["version"] == 0.4


def test_a_rejected_graph(client, graph):
    node_of(graph, "KSampler")["inputs"]["steps"] = 0
    with pytest.raises(PromptRejected) as caught:
        client.run(graph)
    assert caught.value.error["type"] == "prompt_outputs_failed_validation"
    assert caught.value.node_errors[id_of(graph, "KSampler")]["errors"][0]["type"] == "value_smaller_than_min"
    client.run(fresh_without_error(graph))


def fresh_without_error(graph: dict) -> dict:
    graph = fresh(graph)
    node_of(graph, "KSampler")["inputs"]["steps"] = 2
    return graph


def test_a_failing_node(client, graph):
    node_of(graph, "SaveImage")["inputs"]["filename_prefix"] = "../../escaped"
    with pytest.raises(ExecutionFailed) as caught:
        client.run(graph)
    assert caught.value.node_type == "SaveImage" and caught.value.node_id == id_of(graph, "SaveImage")
    assert caught.value.details["traceback"]


def test_interruption_by_somebody_else(address, client, graph):
    started = threading.Event()
    ids = []

    def on_event(event):
        ids.append(event.data.get("prompt_id"))
        if event.type == "progress":
            started.set()

    def interrupt():
        started.wait(30)
        with Client(address) as other:
            other.cancel(ids[-1])

    helper = threading.Thread(target=interrupt)
    helper.start()
    with pytest.raises(ExecutionInterrupted):
        client.run(endless(graph), on_event=on_event)
    helper.join()
    client.run(fresh(graph))


def test_ctrl_c_interrupts_the_run_on_the_server(client, graph):
    def press(event):
        if event.type == "progress":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        client.run(endless(graph), on_event=press)
    started = time.monotonic()
    client.run(fresh(graph))
    assert time.monotonic() - started < 60, "the interrupted run still holds the server"


def test_a_dropped_socket_is_opened_again(client, graph):
    """The run goes on while the line is cut; its end is found in the history."""
    cut = []

    def on_event(event):
        if event.type == "progress" and not cut:
            cut.append(True)
            client._socket._response.connection.transport.abort()

    finished = client.run(fresh(graph), on_event=on_event)
    assert cut and len(finished.files) == 1


def test_uploading_a_picture(client, graph):
    picture = io.BytesIO()
    Image.new("RGB", (8, 8), (255, 0, 0)).save(picture, "PNG")
    name = client.upload_image("red square.png", picture.getvalue())
    finished = client.run(
        {
            "1": {"class_type": "LoadImage", "inputs": {"image": name}},
            "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "copy"}},
        }
    )
    with Image.open(io.BytesIO(client.download(finished.files[0]))) as copied:
        assert np.array_equal(np.asarray(copied.convert("RGB"))[0, 0], [255, 0, 0])


def test_what_the_server_has(client):
    assert "KSampler" in client.object_info("KSampler")
    assert {"KSampler", "RectiflowLoadTiny"} <= set(client.object_info())
    assert client.system_stats()["devices"]
    assert client.history("no such run") is None
    with pytest.raises(ClientError, match="404"):
        client.download(OutputFile("1", "absent.png", "", "output"))


# --- without a server


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "127.0.0.1:9"])
def test_nobody_answers(url):
    with pytest.raises(ClientError, match="no server answers at http://127.0.0.1:9"), Client(url):
        pass


@pytest.mark.parametrize("url", ["", "ftp://host", "http://"])
def test_addresses_that_are_none(url):
    with pytest.raises(ClientError, match="no server address"):
        Client(url)


def test_outside_of_its_block():
    with pytest.raises(ClientError, match="with"):
        Client().queue({})


# --- the command


def test_run_on_a_server(address, shell, graph):
    answer = shell.run(fresh(graph), "--server", address)
    assert answer.status == 0, answer.err
    (picture,) = shell.written
    assert answer.out.splitlines()[0] == str(picture)
    again = shell.run(fresh(graph), "--server", address)
    assert again.status == 0 and len(shell.written) == 2


def test_a_server_and_this_process_agree(address, shell):
    graph = WORKFLOWS / "text_to_image.json"
    arguments = ("--set", "KSampler.steps=3", "--set", "KSampler.seed=11")
    there, here = shell.run(graph, "--server", address, *arguments), shell.run(graph, *arguments)
    assert there.status == here.status == 0, there.err + here.err
    first, second = (np.asarray(Image.open(line.out.splitlines()[0]), dtype=np.int32) for line in (there, here))
    assert np.abs(first - second).max() <= 1, "8 bits of the same picture"


def test_refusals_of_a_server_read_like_our_own(address, shell, graph):
    node_of(graph, "KSampler")["inputs"].update(steps=0)
    answer = shell.run(graph, "--server", address)
    assert answer.status == 2 and "(KSampler), input 'steps': Value 0 smaller than min of 1" in answer.err
    assert shell.written == []


def test_failures_on_a_server(address, shell, graph):
    node_of(graph, "SaveImage")["inputs"]["filename_prefix"] = "../../escaped"
    answer = shell.run(fresh(graph), "--server", address)
    assert answer.status in (1, 2) and "(SaveImage" in answer.err and "Traceback" not in answer.err


def test_no_server(shell, graph):
    answer = shell.run(graph, "--server", "http://127.0.0.1:9")
    assert answer.status == 1 and "no server answers" in answer.err
