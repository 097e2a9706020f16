"""The websocket: greeting, order of messages, both preview layouts, isolation, reconnection, slow readers."""

from __future__ import annotations

import json
import socket
import struct
import time
from io import BytesIO

from PIL import Image
from rectiflow.tests.server.graphs import fail, node, show, steps


def kinds(messages) -> list[str]:
    return [message["type"] if isinstance(message, dict) else "binary" for message in messages]


def test_greeting_names_the_client_and_the_queue(server):
    with server.listen("someone") as listener:
        assert listener.receive() == {"type": "status", "data": {"status": {"exec_info": {"queue_remaining": 0}}, "sid": "someone"}}
    with server.listen() as listener:
        sid = listener.receive()["data"]["sid"]
        assert len(sid) == 32 and int(sid, 16)


def test_feature_flags_count_in_the_first_message_only(server):
    with server.listen("flags", {"supports_preview_metadata": True}) as listener:
        listener.receive()
        answer = listener.receive()
        assert answer == {"type": "feature_flags", "data": {"supports_preview_metadata": True, "max_upload_size": 104857600}}
        assert server.get("/features").json() == answer["data"]
    with server.listen("late") as listener:
        listener.send("not json")
        listener.send(json.dumps({"type": "feature_flags", "data": {"supports_preview_metadata": True}}))
        prompt_id = server.queue(steps(1), client_id="late")
        binary = [message for message in listener.receive_run(prompt_id) if isinstance(message, bytes)]
        assert struct.unpack(">I", binary[0][:4]) == (1,)


def test_order_of_messages_of_a_run(server):
    with server.listen("order") as listener:
        listener.receive()
        prompt_id = server.queue(steps(1, preview=False), client_id="order")
        messages = listener.receive_run(prompt_id)
    assert kinds(messages) == [
        "status", "status", "execution_start", "execution_cached",
        "progress_state", "executing", "progress_state", "progress", "progress_state",
        "progress_state", "executing", "executed", "progress_state",
        "execution_success", "status", "executing",
    ]  # fmt: skip
    assert [m["data"]["status"]["exec_info"]["queue_remaining"] for m in messages if m["type"] == "status"] == [1, 1, 0]
    state = next(message for message in messages if message["type"] == "progress_state")["data"]
    assert state["nodes"]["1"] == {
        "value": 0, "max": 1, "state": "running", "node_id": "1", "prompt_id": prompt_id,
        "display_node_id": "1", "parent_node_id": None, "real_node_id": "1",
    }  # fmt: skip
    assert messages[-1] == {"type": "executing", "data": {"node": None, "prompt_id": prompt_id}}


def test_previews_with_and_without_metadata(server):
    with server.listen("plain") as plain, server.listen("rich", {"supports_preview_metadata": True}) as rich:
        first, second = server.queue(steps(2), client_id="plain"), server.queue(steps(2), client_id="rich")
        simple = [message for message in plain.receive_run(first) if isinstance(message, bytes)]
        detailed = [message for message in rich.receive_run(second) if isinstance(message, bytes)]
    assert len(simple) == len(detailed) == 2
    assert struct.unpack(">II", simple[0][:8]) == (1, 1)
    assert Image.open(BytesIO(simple[0][8:])).size == (512, 171)  # 900×300 into 512
    kind, length = struct.unpack(">II", detailed[0][:8])
    place = json.loads(detailed[0][8 : 8 + length])
    assert kind == 4 and place == {
        "node_id": "1", "display_node_id": "1", "parent_node_id": None, "real_node_id": "1", "prompt_id": second,
        "image_type": "image/jpeg",
    }  # fmt: skip
    assert Image.open(BytesIO(detailed[0][8 + length :])).format == "JPEG"


def test_another_client_hears_the_queue_and_nothing_else(server):
    with server.listen("mine") as mine, server.listen("other") as other:
        prompt_id = server.queue(steps(2), client_id="mine")
        mine.receive_run(prompt_id)
        server.finished(server.queue(show(3), client_id="other"))
        heard = []
        while not heard or heard[-1].get("type") != "execution_success":
            heard.append(other.receive())
    foreign = [message for message in heard if not isinstance(message, dict) or message["data"].get("prompt_id") == prompt_id]
    assert foreign == []


