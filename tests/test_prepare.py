"""Every prepare.py as a user runs it: a process, real files. What comes from a hub is in test_download.py."""
import gzip
import io
import json
import os
import random
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


def test_stdlib_by_characters_is_the_same_text(tmp_path):
    prepare("stdlib", f"--out={tmp_path}", "--tokenizer=char")
    ids, tokenizer, meta = read(tmp_path, "val")
    text = tokenizer.decode(ids.tolist())
    assert len(text) == len(ids) and len(text.encode()) == meta["bytes"]["val"] and "def " in text
    assert "tokenizer='chars'" in prepare("stdlib", "--tokenizer=chars", ok=False)


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


WORDS = "the cat sat on a mat and looked at the naïve 猫 🐈 while\nit rained\r\n".split(" ")


def story(seed, n=60):
    rng = random.Random(seed)
    return f"{seed} " + " ".join(rng.choice(WORDS) for _ in range(n))


def jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def parquet(rows, column="text"):
    pyarrow = pytest.importorskip("pyarrow", reason="parquet files are pyarrow's: pip install pyarrow")
    import pyarrow.parquet
    file = io.BytesIO()
    table = pyarrow.table({"id": [str(i) for i in range(len(rows))], column: rows})
    pyarrow.parquet.write_table(table, file, row_group_size=40)
    return file.getvalue()


# --- data/text: anybody's own corpus ---

def test_every_format_of_text_comes_through_unchanged(tmp_path):
    source, stories = tmp_path / "in", [story(i) for i in range(240)]
    (source / "sub").mkdir(parents=True)
    (source / "a.txt").write_bytes("<|endoftext|>\n".join(stories[:40]).encode())
    (source / "b.jsonl").write_bytes(jsonl({"text": text, "n": 1} for text in stories[40:80]))
    (source / "c.jsonl.gz").write_bytes(gzip.compress(jsonl({"text": text} for text in stories[80:120])))
    (source / "sub" / "d.parquet").write_bytes(parquet(stories[120:160] + [None, ""]))
    for i in range(160, 200):
        (source / "sub" / f"{i}.md").write_bytes(stories[i].encode())
    (source / "e.txt.gz").write_bytes(gzip.compress("<|endoftext|>".join(stories[200:]).encode()))
    (source / "ignored.png").write_bytes(b"\xff")
    prepare("text", f"--input={source}", f"--out={tmp_path / 'out'}", "--vocab_size=400", "--test_fraction=0.1")
    found = {split: texts(tmp_path / "out", split) for split in ("train", "val", "test")}
    assert sorted(sum(found.values(), [])) == sorted(stories)
    assert 8 <= len(found["val"]) <= 45 and 8 <= len(found["test"]) <= 45
    assert read(tmp_path / "out", "train")[2]["vocab_size"] == 400


def test_a_document_keeps_its_side_whatever_stands_around_it(tmp_path):
    stories = [story(i) for i in range(100)]
    sides = []
    for run, order in enumerate((stories, stories[::-1] + [story(i) for i in range(100, 200)])):
        (tmp_path / "a.jsonl").write_bytes(jsonl({"text": text} for text in order))
        prepare("text", f"--input={tmp_path / 'a.jsonl'}", f"--out={tmp_path / str(run)}", "--tokenizer=byte")
        sides.append({text: split for split in ("train", "val") for text in texts(tmp_path / str(run), split)})
    assert sides[0].items() <= sides[1].items() and set(sides[0].values()) == {"train", "val"}


