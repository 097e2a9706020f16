"""The checked reader: equal to the reference implementation on good files, a clear ValueError on every bad one."""

from __future__ import annotations

import copy
import json
import os
import random
import struct

import pytest
import safetensors.torch
import torch
from rectiflow.host.embedded.safetensors_file import MAX_HEADER_BYTES, load_safetensors, load_torch_file, read_header
from safetensors import SafetensorError

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int64, torch.int32,
    torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.bool, torch.complex64,
]  # fmt: skip


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for i, dtype in enumerate(DTYPES):
        values = torch.randint(0, 2 if dtype == torch.bool else 100, (2, i % 3 + 1), generator=generator)
        made[f"block.{i}.weight"] = values.to(dtype)
    return made | {"scalar": torch.tensor(3.5), "empty": torch.empty(0, 4), "picture": torch.randn(3, 2, 4, generator=generator)}


def pack(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


GOOD = {
    "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
    "b": {"dtype": "F16", "shape": [4], "data_offsets": [16, 24]},
    "c": {"dtype": "U8", "shape": [3], "data_offsets": [24, 27]},
}
DATA = bytes(range(27))


@pytest.fixture
def write(tmp_path):
    def to_file(content: bytes, name: str = "model.safetensors") -> str:
        path = tmp_path / name
        path.write_bytes(content)
        return str(path)

    return to_file


def test_equals_the_reference_reader(tmp_path):
    path = str(tmp_path / "all.safetensors")
    safetensors.torch.save_file(tensors(), path, metadata={"made by": "test"})
    loaded, metadata = load_safetensors(path)
    assert metadata == {"made by": "test"}
    reference = safetensors.torch.load_file(path)
    assert loaded.keys() == reference.keys() == tensors().keys()
    for key, tensor in tensors().items():
        assert loaded[key].dtype == tensor.dtype and loaded[key].shape == tensor.shape
        assert torch.equal(loaded[key].contiguous().view(torch.uint8) if tensor.ndim else loaded[key],
                           tensor.contiguous().view(torch.uint8) if tensor.ndim else tensor), key  # fmt: skip


def test_load_torch_file_gives_metadata_on_request(write):
    path = write(pack(GOOD, DATA))
    assert set(load_torch_file(path)) == {"a", "b", "c"}
    assert load_torch_file(path, return_metadata=True)[1] == {}


def test_tensors_share_one_mapping_and_writes_stay_in_memory(write):
    path = write(pack(b" " * 0 + json.dumps(GOOD).encode().ljust(200), DATA))
    loaded, _ = load_safetensors(path)
    starts = {key: tensor.untyped_storage().data_ptr() for key, tensor in loaded.items()}
    assert len(set(starts.values())) == 1, "tensors are views of one block"
    loaded["a"].fill_(1.0)
    with open(path, "rb") as file:
        assert file.read().endswith(DATA), "a private mapping never writes to the file"
    again, _ = load_safetensors(path)
    assert not torch.equal(again["a"], loaded["a"])


def test_unaligned_data_is_copied(write):
    text = json.dumps({"a": GOOD["a"]}).encode()
    text = text.ljust(len(text) + (3 - (8 + len(text))) % 8)  # data starts at 3 modulo 8
    loaded, _ = load_safetensors(write(pack(text, DATA[:16])))
    assert loaded["a"].data_ptr() % 4 == 0
    assert loaded["a"].numpy().tobytes() == DATA[:16]


def test_weights_loaded_in_inference_mode_can_take_part_in_gradients(write):
    with torch.inference_mode():
        loaded, _ = load_safetensors(write(pack(GOOD, DATA)))
    assert not loaded["a"].is_inference()


def test_bytes_of_bool_that_are_neither_0_nor_1_become_true(write):
    header = {"flags": {"dtype": "BOOL", "shape": [3], "data_offsets": [0, 3]}}
    assert load_safetensors(write(pack(header, b"\x00\x01\x07")))[0]["flags"].tolist() == [False, True, True]


def with_change(name: str, field: str, value: object) -> dict:
    header = copy.deepcopy(GOOD)
    header[name][field] = value
    return header


def without(name: str, field: str) -> dict:
    header = copy.deepcopy(GOOD)
    del header[name][field]
    return header


BAD_HEADERS = {
    "overlap": with_change("b", "data_offsets", [12, 20]),
    "same bytes twice": {**GOOD, "d": {"dtype": "U8", "shape": [3], "data_offsets": [24, 27]}},
    "gap": {"a": GOOD["a"], "c": GOOD["c"]},
    "rest unused": {"a": GOOD["a"], "b": GOOD["b"]},
    "beyond the file": with_change("c", "data_offsets", [24, 28]),
    "far beyond": {"a": {"dtype": "U8", "shape": [2**62], "data_offsets": [0, 2**62]}},
    "reversed": with_change("b", "data_offsets", [24, 16]),
    "negative offset": with_change("a", "data_offsets", [-16, 0]),
    "three offsets": with_change("a", "data_offsets", [0, 8, 16]),
    "offset text": with_change("a", "data_offsets", ["0", "16"]),
    "offset float": with_change("a", "data_offsets", [0.0, 16.0]),
    "offset bool": with_change("a", "data_offsets", [False, 16]),
    "negative size": with_change("a", "shape", [-2, -2]),
    "size float": with_change("a", "shape", [2.0, 2]),
    "size null": with_change("a", "shape", [None]),
    "shape text": with_change("a", "shape", "22"),
    "shape nested": with_change("a", "shape", [[2], 2]),
    "shape bool": with_change("c", "shape", [True, 3]),
    "overflow": with_change("a", "shape", [2**32, 2**32]),
    "overflow to the right size": with_change("a", "shape", [2**62, 2**62, 4]),
    "huge beside zero": with_change("a", "shape", [0, 2**40, 2**40]),
    "65 axes": with_change("a", "shape", [1] * 64 + [4]),
    "too few elements": with_change("a", "shape", [3]),
    "too many elements": with_change("a", "shape", [5]),
    "unknown dtype": with_change("a", "dtype", "F4"),
    "lower-case dtype": with_change("a", "dtype", "f32"),
    "dtype number": with_change("a", "dtype", 32),
    "dtype list": with_change("a", "dtype", ["F32"]),
    "dtype of another size": with_change("a", "dtype", "F64"),
    "no dtype": without("a", "dtype"),
    "no shape": without("a", "shape"),
    "no offsets": without("a", "data_offsets"),
    "another field": with_change("a", "stride", [2, 1]),
    "tensor is a list": {**GOOD, "a": ["F32", [2, 2], [0, 16]]},
    "tensor is null": {**GOOD, "a": None},
    "metadata is a list": {**GOOD, "__metadata__": ["x"]},
    "metadata holds numbers": {**GOOD, "__metadata__": {"step": 3}},
    "metadata is null": {**GOOD, "__metadata__": None},
}


@pytest.mark.parametrize("header", BAD_HEADERS.values(), ids=BAD_HEADERS)
def test_hostile_header(write, header):
    path = write(pack(header, DATA))
    with pytest.raises(ValueError, match="model.safetensors"):
        load_safetensors(path)


ONE_BYTE = b'"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'

BAD_BYTES = {
    "empty": b"",
    "seven bytes": b"\x01" * 7,
    "no header": struct.pack("<Q", 0),
    "no header but data": struct.pack("<Q", 0) + DATA,
    "header cut off": pack(GOOD)[:60],
    "data cut off": pack(GOOD, DATA[:-1]),
    "data too long": pack(GOOD, DATA + b"\x00"),
    "length beyond the file": pack(GOOD, DATA, length=10_000),
    "length beyond the limit": pack(GOOD, DATA, length=MAX_HEADER_BYTES + 1),
    "largest length": pack(GOOD, DATA, length=2**64 - 1),
    "length one short": pack(GOOD, DATA, length=len(json.dumps(GOOD)) - 1),
    "length one long": pack(GOOD, DATA, length=len(json.dumps(GOOD)) + 1),
    "leading space": pack(b" " + json.dumps(GOOD).encode(), DATA),
    "array": pack(b"[1, 2]"),
    "number": pack(b"12"),
    "not JSON": pack(b"{'a': 1}"),
    "trailing comma": pack(b'{"a": 1,}'),
    "duplicate tensor": pack(b"{%s,%s}" % (ONE_BYTE, ONE_BYTE), b"x"),
    "duplicate field": pack(b'{"a":{"dtype":"U8","dtype":"I8","shape":[1],"data_offsets":[0,1]}}', b"x"),
    "NaN size": pack(b'{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,1]}}', b"x"),
    "infinite offset": pack(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,Infinity]}}', b"x"),
    "endless number": pack(b'{"a":{"dtype":"U8","shape":[' + b"9" * 10_000 + b'],"data_offsets":[0,1]}}', b"x"),
    "deep nesting": pack(b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}"),
    "not UTF-8": pack(b'{"\xff\xfe": 1}'),
    "two documents": pack(b"{}{}"),
    "pickle": b"\x80\x02}q\x00X\x05\x00\x00\x00modelq\x01.",
    "zip": b"PK\x03\x04" + b"\x00" * 100,
    "GGUF": b"GGUF\x03\x00\x00\x00" + b"\x00" * 100,
    "web page": b"<!DOCTYPE html><html></html>",
    "LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
}


