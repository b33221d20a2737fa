"""Documents out of files: text, .jsonl, parquet, token ids; as a stream, in constant memory.

Every error names the file and the place in it: a line, a byte offset, a column.
"""
import gzip
import json
import re
import zipfile
import zlib
from contextlib import contextmanager
from pathlib import Path

import numpy as np

MAX_TEXT = 1 << 18  # bytes after which a text file without separators is cut
SEPARATOR = re.compile(rb"<\|endoftext\|>[\r\n]*")
ENDINGS = (".txt", ".md", ".jsonl", ".parquet", ".npy", ".npz")


def input_files(names, endings=ENDINGS):
    """The files that `names`, separated by commas, name; a folder stands for all in it with one of the endings, sorted."""
    if not names.strip(","):
        raise ValueError("--input is missing: name files or folders, separated by commas (--input=a.txt,folder/)")
    files = []
    for path in map(Path, filter(None, names.split(","))):
        if path.is_dir():
            files += (found := sorted(file for file in path.rglob("*") if kind(file) in endings and file.is_file()))
        elif not path.is_file():
            raise ValueError(f"--input: {path} does not exist (seen from {Path.cwd()})")
        else:
            files += (found := [path] if kind(path) in endings else [])
        if not found:
            raise ValueError(f"--input: {path} is or holds nothing that ends in {', '.join(endings)} (.gz may follow)")
    if not any(path.stat().st_size for path in files):
        raise ValueError(f"--input: {names} is empty: there is no byte of text in it")
    return files


def kind(path):
    """'.txt' for a.txt and a.txt.gz."""
    return Path(path.stem).suffix if path.suffix == ".gz" else path.suffix


def decode(data, path, offset=0):
    """`data`, which stands at byte `offset` of `path`, as text; ValueError where it is not UTF-8."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {offset + error.start:,} "
                         f"(0x{data[error.start]:02x}): convert it, for example with iconv -t UTF-8") from None


def documents(paths, progress, key="text"):
    """The texts in `paths` one after another, in constant memory; `progress.done` follows in bytes read.

    .parquet and .jsonl hold one document a row, in the column or field `key` (None: the whole value of a
    .jsonl's line, as a pair with where it stands); .txt and .md are divided at <|endoftext|>, and where none
    comes for long at the end of a paragraph; .gz on top of these is undone.
    """
    for path in map(Path, paths):
        start = progress.done
        read = {".parquet": _parquet, ".jsonl": _lines}.get(kind(path), _texts)
        for text, position in read(path, key):
            progress.done = start + position
            yield text
        progress.done = start + path.stat().st_size


def _parquet(path, column):
    try:
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise ModuleNotFoundError("reading parquet needs a package that is not installed: pip install pyarrow") from None
    try:
        file = pyarrow.parquet.ParquetFile(path)
        size, rows, row = path.stat().st_size, file.metadata.num_rows, 0
        if column not in file.schema_arrow.names:
            raise ValueError(f"it has no column {column!r}, only {', '.join(file.schema_arrow.names)}")
        if str(file.schema_arrow.field(column).type) not in ("string", "large_string"):
            raise ValueError(f"its column {column!r} holds no text but {file.schema_arrow.field(column).type}")
        for batch in file.iter_batches(batch_size=1024, columns=[column]):
            for text in batch.column(0).to_pylist():
                row += 1
                if text:
                    yield text, size * row // rows
    except (pyarrow.ArrowException, ValueError, OSError) as error:
        raise ValueError(f"{path}: {error}") from None


@contextmanager
def _opened(path):
    """The file's bytes, unpacked where it ends in .gz; `tell` below it is in bytes of the file itself."""
    try:
        with open(path, "rb") as raw:
            yield raw, gzip.open(raw) if path.suffix == ".gz" else raw
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: damaged gzip file: {error}") from None


def _lines(path, key):
    with _opened(path) as (raw, lines):
        offset = 0
        for number, line in enumerate(lines, 1):
            text, where = decode(line, path, offset), f"{path}, line {number:,}"
            offset += len(line)
            if not text.strip():
                continue
            try:
                value = json.loads(text)
                if "\\u" in text:  # \\ud800 is half a surrogate pair, which is no text
                    json.dumps(value, ensure_ascii=False).encode("utf-8")
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where}: not JSON in UTF-8: {error}") from None
            if key is None:
                yield (where, value), raw.tell()
            elif not isinstance(value, dict) or not isinstance(value.get(key), str):
                raise ValueError(f"{where}: expected an object with a text field {key!r}; --key names another")
            elif value[key]:
                yield value[key], raw.tell()


def _texts(path, _):
    """Documents of a text file: what stands between separators, MAX_TEXT bytes at most."""
    with _opened(path) as (raw, file):
        buffer, pos, offset, more = b"", 0, 0, True  # the next document starts at buffer[pos], byte offset + pos
        while more or pos < len(buffer):
            if more and len(buffer) - pos < 2 * MAX_TEXT:
                block = file.read(4 * MAX_TEXT)
                buffer, pos, offset, more = buffer[pos:] + block, 0, offset + pos, bool(block)
                continue
            separator = SEPARATOR.search(buffer, pos, pos + 2 * MAX_TEXT)
            end = separator.start() if separator else len(buffer)
            if end - pos > MAX_TEXT:
                separator, end = None, paragraph_end(buffer, pos, pos + MAX_TEXT)
            text = decode(buffer[pos:end], path, offset + pos)
            pos = separator.end() if separator else end
            if text.strip():
                yield text, raw.tell()


def paragraph_end(buffer, start, limit):
    """Where to cut buffer[start:limit]: behind the last empty line, or line, or whole UTF-8 character."""
    for newline in (b"\n\n", b"\n"):
        if (cut := buffer.rfind(newline, start, limit)) >= 0:
            return cut + len(newline)
    while limit > start + 1 and buffer[limit] & 0xC0 == 0x80:  # a continuation byte
        limit -= 1
    return limit


def pages(text, size=4096):
    """`text` in pieces of at most `size` bytes, or a twentieth of a short text, cut at paragraphs where it has some."""
    data, start = text.encode("utf-8"), 0
    size = min(size, max(16, len(data) // 20))
    while start < len(data):
        end = paragraph_end(data, start, start + size) if len(data) - start > size else len(data)
        yield data[start:end].decode("utf-8")
        start = end


def id_documents(path, eot):
    """Arrays of token ids, each up to and with its end-of-text token, or at most MAX_TEXT ids, from .npy or .npz."""
    try:
        loaded = np.load(path, mmap_mode="r", allow_pickle=False)
        arrays = {path: loaded} if path.suffix == ".npy" else {f"{path}[{name!r}]": loaded[name] for name in loaded.files}
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: not a file that numpy saved without pickling: {error}") from None
    for name, ids in arrays.items():
        if not isinstance(ids, np.ndarray) or ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise ValueError(f"{name}: expected a 1-D array of integers, found shape {np.shape(ids)} of {np.asarray(ids).dtype}")
        start = 0
        for block in range(0, len(ids), MAX_TEXT):
            stop = min(block + MAX_TEXT, len(ids))
            ends = [] if eot is None else (np.flatnonzero(ids[block:stop] == eot) + block + 1).tolist()
            if stop == len(ids) or not ends and stop - start >= MAX_TEXT:
                ends.append(stop)
            for end in ends:
                if end > start:
                    yield np.asarray(ids[start:end])
                start = end
