"""From saved workflows to prompts: what the interface does when a person presses Run."""

from __future__ import annotations

import copy
import random

import pytest
from rectiflow.errors import NodeInputError
from rectiflow.host.embedded.execution.node_face import NodeFace
from rectiflow.host.embedded.execution.registry import NodeRegistry
from rectiflow.host.embedded.execution.ui_format import is_ui_format, ui_to_prompt
from rectiflow.host.embedded.execution.widget_values import named_widget_values


class Source:
    INPUT_TYPES = classmethod(lambda cls: {"required": {"value": ("INT", {"default": 3}), "name": ("STRING", {})}})
    RETURN_TYPES, FUNCTION, CATEGORY = ("INT", "MASK"), "go", "toy"


class Change:
    INPUT_TYPES = classmethod(
        lambda cls: {
            "required": {"image": ("MASK",), "number": ("INT", {"default": 1})},
            "optional": {"extra": ("INT", {"forceInput": True})},
        }
    )
    RETURN_TYPES, FUNCTION, CATEGORY = ("INT", "MASK"), "go", "toy"


class Sink:
    INPUT_TYPES = classmethod(lambda cls: {"required": {"number": ("INT", {"default": 0})}})
    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "go", "toy", True


@pytest.fixture
def registry():
    registry = NodeRegistry()
    registry.add({"Source": Source, "Change": Change, "Sink": Sink}, {"Sink": "The sink"})
    return registry


class Drawing:
    """Builds a saved graph the way the interface writes it (schema 0.4)."""

    def __init__(self):
        self.nodes: list[dict] = []
        self.links: list[list] = []

    def node(self, id, kind, inputs=(), outputs=(), values=None, **more) -> dict:
        """`inputs`: (name, type) or (name, type, "widget")."""
        slots = []
        for name, type_, *widget in inputs:
            slots.append({"name": name, "type": type_, "link": None, **({"widget": {"name": name}} if widget else {})})
        made = [{"name": type_, "type": type_, "links": []} for type_ in outputs]
        node = {"id": id, "type": kind, "mode": 0, "order": len(self.nodes), "inputs": slots, "outputs": made, "properties": {}, **more}
        if values is not None:
            node["widgets_values"] = values
        self.nodes.append(node)
        return node

    def link(self, origin: int, slot: int, target: int, into: int) -> int:
        number = len(self.links) + 1
        by_id = {node["id"]: node for node in self.nodes}
        kind = by_id[origin]["outputs"][slot]["type"] if origin in by_id else "*"
        self.links.append([number, origin, slot, target, into, kind])
        if target in by_id:
            by_id[target]["inputs"][into]["link"] = number
        if origin in by_id:
            by_id[origin]["outputs"][slot]["links"].append(number)
        return number

    def saved(self, **more) -> dict:
        last = max((node["id"] for node in self.nodes), default=0)
        return {"version": 0.4, "last_node_id": last, "last_link_id": len(self.links), "nodes": self.nodes, "links": self.links, **more}


SOURCE = {"kind": "Source", "outputs": ("INT", "MASK"), "values": [5, "five"]}
CHANGE_INPUTS = (("image", "MASK"), ("number", "INT", "widget"), ("extra", "INT"))


def source(drawing: Drawing, id: int, **more) -> dict:
    return drawing.node(id, **{**SOURCE, **more})


def sink(drawing: Drawing, id: int, **more) -> dict:
    return drawing.node(id, "Sink", (("number", "INT", "widget"),), values=[9], **more)


def as_schema_1(saved: dict) -> dict:
    """The same graph with links as objects."""
    saved = copy.deepcopy(saved)
    names = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
    saved["links"] = [dict(zip(names, link)) for link in saved["links"]]
    return saved | {"version": 1, "state": {"lastNodeId": 9, "lastLinkId": 9, "lastGroupId": 0, "lastRerouteId": 0}}


def inputs_of(prompt: dict) -> dict:
    return {node_id: node["inputs"] for node_id, node in prompt.items()}


