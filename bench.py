"""How fast: each figure beside what it is to be compared with, measured in turns in the same run.

    python bench.py --task=loader                        get_batch against a Python loop over the same windows
    python bench.py --task=step --n_layer=4 --n_embd=192 a training step, its parts, and the machine's own ceiling
    python bench.py --task=step --vs="--optimizer=adamw" two settings against each other
    python bench.py --task=sample                        generation with and without the KV cache
    python bench.py --task=time_to_loss --args=config/train_small.py --target_loss=3.5       whole runs of train.py
"""
task = "step"          # 'step', 'loader', 'sample' or 'time_to_loss'
vs = ""                # flags of a second contestant for all but 'loader', such as --vs="--mlp=gelu --compile"
args = ""              # what 'time_to_loss' gives to train.py; a second contestant gets the flags of vs behind it
target_loss = 0.0      # of 'time_to_loss', in nats
repeats = 7            # rounds; every contestant has its turn in each, 'time_to_loss' with another seed each
seconds = 1.0          # of each turn, at least
json = False           # print one JSON object instead of the table
vocab_size = 50257
batch_size = 12
block_size = 1024
n_layer = 12
n_head = 12
n_kv_head = 0          # 0: n_head
n_embd = 768
norm = "rmsnorm"       # or 'layernorm'
mlp = "relu2"          # or 'gelu', 'swiglu'
pos_emb = "rope"       # or 'learned'
qk_norm = True
bias = False
tie_weights = False
token_shift = True
gradient_checkpointing = False
loss_chunk = 0
optimizer = "muon"     # or 'adamw'
new_tokens = 128       # to generate, for 'sample'; the prompt has 16
device = "auto"
dtype = "auto"
compile = "auto"

if __name__ == "__main__":
    from configurator import configure
    settings = configure(globals())

import itertools
import math
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import fields
from json import dumps, loads
from pathlib import Path

import numpy as np
import torch

import optim
from configurator import user_errors
from machine import Machine
from model import GPT, GPTConfig, KVCache
from train import Split


def measure(contestants, repeats, seconds, synchronize=lambda: None):
    """{name: seconds of one call, a list over the rounds} of functions {name: f}, in turns, after a call to warm up."""
    times = {name: [] for name in contestants}
    for f in contestants.values():
        f()
    for _ in range(repeats):
        for name, f in contestants.items():
            synchronize()
            calls, start = 0, time.perf_counter()
            while calls == 0 or time.perf_counter() - start < seconds:
                f()
                calls += 1
                if calls % 8 == 0 or seconds == 0:
                    synchronize()
            synchronize()
            times[name].append((time.perf_counter() - start) / calls)
    return times


