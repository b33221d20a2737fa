"""data/bpe.py and data/tokenizer.py: training against a naive trainer, encoding against merging step by step, round
trips, bad input."""
import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import tracemalloc
from collections import Counter, deque
from pathlib import Path

import numpy as np
import pytest
import regex
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from data import bpe as bpe_module
from data import tokenizer as tokenizer_module
from data.tokenizer import END_OF_TEXT, GPT2_PATTERN, GPT4_PATTERN, Tokenizer, train_bpe

ROOT = Path(__file__).parent.parent
STORY = ("It was a bright cold day in April, and the clocks were striking thirteen; it's what we'd said.\n\n"
         "    def f(x):\r\n\treturn x**2 + 12345  # naïve café, 東京は大きい, ١٢٣, 🙂🙂 e\u0301\n") * 20
# Python knows the characters of one Unicode version, regex and tiktoken those of others: draw what all three know.
TEXTS = st.text(st.characters(exclude_categories=["Cs", "Cn"]), max_size=200) | st.text("ab c'sl\n\t.1é<|>", max_size=200)


def naive_bpe(texts, n_merges, special_tokens=(), pattern=GPT2_PATTERN):
    """Counts every pair again for every merge."""
    words = Counter()
    for text in texts:
        for document in regex.split("|".join(map(regex.escape, special_tokens)), text) if special_tokens else [text]:
            words.update(tuple(bytes([b]) for b in word.encode()) for word in regex.findall(pattern, document))
    merges = []
    while len(merges) < n_merges:
        pairs = Counter()
        for word, n in words.items():
            for pair in zip(word, word[1:]):
                pairs[pair] += n
        if not pairs:
            break
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        words = Counter({}) + sum((Counter({tuple(merge_once(list(word), best)): n}) for word, n in words.items()), Counter())
    return merges


def merge_once(parts, pair):
    i = 0
    while i < len(parts) - 1:
        if (parts[i], parts[i + 1]) == pair:
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        i += 1
    return parts


def encode_in_order(text, vocab, merges, pattern=GPT2_PATTERN):
    """Applies each merge to the whole pre-token, one after the other, as training did."""
    ids = {token: i for i, token in reversed(sorted(vocab.items()))}
    out = []
    for word in regex.findall(pattern, text):
        parts = [bytes([b]) for b in word.encode()]
        for pair in merges:
            parts = merge_once(parts, pair)
        out += [ids[part] for part in parts]
    return out


@pytest.fixture(scope="module")
def trained():
    return train_bpe([STORY], 500)


@pytest.fixture(scope="module")
def bpe(trained):
    return Tokenizer.from_bpe(*trained)


@pytest.fixture(scope="module")
def gpt2():
    if not os.environ.get("TIKTOKEN_CACHE_DIR"):
        pytest.skip("TIKTOKEN_CACHE_DIR is not set: GPT-2's own files are needed for this test")
    return Tokenizer.load("gpt2")


@pytest.fixture(scope="module", params=["bpe", "byte", "char", "gpt4"])
def any_tokenizer(request, bpe):
    if request.param == "gpt4":
        return Tokenizer.from_bpe(*train_bpe([STORY], 400, pattern=GPT4_PATTERN), pattern=GPT4_PATTERN)
    return {"bpe": bpe, "byte": Tokenizer.load("byte"), "char": Tokenizer.from_text_chars(STORY)}[request.param]


# -- training ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("pattern", [GPT2_PATTERN, GPT4_PATTERN])
def test_merges_equal_those_of_a_naive_trainer(pattern):
    vocab, merges = train_bpe([STORY], 256 + 1 + 300, pattern=pattern)
    assert merges == naive_bpe([STORY], 300, pattern=pattern)
    assert list(vocab.values()) == [bytes([b]) for b in range(256)] + [a + b for a, b in merges] + [END_OF_TEXT.encode()]


