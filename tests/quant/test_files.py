"""Files of compressed models: what is written comes back bit for bit, here and in a process of its own; what is damaged is refused."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rectiflow.accel.compressed import tensor_file
from rectiflow.accel.compressed.manifest import METADATA, TENSOR, Manifest, Renumbering
from rectiflow.accel.modules import NETWORK
from rectiflow.accel.prune.apply import SkipBlock, plan_of
from rectiflow.accel.prune.compact import compact_model
from rectiflow.accel.prune.identity import model_hash
from rectiflow.accel.quant.attach import quantised_parts
from rectiflow.accel.quant.error import sqnr
from rectiflow.errors import NodeInputError
from rectiflow.tests.prune.test_width import planned
from rectiflow.tests.quant.conftest import rank_two, with_lora
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

LAYERS = ("double_blocks.0.img_mlp.0", "single_blocks.0.linear2")
GONE = ("double_blocks.1", "single_blocks.3")
PREFIX = "model.diffusion_model."
IMG = r"double_blocks\.0\.img_attn\.proj"


@pytest.fixture(scope="module")
def four(runs):
    return runs.quantized(weight_bits="4")


@pytest.fixture(scope="module")
def file(runs, four) -> str:
    return runs.save(four)


def narrowed(runs):
    """The model with the first block's image MLP at 600 of 1024 neurons, as a narrowing node leaves it: smaller layers, no other sign."""
    runs.model.detach()  # else another model's layers may lie on the network
    network, keep = runs.model.model.diffusion_model, torch.arange(600)
    model = runs.model.clone()
    up, down = network.double_blocks[0].img_mlp[0], network.double_blocks[0].img_mlp[2]
    small = {"0": type(up)(256, 600), "2": type(down)(600, 256)}
    small["0"].weight, small["0"].bias = (nn.Parameter(p.data[keep].clone(), requires_grad=False) for p in (up.weight, up.bias))
    small["2"].weight = nn.Parameter(down.weight.data[:, keep].clone(), requires_grad=False)
    small["2"].bias = nn.Parameter(down.bias.data.clone(), requires_grad=False)
    for place, layer in small.items():
        model.add_object_patch(f"{NETWORK}double_blocks.0.img_mlp.{place}", layer)
    return model


MODELS = {
    "W8": lambda runs: runs.quantized(),
    "W4 rows": lambda runs: runs.quantized(weight_bits="4", group_size="0", include=IMG),
    "W3 dual": lambda runs: runs.quantized(weight_bits="3", rotation="dual", stats=runs.stats(IMG), include=IMG),
    "pruned": lambda runs: runs.pruned(*GONE),
    "pruned, mixed bits": lambda runs: runs.quantized(
        runs.quantized(runs.pruned(*GONE), include=r"double_blocks\.0"), weight_bits="4", include=r"double_blocks\.2"
    ),
    "narrowed": narrowed,
    "narrowed, W4": lambda runs: runs.quantized(narrowed(runs), weight_bits="4", group_size="16", include=r"double_blocks\.0\.img_mlp\.0"),
    "LoRA on plain layers": lambda runs: with_lora(runs.pruned(*GONE), runs.model, LAYERS),
    "requant": lambda runs: with_lora(runs.quantized(weight_bits="4", lora="requant"), runs.model, LAYERS),
    "bypass": lambda runs: with_lora(runs.quantized(weight_bits="4", lora="bypass"), runs.model, LAYERS),
}  # fmt: skip


@pytest.mark.parametrize("kind", MODELS)
def test_saved_loaded_and_saved_again(runs, kind):
    """The latent is the same bits, the second file the same bytes, and the size what the model says to within two percent."""
    model = MODELS[kind](runs)
    expected = runs.latent(model)
    path = runs.save(model)
    loaded = runs.load(path)
    assert torch.equal(runs.latent(loaded), expected)
    assert runs.file(runs.save(loaded)).read_bytes() == runs.file(path).read_bytes()
    assert runs.file(path).stat().st_size == pytest.approx(loaded.model_size(), rel=0.02)
    report = runs.node("RectiflowCompressionInfo", path=path)[0]
    assert report.startswith("Flux, made from " + model_hash(runs.model))


