"""What a run computes: lists, lazy inputs, expansion, blockers, asynchronous nodes, hidden inputs."""

from __future__ import annotations

import time

import pytest
import torch
from rectiflow.host.embedded.execution.caching import CacheSettings
from rectiflow.tests.execution.toy_nodes import ToyHost, graph

MODES = [CacheSettings(), CacheSettings("lru", 100), CacheSettings("none")]


@pytest.fixture(params=MODES, ids=lambda settings: settings.mode)
def toy(request):
    return ToyHost(request.param)


def test_values_flow_along_links(toy):
    prompt = graph(n=("Number", {"value": 2}), s=("Add", {"a": "n.0", "b": "n.0"}), out=("Show", {"value": "s.0"}))
    assert toy.shown(prompt) == [4]
    assert toy.calls() == ["Number", "Add", "Show"]


def test_a_node_is_called_once_per_list_element_and_short_lists_repeat_their_last(toy):
    prompt = graph(
        long=("ListOf", {"a": 1, "b": 2, "c": 3}),
        short=("ListOf", {"a": 10, "b": 20}),
        s=("Add", {"a": "long.0", "b": "short.0"}),
        out=("Show", {"value": "s.0"}),
    )
    assert toy.shown(prompt) == [11, 22, 23]
    assert [tuple(call.values()) for call in toy.calls("Add")] == [(1, 10), (2, 20), (3, 20)]


def test_input_is_list_takes_the_lists_whole(toy):
    prompt = graph(all=("ListOf", {"a": 1, "b": 2, "c": 3}), t=("Total", {"values": "all.0"}), out=("Show", {"value": "t.0"}))
    assert toy.shown(prompt) == [6]
    assert toy.calls("Total") == [{"values": [1, 2, 3]}]


def test_an_empty_list_is_a_clear_error(toy):
    class Nothing:
        RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_IS_LIST = ("INT",), "go", "toy", (True,)
        INPUT_TYPES = classmethod(lambda cls: {"required": {}})

        def go(self):
            return ([],)

    toy.registry.add({"Nothing": Nothing})
    result = toy.run(graph(n=("Nothing", {}), s=("Add", {"a": "n.0", "b": 1}), out=("Show", {"value": "s.0"})))
    (error,) = [data for event, data in toy.messages if event == "execution_error"]
    assert error["node_id"] == "s" and "input 'a' received an empty list" in error["exception_message"]
    assert result["status"] == {"status_str": "error", "completed": False, "messages": toy.executor.status_messages}


@pytest.mark.parametrize("pick", [True, False])
def test_only_the_lazy_branch_that_is_needed_runs(toy, pick):
    prompt = graph(
        yes=("Number", {"value": 1}), no=("Number", {"value": 0}),
        p=("Pick", {"pick": pick, "yes": "yes.0", "no": "no.0"}), out=("Show", {"value": "p.0"}),
    )  # fmt: skip
    assert toy.shown(prompt) == [int(pick)]
    assert toy.calls("Number") == [{"value": int(pick)}]
    started = [data["node"] for event, data in toy.messages if event == "executing"]
    assert started.count("p") == 2  # asked, then run once its input was there


def test_lazy_inputs_are_decided_per_list_element(toy):
    prompt = graph(
        flags=("ListOf", {"a": True, "b": False}), yes=("Number", {"value": 1}), no=("Number", {"value": 0}),
        p=("Pick", {"pick": "flags.0", "yes": "yes.0", "no": "no.0"}), out=("Show", {"value": "p.0"}),
    )  # fmt: skip
    assert toy.shown(prompt) == [1, 0]


def test_a_lazy_input_whose_output_does_not_exist_ends_the_run(toy):
    class Short:
        """Declares two outputs and returns one."""

        RETURN_TYPES, FUNCTION, CATEGORY = ("INT", "INT"), "go", "toy"
        INPUT_TYPES = classmethod(lambda cls: {"required": {}})

        def go(self):
            return (1,)

    toy.registry.add({"Short": Short})
    toy.run(graph(s=("Short", {}), p=("Pick", {"pick": True, "yes": "s.1", "no": 0}), out=("Show", {"value": "p.0"})))
    (error,) = [data for event, data in toy.messages if event == "execution_error"]
    assert error["node_id"] == "p" and "have no value" in error["exception_message"]


@pytest.mark.parametrize("times", [0, 1, 5])
def test_expansion_runs_the_graph_that_a_node_returns(toy, times):
    prompt = graph(e=("AddOneTimes", {"value": 10, "times": times}), out=("Show", {"value": "e.0"}))
    assert toy.shown(prompt) == [10 + times]
    assert len(toy.calls("Add")) == times


