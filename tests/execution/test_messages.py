"""What a run says, in which order, and how it ends when something goes wrong."""

from __future__ import annotations

import json
import threading

import pytest
from rectiflow.errors import input_error
from rectiflow.host.embedded.execution.graph_utils import GraphBuilder
from rectiflow.tests.execution.toy_nodes import ToyHost, graph

CHAIN = {"n": ("Number", {"value": 1}), "s": ("Add", {"a": "n.0", "b": 1}), "out": ("Show", {"value": "s.0"})}


def node_state(data: dict, node_id: str) -> str:
    return data["nodes"][node_id]["state"]


def test_messages_of_a_run_come_in_comfyuis_order(toy):
    toy.run(graph(**CHAIN))
    told = [
        (event, data.get("node") or next(reversed(data.get("nodes") or {"": 0}), "") if event != "execution_cached" else data["nodes"])
        for event, data in toy.messages
    ]
    assert told == [
        ("execution_start", ""),
        ("execution_cached", []),
        *[step for node in ("n", "s") for step in (("progress_state", node), ("executing", node), ("progress_state", node))],
        ("progress_state", "out"),
        ("executing", "out"),
        ("executed", "out"),
        ("progress_state", "out"),
        ("execution_success", ""),
    ]


def test_fields_of_the_messages(toy):
    toy.run(graph(**CHAIN))
    json.dumps(toy.messages)
    by_event = dict(toy.events())
    assert by_event["executing"] == {"node": "out", "display_node": "out", "prompt_id": "run"}
    assert by_event["executed"] == {"node": "out", "display_node": "out", "output": {"value": [2]}, "prompt_id": "run"}
    assert by_event["progress_state"]["prompt_id"] == "run"
    assert by_event["progress_state"]["nodes"]["s"] == {
        "value": 1.0, "max": 1.0, "state": "finished", "node_id": "s", "prompt_id": "run",
        "display_node_id": "s", "parent_node_id": None, "real_node_id": "s",
    }  # fmt: skip
    for event in ("execution_start", "execution_success"):
        assert set(by_event[event]) == {"prompt_id", "timestamp"} and isinstance(by_event[event]["timestamp"], int)
    assert set(by_event["execution_cached"]) == {"nodes", "prompt_id", "timestamp"}


def test_progress_state_is_cumulative_and_a_message_does_not_change_later(toy):
    toy.run(graph(**CHAIN))
    states = [data for _, data in toy.events("progress_state")]
    assert [len(data["nodes"]) for data in states] == [1, 1, 2, 2, 3, 3]
    assert [node_state(data, "n") for data in states] == ["running"] + ["finished"] * 5


def test_a_cached_output_is_told_with_its_ui(toy):
    toy.run(graph(**CHAIN))
    toy.run(graph(**CHAIN))
    told = [event for event, _ in toy.messages]
    assert told == ["execution_start", "execution_cached", "executed", "progress_state", "execution_success"]
    by_event = dict(toy.events())
    assert by_event["execution_cached"]["nodes"] == ["n", "s", "out"]
    assert by_event["executed"]["output"] == {"value": [2]}


def test_nothing_is_told_about_a_job_without_a_client(toy):
    result = toy.run(graph(**CHAIN), client=None)
    assert toy.messages == []
    assert [event for event, _ in result["status"]["messages"]] == ["execution_start", "execution_cached", "execution_success"]


def test_history_has_the_shape_that_servers_store(toy):
    result = toy.run(graph(**CHAIN))
    assert result["outputs"] == {"out": {"value": [2]}}
    assert result["meta"] == {"out": {"node_id": "out", "display_node": "out", "parent_node": None, "real_node_id": "out"}}
    assert result["status"]["status_str"] == "success" and result["status"]["completed"] is True
    json.dumps(result)


