"""Every error type of the validator, on the smallest prompt that shows it."""

from __future__ import annotations

import asyncio
import json

import pytest
from rectiflow.host.embedded.execution.validation import validate_node_input
from rectiflow.tests.execution.toy_nodes import ToyHost, graph


class Checked:
    """Declares one input of every kind that validation looks at."""

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {"whole": ("INT", {"min": 0, "max": 10})},
            "optional": {
                "real": ("FLOAT", {"min": -1.0, "max": 1.0}),
                "text": ("STRING", {}),
                "flag": ("BOOLEAN", {}),
                "pick": (["a", "b"], {}),
                "long_pick": ([f"v{i}" for i in range(30)], {}),
                "combo": ("COMBO", {"options": ["x", "y"]}),
                "many": ("COMBO", {"options": ["x", "y"], "multiselect": True}),
                "image": ("IMAGE", {}),
            },
        }

    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "go", "toy", True

    def go(self, **inputs):
        return {}


@pytest.fixture
def toy():
    return ToyHost(Checked=Checked)


def only_error(toy: ToyHost, prompt: dict, node_id: str = "out") -> dict:
    checked = toy.validate(prompt)
    assert not checked.valid and checked.outputs == []
    assert checked.error["type"] == "prompt_outputs_failed_validation"
    assert list(checked.node_errors) == [node_id]
    (error,) = checked.node_errors[node_id]["errors"]
    json.dumps(checked.node_errors)
    return error


def checked_node(**inputs) -> dict:
    return {"out": {"class_type": "Checked", "inputs": {"whole": 1, **inputs}}}


def test_a_good_prompt(toy):
    assert toy.validate(graph(n=("Number", {"value": 1}), out=("Show", {"value": "n.0"}))) == (True, None, ["out"], {})


