"""What shared graphs rely on never changes: node ids, inputs by name, order and type, outputs by place.

tests/snapshots/object_info.json holds the description of every node of ours. After adding a node, or an optional input as
the last one, or changing a default or a range:

    ./rectiflow test tests/test_snapshot.py --update-snapshot

writes the file anew; it refuses whatever would break a saved graph.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import rectiflow
from rectiflow.host.embedded.execution.registry import describe_class

ROOT = Path(__file__).resolve().parent.parent
SNAPSHOT = ROOT / "tests" / "snapshots" / "object_info.json"
DOCS = ROOT / "web" / "docs"
KEPT = ("input", "input_order", "output", "output_is_list", "output_name", "output_node", "category", "display_name")


def described() -> dict[str, dict]:
    """The nodes as a client of /object_info reads them: after a round through JSON, without prose."""
    nodes = {}
    for class_id, cls in sorted(rectiflow.NODE_CLASS_MAPPINGS.items()):
        entry = describe_class(class_id, cls, rectiflow.NODE_DISPLAY_NAME_MAPPINGS[class_id])
        nodes[class_id] = json.loads(json.dumps({key: entry[key] for key in KEPT}))
        for group in nodes[class_id]["input"].values():
            for spec in group.values():
                if isinstance(spec, list) and len(spec) > 1:
                    spec[1].pop("tooltip", None)
    return nodes


def breaking_changes(before: dict[str, dict], now: dict[str, dict]) -> Iterator[str]:
    """What would make a graph that was saved with `before` load wrongly."""
    for class_id, old in before.items():
        new = now.get(class_id)
        if new is None:
            yield f"{class_id} is gone"
            continue
        yield from (f"{class_id}: {change}" for change in _input_changes(old, new))
        if new["output"][: len(old["output"])] != old["output"]:
            yield f"{class_id}: the outputs {old['output']} became {new['output']}"
        if new["output_name"][: len(old["output_name"])] != old["output_name"]:
            yield f"{class_id}: the output names {old['output_name']} became {new['output_name']}"


def _input_changes(old: dict, new: dict) -> Iterator[str]:
    required, optional = (new["input_order"].get(group, []) for group in ("required", "optional"))
    if required != old["input_order"].get("required", []):
        yield f"the required inputs {old['input_order'].get('required', [])} became {required}; a new input is optional"
    before = old["input_order"].get("optional", [])
    if optional[: len(before)] != before:
        yield f"the optional inputs {before} became {optional}; a new one is the last"
    for group in ("required", "optional"):
        for name, spec in old["input"].get(group, {}).items():
            if name not in new["input"].get(group, {}):
                continue  # already named as a change of order
            kind, new_kind = spec[0], new["input"][group][name][0]
            if isinstance(kind, list) and isinstance(new_kind, list):
                lost = [value for value in kind if value not in new_kind]
                if lost:
                    yield f"the input '{name}' no longer offers {', '.join(map(str, lost))}"
            elif kind != new_kind:
                yield f"the input '{name}' was {kind} and is {new_kind}"


def test_the_snapshot_is_kept_and_current(request):
    now = described()
    before = json.loads(SNAPSHOT.read_text(encoding="utf-8")) if SNAPSHOT.is_file() else {}
    broken = list(breaking_changes(before, now))
    assert not broken, "saved graphs would break:\n" + "\n".join(broken)
    if request.config.getoption("--update-snapshot"):
        SNAPSHOT.write_text(json.dumps(now, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        return
    assert now == before, "harmless changes; write them down: ./rectiflow test tests/test_snapshot.py --update-snapshot"


def mutated(change) -> list[str]:
    before = described()
    after = copy.deepcopy(before)
    change(after)
    return list(breaking_changes(before, after))


def rename_input(nodes):
    inputs = nodes["RectiflowEmptyLatent"]
    inputs["input_order"]["required"][0] = "renamed"


def swap_inputs(nodes):
    inputs = nodes["RectiflowEmptyLatent"]["input_order"]["required"]
    inputs[0], inputs[1] = inputs[1], inputs[0]


def change_type(nodes):
    nodes["RectiflowEmptyLatent"]["input"]["required"]["width"][0] = "FLOAT"


def add_required(nodes):
    nodes["RectiflowEmptyLatent"]["input_order"]["required"].append("new")


def swap_outputs(nodes):
    nodes["RectiflowLoadTiny"]["output"].reverse()


def remove_node(nodes):
    del nodes["RectiflowLoadTiny"]


@pytest.mark.parametrize("change", [remove_node, rename_input, swap_inputs, change_type, add_required, swap_outputs])
def test_what_breaks_graphs_is_noticed(change):
    assert len(mutated(change)) == 1


def add_optional(nodes):
    nodes["RectiflowEmptyLatent"]["input_order"].setdefault("optional", []).append("new")


def change_default(nodes):
    nodes["RectiflowEmptyLatent"]["input"]["required"]["width"][1]["default"] = 128


@pytest.mark.parametrize("change", [add_optional, change_default, lambda nodes: nodes.update(New={})])
def test_what_is_harmless_passes(change):
    assert mutated(change) == []


@pytest.mark.parametrize("class_id", sorted(rectiflow.NODE_CLASS_MAPPINGS))
def test_a_node_explains_itself(class_id):
    """Description, a tooltip at every input and output, a help page, an id of our own and a category of ours."""
    cls = rectiflow.NODE_CLASS_MAPPINGS[class_id]
    assert class_id.startswith("Rectiflow")
    assert cls.CATEGORY.split("/")[0] == "rectiflow"
    assert len(cls.DESCRIPTION) > 20
    for group in ("required", "optional"):
        for name, spec in cls.INPUT_TYPES().get(group, {}).items():
            assert len(spec) > 1 and spec[1].get("tooltip"), f"input '{name}' has no tooltip"
    assert len(cls.OUTPUT_TOOLTIPS) == len(cls.RETURN_TYPES) and all(cls.OUTPUT_TOOLTIPS)
    page = DOCS / f"{class_id}.md"
    assert page.is_file(), f"{page.relative_to(ROOT)} is missing"
    assert len(page.read_text(encoding="utf-8")) > 200


def test_every_help_page_has_its_node():
    pages = {page.stem for page in DOCS.glob("*.md")}
    assert not pages - set(rectiflow.NODE_CLASS_MAPPINGS)