@pytest.mark.parametrize("failing", ["Fail", "FailLater"])
def test_a_failing_node_ends_the_run_and_keeps_what_ran_before(toy, failing):
    prompt = graph(n=("Number", {"value": 1}), f=(failing, {"value": "n.0"}), out=("Show", {"value": "f.0"}))
    result = toy.run(prompt)
    assert result["status"]["status_str"] == "error" and result["status"]["completed"] is False
    ((_, error),) = toy.events("execution_error")
    assert (error["node_id"], error["node_type"], error["executed"]) == ("f", failing, ["n"])
    assert error["exception_type"] == "RuntimeError" and error["exception_message"].endswith("\n")
    assert error["current_inputs"] == ({"value": [1]} if failing == "Fail" else {})
    assert error["current_outputs"] == ["n", "f", "out"]
    assert any("toy_nodes.py" in line for line in error["traceback"])
    json.dumps(error)
    toy.run(graph(n=("Number", {"value": 1}), out=("Show", {"value": "n.0"})))
    assert dict(toy.events())["execution_cached"]["nodes"] == ["n"]


def test_an_error_inside_an_expansion_is_its_parents(toy):
    class ExpandsToFail:
        RETURN_TYPES, FUNCTION, CATEGORY = ("INT",), "go", "toy"
        INPUT_TYPES = classmethod(lambda cls: {"required": {}})

        def go(self):
            inner = GraphBuilder()
            return {"result": (inner.node("Fail", value=3).out(0),), "expand": inner.finalize()}

    toy.registry.add({"ExpandsToFail": ExpandsToFail})
    toy.run(graph(e=("ExpandsToFail", {}), out=("Show", {"value": "e.0"})))
    ((_, error),) = toy.events("execution_error")
    assert (error["node_id"], error["node_type"]) == ("e", "ExpandsToFail")


EXPANSIONS = {
    "an unknown class": {"x": {"class_type": "Nope", "inputs": {}}},
    "an id that is there already": {"out": {"class_type": "Number", "inputs": {"value": 1}}},
    "a node without inputs": {"x": {"class_type": "Number"}},
    "no graph at all": 5,
    "a node that is no object": {"x": 3},
}


@pytest.mark.parametrize("expansion", EXPANSIONS.values(), ids=EXPANSIONS)
def test_a_broken_expansion_is_an_error_of_its_node(toy, expansion):
    class Broken:
        RETURN_TYPES, FUNCTION, CATEGORY = ("INT",), "go", "toy"
        INPUT_TYPES = classmethod(lambda cls: {"required": {}})

        def go(self):
            return {"result": (["x", 0],), "expand": expansion}

    toy.registry.add({"Broken": Broken})
    result = toy.run(graph(e=("Broken", {}), out=("Show", {"value": "e.0"})))
    assert result["status"]["status_str"] == "error"
    assert toy.events("execution_error")[0][1]["node_id"] == "e"


def test_a_cycle_through_expansion_is_an_error_of_the_expanding_node(toy):
    class Circle:
        RETURN_TYPES, FUNCTION, CATEGORY = ("INT",), "go", "toy"
        INPUT_TYPES = classmethod(lambda cls: {"required": {}})

        def go(self):
            inner = GraphBuilder()
            one, two = inner.node("Add", b=1), inner.node("Add", b=1)
            one.set_input("a", two.out(0))
            two.set_input("a", one.out(0))
            return {"result": (one.out(0),), "expand": inner.finalize()}

    toy.registry.add({"Circle": Circle})
    result = toy.run(graph(c=("Circle", {}), out=("Show", {"value": "c.0"})))
    assert result["status"]["status_str"] == "error"
    ((_, error),) = toy.events("execution_error")
    assert error["node_id"] == "c" and "Dependency cycle" in error["exception_message"]


