"""Tiny Shakespeare in GPT-2's tokens: 301,966 to train on, 36,059 to validate; for quick finetuning runs.

    python data/shakespeare/prepare.py [--input=FILE]
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import configure, user_errors
from data.shakespeare_char.prepare import shakespeare
from data.tokenizer import Tokenizer
from data.writer import write_documents

input = ""  # a local copy of the text; empty means download it
out = ""  # folder to write to; empty means beside this file

if __name__ == "__main__":
    configure(globals())
    with user_errors():
        folder = Path(__file__).parent
        tokenizer = Tokenizer.load("gpt2")
        write_documents(out or folder, shakespeare(input, folder), tokenizer, end_of_text=False)
