"""Every prepare.py as a user runs it: a process, real files, a real server on the loopback address."""
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data.tokenizer import Tokenizer

ROOT = Path(__file__).parents[1]
CACHE = os.environ.get("TIKTOKEN_CACHE_DIR")
needs_gpt2 = pytest.mark.skipif(not CACHE, reason="GPT-2's files: set TIKTOKEN_CACHE_DIR to a folder that has them")


def prepare(name, *flags, ok=True, python=(), **environment):
    """Runs data/<name>/prepare.py from another folder, in the C locale; stdout where ok, else the one line of stderr."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "LC_", "LANG", "PYTHON"))}
    result = subprocess.run([sys.executable, *python, ROOT / "data" / name / "prepare.py", *map(str, flags)], cwd="/",
                            env={**clean, "LC_ALL": "C", **environment}, capture_output=True, text=True, timeout=60)
    assert result.returncode == (0 if ok else 2), result.stderr + result.stdout
    if ok:
        return result.stdout
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    return result.stderr


def read(folder, split):
    meta = json.loads((folder / "meta.json").read_bytes())
    name = meta["tokenizer"]
    tokenizer = Tokenizer.load(folder / name if (folder / name).exists() else name)
    ids = np.fromfile(folder / f"{split}.bin", dtype=np.dtype(meta["dtype"]).newbyteorder("<"))
    assert len(ids) == meta["tokens"][split] and ids.max() <= meta["max_id"] < meta["vocab_size"] == tokenizer.vocab_size
    return ids, tokenizer, meta


def texts(folder, split):
    """The documents of a split, decoded."""
    ids, tokenizer, meta = read(folder, split)
    ends = np.flatnonzero(ids == tokenizer.eot)
    assert ends[-1] == len(ids) - 1
    found = [tokenizer.decode(part[:-1].tolist()) for part in np.split(ids, ends[:-1] + 1)]
    assert sum(len(text.encode()) for text in found) == meta["bytes"][split]
    return found


def test_stdlib_needs_nothing_and_keeps_families_together(tmp_path):
    table = prepare("stdlib", f"--out={tmp_path}")
    assert "bytes/token" in table
    splits = {split: texts(tmp_path, split) for split in ("train", "val", "test")}
    sizes = {split: sum(map(len, found)) for split, found in splits.items()}
    assert sum(sizes.values()) > 6e6 and all(0.04 < sizes[s] / sum(sizes.values()) < 0.11 for s in ("val", "test"))
    assert read(tmp_path, "train")[2]["vocab_size"] == 4096
    side = {text: split for split, found in splits.items() for text in found}
    for package in ("json", "asyncio", "email", "tkinter", "importlib", "logging", "xml"):
        files = [f for f in (Path(os.__file__).parent / package).rglob("*.py") if not {"test", "tests"} & set(f.parts)]
        assert len({side[text] for f in files if (text := f.read_bytes().decode())}) == 1, package
    assert (Path(os.__file__).parent / "encodings" / "cp1252.py").read_text() not in side


def test_stdlib_twice_gives_the_same_bytes(tmp_path):
    for run in "ab":
        prepare("stdlib", f"--out={tmp_path / run}", "--vocab_size=300", python=["-O"] if run == "b" else [])
    for name in ("train.bin", "val.bin", "test.bin", "meta.json", "tokenizer.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


PLAY = "First Citizen:\nBefore we proceed any further, hear me speak.\r\n\nAll:\nSpeak — naïve 猫.\n" * 40


def test_shakespeare_by_characters(tmp_path):
    (tmp_path / "play.txt").write_bytes(PLAY.encode())
    result = prepare("shakespeare_char", f"--input={tmp_path / 'play.txt'}", f"--out={tmp_path / 'out'}")
    parts = {}
    for split in ("train", "val"):
        ids, tokenizer, meta = read(tmp_path / "out", split)
        parts[split] = tokenizer.decode(ids.tolist())
    assert parts["train"] + parts["val"] == PLAY and len(parts["train"]) == len(PLAY) * 9 // 10
    assert tokenizer.eot is None and meta["vocab_size"] == len(set(PLAY)) and "tokens" in result


@needs_gpt2
def test_shakespeare_in_gpt2_tokens(tmp_path):
    (tmp_path / "play.txt").write_bytes(PLAY.encode())
    prepare("shakespeare", f"--input={tmp_path / 'play.txt'}", f"--out={tmp_path / 'out'}")
    ids, tokenizer, meta = read(tmp_path / "out", "train")
    assert meta["tokenizer"] == "gpt2" and tokenizer.decode(ids.tolist()) == PLAY[: len(PLAY) * 9 // 10]
    assert not (tmp_path / "out" / "tokenizer.json").exists()


@pytest.mark.parametrize("data, message", [(b"", "is empty"), (b"ab\xffcd", "not UTF-8 at byte 2 (0xff)")])
def test_a_bad_file_is_named(tmp_path, data, message):
    (tmp_path / "bad.txt").write_bytes(data)
    error = prepare("shakespeare_char", f"--input={tmp_path / 'bad.txt'}", f"--out={tmp_path / 'out'}", ok=False)
    assert "bad.txt" in error and message in error and not (tmp_path / "out").exists()


def test_a_missing_file_is_named(tmp_path):
    assert "/nowhere/a.txt" in prepare("shakespeare_char", "--input=/nowhere/a.txt", f"--out={tmp_path}", ok=False)
