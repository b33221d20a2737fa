"""Where documents come from: URLs, the files of a hub's data-set repository, text files, parquet.

Beside writer.py because the two have nothing in common but their customers, the prepare scripts.
"""
import gzip
import hashlib
import http.client
import json
import os
import re
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import zlib
from contextlib import contextmanager
from pathlib import Path

from data.writer import Progress, explained

ATTEMPTS = 5  # in a row without a byte of progress
BACKOFF_S = 0.5  # doubled at each of them: 0.5 + 1 + 2 + 4 s
OFFLINE = ("Without a network: `python data/stdlib/prepare.py` needs none, and "
           "`python data/text/prepare.py --input=FILE` takes your own text")
MAX_TEXT = 1 << 18  # bytes after which a text file without separators is cut
SEPARATOR = re.compile(rb"<\|endoftext\|>[\r\n]*")


class Interrupted(Exception):
    """A download failed in a way that is worth another attempt."""


def download(url, path, sha256=None, size=None):
    """Path of a complete local copy of `url`; fetched to `path` unless it is there already.

    A file gets its name only after its size and checksum were verified; until then it is `<path>.part`,
    where the next attempt, or the next run, continues. Raises ValueError when it cannot be had.
    """
    path = Path(path)
    if path.exists() and size in (None, path.stat().st_size):
        return path
    part = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    failures, furthest = 0, -1
    while True:
        try:
            _fetch(url, part, sha256, size)
            break
        except Interrupted as error:
            reached = part.stat().st_size if part.exists() else 0
            failures = 1 if reached > furthest else failures + 1
            furthest = max(furthest, reached)
            if failures >= ATTEMPTS:
                raise ValueError(f"cannot download {url}: {error}. {OFFLINE}") from None
            time.sleep(BACKOFF_S * 2 ** (failures - 1))
    os.replace(part, path)
    return path


def _fetch(url, part, sha256, size):
    """Bring `part` to the end and verify it. Raises Interrupted or ValueError."""
    have = part.stat().st_size if part.exists() else 0
    if not have or have != size:
        with _open(url, have) as response:
            resumed = response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
            have = have if resumed else 0  # a server may ignore Range and start again
            length = response.headers.get("Content-Length")
            size = size if size is not None else have + int(length) if length else None
            progress = Progress(size or 0)
            with explained(part), open(part, "ab" if resumed else "wb") as f:
                for chunk in _chunks(response):
                    f.write(chunk)
                    have += len(chunk)
                    progress.done = have
                    progress.show(f"{have / 1e6:,.1f} MB of {part.stem}")
            progress.clear()
    if size is not None and have < size:
        raise Interrupted(f"the connection dropped after {have:,} of {size:,} bytes")
    with open(part, "rb") as f:
        digest = hashlib.file_digest(f, "sha256").hexdigest() if sha256 else None
    if digest != sha256 or size not in (None, have):
        part.unlink()
        raise Interrupted(f"got {have:,} bytes with sha256 {digest}, expected {size:,} bytes with {sha256}"
                              if size else f"got a file with sha256 {digest}, expected {sha256}")


def _open(url, start):
    """The response to a GET from byte `start` on, with HF_TOKEN for the hub and for nobody else."""
    request = urllib.request.Request(url, headers={"User-Agent": "bareGPT"})
    if start:
        request.add_header("Range", f"bytes={start}-")
    token = os.environ.get("HF_TOKEN", "").strip()
    if token and url.startswith(hub() + "/"):
        if not (token.isascii() and token.isprintable()):  # http.client would print it in its complaint
            raise ValueError("HF_TOKEN holds characters that no token has: copy it again")
        # The hub redirects to storage on other hosts; an unredirected header does not go there.
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    try:
        return urllib.request.urlopen(request, timeout=30)
    except urllib.error.HTTPError as error:
        if error.code == 416 and start:  # what lies in the .part is longer than the file: start again
            return _open(url, 0)
        if error.code in (401, 403):
            raise ValueError(f"{url}: access denied (HTTP {error.code}); for a gated data set accept its terms "
                             "on the hub and set HF_TOKEN to a token that may read it") from None
        if error.code not in (408, 429) and error.code < 500:
            raise ValueError(f"{url}: HTTP {error.code} {error.reason}. {OFFLINE}") from None
        raise Interrupted(f"HTTP {error.code} {error.reason}") from None
    except (OSError, http.client.HTTPException) as error:
        raise Interrupted(str(getattr(error, "reason", error)) or type(error).__name__) from None


def _chunks(response):
    """The body; the network's errors become Interrupted, the disk's stay what they are."""
    while True:
        try:
            chunk = response.read(1 << 20)
        except (OSError, http.client.HTTPException) as error:
            raise Interrupted(str(error) or type(error).__name__) from None
        if not chunk:
            return
        yield chunk


def hub():
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def read_text(path, expect_sha256=None):
    """The whole file as text, byte for byte (no newline is translated); a surprising checksum is only said."""
    data = Path(path).read_bytes()
    if not data:
        raise ValueError(f"{path} is empty: name a file with text in it")
    text = decode(data, path)
    if expect_sha256 and hashlib.sha256(data).hexdigest() != expect_sha256:
        print(f"warning: {path} is not the usual copy (its sha256 differs); it is used all the same", file=sys.stderr)
    return text


