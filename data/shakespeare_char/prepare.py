"""Tiny Shakespeare by characters: 1.1 MB of plays, a vocabulary of 65, the classic first run.

    python data/shakespeare_char/prepare.py [--input=FILE]

The first 90 % become train.bin, the rest val.bin; there is no end-of-text token.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import configure, user_errors
from data.download import download
from data.reader import read_text
from data.tokenizer import Tokenizer
from data.writer import write_documents

input = ""  # a local copy of the text; empty means download it
out = ""  # folder to write to; empty means beside this file

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def shakespeare(input, folder):
    """[("train", first 90 % of the characters), ("val", the rest)]"""
    text = read_text(input or download(URL, folder / "input.txt", SHA256), SHA256)
    cut = len(text) * 9 // 10
    return [("train", text[:cut]), ("val", text[cut:])]


if __name__ == "__main__":
    configure(globals())
    with user_errors():
        folder = Path(__file__).parent
        documents = shakespeare(input, folder)
        tokenizer = Tokenizer.from_text_chars("".join(text for _, text in documents))
        write_documents(out or folder, documents, tokenizer)
