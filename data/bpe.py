"""Learns a byte-pair vocabulary (Sennrich et al. 2016; on bytes, as GPT-2's). tokenizer.py encodes with it.

Three steps: cut the texts into pieces that can be worked on apart; count their pre-tokens, in several processes;
merge the most frequent pair again and again, looking only at the words that have it.
"""
import multiprocessing
import os
import signal
import sys
import types
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from heapq import heapify, heappop, heappush
from itertools import chain, islice
from operator import add

import regex

END_OF_TEXT = "<|endoftext|>"
# The pattern splits a text into pre-tokens; no merge crosses from one into the next. The possessive ++ and the extra
# `\s++$` change no match: they spare the regular-expression engine its backtracking.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
GPT4_PATTERN = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
                r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s")
# The last place, searched from the end (?r), where these patterns and GPT-4o's split whatever stands around: before a
# space that follows text, and, for writing without spaces, before some punctuation.
LAST_SPLIT = regex.compile(r"(?r)(?<=\S)(?= )|(?<=[0-9A-Za-z一-鿿])(?=[\n.,;。，、])")
DOCUMENT_END = "\ud800"  # between training texts: half of a surrogate pair, so no text holds it
TRAIN_CHUNK = 2**21  # characters that a worker counts at a time: the list of their pre-tokens takes some 40 MB
BYTES = [bytes([b]) for b in range(256)]


def train_bpe(texts_or_paths, vocab_size, special_tokens=(END_OF_TEXT,), pattern=GPT2_PATTERN, processes=None):
    """Learns byte-pair merges from an iterable of texts (str) and files (Path, UTF-8), in memory that grows with the
    unique pre-tokens, not with the text.

    Returns (vocab, merges). vocab maps id to bytes: the 256 bytes, a token a merge, the special tokens; it stays below
    vocab_size where the text runs out of pairs. merges are pairs of bytes in the order of merging: the most frequent
    first, of equals the lexicographically greatest, whatever the number of processes (None: one a core).
    Raises ValueError for a vocab_size below 256 + special tokens, for no text, for a file that is not UTF-8.
    """
    special_tokens = list(dict.fromkeys(special_tokens))
    n_merges = vocab_size - 256 - len(special_tokens)
    if n_merges < 0:
        raise ValueError(f"vocab_size={vocab_size} is too small: 256 bytes and {len(special_tokens)} special tokens "
                         f"need {vocab_size - n_merges}")
    if isinstance(texts_or_paths, (str, bytes, os.PathLike)):
        raise ValueError("train_bpe takes a list of texts or Paths, not a single one: put it in brackets")
    if regex.compile(pattern).groups:
        raise ValueError(f"pattern {pattern!r} has groups: write them (?:...)")
    if not all(special_tokens):
        raise ValueError(f"a special token is empty: {special_tokens}")
    ends = [*special_tokens, DOCUMENT_END]
    chunks = pieces(_texts(texts_or_paths), TRAIN_CHUNK, ends)
    counts = _count_all(chunks, partial(_count, any_of(ends), pattern), processes or os.cpu_count())
    if not counts:
        raise ValueError("there is nothing to train on: no text, or only empty ones")
    tokens, merges = _learn_merges(counts, n_merges)
    return dict(enumerate(tokens + [token.encode() for token in special_tokens])), merges


def _learn_merges(counts, n_merges):
    # A word is a str whose characters are token ids: str.replace then applies a merge, from left to right, in C.
    words, freqs = [word.encode().decode("latin-1") for word in counts], list(counts.values())
    tokens, merges = list(BYTES), []
    # The heap pops the smallest, but of equal counts the greatest bytes are due. Complemented bytes sort the other way
    # round; the end mark, above them all, puts a token behind those that it is the beginning of.
    descending = [chr(255 - b) + chr(256) for b in range(256)]
    pair_count, where = Counter(), {}  # where: the words that have the pair, or had it before another merge
    for i, word in enumerate(words):
        for pair in map(add, word, word[1:]):
            pair_count[pair] += freqs[i]
            where.setdefault(pair, []).append(i)

    def entry(pair):
        return -pair_count[pair], descending[ord(pair[0])], descending[ord(pair[1])], pair

    heap = [entry(pair) for pair in pair_count]
    heapify(heap)
    while heap and len(merges) < n_merges:
        recorded, _, _, pair = heappop(heap)
        if pair_count[pair] != -recorded:  # other merges took places from it: back to where it belongs now
            if pair_count[pair]:
                heappush(heap, entry(pair))
            continue
        first, second = pair
        a, b, new = ord(first), ord(second), chr(len(tokens))
        merges.append((tokens[a], tokens[b]))
        tokens.append(tokens[a] + tokens[b])
        descending.append(descending[a][:-1] + descending[b])
        before, after = {}, {}  # neighbour of the new token -> the words where, once for every place
        for i in set(where.pop(pair)):
            if pair in words[i]:
                words[i] = word = words[i].replace(pair, new)
                at = word.find(new)
                while at >= 0:
                    if at > 0:
                        before.setdefault(word[at - 1], []).append(i)
                    if word[at + 1:at + 2] not in ("", new):  # two new ones in a row are counted once, in before
                        after.setdefault(word[at + 1], []).append(i)
                    at = word.find(new, at + 1)
        changes = [((second if char == new else char) + first, char + new, places) for char, places in before.items()]
        changes += [(second + char, new + char, places) for char, places in after.items()]
        for lost, gained, places in changes:
            where[gained] = places
            pair_count[gained] = sum(freqs[i] for i in places)
            pair_count[lost] -= pair_count[gained]
            heappush(heap, entry(gained))
        del pair_count[pair]
    return tokens, merges


