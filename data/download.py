"""Files from a URL or from a hub's data-set repository to disk: resumed, verified, retried.

Plain HTTP. A repository is a listing and some files below $HF_ENDPOINT (https://huggingface.co); what a script in
it might want to do, nobody asks.
"""
import hashlib
import json
import os
import time
from itertools import chain, islice, repeat, starmap
from pathlib import Path
from urllib.parse import quote

import requests

from data.reader import documents, import_pyarrow
from data.tokenizer import Tokenizer
from data.writer import Progress, explained, split_by_hash, write_documents

ATTEMPTS = 5  # in a row without a byte of progress
BACKOFF_S = 0.5  # doubled at each of them: 0.5 + 1 + 2 + 4 s
TIMEOUT_S = 30  # of silence, then the connection counts as dropped
CHUNK = 1 << 16  # bytes that are lost at most where a connection breaks
OFFLINE = ("Without a network: `python data/stdlib/prepare.py` needs none, and "
           "`python data/text/prepare.py --input=FILE` takes your own text")


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
        except requests.RequestException as error:
            reached = part.stat().st_size if part.exists() else 0
            failures = 1 if reached > furthest else failures + 1
            furthest = max(furthest, reached)
            if failures >= ATTEMPTS:
                raise ValueError(f"cannot download {url}: {error}. {OFFLINE}") from None
            time.sleep(BACKOFF_S * 2 ** (failures - 1))
    os.replace(part, path)
    return path


def _fetch(url, part, sha256, size):
    """Bring `part` to the end and verify it. Raises RequestException where another attempt may help, else ValueError."""
    have = part.stat().st_size if part.exists() else 0
    if not have or have != size:
        with _open(url, have) as response:
            resumed = response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
            have = have if resumed else 0  # a server may ignore Range and start again
            length = response.headers.get("Content-Length")
            size = size if size is not None else have + int(length) if length else None
            with Progress(size or 0) as progress, explained(part), open(part, "ab" if resumed else "wb") as f:
                for chunk in response.iter_content(CHUNK):
                    f.write(chunk)
                    have += len(chunk)
                    progress.done = have
                    progress.show(f"{have / 1e6:,.1f} MB of {part.stem}")
    if size is not None and have < size:
        raise requests.ConnectionError(f"the connection dropped after {have:,} of {size:,} bytes")
    with open(part, "rb") as f:
        digest = hashlib.file_digest(f, "sha256").hexdigest() if sha256 else None
    if digest != sha256 or size not in (None, have):
        part.unlink()
        raise requests.ConnectionError(f"got {have:,} bytes with sha256 {digest}, expected {size or have:,} with {sha256}")


def _open(url, start):
    """The response to a GET from byte `start` on, with HF_TOKEN for the hub and for nobody else."""
    headers = {"User-Agent": "bareGPT", "Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
    token = os.environ.get("HF_TOKEN", "").strip()
    if token and url.startswith(hub() + "/"):
        if not (token.isascii() and token.isprintable()):  # the complaint would print it
            raise ValueError("HF_TOKEN holds characters that no token has: copy it again")
        headers["Authorization"] = f"Bearer {token}"  # stays behind where the hub redirects to another host
    response = requests.get(url, headers=headers, stream=True, timeout=TIMEOUT_S)
    status = f"HTTP {response.status_code} {response.reason}"
    if response.status_code == 416 and start:  # what lies in the .part is longer than the file: start again
        return _open(url, 0)
    if response.status_code in (401, 403):
        raise ValueError(f"{url}: access denied ({status}); for a gated data set accept its terms on the hub and set "
                         "HF_TOKEN to a token that may read it")
    if 400 <= response.status_code < 500 and response.status_code not in (408, 429):
        raise ValueError(f"{url}: {status}. {OFFLINE}")
    if response.status_code >= 400:
        raise requests.ConnectionError(status)
    return response


def hub():
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    if not endpoint.startswith(("http://", "https://")):
        raise ValueError(f"HF_ENDPOINT={endpoint!r} is no address: it begins with https://")
    return endpoint.rstrip("/")


def hub_shards(repo, folder, into, revision="main"):
    """[(url, local path, sha256, size)] of the parquet files below `folder` of a data-set repository, by name.

    The listing is fetched once and kept in the folder `into` beside the files, so what was downloaded
    with a network can be prepared again without one.
    """
    import_pyarrow()  # before, not after, the gigabytes
    revision = quote(revision, safe="")
    listing = Path(into, f"{repo} {folder} {revision}.json".replace("/", "--"))
    download(f"{hub()}/api/datasets/{repo}/tree/{revision}/{folder}".rstrip("/") + "?recursive=true", listing)
    shards = []
    try:
        entries = json.loads(listing.read_bytes())
        for path, size, lfs in sorted((entry["path"], entry["size"], entry.get("lfs", {}).get("oid")) for entry in entries):
            local = Path(into, path)
            if local.suffix == ".parquet" and local.resolve().is_relative_to(Path(into).resolve()):
                shards.append((f"{hub()}/datasets/{repo}/resolve/{revision}/{quote(path)}", local, lfs, size))
    except (ValueError, TypeError, KeyError, AttributeError):
        listing.unlink()
        raise ValueError(f"{hub()} does not answer as a hub does; is HF_ENDPOINT right?") from None
    if len(entries) >= 1000:  # the hub's longest page
        raise ValueError(f"{repo} has more files in {folder or 'all'} than one listing names: choose a smaller folder")
    if not shards:
        raise ValueError(f"{hub()}/datasets/{repo} has no parquet file in {folder or 'any folder'}: the data set has moved")
    return shards


def write_hub(out, into, repo, folder, revision, tokenizer, limit, named=None, val_fraction=0.0, shards=0, join=iter):
    """Write the data set `out` from the parquet files below `folder` of a repository, kept in `into`; each is downloaded
    only when its turn comes.

    named: {split: how the names of its files begin}, `limit` documents of each; without it `shards` files, or all for 0,
    whose documents a hash divides, `val_fraction` of them for val. join: rows to documents.
    """
    progress, encoder, parts = Progress(), Tokenizer.load(tokenizer), []
    files = hub_shards(repo, folder, into, revision)[:shards or None]
    for split, name in (named or {"": ""}).items():
        mine = [shard for shard in files if shard[1].name.startswith(name)]
        progress.total += sum(size for *_, size in mine)
        texts = islice(join(documents(starmap(download, mine), progress)), limit or None)
        parts.append(zip(repeat(split), texts) if named else ((split_by_hash(text, val_fraction), text) for text in texts))
    write_documents(out or Path(into).parent, chain.from_iterable(parts), encoder, progress, limit * (not named))