def loader_contestants(s):
    """get_batch, and a loop that slices, converts and stacks row by row, over the same windows of 40 M tokens."""
    B, T, kind = s["batch_size"], s["block_size"], np.uint16 if s["vocab_size"] <= 2**16 else np.uint32
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.bin"
        np.random.default_rng(0).integers(0, s["vocab_size"], 40_000_000).astype(kind).tofile(path)
        tokens = np.memmap(path, kind, mode="r")  # the mapping outlives the file
    split = Split(path, tokens, None, s["vocab_size"], T, seed=0)
    order = np.concatenate([split.starts(0, chunk) for chunk in range(-(-split.n_windows // 4096))])
    ours, theirs = (itertools.cycle(range(0, split.n_windows - B, B)) for _ in range(2))

    def loop():
        at = next(theirs)
        rows = [tokens[start:start + T + 1].astype(np.int64) for start in order[at:at + B]]
        return tuple(torch.stack([torch.from_numpy(row[part]) for row in rows]) for part in (slice(-1), slice(1, None)))

    contestants = {"get_batch": lambda: split.get_batch(next(ours), B), "loop over rows": loop}
    for _ in range(3):
        assert all(map(torch.equal, *(f() for f in contestants.values()))), "both must deal the same windows"
    return contestants, dict.fromkeys(contestants, B * T)


def build(s, machine):
    """The model that settings s describe, with its first weights."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{f.name: s[f.name] for f in fields(GPTConfig) if f.name in s})).to(machine.device)
    model.gradient_checkpointing, model.loss_chunk = s["gradient_checkpointing"], s["loss_chunk"]
    return model


def make_step(s, machine):
    """A training step on random tokens, and {part: function} of what it consists of."""
    raw_model = build(s, machine)
    optimizers = optim.configure_optimizers(raw_model, s["optimizer"], learning_rate=1e-4)
    x, y = (torch.randint(s["vocab_size"], (s["batch_size"], s["block_size"]), device=machine.device) for _ in range(2))
    model = machine.try_compile(raw_model, x, y)

    def forward_backward():
        raw_model.zero_grad()
        with machine.autocast():
            loss = model(x, y)[1]
        loss.backward()

    def update():
        torch.nn.utils.clip_grad_norm_(raw_model.parameters(), 1.0)
        for opt in optimizers:
            opt.step()

    def step():
        forward_backward()
        update()
    return step, {"forward and backward": forward_backward, "clip and optimizer": update}, raw_model


def make_sampler(s, machine, cached=True):
    """Greedy generation of s['new_tokens'] for every row of a batch of prompts."""
    model = build(s, machine).eval()
    idx = torch.randint(s["vocab_size"], (s["batch_size"], 16), device=machine.device)

    @torch.no_grad()
    def sample():
        with machine.autocast():
            if cached:
                return model.generate(idx, s["new_tokens"], temperature=0)
            out = idx
            for _ in range(s["new_tokens"]):  # the last position's logits alone, but everything before them anew
                logits, _ = model(out[:, -s["block_size"]:], cache=KVCache(s["block_size"]))
                out = torch.cat([out, logits[:, -1:].argmax(-1)], dim=1)
            return out
    return sample


def matmul_flops(machine, n):
    """A function that multiplies two n x n matrices in the machine's dtype, and its operations."""
    a, b = (torch.randn(n, n, device=machine.device, dtype=machine.dtype) for _ in range(2))
    return lambda: a @ b, 2 * n**3


def run_to_loss(flags, loss, seed):
    """One run of train.py: its first evaluation at or below `loss`, else its last, as metrics.jsonl has it."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, Path(__file__).with_name("train.py"), *shlex.split(flags), f"--seed={seed}"]
        run = subprocess.run([*command, f"--out_dir={out}", f"--target_loss={loss}"], capture_output=True, text=True)
        if run.returncode:
            raise ValueError(f"train.py ended with status {run.returncode}: {run.stderr.strip().splitlines()[-1]}")
        lines = [loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "val_loss" in line][-1]


def time_to_loss(contestants, loss, rounds):
    """{name: median, lowest and highest seconds of training, and the tokens and losses where each run ended}, in turns.

    A run that did not reach the loss took for ever: its seconds are None.
    """
    ends = {name: [] for name in contestants}
    for seed, (name, flags) in itertools.product(range(1, rounds + 1), contestants.items()):
        ends[name].append(run_to_loss(flags, loss, seed))
        line = "seed {}  loss {val_loss:.4f}  {tokens:,} tokens  {elapsed_s:.1f} s  {}"
        print(line.format(seed, name, **ends[name][-1]), file=sys.stderr)
    rows = {}
    for name, runs in ends.items():
        took = sorted(run["elapsed_s"] if run["val_loss"] <= loss else math.inf for run in runs)
        stats = {"median": statistics.median(took), "lowest": took[0], "highest": took[-1]}
        rows[name] = {k: v if v < math.inf else None for k, v in stats.items()}
        rows[name] |= {"tokens": [run["tokens"] for run in runs], "losses": [run["val_loss"] for run in runs]}
    return rows


def summary(times, tokens):
    """{name: median, lowest and highest tokens a second, and how often the first contestant's rate is that of this one}."""
    first, rows = next(iter(times)), {}
    for name, t in times.items():
        ratios = [(tokens[first] / a) / (tokens[name] / b) for a, b in zip(times[first], t)]  # round by round
        rows[name] = {"median": tokens[name] / statistics.median(t), "lowest": tokens[name] / max(t),
                      "highest": tokens[name] / min(t), "ratio": statistics.median(ratios)}
    return rows


if __name__ == "__main__":
    with user_errors():
        if task not in ("step", "loader", "sample", "time_to_loss"):
            raise ValueError(f"task={task!r} is not one of step, loader, sample, time_to_loss")
        if task == "time_to_loss" and target_loss <= 0:
            raise ValueError(f"target_loss={target_loss} is no loss to wait for; name one, such as --target_loss=3.5")
        if task == "time_to_loss":
            rows = time_to_loss({"this": args} | ({vs: f"{args} {vs}"} if vs else {}), target_loss, repeats)
            print(dumps({"unit": "s", "target_loss": target_loss, "results": rows}) if json else "\n".join(
                f"{name:24} {r['median'] or math.inf:8.1f} s ({r['lowest'] or math.inf:.1f} to {r['highest'] or math.inf:.1f})  "
                f"{statistics.median(r['tokens']):12,.0f} tokens  loss {max(r['losses']):.4f} at most" for name, r in rows.items()))
            sys.exit()
        machine = Machine(device, dtype, compile)
        other = configure(dict(globals()), start_from=settings, argv=shlex.split(vs))
        other_machine = Machine(other["device"], other["dtype"], other["compile"])
        facts = {"machine": f"{machine.name()}, {torch.get_num_threads()} threads, "
                            f"{str(machine.dtype).removeprefix('torch.')}, torch {torch.__version__}"}

        parts = {}  # of a step; contestants are functions, and tokens how many a call of each is good for
        if task == "loader":
            contestants, tokens = loader_contestants(settings)
        elif task == "sample":
            name = vs or "uncached"
            contestants = {"cached": make_sampler(settings, machine), name: make_sampler(other, other_machine, cached=bool(vs))}
            tokens = {"cached": batch_size * new_tokens, name: other["batch_size"] * other["new_tokens"]}
        else:
            step, parts, model = make_step(settings, machine)
            contestants, tokens = {"this": step}, {"this": batch_size * block_size}
            if vs:
                contestants[vs], _, _ = make_step(other, other_machine)
                tokens[vs] = other["batch_size"] * other["block_size"]
            parts["product"], operations = matmul_flops(machine, 8192 if machine.type == "cuda" else 1024)

        times = measure(contestants | parts, repeats, seconds, machine.synchronize)
        if task == "step":
            whole, ceiling = statistics.median(times["this"]), operations / statistics.median(times.pop("product"))
            for part in list(parts)[:-1]:
                facts[part] = f"{statistics.median(times.pop(part)) / whole:.1%} of a step"
            achieved, peak = model.flops_per_token() * tokens["this"] / whole, machine.peak_flops()
            facts["operations"] = (f"{achieved / 1e12:.3f} TFLOP/s, {achieved / ceiling:.1%} of a large matrix product's "
                                   f"{ceiling / 1e12:.3f}" + (f", {achieved / peak:.1%} of the data sheet's" if peak else ""))
            facts["peak memory" + " of both" * bool(vs)] = f"{machine.peak_gib():.2f} GiB"
        rows = summary(times, tokens)
        if json:
            print(dumps({"unit": "tokens/s", "results": rows} | facts))
        else:
            print(f"{'tokens/s':24} {'median':>14} {'lowest':>14} {'highest':>14}   the first is")
            for name, r in rows.items():
                print(f"{name:24} {r['median']:14,.0f} {r['lowest']:14,.0f} {r['highest']:14,.0f}   {r['ratio']:.2f} x as fast")
            print("\n".join(f"{key}: {value}" for key, value in facts.items()))