def _count_all(chunks, count, processes):
    counts, jobs = Counter(), deque()
    head = list(islice(chunks, 4))
    # Starting workers takes as long as counting some megabytes, and a worker of somebody's pool may not start any.
    if len(head) < 4 or processes == 1 or multiprocessing.current_process().daemon:
        for chunk in chain(head, chunks):
            counts.update(count(chunk))
        return counts
    # Spawned everywhere, since a fork copies the locks of other threads (torch has some); Ctrl-C is the parent's.
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), signal.signal,
                             (signal.SIGINT, signal.SIG_IGN)) as pool:
        for chunk in chain(head, chunks):
            # A spawned process imports the main script again, which runs one without an `if __name__` guard once
            # more: while the pool may start a process, an empty module takes the script's place.
            main, sys.modules["__main__"] = sys.modules["__main__"], types.ModuleType("__main__")
            try:
                jobs.append(pool.submit(count, chunk))
            finally:
                sys.modules["__main__"] = main
            if len(jobs) > 2 * processes:  # texts may come faster than they are counted
                counts.update(jobs.popleft().result())
        for job in jobs:
            counts.update(job.result())
    return counts


def _count(ends, pattern, chunk):
    counts = Counter()
    for document in regex.split(ends, chunk):
        counts.update(regex.findall(pattern, document))
    return counts


def _texts(texts_or_paths):
    for n, source in enumerate(texts_or_paths):
        if isinstance(source, str):
            check_text(source, f"text number {n}")
            yield from (source[i:i + TRAIN_CHUNK] for i in range(0, len(source), TRAIN_CHUNK))
        elif isinstance(source, os.PathLike):
            yield from _read_utf8(source)
        else:
            raise ValueError(f"train_bpe takes texts (str) and files (Path), but number {n} is {type(source).__name__}")
        yield DOCUMENT_END


def _read_utf8(path):
    with open(path, encoding="utf-8", newline="") as file:  # newline="": as they are, \r\n too
        try:
            while text := file.read(TRAIN_CHUNK):
                yield text
        except UnicodeDecodeError as error:  # it happened in the block of bytes that was read last
            at = file.buffer.tell() - len(error.object) + error.start
            raise ValueError(f"{path} is not UTF-8 at byte {at}: convert it, with iconv for example") from None


def pieces(parts, size, special_tokens=()):
    """Cuts a stream of text into pieces of about `size` characters that can be encoded one by one: behind a special
    token, or else at the last split. A piece grows where there is neither."""
    held, length, limit = [], 0, size
    longest = max(map(len, special_tokens), default=0)
    for part in parts:
        held.append(part)
        length += len(part)
        if length >= limit:
            text = "".join(held)
            cut = max((text.rfind(token) + len(token) for token in special_tokens if token in text), default=0)
            if not cut and (split := LAST_SPLIT.search(text, endpos=max(0, length - longest))):  # not in half a token
                cut = split.start()
            if cut:
                yield text[:cut]
            held, length = [text[cut:]], length - cut
            limit = max(size, 2 * length)  # doubling keeps the searches linear
    yield "".join(held)


def check_text(text, where, offset=0):
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: character {offset + error.start} is {text[error.start]!a}, half of a surrogate "
                         "pair, which no UTF-8 text holds: read the text as UTF-8") from None


def any_of(special_tokens):
    # the longest first: one may begin with another
    return "|".join(regex.escape(token) for token in sorted(special_tokens, key=len, reverse=True))
