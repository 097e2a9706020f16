"""GET /api/jobs as pure functions: states, previews, filters, pages."""

from __future__ import annotations

import json

import pytest
from rectiflow.host.embedded.server.jobs import JobQuery, describe_finished, job_detail, list_jobs, parse_query
from rectiflow.host.embedded.server.options import Limits
from rectiflow.host.embedded.server.prompt_queue import Finished, PromptQueue

PROMPT = {"1": {"class_type": "X", "inputs": {}}}
START = ["execution_start", {"prompt_id": "p", "timestamp": 1000}]
PICTURES = {
    "9": {"images": [{"filename": "a.png", "subfolder": "", "type": "temp"}]},
    "10": {"images": [{"filename": "b.png", "subfolder": "s", "type": "output"}], "text": ["hello"], "animated": [True]},
    "11": {"gifs": [{"filename": "c.mp4", "subfolder": "", "type": "output"}], "count": [3]},
}


def a_job(workflow_id: str | None = None):
    extra_data = {"extra_pnginfo": {"workflow": {"id": workflow_id}}} if workflow_id else {}
    return PromptQueue(Limits()).put("p", PROMPT, extra_data, ["1"])


def status(ok: bool, *messages) -> dict:
    return {"status_str": "success" if ok else "error", "completed": ok, "messages": [START, *messages]}


def test_a_completed_job_shows_times_counts_and_a_saved_picture():
    entry = describe_finished(a_job("w"), PICTURES, status(True, ["execution_success", {"timestamp": 3500}]))
    assert entry["status"] == "completed" and entry["workflow_id"] == "w"
    assert (entry["execution_start_time"], entry["execution_end_time"]) == (1000, 3500)
    assert (entry["outputs_count"], entry["previewable_outputs_count"]) == (4, 4)
    assert entry["preview_output"] == {"filename": "b.png", "subfolder": "s", "type": "output", "nodeId": "10", "mediaType": "images"}
    assert isinstance(entry["create_time"], int) and "execution_error" not in entry


def test_video_is_told_by_its_file_and_text_previews_a_job_without_files():
    video = describe_finished(a_job(), {"11": PICTURES["11"]}, status(True))
    assert video["preview_output"]["mediaType"] == "video"
    text = describe_finished(a_job(), {"4": {"text": ["hello"]}}, status(True))
    assert text["preview_output"] == {"nodeId": "4", "mediaType": "text", "content": "hello"}


def test_failed_and_interrupted_jobs():
    error = {
        "node_id": "1",
        "node_type": "X",
        "exception_message": "boom\n",
        "exception_type": "ValueError",
        "traceback": [],
        "timestamp": 7,
    }
    failed = describe_finished(a_job(), {}, status(False, ["execution_error", error]))
    assert failed["status"] == "failed" and failed["execution_error"] == error and failed["execution_end_time"] == 7
    stopped = describe_finished(a_job(), {}, status(False, ["execution_interrupted", {"node_id": "1", "timestamp": 8}]))
    assert stopped["status"] == "cancelled" and "execution_error" not in stopped


def filled_queue() -> PromptQueue:
    """Two finished, one running, two waiting."""
    queue = PromptQueue(Limits())
    for name in ("done", "broken"):
        queue.put(name, PROMPT, {}, ["1"])
        job = queue.take(0)
        state = status(name == "done", ["execution_success", {"timestamp": 2000}])
        entry = {"prompt": json.loads(job.text), "outputs": PICTURES, "status": state, "meta": {}}
        queue.finish(Finished(name, json.dumps(entry), describe_finished(job, PICTURES, state)))
    for name in ("running", "next", "last"):
        queue.put(name, PROMPT, {"extra_pnginfo": {"workflow": {"id": "w"}}}, ["1"])
    queue.take(0)
    return queue


def test_lists_filter_and_page():
    queue = filled_queue()
    assert {job["id"]: job["status"] for job in list_jobs(queue, JobQuery())["jobs"]} == {
        "done": "completed", "broken": "failed", "running": "in_progress", "next": "pending", "last": "pending",
    }  # fmt: skip
    page = list_jobs(queue, parse_query({"status": "pending,in_progress", "limit": "2", "offset": "0"}))
    assert len(page["jobs"]) == 2 and page["pagination"] == {"offset": 0, "limit": 2, "total": 3, "has_more": True}
    rest = list_jobs(queue, parse_query({"status": "pending,in_progress", "limit": "2", "offset": "2"}))
    assert len(rest["jobs"]) == 1 and rest["pagination"]["has_more"] is False
    assert {job["id"] for job in list_jobs(queue, parse_query({"workflow_id": "w"}))["jobs"]} == {"running", "next", "last"}


@pytest.mark.parametrize(
    "query",
    [
        {"status": "odd"},
        {"limit": "0"},
        {"limit": "-1"},
        {"limit": "x"},
        {"offset": "1.5"},
        {"sort_by": "size"},
        {"sort_order": "up"},
        {"limit": "²"},
    ],
)
def test_bad_arguments_are_named(query):
    with pytest.raises(ValueError, match="allowed"):
        parse_query(query)


def test_details_carry_the_graph():
    queue = filled_queue()
    done = job_detail(queue, "done")
    assert done["outputs"] == PICTURES and done["workflow"]["prompt"] == PROMPT and done["execution_status"]["completed"]
    assert job_detail(queue, "next")["workflow"]["prompt"] == PROMPT
    assert job_detail(queue, "unknown") is None
