"""What the writer promises about files: whole or absent, the same whatever the threads, honest meta.json."""
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from data.tokenizer import Tokenizer, train_bpe
from data.writer import DatasetWriter, split_by_hash, write_documents

ROOT = Path(__file__).parents[1]
WORDS = "the cat sat on a mat and looked at the naïve 猫 🐈 while\nit rained\r\n\r\n".split(" ")


def text(seed, n=50):
    rng = random.Random(seed)
    return " ".join(rng.choice(WORDS) for _ in range(n))


@pytest.fixture(scope="module")
def bpe():
    special = ("<|endoftext|>",)
    vocab, merges = train_bpe([text(i) for i in range(50)], 300, special_tokens=special)
    return Tokenizer.from_bpe(vocab, merges, special_tokens=special)


def read(folder, split):
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    return np.fromfile(folder / f"{split}.bin", dtype=np.dtype(meta["dtype"]).newbyteorder("<")), meta


def test_documents_come_back_in_order_joined_by_end_of_text(tmp_path, bpe):
    documents = [(("train", "val", "test")[i % 3], text(i)) for i in range(100)] + [("train", "")]
    write_documents(tmp_path, documents, bpe)
    for split in ("train", "val", "test"):
        ids, meta = read(tmp_path, split)
        texts = [t for s, t in documents if s == split]
        assert ids[-1] == bpe.eot and (ids == bpe.eot).sum() == len(texts)
        ends = np.flatnonzero(ids == bpe.eot)
        starts = np.concatenate([[0], ends[:-1] + 1])
        assert [bpe.decode(ids[a:b].tolist()) for a, b in zip(starts, ends)] == texts
        assert meta["tokens"][split] == len(ids)
        assert meta["bytes"][split] == sum(len(t.encode()) for t in texts)
    assert meta["max_id"] == bpe.eot and meta["vocab_size"] == bpe.vocab_size and meta["dtype"] == "uint16"
    again = Tokenizer.load(tmp_path / meta["tokenizer"])
    assert again.encode(text(7)) == bpe.encode(text(7)) and again.eot == bpe.eot
    assert sorted(p.name for p in tmp_path.iterdir()) == ["meta.json", "test.bin", "tokenizer.json", "train.bin", "val.bin"]


def test_the_number_of_threads_does_not_show_in_the_files(tmp_path, bpe, monkeypatch):
    monkeypatch.setattr("data.writer.BATCH_BYTES", 1000)
    documents = [("val" if i % 7 == 0 else "train", text(i, n=i % 40)) for i in range(600)]
    for threads in (1, 2, 5):
        write_documents(tmp_path / str(threads), iter(documents), bpe, threads=threads)
    for name in ("train.bin", "val.bin", "meta.json"):
        assert len({(tmp_path / str(n) / name).read_bytes() for n in (1, 2, 5)}) == 1


def test_special_tokens_in_a_document_are_only_text(tmp_path, bpe):
    write_documents(tmp_path, [("train", "a <|endoftext|> b"), ("val", "c")], bpe)
    ids, _ = read(tmp_path, "train")
    assert (ids == bpe.eot).sum() == 1 and bpe.decode(ids[:-1].tolist()) == "a <|endoftext|> b"


def test_characters_have_no_end_of_text(tmp_path):
    whole = text(1) + text(2)
    write_documents(tmp_path, [("train", text(1)), ("val", text(2))], Tokenizer.from_text_chars(whole))
    ids, meta = read(tmp_path, "train")
    assert len(ids) == len(text(1)) and meta["vocab_size"] == len(set(whole)) == meta["max_id"] + 1


def test_limit_stops_and_does_not_read_on(tmp_path, bpe):
    def endless():
        for i in range(10**9):
            assert i < 10
            yield ("val" if i % 2 else "train"), text(i)
    write_documents(tmp_path, endless(), bpe, limit=10)
    assert sum((read(tmp_path, split)[0] == bpe.eot).sum() for split in ("train", "val")) == 10


@pytest.mark.parametrize("vocab_size, dtype", [(2**16, "uint16"), (2**16 + 1, "uint32")])
def test_uint32_when_the_vocabulary_needs_it(tmp_path, vocab_size, dtype):
    tokenizer = Tokenizer.from_text_chars("".join(map(chr, [*range(0xD800), *range(0xE000, vocab_size + 0x800)])))
    assert tokenizer.vocab_size == vocab_size
    with DatasetWriter(tmp_path, tokenizer) as writer:
        for split in ("train", "val"):
            writer.add(split, np.array([0, vocab_size - 1]), 3)
    ids, meta = read(tmp_path, "train")
    assert meta["dtype"] == dtype and ids.tolist() == [0, vocab_size - 1] and meta["max_id"] == vocab_size - 1


