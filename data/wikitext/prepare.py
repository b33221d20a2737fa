"""WikiText: Wikipedia's good and featured articles, with a test split: the perplexities in papers are on it.

    python data/wikitext/prepare.py --size=2      WikiText-2: 2 million words, for small trials
    python data/wikitext/prepare.py --size=103    WikiText-103: 103 million words

Needs huggingface_hub and pyarrow (pip install huggingface_hub pyarrow). What was downloaded stays in download/.
"""
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import configure, user_errors
from data.download import write_hub

repo = "Salesforce/wikitext"  # on the hub ($HF_ENDPOINT)
size = 103  # or 2
revision = "main"
tokenizer = "gpt2"  # or another of tiktoken's, byte, or a tokenizer file
limit = 0  # stop each split after so many articles; 0: all
out = ""  # folder to write to; empty means beside this file

TITLE = re.compile(r" = [^=].* = \n?")  # a section's heading is " = = Life = = "


def articles(rows):
    """The rows are single lines; joined from title to title they are articles."""
    lines = []
    for row in rows:
        if lines and TITLE.fullmatch(row):
            yield "".join(lines)
            lines = []
        lines.append(row)
    if lines:
        yield "".join(lines)


if __name__ == "__main__":
    configure(globals())
    with user_errors():
        write_hub(Path(__file__).parent, out, repo, f"wikitext-{size}-raw-v1", revision, tokenizer, limit,
                  {"val": "validation", "test": "test", "train": "train"}, join=articles)
