"""What the interface asks about nodes, packs, models and itself; every route under both of its paths."""

from __future__ import annotations

import pytest


def test_object_info_describes_core_nodes_ours_and_those_of_packs(server):
    everything = server.get("/object_info").json()
    assert everything["SaveImage"]["python_module"] == "nodes" and everything["SaveImage"]["output_node"] is True
    assert everything["RectiflowLoadTiny"]["python_module"] == "custom_nodes.rectiflow"
    value = everything["TestingValue"]
    assert value["python_module"] == "custom_nodes.testing_pack" and value["display_name"] == "A Value for Tests"
    assert (
        value["input"]["required"]["value"] == ["INT", {"default": 0, "min": -100, "max": 100000}]
        and value["input"]["optional"]["after"][0] == "*"
    )
    assert server.get("/api/object_info/TestingValue").json() == {"TestingValue": value}
    assert server.get("/object_info/Unknown").json() == {}


@pytest.mark.parametrize(
    "path",
    ["/users", "/settings", "/extensions", "/object_info", "/prompt", "/queue", "/history", "/system_stats", "/features", "/embeddings",
     "/models", "/models/checkpoints", "/experiment/models", "/experiment/models/loras", "/workflow_templates", "/i18n",
     "/global_subgraphs", "/node_replacements", "/v2/userdata"],
)  # fmt: skip
def test_every_route_stands_under_api_too(server, path):
    plain, prefixed = server.get(path), server.get(f"/api{path}")
    assert plain.status == prefixed.status == 200 and plain.headers["content-type"] == "application/json; charset=utf-8"
    if path != "/system_stats":
        assert plain.body == prefixed.body
    assert type(plain.json()) in (dict, list)


def test_system_stats_has_every_field(server):
    stats = server.get("/system_stats").json()
    assert set(stats["system"]) == {
        "os", "ram_total", "ram_free", "comfyui_version", "required_frontend_version", "installed_templates_version",
        "required_templates_version", "python_version", "pytorch_version", "embedded_python", "argv",
    }  # fmt: skip
    assert set(stats["devices"][0]) == {"name", "type", "index", "vram_total", "vram_free", "torch_vram_total", "torch_vram_free"}
    assert stats["devices"][0]["type"] == "cpu" and 0 < stats["system"]["ram_free"] <= stats["system"]["ram_total"]


def test_packs_bring_scripts_help_templates_and_translations(server):
    extensions = server.get("/extensions").json()
    assert "/extensions/testing_pack/js/testing.js" in extensions
    script = server.get("/extensions/testing_pack/js/testing.js")
    assert script.headers["content-type"] == "text/javascript; charset=utf-8" and script.headers["cache-control"] == "no-cache"
    assert server.get("/extensions/testing_pack/docs/TestingValue.md").body.startswith(b"# A page of help")
    assert server.get("/extensions/testing_pack/docs/TestingValue/en.md").status == 404
    assert server.get("/extensions/rectiflow/docs/RectiflowLoadTiny.md").status == 200
    templates = server.get("/workflow_templates").json()
    assert templates["testing_pack"] == ["an_example"] and "text_to_image" in templates["rectiflow"]
    assert server.get("/api/workflow_templates/testing_pack/an_example.json").json()["version"] == 0.4
    assert server.get("/api/workflow_templates/rectiflow/text_to_image.json").json()["nodes"]
    assert server.get("/i18n").json()["en"]["nodeDefs"]["TestingValue"]["display_name"] == "Translated Value"
    assert server.get("/testing/ping").json()["pong"] and server.get("/api/testing/ping").status == 200


@pytest.mark.parametrize(
    "path",
    ["/extensions/testing_pack/../__init__.py", "/extensions/testing_pack/%2e%2e/__init__.py", "/%2e%2e/%2e%2e/etc/passwd",
     "/..%2f..%2fetc/passwd", "/api/workflow_templates/testing_pack/..%2F__init__.py", "/extensions/unknown/x.js",
     "/nothing", "/api/nothing", "/assets",
     "/templates/x.webp", "/models/unknown",
     "/experiment/models/unknown", "/experiment/models/preview/loras/0/..%2fx",
     "/experiment/models/preview/loras/999/x",
     "/view_metadata/loras?filename=..%2fx.safetensors", "/view_metadata/loras"],
)  # fmt: skip
def test_unknown_and_escaping_paths_are_404_without_a_body(server, path):
    answer = server.get(path)
    assert answer.status == 404 and answer.body == b""


def test_the_interface_is_served_with_its_headers(server):
    page = server.get("/")
    if b"<!doctype html>" not in page.body.lower():
        pytest.skip("comfyui-frontend-package is not installed")
    assert page.headers["content-type"] == "text/html; charset=utf-8" and page.headers["cache-control"] == "no-cache"
    assert page.headers["pragma"] == "no-cache" and page.headers["expires"] == "0"
    assert server.get("/templates/index.json").json() == []
    core = next(name for name in server.get("/extensions").json() if name.startswith("/extensions/core/"))
    assert server.get(core).status == 200


def test_pictures_are_cached_for_a_day_and_absent_ones_for_an_hour(server):
    server.upload("/upload/image", b"x", "cached.png")
    assert "cache-control" not in server.get("/view?filename=cached.png&type=input").headers  # the path has no picture's name
    assert server.get("/absent.png").headers["cache-control"] == "public, max-age=3600"


def test_model_lists_and_metadata(server):
    folder = server.folder / "models" / "loras" / "sub"
    folder.mkdir(parents=True, exist_ok=True)
    header = b'{"__metadata__": {"title": "x"}}'
    (folder / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    (folder / "b.safetensors").write_bytes(b"\xff" * 40)
    (folder / "notes.txt").write_text("x")
    files = server.get("/experiment/models/loras").json()
    assert [file["name"] for file in files] == ["sub/a.safetensors", "sub/b.safetensors"] and files[0]["pathIndex"] == 0
    assert server.get("/models/loras").json() == ["sub/a.safetensors", "sub/b.safetensors"]
    assert server.get("/view_metadata/loras?filename=sub/a.safetensors").json() == {"title": "x"}
    assert server.get("/view_metadata/loras?filename=sub/b.safetensors").status == 404
    assert "checkpoints" in server.get("/models").json() and server.get("/internal/folder_paths").json()["loras"]


def test_model_previews(server):
    from io import BytesIO

    from PIL import Image

    folder = server.folder / "models" / "loras"
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4)).save(folder / "seen.preview.png")
    answer = server.get("/experiment/models/preview/loras/0/seen.safetensors")
    assert answer.headers["content-type"] == "image/webp" and Image.open(BytesIO(answer.body)).size == (4, 4)
    assert server.get("/experiment/models/preview/loras/0/unseen.safetensors").status == 404
