"""Text to token ids and back: byte-pair encoding trained here, any encoding of tiktoken, characters, bytes.

`train_bpe` learns a vocabulary (Sennrich et al. 2016, on bytes as in GPT-2); a `Tokenizer` holds one, encodes
with it in tiktoken's core, and is saved as JSON. Not a script: the prepare.py scripts and sample.py import it.
"""
import codecs
import json
import math
import multiprocessing
import os
import signal
import sys
import types
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from heapq import heapify, heappop, heappush
from itertools import chain, islice, pairwise
from operator import add
from pathlib import Path

import numpy as np
import regex
import tiktoken

END_OF_TEXT = "<|endoftext|>"
# How text falls into pre-tokens; no merge crosses from one into the next. The possessive ++ and the extra `\s++$`
# change no match: they spare the regex engine's backtracking.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
GPT4_PATTERN = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
                r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s")

# Text may be cut behind a letter or digit that something else follows: neither pattern, nor GPT-4o's, joins a
# letter or digit to what comes after, except letters, digits, marks and apostrophes ('s). (?r) searches backwards.
LAST_CUT = regex.compile(r"(?r)(?<=[\p{L}\p{N}])(?=[^\p{L}\p{N}\p{M}'])")
TRAIN_CHUNK = 2**21  # characters a worker counts at a time: its list of pre-tokens takes about 40 MB
STREAM_CHUNK = 2**14  # characters that encode_iterable holds back
LONGEST_SPACE = 500_000  # tiktoken's regex engine panics at a million whitespace characters in a row: cut them here

# GPT-2's files write bytes as printable characters: those that are printable in Latin-1 stand for themselves, the
# others are numbered from U+0100 on. A space becomes Ġ, a newline Ċ.
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTE_TO_CHAR = {b: chr(b) for b in _PRINTABLE}
BYTE_TO_CHAR |= {b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in BYTE_TO_CHAR)}
CHAR_TO_BYTE = {char: b for b, char in BYTE_TO_CHAR.items()}


def train_bpe(texts_or_paths, vocab_size, special_tokens=(END_OF_TEXT,), pattern=GPT2_PATTERN, processes=None):
    """Learns byte-pair merges from an iterable of texts (str) and files (Path, UTF-8).

    Returns (vocab, merges): vocab maps id to bytes, ids 0 to 255 being the bytes, then one id a merge in the order of
    creation, then the special tokens; merges are pairs of bytes. The most frequent pair is merged first, of equal
    ones the lexicographically greatest; the result does not depend on `processes` (None: one a core). Where the text
    has no pair left, the vocabulary stays smaller than vocab_size. Memory grows with the number of unique
    pre-tokens, not with the text. Raises ValueError for a vocab_size below 256 + specials, for empty text, for a
    file that is not UTF-8.
    """
    special_tokens = _check_specials(special_tokens)
    smallest = 256 + len(special_tokens)
    if vocab_size < smallest:
        raise ValueError(f"vocab_size={vocab_size} is too small: 256 bytes and {len(special_tokens)} special tokens need {smallest}")
    if isinstance(texts_or_paths, (str, bytes)):
        raise ValueError(f"texts_or_paths is one {type(texts_or_paths).__name__}: pass a list, [text] or [Path(file)]")
    if isinstance(texts_or_paths, os.PathLike):
        texts_or_paths = [texts_or_paths]

    counts = _count_pretokens(_training_texts(texts_or_paths, special_tokens), special_tokens, pattern, processes)
    if not counts:
        raise ValueError("there is no text to train on: every text and file given is empty")
    tokens, merges = _learn_merges(counts, vocab_size - smallest)
    tokens += [token.encode() for token in special_tokens]
    return dict(enumerate(tokens)), merges


