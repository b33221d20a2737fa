"""Let a trained model write: a prompt in, text out as it comes, everything from the checkpoint alone.

    python sample.py --out_dir=out-small --start="def main("
    python sample.py --out_dir=out-small --start=FILE:prompt.txt
    echo "class Tree:" | python sample.py --out_dir=out-small --start=-
"""
out_dir = "out"        # the run to sample from: its best.pt, or else its newest checkpoint
init_from = "resume"   # 'resume' (what out_dir holds) or the path of a checkpoint file
start = ""             # the prompt: text, FILE:path, - for standard input; '' begins a new document
num_samples = 3
max_new_tokens = 300   # of each sample, which ends sooner where the model ends the document
temperature = 0.8      # 0: always the likeliest token; above 1: bolder than the model's own probabilities
top_k = 200            # draw from the k likeliest tokens; 0: from all
top_p = 0.0            # draw from the likeliest tokens that have this much probability between them; 0: from all
seed = 1337            # sample i draws with seed + i
device = "auto"        # 'cpu', 'cuda', 'cuda:1', 'mps'
dtype = "auto"         # 'float32', 'bfloat16', 'float16'

if __name__ == "__main__":  # before torch, whose import takes seconds
    from configurator import configure
    configure(globals())

import codecs
import sys
from pathlib import Path

import torch

import checkpoint
from configurator import user_errors
from data.tokenizer import Tokenizer
from machine import Machine


def read_prompt(start):
    """The prompt that `start` names. Raises ValueError or OSError for a file that cannot be read as UTF-8."""
    if not start.startswith("FILE:") and start != "-":
        return start
    name = "standard input" if start == "-" else start.removeprefix("FILE:")
    raw = sys.stdin.buffer.read() if start == "-" else Path(name).read_bytes()
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 at byte {error.start}; --start takes text") from None


def stream_text(model, tokenizer, prompt, max_new_tokens, **sampling):
    """Yield the text that `model` writes behind `prompt`, in pieces that end at whole characters."""
    ids = tokenizer.encode(prompt) if prompt else [tokenizer.eot if tokenizer.eot is not None else 0]
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")  # a token may end amid a character
    idx = torch.tensor([ids], device=next(model.parameters()).device)
    for token in model.stream(idx, max_new_tokens, stop=tokenizer.eot, **sampling):
        if token.item() != tokenizer.eot:
            yield decoder.decode(tokenizer.decode_bytes(token.tolist()))
    yield decoder.decode(b"", final=True)


if __name__ == "__main__":
    with user_errors():
        machine = Machine(device, dtype)
        sys.stdout.reconfigure(encoding="utf-8", errors="replace")
        model, state = checkpoint.load_model(out_dir if init_from == "resume" else init_from, machine.device)
        tokenizer = Tokenizer.from_dict(state["tokenizer"])
        prompt = read_prompt(start)
        for i in range(num_samples):
            print(prompt, end="")
            with machine.autocast():
                for piece in stream_text(model, tokenizer, prompt, max_new_tokens, temperature=temperature, top_k=top_k,
                                         top_p=top_p, seed=seed + i):
                    print(piece, end="", flush=True)
            print("\n" + "-" * 72)
