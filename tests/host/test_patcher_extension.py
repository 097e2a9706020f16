"""Wrappers: order, arguments, continuation; merging of the patcher's own with those in transformer_options."""

from __future__ import annotations

import pytest
from rectiflow.host.embedded import patcher_extension as pe
from rectiflow.host.embedded.patcher_extension import CallbacksMP, WrapperExecutor, WrappersMP


def tracing(name, trace):
    def wrapper(executor, *args, **kwargs):
        trace.append(f"{name}>")
        result = executor(*args, **kwargs)
        trace.append(f"<{name}")
        return result

    return wrapper


def test_the_first_added_stands_outermost_and_arguments_pass_through():
    trace = []

    def original(*args, **kwargs):
        trace.append(("call", args, kwargs))
        return "result"

    executor = WrapperExecutor.new_executor(original, [tracing("a", trace), tracing("b", trace)])
    assert executor.execute(1, 2, key=3) == "result"
    assert trace == ["a>", "b>", ("call", (1, 2), {"key": 3}), "<b", "<a"]


def test_a_wrapper_may_change_arguments_skip_or_call_twice():
    def doubling(executor, x, **kwargs):
        return executor(x * 2, **kwargs) + executor(x * 3, **kwargs)

    def skipping(executor, x):
        return -1

    inner = []
    executor = WrapperExecutor.new_executor(lambda x: x, [doubling, tracing("inner", inner)])
    assert executor.execute(10) == 50
    assert inner == ["inner>", "<inner"] * 2
    assert WrapperExecutor.new_executor(lambda x: x, [skipping, doubling]).execute(1) == -1


def test_class_obj_reaches_every_wrapper():
    owner, seen = object(), []

    def wrapper(executor, *args):
        seen.append(executor.class_obj)
        return executor(*args)

    WrapperExecutor.new_class_executor(lambda: None, owner, [wrapper, wrapper]).execute()
    assert seen == [owner, owner]


def test_calling_past_the_wrapped_function_is_an_error_that_says_so():
    executor = WrapperExecutor.new_executor(lambda: None, [])
    with pytest.raises(IndexError, match="past the wrapped function"):
        executor()


@pytest.mark.parametrize("is_model_options", [False, True])
def test_registries_in_options(is_model_options):
    options = {}
    pe.add_wrapper(WrappersMP.APPLY_MODEL, "w0", options, is_model_options)
    pe.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "key", "w1", options, is_model_options)
    pe.add_callback_with_key(CallbacksMP.ON_CLEANUP, "key", "c1", options, is_model_options)
    pe.add_callback(CallbacksMP.ON_CLEANUP, "c0", options, is_model_options)
    inner = options["transformer_options"] if is_model_options else options
    assert inner["wrappers"] == {"apply_model": {None: ["w0"], "key": ["w1"]}}
    assert pe.get_all_wrappers(WrappersMP.APPLY_MODEL, options, is_model_options) == ["w0", "w1"]
    assert pe.get_wrappers_with_key(WrappersMP.APPLY_MODEL, "key", options, is_model_options) == ["w1"]
    assert pe.get_all_callbacks(CallbacksMP.ON_CLEANUP, options, is_model_options) == ["c1", "c0"]
    assert pe.get_callbacks_with_key(CallbacksMP.ON_CLEANUP, "other", options, is_model_options) == []


def test_reading_does_not_create_entries():
    options = {}
    assert pe.get_all_wrappers(WrappersMP.APPLY_MODEL, options, True) == [] and options == {}


def test_copy_nested_dicts_shares_values_but_not_containers():
    value = object()
    original = {"a": {"b": [value]}, "c": value}
    copy = pe.copy_nested_dicts(original)
    copy["a"]["b"].append(1)
    copy["a"]["new"] = 2
    assert original == {"a": {"b": [value]}, "c": value} and copy["c"] is value


def test_merging_joins_lists_and_puts_the_second_dicts_keys_first():
    options = {"apply_model": {"direct": ["d"], "both": ["d2"]}}
    merged = pe.merge_nested_dicts(options, {"apply_model": {"own": ["o"], "both": ["o2"]}}, copy_dict1=False)
    assert merged is options
    assert list(merged["apply_model"]) == ["own", "both", "direct"]
    assert merged["apply_model"]["both"] == ["o2", "d2"]
    assert pe.merge_nested_dicts({"l": [1]}, {"l": [2], "x": 3}) == {"l": [1, 2], "x": 3}


def test_merging_changes_neither_source():
    first, second = {"k": {"a": [1]}}, {"k": {"a": [2]}}
    pe.merge_nested_dicts(first, second)["k"]["a"].append(3)
    assert first == {"k": {"a": [1]}} and second == {"k": {"a": [2]}}
