"""The prompt queue: order, bounds, refusals, history windows, and that no lock is held while telling of a change."""

from __future__ import annotations

import json
import threading

import pytest
from rectiflow.host.embedded.server.options import Limits
from rectiflow.host.embedded.server.prompt_queue import DuplicateNumber, DuplicatePrompt, Finished, PromptQueue, QueueFull

PROMPT = {"1": {"class_type": "X", "inputs": {}}}


def put(queue: PromptQueue, prompt_id: str, **place) -> None:
    queue.put(prompt_id, PROMPT, {}, ["1"], **place)


def run_one(queue: PromptQueue) -> str:
    job = queue.take(timeout=0)
    queue.finish(Finished(job.prompt_id, '{"outputs": {}}', {"id": job.prompt_id}))
    return job.prompt_id


def test_arrival_order_front_and_number():
    queue = PromptQueue(Limits())
    put(queue, "first")
    put(queue, "second")
    put(queue, "urgent", front=True)
    put(queue, "between", number=0.5)
    assert [job.prompt_id for job in queue.waiting()] == ["urgent", "first", "between", "second"]
    assert [run_one(queue) for _ in range(4)] == ["urgent", "first", "between", "second"]


def test_front_before_anything_else_is_in_front_of_the_first():
    queue = PromptQueue(Limits())
    put(queue, "a")
    put(queue, "b", front=True)
    put(queue, "c", front=True)
    assert [job.prompt_id for job in queue.waiting()] == ["c", "b", "a"]


def test_reused_ids_and_numbers_are_refused_wherever_they_are():
    queue = PromptQueue(Limits())
    put(queue, "a", number=3)
    with pytest.raises(DuplicatePrompt):
        put(queue, "a")
    with pytest.raises(DuplicateNumber):
        put(queue, "b", number=3)
    queue.take(timeout=0)
    with pytest.raises(DuplicatePrompt):
        put(queue, "a")
    put(queue, "b", number=3)
    queue.finish(Finished("a", "{}", {}))
    with pytest.raises(DuplicatePrompt):
        put(queue, "a")
    assert queue.remaining == 1


def test_queue_is_bounded_in_length_and_bytes():
    queue = PromptQueue(Limits(queue_length=3))
    for index in range(3):
        put(queue, str(index))
    with pytest.raises(QueueFull):
        put(queue, "3")
    run_one(queue)
    put(queue, "3")

    small = PromptQueue(Limits(queue_bytes=400))
    put(small, "0")
    with pytest.raises(QueueFull):
        small.put("1", {"1": {"class_type": "X" * 400, "inputs": {}}}, {}, ["1"])
    assert small.delete(["0"]) == ["0"]
    put(small, "2")


def test_history_forgets_the_oldest_and_keeps_the_newest_even_if_it_is_too_big():
    queue = PromptQueue(Limits(history_length=3))
    for index in range(5):
        put(queue, str(index))
        run_one(queue)
    assert [entry.prompt_id for entry in queue.history()] == ["2", "3", "4"]

    by_bytes = PromptQueue(Limits(history_bytes=100))
    for index in range(3):
        put(by_bytes, str(index))
        by_bytes.finish(Finished(by_bytes.take(0).prompt_id, "x" * 90, {}))
    assert [entry.prompt_id for entry in by_bytes.history()] == ["2"]
    by_bytes.forget(["2", "unknown"])
    put(by_bytes, "2")


@pytest.mark.parametrize(
    ("max_items", "offset", "expected"),
    [
        (None, -1, "01234"),
        (2, -1, "34"),
        (9, -1, "01234"),
        (0, -1, ""),
        (2, 0, "01"),
        (2, 4, "4"),
        (None, 3, "34"),
        (None, 5, ""),
        (3, 99, ""),
    ],
)
def test_history_windows(max_items, offset, expected):
    queue = PromptQueue(Limits())
    for index in range(5):
        put(queue, str(index))
        run_one(queue)
    assert "".join(entry.prompt_id for entry in queue.history(max_items, offset)) == expected


def test_texts_are_the_five_part_items_without_secrets():
    queue = PromptQueue(Limits())
    job = queue.put("a", PROMPT, {"client_id": "me", "auth_token_comfy_org": "secret", "api_key_comfy_org": "secret"}, ["1"])
    number, prompt_id, prompt, extra_data, outputs = json.loads(job.text)
    assert (number, prompt_id, prompt, outputs) == (0, "a", PROMPT, ["1"])
    assert extra_data == {"client_id": "me", "create_time": job.create_time}
    assert job.extra_data["auth_token_comfy_org"] == "secret" and job.client_id == "me"


def test_changes_are_told_without_holding_the_lock():
    remaining = []

    def changed():
        other = threading.Thread(target=lambda: remaining.append(queue.remaining))
        other.start()
        other.join(5)
        assert not other.is_alive()

    queue = PromptQueue(Limits(), changed)
    put(queue, "a")
    run_one(queue)
    put(queue, "b")
    queue.clear()
    assert remaining == [1, 1, 0, 1, 0]


def test_flags_and_closing_wake_the_worker():
    queue = PromptQueue(Limits())
    taken = []
    worker = threading.Thread(target=lambda: taken.append(queue.take(timeout=30)))
    worker.start()
    queue.set_flag("free_memory")
    worker.join(5)
    assert taken == [None] and queue.take_flags() == {"free_memory": True} and queue.take_flags() == {}
    put(queue, "a")
    queue.close()
    assert queue.take(timeout=30) is None
