"""OpenWebText: 8 million pages that Reddit linked to, the open twin of GPT-2's training set.

    python data/openwebtext/prepare.py               24 GB of parquet, then about 9 billion tokens, 18 GB
    python data/openwebtext/prepare.py --limit=20000 a trial

Needs huggingface_hub and pyarrow (pip install huggingface_hub pyarrow). What was downloaded stays in download/.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import configure, user_errors
from data.download import write_hub

repo = "Skylion007/openwebtext"  # on the hub ($HF_ENDPOINT)
revision = "main"
shards = 0  # how many of the 80 parquet files to take, the first ones; 0: all
tokenizer = "gpt2"  # or another of tiktoken's, byte, or a tokenizer file
val_fraction = 0.0005  # of the documents: about 4,000
limit = 0  # stop after so many documents; 0: all
out = ""  # folder to write to; empty means beside this file

if __name__ == "__main__":
    configure(globals())
    with user_errors():
        write_hub(Path(__file__).parent, out, repo, "", revision, tokenizer, limit,
                  val_fraction=val_fraction, shards=shards)
