"""/view, /upload, /userdata, /settings, /users: what is stored and read, and that no path leads out."""

from __future__ import annotations

import json
import os
from io import BytesIO
from urllib.parse import quote

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from rectiflow.tests.server.graphs import picture
from rectiflow.tests.server.process import ServerProcess


def png(colour=(255, 0, 0, 128), size=(8, 6), **texts: str) -> bytes:
    info = PngInfo()
    for key, text in texts.items():
        info.add_text(key, text)
    target = BytesIO()
    Image.new("RGBA", size, colour).save(target, format="PNG", pnginfo=info)
    return target.getvalue()


# -- pictures


def test_saved_pictures_carry_their_graph(server):
    workflow = {"id": "w", "nodes": []}
    entry = server.finished(server.queue(picture(1, "graphs/with_graph"), extra_data={"extra_pnginfo": {"workflow": workflow}}))
    file = entry["outputs"]["2"]["images"][0]
    assert file == {"filename": "with_graph_00001_.png", "subfolder": "graphs", "type": "output"}
    answer = server.get(f"/api/view?filename={file['filename']}&subfolder=graphs&type=output&rand=0.5")
    assert answer.headers["content-type"] == "image/png" and answer.headers["content-disposition"] == 'filename="with_graph_00001_.png"'
    texts = Image.open(BytesIO(answer.body)).text
    assert json.loads(texts["prompt"]) == picture(1, "graphs/with_graph") and json.loads(texts["workflow"]) == workflow
    assert server.get("/internal/files/output").status == 200 and server.get("/internal/files/secret").status == 400


def test_previews_and_channels(server):
    server.upload("/upload/image", png(), "channels.png")
    where = "/view?filename=channels.png&type=input"
    assert server.get(where).body == server.get("/view?filename=channels.png+%5Binput%5D").body == png()

    def read(query: str) -> Image.Image:
        return Image.open(BytesIO(server.get(f"{where}&{query}").body))

    assert read("preview=webp;90").format == "WEBP" and read("preview=jpeg;50").format == "JPEG" and read("preview=tiff").format == "WEBP"
    assert read("preview=jpeg;50&channel=a").format == "WEBP"
    assert read("channel=rgb").mode == "RGB" and read("channel=rgb").getpixel((0, 0)) == (255, 0, 0)
    assert read("channel=a").getpixel((0, 0)) == (0, 0, 0, 128)
    server.upload("/upload/image", b"no picture", "broken.png")
    assert server.get("/view?filename=broken.png&type=input&preview=webp").status == 400
    assert server.get("/view?filename=broken.png&type=input").body == b"no picture"


def test_uploads_reuse_equal_files_and_keep_different_ones(server):
    def upload(content: bytes, **fields: str):
        return server.upload("/upload/image", content, "twice.png", **fields).json()

    assert upload(b"one") == {"name": "twice.png", "subfolder": "", "type": "input"}
    assert upload(b"one")["name"] == "twice.png"
    assert upload(b"two")["name"] == "twice (1).png" and upload(b"two")["name"] == "twice (1).png"
    assert upload(b"three")["name"] == "twice (2).png"
    assert upload(b"four", overwrite="true")["name"] == "twice.png"
    assert server.get("/view?filename=twice.png&type=input").body == b"four"
    assert upload(b"five", subfolder="a/b", type="temp") == {"name": "twice.png", "subfolder": "a/b", "type": "temp"}
    assert server.get("/view?filename=twice.png&type=temp&subfolder=a/b").body == b"five"
    assert not list(server.folder.rglob("*.part"))


def test_a_mask_is_written_into_the_original(server):
    server.upload("/upload/image", png((10, 20, 30, 255), workflow="kept"), "original.png")
    reference = json.dumps({"filename": "original.png", "type": "input", "subfolder": ""})
    answer = server.upload("/upload/mask", png((0, 0, 0, 77)), "masked.png", original_ref=reference, type="input")
    assert answer.json() == {"name": "masked.png", "subfolder": "", "type": "input"}
    merged = Image.open(BytesIO(server.get("/view?filename=masked.png&type=input").body))
    assert merged.getpixel((0, 0)) == (10, 20, 30, 77) and merged.text == {"workflow": "kept"}
    assert server.upload("/upload/mask", png(), "x.png", original_ref='{"filename": "absent.png"}').status == 404
    assert server.upload("/upload/mask", png(), "x.png", original_ref="[").status == 400
    assert server.upload("/upload/mask", b"text", "x.png", original_ref=reference).status == 400


