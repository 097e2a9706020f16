"""What is kept between runs and within one, in each cache mode."""

from __future__ import annotations

import gc
import math

import pytest
from rectiflow.host.embedded.execution.caching import CacheSettings, Signatures, comparable
from rectiflow.tests.execution.toy_nodes import ToyHost, graph


def chain(value: int, **more) -> dict:
    return graph(n=("Number", {"value": value}), s=("Add", {"a": "n.0", "b": 1}), out=("Show", {"value": "s.0"}), **more)


def test_the_same_prompt_runs_nothing_twice(toy):
    assert toy.shown(chain(1)) == [2]
    assert toy.shown(chain(1)) == [2]
    assert toy.calls() == []


def test_a_changed_constant_runs_what_depends_on_it(toy):
    toy.run(chain(1))
    prompt = chain(1)
    prompt["s"]["inputs"]["b"] = 5
    assert toy.shown(prompt) == [6]
    assert toy.calls() == ["Add", "Show"]


def test_ids_do_not_matter_but_what_nodes_say_does(toy):
    toy.run(chain(1))
    renamed = graph(first=("Number", {"value": 1}), second=("Add", {"a": "first.0", "b": 1}), last=("Show", {"value": "second.0"}))
    result = toy.run(renamed)
    assert toy.calls() == []
    assert result["outputs"] == {"last": {"value": [2]}} and result["meta"]["last"]["node_id"] == "last"


def test_equal_nodes_of_one_prompt_run_once_and_both_show(toy):
    result = toy.run(chain(1, again=("Show", {"value": "s.0"})))
    assert result["outputs"] == {"out": {"value": [2]}, "again": {"value": [2]}}
    assert toy.calls() == ["Number", "Add", "Show"]


def test_classic_keeps_the_latest_prompt_only(toy):
    toy.run(chain(1))
    toy.run(chain(2))
    toy.run(chain(1))
    assert toy.calls() == ["Number", "Add", "Show"]


@pytest.mark.parametrize(("size", "again"), [(100, []), (3, []), (0, ["Number", "Add", "Show"])])
def test_lru_keeps_results_of_earlier_prompts_up_to_its_size(size, again):
    toy = ToyHost(CacheSettings("lru", size))
    for value in (1, 2):
        toy.run(chain(value))
    toy.run(chain(3))  # of six older results the `size` most recently used stay
    toy.run(chain(2))
    assert toy.calls() == again


def test_lru_drops_the_longest_unused_first():
    toy = ToyHost(CacheSettings("lru", 6))
    for value in (1, 2, 1, 3, 4):
        toy.run(chain(value))
    assert toy.shown(chain(3)) == [4] and toy.calls() == []
    assert toy.shown(chain(2)) == [3] and toy.calls() != []


def test_none_keeps_nothing_between_runs():
    toy = ToyHost(CacheSettings("none"))
    for _ in range(2):
        toy.run(chain(1))
        assert toy.calls() == ["Number", "Add", "Show"]
        assert dict(toy.events())["execution_cached"]["nodes"] == []


class Tracked:
    """A value whose end can be seen."""

    alive = 0

    def __init__(self):
        Tracked.alive += 1

    def __del__(self):
        Tracked.alive -= 1


class MakeTracked:
    RETURN_TYPES, FUNCTION, CATEGORY = ("*",), "go", "toy"
    INPUT_TYPES = classmethod(lambda cls: {"required": {"value": ("*", {})}})
    most = 0

    def go(self, value):
        gc.collect()
        MakeTracked.most = max(MakeTracked.most, Tracked.alive)
        return (Tracked(),)


@pytest.mark.parametrize(("mode", "most", "after"), [("classic", 9, 10), ("none", 1, 0)])
def test_none_drops_a_result_when_its_last_reader_ran(mode, most, after):
    toy = ToyHost(CacheSettings(mode), MakeTracked=MakeTracked)
    Tracked.alive = MakeTracked.most = 0
    nodes = {str(i): ("MakeTracked", {"value": f"{i - 1}.0" if i else 0}) for i in range(10)}
    result = toy.run(graph(**nodes, g=("Gate", {"value": "9.0", "block": True}), out=("Show", {"value": "g.0"})))
    assert result["status"]["completed"]
    toy.log.clear()
    gc.collect()
    assert (MakeTracked.most, Tracked.alive) == (most, after)
    toy.executor.reset()
    gc.collect()
    assert Tracked.alive == 0


