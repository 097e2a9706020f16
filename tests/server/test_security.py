"""Foreign origins and names are turned away, and large bodies before they are read."""

from __future__ import annotations

import socket

import pytest
from rectiflow.tests.server.graphs import show
from rectiflow.tests.server.process import ServerProcess


def local(server, **headers: str):
    return server.get("/queue", **{name.replace("_", "-"): value for name, value in headers.items()})


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://127.0.0.1:{port}", 200), ("https://evil.example", 403), ("http://127.0.0.1:1", 403), ("http://localhost:{port}", 403),
        ("null", 403), ("http://127.0.0.1", 200), ("garbage", 403), ("http://[broken", 403),
    ],
)  # fmt: skip
def test_pages_of_other_origins_are_refused(server, origin, status):
    origin = origin.format(port=server.port)
    assert local(server, Origin=origin).status == status
    assert server.post("/prompt", {"prompt": show()}, Origin=origin).status == status
    assert server.request("OPTIONS", "/prompt", headers={"Origin": origin}).status == status


def test_a_websocket_of_another_origin_is_refused(server):
    upgrade = {
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA==",
        "Sec-WebSocket-Version": "13",
    }
    assert server.get("/ws", Origin="https://evil.example", **upgrade).status == 403
    assert server.get("/ws").status == 400


@pytest.mark.parametrize(
    ("host", "status"), [("localhost", 200), ("127.0.0.1:99", 200), ("[::1]:8188", 200), ("evil.example", 403), ("a.localhost", 200)]
)
def test_foreign_host_names_on_loopback_are_refused(server, host, status):
    assert local(server, Host=host).status == status


def test_requests_across_sites_may_only_follow_links(server):
    assert local(server, Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="cors").status == 403
    assert server.post("/interrupt", **{"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}).status == 403
    assert server.get("/", **{"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}).status == 200
    assert local(server, Sec_Fetch_Site="same-origin").status == 200


def test_cors_flag_replaces_the_guard(tmp_path):
    with ServerProcess(tmp_path, "--enable-cors-header", "https://app.example", pack=None) as server:
        answer = local(server, Origin="https://app.example", Host="elsewhere")
        assert answer.status == 200 and answer.headers["access-control-allow-origin"] == "https://app.example"
        assert server.request("OPTIONS", "/prompt").status == 200


def raw(server, request: bytes, then: bytes = b"") -> bytes:
    """Send bytes and return the first part of the answer."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(request)
        if then:
            connection.sendall(then)
        return connection.recv(4096)


def head(path: str, *lines: str) -> bytes:
    return "\r\n".join([f"POST {path} HTTP/1.1", "Host: 127.0.0.1", *lines, "", ""]).encode()


@pytest.mark.parametrize("path", ["/upload/image", "/userdata/a.json", "/settings", "/queue", "/api/prompt"])
def test_a_declared_large_body_is_413_before_a_byte_of_it_is_sent(server, path):
    assert raw(server, head(path, f"Content-Length: {200 * 1024**2}")).startswith(b"HTTP/1.1 413")
    assert raw(server, head(path, f"Content-Length: {200 * 1024**2}", "Expect: 100-continue")).startswith(b"HTTP/1.1 413")


def test_a_client_that_asks_first_is_told_to_go_on(server):
    body = b'{"clear": false}'
    assert raw(server, head("/queue", f"Content-Length: {len(body)}", "Expect: 100-continue"), body).startswith(b"HTTP/1.1 100")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A server that takes bodies of one megabyte, behind a proxy that names it, with compressed answers."""
    flags = ("--max-upload-size", "1", "--trusted-host", "comfy.example", "--enable-compress-response-body")
    with ServerProcess(tmp_path_factory.mktemp("small"), *flags, pack=None) as server:
        yield server


def test_a_trusted_name_is_let_in_and_answers_are_compressed(small):
    assert local(small, Host="comfy.example").status == 200 and local(small, Host="other.example").status == 403
    assert local(small, Accept_Encoding="gzip").headers["content-encoding"] == "gzip"
    assert "content-encoding" not in local(small).headers


def test_a_body_without_a_length_is_counted_while_it_is_read(small):
    before = small.resident_bytes()
    chunk = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
    with socket.create_connection(("127.0.0.1", small.port), timeout=20) as connection:
        connection.sendall(head("/userdata/a.json", "Transfer-Encoding: chunked"))
        try:
            for _ in range(20):
                connection.sendall(chunk)
            answer = connection.recv(4096)
        except ConnectionError:
            answer = b""
    assert answer == b"" or answer.startswith(b"HTTP/1.1 413")
    assert not (small.folder / "user" / "default" / "a.json").exists() and small.resident_bytes() - before < 8 * 1024**2
    assert small.post("/userdata/a.json", b"x" * 2**20).status == 200
    assert small.post("/userdata/a.json", b"x" * (2**20 + 1)).status == 413
    assert small.get("/features").json()["max_upload_size"] == 2**20
