"""How long training stands still for a checkpoint, against how long the write takes that goes on behind its back.

    python tests/bench_checkpoint.py [--n_layer=12] [--n_head=12] [--n_embd=768] [--optimizer=muon] [--rounds=5] [--folder=.]

Not a test: it takes a minute, and writes 1.6 GB a round into a folder of its own inside --folder. The defaults are the
124M shape of train.py. As in train.py, the room for the copy is made once, before the first round.
"""
import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))


def rounds(n_layer, n_head, n_embd, optimizer, rounds, folder):
    """Yield (seconds of Writer.start on this thread, seconds until the file is on disk, bytes of the file)."""
    import torch

    import checkpoint
    import optim
    from model import GPT, GPTConfig

    model = GPT(GPTConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd))
    optimizers = optim.configure_optimizers(model, optimizer, 1e-3)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    for opt in optimizers:
        opt.step()  # makes its state
        opt.zero_grad()
    writer = checkpoint.Writer()
    state = lambda n: {"model": model.state_dict(), "optimizer": optim.state_by_name(optimizers), "iter_num": n}
    writer.prepare(state(0))
    writer.wait()
    with tempfile.TemporaryDirectory(dir=folder) as out_dir:
        for n in range(1, rounds + 1):
            began = time.perf_counter()
            writer.start(out_dir, state(n), keep=2, best=False)
            pause = time.perf_counter() - began
            writer.wait()
            yield pause, time.perf_counter() - began, writer.last.stat().st_size


def main():
    parser = argparse.ArgumentParser()
    for name, default in ("n_layer", 12), ("n_head", 12), ("n_embd", 768), ("optimizer", "muon"), ("rounds", 5), ("folder", "."):
        parser.add_argument(f"--{name}", type=type(default), default=default)
    shares = []
    for n, (pause, whole, size) in enumerate(rounds(**vars(parser.parse_args())), 1):
        shares.append(pause / whole)
        print(f"round {n}: pause {pause:.3f} s, written after {whole:.2f} s, {pause / whole:.1%}; {size / 1e6:,.0f} MB")
    print(f"pause / write: median {statistics.median(shares):.1%}, {min(shares):.1%} to {max(shares):.1%}")


if __name__ == "__main__":
    main()