@given(st.lists(st.text("ab ", max_size=30), min_size=1).filter(any), st.integers(0, 40))
@settings(deadline=None)
def test_merges_equal_those_of_a_naive_trainer_on_any_text(texts, n_merges):
    assert train_bpe(texts, 256 + n_merges, special_tokens=())[1] == naive_bpe(texts, n_merges)


def test_ties_go_to_the_greatest_pair_of_bytes():
    assert train_bpe(["ab cd", "zz"], 259, special_tokens=["<|endoftext|>"], pattern=r"\w+|\s")[1] == [(b"z", b"z"), (b"c", b"d")]
    # " a" is a prefix of " ab": the longer one is the greater
    assert train_bpe(["xaxb xaxb"], 260, special_tokens=[])[1] == naive_bpe(["xaxb xaxb"], 4)


def test_merges_do_not_cross_special_tokens():
    text = f"ab{END_OF_TEXT}cd<|x|>" * 50
    vocab, merges = train_bpe([text], 270, special_tokens=[END_OF_TEXT, "<|x|>"])
    assert merges == [(b"c", b"d"), (b"a", b"b")]
    assert vocab[258] == END_OF_TEXT.encode() and vocab[259] == b"<|x|>" and len(vocab) == 260


def test_result_does_not_depend_on_processes_chunks_or_source(tmp_path, monkeypatch):
    monkeypatch.setattr(bpe_module, "TRAIN_CHUNK", 1000)
    documents = [STORY[i:] for i in range(0, 1000, 50)]
    file = tmp_path / "a.txt"
    file.write_bytes(END_OF_TEXT.join(documents).encode())
    expected = train_bpe(documents, 400, processes=1)
    assert train_bpe(iter(documents), 400, processes=2) == expected
    assert train_bpe([file], 400, processes=2) == expected
    assert train_bpe([file], 400, processes=1) == expected
    assert train_bpe(["".join(documents[:1])] + documents[1:], 400, special_tokens=[END_OF_TEXT], processes=3) == expected


@pytest.mark.parametrize("chunk", range(1, 40))
def test_no_chunk_ends_inside_a_special_token(chunk, monkeypatch):
    monkeypatch.setattr(bpe_module, "TRAIN_CHUNK", chunk)
    text, special = "cab cab<|c a b|>cab, cab cab cab<|c a b|>" * 5, "<|c a b|>"
    assert train_bpe([text, text], 265, [special], processes=1)[1] == naive_bpe([text, text], 8, [special])


# -- encoding ---------------------------------------------------------------------------------------------------------

@given(TEXTS)
def test_bpe_encodes_by_merging_in_order(trained, bpe, text):
    assert bpe.encode(text) == encode_in_order(text, *trained)


@given(st.data())
@settings(deadline=None)
def test_any_list_of_merges_encodes_by_merging_in_order(data):
    """Also where two merges make the same bytes, where one can never happen, and where ids are not in order."""
    tokens, merges = [b"a", b"b"], []
    for _ in range(data.draw(st.integers(0, 8))):
        merges.append((data.draw(st.sampled_from(tokens)), data.draw(st.sampled_from(tokens))))
        tokens.append(b"".join(merges[-1]))
    known = sorted({bytes([b]) for b in range(256)} | set(tokens))
    vocab = dict(enumerate(data.draw(st.permutations(known) | st.just(bpe_module.BYTES + tokens[2:]))))
    text = data.draw(st.text("ab", max_size=20))
    ids, parts = Tokenizer.from_bpe(vocab, merges, []).encode(text), [bytes([b]) for b in text.encode()]
    rank = {pair: i for i, pair in reversed([*enumerate(merges)])}
    while found := [(rank[pair], at) for at, pair in enumerate(zip(parts, parts[1:])) if pair in rank]:
        at = min(found)[1]
        parts[at:at + 2] = [parts[at] + parts[at + 1]]
    assert [vocab[i] for i in ids] == parts


