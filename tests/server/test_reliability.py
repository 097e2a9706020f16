"""What a server must survive: thousands of broken prompts, sockets that come and go, long queues, SIGTERM in the middle."""

from __future__ import annotations

import http.client
import json
import random
import signal
import socket
import statistics
import time
from pathlib import Path

import pytest
from PIL import Image
from rectiflow.tests.server.graphs import node, picture, show, steps
from rectiflow.tests.server.process import ServerProcess

MUTATIONS = 2000
SOCKETS = 1000
PROMPTS = 300
GROWTH_BYTES = 10 * 1024**2

BASE = {
    "1": node("TestingValue", value=3),
    "2": node("TestingValue", value=["1", 0], after=["1", 0]),
    "3": node("TestingShow", value=["2", 0], name="a"),
    "4": node("EmptyLatentImage", width=64, height=64, batch_size=1),
    "5": node("TestingShow", value=7, name="b"),
}
STRANGE = (
    None, True, -1, 0, 2**63, -(10**300), 1e308, -0.0, "", "\x00", "\ud800", "’𝕏🙂", "a" * 5000, [], {}, [[]], ["1"], ["1", 0, 0],
    ["1", 1.5], ["1", -1], ["1", 10**30], ["9", 0], [1, 0], [None, 0], {"__value__": [1]}, {"a": {"b": [{}]}}, ["3", 0], "NaN",
    "../x", [["1", 0]],
)  # fmt: skip


def mutated(rng: random.Random) -> object:
    """A copy of BASE, or of a whole request, with one to four things wrong."""
    prompt: dict = json.loads(json.dumps(BASE))
    for _ in range(rng.randint(1, 4)):
        key = rng.choice(list(prompt) or ["1"])
        entry = prompt.get(key)
        kind = rng.randrange(9)
        if kind == 0 or not isinstance(entry, dict):
            prompt[key] = rng.choice(STRANGE)
        elif kind == 1:
            entry["class_type"] = rng.choice(["Unknown", "TestingShow", "SaveImage", "LoadImage", *STRANGE])
        elif kind == 2:
            entry["inputs"] = rng.choice(STRANGE)
        elif kind == 3:
            entry.pop(rng.choice(["class_type", "inputs"]), None)
        elif kind == 4:  # a cycle, often through itself
            if isinstance(entry.get("inputs"), dict):
                entry["inputs"]["after"] = [rng.choice(list(prompt)), 0]
                entry["inputs"]["value"] = [rng.choice(list(prompt)), 0]
        elif kind == 5:
            prompt[rng.choice(["", "é", "x" * 300, "\u202e", "1.0.0."])] = prompt.pop(key)
        elif kind == 6:  # deep
            value: object = rng.choice(STRANGE)
            for _ in range(rng.choice((10, 63, 400))):
                value = [value] if rng.random() < 0.5 else {"k": value}
            if isinstance(entry.get("inputs"), dict):
                entry["inputs"]["value"] = value
        elif isinstance(entry.get("inputs"), dict):
            name = rng.choice(["value", "name", "after", "width", "undeclared", ""])
            entry["inputs"][name] = rng.choice(STRANGE)
    body: dict = {"prompt": prompt}
    if rng.random() < 0.2:
        field = rng.choice(["number", "front", "prompt_id", "client_id", "extra_data", "partial_execution_targets", "prompt"])
        body[field] = rng.choice(STRANGE)
    return rng.choice(STRANGE) if rng.random() < 0.02 else body


def test_mutated_prompts_never_crash_the_server_and_are_answered_quickly(server):
    rng = random.Random(20261124)
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    seconds, statuses = [], {}
    for index in range(MUTATIONS):
        body = json.dumps(mutated(rng)).encode()
        started = time.perf_counter()
        connection.request("POST", "/prompt", body)
        response = connection.getresponse()
        answer = response.read()
        seconds.append(time.perf_counter() - started)
        statuses[response.status] = statuses.get(response.status, 0) + 1
        assert response.status in (200, 400), (index, response.status, body, answer)
        decoded = json.loads(answer)
        assert "prompt_id" in decoded if response.status == 200 else decoded["error"]["type"] and isinstance(decoded["node_errors"], dict)
        if response.status == 400:
            assert decoded["error"]["message"] and "Traceback" not in decoded["error"]["message"]
    connection.close()
    assert statuses[200] > 50 and statuses[400] > 500, statuses
    assert statistics.median(seconds) < 0.005
    assert server.finished(server.queue(show(4242)), 60)["outputs"]["1"] == {"text": ["4242"]}


