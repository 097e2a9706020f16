"""Devices, dtypes, free memory, handing a model from one clone to the next, interruption."""

from __future__ import annotations

import gc
import threading

import pytest
import torch
from rectiflow.host.embedded import model_management as mm
from rectiflow.host.embedded.context import Host, HostSettings, use_host
from rectiflow.host.embedded.ldm import ops
from rectiflow.host.embedded.model_management import MemoryManager
from rectiflow.host.embedded.model_patcher import ModelPatcher
from rectiflow.host.embedded.patcher_extension import CallbacksMP

CPU = torch.device("cpu")
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


def make_host(**settings) -> Host:
    settings = HostSettings(device="cpu", **settings)
    return Host(paths=None, registry=None, memory=MemoryManager(settings), settings=settings)


@pytest.fixture
def host():
    host = make_host()
    with use_host(host):
        yield host


def patcher(trace=None, name="") -> ModelPatcher:
    model = ModelPatcher(torch.nn.Sequential(ops.Linear(2, 2)), CPU, CPU)
    if trace is not None:
        for kind in (CallbacksMP.ON_LOAD, CallbacksMP.ON_DETACH):
            model.add_callback(kind, lambda patcher, *args, kind=kind: trace.append((kind, name, args[-1])))
    return model


def test_devices_that_are_not_here_are_refused_with_those_that_are():
    for name in ("cuda:99", "nonsense", "vulkan"):
        with pytest.raises(ValueError, match=f"{name}.*auto, cpu"):
            MemoryManager(HostSettings(device=name))
    assert MemoryManager(HostSettings(device="cpu")).device == CPU
    with pytest.raises(ValueError, match="int7.*fp32, bf16, fp16"):
        MemoryManager(HostSettings(device="cpu", dtype="int7"))


def test_system_memory_is_plausible():
    total, available = mm.system_memory()
    assert 2**28 < available <= total


@pytest.mark.parametrize(
    ("setting", "stored", "supported", "weights", "compute"),
    [
        ("auto", FP32, (BF16, FP32), FP32, None),
        ("auto", FP16, (FP16, BF16, FP32), FP32, None),  # a CPU is slow at fp16: weights are widened once
        ("fp32", FP16, (FP16, FP32), FP32, None),
        ("bf16", FP16, (BF16, FP16, FP32), BF16, None),
        ("fp16", BF16, (BF16, FP16, FP32), FP16, None),
    ],
)
def test_dtype_matrix_on_the_cpu(setting, stored, supported, weights, compute):
    with use_host(make_host(dtype=setting)):
        chosen = mm.unet_dtype(device=CPU, supported_dtypes=supported, weight_dtype=stored)
        assert chosen == weights and mm.unet_manual_cast(chosen, CPU, supported) == compute


def test_weights_kept_in_a_dtype_the_cpu_is_slow_at_are_cast_to_fp32(host):
    assert mm.unet_manual_cast(FP16, CPU, (BF16, FP16, FP32)) == FP32
    assert mm.unet_manual_cast(torch.float8_e4m3fn, CPU, (BF16, FP32)) == FP32
    assert mm.unet_manual_cast(FP32, CPU) is None
    with use_host(make_host(dtype="bf16")):
        assert mm.unet_manual_cast(torch.float8_e4m3fn, CPU, (FP16, BF16)) == BF16


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("compute", [FP32, BF16, FP16])
def test_manual_cast_computes_in_one_dtype_and_keeps_the_other(host, dtype, compute):
    model = ModelPatcher(torch.nn.Sequential(ops.Linear(8, 8)), CPU, CPU)
    model.model[0].weight.data = torch.eye(8, dtype=dtype)
    model.model[0].bias.data = torch.zeros(8, dtype=dtype)
    model.model.manual_cast_dtype = None
    model.set_model_compute_dtype(compute)
    mm.load_model_gpu(model)
    x = torch.randn(2, 8, generator=torch.Generator().manual_seed(0)).to(compute)
    assert torch.equal(model.model(x), x) and model.model[0].weight.dtype == dtype


def test_reported_free_memory_is_what_every_question_answers(host):
    with host.memory.reporting_free(123):
        assert mm.get_free_memory() == 123 and mm.get_free_memory(CPU, torch_free_too=True) == (123, 123)
    assert mm.get_free_memory(CPU) > 123 and mm.get_total_memory(CPU) >= mm.get_free_memory(CPU)


def test_a_clone_takes_the_model_over_and_the_order_of_callbacks(host):
    trace = []
    first = patcher(trace, "model")
    second = first.clone()
    second.remove_callbacks_with_key(CallbacksMP.ON_LOAD, None)
    second.remove_callbacks_with_key(CallbacksMP.ON_DETACH, None)
    mm.load_models_gpu([first])
    mm.load_models_gpu([second])
    assert trace == [("on_load_after", "model", True), ("on_detach_after", "model", False)]
    assert mm.loaded_models() == [second]
    mm.load_models_gpu([second, second])
    assert mm.loaded_models() == [second]