@given(TEXTS)
def test_every_text_comes_back(bpe, text):
    byte, char = Tokenizer.load("byte"), Tokenizer.from_text_chars(text + "x")
    for tokenizer in bpe, byte, char:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode_bytes(np.array(ids, dtype=tokenizer.dtype)) == text.encode()


@given(st.lists(TEXTS, max_size=8), st.integers(1, 40))
def test_stream_equals_the_whole(any_tokenizer, texts, chunk):
    text = "".join(texts)
    if any_tokenizer.name == "char":
        texts, text = [STORY[:300], STORY[300:310]], STORY[:310]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer_module, "STREAM_CHUNK", chunk)
        assert list(any_tokenizer.encode_iterable(texts)) == any_tokenizer.encode(text)


def test_batch_equals_one_by_one(any_tokenizer):
    texts = [STORY[:50], "", STORY]
    for ids, text in zip(any_tokenizer.encode_batch(texts, num_threads=2), texts):
        assert ids.dtype == any_tokenizer.dtype and ids.tolist() == any_tokenizer.encode(text)


def test_special_tokens_are_text_unless_allowed(bpe):
    assert bpe.eot == bpe.vocab_size - 1
    text = f"a{END_OF_TEXT}b"
    assert bpe.eot not in bpe.encode(text) and bpe.decode(bpe.encode(text)) == text
    assert bpe.encode(text, allowed_special="all") == [97, bpe.eot, 98] == bpe.encode(text, allowed_special={END_OF_TEXT})
    with pytest.raises(ValueError, match="<.no.>"):
        bpe.encode(text, allowed_special={"<|no|>"})


def test_a_longer_special_token_wins_over_its_beginning(trained):
    double = END_OF_TEXT * 2
    tokenizer = Tokenizer.from_bpe(*trained, special_tokens=[END_OF_TEXT, double])
    assert tokenizer.encode(double + END_OF_TEXT, allowed_special="all") == [tokenizer.eot + 1, tokenizer.eot]
    assert tokenizer.decode([tokenizer.eot + 1, tokenizer.eot]) == END_OF_TEXT * 3


def test_a_million_blanks_do_not_stop_the_core(bpe):
    text = "x" + " \n" * 600_000 + "y"
    assert bpe.decode(bpe.encode(text)) == text


def test_the_dtype_follows_the_size_of_the_vocabulary():
    chars = "".join(map(chr, range(0x10000, 0x20000)))
    assert Tokenizer.from_text_chars(chars).dtype == "uint16"
    large = Tokenizer.from_text_chars(chars + "x")
    assert large.dtype == "uint32" and large.decode(large.encode(chars)) == chars


# -- files ------------------------------------------------------------------------------------------------------------

def test_saved_and_loaded_is_identical(any_tokenizer, tmp_path):
    any_tokenizer.save(tmp_path / "tokenizer.json")
    for again in (Tokenizer.load(tmp_path / "tokenizer.json"), Tokenizer.from_dict(json.loads(json.dumps(any_tokenizer.to_dict()))),
                  pickle.loads(pickle.dumps(any_tokenizer))):
        assert again.to_dict() == any_tokenizer.to_dict()
        for field in "name", "vocab_size", "eot", "dtype", "special_tokens":
            assert getattr(again, field) == getattr(any_tokenizer, field)
        assert again.encode(STORY) == any_tokenizer.encode(STORY)
    assert os.listdir(tmp_path) == ["tokenizer.json"]


def test_export_to_gpt2_files_and_back(bpe, tmp_path):
    bpe.export_gpt2(tmp_path)
    again = Tokenizer.from_gpt2(tmp_path)
    assert again.encode(STORY) == bpe.encode(STORY) and again.special_tokens == bpe.special_tokens
    hf = pytest.importorskip("tokenizers").ByteLevelBPETokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    assert hf.encode(STORY).ids == bpe.encode(STORY)


# -- bad input --------------------------------------------------------------------------------------------------------