def test_ids_outside_the_vocabulary_are_refused(tmp_path, bpe):
    for bad in ([0, bpe.vocab_size], [-1]):
        with pytest.raises(ValueError, match="does not fit the tokenizer's vocabulary of 300"):
            with DatasetWriter(tmp_path, bpe) as writer:
                writer.add("train", bad, 1)
    assert not list(tmp_path.iterdir())


def test_an_error_in_the_input_leaves_the_old_data_set(tmp_path, bpe):
    write_documents(tmp_path, [("train", "old"), ("val", "old")], bpe)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def broken():
        for i in range(100):
            yield "train", text(i)
        raise ValueError("a.jsonl, line 101: broken")
    with pytest.raises(ValueError, match="line 101"):
        write_documents(tmp_path, broken(), bpe)
    with pytest.raises(ValueError, match="no text fell into the val split"):
        write_documents(tmp_path, [("train", "new")], bpe)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_new_data_set_does_not_keep_the_old_ones_masks_or_test_split(tmp_path, bpe):
    with DatasetWriter(tmp_path, bpe, masked=True) as writer:
        for split in ("train", "val", "test"):
            writer.add(split, [1, 2, 3], 3, mask=[0, 1, 1])
    assert np.fromfile(tmp_path / "train.mask.bin", dtype=np.uint8).tolist() == [0, 1, 1]
    write_documents(tmp_path, [("train", "a b"), ("val", "c")], bpe)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["meta.json", "tokenizer.json", "train.bin", "val.bin"]


def test_the_split_is_a_matter_of_the_key_alone():
    splits = [split_by_hash(text(i), 0.1, 0.05) for i in range(20_000)]
    assert splits == [split_by_hash(text(i), 0.1, 0.05) for i in range(20_000)]
    assert abs(splits.count("val") / 20_000 - 0.1) < 0.01 and abs(splits.count("test") / 20_000 - 0.05) < 0.01
    assert {split_by_hash(text(i), 0.0) for i in range(100)} == {"train"}


SLOW = """
import sys; sys.path.insert(0, sys.argv[1])
import data.writer
from data.tokenizer import Tokenizer
data.writer.BATCH_BYTES = 1000
def documents():
    yield "val", "abc" * 1000
    print("started", flush=True)
    while True:
        yield "train", "abc" * 1000
data.writer.write_documents(sys.argv[2], documents(), Tokenizer.from_text_chars("abc"))
"""


def test_kill_9_leaves_nothing_under_a_final_name_and_the_next_run_cleans_up(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", SLOW, ROOT, tmp_path], stdout=subprocess.PIPE)
    process.stdout.readline()
    deadline = time.monotonic() + 20
    while not (tmp_path / "train.bin.tmp").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert {p.name for p in tmp_path.iterdir()} <= {"train.bin.tmp", "val.bin.tmp"}
    write_documents(tmp_path, [("train", "ab"), ("val", "c")], Tokenizer.from_text_chars("abc"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["meta.json", "tokenizer.json", "train.bin", "val.bin"]


FULL = """
import resource, signal, sys; sys.path.insert(0, sys.argv[1])
from configurator import user_errors
from data.tokenizer import Tokenizer
from data.writer import write_documents
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # the kernel refuses what a full disk refuses
with user_errors():
    write_documents(sys.argv[2], [("val", "ab"), ("train", "ab" * 200_000)], Tokenizer.from_text_chars("ab"))
"""


def test_a_file_that_cannot_grow_ends_in_one_line(tmp_path):
    result = subprocess.run([sys.executable, "-c", FULL, ROOT, tmp_path], capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "train.bin" in result.stderr and "free some space" in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, where every write finds the disk full")
def test_a_full_disk_names_the_file(tmp_path):
    (tmp_path / "train.bin.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match="train.bin: No space left on device.*free some space"):
        write_documents(tmp_path, [("train", "ab"), ("val", "c")], Tokenizer.from_text_chars("abc"))
    assert not list(tmp_path.iterdir())