def test_an_error_names_the_node(server):
    with server.listen("unlucky") as listener:
        prompt_id = server.queue(fail("value"), client_id="unlucky")
        messages = listener.receive_run(prompt_id)
    error = next(message for message in messages if message["type"] == "execution_error")["data"]
    assert error["node_id"] == "1" and error["exception_message"] == "this node fails\n" and error["exception_type"] == "ValueError"
    assert error["prompt_id"] == prompt_id and error["traceback"] and error["executed"] == []


def test_progress_of_the_versioned_api_carries_a_preview(server):
    with server.listen("api", {"supports_preview_metadata": True}) as listener:
        graph = {"1": node("TestingApiProgress", value=int(time.time())), "2": node("TestingShow", value=["1", 0])}
        messages = listener.receive_run(server.queue(graph, client_id="api"))
    assert any(isinstance(message, bytes) for message in messages)
    assert any(message["type"] == "progress" and message["data"]["max"] == 2 for message in messages if isinstance(message, dict))


def test_a_page_that_comes_back_is_told_where_its_prompt_is(server):
    with server.listen("returning") as listener:
        prompt_id = server.queue(steps(1000, 0.01, preview=False), client_id="returning")
        while listener.receive()["type"] != "progress":
            pass
    with server.listen("returning") as listener:
        assert listener.receive()["type"] == "status"
        assert listener.receive() == {"type": "executing", "data": {"node": "1", "display_node": "1", "prompt_id": prompt_id}}
        server.post("/interrupt", {"prompt_id": prompt_id})
        assert "execution_interrupted" in kinds(listener.receive_run(prompt_id))


def test_the_newest_socket_of_an_id_gets_the_messages(server):
    with server.listen("twice") as old, server.listen("twice") as new:
        new.receive()
        old.receive()
        prompt_id = server.queue(show(12), client_id="twice")
        new.receive_run(prompt_id)
    with server.listen("twice") as again:
        prompt_id = server.queue(show(13), client_id="twice")
        assert "execution_success" in kinds(again.receive_run(prompt_id))


def test_interruption_of_a_prompt_nobody_follows_is_told_to_all(server):
    with server.listen("bystander") as listener:
        prompt_id = server.queue(steps(1000, 0.01, preview=False))
        server.wait_until_running(prompt_id)
        server.post("/interrupt")
        while (message := listener.receive())["type"] != "execution_interrupted":
            assert message["type"] == "status"
        assert message["data"]["prompt_id"] == prompt_id
        server.finished(prompt_id)


def test_logs_go_to_subscribers(server):
    with server.listen("logs") as listener:
        listener.receive()
        assert server.request("PATCH", "/internal/logs/subscribe", {"clientId": "logs", "enabled": True}).status == 200
        server.finished(server.queue(show(1234)))
        while (message := listener.receive())["type"] != "logs":
            pass
        assert message["data"]["entries"][0]["m"] and set(message["data"]["size"]) == {"cols", "rows"}
        assert server.request("PATCH", "/internal/logs/subscribe", {"clientId": "logs", "enabled": False}).status == 200
    assert server.request("PATCH", "/internal/logs/subscribe", {"clientId": 3}).status == 400
    assert "got prompt" in server.get("/internal/logs").json() and server.get("/internal/logs/raw").json()["entries"]


def test_a_reader_that_sleeps_is_dropped_and_delays_nobody(server):
    """The sleeper never reads: its kernel buffers fill, then its backlog; the server cuts it off while the run goes on."""
    sleeper = socket.socket()
    sleeper.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sleeper.connect(("127.0.0.1", server.port))
    key = "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n"
    sleeper.sendall(
        f"GET /ws?clientId=sleeper HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n{key}\r\n".encode()
    )
    assert b"101" in sleeper.recv(300)
    slow = server.queue(steps(400, 0.0, preview=True), client_id="sleeper")
    server.finished(slow)
    deadline = time.monotonic() + 20
    while "reads too slowly" not in server.log.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    sleeper.close()
    assert server.finished(server.queue(show(5)))["status"]["completed"]
