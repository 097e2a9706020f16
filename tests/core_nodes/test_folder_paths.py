"""Folders of a host: listing, finding, annotated names, save paths, and names made to leave them."""

from __future__ import annotations

import os
import random
import time

import pytest
from rectiflow.host.embedded import folder_paths
from rectiflow.host.embedded.context import Host, use_host
from rectiflow.host.embedded.folder_paths import FolderPaths, UnsafePathError, checked_path, is_inside

HOSTILE = (
    "../x", "..", "a/../../x", "a/..", "..\\x", "a\\..\\..\\x", "/etc/passwd", "//host/share", "\\\\host\\share", "C:\\x", "C:x", "c:/x",
    "a\0b", "\0", "a\nb", "\x7f", "\ud800", "../" * 50 + "etc/passwd", "....//../x", "./../x",
)  # fmt: skip


def touch(path, age=60):
    """An empty file in a folder that last changed `age` seconds ago, so that a listing of it may be kept."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    for folder in (path, *path.parents[:3]):
        os.utime(folder, (time.time() - age,) * 2)


def test_listing_is_recursive_sorted_and_filtered(host, tmp_path):
    for name in ("b.safetensors", "a.SAFETENSORS", "deep/er/c.ckpt", "notes.txt", ".git/x.safetensors"):
        touch(tmp_path / "models" / "checkpoints" / name)
    assert folder_paths.get_filename_list("checkpoints") == ["a.SAFETENSORS", "b.safetensors", os.path.join("deep", "er", "c.ckpt")]


def test_both_folders_of_a_kind_are_listed_under_old_and_new_name(host, tmp_path):
    touch(tmp_path / "models" / "unet" / "one.sft")
    touch(tmp_path / "models" / "diffusion_models" / "two.sft")
    assert folder_paths.get_filename_list("unet") == folder_paths.get_filename_list("diffusion_models") == ["one.sft", "two.sft"]
    assert folder_paths.get_full_path("unet", "two.sft") == str(tmp_path / "models" / "diffusion_models" / "two.sft")


def test_a_new_or_deleted_file_is_noticed(host, tmp_path):
    folder = tmp_path / "models" / "vae"
    touch(folder / "sub" / "a.sft")
    assert folder_paths.get_filename_list("vae") == [os.path.join("sub", "a.sft")]
    (folder / "sub" / "b.sft").touch()
    assert len(folder_paths.get_filename_list("vae")) == 2
    (folder / "sub" / "a.sft").unlink()
    assert folder_paths.get_filename_list("vae") == [os.path.join("sub", "b.sft")]


def test_two_changes_within_one_clock_tick_are_noticed(host, tmp_path):
    folder = tmp_path / "models" / "vae"
    folder.mkdir(parents=True)
    (folder / "a.sft").touch()
    stamp = os.stat(folder).st_mtime_ns
    assert folder_paths.get_filename_list("vae") == ["a.sft"]
    (folder / "b.sft").touch()
    os.utime(folder, ns=(stamp, stamp))  # as a coarse clock would leave it
    assert folder_paths.get_filename_list("vae") == ["a.sft", "b.sft"]


def test_an_unchanged_listing_is_not_read_again(host, tmp_path, monkeypatch):
    touch(tmp_path / "models" / "vae" / "a.sft")
    first = folder_paths.get_filename_list("vae")
    monkeypatch.setattr(os, "scandir", lambda path: pytest.fail(f"{path} was read again"))
    assert folder_paths.get_filename_list("vae") == first


def test_a_returned_listing_may_be_changed(host, tmp_path):
    touch(tmp_path / "models" / "vae" / "a.sft")
    folder_paths.get_filename_list("vae").clear()
    assert folder_paths.get_filename_list("vae") == ["a.sft"]


def test_links_in_a_circle_end(host, tmp_path):
    folder = tmp_path / "models" / "vae"
    touch(folder / "a.sft")
    (folder / "loop").symlink_to(folder, target_is_directory=True)
    (folder / "self").symlink_to(folder / "self")
    assert "a.sft" in folder_paths.get_filename_list("vae")
    assert len(folder_paths.get_filename_list("vae")) == 1


def test_models_may_be_links_to_elsewhere(host, tmp_path):
    weights = tmp_path / "elsewhere" / "big.safetensors"
    touch(weights)
    folder = tmp_path / "models" / "vae"
    folder.mkdir(parents=True)
    (folder / "link.safetensors").symlink_to(weights)
    (folder / "shared").symlink_to(weights.parent, target_is_directory=True)
    assert folder_paths.get_filename_list("vae") == ["link.safetensors", os.path.join("shared", "big.safetensors")]
    assert folder_paths.get_full_path("vae", "link.safetensors") == str(folder / "link.safetensors")
    assert folder_paths.get_full_path("vae", "shared/big.safetensors") == str(folder / "shared" / "big.safetensors")


def test_missing_files_and_kinds_say_so(host, tmp_path):
    assert folder_paths.get_full_path("vae", "no.sft") is None
    assert folder_paths.get_full_path("no such kind", "no.sft") is None
    with pytest.raises(FileNotFoundError, match=r"^Model in folder 'vae' with filename 'no\.sft' not found\.$"):
        folder_paths.get_full_path_or_raise("vae", "no.sft")
    with pytest.raises(KeyError, match="checkpoints"):
        folder_paths.get_filename_list("no such kind")
    (tmp_path / "models" / "vae").mkdir(parents=True)
    (tmp_path / "models" / "vae" / "dangling.sft").symlink_to(tmp_path / "gone")
    assert folder_paths.get_full_path("vae", "dangling.sft") is None


def test_added_folders_keep_their_order(host):
    folder_paths.add_model_folder_path("mine", "/b")
    folder_paths.add_model_folder_path("mine", "/a", is_default=True)
    folder_paths.add_model_folder_path("mine", "/c")
    folder_paths.add_model_folder_path("mine", "/c")
    assert folder_paths.get_folder_paths("mine") == ["/a", "/b", "/c"]
    folder_paths.add_model_folder_path("mine", "/c", is_default=True)
    assert folder_paths.get_folder_paths("mine") == ["/c", "/a", "/b"]
    folder_paths.add_model_folder_path("clip", "/t")
    assert folder_paths.get_folder_paths("text_encoders")[-1] == "/t"


def test_a_kind_added_by_a_pack_takes_every_file(host, tmp_path):
    touch(tmp_path / "packs" / "odd.xyz")
    folder_paths.add_model_folder_path("odd", str(tmp_path / "packs"))
    assert folder_paths.get_filename_list("odd") == ["odd.xyz"]
    host.paths.folder_names_and_paths["odd"][1].add(".abc")
    assert folder_paths.get_filename_list("odd") == []


def test_annotated_names(host):
    paths = host.paths
    assert folder_paths.annotated_filepath("cat.png") == ("cat.png", None)
    for kind in ("input", "output", "temp"):
        folder = folder_paths.get_directory_by_type(kind)
        assert folder_paths.annotated_filepath(f"cat.png [{kind}]") == ("cat.png", folder)
        assert folder_paths.get_annotated_filepath(f"a/cat.png [{kind}]") == os.path.join(folder, "a", "cat.png")
    assert folder_paths.get_annotated_filepath("cat.png") == os.path.join(paths.input_directory, "cat.png")
    assert folder_paths.get_annotated_filepath("cat.png", "/other") == os.path.join("/other", "cat.png")
    assert folder_paths.get_directory_by_type("user") is None
    assert folder_paths.get_directory_by_type("__class__") is None


def test_module_variables_and_setters_are_the_current_hosts(host, tmp_path):
    assert folder_paths.models_dir == os.path.join(str(tmp_path), "models")
    assert folder_paths.folder_names_and_paths is host.paths.folder_names_and_paths
    for kind in ("input", "output", "temp", "user"):
        getattr(folder_paths, f"set_{kind}_directory")(str(tmp_path / "new" / kind))
        assert getattr(folder_paths, f"get_{kind}_directory")() == str(tmp_path / "new" / kind)
        assert getattr(folder_paths, f"{kind}_directory") == str(tmp_path / "new" / kind)
    with pytest.raises(AttributeError):
        folder_paths.no_such_name  # noqa: B018


def test_two_hosts_do_not_mix(tmp_path):
    hosts = [Host(paths=FolderPaths(tmp_path / name), registry=None, memory=None) for name in "ab"]
    with use_host(hosts[0]):
        folder_paths.add_model_folder_path("vae", "/only/a")
        with use_host(hosts[1]):
            assert "/only/a" not in folder_paths.get_folder_paths("vae")
            assert folder_paths.base_path == str(tmp_path / "b")
        assert "/only/a" in folder_paths.get_folder_paths("vae")


def test_nothing_is_created_before_it_is_needed(tmp_path):
    FolderPaths(tmp_path / "fresh").get_filename_list("vae")
    assert not (tmp_path / "fresh").exists()


def test_content_types(host):
    names = ["a.png", "b.jpeg", "c.webp", "d.txt", "e.mp4", "f", "g.flac", "h.fbx", "i.png.part"]
    assert folder_paths.filter_files_content_types(names, ["image"]) == ["a.png", "b.jpeg", "c.webp"]
    assert folder_paths.filter_files_content_types(names, ["video", "audio", "model"]) == ["e.mp4", "g.flac", "h.fbx"]


def test_input_subfolders(host, tmp_path):
    (tmp_path / "input" / "b" / "c").mkdir(parents=True)
    (tmp_path / "input" / "a").mkdir()
    assert folder_paths.get_input_subfolders() == ["a", "b", "b/c"]


# Save paths


def test_the_counter_follows_the_highest(host):
    folder = host.paths.output_directory
    assert folder_paths.get_save_image_path("pic", folder) == (os.path.join(folder, ""), "pic", 1, "", "pic")
    for name in (
        "pic_00004_.png",
        "pic_00002_.webp",
        "picture_00090_.png",
        "pic_x_.png",
        "pic_00007.png",
        "other_00050_.png",
        "pic_٣_.png",
    ):
        open(os.path.join(folder, name), "w").close()
    assert folder_paths.get_save_image_path("pic", folder)[2] == 5


def test_a_counter_too_long_for_a_number_is_ignored(host):
    folder = host.paths.output_directory
    open(os.path.join(folder, f"pic_{'9' * 200}_.png"), "w").close()
    assert folder_paths.get_save_image_path("pic", folder)[2] == 1


def test_subfolders_are_made_and_variables_filled_in(host, monkeypatch):
    fixed = time.struct_time((2031, 2, 3, 4, 5, 6, 0, 34, 0))
    monkeypatch.setattr(time, "localtime", lambda: fixed)
    root = host.paths.output_directory
    prefix = "%year%-%month%-%day%/%hour%%minute%%second%_%width%x%height%_%unknown%"
    folder, name, counter, subfolder, filled = folder_paths.get_save_image_path(prefix, root, 64, 48)
    assert (folder, name, counter, subfolder) == (os.path.join(root, "2031-02-03"), "040506_64x48_%unknown%", 1, "2031-02-03")
    assert filled == "2031-02-03/040506_64x48_%unknown%"
    assert os.path.isdir(folder)


def test_backslashes_separate_folders_on_every_system(host):
    assert folder_paths.get_save_image_path("a\\b", host.paths.output_directory)[1:4] == ("b", 1, "a")


def test_a_linked_output_folder_works_and_a_link_out_of_it_does_not(host, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "linked").symlink_to(tmp_path / "disk", target_is_directory=True)
    folder_paths.get_save_image_path("a/b", str(tmp_path / "linked"))
    assert (tmp_path / "disk" / "a").is_dir()
    (tmp_path / "output" / "out").symlink_to(tmp_path / "disk", target_is_directory=True)
    with pytest.raises(UnsafePathError, match="link"):
        folder_paths.get_save_image_path("out/new/b", str(tmp_path / "output"))
    assert not (tmp_path / "disk" / "new").exists()


@pytest.mark.parametrize("prefix", [*HOSTILE, "con", "a/NUL.txt/b", "com1/x", "lpt9", "aux /x"])
def test_hostile_prefixes_write_nothing(host, tmp_path, prefix):
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UnsafePathError):
        folder_paths.get_save_image_path(prefix, host.paths.output_directory)
    assert sorted(tmp_path.rglob("*")) == before


# Names that must not leave their folder


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_find_nothing(host, tmp_path, name):
    (tmp_path / "x").touch()
    (tmp_path / "models").mkdir(exist_ok=True)
    (tmp_path / "models" / "x").touch()
    assert folder_paths.get_full_path("vae", name) is None
    for annotation in ("", " [input]", " [output]", " [temp]"):
        assert folder_paths.exists_annotated_filepath(name + annotation) is False
        with pytest.raises(UnsafePathError):
            folder_paths.get_annotated_filepath(name + annotation)


@pytest.mark.parametrize("name", [None, 3, b"a", ["a"], {"a": 1}])
def test_a_name_that_is_no_text_is_refused(tmp_path, name):
    with pytest.raises(UnsafePathError, match="text"):
        checked_path(tmp_path, name)


def test_links_are_followed_before_the_check(host, tmp_path):
    (tmp_path / "secret.txt").touch()
    (tmp_path / "input" / "a.png").symlink_to(tmp_path / "secret.txt")
    (tmp_path / "input" / "up").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "input" / "real.png").touch()
    (tmp_path / "input" / "inner.png").symlink_to(tmp_path / "input" / "real.png")
    for name in ("a.png", "up/secret.txt"):
        with pytest.raises(UnsafePathError, match="link"):
            folder_paths.get_annotated_filepath(name)
    assert folder_paths.exists_annotated_filepath("inner.png")


def test_a_folder_whose_name_begins_alike_is_not_inside(tmp_path):
    assert not is_inside(str(tmp_path / "out"), str(tmp_path / "output" / "a"))
    assert is_inside(str(tmp_path / "out"), str(tmp_path / "out"))


def test_random_names_never_leave_the_folder(tmp_path):
    """Whatever pieces a name is glued from: it is refused, or what it means lies inside, links and all."""
    root = tmp_path / "root"
    (root / "a" / "b").mkdir(parents=True)
    (root / "out").symlink_to(tmp_path, target_is_directory=True)
    (root / "back").symlink_to(root / "a", target_is_directory=True)
    pieces = [
        "..",
        ".",
        "a",
        "b",
        "out",
        "back",
        "/",
        "\\",
        "//",
        "ü",
        "名",
        "con",
        "nul.",
        "C:",
        " ",
        "~",
        "%2e%2e",
        "\0",
        "\u202e",
        "x" * 300,
        "[input]",
        "\ud83d",
    ]
    draw = random.Random(7)
    allowed = 0
    for _ in range(4000):
        name = "".join(draw.choices(pieces, k=draw.randint(1, 7)))
        for writing in (False, True):
            try:
                path = checked_path(root, name, for_writing=writing)
            except UnsafePathError:
                continue
            allowed += 1
            assert os.path.realpath(path).startswith(os.path.realpath(root)), ascii(name)
            assert is_inside(str(root), path)
    assert allowed > 200  # the gate is not simply shut


def test_random_names_through_the_public_functions(host, tmp_path):
    draw = random.Random(11)
    alphabet = "ab./\\[]:%~ \0\n\ud800é名" + "inputoutputtemp"
    for _ in range(1500):
        name = "".join(draw.choices(alphabet, k=draw.randint(0, 40)))
        assert folder_paths.get_full_path("vae", name) is None
        assert folder_paths.exists_annotated_filepath(name) in (True, False)
        try:
            folder = folder_paths.get_save_image_path(name, host.paths.output_directory)[0]
        except (UnsafePathError, OSError):
            continue
        assert is_inside(host.paths.output_directory, folder)
    assert {path.name for path in tmp_path.iterdir()} <= {"input", "output", "temp"}
