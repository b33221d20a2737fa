"""What the tests share: scripts run as processes, and tiny data sets made on the spot."""
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import checkpoint

ROOT = Path(__file__).resolve().parents[1]
os.environ.setdefault("OMP_NUM_THREADS", "1")  # small models, and as many test processes as cores

TINY = ["--block_size=16", "--n_layer=2", "--n_head=2", "--n_embd=32", "--batch_size=4", "--gradient_accumulation_steps=2",
        "--learning_rate=1e-2", "--min_lr=1e-3", "--warmup_iters=5", "--max_iters=20", "--eval_interval=10", "--eval_iters=0",
        "--device=cpu", "--compile=False"]


def run(script, *args, cwd, stdin=None, python=(), timeout=120, **environment):
    """Run a script of the repository as a user would; returns the CompletedProcess with text output."""
    return subprocess.run([sys.executable, *python, str(ROOT / script), *map(str, args)], cwd=cwd, input=stdin, text=True,
                          capture_output=True, timeout=timeout, env=os.environ | environment)


def torchrun(ranks, *flags, cwd, **kwargs):
    """train.py on so many gloo ranks of this machine."""
    return run("train.py", *flags, cwd=cwd, python=("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"), **kwargs)


def refused(process, *words):
    """Assert that a process ended with exit code 2 and one line on stderr that has all the words."""
    assert process.returncode == 2, process.stdout + process.stderr
    lines = process.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), process.stderr
    for word in words:
        assert word in lines[0], lines[0]


def make_data(folder, tokens=4000, vocab_size=48, seed=0, val_tokens=700):
    """A data set with something to learn: a noisy cycle of characters; returns its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    sizes = {"train": tokens, "val": val_tokens, "test": val_tokens}
    for split, n in sizes.items():
        ids = (np.arange(n) * 7 + rng.integers(0, 2, n)) % vocab_size
        ids.astype("<u2").tofile(folder / f"{split}.bin")
    chars = "".join(chr(0x21 + i) for i in range(vocab_size))
    (folder / "tokenizer.json").write_text(json.dumps({"kind": "char", "name": "char", "chars": chars}))
    (folder / "meta.json").write_text(json.dumps({"vocab_size": vocab_size, "dtype": "uint16", "tokenizer": "tokenizer.json",
                                                  "max_id": vocab_size - 1, "tokens": sizes, "bytes": sizes}))
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data") / "cycle")


@pytest.fixture(scope="session")
def trained(tmp_path_factory, data):
    """A finished tiny run: (its folder, what it printed)."""
    out = tmp_path_factory.mktemp("run") / "out"
    process = run("train.py", *TINY, f"--dataset={data}", f"--out_dir={out}", "--max_iters=100", "--eval_interval=20", cwd=out.parent)
    assert process.returncode == 0, process.stderr
    return out, process.stdout


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def train(out, data, *flags, cwd=None, **kwargs):
    return run("train.py", *TINY, f"--dataset={data}", f"--out_dir={out}", *flags, cwd=cwd or out.parent, **kwargs)


def ok(process):
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


def equal(a, b):
    """Two checkpoints' values, equal to the last bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    return a == b


def same_run(a, b):
    a, b = checkpoint.read(a), checkpoint.read(b)
    return all(equal(a[k], b[k]) for k in ("model", "optimizer", "iter_num", "cursor", "tokens", "best_val_loss", "evals_without_gain"))


def losses(out):
    return {m["iter"]: m["train_loss"] for m in metrics(out) if "train_loss" in m}


# ---------------------------------------------------------------------------------------------------------------
# the gauntlet's table: test_faults.py names each test test_<number>_<promise>


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes more than 20 seconds; make test leaves it out")
    config.addinivalue_line("markers", "gpu: needs an NVIDIA GPU; make gpu runs these, and make test leaves them out")


def pytest_terminal_summary(terminalreporter):
    cases = {}  # (number, promise): [results, seconds]
    for result, reports in terminalreporter.stats.items():
        for report in reports:
            found = re.search(r"test_faults\.py::test_(\d\d)_(\w+)", getattr(report, "nodeid", ""))
            if found and result in ("passed", "failed", "error", "skipped", ""):
                results, seconds = cases.setdefault(found.groups(), [set(), 0.0])
                results.add(result)
                cases[found.groups()][1] = seconds + report.duration
    if cases:
        terminalreporter.section("the fault gauntlet")
        width = max(len(promise) for _, promise in cases)
        for (number, promise), (results, seconds) in sorted(cases.items()):
            result = next(r for r in ("failed", "error", "skipped", "passed") if r in results)
            terminalreporter.line(f"{number}  {promise.replace('_', ' '):{width}}  {result:7} {seconds:6.1f} s")
        missing = sorted({f"{n:02}" for n in range(1, 29)} - {number for number, _ in cases})
        terminalreporter.line(f"cases without a test in this run: {', '.join(missing)}" if missing else "all 28 cases ran")
