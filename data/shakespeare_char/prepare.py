"""Tiny Shakespeare by characters: 1.1 MB of plays, a vocabulary of 65, the classic first run.

    python data/shakespeare_char/prepare.py [--input=FILE]

The first 90 % become train.bin, the rest val.bin; there is no end-of-text token.
"""
import sys
from hashlib import sha256
from pathlib import Path

import requests

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import configure, user_errors
from data.download import OFFLINE
from data.reader import decode
from data.tokenizer import Tokenizer, write_text
from data.writer import write_documents

input = ""  # a local copy of the text; empty means download it
out = ""  # folder to write to; empty means beside this file

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def download(path):
    """Fetch the text to `path`. Raises ValueError where it cannot be had, or is not what it was."""
    try:
        response = requests.get(URL, timeout=30)
        response.raise_for_status()
        if sha256(response.content).hexdigest() != SHA256:
            raise requests.RequestException("its sha256 is another")
    except requests.RequestException as error:
        raise ValueError(f"cannot download {URL}: {error}; --input=FILE takes a copy. {OFFLINE}") from None
    write_text(path, response.content.decode())


def shakespeare(input, folder):
    """[("train", first 90 % of the characters), ("val", the rest)]"""
    path = Path(input or folder / "input.txt")
    if not input and not path.exists():
        download(path)
    data = path.read_bytes()
    if not data:
        raise ValueError(f"{path} is empty: name a file with text in it")
    text = decode(data, path)
    if sha256(data).hexdigest() != SHA256:
        print(f"warning: {path} is not the usual copy (its sha256 differs); it is used all the same", file=sys.stderr)
    cut = len(text) * 9 // 10
    return [("train", text[:cut]), ("val", text[cut:])]


if __name__ == "__main__":
    configure(globals())
    with user_errors():
        folder = Path(__file__).parent
        documents = shakespeare(input, folder)
        tokenizer = Tokenizer.from_text_chars("".join(text for _, text in documents))
        write_documents(out or folder, documents, tokenizer)
