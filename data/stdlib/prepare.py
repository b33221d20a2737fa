"""A corpus that needs no network: the source of the running interpreter's standard library, about 9 MB.

    python data/stdlib/prepare.py

Trains a byte-pair tokenizer on the train split and writes train.bin, val.bin, test.bin, meta.json
and tokenizer.json beside this file, in well under a minute.
"""
import sys
import sysconfig
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import configure, user_errors
from data.tokenizer import Tokenizer, train_bpe
from data.writer import split_by_hash, write_documents

tokenizer = "bpe"  # trained on the train split; or char
vocab_size = 4096  # of the bpe, 256 bytes and end-of-text included
val_fraction = 0.07  # share of the modules and packages that goes to val
test_fraction = 0.07  # and to test
out = ""  # folder to write to; empty means beside this file

# Other people's packages, tests, generated tables and machine-made settings are not the library's own prose.
LEFT_OUT = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idlelib", "encodings"}
SALT = "/287"  # a few packages are large: with this one val and test are 6 to 7.5 % of CPython 3.11, 3.12 and 3.13


def library(folder, val_fraction, test_fraction):
    """(split, text) of every source file, in an order that does not depend on the file system.

    The split hangs on the top-level module or package, so that the files of one package, which share
    names, idioms and now and then whole paragraphs, never stand on both sides.
    """
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).parts
        if not LEFT_OUT.intersection(parts) and not parts[-1].startswith("_sysconfigdata"):
            family = parts[0].removesuffix(".py")
            text = path.read_bytes().decode("utf-8", errors="replace")
            yield split_by_hash(family + SALT, val_fraction, test_fraction), text


if __name__ == "__main__":
    configure(globals())
    with user_errors():
        folder = Path(sysconfig.get_path("stdlib"))
        documents = list(library(folder, val_fraction, test_fraction))
        print(f"{folder}: {len(documents):,} files")
        if tokenizer not in ("bpe", "char"):
            raise ValueError(f"tokenizer={tokenizer!r} is neither 'bpe' nor 'char'")
        trained = (Tokenizer.from_text_chars("".join(text for _, text in documents)) if tokenizer == "char" else
                   Tokenizer.from_bpe(*train_bpe([text for split, text in documents if split == "train"], vocab_size)))
        write_documents(out or Path(__file__).parent, documents, trained, limit=len(documents))