def test_a_thousand_sockets_come_and_go(server):
    """Half say goodbye properly, half vanish; a client that was there before hears its run as if alone."""
    key = "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n"
    with server.listen("witness") as witness:
        for batch in range(SOCKETS // 50):
            sockets = []
            for index in range(50):
                connection = socket.create_connection(("127.0.0.1", server.port), timeout=20)
                request = f"GET /ws?clientId=s{batch}-{index} HTTP/1.1\r\nHost: 127.0.0.1\r\n{key}\r\n"
                connection.sendall(request.encode())
                sockets.append(connection)
            for index, connection in enumerate(sockets):
                assert b"101 Switching" in connection.recv(200)
                if index % 2:
                    connection.sendall(b"\x88\x82\x00\x00\x00\x00\x03\xe8")  # close frame, status 1000
                else:
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")  # reset
                connection.close()
        prompt_id = server.queue(steps(2), client_id="witness")
        assert any(isinstance(message, bytes) for message in witness.receive_run(prompt_id))


def assert_whole(folder: Path) -> None:
    """Every picture can be read to its end, and no temporary file is left."""
    pictures = list((folder / "output").glob("*.png"))
    assert pictures
    for file in pictures:
        with Image.open(file) as image:
            image.load()
    assert not [path for path in folder.rglob("*") if path.name.endswith(".part")]


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads resident memory from /proc")
def test_three_hundred_prompts_leave_the_memory_as_it_was_and_sigterm_leaves_no_half_written_file(tmp_path):
    with ServerProcess(tmp_path) as server:

        def run(count: int, first: int) -> None:
            ids = [server.queue(picture(first + index, "many", 32)) for index in range(count)]
            server.finished(ids[-1])

        run(40, 0)
        before = server.resident_bytes()
        run(PROMPTS, 1000)
        growth = server.resident_bytes() - before
        assert growth < GROWTH_BYTES, f"{growth / 1024**2:.1f} MB"
        assert len(server.get("/history").json()) == PROMPTS + 40

        for index in range(30):
            server.queue(picture(index, "large", 512))
        server.post("/userdata/workflows%2Fa.json", b"{}" * 100000)
        while not list((tmp_path / "output").glob("large_*")):
            time.sleep(0.005)
        assert server.stop(signal.SIGTERM) == 0
    assert_whole(tmp_path)


def test_the_queue_refuses_more_than_a_thousand_and_ctrl_c_ends_it_all(tmp_path):
    with ServerProcess(tmp_path) as server, server.listen("mine") as listener:
        running = server.queue(steps(100000, 0.01, preview=False), client_id="mine")
        server.wait_until_running(running)
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        body = json.dumps({"prompt": show(1)}).encode()
        for index in range(1001):
            connection.request("POST", "/prompt", body)
            response = connection.getresponse()
            answer = json.loads(response.read())
            assert response.status == (200 if index < 1000 else 429), answer
        assert answer["error"]["type"] == "queue_full" and "1000" in answer["error"]["message"]
        connection.close()
        started = time.monotonic()
        assert server.stop(signal.SIGINT) == 130 and time.monotonic() - started < 10
        kinds = []
        while (message := listener.receive()) is not None:
            kinds.append(message["type"])
        assert "execution_interrupted" in kinds


def test_start_up_says_what_is_wrong(tmp_path, server):
    import subprocess
    import sys

    def start(*flags: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "rectiflow", "serve", "--cpu", "--base-directory", str(tmp_path), *flags]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)

    taken = start("--port", str(server.port))
    assert taken.returncode == 1 and f"port {server.port}" in taken.stderr and "Traceback" not in taken.stderr
    (tmp_path / "bad.yaml").write_text("- not a section\n")
    unreadable = start("--extra-model-paths-config", str(tmp_path / "bad.yaml"))
    assert unreadable.returncode == 2 and "bad.yaml" in unreadable.stderr and "line 1" in unreadable.stderr
    assert start("--quick-test-for-ci").returncode == 0
