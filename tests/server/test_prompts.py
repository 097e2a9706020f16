"""POST /prompt, the queue, the history, interruption and jobs, over HTTP."""

from __future__ import annotations

import json
import time
import uuid

import pytest
from rectiflow.tests.server.graphs import fail, node, picture, show, steps

SLOW = {"1": node("TestingSteps", steps=2000, seconds=0.01, preview=False), "2": node("PreviewImage", images=["1", 0])}


@pytest.fixture
def busy(server):
    """A prompt that runs until it is interrupted, so that others wait behind it."""
    prompt_id = server.queue(SLOW)
    server.wait_until_running(prompt_id)
    yield prompt_id
    server.post("/queue", {"clear": True})
    server.post("/interrupt", {"prompt_id": prompt_id})
    server.finished(prompt_id)


def refused(server, body, status: int = 400) -> dict:
    answer = server.post("/prompt", body)
    assert answer.status == status, answer.body
    assert set(answer.json()) == {"error", "node_errors"} and set(answer.json()["error"]) == {"type", "message", "details", "extra_info"}
    return answer.json()["error"]


def test_answer_history_and_queue_have_comfyuis_shape(server):
    prompt_id = str(uuid.uuid4())
    answer = server.post(
        "/api/prompt",
        {"prompt": show(5), "prompt_id": prompt_id, "client_id": "c", "extra_data": {"extra_pnginfo": {"workflow": {"id": "w"}}}},
    )
    assert answer.json() == {"prompt_id": prompt_id, "number": answer.json()["number"], "node_errors": {}}
    entry = server.finished(prompt_id)
    assert entry["outputs"] == {"1": {"text": ["5"]}} and entry["status"]["status_str"] == "success" and entry["status"]["completed"]
    assert [event for event, _ in entry["status"]["messages"]] == ["execution_start", "execution_cached", "execution_success"]
    number, stored_id, prompt, extra_data, outputs = entry["prompt"]
    assert (stored_id, prompt, outputs) == (prompt_id, show(5), ["1"]) and extra_data["client_id"] == "c"
    assert entry["meta"]["1"] == {"node_id": "1", "display_node": "1", "parent_node": None, "real_node_id": "1"}
    assert server.get("/queue").json() == {"queue_running": [], "queue_pending": []}
    assert server.get("/prompt").json() == {"exec_info": {"queue_remaining": 0}}
    assert server.get("/history/unknown").json() == {}


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"{", "invalid_json"), (b"\xff", "invalid_json"), (b"[" * 200000, "invalid_json"),
        (b'{"number": ' + b"9" * 5000 + b"}", "invalid_json"),
        (b"[]", "invalid_json"), (b"", "invalid_json"), ({}, "no_prompt"), ({"prompt": None}, "no_prompt"),
        ({"prompt": {}}, "prompt_no_outputs"),
        ({"prompt": show(), "number": "x"}, "invalid_number"), (b'{"prompt": {}, "number": NaN}', "invalid_number"),
        (b'{"prompt": {}, "number": 1e999}', "invalid_number"), ({"prompt": show(), "number": True}, "invalid_number"),
        ({"prompt": show(), "number": 10**400}, "invalid_number"), ({"prompt": show(), "prompt_id": 5}, "invalid_prompt_id"),
        ({"prompt": show(), "prompt_id": ""}, "invalid_prompt_id"), ({"prompt": show(), "prompt_id": "x" * 201}, "invalid_prompt_id"),
        ({"prompt": show(), "extra_data": []}, "invalid_extra_data"), ({"prompt": show(), "client_id": 1}, "invalid_client_id"),
        ({"prompt": show(), "partial_execution_targets": "1"}, "invalid_targets"),
        ({"prompt": show(), "partial_execution_targets": []}, "prompt_no_outputs"),
    ],
)  # fmt: skip
def test_refusals_are_typed(server, body, kind):
    assert refused(server, body)["type"] == kind


def test_deep_nesting_is_named_with_its_limit(server):
    value: object = 0
    for _ in range(70):
        value = [value]
    error = refused(server, {"prompt": {"1": node("TestingShow", value=value)}})
    assert error["type"] == "prompt_too_deep" and "64" in error["message"]


def test_too_many_nodes_and_bytes_are_named_with_their_limits(server):
    too_many = {str(index): node("TestingShow", value=index) for index in range(2001)}
    error = refused(server, {"prompt": too_many})
    assert error["type"] == "prompt_too_large" and "2001" in error["message"] and "2000" in error["message"]
    error = refused(server, {"prompt": show(), "extra_data": {"padding": "x" * (5 * 1024 * 1024)}}, status=413)
    assert error["type"] == "prompt_too_large" and "5242880" in error["message"]