def test_widgets_and_links_become_inputs(registry):
    drawing = Drawing()
    source(drawing, 1)
    sink(drawing, 2, title="My sink")
    drawing.link(1, 0, 2, 0)
    expected = {
        "1": {"class_type": "Source", "inputs": {"value": 5, "name": "five"}, "_meta": {"title": "Source"}},
        "2": {"class_type": "Sink", "inputs": {"number": ["1", 0]}, "_meta": {"title": "My sink"}},
    }
    assert ui_to_prompt(drawing.saved(), registry) == expected
    assert ui_to_prompt(as_schema_1(drawing.saved()), registry) == expected
    del drawing.nodes[1]["title"]
    assert ui_to_prompt(drawing.saved(), registry)["2"]["_meta"] == {"title": "The sink"}


def test_notes_vanish_and_so_does_decoration_of_unknown_packs(registry):
    drawing = Drawing()
    sink(drawing, 1)
    drawing.node(2, "Note", values=["read me"])
    drawing.node(3, "MarkdownNote", values=["# read me"])
    drawing.node(4, "Label (of some pack)")
    assert list(ui_to_prompt(drawing.saved(), registry)) == ["1"]


def test_a_class_that_is_not_known_is_kept_for_validation_to_name(registry):
    drawing = Drawing()
    drawing.node(1, "Missing", outputs=("INT",), values=[1])
    sink(drawing, 2)
    drawing.link(1, 0, 2, 0)
    prompt = ui_to_prompt(drawing.saved(), registry)
    assert prompt["1"]["class_type"] == "Missing" and prompt["2"]["inputs"]["number"] == ["1", 0]


def test_reroutes_are_followed(registry):
    drawing = Drawing()
    source(drawing, 1)
    drawing.node(2, "Reroute", (("", "*"),), ("INT",))
    drawing.node(3, "Reroute", (("", "*"),), ("INT",))
    sink(drawing, 4)
    for origin, target in ((1, 2), (2, 3), (3, 4)):
        drawing.link(origin, 0, target, 0)
    assert inputs_of(ui_to_prompt(drawing.saved(), registry)) == {"1": {"value": 5, "name": "five"}, "4": {"number": ["1", 0]}}
    drawing.nodes[1]["inputs"][0]["link"] = None  # an open end: the widget's own value
    assert ui_to_prompt(drawing.saved(), registry)["4"]["inputs"] == {"number": 9}


def test_a_primitive_writes_its_value(registry):
    drawing = Drawing()
    drawing.node(1, "PrimitiveNode", outputs=("INT",), values=[77, "randomize"])
    drawing.node(2, "Reroute", (("", "*"),), ("INT",))
    sink(drawing, 3)
    drawing.link(1, 0, 2, 0)
    drawing.link(2, 0, 3, 0)
    assert inputs_of(ui_to_prompt(drawing.saved(), registry)) == {"3": {"number": 77}}


def test_muted_nodes_are_left_out_with_the_links_to_them(registry):
    drawing = Drawing()
    source(drawing, 1, mode=2)
    sink(drawing, 2)
    drawing.link(1, 0, 2, 0)
    assert inputs_of(ui_to_prompt(drawing.saved(), registry)) == {"2": {"number": 9}}
    drawing.nodes[1]["mode"] = 2
    assert ui_to_prompt(drawing.saved(), registry) == {}


@pytest.mark.parametrize(("extra", "number"), [(True, ["1", 0]), (False, 9)])
def test_bypassed_nodes_hand_on_an_input_of_the_same_type(registry, extra, number):
    drawing = Drawing()
    source(drawing, 1)
    drawing.node(2, "Change", CHANGE_INPUTS, ("INT", "MASK"), [1], mode=4)
    sink(drawing, 3)
    drawing.link(1, 1, 2, 0)
    if extra:
        drawing.link(1, 0, 2, 1)
    drawing.link(2, 0, 3, 0)
    prompt = ui_to_prompt(drawing.saved(), registry)
    assert "2" not in prompt and prompt["3"]["inputs"] == {"number": number}


