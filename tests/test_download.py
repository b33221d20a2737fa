"""Downloads against a real server on the loopback address that drops, stalls, lies and redirects."""
import hashlib
import http.server
import os
import threading
import time

import pytest

from data import download


class Server(http.server.ThreadingHTTPServer):
    """Serves `files` (path -> bytes). `drop[path] = n`: the next n answers break off in the middle."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.drop, self.status, self.redirect, self.requests = {}, {}, {}, {}, []
        self.ranges, self.stall = True, set()
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        server, path = self.server, self.path.partition("?")[0]
        server.requests.append((path, self.headers.get("Range"), self.headers.get("Authorization")))
        if path in server.redirect:
            self.send_response(302)
            self.send_header("Location", server.redirect[path])
            self.end_headers()
            return
        if server.status.get(path):
            self.send_error(server.status[path].pop(0))
            return
        if path not in server.files:
            self.send_error(404)
            return
        body, start = server.files[path], 0
        if server.ranges and self.headers.get("Range"):
            start = int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
            if start >= len(body):
                self.send_error(416)
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        else:
            self.send_response(200)
        rest = body[start:]
        self.send_header("Content-Length", str(len(rest)))
        self.end_headers()
        if server.drop.get(path, 0) > 0:
            server.drop[path] -= 1
            rest = rest[: len(rest) // 2]  # closing early is what a dropped connection looks like
        if path in server.stall:
            server.stall.remove(path)
            self.wfile.write(rest[: len(rest) // 2])
            time.sleep(1)
            return
        self.wfile.write(rest)


@pytest.fixture
def server():
    server = Server()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(download, "BACKOFF_S", 0.001)
    monkeypatch.delenv("HF_TOKEN", raising=False)


def sha(data):
    return hashlib.sha256(data).hexdigest()


BODY = bytes(range(256)) * 9000  # 2.3 MB: more than one chunk


def test_dropped_connections_resume_where_they_broke(server, tmp_path):
    server.files["/a"], server.drop["/a"] = BODY, 8  # more drops than attempts: each brought some bytes
    path = download.download(server.url + "/a", tmp_path / "a", sha(BODY), len(BODY))
    assert path.read_bytes() == BODY
    starts = [int(r.removeprefix("bytes=").rstrip("-")) for _, r, _ in server.requests if r]
    assert len(starts) == 8 and starts == sorted(starts) and 0 <= len(BODY) // 2 - starts[0] < download.CHUNK
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_killed_run_continues_from_its_part_file(server, tmp_path):
    server.files["/a"] = BODY
    (tmp_path / "a.part").write_bytes(BODY[:1_000_000])
    assert download.download(server.url + "/a", tmp_path / "a", sha(BODY)).read_bytes() == BODY
    assert server.requests == [("/a", "bytes=1000000-", None)]


@pytest.mark.parametrize("part", [BODY, BODY + b"more"], ids=["complete", "too long"])
@pytest.mark.parametrize("size", [None, len(BODY)])
def test_a_part_file_with_nothing_left_to_fetch(server, tmp_path, part, size):
    server.files["/a"] = BODY
    (tmp_path / "a.part").write_bytes(part)
    assert download.download(server.url + "/a", tmp_path / "a", sha(BODY), size).read_bytes() == BODY


def test_a_server_that_ignores_ranges_is_read_from_the_start(server, tmp_path):
    server.files["/a"], server.drop["/a"], server.ranges = BODY, 1, False
    assert download.download(server.url + "/a", tmp_path / "a", sha(BODY)).read_bytes() == BODY


def test_a_damaged_part_file_is_fetched_anew(server, tmp_path):
    server.files["/a"] = BODY
    (tmp_path / "a.part").write_bytes(b"x" * 1000)
    assert download.download(server.url + "/a", tmp_path / "a", sha(BODY)).read_bytes() == BODY


def test_a_wrong_checksum_is_refused_and_nothing_stays(server, tmp_path):
    server.files["/a"] = BODY
    with pytest.raises(ValueError, match=f"cannot download .*/a: .*{sha(BODY)}, expected .*{'0' * 64}"):
        download.download(server.url + "/a", tmp_path / "a", "0" * 64)
    assert len(server.requests) == download.ATTEMPTS and not list(tmp_path.iterdir())


def test_a_wrong_size_is_refused(server, tmp_path):
    server.files["/a"] = BODY
    with pytest.raises(ValueError, match="of 9,999,999 bytes"):
        download.download(server.url + "/a", tmp_path / "a", None, 9_999_999)
    assert not (tmp_path / "a").exists()


def test_a_busy_server_is_tried_again_and_a_missing_file_is_not(server, tmp_path):
    server.files["/a"], server.status["/a"] = BODY, [503, 429, 500]
    assert download.download(server.url + "/a", tmp_path / "a").read_bytes() == BODY
    assert len(server.requests) == 4
    with pytest.raises(ValueError, match="HTTP 404"):
        download.download(server.url + "/b", tmp_path / "b")
    assert len(server.requests) == 5


def test_a_silent_server_counts_as_dropped(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT_S", 0.2)
    server.files["/a"], server.stall = BODY, {"/a"}
    assert download.download(server.url + "/a", tmp_path / "a", sha(BODY)).read_bytes() == BODY
    assert [r for _, r, _ in server.requests] == [None, f"bytes={len(BODY) // 2 // download.CHUNK * download.CHUNK}-"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, where every write finds the disk full")
def test_a_full_disk_is_not_tried_again(server, tmp_path):
    server.files["/a"] = BODY
    (tmp_path / "a.part").symlink_to("/dev/full")
    with pytest.raises(OSError, match="a.part: No space left on device"):
        download.download(server.url + "/a", tmp_path / "a", sha(BODY))
    assert len(server.requests) == 1


@pytest.mark.parametrize("body", [b"<html>log in</html>", b"{}", b'[{"path": "a"}]', b'["a"]', b"[]",
                                  b'[{"path": "../../../a.parquet", "size": 1}, {"path": "/a.parquet", "size": 1}]'])
def test_a_server_that_is_no_hub_is_refused(server, tmp_path, monkeypatch, body):
    pytest.importorskip("pyarrow", reason="checked before the hub is asked: pip install pyarrow")
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    server.files["/api/datasets/a/b/tree/main"] = body
    with pytest.raises(ValueError, match="HF_ENDPOINT|no parquet file"):
        download.hub_shards("a/b", "", tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", "file:///etc")
    with pytest.raises(ValueError, match="HF_ENDPOINT='file:///etc' is no address"):
        download.hub_shards("a/c", "", tmp_path)


def test_a_local_copy_needs_no_network(tmp_path):
    (tmp_path / "a").write_bytes(b"here")
    assert download.download("http://127.0.0.1:9/a", tmp_path / "a", size=4).read_bytes() == b"here"


def test_without_a_network_one_line_names_the_data_sets_that_need_none(tmp_path):
    with pytest.raises(ValueError) as caught:
        download.download("http://127.0.0.1:9/a", tmp_path / "a")  # nobody listens on the discard port
    assert "data/stdlib" in str(caught.value) and "data/text" in str(caught.value) and "\n" not in str(caught.value)


def test_the_token_goes_to_the_hub_and_to_nobody_else(server, tmp_path, monkeypatch):
    storage = Server()
    try:
        storage.files["/blob"], server.redirect["/a"] = BODY, storage.url + "/blob"
        server.files["/b"] = storage.files["/b"] = BODY
        monkeypatch.setenv("HF_ENDPOINT", server.url + "/")
        monkeypatch.setenv("HF_TOKEN", "hf_secret\n")
        for i, url in enumerate((server.url + "/a", server.url + "/b", storage.url + "/b")):
            assert download.download(url, tmp_path / str(i)).read_bytes() == BODY
        assert [(p, a) for p, _, a in server.requests] == [("/a", "Bearer hf_secret"), ("/b", "Bearer hf_secret")]
        assert [(p, a) for p, _, a in storage.requests] == [("/blob", None), ("/b", None)]
    finally:
        storage.shutdown()
        storage.server_close()


def test_no_message_shows_the_token(server, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    for token, status in (("hf_secret", [401]), ("hf_secret", [403]), ("hf_se\ncret", []), ("hf_secret", [500] * 9)):
        monkeypatch.setenv("HF_TOKEN", token)
        server.files["/a"], server.status["/a"] = BODY, status
        with pytest.raises(ValueError) as caught:
            download.download(server.url + "/a", tmp_path / "a")
        assert "cret" not in str(caught.value)
        assert "HF_TOKEN" in str(caught.value) or "500" in str(caught.value)