@pytest.fixture
def escape(server):
    """Links in input/ that lead out of it."""
    secret = server.folder / "secret.txt"
    secret.write_text("secret")
    inside = server.folder / "input"
    for name, target in (("link.txt", secret), ("linked", server.folder)):
        if not (inside / name).is_symlink():
            os.symlink(target, inside / name)
    return secret


@pytest.mark.parametrize(
    ("query", "status"),
    [
        ("filename=../secret.txt", 400), ("filename=/etc/passwd", 400), ("filename=%5Cwindows", 400), ("filename=C:%5Cx", 400),
        ("filename=..%5Csecret.txt", 400), ("filename=a%00.png", 400), ("filename=", 400), ("", 404), ("filename=absent.png", 404),
        ("filename=link.txt", 403), ("filename=secret.txt&subfolder=linked", 403), ("filename=secret.txt&subfolder=..", 403),
        ("filename=secret.txt&subfolder=/tmp", 403), ("filename=x.png&subfolder=%00", 403), ("filename=%ff%fe", 404),
    ],
)  # fmt: skip
def test_view_never_leaves_its_folder(server, escape, query, status):
    answer = server.get(f"/view?type=input&{query}")
    assert answer.status == status and b"secret" not in answer.body


def test_unknown_types_are_400(server, escape):
    assert server.get("/view?filename=a.png&type=models").status == 400
    assert server.upload("/upload/image", b"x", "a.png", type="models").status == 400


@pytest.mark.parametrize(
    ("filename", "fields"),
    [
        ("../up.png", {}), ("a.png", {"subfolder": ".."}), ("a.png", {"subfolder": "linked"}), ("a.png", {"subfolder": "..\\.."}),
        ("a.png", {"subfolder": "/tmp"}), ("nul.png", {}), ("linked/up.png", {}), ("..", {}),
    ],
)  # fmt: skip
def test_uploads_never_leave_their_folder(server, escape, filename, fields):
    before = {path for path in server.folder.rglob("*")}
    assert server.upload("/upload/image", b"x", filename, **fields).status == 400
    assert {path for path in server.folder.rglob("*")} == before


def test_uploads_that_are_no_forms(server):
    assert server.post("/upload/image", {"image": "x"}).status == 400
    assert server.post("/upload/image", b"--x", **{"Content-Type": "multipart/form-data; boundary=x"}).status == 400
    assert server.post("/upload/image", b"x", **{"Content-Type": "multipart/form-data"}).status == 400


@pytest.mark.parametrize("ending", ["html", "HTM", "xhtml", "js", "mjs", "css", "svg", "xml", "mhtml"])
def test_active_content_is_never_served_as_such(server, ending):
    name = f"active.{ending}"
    server.upload("/upload/image", b"<script>alert(1)</script>", name)
    server.post(f"/userdata/{name}", b"<script>alert(1)</script>")
    for answer in (server.get(f"/view?filename={name}&type=input"), server.get(f"/userdata/{name}")):
        assert answer.status == 200 and answer.headers["content-type"] == "application/octet-stream"
        assert answer.headers["x-content-type-options"] == "nosniff" and "sandbox" in answer.headers["content-security-policy"]


def test_one_style_sheet_of_the_user_is_served_to_the_interface(server):
    server.post("/userdata/user.css", b"body { color: red }")
    assert server.get("/api/userdata/user.css").headers["content-type"].startswith("text/css")


# -- userdata


