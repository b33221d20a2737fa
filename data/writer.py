"""Documents to token files: every prepare.py writes its train.bin, val.bin and meta.json here.

The formats are simple enough to say in full: `<split>.bin` holds the token ids, raw and
little-endian, uint16 or uint32; `<split>.mask.bin` one byte a token, 0 where the token is not to
be learnt; meta.json says which tokenizer made them and how much text they stand for. A file gets
its final name only when all of them are complete, so what has a final name can be trusted.
"""
import hashlib
import json
import os
import sys
import time
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import timedelta
from itertools import islice
from pathlib import Path

import numpy as np

BATCH_BYTES = 1 << 20  # of text handed to a thread at a time: big against the overhead, small against RAM


def split_by_hash(key, val_fraction, test_fraction=0.0):
    """'train', 'val' or 'test' for a document, decided by `key` (its text, or its family's name) alone.

    Position would put a corpus's last author into val; chance would change at every run; with the
    text as the key an exact duplicate lands on the same side as its twin and cannot leak.
    """
    key = key if isinstance(key, bytes) else key.encode("utf-8")
    digest = hashlib.blake2b(key, digest_size=8).digest()
    u = int.from_bytes(digest, "little") / 2**64  # uniform in [0, 1)
    return "val" if u < val_fraction else "test" if u < val_fraction + test_fraction else "train"


class Progress:
    """A bar with an ETA on stderr, gone after the `with`. Whoever reads the input sets `done` and `total`."""

    def __init__(self, total=0):
        self.done, self.total = 0, total
        self.live = sys.stderr.isatty()
        self.start = self.shown = time.monotonic()

    def show(self, note, fraction=None):
        now = time.monotonic()
        if now - self.shown < (0.2 if self.live else 30):  # a log file needs no animation
            return
        self.shown = now
        fraction = min(1.0, self.done / max(1, self.total)) if fraction is None else fraction
        eta = "?" if fraction == 0 else timedelta(seconds=int((now - self.start) * (1 - fraction) / fraction))
        line = f"[{'#' * round(30 * fraction):.<30}] {fraction:4.0%}  {note}  ETA {eta}"
        print(f"\r{line}\x1b[K" if self.live else f"{line}\n", end="", file=sys.stderr, flush=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):  # what is printed next, a table or an error, gets a line of its own
        print("\r\x1b[K" if self.live else "", end="", file=sys.stderr, flush=True)