def test_two_thousand_nodes_are_taken_and_run(server):
    graph = {str(index): node("TestingValue", value=index, **({"after": [str(index - 1), 0]} if index else {})) for index in range(1999)}
    graph["end"] = node("TestingShow", value=["1998", 0])
    assert server.finished(server.queue(graph))["outputs"]["end"] == {"text": ["1998"]}


def test_validation_errors_paint_the_node(server):
    answer = server.post("/prompt", {"prompt": {"7": node("TestingShow", value="abc")}})
    assert answer.status == 400
    entry = answer.json()["node_errors"]["7"]
    assert (
        entry["class_type"] == "TestingShow" and entry["dependent_outputs"] == ["7"] and entry["errors"][0]["type"] == "invalid_input_type"
    )


def test_one_bad_output_is_reported_beside_the_accepted_prompt(server):
    answer = server.post("/prompt", {"prompt": {**show(), "2": node("TestingShow", value=["99", 0])}})
    assert answer.status == 200 and list(answer.json()["node_errors"]) == ["2"]
    assert list(server.finished(answer.json()["prompt_id"])["outputs"]) == ["1"]


def test_a_used_prompt_id_is_refused_while_waiting_running_and_finished(server, busy):
    assert refused(server, {"prompt": show(), "prompt_id": busy})["type"] == "duplicate_prompt_id"
    waiting = server.queue(show(), prompt_id="waiting-once")
    assert refused(server, {"prompt": show(), "prompt_id": waiting})["type"] == "duplicate_prompt_id"
    server.post("/interrupt")
    server.finished(waiting)
    assert refused(server, {"prompt": show(), "prompt_id": waiting})["type"] == "duplicate_prompt_id"


def test_order_numbers_delete_and_clear(server, busy):
    first, second = server.queue(show(1)), server.queue(show(2))
    urgent = server.queue(show(3), front=True)
    numbered = server.queue(show(4), number=-0.5)
    assert refused(server, {"prompt": show(), "number": -0.5})["type"] == "duplicate_number"
    waiting = server.get("/api/queue").json()
    assert [item[1] for item in waiting["queue_pending"]] == [urgent, numbered, first, second] and waiting["queue_running"][0][1] == busy
    assert server.post("/queue", {"delete": [second, "unknown"]}).status == 200
    assert [item[1] for item in server.get("/queue").json()["queue_pending"]] == [urgent, numbered, first]
    server.post("/queue", {"clear": True})
    assert server.get("/queue").json()["queue_pending"] == [] and server.get("/prompt").json()["exec_info"]["queue_remaining"] == 1
    assert server.post("/queue", {"delete": "x"}).status == 400 and server.post("/queue", b"{").status == 400


def test_interrupt_of_one_prompt_hits_that_prompt_alone(server):
    slow = server.queue(SLOW)
    server.wait_until_running(slow)
    after = server.queue(show(9))
    assert server.post("/interrupt", {"prompt_id": "another"}).status == 200
    time.sleep(0.05)
    assert server.get("/queue").json()["queue_running"][0][1] == slow
    assert server.post("/interrupt", {"prompt_id": slow}).status == 200
    stopped = server.finished(slow)
    assert stopped["status"]["completed"] is False and stopped["status"]["messages"][-1][0] == "execution_interrupted"
    assert server.finished(after)["outputs"]["1"] == {"text": ["9"]}


def test_interrupt_right_after_queueing_is_never_lost_and_never_hits_the_next(server):
    for _ in range(20):
        prompt_id = server.queue(SLOW)
        server.wait_until_running(prompt_id)
        server.post("/interrupt")
        assert server.finished(prompt_id, 5)["status"]["messages"][-1][0] == "execution_interrupted"
        server.post("/interrupt")
        assert server.finished(server.queue(show()))["status"]["completed"]