@pytest.mark.parametrize("content", BAD_BYTES.values(), ids=BAD_BYTES)
def test_hostile_bytes(write, content):
    path = write(content)
    with pytest.raises(ValueError, match="model.safetensors") as caught:
        load_safetensors(path)
    assert len(str(caught.value)) < 600, "the message quotes the file, it does not repeat it"


def test_messages_name_tensor_and_cause(write):
    for header, words in (
        (BAD_HEADERS["overlap"], ("'b'", "overlaps")),
        (BAD_HEADERS["gap"], ("'c'", "gap")),
        (BAD_HEADERS["too many elements"], ("'a'", "20 bytes", "16")),
        (BAD_HEADERS["unknown dtype"], ("'a'", "F4", "BF16")),
    ):
        with pytest.raises(ValueError) as caught:
            load_safetensors(write(pack(header, DATA)))
        for word in words:
            assert word in str(caught.value)


@pytest.mark.parametrize("name", ["model.ckpt", "model.pt", "MODEL.PTH", "pytorch_model.bin"])
def test_pickles_are_refused_by_name_unopened(write, name):
    with pytest.raises(ValueError, match="pickle"):
        load_safetensors(write(pack(GOOD, DATA), name))


def test_folders_and_pipes_are_refused(tmp_path):
    with pytest.raises(ValueError, match="regular file"):
        load_safetensors(tmp_path)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.safetensors")
        with pytest.raises(ValueError, match="regular file"):
            load_safetensors(tmp_path / "pipe.safetensors")
    with pytest.raises(FileNotFoundError):
        load_safetensors(tmp_path / "absent.safetensors")