def test_a_bypass_prefers_the_input_across(registry):
    drawing = Drawing()
    for id in (1, 2):
        source(drawing, id)
    drawing.node(3, "Change", (("a", "INT"), ("b", "INT")), ("INT", "INT"), mode=4)
    sink(drawing, 4)
    drawing.link(1, 0, 3, 0)
    drawing.link(2, 0, 3, 1)
    drawing.link(3, 1, 4, 0)
    assert ui_to_prompt(drawing.saved(), registry)["4"]["inputs"] == {"number": ["2", 0]}


def test_a_bypassed_node_without_a_fitting_input_hands_on_nothing(registry):
    drawing = Drawing()
    source(drawing, 1)
    drawing.node(2, "Change", (("image", "MASK"),), ("INT",), mode=4)
    sink(drawing, 3)
    drawing.link(1, 1, 2, 0)
    drawing.link(2, 0, 3, 0)
    assert ui_to_prompt(drawing.saved(), registry)["3"]["inputs"] == {"number": 9}


def test_list_values_are_wrapped(registry):
    drawing = Drawing()
    source(drawing, 1, values=[[1, 2], "x"])
    assert ui_to_prompt(drawing.saved(), registry)["1"]["inputs"]["value"] == {"__value__": [1, 2]}


# --- subgraphs


def with_subgraph(**host) -> dict:
    """1 Source → 2 subgraph (Change → out) → 3 Sink. The subgraph's second inlet is a widget, `number`."""
    inner = Drawing()
    inner.node(10, "Change", CHANGE_INPUTS, ("INT", "MASK"), [11])
    inner.link(-10, 0, 10, 0)
    inner.link(-10, 1, 10, 1)
    inner.link(10, 0, -20, 0)
    definition = {
        "id": "uuid-1", "name": "Changes", "inputNode": {"id": -10}, "outputNode": {"id": -20},
        "inputs": [{"name": "image", "type": "MASK", "linkIds": [1]}, {"name": "number", "type": "INT", "linkIds": [2]}],
        "outputs": [{"name": "INT", "type": "INT", "linkIds": [3]}],
        "nodes": inner.nodes, "links": as_schema_1(inner.saved())["links"],
    }  # fmt: skip
    outer = Drawing()
    source(outer, 1)
    outer.node(2, "uuid-1", (("image", "MASK"), ("number", "INT", "widget")), ("INT",), **host)
    sink(outer, 3)
    outer.link(1, 1, 2, 0)
    outer.link(2, 0, 3, 0)
    return outer.saved(definitions={"subgraphs": [definition]})


def test_subgraphs_are_unfolded(registry):
    prompt = ui_to_prompt(with_subgraph(), registry)
    assert set(prompt) == {"1", "2:10", "3"}
    assert prompt["2:10"]["inputs"] == {"image": ["1", 1], "number": 11}
    assert prompt["3"]["inputs"] == {"number": ["2:10", 0]}


@pytest.mark.parametrize(
    ("host", "number"),
    [
        ({"values": [42]}, 42),
        ({"values": [42], "widgets_values_named": {"number": 43}}, 43),
        ({"values": []}, 11),
        ({"values": [None]}, 11),
        ({"values": [44], "properties": {"proxyWidgets": [["10", "number"]]}}, 44),
    ],
    ids=repr,
)
def test_widgets_that_a_subgraph_shows(registry, host, number):
    properties = host.pop("properties", None)
    saved = with_subgraph(**host)
    if properties:
        saved["nodes"][1]["properties"] = properties
    assert ui_to_prompt(saved, registry)["2:10"]["inputs"]["number"] == number


def test_a_widget_of_a_subgraph_that_is_fed_by_a_link(registry):
    saved = with_subgraph(values=[42])
    saved["nodes"][1]["inputs"][1]["link"] = 3
    saved["links"].append([3, 1, 0, 2, 1, "INT"])
    assert ui_to_prompt(saved, registry)["2:10"]["inputs"]["number"] == ["1", 0]


def test_inlets_are_matched_by_name(registry):
    saved = with_subgraph(values=[42])
    saved["nodes"][1]["inputs"].reverse()
    assert ui_to_prompt(saved, registry)["2:10"]["inputs"] == {"image": ["1", 1], "number": 42}