def test_a_vanished_clone_is_represented_by_its_ancestor(host):
    original = patcher()
    mm.load_models_gpu([original.clone().clone()])
    gc.collect()
    assert mm.loaded_models() == [original]
    del original
    gc.collect()
    assert mm.loaded_models() == []


def test_unloading_takes_the_longest_unused_first(host):
    models = [patcher() for _ in range(3)]
    for model in models:
        mm.load_models_gpu([model])
    mm.load_models_gpu([models[0]])
    with host.memory.reporting_free(0):
        assert mm.free_memory(1, CPU, keep_loaded=[models[1]]) == [models[2], models[0]]
    assert mm.loaded_models() == [models[1]] and models[0].loaded_size() == 0
    mm.unload_all_models()
    assert mm.loaded_models() == []


def test_enough_free_memory_unloads_nothing(host):
    mm.load_models_gpu([model := patcher()])
    with host.memory.reporting_free(100):
        assert mm.free_memory(99, CPU) == [] and mm.loaded_models() == [model]


def test_room_is_made_before_a_load_and_too_little_is_said(host):
    device = torch.device("meta")  # stands for a GPU: nothing lies on it, so the models are empty and only state a size
    small, large = (ModelPatcher(torch.nn.Sequential(), device, CPU, size=size) for size in (10, 10**12))
    with host.memory.reporting_free(10**10):
        mm.load_models_gpu([small])
        with pytest.raises(torch.OutOfMemoryError, match="931.32 GiB of weights.*9.31 GiB free on meta.*--device cpu"):
            mm.load_models_gpu([large])
    assert mm.loaded_models() == [] and small.current_loaded_device() == CPU


def test_models_of_patches_are_loaded_too(host):
    further = patcher()

    class Patch:
        def models(self):
            return [further]

    model = patcher()
    model.set_model_unet_function_wrapper(Patch())
    mm.load_models_gpu([model])
    assert set(mm.loaded_models()) == {model, further}


def test_casting_copies_only_when_asked_or_needed():
    weight = torch.ones(2)
    assert mm.cast_to(weight) is weight and mm.cast_to_device(weight, CPU, FP32) is weight
    assert mm.cast_to_device(weight, CPU, FP32, copy=True) is not weight
    assert mm.cast_to_device(weight, CPU, BF16).dtype == BF16 and mm.cast_to_device(weight, CPU, None).dtype == FP32


def test_sizes():
    assert mm.module_size(torch.nn.Linear(3, 2)) == 32 and [mm.dtype_size(d) for d in (FP32, FP16, BF16)] == [4, 2, 2]


def test_each_request_to_stop_raises_once(host):
    mm.throw_exception_if_processing_interrupted()
    mm.interrupt_current_processing()
    assert mm.processing_interrupted()
    with pytest.raises(mm.InterruptProcessingException):
        mm.throw_exception_if_processing_interrupted()
    mm.throw_exception_if_processing_interrupted()
    mm.interrupt_current_processing()
    mm.interrupt_current_processing(False)
    mm.throw_exception_if_processing_interrupted()


def test_hosts_are_interrupted_one_by_one_and_from_other_threads(host):
    other = make_host()
    thread = threading.Thread(target=other.interrupt.set)
    thread.start()
    thread.join()
    mm.throw_exception_if_processing_interrupted()
    with use_host(other), pytest.raises(mm.InterruptProcessingException):
        mm.throw_exception_if_processing_interrupted()


def test_the_rest_of_the_questions_on_a_cpu(host):
    assert mm.get_torch_device() == mm.intermediate_device() == mm.unet_offload_device() == mm.vae_device() == CPU
    assert mm.text_encoder_device() == mm.text_encoder_offload_device() == mm.vae_offload_device() == CPU
    assert mm.unet_inital_load_device(10, FP32) == CPU and mm.cpu_mode() and not mm.mps_mode()
    assert mm.is_device_cpu(CPU) and not mm.is_device_cuda(CPU) and not mm.is_device_mps(CPU)
    assert not mm.should_use_fp16(CPU) and not mm.should_use_bf16(CPU) and mm.vae_dtype(CPU, [BF16]) == FP32
    assert mm.force_upcast_attention_dtype() is None and not mm.xformers_enabled() and not mm.pytorch_attention_flash_attention()
    assert mm.supports_cast(CPU, torch.float8_e4m3fn) and not mm.supports_cast(CPU, torch.int8)
    assert mm.get_torch_device_name(CPU) == "cpu" and mm.minimum_inference_memory() > mm.extra_reserved_memory()