def test_userdata_is_written_listed_moved_and_deleted(server):
    name = quote("workflows/my graph (100%).json", safe="")
    assert server.post(f"/api/userdata/{name}", b"{}").json() == "workflows/my graph (100%).json"
    assert server.get(f"/userdata/{name}").body == b"{}"
    assert server.post(f"/userdata/{name}?overwrite=false", b"x").status == 409
    info = server.post(f"/userdata/{name}?full_info=true", b"[1]").json()
    assert info["path"] == "workflows/my graph (100%).json" and info["size"] == 3 and info["modified"] > 1e9
    server.post("/userdata/workflows%2Fdeep%2Fer.json", b"{}")
    assert server.get("/userdata?dir=workflows").json() == ["my graph (100%).json"]
    assert server.get("/userdata?dir=workflows&recurse=true").json() == ["my graph (100%).json", "deep/er.json"]
    assert ["deep/er.json", "deep", "er.json"] in server.get("/userdata?dir=workflows&recurse=true&split=true").json()
    assert [file["path"] for file in server.get("/userdata?dir=workflows&recurse=true&full_info=true&split=true").json()][
        1
    ] == "deep/er.json"
    everything = server.get("/v2/userdata?path=workflows").json()
    assert everything[0] == {"name": "deep", "path": "workflows/deep", "type": "directory"}
    assert {entry["path"] for entry in everything[1:]} == {"workflows/deep/er.json", "workflows/my graph (100%).json"}
    moved = server.post(f"/userdata/{name}/move/{quote('kept/moved.json', safe='')}")
    assert moved.json() == "kept/moved.json" and server.get(f"/userdata/{name}").status == 404
    assert server.post("/userdata/kept%2Fmoved.json/move/workflows%2Fdeep%2Fer.json?overwrite=false").status == 409
    assert server.post("/userdata/absent.json/move/b.json").status == 404
    assert server.request("DELETE", "/userdata/kept%2Fmoved.json").status == 204
    assert server.request("DELETE", "/userdata/kept%2Fmoved.json").status == 404
    assert server.get("/userdata").status == 400 and server.get("/userdata?dir=nothing").status == 404


@pytest.mark.parametrize("name", ["..%2Fother%2Fx.json", "%2Fetc%2Fx", "a%2F..%2F..%2F..%2Fx", "..", "a%00b", "con.json", "..%5Cx"])
def test_userdata_never_leaves_the_users_folder(server, name):
    for method in ("GET", "POST", "DELETE"):
        assert server.request(method, f"/userdata/{name}", b"x" if method == "POST" else None).status in (403, 404)
    server.post("/userdata/mine.json", b"{}")
    assert server.post(f"/userdata/mine.json/move/{name}").status in (403, 404)
    assert server.get("/userdata?dir=..").status == 403 and server.get("/v2/userdata?path=..").status == 400


# -- users and settings


def test_settings_are_merged_one_by_one_whatever_the_content_type(server):
    assert server.post("/settings", {"A.b": 1, "c": [True]}).status == 200
    assert server.post("/api/settings/d", b'"text"', **{"Content-Type": "text/plain"}).status == 200
    settings = server.get("/settings").json()
    assert settings["A.b"] == 1 and settings["c"] == [True] and settings["d"] == "text"
    assert server.get("/settings/d").json() == "text" and server.get("/settings/unknown").json() is None
    assert server.post("/settings", b"[1]").status == 400 and server.post("/settings/e", b"{").status == 400
    assert server.get("/users").json() == {"storage": "server", "migrated": True} and server.post("/users", {"username": "x"}).status == 400


def test_a_restart_keeps_settings_and_graphs_and_survives_a_broken_file(tmp_path):
    with ServerProcess(tmp_path, pack=None) as first:
        assert first.get("/users").json()["migrated"] is False
        first.post("/settings/kept", 5)
        first.post("/userdata/workflows%2Fkept.json", b'{"nodes": []}')
        assert (tmp_path / "temp").is_dir() and first.stop() == 0
    assert not (tmp_path / "temp").exists()
    with ServerProcess(tmp_path, pack=None) as second:
        assert second.get("/settings/kept").json() == 5 and second.get("/userdata/workflows%2Fkept.json").body == b'{"nodes": []}'
        settings = tmp_path / "user" / "default" / "comfy.settings.json"
        settings.write_text("{ broken")
        assert second.get("/settings").json() == {} and settings.with_name("comfy.settings.json.broken").read_text() == "{ broken"
        second.post("/settings/again", 1)
        assert second.get("/settings").json() == {"again": 1}


def test_several_users_have_folders_of_their_own(tmp_path):
    with ServerProcess(tmp_path, "--multi-user", pack=None) as server:
        ann = server.post("/users", {"username": "Ann"}).json()
        assert ann.startswith("Ann_") and server.post("/users", {"username": "Ann"}).json() == {"error": "Duplicate username."}
        server.post("/settings", {"mine": 1}, **{"Comfy-User": ann})
        bob = server.post("/users", {"username": "../Bob"}).json()
        assert "/" not in bob and server.get("/users").json() == {"storage": "server", "users": {ann: "Ann", bob: "../Bob"}}
        assert server.get("/settings", **{"Comfy-User": bob}).json() == {} and server.get("/settings", **{"Comfy-User": ann}).json() == {
            "mine": 1
        }
        assert server.get("/settings").status == 401 and server.get("/userdata?dir=x", **{"Comfy-User": "../default"}).status == 401