@pytest.mark.parametrize("mode", [2, 4])
def test_muted_and_bypassed_subgraphs(registry, mode):
    saved = with_subgraph()
    saved["nodes"][1]["mode"] = mode
    prompt = ui_to_prompt(saved, registry)
    assert set(prompt) == {"1", "3"} and prompt["3"]["inputs"] == {"number": 9}


def test_subgraphs_inside_subgraphs_and_used_twice(registry):
    saved = with_subgraph()
    wrapper = Drawing()
    for id in (20, 21):
        wrapper.node(id, "uuid-1", (("image", "MASK"), ("number", "INT", "widget")), ("INT",), [id])
    wrapper.link(-10, 0, 20, 0)
    wrapper.link(-10, 0, 21, 0)
    wrapper.link(21, 0, -20, 0)
    saved["definitions"]["subgraphs"].append(
        {"id": "uuid-2", "name": "Twice", "inputs": [{"name": "image", "type": "MASK"}], "outputs": [{"name": "INT", "type": "INT"}],
         "nodes": wrapper.nodes, "links": wrapper.links}  # fmt: skip
    )
    saved["nodes"][1]["type"] = "uuid-2"
    prompt = ui_to_prompt(saved, registry)
    assert set(prompt) == {"1", "2:20:10", "2:21:10", "3"}
    assert prompt["2:20:10"]["inputs"] == {"image": ["1", 1], "number": 20}
    assert prompt["2:21:10"]["inputs"] == {"image": ["1", 1], "number": 21}
    assert prompt["3"]["inputs"] == {"number": ["2:21:10", 0]}


def test_a_wire_straight_through_a_subgraph(registry):
    saved = with_subgraph()
    definition = saved["definitions"]["subgraphs"][0]
    definition["nodes"] = []
    definition["links"] = [[1, -10, 0, -20, 0, "*"]]
    saved["nodes"][1]["inputs"][0]["link"] = 1
    saved["links"][0] = [1, 1, 0, 2, 0, "INT"]
    assert ui_to_prompt(saved, registry)["3"]["inputs"] == {"number": ["1", 0]}


# --- damaged files


def test_circles_are_errors_not_endless_loops(registry):
    drawing = Drawing()
    drawing.node(1, "Reroute", (("", "*"),), ("INT",))
    drawing.node(2, "Reroute", (("", "*"),), ("INT",))
    sink(drawing, 3)
    for origin, target in ((1, 2), (2, 1), (2, 3)):
        drawing.link(origin, 0, target, 0)
    with pytest.raises(NodeInputError, match="a circle of links"):
        ui_to_prompt(drawing.saved(), registry)
    saved = with_subgraph()
    saved["definitions"]["subgraphs"][0]["nodes"].append({"id": 11, "type": "uuid-1", "mode": 0})
    with pytest.raises(NodeInputError, match="subgraphs that do not contain themselves"):
        ui_to_prompt(saved, registry)


def test_links_to_nothing_are_named(registry):
    drawing = Drawing()
    source(drawing, 1)
    sink(drawing, 2)
    drawing.link(1, 0, 2, 0)
    saved = drawing.saved()
    saved["nodes"][1]["inputs"][0]["link"] = 99
    with pytest.raises(NodeInputError, match="node 2.*link 99"):
        ui_to_prompt(saved, registry)
    saved["nodes"][1]["inputs"][0]["link"] = 1
    del saved["nodes"][0]
    with pytest.raises(NodeInputError, match="nodes that the file contains"):
        ui_to_prompt(saved, registry)