@contextmanager
def explained(path):
    """An OSError inside gets the file's name and what to do: that of a full disk comes with neither."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # not the disk's: what goes wrong in a network is an OSError, too
            raise
        raise OSError(f"{path}: {error.strerror}; nothing was written under its final name, "
                      "free some space or choose another folder and run the command again") from None


class DatasetWriter:
    """`with DatasetWriter(folder, tokenizer) as w: w.add("train", ids, n_bytes)`, in any order of splits.

    Leaving the block publishes the data set: bins first, meta.json last. Leaving it by an exception
    (or dying in it) leaves what `folder` held before. Everything is streamed: memory is constant.
    """

    def __init__(self, folder, tokenizer, masked=False):
        self.folder, self.tokenizer, self.masked = Path(folder), tokenizer, masked
        self.dtype = np.dtype(tokenizer.dtype).newbyteorder("<")
        self.files = {}  # final name -> open temporary file
        self.documents, self.tokens, self.bytes = Counter(), Counter(), Counter()  # by split
        self.max_id = -1

    def __enter__(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        return self

    def add(self, split, ids, n_bytes, mask=None, documents=1):
        """Append token ids (1-D integers) that stand for `n_bytes` of UTF-8 text to `split`.

        `mask`, of the same length, is 0 where a token is not to be learnt. ValueError for an id outside the vocabulary.
        """
        ids = np.asarray(ids)
        if len(ids):
            low, high = int(ids.min()), int(ids.max())
            if low < 0 or high >= self.tokenizer.vocab_size:
                raise ValueError(f"token id {low if low < 0 else high} does not fit the tokenizer's "
                                 f"vocabulary of {self.tokenizer.vocab_size:,}: name the tokenizer that made the ids")
            self.max_id = max(self.max_id, high)
        self._append(f"{split}.bin", ids.astype(self.dtype, copy=False))
        if self.masked:
            self._append(f"{split}.mask.bin", np.asarray(mask, dtype=np.uint8))
        for counter, n in ((self.documents, documents), (self.tokens, len(ids)), (self.bytes, n_bytes)):
            counter[split] += n

    def _append(self, name, array):
        with explained(self.folder / name):
            if name not in self.files:
                self.files[name] = open(self.folder / f"{name}.tmp", "wb")
            self.files[name].write(array)

    def __exit__(self, kind, error, trace):
        try:
            if kind is None:
                self._publish()
        finally:
            for name, f in self.files.items():
                with suppress(OSError):  # what a full disk did not take is deleted all the same
                    f.close()
                (self.folder / f"{name}.tmp").unlink(missing_ok=True)

    def _publish(self):
        for split in ("train", "val"):
            if not self.tokens[split]:
                raise ValueError(f"no text fell into the {split} split of {self.folder}: "
                                 "is the input empty, or do --limit and the fractions leave nothing for it?")
        state = self.tokenizer.to_dict()
        if state["kind"] == "named" and state["name"] != "byte":
            name = state["name"]  # tiktoken knows it; any other tokenizer lies beside the bins
        else:
            name = "tokenizer.json"
            self._append(name, json.dumps(state, ensure_ascii=False, indent=0).encode("utf-8"))
        meta = {"vocab_size": self.tokenizer.vocab_size, "dtype": self.dtype.name, "tokenizer": name,
                "max_id": self.max_id, "tokens": self.tokens, "bytes": self.bytes}
        self._append("meta.json", json.dumps(meta, indent=1).encode() + b"\n")
        for name, f in self.files.items():
            with explained(self.folder / name):
                f.flush()
                os.fsync(f.fileno())
        # From here on nothing needs space. The old meta.json goes first: it must never describe new bins;
        # so must an earlier run's masks and test split, which this one may not replace.
        for old in ("meta.json", "test.bin", *(f"{split}.mask.bin" for split in ("train", "val", "test"))):
            (self.folder / old).unlink(missing_ok=True)
        for name in self.files:  # meta.json is the last that was opened
            os.replace(self.folder / f"{name}.tmp", self.folder / name)
        print(f"{'split':<6}{'documents':>14}{'tokens':>18}{'bytes/token':>14}")
        for split, n in self.tokens.items():
            print(f"{split:<6}{self.documents[split]:>14,}{n:>18,}{self.bytes[split] / max(1, n):>14.2f}")
        print(f"wrote {self.folder}")


def write_documents(folder, documents, tokenizer, progress=None, limit=0, threads=0, end_of_text=True):
    """Encode `documents`, an iterable of (split, text), on all cores and publish them in `folder`.

    Each document is followed by the end-of-text token, unless the tokenizer has none or `end_of_text` is
    False. `limit` stops after so many documents. Threads, because tiktoken's core lets go of the interpreter's
    lock: on two cores they beat processes by a quarter. The files do not depend on their number.
    """
    threads, progress = threads or os.cpu_count(), progress or Progress()
    seen, pending = 0, deque()

    def encode(batch):
        """[(split, text)] -> {split: (ids, bytes of text, documents)}"""
        parts = {}
        end = np.array([] if tokenizer.eot is None or not end_of_text else [tokenizer.eot], dtype=tokenizer.dtype)
        for (split, text), ids in zip(batch, tokenizer.encode_batch([text for _, text in batch])):
            pieces, n_bytes = parts.setdefault(split, ([], []))
            pieces += ids, end
            n_bytes.append(len(text.encode("utf-8")))
        return {split: (np.concatenate(pieces), sum(n_bytes), len(n_bytes)) for split, (pieces, n_bytes) in parts.items()}

    with DatasetWriter(folder, tokenizer) as writer, progress, ThreadPoolExecutor(threads) as pool:
        def drain(keep):
            while len(pending) > keep:  # in the order in which they came, whichever thread is first
                for split, (ids, n_bytes, n) in pending.popleft().result().items():
                    writer.add(split, ids, n_bytes, documents=n)
                progress.show(f"{seen:,} documents, {writer.tokens.total():,} tokens", seen / limit if limit else None)

        for batch in batches(documents, limit):
            seen += len(batch)
            pending.append(pool.submit(encode, batch))
            drain(keep=2 * threads)
        drain(keep=0)


def batches(documents, limit=0):
    """Lists of (split, text) of about BATCH_BYTES characters each, at most `limit` documents in all."""
    batch, size = [], 0
    for split, text in islice(documents, limit or None):
        batch.append((split, text))
        size += len(text)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