def test_bad_training_input_is_refused(tmp_path):
    for size in 0, 256, -1:
        with pytest.raises(ValueError, match=f"vocab_size={size} .* 257"):
            train_bpe(["text"], size)
    for nothing in [], [""], [tmp_path / "empty"]:
        (tmp_path / "empty").touch()
        with pytest.raises(ValueError, match="nothing to train on"):
            train_bpe(nothing, 300)
    (tmp_path / "latin1").write_bytes(b"x" * 3_000_000 + b"caf\xe9 ")
    with pytest.raises(ValueError, match=r"latin1 .*byte 3000003"):
        train_bpe([tmp_path / "latin1"], 300)
    (tmp_path / "half").write_bytes("é".encode()[:1])
    with pytest.raises(ValueError, match=r"half .*byte 0"):
        train_bpe([tmp_path / "half"], 300)
    for wrong, match in [("text", "brackets"), ([b"x"], "bytes"), (["a\ud800"], "text number 0: character 1 ")]:
        with pytest.raises(ValueError, match=match):
            train_bpe(wrong, 300)
    with pytest.raises(ValueError, match="empty"):
        train_bpe(["text"], 300, special_tokens=[""])
    with pytest.raises(ValueError, match="groups"):
        train_bpe(["text"], 300, pattern="(a)|.")


def test_lone_surrogates_and_unknown_characters_are_named(any_tokenizer):
    with pytest.raises(ValueError, match=r"character 3 is '.ud800'"):
        any_tokenizer.encode("It \ud800")
    with pytest.raises(ValueError, match=r"character 3 is '.ud800'"):
        list(any_tokenizer.encode_iterable(["It ", "\ud800"]))
    with pytest.raises(ValueError, match="char: character 1002 is 'Z'.* not among the 2 "):
        Tokenizer.from_text_chars("ab").encode("ab" * 501 + "Z")


@pytest.mark.parametrize("bad", [-1, 10**6, 2**40])
def test_bad_ids_are_named(any_tokenizer, bad):
    with pytest.raises(ValueError, match=f"token id {bad} "):
        any_tokenizer.decode([0, bad])


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


@pytest.mark.parametrize("content", [pickle.dumps(Evil()), b"", b"{}", b"[]", b"[" * 100_000, b"\xff", b'{"kind": "bpe", "name": 3}',
                                     b'{"kind": "tiktoken", "name": "/etc/passwd"}', b'{"kind": "char", "name": "c", "chars": 3}'])
def test_a_file_that_is_no_tokenizer_is_refused_by_name(content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.json").write_bytes(content)
    with pytest.raises(ValueError, match="file.json.* tokenizer"):
        Tokenizer.load(tmp_path / "file.json")
    assert os.listdir(tmp_path) == ["file.json"]


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match="gpt3.*byte.*gpt2"):
        Tokenizer.load("gpt3")


# -- the whole process ------------------------------------------------------------------------------------------------

def python(*args, **env):
    return subprocess.run([sys.executable, *args], env=os.environ | {"PYTHONPATH": str(ROOT)} | env, cwd=env.get("PWD"),
                          capture_output=True, timeout=60)


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_workers_never_run_the_main_script_again(method, tmp_path):
    script = tmp_path / "unguarded.py"
    script.write_text("import multiprocessing, data.bpe\n"
                      f"multiprocessing.set_start_method({method!r})\n"
                      "print('body')\n"
                      "data.bpe.TRAIN_CHUNK = 1000\n"
                      "print(data.bpe.train_bpe(['some words to count ' * 3000], 260, processes=2)[1])\n")
    result = python(str(script))
    expected = naive_bpe(["some words to count " * 3000], 3)
    assert result.stdout.decode().splitlines() == ["body", str(expected)], result.stderr