@pytest.mark.parametrize(("kind", "exception"), [("value", "ValueError"), ("memory", "torch.OutOfMemoryError"), ("exit", "SystemExit")])
def test_after_any_failure_the_next_prompt_gives_the_same_bytes(server, kind, exception):
    before = server.finished(server.queue(picture(3, f"before_{kind}")))
    entry = server.finished(server.queue(fail(kind)))
    event, error = entry["status"]["messages"][-1]
    assert event == "execution_error" and error["exception_type"] == exception and entry["status"]["status_str"] == "error"
    if kind != "exit":
        assert (error["node_id"], error["node_type"]) == ("1", "TestingFail") and error["current_inputs"] == {"kind": [kind]}
    server.post("/free", {"unload_models": True, "free_memory": True})
    after = server.finished(server.queue(picture(3, f"after_{kind}")))

    def pixels(result):
        from io import BytesIO

        from PIL import Image

        name = result["outputs"]["2"]["images"][0]["filename"]
        return Image.open(BytesIO(server.get(f"/view?filename={name}").body)).tobytes()

    assert pixels(before) == pixels(after)


def test_results_that_are_no_json_still_arrive(server):
    entry = server.finished(server.queue({**fail("unprintable"), "3": node("TestingShow", value=["1", 0])}))
    odd = entry["outputs"]["1"]["odd"]
    assert odd[0] is None and "object" in odd[1] and odd[2] == [1, 2]


def test_history_windows_and_forgetting(server):
    ids = [server.queue(show(index)) for index in range(4)]
    server.finished(ids[-1])
    assert list(server.get("/history?max_items=2").json()) == ids[-2:]
    everything = list(server.get("/history").json())
    assert list(server.get("/api/history?max_items=2&offset=1").json()) == everything[1:3]
    assert server.get(f"/history?offset={len(everything)}").json() == {}
    assert server.get("/history?max_items=x").status == 400 and server.get("/history?max_items=-1").status == 400
    server.post("/history", {"delete": [ids[0], "unknown"]})
    assert ids[0] not in server.get("/history").json()
    server.post("/history", {"clear": True})
    assert server.get("/history").json() == {}


def test_jobs_follow_a_prompt(server, busy):
    waiting = server.queue(show(), prompt_id=str(uuid.uuid4()))
    listed = server.get("/api/jobs?status=in_progress,pending").json()
    assert {job["id"]: job["status"] for job in listed["jobs"]} == {busy: "in_progress", waiting: "pending"}
    assert server.get(f"/api/jobs/{waiting}").json()["workflow"]["prompt"] == show()
    assert server.post(f"/api/jobs/{waiting}/cancel").json() == {"cancelled": True}
    assert server.get(f"/api/jobs/{waiting}").status == 404 and server.post(f"/api/jobs/{waiting}/cancel").status == 404
    assert server.post("/api/jobs/cancel", {"job_ids": ["no uuid"]}).status == 400
    assert server.post("/api/jobs/cancel", {"job_ids": [busy]}).json() == {"cancelled": True}
    server.finished(busy)
    job = server.get(f"/api/jobs/{busy}").json()
    assert job["status"] == "cancelled" and job["execution_status"]["status_str"] == "error"
    assert server.get("/api/jobs?status=odd").status == 400 and "error" in server.get("/api/jobs?limit=0").json()
    assert server.get("/jobs").status == 404


def test_a_pack_may_rewrite_a_prompt_and_preview_method_is_per_prompt(server):
    prompt_id = server.queue(show(), extra_data={"mark": True, "preview_method": "none", "auth_token_comfy_org": "secret"})
    stored = server.finished(prompt_id)["prompt"][3]
    assert stored["marked"] == "by a pack" and "secret" not in json.dumps(stored)


def test_expansion_blockers_async_and_lists_run_over_http(server):
    graph = {
        "1": node("TestingExpand", value=4),
        "2": node("TestingShow", value=["1", 0]),
        "3": node("TestingShow", value=["1", 1]),
        "4": node("TestingAsync", value=6, seconds=0.05),
        "5": node("TestingShow", value=["4", 0]),
    }
    entry = server.finished(server.queue(graph))
    assert entry["status"]["completed"] and entry["outputs"]["2"] == {"text": ["5"]} and entry["outputs"]["5"] == {"text": ["6"]}
    assert "3" not in entry["outputs"]


def test_cached_results_are_told_again(server):
    with server.listen("cache") as socket:
        server.finished(server.queue(show(77), client_id="cache"))
        second = server.queue(show(77), client_id="cache")
        messages = [message for message in socket.receive_run(second) if message["data"].get("prompt_id") == second]
    cached = next(message for message in messages if message["type"] == "execution_cached")
    assert cached["data"]["nodes"] == ["1"]
    assert not any(message["type"] == "executing" and message["data"]["node"] == "1" for message in messages)
    assert server.finished(server.queue(steps(1)))["status"]["completed"]
