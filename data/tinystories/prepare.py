"""TinyStories: 2 million stories in the words of a four-year-old. Small models write fluently after an hour of it.

    python data/tinystories/prepare.py    1 GB of parquet, about 0.5 billion tokens

The one parquet reader is pyarrow (pip install pyarrow). What was downloaded stays in download/.
"""
import sys
from itertools import chain, islice, repeat
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import configure, user_errors
from data.download import fetched, hub_shards
from data.reader import documents
from data.tokenizer import Tokenizer
from data.writer import Progress, write_documents

repo = "roneneldan/TinyStories"  # on the hub ($HF_ENDPOINT)
revision = "main"
tokenizer = "gpt2"  # or another of tiktoken's, byte, or a tokenizer file
limit = 0  # stop each split after so many stories; 0: all
out = ""  # folder to write to; empty means beside this file

if __name__ == "__main__":
    configure(globals())
    with user_errors():
        folder, progress, encoder = Path(__file__).parent, Progress(), Tokenizer.load(tokenizer)
        files = hub_shards(repo, "data", folder / "download", revision)
        splits = []
        for split, name in (("val", "validation"), ("train", "train")):
            shards = [shard for shard in files if shard[1].name.startswith(name)]
            texts = documents(fetched(shards, progress), progress)
            splits.append(zip(repeat(split), islice(texts, limit or None)))
        write_documents(out or folder, chain.from_iterable(splits), encoder, progress)
