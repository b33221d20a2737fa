"""Your own text: any .txt, .md, .jsonl, .parquet (each also .gz), or .npy and .npz of token ids.

    python data/text/prepare.py --input=a.txt,b.jsonl,folder/
    python train.py --dataset=text

A file is a document, or several where <|endoftext|> stands between them; of .jsonl and .parquet every
row is one. A hash of its text, not its position, sends each document to train, val or test.
"""
import sys
from itertools import chain, groupby, islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import configure, user_errors
from data.reader import MAX_TEXT, documents, id_documents, input_files, kind, pages
from data.tokenizer import Tokenizer, train_bpe
from data.writer import DatasetWriter, Progress, split_by_hash, write_documents

input = ""  # files and folders, separated by commas
out = ""  # folder to write to; empty means beside this file
tokenizer = "bpe"  # trained on the train split; or char, byte, one of tiktoken's (gpt2, ...), or a tokenizer file
vocab_size = 4096  # of the bpe that is trained, 256 bytes and end-of-text included
val_fraction = 0.1  # share of the documents that goes to val
test_fraction = 0.0  # and to test
key = "text"  # field of a .jsonl, column of a .parquet that holds the text
limit = 0  # stop after so many documents; 0: all


def split_texts(paths, progress, key, limit, fractions):
    """(split, text) of each document in `paths`.

    A lone document cannot be divided by documents, and the pieces of a huge text file are none: there the
    hash of a page decides, and neighbours on the same side stay together.
    """
    texts = islice(((path, text) for path in paths for text in documents([path], progress, key)), limit or None)
    first_two = list(islice(texts, 2))
    for path, text in chain(first_two, texts):
        piece = len(text) > MAX_TEXT // 4 and kind(path) not in (".jsonl", ".parquet")
        if piece or len(first_two) == 1:
            for split, run in groupby(pages(text), key=lambda page: split_by_hash(page, *fractions)):
                yield split, "".join(run)
        else:
            yield split_by_hash(text, *fractions), text


def get_tokenizer(name, vocab_size, read):
    """The tokenizer that `name` asks for; `read()` gives the (split, text) it may have to learn from."""
    if name == "bpe":
        vocab, merges = train_bpe((text for split, text in read() if split == "train"), vocab_size)
        return Tokenizer.from_bpe(vocab, merges)
    if name == "char":  # of all splits: a character that only val has would be an error there
        return Tokenizer.from_text_chars("".join({char for _, text in read() for char in set(text)}))
    return Tokenizer.load(name)


def write_ids(folder, paths, tokenizer, limit, fractions):
    """Token ids are kept as they are; the hash of the text that they stand for decides where a document goes."""
    found = (ids for path in paths for ids in id_documents(path, tokenizer.eot))
    with DatasetWriter(folder, tokenizer) as writer:
        for ids in islice(found, limit or None):
            text = tokenizer.decode_bytes(ids[ids != tokenizer.eot].tolist())
            writer.add(split_by_hash(text, *fractions), ids, len(text))


if __name__ == "__main__":
    configure(globals())
    with user_errors():
        paths = input_files(input)
        folder = out or Path(__file__).parent
        fractions = val_fraction, test_fraction
        are_ids = [kind(path) in (".npy", ".npz") for path in paths]
        if not any(are_ids):
            encoder = get_tokenizer(tokenizer, vocab_size, lambda: split_texts(paths, Progress(), key, limit, fractions))
            progress = Progress(sum(path.stat().st_size for path in paths))
            write_documents(folder, split_texts(paths, progress, key, limit, fractions), encoder, progress)
        elif all(are_ids) and tokenizer not in ("bpe", "char"):
            write_ids(folder, paths, Tokenizer.load(tokenizer), limit, fractions)
        else:
            raise ValueError(f"--input: {paths[are_ids.index(True)]} holds token ids: give all input as ids, and say with "
                             "--tokenizer=gpt2 (or another name, or FILE) what made them")