def test_each_list_element_expands_on_its_own(toy):
    times = ("ListOf", {"a": 0, "b": 2, "c": 1})
    assert toy.shown(graph(t=times, e=("AddOneTimes", {"value": 0, "times": "t.0"}), out=("Show", {"value": "e.0"}))) == [0, 2, 1]


def test_expansion_nests_as_deep_as_it_likes(toy):
    """1000 levels: nothing in the engine recurses once per level."""
    assert toy.shown(graph(c=("CountDown", {"value": 1000}), out=("Show", {"value": "c.0"}))) == [0]
    assert len(toy.calls("CountDown")) == 1001


def test_ids_of_expanded_nodes_name_their_parent(toy):
    toy.run(graph(e=("AddOneTimes", {"value": 1, "times": 2}), out=("Show", {"value": "e.0"})))
    state = [data["nodes"] for event, data in toy.messages if event == "progress_state"][-1]
    inner = state["e.0.0.1"]
    assert (inner["parent_node_id"], inner["display_node_id"], inner["real_node_id"]) == ("e", "e", "e")


def test_expansions_keep_list_outputs_apart():
    """An output of the inner graph that is a list takes its own slot only."""

    class TwoLists:
        RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_IS_LIST = ("INT", "INT"), "go", "toy", (True, True)
        INPUT_TYPES = classmethod(lambda cls: {"required": {}})

        def go(self):
            from rectiflow.host.embedded.execution.graph_utils import GraphBuilder

            inner = GraphBuilder()
            first, second = inner.node("ListOf", a=1, b=2), inner.node("ListOf", a=3)
            return {"result": (first.out(0), second.out(0)), "expand": inner.finalize()}

    toy = ToyHost(TwoLists=TwoLists)
    prompt = graph(t=("TwoLists", {}), one=("Show", {"value": "t.0"}), two=("Show", {"value": "t.1"}))
    result = toy.run(prompt)
    assert result["outputs"] == {"one": {"value": [1, 2]}, "two": {"value": [3]}}


def test_output_nodes_of_an_expansion_run_too(toy):
    class ShowsInside:
        RETURN_TYPES, FUNCTION, CATEGORY = ("INT",), "go", "toy"
        INPUT_TYPES = classmethod(lambda cls: {"required": {"value": ("INT", {})}})

        def go(self, value):
            from rectiflow.host.embedded.execution.graph_utils import GraphBuilder

            inner = GraphBuilder()
            inner.node("Show", value=value)
            return {"result": (value,), "expand": inner.finalize()}

    toy.registry.add({"ShowsInside": ShowsInside})
    result = toy.run(graph(s=("ShowsInside", {"value": 7}), out=("Show", {"value": "s.0"})))
    assert result["outputs"]["s.0.0.1"] == {"value": [7]}
    assert result["meta"]["s.0.0.1"] == {"node_id": "s.0.0.1", "display_node": "s", "parent_node": "s", "real_node_id": "s"}


def test_a_silent_blocker_skips_everything_behind_it(toy):
    prompt = graph(g=("Gate", {"value": 1, "block": True}), s=("Add", {"a": "g.0", "b": 1}), out=("Show", {"value": "s.0"}))
    result = toy.run(prompt)
    assert toy.calls() == ["Gate"]
    assert result["status"]["status_str"] == "success" and result["outputs"] == {}
    assert not toy.events("execution_error")


def test_a_blocker_with_a_message_reports_it_once(toy):
    prompt = graph(
        g=("Gate", {"value": 1, "block": True, "message": "not today"}), s=("Add", {"a": "g.0", "b": 1}), out=("Show", {"value": "s.0"})
    )
    result = toy.run(prompt)
    ((_, error),) = toy.events("execution_error")
    assert (error["node_id"], error["exception_type"]) == ("s", "ExecutionBlocked")
    assert error["exception_message"] == "Execution Blocked: not today"
    assert result["status"]["completed"] and toy.calls() == ["Gate"]


def test_a_blocker_in_a_list_skips_only_its_element(toy):
    flags = ("ListOf", {"a": False, "b": True, "c": False})
    prompt = graph(
        v=("ListOf", {"a": 1, "b": 2, "c": 3}), f=flags, g=("Gate", {"value": "v.0", "block": "f.0"}), out=("Show", {"value": "g.0"})
    )
    assert toy.shown(prompt) == [1, 3]
    blocked = graph(v=("ListOf", {"a": 1, "b": 2}), f=flags, g=("Gate", {"value": "v.0", "block": "f.0"}),
                    t=("Total", {"values": "g.0"}), out=("Show", {"value": "t.0"}))  # fmt: skip
    assert toy.shown(blocked) == []  # a node that takes lists whole is blocked by any element


