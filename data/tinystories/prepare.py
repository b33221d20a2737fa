"""TinyStories: 2 million stories in the words of a four-year-old. Small models write fluently after an hour of it.

    python data/tinystories/prepare.py    1 GB of parquet, about 0.5 billion tokens

Needs huggingface_hub and pyarrow (pip install huggingface_hub pyarrow). What was downloaded stays in download/.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import configure, user_errors
from data.download import write_hub

repo = "roneneldan/TinyStories"  # on the hub ($HF_ENDPOINT)
revision = "main"
tokenizer = "gpt2"  # or another of tiktoken's, byte, or a tokenizer file
limit = 0  # stop each split after so many stories; 0: all
out = ""  # folder to write to; empty means beside this file

if __name__ == "__main__":
    configure(globals())
    with user_errors():
        write_hub(Path(__file__).parent, out, repo, "data", revision, tokenizer, limit,
                  {"val": "validation", "train": "train"})