def decode(data, path, offset=0):
    """`data`, which stands at byte `offset` of `path`, as text; ValueError where it is not UTF-8."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {offset + error.start:,} "
                         f"(0x{data[error.start]:02x}): convert it, for example with iconv -t UTF-8") from None


def hub_shards(repo, folder, into, name="", revision="main"):
    """[(url, local path, sha256, size)] of the parquet files below `folder` of a data-set repository.

    Only those whose file name starts with `name`, in the order of their names. The listing is fetched
    once and kept in `into`, so what was downloaded with a network can be prepared again without one.
    """
    revision = urllib.parse.quote(revision, safe="")
    listing = Path(into) / f"{repo.replace('/', '--')}--{folder.replace('/', '--')}.listing"
    download(f"{hub()}/api/datasets/{repo}/tree/{revision}/{folder}?recursive=true", listing)
    shards = []
    for entry in json.loads(listing.read_bytes()):
        path = Path(entry["path"])
        if path.suffix == ".parquet" and path.name.startswith(name):
            url = f"{hub()}/datasets/{repo}/resolve/{revision}/{urllib.parse.quote(entry['path'])}"
            shards.append((url, Path(into) / path.name, entry.get("lfs", {}).get("oid"), entry["size"]))
    if not shards:
        raise ValueError(f"{hub()}/datasets/{repo} has no parquet file {folder}/{name}*: the data set has moved")
    return sorted(shards, key=lambda shard: shard[1].name)


def fetched(shards, progress):
    """The shards' local paths, each downloaded when its turn comes; `progress` learns the sum of their sizes."""
    progress.total += sum(size for *_, size in shards)
    for shard in shards:
        yield download(*shard)


def documents(paths, progress, key="text"):
    """The texts in `paths` one after another, in constant memory; `progress.done` follows in bytes read.

    .parquet and .jsonl hold one document a row, in the column or field `key`; .txt and .md are divided at
    <|endoftext|>, and where none comes for long at the end of a paragraph; .gz on top of these is undone.
    """
    for path in map(Path, paths):
        start = progress.done
        suffix = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
        if suffix == ".parquet":
            texts = _parquet(path, key)
        else:
            texts = _lines(path, key) if suffix == ".jsonl" else _texts(path)
        for text, position in texts:
            progress.done = start + position
            yield text
        progress.done = start + path.stat().st_size


def _parquet(path, column):
    try:
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise ModuleNotFoundError(f"reading {path} needs pyarrow: pip install pyarrow") from None
    try:
        file = pyarrow.parquet.ParquetFile(path)
        size, rows, row = path.stat().st_size, file.metadata.num_rows, 0
        if column not in file.schema_arrow.names:
            raise ValueError(f"it has no column {column!r}, only {', '.join(file.schema_arrow.names)}")
        for batch in file.iter_batches(batch_size=1024, columns=[column]):
            for text in batch.column(0).to_pylist():
                row += 1
                if text:
                    yield text, size * row // rows
    except (pyarrow.ArrowException, ValueError) as error:
        raise ValueError(f"{path}: {error}; delete it if a download left it damaged") from None


@contextmanager
def _opened(path):
    """The file's bytes, unpacked where it ends in .gz; `tell` below it is in bytes of the file itself."""
    try:
        with open(path, "rb") as raw:
            yield raw, gzip.open(raw) if path.suffix == ".gz" else raw
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: damaged gzip file: {error}") from None


def records(path):
    """(line number, value, bytes read) of each line of a .jsonl file that is not blank."""
    with _opened(path) as (raw, lines):
        offset = 0
        for number, line in enumerate(lines, 1):
            text = decode(line, path, offset)
            offset += len(line)
            if text.strip():
                try:
                    value = json.loads(text)
                    json.dumps(value, ensure_ascii=False).encode("utf-8")  # half a surrogate pair is not text
                except ValueError as error:
                    raise ValueError(f"{path}, line {number:,}: not a line of JSON: {error}") from None
                yield number, value, raw.tell()


def _lines(path, key):
    for number, value, position in records(path):
        if not isinstance(value, dict) or not isinstance(value.get(key), str):
            raise ValueError(f"{path}, line {number:,}: expected an object with a text field {key!r}")
        if value[key]:
            yield value[key], position


def _texts(path):
    """Documents of a text file: what stands between separators, MAX_TEXT bytes at most."""
    with _opened(path) as (raw, file):
        buffer, pos, offset, more = b"", 0, 0, True  # the next document starts at buffer[pos], byte offset + pos
        while more or pos < len(buffer):
            if more and len(buffer) - pos < 2 * MAX_TEXT:
                block = file.read(4 * MAX_TEXT)
                buffer, pos, offset, more = buffer[pos:] + block, 0, offset + pos, bool(block)
                continue
            separator = SEPARATOR.search(buffer, pos, pos + 2 * MAX_TEXT)
            end = separator.start() if separator else len(buffer)
            if end - pos > MAX_TEXT:
                separator, end = None, paragraph_end(buffer, pos, pos + MAX_TEXT)
            text = decode(buffer[pos:end], path, offset + pos)
            pos = separator.end() if separator else end
            if text.strip():
                yield text, raw.tell()


def paragraph_end(buffer, start, limit):
    """Where to cut buffer[start:limit]: behind the last empty line, or line, or whole UTF-8 character."""
    for newline in (b"\n\n", b"\n"):
        if (cut := buffer.rfind(newline, start, limit)) >= 0:
            return cut + len(newline)
    while limit > start + 1 and buffer[limit] & 0xC0 == 0x80:  # a continuation byte
        limit -= 1
    return limit