def test_a_fresh_process_gives_the_same_latent(runs):
    """Pruned, then quantised, with a LoRA behind; the process loads the file alone."""
    model = runs.quantized(runs.pruned(*GONE), weight_bits="4", lora="requant", include=r"double_blocks\.0\.img|single_blocks\.0")
    model = with_lora(model, runs.model, LAYERS)
    expected, path = runs.latent(model), runs.save(model)
    script = (
        "import sys, torch, pathlib\n"
        "from rectiflow.host.embedded import HostSettings, make_host, use_host\n"
        "from rectiflow.tests.quant.conftest import QuantRuns\n"
        "root = pathlib.Path(sys.argv[1])\n"
        "host = make_host(root, settings=HostSettings(device='cpu', dtype='fp32'))\n"
        "with use_host(host):\n"
        "    runs = QuantRuns(host, root)\n"
        "    torch.save(runs.latent(runs.load(sys.argv[2])), sys.argv[3])\n"
    )
    out = runs.file("latent.pt")
    done = subprocess.run(
        [sys.executable, "-c", script, str(runs.output.parent), path, str(out)], capture_output=True, text=True, timeout=120, cwd=out.parent
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert torch.equal(torch.load(out, weights_only=True), expected)


def test_narrow_layers_in_few_bits_take_loras_of_the_whole_size(runs):
    """In front of Quantize, behind it, and behind the file: one latent, to what 8 bits leave of the narrow model's with the LoRA."""
    narrow = compact_model(runs.model, planned(runs.model, 0.3, least=1), "test")
    exact = runs.latent(with_lora(narrow, runs.model, LAYERS, 0.05))
    assert sqnr(exact, runs.latent(narrow)) < 20
    front = runs.quantized(with_lora(narrow, runs.model, LAYERS, 0.05))
    behind = with_lora(runs.quantized(narrow, lora="bypass"), runs.model, LAYERS, 0.05)
    file = runs.load(runs.save(runs.quantized(narrow, lora="bypass")))
    expected = runs.latent(behind)
    assert min(sqnr(exact, expected), sqnr(exact, runs.latent(front))) > 25
    assert torch.equal(runs.latent(with_lora(file, runs.model, LAYERS, 0.05)), expected)
    assert torch.equal(runs.latent(runs.load(runs.save(behind))), expected)


def test_what_is_loaded_in_a_graph_can_still_be_trained(runs, file):
    """Graphs run in inference mode, whose tensors no backward pass takes."""
    loaded = runs.load(file)
    assert not any(tensor.is_inference() for tensor in loaded.model.state_dict().values())


class TestNumbering:
    def test_blocks_keep_their_numbers_and_a_lora_its_blocks(self, runs):
        loaded = runs.load(runs.save(runs.pruned(*GONE)))
        network = loaded.get_model_object("diffusion_model")
        assert [isinstance(block, SkipBlock) for block in network.double_blocks] == [False, True, False]
        assert plan_of(loaded).kept == {"double_blocks": (0, 2), "single_blocks": (0, 1, 2, 4, 5)}
        last = ("double_blocks.2.img_mlp.0",)
        expected = runs.latent(with_lora(runs.pruned(*GONE), runs.model, last))
        assert torch.equal(runs.latent(with_lora(loaded, runs.model, last)), expected)
        gone = loaded.clone()
        assert gone.add_patches(rank_two(runs.model, ("double_blocks.1.img_mlp.0",))) == []

    def test_compact_numbering_is_the_same_model_without_gaps(self, runs):
        model = runs.quantized(runs.pruned(*GONE), include=r"double_blocks\.2")
        path = runs.save(model)
        compact = runs.load(path, compact_numbering=True)
        network = compact.get_model_object("diffusion_model")
        assert (len(network.double_blocks), len(network.single_blocks)) == (2, 5) and plan_of(compact) is None
        assert {name.split(".")[1] for name in quantised_parts(compact)} == {"1"}
        expected = runs.latent(model)
        assert torch.equal(runs.latent(compact), expected)
        assert torch.equal(runs.latent(runs.load(runs.save(compact))), expected)

    def test_files_have_no_gaps(self, runs):
        keys = load_file(runs.file(runs.save(runs.pruned(*GONE)))).keys()
        blocks = {tuple(key.removeprefix(PREFIX).split(".")[:2]) for key in keys if "_blocks." in key}
        assert blocks == {("double_blocks", str(i)) for i in range(2)} | {("single_blocks", str(i)) for i in range(5)}

    def test_renumbering_is_its_own_inverse(self):
        numbering = Renumbering({"a": (0, 2, 5)})
        assert [numbering.stored(f"a.{i}.w") for i in range(6)] == ["a.0.w", None, "a.1.w", None, None, "a.2.w"]
        assert [numbering.whole(f"a.{i}.w") for i in range(4)] == ["a.0.w", "a.2.w", "a.5.w", None]
        assert numbering.stored("ab.1.w") == numbering.whole("ab.1.w") == "ab.1.w"


class TestForms:
    def test_plain_files_hold_the_numbers(self, runs, four):
        plain = load_file(runs.file(runs.save(four, form="plain")))
        assert not any("manifest" in key or "codebook" in key for key in plain)
        name, part = next(iter(quantised_parts(four).items()))
        assert torch.equal(plain[f"{PREFIX}{name}.weight"], part.numbers())
        with pytest.raises(NodeInputError, match="no comfy_quant tensor"):
            runs.load(runs.save(four, form="plain"))

    def test_only_what_the_core_can_say_is_written_as_the_cores(self, runs, four):
        with pytest.raises(NodeInputError, match="core_int8 with .* other layers"):
            runs.save(four, form="core_int8")
        with pytest.raises(NodeInputError, match="without quantised layers"):
            runs.save(runs.model, form="core_int8")
        with pytest.raises(NodeInputError, match="plain of a narrowed model"):
            runs.save(narrowed(runs), form="plain")

    def test_other_weights_take_the_dtype(self, runs, four):
        small, whole = (runs.file(runs.save(four, dtype=dtype)).stat().st_size for dtype in ("float16", "same"))
        assert small < whole
        loaded = runs.load(runs.save(four, dtype="float16"))
        assert float((runs.latent(loaded) - runs.latent(four)).norm() / runs.latent(four).norm()) < 0.01

    def test_the_manifest_stands_in_tensor_and_metadata(self, runs, file):
        with safe_open(runs.file(file), "pt") as found:
            tensor, text = found.get_tensor(TENSOR), found.metadata()[METADATA]
        assert bytes(tensor.tolist()).decode() == text
        manifest = Manifest.read(tensor)
        assert manifest.text() == text and manifest.base == {"kind": "tiny"}


def rewritten(runs, file: str, change, name: str = "changed") -> str:
    """A copy of the file whose tensors `change` has had its hands on."""
    tensors = load_file(runs.file(file))
    change(tensors)
    path = runs.file(f"{name}.safetensors")
    save_file(tensors, path)
    return path.name


def manifest_with(**fields):
    def change(tensors):
        found = json.loads(bytes(tensors[TENSOR].tolist()))
        for name, value in fields.items():
            found[name] = value(found[name]) if callable(value) else value
        tensors[TENSOR] = torch.frombuffer(bytearray(json.dumps(found).encode()), dtype=torch.uint8)

    return change


def of_layer(**fields):
    return manifest_with(quant=lambda quant: {name: {**form, **fields} for name, form in quant.items()})


def on(key: str, change):
    def apply(tensors):
        tensors[f"{PREFIX}{key}"] = change(tensors[f"{PREFIX}{key}"])

    return apply


QKV = "double_blocks.0.img_attn.qkv"
DAMAGE = {
    "version 2": manifest_with(version=2),
    "format": manifest_with(format="other"),
    "fields more": manifest_with(more={}),
    "arch": manifest_with(arch="MMDiT"),
    "dtype is 'int8'": manifest_with(dtype="int8"),
    "base is": manifest_with(base={"kind": "pickle"}),
    "bits is": of_layer(bits=5),
    "rows is": of_layer(rows=1 << 30),
    "rows is True": of_layer(rows=True),
    "groups with 4 bits, group 7": of_layer(group=7),
    "layout is": of_layer(layout="exec"),
    "rotation is": of_layer(rotation="eval"),
    "weight_scale has NaN": on(f"{QKV}.weight_scale", lambda t: t.fill_(float("nan"))),
    "weight is": on(f"{QKV}.weight", lambda t: t[:, :-1].contiguous()),
    "tlq_codebook does not rise": on(f"{QKV}.tlq_codebook", lambda t: t.flip(0).contiguous()),
    "rotation_signs are not": on(f"{QKV}.rotation_signs", lambda t: t * 3),
    "tensor weight_scale is missing": lambda tensors: tensors.pop(f"{PREFIX}{QKV}.weight_scale"),
    "kept of double_blocks does not rise": manifest_with(counts={"double_blocks": 4}, kept={"double_blocks": [2, 1, 0]}),
    "kept of double_blocks is 9": manifest_with(counts={"double_blocks": 4}, kept={"double_blocks": [0, 1, 9]}),
    "beyond those that are kept": manifest_with(counts={"double_blocks": 4}, kept={"double_blocks": [0, 1]}),
    "no_blocks": manifest_with(counts={"no_blocks": 4}, kept={"no_blocks": [0]}),
    "256 of 99999 rows": manifest_with(width={"double_blocks.1.img_attn.proj": {"rows": 99999, "columns": 256}}),
    "no linear layer of the file": manifest_with(width={"nothing": {"rows": 9, "columns": 9}}),
    "no linear layer of 300": manifest_with(width={"double_blocks.1.img_attn.proj": {"rows": 300, "columns": 256}}),
    "__class__": manifest_with(fields={"double_blocks.0": {"__class__": 1}}),
    "num_heads of double_blocks.0 cannot be 5": manifest_with(fields={"double_blocks.0": {"num_heads": 5}}),
    "weights": lambda tensors: tensors.pop(f"{PREFIX}img_in.weight"),
}  # fmt: skip


@pytest.mark.parametrize("reason", DAMAGE)
def test_a_damaged_or_hostile_file_is_refused_with_the_reason(runs, file, reason):
    with pytest.raises(NodeInputError) as caught:
        runs.load(rewritten(runs, file, DAMAGE[reason]))
    message = str(caught.value)
    assert message.startswith("Load Compressed: input 'path'") and (reason in message or "whole model" in message), message


@pytest.mark.parametrize("length", [0, 4, 100, 50_000, -1])
def test_a_file_that_is_cut_short_is_refused(runs, file, length):
    content = runs.file(file).read_bytes()
    runs.file("short.safetensors").write_bytes(content[:length])
    for node in ("RectiflowLoadCompressed", "RectiflowCompressionInfo"):
        with pytest.raises(NodeInputError, match="short.safetensors: no readable"):
            runs.node(node, path="short.safetensors")


@pytest.mark.parametrize("path", ["", "nothing.safetensors", "../../etc/passwd", "a\0b", "."])
def test_what_is_no_file_of_ours_is_refused(runs, path):
    with pytest.raises(NodeInputError, match="below the output folder"):
        runs.load(path)


def test_a_full_disk_leaves_what_stood_there(runs, four, monkeypatch):
    first = runs.save(four, prefix="disk/model")
    before, folder = runs.file(first).read_bytes(), runs.file(first).parent

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tensor_file.os, "fsync", full)
    with pytest.raises(NodeInputError, match="No space left on device.*folder with room"):
        runs.save(four, prefix="disk/model")
    monkeypatch.undo()
    assert [path.name for path in folder.iterdir()] == [Path(first).name] and runs.file(first).read_bytes() == before


