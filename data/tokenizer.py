"""Text to token ids and back: byte-pair encoding (bpe.py trains it), tiktoken's encodings, characters, bytes.

Every BPE encodes in tiktoken's core. The prepare.py scripts and sample.py import this file.
"""
import json
import math
import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import regex
import tiktoken

from data.bpe import BYTES, END_OF_TEXT, GPT2_PATTERN, GPT4_PATTERN, any_of, check_text, pieces, train_bpe  # noqa: F401

STREAM_CHUNK = 2**14  # characters that encode_iterable holds
LONGEST_BLANK = 500_000  # a million whitespace characters in a row are too much for tiktoken's core: we cut them here
NAMES = ["byte", *sorted(tiktoken.list_encoding_names())]
# GPT-2's files spell a token in printable characters: bytes that are none in Latin-1 become U+0100 and so on, a space
# Ġ, a newline Ċ. Ours do too.
SPELLING = {b: 256 + i for i, b in enumerate([*range(33), *range(127, 161), 173])}
UNSPELLING = {char: b for b, char in SPELLING.items()}


class Tokenizer:
    """Encodes and decodes; made by load, from_bpe, from_gpt2, from_text_chars or from_dict.

    It has a name, vocab_size, special_tokens (text -> id), eot (the id of <|endoftext|>, or None) and dtype ('uint16',
    or 'uint32' where the ids need it).
    """

    def __init__(self, state, tokens, special_tokens, ids_of):
        self._state = state  # what from_dict made it of
        self._tokens = tokens  # bytes by id; None for an id that tiktoken leaves out
        self._ids_of = ids_of  # text -> array of ids
        self.name, self.vocab_size, self.special_tokens = state["name"], len(tokens), special_tokens
        self.eot = special_tokens.get(END_OF_TEXT)
        self.dtype = "uint16" if self.vocab_size <= 2**16 else "uint32"

    @classmethod
    def load(cls, name_or_path):
        """'byte', the name of a tiktoken encoding, or a file written by save. Raises ValueError for anything else,
        OSError where tiktoken has to download the encoding and cannot."""
        if name_or_path in NAMES:
            return cls._named({"kind": "named", "name": name_or_path})
        try:
            return cls.from_dict(json.loads(Path(name_or_path).read_bytes()))
        except FileNotFoundError:
            raise ValueError(f"tokenizer {str(name_or_path)!r} is no file, nor one of {', '.join(NAMES)}") from None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{name_or_path} is no tokenizer file as Tokenizer.save writes it: {error}") from None

    @classmethod
    def from_dict(cls, state):
        """The tokenizer whose to_dict this is. Raises ValueError for anything else."""
        try:
            return {"bpe": cls._bpe, "char": cls._char, "named": cls._named}[state["kind"]](state)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a tokenizer's dict ({type(error).__name__}: {error})") from None

    @classmethod
    def from_bpe(cls, vocab, merges, special_tokens=(END_OF_TEXT,), pattern=GPT2_PATTERN, name="bpe"):
        """From what train_bpe returns; the special tokens that the vocabulary lacks get the next ids. Raises ValueError
        where the ids are not 0, 1, 2 and so on, or where a byte or what a merge makes is missing."""
        if sorted(vocab) != list(range(len(vocab))):
            raise ValueError(f"the ids of a vocabulary of {len(vocab)} tokens must be 0 to {len(vocab) - 1}")
        tokens, known = [vocab[i] for i in range(len(vocab))], set(vocab.values())
        tokens += [token.encode() for token in dict.fromkeys(special_tokens) if token.encode() not in known]
        return cls._bpe({"kind": "bpe", "name": name, "pattern": pattern, "special_tokens": [*special_tokens],
                         "tokens": [_spell(token) for token in tokens],
                         "merges": [f"{_spell(a)} {_spell(b)}" for a, b in merges]})

    @classmethod
    def from_gpt2(cls, folder, pattern=GPT2_PATTERN):
        """From vocab.json and merges.txt as GPT-2 and Hugging Face have them. Tokens that are no byte and that no merge
        makes are the special ones. Raises ValueError for files of another format."""
        folder = Path(folder)
        try:
            ids = json.loads((folder / "vocab.json").read_bytes())
            lines = (folder / "merges.txt").read_bytes().decode().splitlines()
            merges = [line.split(" ") for line in lines if line and not line.startswith("#version")]
            ordinary = {*map(_spell, BYTES), *map("".join, merges)}
            vocab = {i: _unspell(token) if token in ordinary else token.encode() for token, i in ids.items()}
            return cls.from_bpe(vocab, [(_unspell(a), _unspell(b)) for a, b in merges],
                                [token for token in ids if token not in ordinary], pattern, folder.name)
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{folder}: vocab.json and merges.txt are not as GPT-2's: {error}") from None

    @classmethod
    def from_text_chars(cls, text, name="char"):
        """A token for every character of the text, in their order in Unicode; none for the end of text."""
        check_text(text, name)
        return cls._char({"kind": "char", "name": name, "chars": "".join(sorted(set(text)))})

    @classmethod
    def _bpe(cls, state):
        tokens = [_unspell(token) for token in state["tokens"]]
        # Of two ids with the same bytes a special token has the last, ordinary text the first that is not special.
        ids = {token: i for i, token in enumerate(tokens)}
        special_ids = {token: ids[token.encode()] for token in state["special_tokens"]}
        ids = {token: i for i, token in reversed([*enumerate(tokens)]) if i not in special_ids.values()}
        merges = [(_unspell(a), _unspell(b)) for a, b in (merge.split(" ") for merge in state["merges"])]
        by_rank = BYTES + _reachable(merges)
        if missing := [token for token in by_rank if token not in ids]:
            raise ValueError(f"{state['name']}: {missing[0]}, a byte or what a merge makes, is not in the vocabulary")
        # The special token is never allowed: we look for ours ourselves. With none, tiktoken's core would look for the
        # empty text, and find it before every character.
        core = tiktoken.Encoding(state["name"], pat_str=state["pattern"], special_tokens={END_OF_TEXT: len(by_rank)},
                                 mergeable_ranks={token: rank for rank, token in enumerate(by_rank)})
        id_by_rank = np.array([ids[token] for token in by_rank])
        return cls(state, tokens, special_ids, lambda text: id_by_rank[_core_ids(core, text)])

    @classmethod
    def _char(cls, state):
        ids = {char: i for i, char in enumerate(state["chars"])}
        if not 0 < len(ids) == len(state["chars"]):
            raise ValueError(f"{state['name']}: a vocabulary of characters needs at least one, and none twice")
        tokens = [char.encode() for char in ids]
        return cls(state, tokens, {}, lambda text: np.fromiter(map(ids.__getitem__, text), int))

    @classmethod
    def _named(cls, state):
        name = state["name"]
        if name == "byte":
            tokens = BYTES + [END_OF_TEXT.encode()]
            return cls(state, tokens, {END_OF_TEXT: 256}, lambda text: np.frombuffer(text.encode(), np.uint8))
        if name not in NAMES:
            raise ValueError(f"no encoding of tiktoken is named {name!r}")
        try:
            core = tiktoken.get_encoding(name)
        except (OSError, ImportError) as error:
            raise OSError(f"tiktoken cannot download {name} ({type(error).__name__}): go online once, or set "
                          "TIKTOKEN_CACHE_DIR to a folder that has its files") from None
        special_ids = {token: core.encode_single_token(token) for token in sorted(core.special_tokens_set)}
        tokens = [None] * core.n_vocab
        for token in [*core.token_byte_values(), *map(str.encode, special_ids)]:
            tokens[core.encode_single_token(token)] = token
        return cls(state, tokens, special_ids, partial(_core_ids, core))

    def to_dict(self):
        """Strings, numbers, lists and dicts only: it travels in checkpoints."""
        return self._state

    def __reduce__(self):  # for pickle, so that worker processes can have it
        return Tokenizer.from_dict, (self._state,)

    def save(self, path):
        """Writes to_dict as JSON; the file has its name only once it is complete."""
        write_text(path, json.dumps(self._state, ensure_ascii=False, indent=0))

    def export_gpt2(self, folder):
        """Writes vocab.json and merges.txt, for Hugging Face's GPT-2 tokenizer say. Raises ValueError for what the two
        files cannot hold."""
        special = {i: token for token, i in self.special_tokens.items()}
        vocab = {special.get(i, token): i for i, token in enumerate(self._state.get("tokens", ()))}
        if self._state.get("pattern") != GPT2_PATTERN or len(vocab) < self.vocab_size:
            raise ValueError(f"{self.name}: vocab.json and merges.txt hold only a BPE with GPT-2's pattern: use save")
        Path(folder).mkdir(parents=True, exist_ok=True)
        write_text(Path(folder, "vocab.json"), json.dumps(vocab, ensure_ascii=False))
        write_text(Path(folder, "merges.txt"), "\n".join(["#version: 0.2", *self._state["merges"], ""]))

    def encode(self, text, allowed_special=()):
        """A list of ids. Special tokens in the text are text like any other, but for the allowed ones ('all': every
        one). Raises ValueError for a character that has no token."""
        allowed = self.special_tokens if allowed_special == "all" else allowed_special
        if not set(allowed) <= self.special_tokens.keys():
            raise ValueError(f"{self.name} has the special tokens {[*self.special_tokens]}, not all of {[*allowed]}")
        ids, offset = [], 0
        for part in regex.split(f"({any_of(allowed)})", text) if allowed else [text]:
            ids += [self.special_tokens[part]] if part in allowed else self._ids(part, offset).tolist()
            offset += len(part)
        return ids

    def encode_batch(self, texts, num_threads=1):
        """A list of arrays of ids, of type self.dtype, one a text; special tokens in it are text."""
        if num_threads == 1:
            return [self._ids(text) for text in texts]
        step = max(1, min(64, len(texts) // num_threads))  # to hand over a short text takes longer than to encode it
        groups = [texts[i:i + step] for i in range(0, len(texts), step)]
        with ThreadPoolExecutor(num_threads) as pool:
            return list(chain.from_iterable(pool.map(self.encode_batch, groups)))

    def encode_iterable(self, texts):
        """Yields the ids of the texts joined (lines of a file, say), in constant memory; special tokens in them are
        text. Exact for the patterns of GPT-2 to GPT-4o, see LAST_SPLIT."""
        offset = 0
        for piece in pieces(texts, STREAM_CHUNK):
            yield from self._ids(piece, offset).tolist()
            offset += len(piece)

    def _ids(self, text, offset=0):
        check_text(text, self.name, offset)
        try:
            return self._ids_of(text).astype(self.dtype, copy=False)
        except KeyError as error:
            char = error.args[0]
            raise ValueError(f"{self.name}: character {offset + text.index(char)} is {char!r}, which is not among the "
                             f"{self.vocab_size} of the vocabulary") from None

    def decode_bytes(self, ids):
        """The bytes of the ids; one id may be part of a character. Raises ValueError for an id that does not exist."""
        parts = []
        for i in ids:
            if not 0 <= i < self.vocab_size or self._tokens[i] is None:
                raise ValueError(f"token id {i} is not in the vocabulary of {self.name}: 0 to {self.vocab_size - 1}")
            parts.append(self._tokens[i])
        return b"".join(parts)

    def decode(self, ids):
        """The text of the ids, with U+FFFD for bytes that are not UTF-8."""
        return self.decode_bytes(ids).decode(errors="replace")


def _core_ids(core, text):
    if len(text) < LONGEST_BLANK:
        return core.encode_to_numpy(text, disallowed_special=())
    cuts = [0, *(blank.end() for blank in regex.finditer(rf"\s{{{LONGEST_BLANK}}}", text)), len(text)]
    return np.concatenate([core.encode_to_numpy(text[a:b], disallowed_special=()) for a, b in pairwise(cuts)])


def _reachable(merges):
    """The tokens that merging arrives at, in the order of their merges. Merging takes the neighbours that come first
    among the merges, the leftmost of them first, until no merge applies: GPT-2's way and Hugging Face's.

    tiktoken instead joins neighbours that spell any token, the first token of all first. Both do the same if each token
    stands where the merge does that makes it out of its own bytes: a stretch of text across whose ends nothing has been
    merged is merged as if it stood alone. A merge that does not end that process for its own bytes, since others make
    the same token or take away its parts, never applies anywhere, and is left out. Trained merges all apply.
    """
    rank = {pair: i for i, pair in reversed([*enumerate(merges)])}
    reached = []
    for i, pair in enumerate(merges):
        parts = [bytes([b]) for b in b"".join(pair)]
        while len(parts) > 2:
            best, at = min((rank.get(two, math.inf), at) for at, two in enumerate(pairwise(parts)))
            if best == math.inf:
                break
            parts[at:at + 2] = [parts[at] + parts[at + 1]]
        if tuple(parts) == pair and rank[pair] == i:
            reached.append(b"".join(pair))
    return reached


def _spell(token):
    return token.decode("latin-1").translate(SPELLING)


def _unspell(string):
    return string.translate(UNSPELLING).encode("latin-1")


def write_text(path, text):
    with open(f"{path}.tmp", "w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(f"{path}.tmp", path)