def test_asynchronous_nodes_overlap(toy):
    nodes = {f"w{i}": ("Wait", {"value": i, "seconds": 0.2}) for i in range(5)}
    shows = {f"o{i}": ("Show", {"value": f"w{i}.0"}) for i in range(5)}
    started = time.perf_counter()
    result = toy.run(graph(**nodes, **shows))
    assert time.perf_counter() - started < 0.6  # one after the other would take 1.0
    assert {node_id: ui["value"] for node_id, ui in result["outputs"].items()} == {f"o{i}": [i] for i in range(5)}


def test_undeclared_links_are_passed_and_undeclared_constants_are_not(toy):
    prompt = graph(
        n=("Number", {"value": 1}), s=("Sum", {"first": "n.0", "second": "n.0", "third": 100}), out=("Show", {"value": "s.0"})
    )
    assert toy.shown(prompt) == [2]


def test_hidden_inputs(toy):
    prompt = graph(me=("Self", {"value": "5"}), out=("Show", {"value": "me.0"}))
    result = toy.run(prompt, extra_pnginfo={"workflow": {"a": 1}})
    assert result["outputs"]["out"] == {"value": ["me"]}
    (call,) = toy.calls("Self")
    assert call["extra"] == {"workflow": {"a": 1}}
    assert call["prompt"]["me"]["inputs"]["value"] == 5  # as coerced by validation


def test_a_list_constant_that_reads_as_a_link_reaches_the_node(toy):
    for value in (["n", 0], [1, 2], ["a"], [0.5, 0.5], []):
        prompt = graph(n=("Number", {"value": 1}), out=("Show", {"value": {"__value__": value}}))
        assert toy.shown(prompt) == [value]


def test_nodes_run_without_gradients(toy):
    class Gradients:
        RETURN_TYPES, FUNCTION, CATEGORY = ("*",), "go", "toy"
        INPUT_TYPES = classmethod(lambda cls: {"required": {}})

        def go(self):
            return (torch.is_inference_mode_enabled(),)

    toy.registry.add({"Gradients": Gradients})
    assert toy.shown(graph(g=("Gradients", {}), out=("Show", {"value": "g.0"}))) == [True]


def test_one_instance_per_node_id_is_reused_while_its_class_stays(toy):
    class Counts:
        RETURN_TYPES, FUNCTION, CATEGORY = ("INT",), "go", "toy"
        INPUT_TYPES = classmethod(lambda cls: {"required": {"value": ("INT", {})}})
        count = 0

        def go(self, value):
            self.count += 1
            return (self.count,)

    toy.registry.add({"Counts": Counts})
    assert [toy.shown(graph(c=("Counts", {"value": k}), out=("Show", {"value": "c.0"}))) for k in range(3)] == [[1], [2], [3]]
    toy.shown(graph(c=("Number", {"value": 0}), out=("Show", {"value": "c.0"})))
    assert toy.shown(graph(c=("Counts", {"value": 9}), out=("Show", {"value": "c.0"}))) == [1]


def test_ui_of_several_calls_is_joined_and_seconds_are_kept(toy):
    prompt = graph(v=("ListOf", {"a": 1, "b": 2}), out=("Show", {"value": "v.0"}))
    assert toy.shown(prompt) == [1, 2]
    assert set(toy.executor.node_seconds) == {"v", "out"}
    assert all(0 <= seconds < 1 for seconds in toy.executor.node_seconds.values())


def test_partial_execution_runs_the_targets_and_what_they_need(toy):
    prompt = graph(
        a=("Number", {"value": 1}), b=("Number", {"value": 2}), out=("Show", {"value": "a.0"}), other=("Show", {"value": "b.0"})
    )
    result = toy.run(prompt, targets=["out"])
    assert list(result["outputs"]) == ["out"] and toy.calls("Number") == [{"value": 1}]
    assert toy.validate(prompt, []).error["type"] == "prompt_no_outputs"


def test_an_output_node_that_others_read_runs_once(toy):
    class ShowAndPass:
        RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = ("INT",), "go", "toy", True
        INPUT_TYPES = classmethod(lambda cls: {"required": {"value": ("INT", {})}})
        calls: list = []

        def go(self, value):
            self.calls.append(value)
            return {"ui": {"value": [value]}, "result": (value,)}

    toy.registry.add({"ShowAndPass": ShowAndPass})
    result = toy.run(graph(first=("ShowAndPass", {"value": 3}), s=("Add", {"a": "first.0", "b": 1}), out=("Show", {"value": "s.0"})))
    assert result["outputs"] == {"first": {"value": [3]}, "out": {"value": [4]}}
    assert ShowAndPass.calls == [3]