def _mutate_value(value: object, dice: random.Random) -> object:
    return dice.choice([
        None, True, -1, 0, 1, 2**31, 2**63, 2**64, 1e300, "", "F32", "\x00", [], {}, [0], [1, 2, 3], [-1, 5], [2**63, 2**63],
        copy.deepcopy(value),
    ])  # fmt: skip


def _mutated_header(dice: random.Random) -> dict:
    header = copy.deepcopy(GOOD)
    for _ in range(dice.randint(1, 3)):
        name = dice.choice([key for key in header if isinstance(header[key], dict)] or ["a"])
        target = header.get(name)
        if not isinstance(target, dict) or dice.random() < 0.1:
            header[name] = _mutate_value(target, dice)
        elif dice.random() < 0.15:
            target.pop(dice.choice(list(target)), None) if target else None
        else:
            field = dice.choice(["dtype", "shape", "data_offsets"])
            value = target.get(field)
            if isinstance(value, list) and value and dice.random() < 0.6:
                value[dice.randrange(len(value))] = _mutate_value(value, dice)
            else:
                target[field] = _mutate_value(value, dice)
    return header


def test_fuzzed_headers_are_refused_or_right(write, tmp_path):
    """Whatever the header says, the reader refuses with a ValueError, or gives tensors that lie inside the file and that the
    reference implementation gives too."""
    dice = random.Random(0)
    refused = 0
    for _ in range(600):
        path = write(pack(_mutated_header(dice), DATA))
        try:
            loaded, _ = load_safetensors(path)
        except ValueError as error:
            assert path in str(error)
            refused += 1
            continue
        assert sum(tensor.nbytes for tensor in loaded.values()) == len(DATA)
        reference = safetensors.torch.load_file(path)
        assert {key: tensor.shape for key, tensor in loaded.items()} == {key: tensor.shape for key, tensor in reference.items()}
    assert refused > 500, "nearly every mutation breaks the header"


def test_fuzzed_bytes_never_load_what_the_reference_refuses(write):
    dice = random.Random(1)
    good = pack(GOOD, DATA)
    for _ in range(600):
        content = bytearray(good)
        for _ in range(dice.randint(1, 4)):
            action, at = dice.random(), dice.randrange(len(content))
            if action < 0.6:
                content[at] = dice.randrange(256)
            elif action < 0.8:
                del content[at : at + dice.randint(1, 9)]
            else:
                content[at:at] = bytes(dice.randrange(256) for _ in range(dice.randint(1, 9)))
        path = write(bytes(content))
        try:
            header = read_header(path)
        except ValueError:
            continue
        assert sum(entry.end - entry.begin for entry in header.tensors) == len(content) - header.data_start
        try:
            safetensors.torch.load_file(path)
        except SafetensorError as error:  # it reads an extra metadata key where we do, so both must agree
            pytest.fail(f"the reference reader refuses {bytes(content)!r}: {error}")