@pytest.mark.parametrize("returned", [None, 5, "text", {"result": 5}], ids=repr)
def test_a_return_value_that_is_no_tuple_is_named(toy, returned):
    class Returns:
        RETURN_TYPES, FUNCTION, CATEGORY = ("INT",), "go", "toy"
        INPUT_TYPES = classmethod(lambda cls: {"required": {}})

        def go(self):
            return returned

    toy.registry.add({"Returns": Returns})
    toy.run(graph(r=("Returns", {}), out=("Show", {"value": "r.0"})))
    ((_, error),) = toy.events("execution_error")
    assert error["exception_type"] == "TypeError" and "Returns.go returned" in error["exception_message"]


def test_a_users_error_keeps_its_type_and_text(toy):
    class Picky:
        RETURN_TYPES, FUNCTION, CATEGORY = ("INT",), "go", "toy"
        INPUT_TYPES = classmethod(lambda cls: {"required": {}})

        def go(self):
            raise input_error("Picky", "ratio", 7, "0 to 1", "Choose a smaller one.")

    toy.registry.add({"Picky": Picky})
    toy.run(graph(p=("Picky", {}), out=("Show", {"value": "p.0"})))
    ((_, error),) = toy.events("execution_error")
    assert error["exception_type"] == "rectiflow.errors.NodeInputError"
    assert error["exception_message"] == "Picky: input 'ratio' got 7; allowed: 0 to 1. Choose a smaller one.\n"


def test_values_that_cannot_be_shown_do_not_hide_the_error(toy):
    class Unshowable:
        def __str__(self):
            raise RuntimeError("no")

    class Makes:
        RETURN_TYPES, FUNCTION, CATEGORY = ("*",), "go", "toy"
        INPUT_TYPES = classmethod(lambda cls: {"required": {}})

        def go(self):
            return (Unshowable(),)

    class Chokes:
        RETURN_TYPES, FUNCTION, CATEGORY = ("*",), "go", "toy"
        INPUT_TYPES = classmethod(lambda cls: {"required": {"value": ("*", {})}})

        def go(self, value):
            raise ValueError("choked")

    toy.registry.add({"Makes": Makes, "Chokes": Chokes})
    toy.run(graph(m=("Makes", {}), c=("Chokes", {"value": "m.0"}), out=("Show", {"value": "c.0"})))
    ((_, error),) = toy.events("execution_error")
    assert error["exception_message"] == "choked\n"
    assert "cannot be shown" in error["current_inputs"]["value"][0]


class InterruptedAt:
    """Makes every toy node set the interrupt flag when it is the one that is asked for."""

    def __init__(self, toy: ToyHost):
        self.toy = toy
        self.node_id: str | None = None
        heard = toy.executor.send

        def send(event, data, client):
            heard(event, data, client)
            if event == "executing" and data["node"] == self.node_id:
                toy.host.interrupt.set()

        toy.executor.send = send


def test_an_interrupt_at_any_node_stops_there_and_the_next_run_is_clean(toy):
    nodes = {
        "n": ("Number", {"value": 1}),
        "e": ("AddOneTimes", {"value": "n.0", "times": 3}),
        "w": ("Wait", {"value": "e.0", "seconds": 0.01}),
        "p": ("Pick", {"pick": True, "yes": "w.0", "no": "n.0"}),
        "out": ("Show", {"value": "p.0"}),
    }
    at = InterruptedAt(toy)
    for node_id in ("n", "e", "e.0.0.2", "w", "p", "out"):
        toy.executor.reset()
        at.node_id = node_id
        result = toy.run(graph(**nodes))
        ((_, stopped),) = toy.events("execution_interrupted")
        assert stopped["node_id"] == node_id.split(".")[0]
        assert set(stopped) == {"prompt_id", "node_id", "node_type", "executed", "timestamp"}
        assert result["status"]["status_str"] == "error" and result["status"]["completed"] is False
        assert not toy.events("execution_error") and not toy.host.interrupt.is_set()
        at.node_id = None
        assert toy.shown(graph(**nodes)) == [4]