def test_names_are_counted_up_and_never_taken_twice(runs, four):
    taken = {runs.save(four, prefix="count/model") for _ in range(2)}
    runs.file("count/model_00007_.safetensors").write_bytes(b"")
    assert taken == {"count/model_00001_.safetensors", "count/model_00002_.safetensors"}
    assert runs.save(four, prefix="count/model") == "count/model_00008_.safetensors"


def test_bytes_are_the_formats_own(tmp_path):
    """safetensors reads every dtype back, and equal tensors in another order are equal bytes."""
    tensors = {str(kind): torch.arange(6).to(kind).view(2, 3) for kind in tensor_file.NAMES if kind is not torch.bool}
    tensors |= {"empty": torch.empty(0, 4), "scalar": torch.tensor(3.0), "bool": torch.tensor([True, False])}
    tensor_file.write_tensors(tmp_path / "a", tensors, {"b": "2", "a": "1"})
    tensor_file.write_tensors(tmp_path / "b", dict(reversed(tensors.items())), {"a": "1", "b": "2"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    found = load_file(tmp_path / "a")
    assert found.keys() == tensors.keys()
    assert all(found[name].dtype == t.dtype and torch.equal(found[name].float(), t.float()) for name, t in tensors.items())
    with pytest.raises(ValueError, match="complex64"):
        tensor_file.write_tensors(tmp_path / "c", {"x": torch.zeros(1, dtype=torch.complex64)}, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
