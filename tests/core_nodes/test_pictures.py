"""Loading and saving pictures: what is in the file, what is never written, and files made to break a reader."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rectiflow.errors import NodeInputError
from rectiflow.host.embedded.context import Host, HostSettings, use_host
from rectiflow.host.embedded.core_nodes import limits
from rectiflow.host.embedded.safe_files import write_new_file

sys.path.insert(0, str(Path(__file__).parent))
from picture_samples import levels, write_samples  # noqa: E402


@pytest.fixture
def inputs(host) -> Path:
    return Path(host.paths.input_directory)


@pytest.fixture
def outputs(host) -> Path:
    return Path(host.paths.output_directory)


def test_a_picture_saved_and_loaded_is_the_same(call, inputs, outputs):
    pixels = torch.from_numpy(levels(1, channels=4)[None].astype(np.float32) / 255.0)
    saved = call("SaveImage", images=pixels)["ui"]["images"]
    assert saved == [{"filename": "ComfyUI_00001_.png", "subfolder": "", "type": "output"}]
    image, mask = call("LoadImage", image="ComfyUI_00001_.png [output]")
    # v/255 in float32 times 255 is v or the next number below it, which cutting turns into v − 1
    assert (image - pixels[..., :3]).abs().max() <= 1 / 255 + 1e-6
    assert (mask - (1 - pixels[..., 3])).abs().max() <= 1 / 255 + 1e-6


def test_levels_are_clipped_and_cut(call, outputs):
    call(
        "SaveImage",
        images=torch.tensor([-0.5, 0.0, 0.999 / 255, 1.5 / 255, 254.999 / 255, 1.0, 7.0]).reshape(1, 1, 7, 1).expand(1, 1, 7, 3),
    )
    assert np.array(Image.open(outputs / "ComfyUI_00001_.png"))[0, :, 0].tolist() == [0, 0, 0, 1, 254, 255, 255]


def test_nan_is_drawn_black_and_said(call, outputs, caplog):
    pixels = torch.full((1, 2, 2, 3), 0.5)
    pixels[0, 0, 0] = float("nan")
    with caplog.at_level(logging.WARNING):
        call("SaveImage", images=pixels)
    assert "Save Image: picture 1 of 1 holds 3 NaN values" in caplog.text
    assert np.array(Image.open(outputs / "ComfyUI_00001_.png"))[0].tolist() == [[0, 0, 0], [127, 127, 127]]


def test_the_graph_is_in_the_file_unless_switched_off(call, host, outputs, tmp_path):
    pixels = torch.zeros(1, 4, 4, 3)
    call("SaveImage", images=pixels, prompt={"1": {}}, extra_pnginfo={"workflow": {"a": "ü"}})
    assert Image.open(outputs / "ComfyUI_00001_.png").text == {"prompt": '{"1": {}}', "workflow": json.dumps({"a": "ü"})}
    quiet = Host(paths=host.paths, registry=host.registry, memory=host.memory, settings=HostSettings(disable_metadata=True))
    with use_host(quiet):
        call("SaveImage", images=pixels, prompt={"1": {}}, extra_pnginfo={"workflow": {}})
    assert Image.open(outputs / "ComfyUI_00002_.png").text == {}


def test_the_counter_goes_on_and_batches_count(call, outputs):
    (outputs / "run").mkdir()
    (outputs / "run" / "a_00041_.png").write_bytes(b"mine")
    saved = call("SaveImage", images=torch.zeros(2, 4, 6, 3), filename_prefix="run/a")["ui"]["images"]
    assert [entry["filename"] for entry in saved] == ["a_00042_.png", "a_00043_.png"]
    assert {entry["subfolder"] for entry in saved} == {"run"}
    assert (outputs / "run" / "a_00041_.png").read_bytes() == b"mine"


def test_batch_number_in_the_name_never_overwrites(call, outputs):
    for _ in range(2):
        call("SaveImage", images=torch.zeros(2, 4, 4, 3), filename_prefix="p_%batch_num%")
    assert sorted(path.name for path in outputs.iterdir()) == ["p_0_00001_.png", "p_0_00002_.png", "p_1_00002_.png", "p_1_00003_.png"]


def test_existing_files_and_links_are_never_touched(outputs, tmp_path):
    (outputs / "a_00001_.png").write_bytes(b"mine")
    (outputs / "a_00002_.png").symlink_to(tmp_path / "not there yet")
    name, counter = write_new_file(str(outputs), lambda n: f"a_{n:05}_.png", 1, lambda file: file.write(b"new"))
    assert (name, counter) == ("a_00003_.png", 3)
    assert (outputs / "a_00001_.png").read_bytes() == b"mine"
    assert not (tmp_path / "not there yet").exists()


def test_files_get_the_users_permissions(outputs):
    old = os.umask(0o027)
    try:
        write_new_file(str(outputs), lambda n: f"{n}", 1, lambda file: file.write(b"x"))
    finally:
        os.umask(old)
    if os.name != "nt":
        assert (outputs / "1").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device"), MemoryError])
def test_a_write_that_stops_halfway_leaves_nothing(outputs, error):
    def half(file):
        file.write(b"half")
        file.flush()
        raise error

    with pytest.raises(error if isinstance(error, type) else type(error)):
        write_new_file(str(outputs), str, 1, half)
    assert list(outputs.iterdir()) == []


def test_without_hard_links_nothing_is_overwritten_either(outputs, monkeypatch):
    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    (outputs / "1").write_bytes(b"mine")
    assert write_new_file(str(outputs), str, 1, lambda file: file.write(b"new"))[0] == "2"
    assert {path.name: path.read_bytes() for path in outputs.iterdir()} == {"1": b"mine", "2": b"new"}


def test_many_writers_share_a_prefix_without_losing_a_picture(host, outputs):
    cls = host.registry["SaveImage"]

    def save(value):
        with use_host(host):
            cls().save_images(torch.full((3, 4, 4, 3), value / 255 + 1e-4))

    threads = [threading.Thread(target=save, args=(value,)) for value in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    values = sorted(int(np.array(Image.open(path))[0, 0, 0]) for path in outputs.iterdir())
    assert values == sorted([*range(8)] * 3)


@pytest.mark.skipif(os.name == "nt", reason="SIGINT of a child process works differently there")
def test_ctrl_c_leaves_whole_files_only(outputs):
    code = (
        "import sys, torch\n"
        "from rectiflow.host.embedded.context import Host, HostSettings, use_host\n"
        "from rectiflow.host.embedded.core_nodes import NODE_CLASS_MAPPINGS\n"
        "from rectiflow.host.embedded.folder_paths import FolderPaths\n"
        "pixels = torch.rand(1, 256, 256, 3)\n"
        "with use_host(Host(FolderPaths(sys.argv[1]), None, None)):\n"
        "    node = NODE_CLASS_MAPPINGS['SaveImage']()\n"
        "    while True:\n"
        "        node.save_images(pixels)\n"
        "        print(flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(outputs.parent)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert b"KeyboardInterrupt" in errors
    files = list(outputs.iterdir())
    assert files and all(path.suffix == ".png" for path in files)
    for path in files:
        Image.open(path).load()


@pytest.mark.parametrize(
    "prefix", ["../x", "/x", "a/../../x", "x\0", "con", "x" * 300, "new/" + "x" * 240, "a.png/b", "\ud800", "x/" * 3000]
)
def test_hostile_prefixes_name_the_node_and_write_nothing(call, outputs, prefix):
    (outputs / "a.png").write_bytes(b"")
    before = sorted(outputs.parent.rglob("*"))
    with pytest.raises(NodeInputError, match="Save Image: input 'filename_prefix'"):
        call("SaveImage", images=torch.zeros(1, 4, 4, 3), filename_prefix=prefix)
    assert sorted(outputs.parent.rglob("*")) == before


@pytest.mark.parametrize("shape", [(0, 4, 4, 3), (1, 4, 4, 1), (4, 4, 3), (1, 0, 4, 3), (1, 4, 4, 5)])
def test_what_is_no_picture_is_refused(call, outputs, shape):
    with pytest.raises(NodeInputError, match="Save Image: input 'images'"):
        call("SaveImage", images=torch.zeros(shape))
    assert list(outputs.iterdir()) == []


@pytest.mark.parametrize("key", ["", "k" * 80, "a\0b", "ключ", 3])
def test_keys_that_no_png_can_hold_are_refused(call, outputs, key):
    with pytest.raises(NodeInputError, match="extra_pnginfo"):
        call("SaveImage", images=torch.zeros(1, 4, 4, 3), extra_pnginfo={key: 1})
    assert list(outputs.iterdir()) == []


def test_an_interrupt_stops_between_pictures(call, host, outputs):
    from rectiflow.host.embedded.model_management import InterruptProcessingException

    host.interrupt.set()
    with pytest.raises(InterruptProcessingException):
        call("SaveImage", images=torch.zeros(3, 4, 4, 3))
    assert list(outputs.iterdir()) == []


def test_previews_go_to_temp_under_names_of_their_own(host):
    state = random.getstate()
    nodes = [host.registry["PreviewImage"]() for _ in range(2)]
    names = [node.save_images(torch.zeros(1, 4, 4, 3))["ui"]["images"][0] for node in nodes]
    assert random.getstate() == state  # a graph's own draws are not shifted
    assert all(entry["type"] == "temp" and entry["filename"].startswith("ComfyUI_temp_") for entry in names)
    assert names[0]["filename"] != names[1]["filename"]
    assert sorted(os.listdir(host.paths.temp_directory)) == sorted(entry["filename"] for entry in names)
    mask = host.registry["MaskPreview"]().execute(torch.full((2, 4, 4), 0.5))["ui"]["images"]
    assert len(mask) == 2
    host.paths.empty_temp_directory()
    assert not os.path.exists(host.paths.temp_directory)


def test_a_packs_subclass_may_choose_folder_and_prefix(host, tmp_path):
    class Elsewhere(host.registry["SaveImage"]):
        def __init__(self):
            super().__init__()
            self.output_dir, self.type, self.prefix_append, self.compress_level = str(tmp_path / "mine"), "mine", "_x", 0

    saved = Elsewhere().save_images(torch.zeros(1, 4, 4, 3))["ui"]["images"]
    assert saved == [{"filename": "ComfyUI_x_00001_.png", "subfolder": "", "type": "mine"}]
    assert (tmp_path / "mine" / "ComfyUI_x_00001_.png").is_file()


def test_pictures_over_the_socket_are_previews_and_no_files(host, outputs):
    sent = []
    host.progress_hook = lambda value, total, preview, node_id=None: sent.append((value, total, preview))
    pixels = torch.rand(3, 4, 6, 3)
    assert host.registry["SaveImageWebsocket"]().save_images(pixels) == {}
    assert [(value, total) for value, total, _ in sent] == [(0, 3), (1, 3), (2, 3)]
    kind, picture, limit = sent[1][2]
    assert (kind, limit, picture.size) == ("PNG", None, (6, 4))
    assert np.array_equal(np.array(picture), (pixels[1] * 255).numpy().astype(np.uint8))
    assert list(outputs.iterdir()) == []


# Loading


def test_alpha_becomes_an_inverted_mask(call, inputs):
    write_samples(inputs)
    image, mask = call("LoadImage", image="rgba.png")
    pixels = torch.from_numpy(levels(2, channels=4)).float() / 255
    assert torch.equal(image[0], pixels[..., :3])
    assert torch.equal(mask[0], 1 - pixels[..., 3])
    image, mask = call("LoadImage", image="rgb.png")
    assert torch.equal(mask, torch.zeros(1, 64, 64))
    for name, index in (("red", 0), ("green", 1), ("blue", 2)):
        assert torch.equal(call("LoadImageMask", image="rgba.png", channel=name)[0][0], pixels[..., index])
    assert torch.equal(call("LoadImageMask", image="rgba.png", channel="alpha")[0][0], 1 - pixels[..., 3])


def test_exif_turns_the_picture(call, inputs):
    write_samples(inputs)
    upright = call("LoadImage", image="turned_1.jpg")[0]
    turns = {3: 2, 6: 1, 8: 3}  # orientation → quarter turns clockwise
    for orientation, quarter in turns.items():
        turned = call("LoadImage", image=f"turned_{orientation}.jpg")[0]
        assert torch.equal(turned, torch.rot90(upright, quarter, (2, 1)))
    assert torch.equal(call("LoadImage", image="turned_5.jpg")[0], upright.transpose(1, 2))


def test_frames_become_a_batch_of_equal_sizes(call, inputs):
    write_samples(inputs)
    image, mask = call("LoadImage", image="frames.webp")
    assert image.shape == (3, 12, 18, 3) and mask.shape == (3, 64, 64)
    assert torch.equal(image[2], torch.from_numpy(levels(22)).float() / 255)
    assert call("LoadImage", image="pages.tif")[0].shape == (3, 12, 18, 3)  # the 5×5 page is left out
    assert call("LoadImage", image="stereo.mpo")[0].shape == (1, 12, 18, 3)
    image, mask = call("LoadImage", image="clear.png")
    assert image.shape == (2, 12, 18, 3) and mask.shape == (2, 12, 18)


def test_frames_with_and_without_alpha_share_one_mask_size(call, inputs):
    opaque, clear = Image.fromarray(levels(1)), Image.fromarray(levels(2, channels=4))
    opaque.save(inputs / "mixed.tif", save_all=True, append_images=[clear])
    image, mask = call("LoadImage", image="mixed.tif")
    assert image.shape == (2, 12, 18, 3) and mask.shape == (2, 12, 18)
    assert not mask[0].any()


def test_a_file_cut_short_gives_what_is_there(call, inputs):
    write_samples(inputs)
    whole, cut = (call("LoadImage", image=name)[0] for name in ("whole.jpg", "cut.jpg"))
    assert cut.shape == whole.shape
    assert torch.equal(cut[:, :8], whole[:, :8])
    assert not torch.equal(cut, whole)


def test_the_drop_down_offers_pictures_in_the_folder_only(host, inputs, tmp_path):
    for name in ("b.png", "a.jpg", "notes.txt", ".c.part"):
        (inputs / name).touch()
    (inputs / "sub").mkdir()
    (inputs / "sub" / "d.png").touch()
    (tmp_path / "e.png").touch()
    (inputs / "leads_out.png").symlink_to(tmp_path / "e.png")
    assert host.registry["LoadImage"].INPUT_TYPES()["required"]["image"][0] == ["a.jpg", "b.png"]
    assert "notes.txt" in host.registry["LoadImageMask"].INPUT_TYPES()["required"]["image"][0]


def test_names_are_checked_before_the_run(host, inputs):
    cls = host.registry["LoadImage"]
    (inputs / "cat.png").write_bytes(b"abc")
    assert cls.VALIDATE_INPUTS("cat.png") is True
    assert cls.VALIDATE_INPUTS("dog.png") == "Invalid image file: dog.png"
    assert cls.VALIDATE_INPUTS("../cat.png") == "Invalid image file: ../cat.png"
    assert cls.VALIDATE_INPUTS("cat.png [output]") == "Invalid image file: cat.png [output]"
    assert cls.IS_CHANGED("cat.png") == hashlib.sha256(b"abc").hexdigest()
    (inputs / "cat.png").write_bytes(b"abd")
    assert cls.IS_CHANGED("cat.png") == hashlib.sha256(b"abd").hexdigest()


@pytest.mark.parametrize("name", ["dog.png", "../secret.png", "/etc/passwd", "sub", "a\0.png"])
def test_a_file_that_may_not_be_read_is_named(call, inputs, name):
    (inputs / "sub").mkdir()
    (inputs.parent / "secret.png").touch()
    with pytest.raises(NodeInputError, match=r"Load Image: input 'image'") as raised:
        call("LoadImage", image=name)
    assert str(inputs) not in str(raised.value)


def png(width: int, height: int, data: bytes = b"") -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\x02\0\0\0"
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def test_a_decompression_bomb_is_refused_by_its_header(call, inputs):
    (inputs / "bomb.png").write_bytes(png(30000, 30000))
    with pytest.raises(NodeInputError, match="Load Image: input 'image' got 'bomb.png'.*million pixels.*900000000"):
        call("LoadImage", image="bomb.png")
    with pytest.raises(NodeInputError, match=r"Load Image \(as Mask\): input 'image'"):
        call("LoadImageMask", image="bomb.png", channel="red")


def test_a_picture_larger_than_memory_is_refused_before_it_is_decoded(call, inputs, monkeypatch):
    monkeypatch.setattr("rectiflow.host.embedded.model_management.system_memory", lambda: (2 * limits.GIB, limits.GIB))
    (inputs / "large.png").write_bytes(png(9000, 9000))
    with pytest.raises(NodeInputError, match="9000 x 9000 x 1.*1.0 GiB of free memory; this takes 1.2 GiB"):
        call("LoadImage", image="large.png")


def test_postscript_is_not_interpreted(call, inputs):
    (inputs / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n")
    with pytest.raises(NodeInputError, match="cannot identify image file"):
        call("LoadImage", image="a.png")


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow warns of damaged EXIF data that it leaves out
def test_broken_files_are_refused_by_name(call, inputs):
    """Every format with bytes changed, cut and repeated: a picture or a NodeInputError, never anything else."""
    write_samples(inputs)
    samples = [path.read_bytes() for path in sorted(inputs.iterdir())]
    draw = random.Random(3)
    refused = 0
    for _ in range(400):
        data = bytearray(draw.choice(samples))
        for _ in range(draw.randint(1, 8)):
            where = draw.randrange(min(len(data), draw.choice((16, 64, 10**9))))
            data[where : where + draw.randint(0, 3)] = draw.randbytes(draw.randint(0, 4))
        (inputs / "fuzz.png").write_bytes(data[: draw.choice((len(data), draw.randint(0, len(data))))])
        try:
            image, mask = call("LoadImage", image="fuzz.png")
        except NodeInputError as error:
            assert "'fuzz.png'" in str(error) and str(inputs) not in str(error)
            refused += 1
        else:
            assert image.ndim == 4 and image.shape[-1] == 3 and mask.ndim == 3
            assert 0 <= image.min() and image.max() <= 1
    assert 40 < refused < 400


def test_an_empty_file_is_refused(call, inputs):
    (inputs / "empty.png").touch()
    with pytest.raises(NodeInputError, match="empty.png"):
        call("LoadImage", image="empty.png")


# Latents as files


def test_a_latent_saved_and_loaded_is_the_same(call, inputs, outputs):
    samples = torch.randn(2, 16, 4, 6, generator=torch.Generator().manual_seed(0))
    saved = call("SaveLatent", samples={"samples": samples[:, ::2]}, filename_prefix="l/a", prompt={"1": {}}, extra_pnginfo={"workflow": 2})
    locator = saved["ui"]["latents"][0]
    assert locator == {"filename": "a_00001_.latent", "subfolder": "l", "type": "output"}
    assert torch.equal(call("LoadLatent", latent="l/a_00001_.latent [output]")[0]["samples"], samples[:, ::2])
    content = (outputs / "l" / "a_00001_.latent").read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert header["__metadata__"] == {"prompt": '{"1": {}}', "workflow": "2"}


def test_old_latents_are_scaled_and_other_files_refused(call, inputs):
    from safetensors.torch import save_file

    save_file({"latent_tensor": torch.ones(1, 4, 2, 2)}, inputs / "old.latent")
    assert torch.allclose(call("LoadLatent", latent="old.latent")[0]["samples"], torch.tensor(1 / 0.18215))
    save_file({"other": torch.ones(1)}, inputs / "other.latent")
    with pytest.raises(NodeInputError, match="LoadLatent: input 'latent' got 'other.latent'"):
        call("LoadLatent", latent="other.latent")
    (inputs / "bad.latent").write_bytes(b"\xff" * 40)
    with pytest.raises(ValueError, match="bad.latent"):
        call("LoadLatent", latent="bad.latent")