def test_none_keeps_what_a_lazy_input_may_still_ask_for():
    toy = ToyHost(CacheSettings("none"))
    prompt = graph(
        n=("Number", {"value": 1}), early=("Show", {"value": "n.0"}), w=("Wait", {"value": True, "seconds": 0.05}),
        p=("Pick", {"pick": "w.0", "yes": "n.0", "no": 0}), out=("Show", {"value": "p.0"}),
    )  # fmt: skip
    assert toy.shown(prompt) == [1]
    assert toy.calls("Number") == [{"value": 1}]


def test_an_error_keeps_nothing_alive():
    class Holds:
        RETURN_TYPES, FUNCTION, CATEGORY = ("*",), "go", "toy"
        INPUT_TYPES = classmethod(lambda cls: {"required": {}})

        def go(self):
            held = Tracked()
            raise RuntimeError(f"holding {held is not None}")

    toy = ToyHost(Holds=Holds)
    Tracked.alive = 0
    toy.run(graph(h=("Holds", {}), out=("Show", {"value": "h.0"})))
    gc.collect()
    assert Tracked.alive == 0


def test_results_go_with_their_executor_at_once():
    """No circle: a large model is free when its executor is dropped, not when Python next looks for circles."""
    gc.collect()
    gc.disable()
    try:
        toy = ToyHost(MakeTracked=MakeTracked)
        Tracked.alive = 0
        toy.run(graph(m=("MakeTracked", {"value": 0}), g=("Gate", {"value": "m.0", "block": True}), out=("Show", {"value": "g.0"})))
        assert Tracked.alive == 1
        toy.log.clear()
        del toy.executor
        assert Tracked.alive == 0
    finally:
        gc.enable()


def changing(token) -> type:
    class Changing:
        RETURN_TYPES, FUNCTION, CATEGORY = ("INT",), "go", "toy"
        INPUT_TYPES = classmethod(lambda cls: {"required": {"value": ("INT", {})}, "optional": {"link": ("INT", {})}})
        asked: list = []

        @classmethod
        def IS_CHANGED(cls, **inputs):
            cls.asked.append(inputs)
            return token()

        def go(self, value, link=0):
            return (value,)

    return Changing


def runs_again(token) -> bool:
    toy = ToyHost(Changing=changing(token))
    prompt = graph(c=("Changing", {"value": 1}), out=("Show", {"value": "c.0"}))
    toy.run(prompt)
    result = toy.run(prompt)
    assert result["outputs"] == {"out": {"value": [1]}}
    return "c" in [data["node"] for _, data in toy.events("executing")]


def test_is_changed_decides():
    counter = iter(range(100))

    def fails():
        raise OSError("no such file")

    assert not runs_again(lambda: "same")
    assert not runs_again(lambda: True)  # the same answer each time: not changed
    assert runs_again(lambda: next(counter))
    assert runs_again(lambda: float("nan"))
    assert runs_again(lambda: math.nan)  # the same object each time, and still never equal
    assert runs_again(fails)


def test_is_changed_may_wait():
    class Asks(changing(lambda: 0)):
        @classmethod
        async def IS_CHANGED(cls, **inputs):
            import asyncio

            await asyncio.sleep(0.001)
            return "same"

    toy = ToyHost(Asks=Asks)
    prompt = graph(c=("Asks", {"value": 1}), out=("Show", {"value": "c.0"}))
    toy.run(prompt)
    toy.run(prompt)
    assert toy.calls() == []


def test_is_changed_gets_constants_only_and_once_a_run():
    Changing = changing(lambda: 0)
    toy = ToyHost(Changing=Changing)
    toy.run(graph(n=("Number", {"value": 4}), c=("Changing", {"value": 1, "link": "n.0"}), out=("Show", {"value": "c.0"})))
    assert Changing.asked == [{"value": 1, "link": None}]