def test_a_damaged_file_is_refused_in_words(registry):
    rng = random.Random(5)
    base = with_subgraph(values=[42])
    junk = [None, 5, "x", [], {}, [None], {"id": 1}, -1, True]

    def damage(value):
        if isinstance(value, dict) and value and rng.random() < 0.8:
            key = rng.choice(list(value))
            value[key] = damage(value[key])
            return value
        if isinstance(value, list) and value and rng.random() < 0.8:
            index = rng.randrange(len(value))
            value[index] = damage(value[index])
            return value
        return copy.deepcopy(rng.choice(junk))

    outcomes = {True: 0, False: 0}
    for _ in range(1500):
        saved = damage(copy.deepcopy(base))
        if not is_ui_format(saved):
            continue
        try:
            ui_to_prompt(saved, registry)
            outcomes[True] += 1
        except NodeInputError as error:
            assert "UI workflow" in str(error)
            outcomes[False] += 1
    assert min(outcomes.values()) > 100


# --- widget values


def face(**inputs) -> NodeFace:
    required = {name: declared for name, declared in inputs.items() if not name.startswith("opt_")}
    optional = {name: declared for name, declared in inputs.items() if name.startswith("opt_")}
    table = {"required": required, "optional": optional, "hidden": {"me": "UNIQUE_ID"}}
    return NodeFace("Widgets", type("Widgets", (), {"INPUT_TYPES": classmethod(lambda cls: table), "RETURN_TYPES": (), "FUNCTION": "go"}))


SAMPLER = face(model=("MODEL",), seed=("INT", {"control_after_generate": True}), steps=("INT", {"default": 20}), name=(["euler", "heun"],))
LOADER = face(image=(["a.png", "b.png"], {"image_upload": True}), channel=(["alpha", "red"],), opt_text=("STRING", {"default": "t"}))
FILTERED = face(file=(["a", "b"], {"control_after_generate": True}), after=("STRING", {}))


@pytest.mark.parametrize(
    ("widgets", "stored", "named"),
    [
        (SAMPLER, [7, "randomize", 30, "heun"], {"seed": 7, "steps": 30, "name": "heun"}),
        (SAMPLER, [7, 30, "heun"], {"seed": 7, "steps": 30, "name": "heun"}),  # written by a program that knows no controls
        (SAMPLER, [7], {"seed": 7, "steps": 20, "name": "euler"}),
        (SAMPLER, None, {"seed": 0, "steps": 20, "name": "euler"}),
        (SAMPLER, [7, "fixed", 30, "heun", "of a later version"], {"seed": 7, "steps": 30, "name": "heun"}),
        (SAMPLER, {"seed": 8, "name": "heun", "unknown": 1}, {"seed": 8, "steps": 20, "name": "heun"}),
        (LOADER, ["b.png", "red", "image", "text"], {"image": "b.png", "channel": "red", "opt_text": "text"}),
        (LOADER, ["b.png", "red", "image"], {"image": "b.png", "channel": "red", "opt_text": "image"}),
        (LOADER, ["b.png", "red"], {"image": "b.png", "channel": "red", "opt_text": "t"}),
        (FILTERED, ["b", "fixed", "", "text"], {"file": "b", "after": "text"}),
        (FILTERED, ["b", "text"], {"file": "b", "after": "text"}),
        (face(noise_seed=("INT", {}), x=("INT", {})), [1, "fixed", 2], {"noise_seed": 1, "x": 2}),
        (face(seed=("INT", {"control_after_generate": False}), x=("STRING", {})), [1, "fixed"], {"seed": 1, "x": "fixed"}),
        (face(a=("INT", {"forceInput": True}), b=("FLOAT", {}), c=("IMAGE",), d=("BOOLEAN", {})), [0.5, True], {"b": 0.5, "d": True}),
        (face(pick=("COMBO", {"options": ["x", "y"]}), empty=([],)), ["y", None], {"pick": "y"}),
    ],
    ids=lambda value: "" if isinstance(value, NodeFace) else repr(value)[:40],
)
def test_widget_values_find_their_inputs(widgets, stored, named):
    assert named_widget_values({"widgets_values": stored}, widgets) == named


def test_names_win_over_positions():
    node = {"widgets_values": [1, "fixed", 2, "euler"], "widgets_values_named": {"steps": 5, "seed": 6, "control_after_generate": "fixed"}}
    assert named_widget_values(node, SAMPLER) == {"seed": 6, "steps": 5, "name": "euler"}
