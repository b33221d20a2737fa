"""FineWeb-Edu: web pages that a classifier found educational. By default the sample of 10 billion tokens.

    python data/fineweb/prepare.py --shards=1    the first of 14 files: 2 GB of parquet, about 0.7 billion tokens
    python data/fineweb/prepare.py               all of them: 28 GB, then 20 GB of tokens

Needs huggingface_hub and pyarrow (pip install huggingface_hub pyarrow). What was downloaded stays in download/.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import configure, user_errors
from data.download import write_hub

repo = "HuggingFaceFW/fineweb-edu"  # on the hub ($HF_ENDPOINT); HuggingFaceFW/fineweb has the same layout
subset = "sample/10BT"  # folder in it: sample/100BT, data/CC-MAIN-2024-10, ...
revision = "main"
shards = 0  # how many of the subset's parquet files to take, the first ones; 0: all
tokenizer = "gpt2"  # or another of tiktoken's, byte, or a tokenizer file
val_fraction = 0.0005  # of the documents: about 5,000 of the 10BT sample's
limit = 0  # stop after so many documents; 0: all
out = ""  # folder to write to; empty means beside this file

if __name__ == "__main__":
    configure(globals())
    with user_errors():
        write_hub(Path(__file__).parent, out, repo, subset, revision, tokenizer, limit,
                  val_fraction=val_fraction, shards=shards)