@pytest.mark.parametrize(
    ("prompt", "details"),
    [
        ([], "got list"),
        (None, "got NoneType"),
        ({1: {"class_type": "Show", "inputs": {}}}, "Node ID '#1'"),
        ({"1": 5}, "Node ID '#1'"),
        ({"1": {"inputs": {}}}, "Node ID '#1'"),
        ({"1": {"class_type": ["Show"], "inputs": {}}}, "Node ID '#1'"),
        ({"1": {"class_type": "Show", "inputs": []}}, "Node ID '#1'"),
        ({"1": {"class_type": "Show", "inputs": {1: 2}}}, "Node ID '#1'"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_a_malformed_prompt(toy, prompt, details):
    checked = toy.validate(prompt)
    assert checked.error["type"] == "invalid_prompt" and checked.error["details"] == details
    assert checked.error["message"].startswith("Cannot execute because") and checked.node_errors == {}


def test_an_unknown_class_is_answered_with_the_nearest_names(toy):
    error = toy.validate({"3": {"class_type": "Nomber", "inputs": {}}}).error
    assert error["type"] == "invalid_prompt" and error["message"] == "Cannot execute because node Nomber does not exist."
    assert error["details"] == "Node ID '#3'; nearest known classes: Number"
    assert error["extra_info"] == {"node_id": "3", "class_type": "Nomber", "nearest": ["Number"]}
    far = toy.validate({"3": {"class_type": "Zzzzz", "inputs": {}}}).error
    assert far["details"] == "Node ID '#3'" and far["extra_info"]["nearest"] == []


def test_no_outputs(toy):
    for prompt in ({}, graph(n=("Number", {"value": 1}))):
        error = {"type": "prompt_no_outputs", "message": "Prompt has no outputs", "details": "", "extra_info": {}}
        assert toy.validate(prompt) == (False, error, [], {})


def test_a_missing_required_input(toy):
    error = only_error(toy, {"out": {"class_type": "Checked"}})
    assert error == {
        "type": "required_input_missing", "message": "Required input is missing", "details": "whole",
        "extra_info": {"input_name": "whole"},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("inputs", "type_", "details"),
    [
        ({"whole": "abc"}, "invalid_input_type", "whole, abc, invalid literal for int() with base 10: 'abc'"),
        ({"whole": None}, "invalid_input_type", None),
        ({"whole": {}}, "invalid_input_type", None),
        ({"whole": float("nan")}, "invalid_input_type", None),
        ({"whole": float("inf")}, "invalid_input_type", None),
        ({"real": 10**400}, "invalid_input_type", None),
        ({"real": "half"}, "invalid_input_type", None),
        ({"whole": -1}, "value_smaller_than_min", "whole"),
        ({"whole": 11}, "value_bigger_than_max", "whole"),
        ({"real": 1.5}, "value_bigger_than_max", "real"),
        ({"pick": "c"}, "value_not_in_list", "pick: 'c' not in ['a', 'b']"),
        ({"long_pick": "c"}, "value_not_in_list", "long_pick: 'c' not in (list of length 30)"),
        ({"combo": "c"}, "value_not_in_list", "combo: 'c' not in ['x', 'y']"),
        ({"pick": {"a": 1}}, "value_not_in_list", "pick: '{'a': 1}' not in ['a', 'b']"),
        ({"image": ["1"]}, "bad_linked_input", "image"),
        ({"image": []}, "bad_linked_input", "image"),
        ({"image": [1, 2, 3]}, "bad_linked_input", "image"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_a_constant_that_does_not_fit(toy, inputs, type_, details):
    error = only_error(toy, checked_node(**inputs))
    (name,) = inputs
    assert error["type"] == type_ and error["extra_info"]["input_name"] == name
    assert details is None or error["details"] == details
    declared = {**Checked.INPUT_TYPES()["required"], **Checked.INPUT_TYPES()["optional"]}[name]
    assert error["extra_info"]["input_config"] == (None if name == "long_pick" else declared)


def test_numbers_of_thousands_of_digits_are_refused_without_being_printed(toy):
    """Python refuses to print them; JSON cannot bring them, a program can."""
    checked = toy.validate({**graph(n=("Number", {"value": 1})), **checked_node(whole=10**5000, image=["n", 10**5000])})
    first, second = checked.node_errors["out"]["errors"]
    assert first["type"] == "value_bigger_than_max" and "cannot be shown" in first["message"]
    assert second["type"] == "exception_during_validation" and "cannot be shown" in second["details"]


def test_constants_are_coerced_in_place(toy):
    prompt = checked_node(whole="5", real="0.5", text=7, flag="no", pick="a", combo="x", many={"__value__": ["x"]})
    assert toy.validate(prompt).valid
    assert prompt["out"]["inputs"] == {
        "whole": 5, "real": 0.5, "text": "7", "flag": True, "pick": "a", "combo": "x", "many": ["x"],
    }  # fmt: skip
    kinds = {name: type(value) for name, value in prompt["out"]["inputs"].items()}
    assert (kinds["whole"], kinds["real"], kinds["flag"]) == (int, float, bool)
    absent = {"out": {"class_type": "Checked"}}
    toy.validate(absent)
    assert absent["out"]["inputs"] == {}


def test_links_of_the_wrong_type(toy):
    error = only_error(toy, {**graph(n=("Number", {"value": 1})), **checked_node(image=["n", 0])})
    assert error["type"] == "return_type_mismatch"
    assert error["details"] == "image, received_type(INT) mismatch input_type(IMAGE)"
    assert error["extra_info"]["received_type"] == "INT" and error["extra_info"]["linked_node"] == ["n", 0]


@pytest.mark.parametrize(
    ("link", "found", "exception"),
    [
        (["99", 0], "image: there is no node '99' to link to", "KeyError"),
        ([1, 2], "image: there is no node '1' to link to; a constant list is written {\"__value__\": [...]}", "KeyError"),
        ([["n"], 0], None, "KeyError"),
        ([None, None], None, "KeyError"),
        (["n", 1], "image: node 'n' has no output 1, it has 1", "IndexError"),
        (["n", -1], "image: node 'n' has no output -1, it has 1", "IndexError"),
        (["n", 0.0], None, "IndexError"),
        (["n", "0"], None, "IndexError"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_links_to_nothing(toy, link, found, exception):
    error = only_error(toy, {**graph(n=("Number", {"value": 1})), **checked_node(image=link)})
    assert (error["type"], error["message"]) == ("exception_during_validation", "Exception when validating node")
    assert error["extra_info"]["exception_type"] == exception
    assert found is None or error["details"] == found


def test_an_exception_in_an_upstream_node_is_told_there(toy):
    prompt = graph(s=("Add", {"a": "gone.0", "b": 1}), out=("Show", {"value": "s.0"}))
    prompt["s"]["inputs"]["a"] = ["gone", 0]
    error = only_error(toy, prompt, "s")
    assert error["type"] == "exception_during_inner_validation"
    assert error["extra_info"]["input_name"] == "value" and error["extra_info"]["linked_node"] == ["s", 0]
    assert toy.validate(prompt).error["details"] == ""  # the output itself has no fault


def test_all_errors_of_a_node_are_told_at_once(toy):
    checked = toy.validate(checked_node(whole=-1, real=5, pick="c", image=["gone", 0]))
    types = [error["type"] for error in checked.node_errors["out"]["errors"]]
    assert types == ["value_smaller_than_min", "value_bigger_than_max", "value_not_in_list", "exception_during_validation"]
    assert checked.error["details"].split("\n")[0] == "Value -1 smaller than min of 0: whole"


def test_a_class_that_cannot_describe_itself(toy):
    class Broken:
        RETURN_TYPES, FUNCTION, OUTPUT_NODE = (), "go", True

        @classmethod
        def INPUT_TYPES(cls):
            raise OSError("the disk is gone")

    toy.registry.add({"Broken": Broken})
    error = only_error(toy, {"out": {"class_type": "Broken", "inputs": {}}})
    assert (error["type"], error["details"]) == ("exception_during_validation", "the disk is gone")


def test_one_good_output_is_enough_and_errors_name_their_dependents(toy):
    prompt = graph(
        good=("Show", {"value": 1}), bad=("Add", {"a": 5000, "b": 1}), mid=("Add", {"a": "bad.0", "b": 1}),
        one=("Show", {"value": "mid.0"}), two=("Show", {"value": "bad.0"}), three=("Fail", {"value": 1}),
    )  # fmt: skip
    checked = toy.validate(prompt)
    assert checked.valid and checked.error is None and checked.outputs == ["good"]
    assert list(checked.node_errors) == ["bad"]  # what only suffers from upstream does not appear
    assert checked.node_errors["bad"]["dependent_outputs"] == ["one", "two"]
    assert checked.node_errors["bad"]["class_type"] == "Add"


def test_nodes_that_no_selected_output_needs_are_not_validated(toy):
    prompt = graph(out=("Show", {"value": 1}), stray=("Add", {"a": "abc"}), other=("Show", {"value": "stray.0"}))
    assert toy.validate(prompt, ["out"]) == (True, None, ["out"], {})
    assert list(toy.validate(prompt).node_errors) == ["stray"]
    assert toy.validate(prompt, ["stray"]).error["type"] == "prompt_no_outputs"


CYCLES = {
    "itself": graph(a=("Add", {"a": "a.0", "b": 1}), out=("Show", {"value": "a.0"})),
    "two": graph(a=("Add", {"a": "b.0", "b": 1}), b=("Add", {"a": "a.0", "b": 1}), out=("Show", {"value": "a.0"})),
    "lazy": graph(
        a=("Pick", {"pick": True, "yes": "b.0", "no": 1}), b=("Wait", {"value": "a.0", "seconds": 0}), out=("Show", {"value": "b.0"})
    ),
    "undeclared": graph(a=("Sum", {"first": 1, "more": "b.0"}), b=("Add", {"a": "a.0", "b": 1}), out=("Show", {"value": "a.0"})),
    "behind": graph(
        a=("Add", {"a": "b.0", "b": 1}), b=("Add", {"a": "a.0", "b": 1}), c=("Add", {"a": "b.0", "b": 1}), out=("Show", {"value": "c.0"})
    ),
}


@pytest.mark.parametrize("prompt", CYCLES.values(), ids=CYCLES)
def test_cycles_are_found_and_named(toy, prompt):
    checked = toy.validate(prompt)
    assert not checked.valid
    errors = {node_id: entry["errors"][0] for node_id, entry in checked.node_errors.items()}
    cycle = errors["a"]["extra_info"]["cycle_nodes"]
    assert set(errors) == set(cycle) == ({"a"} if prompt is CYCLES["itself"] else {"a", "b"})
    for node_id, error in errors.items():
        assert error["type"] == "dependency_cycle" and error["extra_info"]["node_id"] == node_id
        first = f"{cycle[0]} ({prompt[cycle[0]]['class_type']})"
        assert error["details"].startswith(f"{first} -> ") and error["details"].endswith(f" -> {first}")


def test_a_cycle_costs_only_the_outputs_that_need_it(toy):
    prompt = {**CYCLES["two"], **graph(good=("Show", {"value": 1}))}
    checked = toy.validate(prompt)
    assert checked.valid and checked.outputs == ["good"]
    assert checked.node_errors["a"]["dependent_outputs"] == ["out"]


def test_a_chain_of_any_length_is_validated(toy):
    nodes = {"0": ("Number", {"value": 1}), **{str(i): ("Add", {"a": f"{i - 1}.0", "b": 1}) for i in range(1, 5000)}}
    prompt = {**graph(**nodes), "out": {"class_type": "Show", "inputs": {"value": ["4999", 0]}}}
    assert toy.validate(prompt).valid
    prompt["0"]["inputs"]["value"] = "x"
    assert list(toy.validate(prompt).node_errors) == ["0"]
    prompt["0"] = {"class_type": "Add", "inputs": {"a": ["4999", 0], "b": 1}}
    circle = toy.validate(prompt).node_errors
    assert len(circle) == 5000
    assert len(json.dumps(circle)) < 1000 * 5000  # the answer does not grow with the square of the circle


# --- VALIDATE_INPUTS


def validating(validator, **attributes) -> ToyHost:
    class Validating(Checked):
        VALIDATE_INPUTS = classmethod(validator)

    for name, value in attributes.items():
        setattr(Validating, name, value)
    return ToyHost(Validating=Validating)


def validating_node(**inputs) -> dict:
    return {"out": {"class_type": "Validating", "inputs": {"whole": 1, **inputs}}, **graph(n=("Number", {"value": 1}))}


@pytest.mark.parametrize(("answer", "details"), [(False, "whole"), ("too round", "whole - too round"), (None, "whole - None")])
def test_a_class_refuses_its_inputs(answer, details):
    toy = validating(lambda cls, whole: answer)
    error = only_error(toy, validating_node())
    assert error["type"] == "custom_validation_failed" and error["message"] == "Custom validation failed for node"
    assert error["details"] == details and error["extra_info"] == {"input_name": "whole"}


def test_one_error_per_input_that_the_validator_was_handed():
    toy = validating(lambda cls, **inputs: "no")
    details = [error["details"] for error in toy.validate(validating_node(real=0.5)).node_errors["out"]["errors"]]
    assert details == ["whole - no", "real - no"]


def test_naming_an_input_takes_over_its_range_check_but_not_its_cast():
    seen = []

    def validator(cls, whole):
        seen.append(whole)
        return True

    toy = validating(validator)
    assert toy.validate(validating_node(whole="999")).valid and seen == [999]
    assert not toy.validate(validating_node(whole="many")).valid
    assert not toy.validate(validating_node(real=9.0)).valid  # not named: still checked
    assert validating(lambda cls, **inputs: True).validate(validating_node(whole=999, pick="zzz")).valid


def test_linked_inputs_are_none_and_types_can_be_taken_over():
    seen = []

    def validator(cls, input_types, image=0):
        seen.append((input_types, image))
        return True

    toy = validating(validator)
    assert toy.validate(validating_node(image=["n", 0])).valid  # INT into IMAGE, which the class allows
    assert seen == [({"image": "INT"}, None)]


def test_a_validator_may_wait_and_may_fail():
    async def later(cls, whole):
        await asyncio.sleep(0.001)
        return whole < 1 or "waited for nothing"

    assert only_error(validating(later), validating_node())["details"] == "whole - waited for nothing"

    def fails(cls, whole):
        raise KeyError("lost")

    error = only_error(validating(fails), validating_node())
    assert (error["type"], error["details"]) == ("exception_during_validation", "lost")


def test_a_validator_is_not_asked_about_an_input_that_is_missing():
    toy = validating(lambda cls, whole: True)
    error = only_error(toy, {"out": {"class_type": "Validating", "inputs": {}}})
    assert error["type"] == "required_input_missing"


def test_a_validator_is_mapped_over_nothing_but_sees_lists_when_it_takes_lists():
    seen = []

    def validator(cls, whole):
        seen.append(whole)
        return True

    assert validating(validator, INPUT_IS_LIST=True).validate(validating_node()).valid
    assert seen == [[1]]


# --- types


class Any(str):
    """How packs spell "anything" for hosts that do not know "*"."""

    def __ne__(self, other):
        return False

    __hash__ = str.__hash__
    __eq__ = str.__eq__


@pytest.mark.parametrize(
    ("received", "wanted", "strict", "fits"),
    [
        ("IMAGE", "IMAGE", False, True), ("IMAGE", "MASK", False, False), ("A,B", "B,C", False, True), ("A,B", "B,C", True, False),
        ("A", "A,B", True, True), (" A , B ", "B", False, True), ("", "", False, True), ("A", "", False, False),
        ("*", "MASK", False, True), ("MASK", "*", False, True), ("*", "*", True, True),
        (Any("*"), "MASK", False, True), ("MASK", Any("x"), False, True), (Any("x"), "MASK", False, True),
        (["a"], ["a"], False, True), (["a"], ["b"], False, False), (["a"], "COMBO", False, True), ("A", ["A"], False, False),
    ],
)  # fmt: skip
def test_types_fit(received, wanted, strict, fits):
    assert validate_node_input(received, wanted, strict) is fits


def test_star_takes_and_gives_anything(toy):
    prompt = graph(n=("Number", {"value": 1}), any=("Wait", {"value": "n.0", "seconds": 0}), s=("Add", {"a": "any.0", "b": 1}))
    prompt |= graph(out=("Show", {"value": 1}))
    prompt["out"]["inputs"]["value"] = ["s", 0]
    assert toy.shown(prompt) == [2]


def test_a_type_that_cannot_be_hashed_is_no_error(toy):
    class Unhashable(str):
        def __eq__(self, other):
            return True

        def __ne__(self, other):
            return False

        __hash__ = None

    class Odd:
        RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "go", "toy", True
        INPUT_TYPES = classmethod(lambda cls: {"required": {"value": (Unhashable("*"), {})}})

        def go(self, value):
            return {}

    toy.registry.add({"Odd": Odd})
    assert toy.validate({"out": {"class_type": "Odd", "inputs": {"value": 3}}}).valid