@pytest.mark.parametrize("attribute", ["hidden id", "NOT_IDEMPOTENT"])
def test_nodes_that_ask_for_their_id_are_not_shared(attribute):
    class Own:
        RETURN_TYPES, FUNCTION, CATEGORY = ("INT",), "go", "toy"
        NOT_IDEMPOTENT = attribute == "NOT_IDEMPOTENT"
        calls: list = []

        @classmethod
        def INPUT_TYPES(cls):
            return {"required": {}} if cls.NOT_IDEMPOTENT else {"required": {}, "hidden": {"me": "UNIQUE_ID"}}

        def go(self, me=None):
            self.calls.append(me)
            return (1,)

    toy = ToyHost(Own=Own)
    prompt = graph(a=("Own", {}), b=("Own", {}), one=("Show", {"value": "a.0"}), two=("Show", {"value": "b.0"}))
    toy.run(prompt)
    assert len(Own.calls) == 2
    toy.run(prompt)
    assert len(Own.calls) == 2


def test_expansions_are_kept_with_their_parent():
    toy = ToyHost()
    prompt = graph(e=("AddOneTimes", {"value": 0, "times": 3}), out=("Show", {"value": "e.0"}))
    toy.run(prompt)
    longer = graph(e=("AddOneTimes", {"value": 0, "times": 5}), out=("Show", {"value": "e.0"}))
    assert toy.shown(longer) == [5]
    assert len(toy.calls("Add")) == 2  # the first three additions are there already
    toy.run(chain(1))
    toy.run(longer)
    assert len(toy.calls("Add")) == 5  # the parent left the prompt in between


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        (1, 1, True), (1, 1.0, False), (1, True, False), (0, False, False), ("1", 1, False), (None, None, True), ("a", "a", True),
        ([1, 2], [1, 2], True), ([1, 2], [2, 1], False), ({"a": 1, "b": 2}, {"b": 2, "a": 1}, True), ({"a": 1}, {"a": 2}, False),
        ([[]], [[]], True), ([], {}, False), (math.nan, math.nan, False), ([math.nan], [math.nan], False), (object(), object(), False),
        (10**400, 10**400, True), (math.inf, math.inf, True),
    ],
)  # fmt: skip
def test_constants_are_compared_by_value_and_type(one, other, equal):
    assert (comparable(one) == comparable(other)) is equal
    hash(comparable(one))


def test_a_constant_nested_without_end_is_never_equal():
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    assert comparable(deep) != comparable(deep)


def test_signatures_are_shared_while_somebody_holds_them():
    signatures = Signatures()
    first = signatures.of(("A", 1))
    assert signatures.of(("A", 1)) is first and signatures.of(("A", 2)) is not first
    chain = [first]
    for depth in range(50_000):
        chain.append(signatures.of(("B", depth, chain[-1])))
    last = chain[-1]
    del first
    chain.clear()
    assert len(signatures._known) > 50_000
    del last  # the whole chain goes, without recursing through it
    gc.collect()
    assert len(signatures._known) == 0


@pytest.mark.parametrize("text", ["lru:x", "lru:-1", "classic:3", "none:1", "ram", "", "lru:²"])
def test_cache_settings_refuse_what_they_do_not_know(text):
    with pytest.raises(ValueError, match="allowed"):
        CacheSettings.parse(text)


def test_cache_settings_read():
    assert CacheSettings.parse("lru:20") == CacheSettings("lru", 20)
    assert CacheSettings.parse("classic") == CacheSettings() and CacheSettings.parse("none") == CacheSettings("none")


def test_the_cost_of_keys_grows_with_the_graph_not_its_square():
    """A chain twice as long must not take four times the signatures: there is one per node."""
    toy = ToyHost()
    nodes = {"0": ("Number", {"value": 1}), **{str(i): ("Add", {"a": f"{i - 1}.0", "b": f"{max(0, i - 2)}.0"}) for i in range(1, 400)}}
    prompt = graph(**nodes, out=("Show", {"value": 1}))
    prompt["out"]["inputs"]["value"] = ["399", 0]
    toy.run(prompt)
    assert len(toy.executor._cache._signatures._known) == 401
