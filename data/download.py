"""Data sets of the Hugging Face hub ($HF_ENDPOINT, $HF_TOKEN) to token files: plain parquet, by huggingface_hub.

What a script in a repository might want to do, nobody asks.
"""
import hashlib
import json
import os
from contextlib import contextmanager
from itertools import chain, islice, repeat
from pathlib import Path

from data.reader import documents
from data.tokenizer import Tokenizer, write_text
from data.writer import Progress, split_by_hash, write_documents

OFFLINE = ("Without a network: `python data/stdlib/prepare.py` needs none, and "
           "`python data/text/prepare.py --input=FILE` takes your own text")


def write_hub(here, out, repo, folder, revision, tokenizer, limit, named=None, val_fraction=0.0, shards=0, join=iter):
    """Write the data set `out`, or `here`, from the parquet files below `folder` of a repository; each is downloaded to
    here/download only when its turn comes, and stays there.

    named: {split: how the names of its files begin}, `limit` documents of each; without it `shards` files, or all for 0,
    whose documents a hash divides, `val_fraction` of them for val. join: rows to documents.
    """
    try:
        import huggingface_hub
        import pyarrow.parquet  # noqa: F401  before, not after, the gigabytes
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{error}: pip install huggingface_hub pyarrow") from None
    into, progress, encoder, parts = Path(here, "download"), Progress(), Tokenizer.load(tokenizer), []
    api = huggingface_hub.HfApi()
    commit, files = hub_files(api, repo, folder, revision, into)

    def download(file):
        path, _, sha256 = file
        with one_line(f"{api.endpoint}/datasets/{repo}/{path}"):  # asks nobody where this commit's file is there already
            local = Path(api.hf_hub_download(repo, path, repo_type="dataset", revision=commit, local_dir=into))
        with open(local, "rb") as f:
            digest = hashlib.file_digest(f, "sha256").hexdigest()
        if sha256 not in (None, digest):  # the library compares lengths only
            raise ValueError(f"{local} has the sha256 {digest}, not the hub's {sha256}: delete it and run the command again")
        return local

    for split, name in (named or {"": ""}).items():
        mine = [file for file in files[:shards or None] if Path(file[0]).name.startswith(name)]
        progress.total += sum(size for _, size, _ in mine)
        texts = islice(join(documents(map(download, mine), progress)), limit or None)
        parts.append(zip(repeat(split), texts) if named else ((split_by_hash(text, val_fraction), text) for text in texts))
    write_documents(out or here, chain.from_iterable(parts), encoder, progress, limit * (not named))


def hub_files(api, repo, folder, revision, into):
    """[commit, [[path, size, sha256], ...]] of the parquet files below `folder`, by name. The hub is asked once and its
    answer kept, so what was downloaded with a network can be prepared again without one."""
    listing = into / f"{repo}@{revision} {folder}.json".replace("/", "--")
    if not listing.exists():
        with one_line(f"{api.endpoint}/datasets/{repo}"):
            commit = api.dataset_info(repo, revision=revision).sha  # no network? it says so at once, the next call doesn't
            entries = api.list_repo_tree(repo, folder or None, recursive=True, revision=commit, repo_type="dataset")
            files = sorted((e.path, e.size, e.lfs and e.lfs.sha256) for e in entries if e.path.endswith(".parquet"))
        if not files:
            raise ValueError(f"{repo} has no parquet file in {folder or 'any folder'}: the data set has moved. {OFFLINE}")
        into.mkdir(parents=True, exist_ok=True)
        write_text(listing, json.dumps([commit, files]))
    return json.loads(listing.read_bytes())


@contextmanager
def one_line(what):
    """An error inside becomes a ValueError of one line that says what to do."""
    token = os.environ.get("HF_TOKEN", "").strip()
    if not (token.isascii() and token.isprintable()):  # the complaint would print it
        raise ValueError("HF_TOKEN holds characters that no token has: copy it again")
    try:
        yield
    except Exception as error:  # the hub's, the network's, the disk's: each of several libraries has its own kinds
        status = getattr(getattr(error, "response", None), "status_code", None)
        todo = ("is the name right? If it is gated, accept its terms on the hub and set HF_TOKEN to a token that may read it"
                if status in (401, 403, 404) else "check the network, the free space and, if it is set, HF_ENDPOINT")
        cause = error.__cause__ or error  # a page of advice hides the network's own words
        reason = getattr(error, "server_message", None) or f"{type(cause).__name__}: {cause}"
        raise ValueError(f"cannot download {what}: {reason.rstrip('.')}; {todo}. {OFFLINE}") from None