def test_an_interrupt_reaches_a_run_that_only_waits(toy):
    timer = threading.Timer(0.1, toy.host.interrupt.set)
    timer.start()
    result = toy.run(graph(n=("Number", {"value": 1}), w=("Wait", {"value": "n.0", "seconds": 10.0}), out=("Show", {"value": "w.0"})))
    assert result["status"]["status_str"] == "error"
    assert toy.events("execution_interrupted")[0][1]["node_id"] == "w"
    assert toy.shown(graph(**CHAIN)) == [2]


def test_an_interruption_is_told_to_everyone_when_the_job_has_no_client(toy):
    class StopsItself:
        RETURN_TYPES, FUNCTION, CATEGORY = ("INT",), "go", "toy"
        INPUT_TYPES = classmethod(lambda cls: {"required": {}})

        def go(self):
            toy.host.interrupt.set()
            return (1,)

    toy.registry.add({"StopsItself": StopsItself})
    toy.run(graph(s=("StopsItself", {}), out=("Show", {"value": "s.0"})), client=None)
    assert [event for event, _ in toy.messages] == ["execution_interrupted"]


def test_progress_goes_through_the_hook_and_stops_at_an_interrupt(toy):
    class Steps:
        RETURN_TYPES, FUNCTION, CATEGORY = ("INT",), "go", "toy"
        INPUT_TYPES = classmethod(lambda cls: {"required": {"stop_at": ("INT", {})}})

        def go(self, stop_at):
            from rectiflow.host.embedded.utils import ProgressBar

            bar = ProgressBar(4)
            for step in range(4):
                if step == stop_at:
                    toy.host.interrupt.set()
                bar.update_absolute(step + 1, preview=("JPEG", f"picture {step}", 512))
            return (1,)

    toy.registry.add({"Steps": Steps})
    toy.run(graph(s=("Steps", {"stop_at": -1}), out=("Show", {"value": "s.0"})))
    told = [data for _, data in toy.events("progress")]
    assert told == [{"value": step + 1, "max": 4, "prompt_id": "run", "node": "s"} for step in range(4)]
    previews = [data for _, data in toy.events("preview_image")]
    assert previews[2]["image"] == ("JPEG", "picture 2", 512)
    assert previews[2]["metadata"] == {
        "node_id": "s", "display_node_id": "s", "parent_node_id": None, "real_node_id": "s", "prompt_id": "run"
    }  # fmt: skip
    states = [data["nodes"]["s"]["value"] for _, data in toy.events("progress_state") if "out" not in data["nodes"]]
    assert states == [0.0, 1, 2, 3, 4, 4]

    toy.run(graph(s=("Steps", {"stop_at": 2}), out=("Show", {"value": "s.0"})))
    assert len(toy.events("progress")) == 2
    assert toy.events("execution_interrupted")[0][1]["node_id"] == "s"
    assert toy.host.progress_hook is None


def test_progress_from_a_thread_of_the_node_counts_for_the_node(toy):
    class Threaded:
        RETURN_TYPES, FUNCTION, CATEGORY = ("INT",), "go", "toy"
        INPUT_TYPES = classmethod(lambda cls: {"required": {}})

        def go(self):
            hook = toy.host.progress_hook
            thread = threading.Thread(target=hook, args=(1, 2))
            thread.start()
            thread.join()
            return (1,)

    toy.registry.add({"Threaded": Threaded})
    toy.run(graph(t=("Threaded", {}), out=("Show", {"value": "t.0"})))
    assert toy.events("progress")[0][1]["node"] == "t"


def test_a_failing_run_leaves_no_task_behind(toy):
    nodes = {"w": ("Wait", {"value": 1, "seconds": 5.0}), "f": ("Fail", {"value": 1})}
    shows = {"a": ("Show", {"value": "w.0"}), "b": ("Show", {"value": "f.0"})}
    result = toy.run(graph(**nodes, **shows))  # would take five seconds if the waiting task were awaited
    assert result["status"]["status_str"] == "error"
    assert toy.shown(graph(**CHAIN)) == [2]