def _learn_merges(counts, n_merges):
    # A word is a str whose characters are token ids: str.replace then applies a merge from left to right, in C.
    words = [pretoken.encode().decode("latin-1") for pretoken in counts]
    freqs = list(counts.values())
    tokens = [bytes([b]) for b in range(256)]
    # The heap gives the smallest first, we want the greatest bytes first. Complementing each byte turns the order
    # round; the end mark, above all bytes, puts a prefix behind what it is a prefix of.
    descending = [chr(255 - b) + chr(256) for b in range(256)]
    pair_count, where = Counter(), {}  # where: indices of the words that have, or once had, the pair
    for i, word in enumerate(words):
        for pair in map(add, word, word[1:]):
            pair_count[pair] += freqs[i]
            where.setdefault(pair, []).append(i)

    def entry(pair):
        return -pair_count[pair], descending[ord(pair[0])], descending[ord(pair[1])], pair

    heap = [entry(pair) for pair in pair_count]
    heapify(heap)
    merges = []
    while heap and len(merges) < n_merges:
        recorded, _, _, pair = heappop(heap)
        if -recorded != pair_count[pair]:  # other merges took some of its places since; counts never rise again
            if pair_count[pair]:
                heappush(heap, entry(pair))
            continue
        first, second = pair
        new = chr(len(tokens))
        merges.append((tokens[ord(first)], tokens[ord(second)]))
        tokens.append(tokens[ord(first)] + tokens[ord(second)])
        descending.append(descending[ord(first)][:-1] + descending[ord(second)])

        before, after = {}, {}  # neighbour of the new token -> the words, one entry for each place
        for i in where.pop(pair):
            if pair not in words[i]:
                continue
            words[i] = word = words[i].replace(pair, new)
            at = word.find(new)
            while at >= 0:
                if at > 0:
                    before.setdefault(word[at - 1], []).append(i)
                if at + 1 < len(word) and word[at + 1] != new:  # two in a row: counted once, as the later one's before
                    after.setdefault(word[at + 1], []).append(i)
                at = word.find(new, at + 1)
        changes = [((second if char == new else char) + first, char + new, places) for char, places in before.items()]
        changes += [(second + char, new + char, places) for char, places in after.items()]
        for old, gained, places in changes:
            n = sum(freqs[i] for i in places)
            pair_count[old] -= n
            pair_count[gained] = n
            where[gained] = places
            heappush(heap, entry(gained))
        del pair_count[pair]
    return tokens, merges


def _count_pretokens(texts, special_tokens, pattern, processes):
    compiled = _compile(pattern)  # a bad pattern is the caller's error, not a worker's
    job = _split_at(special_tokens), compiled.pattern
    processes = processes or len(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count()))
    counts = Counter()
    batches = _batches(texts)
    head = list(islice(batches, 4))
    # Starting workers takes as long as counting some megabytes; a worker of somebody's pool may not start its own.
    if len(head) < 4 or processes == 1 or multiprocessing.current_process().daemon:
        for batch in chain(head, batches):
            counts.update(_count_batch(*job, batch))
        return counts
    # Spawn, on every system: a fork would copy the locks of torch's threads. The children need this module only.
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), signal.signal,
                             (signal.SIGINT, signal.SIG_IGN)) as pool:
        waiting = deque()
        for batch in chain(head, batches):
            if len(waiting) == 2 * processes:  # bounds the memory: texts may come faster than they are counted
                counts.update(waiting.popleft().result())
            waiting.append(_submit(pool, _count_batch, *job, batch))
        for result in waiting:
            counts.update(result.result())
    return counts


def _count_batch(special_split, pattern, batch):
    counts, findall = Counter(), regex.compile(pattern).findall
    for text in batch:
        for document in regex.split(special_split, text) if special_split else [text]:
            counts.update(findall(document))
    return counts