@pytest.mark.parametrize("flags", [[], ["-O"]])
def test_utf8_whatever_the_locale(flags, tmp_path):
    (tmp_path / "corpus.txt").write_bytes(STORY.encode())
    code = ("import sys; from pathlib import Path; from data.tokenizer import *\n"
            "t = Tokenizer.from_bpe(*train_bpe([Path('corpus.txt')], 300)); t.save('t.json'); t.export_gpt2('gpt2')\n"
            "text = Path('corpus.txt').read_bytes().decode()\n"
            "for u in t, Tokenizer.load('t.json'), Tokenizer.from_gpt2('gpt2'), Tokenizer.from_text_chars(text):\n"
            "    if u.decode(u.encode(text)) != text: sys.exit('differs')\n"
            "try: t.decode([300])\n"
            "except ValueError as error: print(ascii(str(error)))\n")
    result = python(*flags, "-c", code, LC_ALL="C", LANG="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", PWD=str(tmp_path))
    assert result.returncode == 0 and b"token id 300" in result.stdout, result.stderr


def test_no_network_for_tiktoken_is_one_clear_line(tmp_path):
    nowhere = "http://127.0.0.1:9"
    code = "from data.tokenizer import *\ntry: Tokenizer.load('p50k_base')\nexcept OSError as error: print(error)"
    result = python("-c", code, TIKTOKEN_CACHE_DIR=str(tmp_path), HTTPS_PROXY=nowhere, https_proxy=nowhere, NO_PROXY="", no_proxy="")
    message = result.stdout.decode()
    assert "cannot download p50k_base" in message and "TIKTOKEN_CACHE_DIR" in message and message.count("\n") == 1, result.stderr


def peak_memory(work):
    tracemalloc.start()
    work()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_memory_does_not_grow_with_the_text(bpe, monkeypatch):
    monkeypatch.setattr(bpe_module, "TRAIN_CHUNK", 2**14)

    def texts(n):
        return (STORY for _ in range(n))

    def work(n):
        deque(bpe.encode_iterable(texts(n)), maxlen=0)
        train_bpe(texts(n), 300, processes=1)

    work(1)
    assert peak_memory(lambda: work(400)) < 1.2 * peak_memory(lambda: work(40))


# -- GPT-2, where its files are ---------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def gpt2_from_files(gpt2, tmp_path_factory):
    """merges.txt and vocab.json are what tiktoken's cache holds under the SHA-1 of their addresses."""
    folder, cache = tmp_path_factory.mktemp("gpt2"), Path(os.environ["TIKTOKEN_CACHE_DIR"])
    for ours, theirs in [("merges.txt", "vocab.bpe"), ("vocab.json", "encoder.json")]:
        address = f"https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/{theirs}"
        shutil.copy(cache / hashlib.sha1(address.encode()).hexdigest(), folder / ours)
    return Tokenizer.from_gpt2(folder)


@given(text=TEXTS | st.text(st.characters(exclude_categories=["Cs"])))
@settings(deadline=None, max_examples=500)
def test_gpt2_encodes_as_tiktoken_does(gpt2, gpt2_from_files, text):
    ids = tiktoken.get_encoding("gpt2").encode_ordinary(text)
    assert gpt2.encode(text) == gpt2_from_files.encode(text) == list(gpt2.encode_iterable([text])) == ids
    assert gpt2.decode(ids) == gpt2_from_files.decode(ids) == text


def test_gpt2_is_described_as_such(gpt2, gpt2_from_files, tmp_path):
    for tokenizer in gpt2, gpt2_from_files:
        assert (tokenizer.vocab_size, tokenizer.eot, tokenizer.dtype) == (50257, 50256, "uint16")
        assert tokenizer.special_tokens == {END_OF_TEXT: 50256} and tokenizer.decode([50256]) == END_OF_TEXT
    assert Tokenizer.from_dict(gpt2.to_dict()).to_dict() == {"kind": "named", "name": "gpt2"}
    gpt2_from_files.export_gpt2(tmp_path)
    assert json.loads((tmp_path / "vocab.json").read_text("utf-8"))["Ġthe"] == 262
    assert Tokenizer.from_gpt2(tmp_path).encode(STORY) == gpt2.encode(STORY)
    with pytest.raises(ValueError, match="gpt2.* use save"):
        gpt2.export_gpt2(tmp_path)