@pytest.mark.parametrize("size", [3_000, 700_000])
def test_one_text_file_alone_is_divided_by_pages_and_nothing_is_lost(tmp_path, size):
    book = "".join(story(i, 30) + "\n\n" for i in range(size // 150))
    (tmp_path / "book.txt").write_bytes(book.encode())
    prepare("text", f"--input={tmp_path / 'book.txt'}", f"--out={tmp_path / 'out'}", "--tokenizer=char", "--val_fraction=0.2")
    pieces = {}
    for split in ("train", "val"):
        ids, tokenizer, _ = read(tmp_path / "out", split)
        pieces[split] = tokenizer.decode(ids.tolist())
    assert sorted("".join(pieces.values())) == sorted(book)
    assert 0.02 < len(pieces["val"]) / len(book) < 0.4


def test_tokens_come_back_from_npy_and_npz(tmp_path):
    stories = [story(i) for i in range(60)]
    byte = Tokenizer.load("byte")
    ids = np.concatenate([byte.encode(text) + [byte.eot] for text in stories])
    np.save(tmp_path / "a.npy", ids[: len(ids) // 2].astype(np.int64))
    np.savez(tmp_path / "b.npz", x=ids[len(ids) // 2 :].astype(np.uint16))
    prepare("text", f"--input={tmp_path / 'a.npy'},{tmp_path / 'b.npz'}", f"--out={tmp_path / 'out'}", "--tokenizer=byte")
    both = [read(tmp_path / "out", split)[0] for split in ("train", "val")]
    assert sorted(np.concatenate(both).tolist()) == sorted(ids.tolist())
    meta = read(tmp_path / "out", "val")[2]
    assert sum(meta["bytes"].values()) == sum(len(text.encode()) for text in stories)


def test_a_saved_tokenizer_serves_a_second_corpus(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl({"body": story(i)} for i in range(80)))
    prepare("text", f"--input={tmp_path / 'a.jsonl'}", f"--out={tmp_path / 'one'}", "--vocab_size=300", "--key=body")
    prepare("text", f"--input={tmp_path / 'a.jsonl'}", f"--out={tmp_path / 'two'}", "--key=body", "--limit=50",
            f"--tokenizer={tmp_path / 'one' / 'tokenizer.json'}")
    assert len(texts(tmp_path / "two", "train") + texts(tmp_path / "two", "val")) == 50
    assert (tmp_path / "one/tokenizer.json").read_bytes() == (tmp_path / "two/tokenizer.json").read_bytes()


BAD = {
    "not UTF-8": ("a.txt", b"x" * 300_000 + b"\n\xfe", [], ["a.txt", "byte 300,001", "0xfe"]),
    "not UTF-8 in jsonl": ("a.jsonl", b'{"text": "a"}\n{"text": "\xfe"}\n', [], ["a.jsonl", "byte 24"]),
    "empty": ("a.txt", b"", [], ["empty"]),
    "empty, gpt2-like": ("a.txt", b"", ["--tokenizer=byte"], ["empty"]),
    "no JSON": ("a.jsonl", b'{"text": "a"}\n\n{"text": \n', [], ["a.jsonl, line 3", "JSON"]),
    "no text field": ("a.jsonl", b'{"text": "a"}\n{"body": "a"}\n', [], ["a.jsonl, line 2", "'text'", "--key"]),
    "half a character": ("a.jsonl", b'{"text": "\\ud800"}\n', [], ["a.jsonl, line 1"]),
    "small vocabulary": ("a.txt", b"abc" * 99, ["--vocab_size=256"], ["vocab_size", "256", "257"]),
    "no parquet": ("a.parquet", b"PAR1 not really PAR1", [], ["a.parquet"]),
    "no gzip": ("a.txt.gz", b"plain", [], ["a.txt.gz", "gzip"]),
    "cut gzip": ("a.txt.gz", gzip.compress(bytes(9999))[:-9], [], ["a.txt.gz", "gzip"]),
    "no numpy": ("a.npy", b"\x80\x04N.", ["--tokenizer=byte"], ["a.npy", "numpy"]),
    "ids without a maker": ("a.npy", b"x", [], ["a.npy", "--tokenizer"]),
    "ending": ("a.docx", b"abc", [], ["a.docx", ".jsonl"]),
    "no such tokenizer": ("a.txt", b"abc" * 99, ["--tokenizer=gpt3"], ["gpt3"]),
    "one character": ("a.txt", b"a", ["--tokenizer=char"], ["split", "fractions"]),
    "no train": ("a.txt", b"abc\n" * 99, ["--tokenizer=char", "--val_fraction=1"], ["train split"]),
}


@pytest.mark.parametrize("name, data, flags, words", BAD.values(), ids=BAD)
def test_bad_input_ends_in_one_line_and_leaves_nothing(tmp_path, name, data, flags, words):
    (tmp_path / name).write_bytes(data)
    error = prepare("text", f"--input={tmp_path / name}", f"--out={tmp_path / 'out'}", *flags, ok=False, python=["-O"])
    assert all(word in error for word in words), error
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("flags, words", [([], ["--input"]), (["--input=/nowhere.txt"], ["/nowhere.txt"]),
                                          (["--inptu=a"], ["inptu", "input"])])
def test_a_wrong_flag_is_named(flags, words):
    error = prepare("text", *flags, ok=False)
    assert all(word in error for word in words), error


def test_ids_that_the_tokenizer_does_not_have_are_refused(tmp_path):
    for bad, word in (([0, 300], "300"), ([1, -1], "-1"), ([[1, 2]], "1-D"), ([0.5], "1-D")):
        np.save(tmp_path / "a.npy", np.array(bad))
        assert word in prepare("text", f"--input={tmp_path / 'a.npy'}", "--tokenizer=byte", f"--out={tmp_path / 'o'}", ok=False)


def test_a_pickle_in_npy_is_not_opened(tmp_path):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "sprung",))
    np.save(tmp_path / "a.npy", np.array([Trap()], dtype=object), allow_pickle=True)
    prepare("text", f"--input={tmp_path / 'a.npy'}", "--tokenizer=byte", f"--out={tmp_path / 'o'}", ok=False)
    assert not (tmp_path / "sprung").exists()


# --- data/instruct ---

def learnt(folder, split):
    ids, tokenizer, _ = read(folder, split)
    mask = np.fromfile(folder / f"{split}.mask.bin", dtype=np.uint8)
    assert len(mask) == len(ids) and set(mask.tolist()) <= {0, 1}
    return ids, mask, tokenizer


def test_only_answers_are_learnt(tmp_path):
    rows = [{"prompt": f"What is {i}?", "response": f"It is {i} — naïve."} for i in range(50)]
    rows.append({"messages": [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"},
                              {"role": "assistant", "content": "hello"}, {"role": "user", "content": "bye"},
                              {"role": "assistant", "content": "ciao"}]})
    rows.append({"messages": [{"role": "user", "content": "anybody there?"}]})
    (tmp_path / "a.jsonl").write_bytes(jsonl(rows))
    result = prepare("instruct", f"--input={tmp_path / 'a.jsonl'}", f"--out={tmp_path / 'out'}", "--tokenizer=byte")
    assert "1 conversations without" in result
    answers, whole, n_bytes = [], "", 0
    for split in ("train", "val"):
        ids, mask, tokenizer = learnt(tmp_path / "out", split)
        answers += tokenizer.decode(ids[mask == 1].tolist()).split("<|endoftext|>")[:-1]
        whole += tokenizer.decode(ids.tolist())
        n_bytes += read(tmp_path / "out", split)[2]["bytes"][split]
    expected = [row["response"] for row in rows[:50]] + ["hello", "ciao"]
    assert sorted(answers) == sorted(expected) and n_bytes == sum(len(a.encode()) for a in expected)
    assert all(row["prompt"] in whole for row in rows[:50]) and "be kind" in whole


def test_padding_and_cutting_to_a_length(tmp_path):
    rows = [{"prompt": "p" * (i % 60), "response": "r" * 30} for i in range(60)]
    (tmp_path / "a.jsonl").write_bytes(jsonl(rows))
    prepare("instruct", f"--input={tmp_path / 'a.jsonl'}", f"--out={tmp_path / 'out'}", "--tokenizer=byte",
            "--max_length=80", "--pad", "--val_fraction=0.3")
    for split in ("train", "val"):
        ids, mask, tokenizer = learnt(tmp_path / "out", split)
        assert len(ids) % 80 == 0
        for row, row_mask in zip(ids.reshape(-1, 80), mask.reshape(-1, 80)):
            text = tokenizer.decode(row[row_mask == 1].tolist())
            n_prompt = int((row == ord("p")).sum())
            assert set(text.removesuffix("<|endoftext|>")) == {"r"}
            if 80 - row_mask[::-1].argmax() < 80:  # something was padded, all of it masked
                assert text == "r" * 30 + "<|endoftext|>" and n_prompt < 60
            assert row_mask.sum() <= 31


@pytest.mark.parametrize("line, words", [
    ("[]", ["line 2", "prompt"]), ('{"prompt": "a"}', ["line 2", "response"]), ('{"prompt": 1, "response": "a"}', ["line 2"]),
    ('{"messages": "hi"}', ["line 2"]), ('{"messages": [{"role": "robot", "content": "a"}]}', ["line 2", "robot"]), ("{", ["line 2"])])
def test_a_broken_conversation_is_named(tmp_path, line, words):
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "response": "b"}\n' + line + "\n")
    error = prepare("instruct", f"--input={tmp_path / 'a.jsonl'}", f"--out={tmp_path / 'out'}", "--tokenizer=byte", ok=False)
    assert all(word in error for word in words), error
    assert not list((tmp_path / "out").iterdir())


def test_the_preset_names_settings_that_train_has():
    result = subprocess.run([sys.executable, ROOT / "train.py", ROOT / "config" / "finetune_instruct.py", "--help"],
                            capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_a_prompt_is_tokenised_as_a_sampler_will(tmp_path):
    from data.instruct.prepare import encode
    from data.tokenizer import Tokenizer, train_bpe
    text = "### user\nWhy?\n\n### assistant\nBecause.\n\n"
    tokenizer = Tokenizer.from_bpe(*train_bpe([text * 5], 300))
    ids, mask, _ = encode([("user", "Why?"), ("assistant", "So.")], tokenizer)
    prompt = tokenizer.encode("### user\nWhy?\n\n### assistant\n")
    assert ids == prompt + tokenizer.encode("So.") + [tokenizer.eot]
    assert mask == [0] * len(prompt) + [1] * (len(ids) - len(prompt))
