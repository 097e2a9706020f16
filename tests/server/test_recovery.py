"""After anything that ends a run early, the next prompt gives the bytes that it gives on a fresh server."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rectiflow.tests.server.graphs import fail
from rectiflow.tests.server.process import ServerProcess

STEPS = 5
GRAPH = Path(__file__).resolve().parents[2] / "workflows" / "api" / "text_to_image.json"


def sampling(seed: int) -> dict[str, dict]:
    """The shipped text_to_image graph with few steps."""
    prompt = json.loads(GRAPH.read_text(encoding="utf-8"))
    for entry in prompt.values():
        if entry["class_type"] == "KSampler":
            entry["inputs"] |= {"steps": STEPS, "seed": seed}
    return prompt


def picture_bytes(server: ServerProcess, seed: int) -> bytes:
    """Run the graph and fetch its picture."""
    outputs = server.finished(server.queue(sampling(seed)))["outputs"]
    (saved,) = (item for ui in outputs.values() for item in ui["images"])
    answer = server.get(f"/view?filename={saved['filename']}&subfolder={saved['subfolder']}&type={saved['type']}")
    assert answer.status == 200 and answer.body.startswith(b"\x89PNG")
    return answer.body


def interrupt_at(server: ServerProcess, step: int) -> dict:
    """Start a run with another seed, interrupt it when the sampler reports `step`; its history entry."""
    with server.listen(f"interrupter-{step}") as listener:
        prompt_id = server.queue(sampling(seed=1000 + step), client_id=f"interrupter-{step}")
        while True:
            message = listener.receive()
            assert message is not None
            if isinstance(message, dict) and message["type"] == "progress" and message["data"]["value"] >= step:
                break
        server.post("/interrupt", {"prompt_id": prompt_id})
        return server.finished(prompt_id)


@pytest.fixture(scope="module")
def fresh(tmp_path_factory) -> bytes:
    """The picture of a server that has run nothing else."""
    with ServerProcess(tmp_path_factory.mktemp("fresh")) as server:
        return picture_bytes(server, seed=4)


def test_the_next_prompt_gives_the_bytes_of_a_fresh_server(fresh, tmp_path):
    with ServerProcess(tmp_path, "--cache-none") as server:  # nothing is kept, so every prompt really runs
        stopped = 0
        for step in range(1, STEPS + 1):
            status = interrupt_at(server, step)["status"]
            stopped += not status["completed"]
            assert picture_bytes(server, seed=4) == fresh, f"after an interrupt at step {step}"
        assert stopped  # a run may end before its interrupt arrives, but not all of them
        for kind in ("value", "memory", "exit"):
            assert server.finished(server.queue(fail(kind)))["status"]["status_str"] == "error"
            assert picture_bytes(server, seed=4) == fresh, f"after a node failed with {kind}"
