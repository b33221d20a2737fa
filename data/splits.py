"""A data set on disk: meta.json, and token ids as raw little-endian .bin (or .npy) files, opened and checked; and the
order in which rows are dealt out, a permutation that is computed and never stored."""
import hashlib
import json
import os
from logging import getLogger
from pathlib import Path

import numpy as np

from data.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
MIXER = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio, odd: the increment of splitmix64


def find_folder(dataset):
    """The folder that the setting `dataset` names: one of data/, or any path."""
    inside = ROOT / "data" / dataset
    return inside if inside.is_dir() else Path(dataset)


def load_meta(folder):
    """meta.json as a dict; without one, what nanoGPT's folders mean: uint16 ids of GPT-2's vocabulary."""
    if (folder / "meta.json").is_file():
        try:
            meta = json.loads((folder / "meta.json").read_bytes())
            if meta["vocab_size"] == int(meta["vocab_size"]) > 0 and meta["dtype"] in ("uint16", "uint32"):
                return meta
        except (ValueError, TypeError, KeyError):
            pass
        raise ValueError(f"{folder}/meta.json must be JSON with a whole vocab_size and a dtype of uint16 or uint32; "
                         "prepare the data again")
    if (folder / "meta.pkl").exists():
        raise ValueError(f"{folder} has a meta.pkl, which is never opened since a pickle can run code; "
                         f"python data/text/prepare.py --input=YOUR_TEXT --tokenizer=char --out={folder} makes a meta.json")
    if (folder / "train.bin").is_file() or (folder / "train.npy").is_file():
        getLogger("bareGPT").warning(f"note: {folder} has no meta.json; taking its ids for GPT-2's, in uint16")
    return {"vocab_size": 50257, "dtype": "uint16", "tokenizer": "gpt2"}


def open_split(folder, split, meta, block_size):
    """Return (path, tokens, mask) of folder/<split>.bin or .npy, or None where there is neither.

    tokens: (L,) memory-mapped, in meta's dtype. mask: (L,) uint8, 0 where a token is not to be learnt, or None.
    Raises ValueError for a file that is cut off, too short, or holds ids outside the vocabulary at its ends.
    """
    path = folder / f"{split}.bin"
    if path.is_file():
        dtype = np.dtype(meta["dtype"]).newbyteorder("<")
        if path.stat().st_size % dtype.itemsize:
            raise ValueError(f"{path} has {path.stat().st_size:,} bytes, no multiple of {dtype.itemsize} ({dtype.name}): "
                             "it was cut off, or meta.json names another dtype; prepare the data again")
        tokens = np.memmap(path, dtype, mode="r") if path.stat().st_size else np.empty(0)
    elif path.with_suffix(".npy").is_file():
        path = path.with_suffix(".npy")
        try:
            tokens = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise ValueError(f"{path} is not a file of plain numbers: {error}; prepare the data again") from None
        if tokens.ndim != 1 or tokens.dtype.kind not in "ui":
            raise ValueError(f"{path} must be one row of whole numbers, not {tokens.ndim}-dimensional {tokens.dtype}")
    elif split == "train":
        script = folder / "prepare.py" if (folder / "prepare.py").is_file() else ROOT / "data/text/prepare.py"
        raise ValueError(f"there is no {path}; `python {os.path.relpath(script)}` makes it (`make demo` needs no download)")
    else:
        return None
    if len(tokens) <= block_size:
        raise ValueError(f"{path} has {len(tokens):,} tokens, and block_size={block_size} needs at least "
                         f"{block_size + 1:,}; prepare more data or lower --block_size")
    largest = max(meta.get("max_id", 0), int(tokens[:65536].max()), int(tokens[-65536:].max()))
    if largest >= meta["vocab_size"]:
        raise ValueError(f"{path} holds token id {largest}, and vocab_size={meta['vocab_size']} in meta.json allows up to "
                         f"{meta['vocab_size'] - 1}; prepare the data again")
    mask = folder / f"{split}.mask.bin"
    if mask.is_file() and mask.stat().st_size != len(tokens):
        raise ValueError(f"{mask} has {mask.stat().st_size:,} bytes, but {path.name} has {len(tokens):,} tokens")
    return path, tokens, np.memmap(mask, np.uint8, mode="r") if mask.is_file() else None


def tokenizer_state(folder, meta):
    """What travels in a checkpoint, for Tokenizer.from_dict: a tokenizer file's content, or a well-known name."""
    file = folder / str(meta.get("tokenizer", "gpt2"))
    if not file.is_file() and file.suffix != ".json":
        return {"kind": "named", "name": file.name}
    tokenizer = Tokenizer.load(file)
    if tokenizer.vocab_size != meta["vocab_size"]:
        raise ValueError(f"{file} has {tokenizer.vocab_size} tokens, meta.json beside it {meta['vocab_size']}; "
                         "prepare the data again")
    return tokenizer.to_dict()


def fingerprint(splits):
    """What tells one data set from another: the lengths and the ends of its splits (arrays of ids), hashed."""
    digest = hashlib.sha256()
    for name, tokens in sorted(splits.items()):
        digest.update(f"{name} {len(tokens)} ".encode() + tokens[:65536].tobytes() + tokens[-65536:].tobytes())
    return digest.hexdigest()


def scramble(x):
    """splitmix64's finaliser (Steele et al.): a bijection of uint64 that leaves no visible pattern."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def mix(*numbers):
    """One 63-bit seed out of several whole numbers; another order gives another seed."""
    x = np.zeros(1, np.uint64)
    for number in numbers:
        x = scramble((x ^ np.array([number % 2**64], np.uint64)) * MIXER + MIXER)
    return int(x[0] >> np.uint64(1))


def permute(k, n, key):
    """Where the permutation `key` of range(n) sends k, an int64 array of values below n.

    A Feistel network over the smallest even number of bits that holds n; what falls outside is sent through
    again until it lands inside (Black & Rogaway, cycle walking). Nothing is stored, however large n is.
    """
    half = np.uint64(max(1, (int(n - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    keys = [np.uint64(mix(key, i)) for i in range(6)]
    x = k.astype(np.uint64)
    todo = np.ones(len(x), bool)
    while todo.any():
        left, right = x[todo] >> half, x[todo] & mask
        for round_key in keys:
            left, right = right, left ^ (scramble(right + round_key) & mask)
        x[todo] = left << half | right
        todo = x >= n
    return x.astype(np.int64)
