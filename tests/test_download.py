"""Downloads from a hub on the loopback address, which answers what huggingface_hub asks, and drops, lies and refuses."""
import hashlib
import http.server
import json
import threading
from urllib.parse import unquote

import pytest

import test_prepare
from data.shakespeare_char import prepare as shakespeare
from test_prepare import parquet, story, texts

COMMIT = "c0ffee" * 6 + "cafe"


class Server(http.server.ThreadingHTTPServer):
    """Serves `files` (path -> bytes). `drop[path] = n`: the next n answers break off in the middle."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.drop, self.refuse, self.links, self.requests = {}, {}, {}, {}, []
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def close(self):
        self.shutdown()
        self.server_close()


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in (headers | {"Content-Length": len(body)}).items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        return body if self.command == "GET" else b""

    def do_GET(self):
        server, path = self.server, unquote(self.path.partition("?")[0])
        server.requests.append((self.command, path, self.headers.get("Range"), self.headers.get("Authorization")))
        body, start = server.files.get(path), int((self.headers.get("Range") or "0-").removeprefix("bytes=").rstrip("-"))
        if refusal := next((r for prefix, r in server.refuse.items() if path.startswith(prefix)), None):
            status, code, message = refusal
            self.wfile.write(self.answer(status, json.dumps({"error": message}).encode(), X_Error_Code=code, X_Error_Message=message))
        elif path in server.links:
            self.answer(302, **server.links[path])
        elif body is None:
            self.wfile.write(self.answer(404, b'{"error":"Entry not found"}', X_Error_Code="EntryNotFound"))
        else:
            headers = {"Content_Range": f"bytes {start}-{len(body) - 1}/{len(body)}"} if start else {}
            rest = self.answer(206 if start else 200, body[start:], Content_Type="application/json", **headers)
            if rest and server.drop.get(path, 0) > 0:
                server.drop[path] -= 1
                rest = rest[: len(rest) // 2]  # closing early is what a dropped connection looks like
            self.wfile.write(rest)

    do_HEAD = do_GET


class Hub(Server):
    """Lays out data-set repositories as the hub does: a commit, a listing, and large files on another server."""

    def __init__(self):
        super().__init__()
        self.storage = Server()

    def close(self):
        super().close()
        self.storage.close()

    def add(self, repo, files, lie=False, commit=COMMIT):
        listing = [{"type": "directory", "oid": "0" * 40, "size": 0, "path": "data"},
                   {"type": "file", "oid": "0" * 40, "size": 9, "path": "README.md"}]
        for path, data in files.items():
            digest = hashlib.sha256(b"something else" if lie else data).hexdigest()
            listing.append({"type": "file", "oid": "0" * 40, "size": len(data), "path": path,
                            "lfs": {"oid": digest, "size": len(data), "pointerSize": 134}})
            self.storage.files[f"/{repo}/{path}"] = data
            self.links[f"/datasets/{repo}/resolve/{commit}/{path}"] = {
                "Location": f"{self.storage.url}/{repo}/{path}", "X_Repo_Commit": commit,
                "X_Linked_Size": len(data), "X_Linked_ETag": f'"{digest}"'}
        self.files[f"/api/datasets/{repo}/revision/main"] = json.dumps({"id": repo, "sha": commit, "siblings": []}).encode()
        for folder in {"", *(f"/{path.rpartition('/')[0]}" for path in files)}:
            inside = [entry for entry in listing if entry["path"].startswith(folder[1:])]
            self.files[f"/api/datasets/{repo}/tree/{commit}{folder}"] = json.dumps(inside).encode()


@pytest.fixture
def hub():
    pytest.importorskip("huggingface_hub", reason="the hub is asked by it: pip install huggingface_hub")
    hub = Hub()
    yield hub
    hub.close()


@pytest.fixture
def house(tmp_path, monkeypatch):
    """A copy of the code, so that what the scripts download does not land in this one."""
    for file in [test_prepare.ROOT / "configurator.py", *test_prepare.ROOT.glob("data/*.py"),
                 *test_prepare.ROOT.glob("data/*/prepare.py")]:
        copy = tmp_path / "house" / file.relative_to(test_prepare.ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())
    monkeypatch.setattr(test_prepare, "ROOT", tmp_path / "house")
    return tmp_path / "house"


def prepare(name, hub, *flags, **kwargs):
    """As a user with an empty home and a token, who wants bytes for tokens."""
    environment = {"HF_ENDPOINT": hub.url, "HF_HOME": "/nowhere", "HF_TOKEN": "hf_secret"} | kwargs
    printed = test_prepare.prepare(name, "--tokenizer=byte", *flags, **environment)
    assert "cret" not in printed
    return printed


def left(house):
    return sorted(p.name for p in house.rglob("*") if p.name.endswith((".incomplete", ".tmp", ".bin", "meta.json")))


def test_fineweb_through_dropped_connections_and_once_more_without_any(hub, house):
    stories = [story(i) for i in range(300)]
    files = {f"sample/10BT/00{i}_00000.parquet": parquet(stories[100 * i : 100 * i + 100]) for i in range(3)}
    hub.add("HuggingFaceFW/fineweb-edu", files)
    hub.storage.drop = {"/HuggingFaceFW/fineweb-edu/sample/10BT/001_00000.parquet": 2}
    flags = ["--val_fraction=0.1", f"--out={house / 'out'}"]
    prepare("fineweb", hub, *flags)
    assert sorted(texts(house / "out", "train") + texts(house / "out", "val")) == sorted(stories)
    assert left(house) == ["meta.json", "train.bin", "val.bin"]
    assert len(hub.storage.requests) == 3 + 2
    asked = {token for _, path, _, token in hub.requests if "datasets" in path}
    assert asked == {"Bearer hf_secret"} and {token for *_, token in hub.storage.requests} == {None}
    hub.close()
    prepare("fineweb", hub, *flags, "--shards=2")
    assert len(texts(house / "out", "train") + texts(house / "out", "val")) == 200


def test_limit_downloads_only_what_it_reads(hub, house):
    hub.add("Skylion007/openwebtext", {f"plain_text/train-0000{i}-of-00003.parquet":
                                       parquet([story(100 * i + j) for j in range(100)]) for i in range(3)})
    prepare("openwebtext", hub, "--limit=60", "--val_fraction=0.2")
    folder = house / "data" / "openwebtext"
    assert len(texts(folder, "train") + texts(folder, "val")) == 60
    assert len(list((folder / "download").rglob("*.parquet"))) == 1


def test_tinystories_keeps_its_own_validation_split(hub, house):
    train, val = [story(i) for i in range(90)], [story(i) for i in range(90, 100)]
    hub.add("roneneldan/TinyStories", {"data/train-00000-of-00002-a.parquet": parquet(train[:50]),
                                       "data/train-00001-of-00002-b.parquet": parquet(train[50:]),
                                       "data/validation-00000-of-00001-c.parquet": parquet(val)})
    prepare("tinystories", hub, f"--out={house / 'out'}")
    assert texts(house / "out", "train") == train and texts(house / "out", "val") == val
    prepare("tinystories", hub, f"--out={house / 'out'}", "--limit=3")
    assert texts(house / "out", "train") == train[:3] and texts(house / "out", "val") == val[:3]


def test_another_repository_with_the_same_names_is_another(hub, house):
    for repo, first in (("HuggingFaceFW/fineweb-edu", 0), ("HuggingFaceFW/fineweb", 100)):
        stories = [story(i) for i in range(first, first + 50)]
        hub.add(repo, {"sample/10BT/000_00000.parquet": parquet(stories)}, commit=f"{first:040}")
        prepare("fineweb", hub, f"--repo={repo}", "--val_fraction=0.2")
        assert sorted(sum((texts(house / "data/fineweb", split) for split in ("train", "val")), [])) == sorted(stories)


@pytest.mark.parametrize("size", [2, 103])
def test_wikitext_joins_lines_to_articles_in_three_splits(hub, house, size):
    def article(i):
        return ["", f" = Title {i} = \n", "", f" Text of {i} . \n", " = = Section = = \n", f" More = {i} . \n"]
    splits = {"train": range(9), "validation": range(9, 12), "test": range(12, 14)}
    hub.add("Salesforce/wikitext", {f"wikitext-{size}-raw-v1/{name}-00000-of-00001.parquet":
                                    parquet([line for i in which for line in article(i)]) for name, which in splits.items()})
    prepare("wikitext", hub, f"--size={size}", f"--out={house / 'out'}")
    for split, name in (("train", "train"), ("val", "validation"), ("test", "test")):
        assert texts(house / "out", split) == ["".join(article(i)) for i in splits[name]]


def test_a_wrong_checksum_ends_the_run_with_nothing_written(hub, house):
    hub.add("roneneldan/TinyStories", {"data/train-0.parquet": parquet(["a"]), "data/validation-0.parquet": parquet(["b"])}, lie=True)
    error = prepare("tinystories", hub, ok=False)
    assert "validation-0.parquet" in error and "sha256" in error and left(house) == []


REFUSALS = {  # as the hub words them
    "gated": (403, "GatedRepo", "Access to dataset a/b is restricted and you are not in the authorized list.", ["HF_TOKEN", "terms"]),
    "wrong token": (401, "", "Invalid credentials in Authorization header", ["HF_TOKEN", "Invalid credentials"]),
    "no such name": (404, "RepoNotFound", "Repository not found", ["name", "Repository not found"]),
    "out of order": (500, "", "", ["500", "network"]),
}


@pytest.mark.parametrize("status, code, message, words", REFUSALS.values(), ids=REFUSALS)
def test_a_refusal_is_one_line_that_says_what_to_do(hub, house, status, code, message, words):
    hub.refuse["/api/datasets/roneneldan/TinyStories"] = status, code, message
    error = prepare("tinystories", hub, ok=False)
    assert all(word in error for word in [*words, f"{hub.url}/datasets/roneneldan/TinyStories", "data/stdlib", "data/text"]), error
    assert left(house) == []


@pytest.mark.parametrize("body", [b"<html>log in</html>", b"{}", b"[]"])
def test_a_server_that_is_no_hub_is_refused(hub, house, body):
    hub.files["/api/datasets/roneneldan/TinyStories/revision/main"] = body
    assert "HF_ENDPOINT" in prepare("tinystories", hub, ok=False)


def test_a_repository_that_has_moved_its_files(hub, house):
    hub.add("roneneldan/TinyStories", {"data/readme.txt": b"see elsewhere"})
    assert "no parquet file in data" in prepare("tinystories", hub, ok=False)


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9", "file:///etc"])  # nobody listens on the discard port
def test_without_a_network_the_line_names_what_works_without(hub, house, endpoint):
    error = prepare("tinystories", hub, HF_ENDPOINT=endpoint, ok=False)
    assert "data/stdlib" in error and "data/text" in error and "HF_ENDPOINT" in error and left(house) == []


def test_a_token_that_no_header_takes_is_not_shown(hub, house):
    for token in ("hf_se\acret", "hf_sécret"):
        assert "HF_TOKEN" in prepare("tinystories", hub, HF_TOKEN=token, ok=False)


@pytest.mark.parametrize("package", ["pyarrow", "huggingface_hub"])
def test_without_its_packages_nothing_is_downloaded(hub, house, package):
    (house / f"{package}.py").write_text(f"raise ModuleNotFoundError(\"No module named '{package}'\")\n")
    error = prepare("tinystories", hub, ok=False)
    assert package in error and "pip install huggingface_hub pyarrow" in error and hub.requests == []


# --- tinyshakespeare, a plain file ---

def test_shakespeare_is_downloaded_once(tmp_path, monkeypatch):
    server, play = Server(), "Speak — naïve 猫.\r\n".encode() * 100
    monkeypatch.setattr(shakespeare, "URL", server.url + "/input.txt")
    try:
        with pytest.raises(ValueError, match="404.*--input=FILE.*data/stdlib"):
            shakespeare.shakespeare("", tmp_path)
        server.files["/input.txt"] = play
        with pytest.raises(ValueError, match="sha256.*--input=FILE"):
            shakespeare.shakespeare("", tmp_path)
        assert not list(tmp_path.iterdir())
        monkeypatch.setattr(shakespeare, "SHA256", hashlib.sha256(play).hexdigest())
        for _ in range(2):
            assert "".join(text for _, text in shakespeare.shakespeare("", tmp_path)) == play.decode()
        assert len(server.requests) == 3 and [p.name for p in tmp_path.iterdir()] == ["input.txt"]
        server.drop["/input.txt"] = 1
        with pytest.raises(ValueError, match="cannot download"):
            shakespeare.shakespeare("", tmp_path / "elsewhere")
    finally:
        server.close()