def _submit(pool, *job):
    """A spawned child imports the parent's main script again, and would run one that has no `if __name__` guard:
    while the pool may start one, an empty module stands in for the script."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        return pool.submit(*job)
    finally:
        sys.modules["__main__"] = main


def _compile(pattern):
    try:
        compiled = regex.compile(pattern)
    except regex.error as error:
        raise ValueError(f"pattern {pattern!r} is not a regular expression: {error}") from None
    if compiled.groups or compiled.match(""):
        raise ValueError(f"pattern {pattern!r} must match no empty text and use (?:...) for its groups")
    return compiled


def _check_specials(special_tokens):
    special_tokens = list(special_tokens)
    for token in special_tokens:
        if not isinstance(token, str) or not token or special_tokens.count(token) > 1:
            raise ValueError(f"special token {token!r} must be a str, not empty, and given once")
    return special_tokens


def _split_at(special_tokens):
    """A regular expression that finds them, the longest first where one begins with another; '' if there are none."""
    return "|".join(regex.escape(token) for token in sorted(special_tokens, key=len, reverse=True))


def _training_texts(texts_or_paths, special_tokens):
    for n, source in enumerate(texts_or_paths):
        if isinstance(source, os.PathLike):
            parts = _read_utf8(source)
        elif isinstance(source, str):
            _check_text(source, f"text number {n}")
            parts = (source[i:i + TRAIN_CHUNK] for i in range(0, len(source), TRAIN_CHUNK))
        else:
            raise ValueError(f"texts_or_paths holds {type(source).__name__} as number {n}: expected str or Path")
        yield from _pieces(parts, TRAIN_CHUNK, special_tokens)


def _batches(texts):
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= TRAIN_CHUNK // 2:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _read_utf8(path):
    with open(path, "rb") as file:
        rest, offset = b"", 0
        while block := file.read(2**20):
            rest += block
            text, used = _decode(rest, False, path, offset)
            yield text
            rest, offset = rest[used:], offset + used
        _decode(rest, True, path, offset)


def _decode(data, final, path, offset):
    try:
        return codecs.utf_8_decode(data, "strict", final)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 at byte {offset + error.start:,}: convert it first (iconv -t utf-8)") from None


def _pieces(parts, size, special_tokens=()):
    """Joins and cuts a stream of texts into pieces of about `size` characters that may be encoded one by one: behind
    a special token, else where LAST_CUT finds a place. Where there is none, a piece grows."""
    held, length, limit = [], 0, size
    longest = max(map(len, special_tokens), default=0)
    for part in parts:
        held.append(part)
        length += len(part)
        if length < limit:
            continue
        text = "".join(held)
        cut = max((text.rfind(token) + len(token) for token in special_tokens if token in text), default=0)
        if not cut and (match := LAST_CUT.search(text, endpos=max(0, length - longest))):  # not into a special token
            cut = match.start()
        if cut:
            yield text[:cut]
        held, length = [text[cut:]], length - cut
        limit = max(size, 2 * length)  # doubling keeps the time linear
    if length:
        yield "".join(held)


def _check_text(text, where=""):
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _bad_character(error, where) from None


def _bad_character(error, where, offset=0):
    char = error.object[error.start]
    why = "is not in this vocabulary" if error.encoding == "char" else "is half of a surrogate pair: no valid text has one"
    return ValueError(f"{where}: character {offset + error.start:,} ({char!a}) {why}")


class Tokenizer:
    """Text to ids and back. Made by load, from_bpe, from_gpt2, from_text_chars or from_dict.

    name; vocab_size; special_tokens {str: id}; eot, the id of <|endoftext|> or None; dtype, 'uint16' or 'uint32',
    the smallest that holds every id.
    """

    def __init__(self, name, tokens, special_tokens, ids_of, state):
        self.name = name
        self.vocab_size = len(tokens)
        self.special_tokens = special_tokens
        self.eot = special_tokens.get(END_OF_TEXT)
        self.dtype = "uint16" if self.vocab_size <= 2**16 else "uint32"
        self._tokens = tokens  # bytes by id, None for an id that stands for nothing
        self._ids_of = ids_of  # str -> array of ids; special tokens are ordinary text to it
        self._state = state

    @classmethod
    def load(cls, name_or_path):
        """'byte', the name of one of tiktoken's encodings, or the path of a file that save wrote. tiktoken downloads
        an encoding on first use. Raises ValueError for anything else, OSError for a failed download."""
        if name_or_path == "byte":
            return cls._bytes()
        if name_or_path in tiktoken.list_encoding_names():
            return cls._tiktoken(name_or_path)
        path = Path(name_or_path)
        if not path.is_file():
            raise ValueError(f"{path} is no tokenizer file, nor one of: byte, {', '.join(sorted(tiktoken.list_encoding_names()))}")
        try:
            state = json.loads(path.read_bytes().decode())
        except (ValueError, RecursionError):
            raise ValueError(f"{path} is not a tokenizer file: it is no JSON; write one with Tokenizer.save") from None
        try:
            return cls.from_dict(state)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    @classmethod
    def from_bpe(cls, vocab, merges, special_tokens=(END_OF_TEXT,), pattern=GPT2_PATTERN, name="bpe"):
        """From vocab {id: bytes} and merges [(bytes, bytes)], most important first, as train_bpe returns them. The ids
        are the vocabulary's; special tokens that it lacks get the next ones."""
        special_tokens = _check_specials(special_tokens)
        _compile(pattern)
        ids = {token: i for i, token in sorted(vocab.items())}
        specials = {}
        for token in special_tokens:
            specials[token] = ids.get(token.encode(), len(vocab) + sum(i >= len(vocab) for i in specials.values()))
        # Where two ids have the same bytes, the special token has the greater one, ordinary text the smaller.
        ids = {token: i for i, token in sorted(vocab.items(), reverse=True) if i not in specials.values()}
        tokens = vocab | {i: token.encode() for token, i in specials.items()}
        if sorted(tokens) != list(range(len(tokens))):
            raise ValueError(f"the ids of a vocabulary must be 0 to its size - 1, each once; this one has {len(tokens):,} "
                             f"from {min(tokens)} to {max(tokens)}")
        ranked = [bytes([b]) for b in range(256)] + _reachable(merges)
        for token in ranked:
            if token not in ids:
                raise ValueError(f"the vocabulary lacks {token!r}, which is a byte or what a merge makes")
        core = tiktoken.Encoding(name, pat_str=pattern, special_tokens={},
                                 mergeable_ranks={token: rank for rank, token in enumerate(ranked)})
        id_of_rank = np.array([ids[token] for token in ranked], dtype=np.uint32)
        state = {"kind": "bpe", "name": name, "pattern": pattern, "special_tokens": specials,
                 "vocab": {_printable(token): i for i, token in sorted(vocab.items()) if i not in specials.values()},
                 "merges": [f"{_printable(a)} {_printable(b)}" for a, b in merges]}
        return cls(name, [tokens[i] for i in range(len(tokens))], specials,
                   lambda text: id_of_rank[_core_ids(core, text)], state)

    @classmethod
    def from_text_chars(cls, text, name="char"):
        """One id for every character of the text, in the order of their code points; no end-of-text token."""
        if not text:
            raise ValueError("there are no characters to take from an empty text")
        _check_text(text, name)
        chars = sorted(set(text))
        codes = np.array([ord(char) for char in chars], dtype=np.uint32)

        def ids_of(text):
            points = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
            ids = np.searchsorted(codes, points).clip(max=len(codes) - 1)
            if (unknown := codes[ids] != points).any():
                at = int(unknown.argmax())
                raise UnicodeEncodeError("char", text, at, at + 1, "unknown")  # _ids makes the message of both kinds
            return ids

        return cls(name, [char.encode() for char in chars], {}, ids_of, {"kind": "char", "name": name, "chars": "".join(chars)})

    @classmethod
    def _bytes(cls):
        tokens = [bytes([b]) for b in range(256)] + [END_OF_TEXT.encode()]
        return cls("byte", tokens, {END_OF_TEXT: 256}, lambda text: np.frombuffer(text.encode(), np.uint8),
                   {"kind": "byte", "name": "byte"})

    @classmethod
    def _tiktoken(cls, name):
        try:
            core = tiktoken.get_encoding(name)
        except (OSError, ImportError, ValueError) as error:  # requests' errors are OSErrors
            raise OSError(f"tiktoken has no copy of {name!r} and cannot download one ({type(error).__name__}): connect "
                          "this machine once, or set TIKTOKEN_CACHE_DIR to a folder that holds its files") from None
        specials = {token: core.encode_single_token(token) for token in sorted(core.special_tokens_set)}
        tokens = [None] * core.n_vocab
        for token in core.token_byte_values():
            tokens[core.encode_single_token(token)] = token
        for token, i in specials.items():
            tokens[i] = token.encode()
        return cls(name, tokens, specials, lambda text: _core_ids(core, text), {"kind": "tiktoken", "name": name})

    @classmethod
    def from_gpt2(cls, folder, pattern=GPT2_PATTERN):
        """From vocab.json and merges.txt, as GPT-2 and Hugging Face write them. What is neither a byte nor made by a
        merge is a special token; the files do not say the pattern."""
        folder = Path(folder)
        try:
            by_token = json.loads((folder / "vocab.json").read_bytes().decode())
            lines = (folder / "merges.txt").read_bytes().decode().split("\n")
            merges = _parse_merges(line for line in lines if line and not line.startswith("#version"))
            made = {bytes([b]) for b in range(256)} | {a + b for a, b in merges}
            vocab, specials = {}, []
            for token, i in sorted(by_token.items(), key=lambda item: item[1]):
                plain = set(token) <= CHAR_TO_BYTE.keys() and _unprintable(token) in made
                vocab[i] = _unprintable(token) if plain else token.encode()
                specials += [] if plain else [token]
        except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{folder}: vocab.json and merges.txt are not GPT-2's format ({error})") from None
        return cls.from_bpe(vocab, merges, specials, pattern, name=folder.name)

    def export_gpt2(self, folder):
        """Writes vocab.json and merges.txt, which Hugging Face's GPT-2 tokenizers read too."""
        if self._state.get("pattern") != GPT2_PATTERN:
            raise ValueError(f"{self.name}: vocab.json and merges.txt hold only BPE vocabularies with GPT-2's pattern; use save()")
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        vocab = self._state["vocab"] | self.special_tokens
        if len(vocab) < self.vocab_size:
            raise ValueError(f"{self.name}: a special token is spelt like an ordinary one, vocab.json cannot hold both")
        _write(folder / "vocab.json", json.dumps(vocab, ensure_ascii=False))
        _write(folder / "merges.txt", "\n".join(["#version: 0.2", *self._state["merges"], ""]))

    @classmethod
    def from_dict(cls, state):
        """The tokenizer that to_dict described. Raises ValueError for a dict that is no such description."""
        try:
            kind, name = state["kind"], state["name"]
            if kind == "byte" or kind == "tiktoken" and name in tiktoken.list_encoding_names():
                return cls.load(name)
            if kind == "char":
                return cls.from_text_chars(state["chars"], name)
            if kind == "bpe":
                vocab = {i: _unprintable(token) for token, i in state["vocab"].items()}
                vocab |= {i: token.encode() for token, i in state["special_tokens"].items()}
                return cls.from_bpe(vocab, _parse_merges(state["merges"]), state["special_tokens"], state["pattern"], name)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a tokenizer as Tokenizer.save writes it ({type(error).__name__}: {error})") from None
        raise ValueError(f"not a tokenizer as Tokenizer.save writes it: kind {kind!r}, name {name!r}")

    def to_dict(self):
        """Strings, numbers, lists and dicts from which from_dict makes this tokenizer again: it travels in checkpoints."""
        return self._state

    def __reduce__(self):
        return Tokenizer.from_dict, (self._state,)

    def save(self, path):
        """Writes to_dict as JSON; load reads it. The file appears under its name only when it is complete."""
        _write(Path(path), json.dumps(self._state, ensure_ascii=False, indent=0))

    def encode(self, text, allowed_special=()):
        """The ids of a text. Special tokens in it are ordinary text, except those in allowed_special ('all': every
        one). Raises ValueError for a character that has no id, or that no valid text has."""
        allowed = self.special_tokens if allowed_special == "all" else allowed_special
        if not allowed:
            return self._ids(text).tolist()
        if unknown := set(allowed) - self.special_tokens.keys():
            raise ValueError(f"{self.name} has no special token {min(unknown)!r}, only {list(self.special_tokens)}")
        ids, offset = [], 0
        for part in regex.split(f"({_split_at(allowed)})", text):
            ids += [self.special_tokens[part]] if part in allowed else self._ids(part, offset).tolist()
            offset += len(part)
        return ids

    def encode_batch(self, texts, num_threads=1):
        """A list of arrays of ids, of dtype self.dtype, one a text, special tokens being ordinary text; the threads
        run at once for BPE, whose work is done outside Python's lock."""
        with ThreadPoolExecutor(num_threads) as pool:
            return list(pool.map(self._ids, texts))

    def encode_iterable(self, texts):
        """Yields the ids of the texts as if they were one (a file's lines, say), in constant memory: it holds back
        some thousand characters. Exact for the patterns of GPT-2 to GPT-4o; another pattern might see its pre-tokens
        cut where a letter or digit ends."""
        offset = 0
        for piece in _pieces(texts, STREAM_CHUNK):
            yield from self._ids(piece, offset).tolist()
            offset += len(piece)

    def decode_bytes(self, ids):
        """The bytes of the ids; a single id's may be a part of a character. Raises ValueError for an id out of range."""
        parts, tokens, size = [], self._tokens, self.vocab_size
        for i in ids:
            if not 0 <= i < size or tokens[i] is None:
                raise ValueError(f"token id {i} is not in the vocabulary of {self.name} (ids 0 to {size - 1:,})")
            parts.append(tokens[i])
        return b"".join(parts)

    def decode(self, ids):
        """The text of the ids; bytes that are no UTF-8, such as half a character, become U+FFFD."""
        return self.decode_bytes(ids).decode(errors="replace")

    def _ids(self, text, offset=0):
        try:
            return self._ids_of(text).astype(self.dtype, copy=False)
        except UnicodeEncodeError as error:
            raise _bad_character(error, self.name, offset) from None


def _core_ids(core, text):
    if len(text) < LONGEST_SPACE:
        return core.encode_to_numpy(text, disallowed_special=())
    text.encode()  # a surrogate is reported at its place in the whole text
    cuts = [0, *(match.end() for match in regex.finditer(rf"\s{{{LONGEST_SPACE}}}", text)), len(text)]
    return np.concatenate([core.encode_to_numpy(text[a:b], disallowed_special=()) for a, b in pairwise(cuts)])


def _reachable(merges):
    """The tokens, by rank, that merging in order (the first merge in the list first, the leftmost place first) arrives
    at. tiktoken merges any two neighbours that together spell a token, by the token's rank. That is the same, if each
    token stands at the rank of the one merge that makes it of its own bytes: what happens within a stretch that no
    merge has crossed does not depend on its surroundings. Merges that never happen so (two spell the same bytes, or
    an earlier merge always takes a part away) must not get a rank. Trained merges all happen.
    """
    rank = {pair: i for i, pair in reversed([*enumerate(merges)])}
    reached = []
    for i, (a, b) in enumerate(merges):
        parts = [bytes([byte]) for byte in a + b]
        while len(parts) > 2:
            best, at = min((rank.get(pair, math.inf), at) for at, pair in enumerate(pairwise(parts)))
            if best == math.inf:
                break
            parts[at:at + 2] = [parts[at] + parts[at + 1]]
        if parts == [a, b] and rank[a, b] == i:
            reached.append(a + b)
    return reached


def _printable(token):
    return "".join(BYTE_TO_CHAR[byte] for byte in token)


def _unprintable(string):
    return bytes(CHAR_TO_BYTE[char] for char in string)


def _parse_merges(lines):
    return [(_unprintable(a), _unprintable(b)) for a, b in (line.split(" ") for line in lines)]


def _write(path, text):
    part = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(part, "wb") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
