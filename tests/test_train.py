"""train.py and sample.py as processes: what they promise on the console, in files and across a resume."""
import json
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, TINY, losses, make_data, metrics, ok, refused, run, same_run, train

import checkpoint
from optim import SCHEDULES, configure_optimizers, lr_factor


def test_it_learns_and_says_what_it_does(trained):
    out, printed = trained
    for words in ("model  ", "AdamW  matrices", "4,000 tokens", "128 tokens = 2 micro-batches * 4 rows * 16", "100 iterations = 12,800 tokens",
                  "device     cpu", "dtype      float32", "compile    off (as set)", "max_iters=100 is reached", "ckpt_00000100.pt"):
        assert words in printed, printed
    last = [m for m in metrics(out) if "val_loss" in m][-1]
    assert last["val_loss"] < 1.5 < math.log(48) and last["iter"] == 100 and last["tokens"] == 12800


def test_the_log_has_the_fields_and_units_it_promises(trained):
    out, _ = trained
    lines = metrics(out)
    training, evaluation = [m for m in lines if "train_loss" in m], [m for m in lines if "val_loss" in m]
    assert [m["iter"] for m in training] == list(range(1, 101)) and [m["iter"] for m in evaluation] == [20, 40, 60, 80, 100]
    assert set(training[0]) == {"iter", "tokens", "elapsed_s", "train_loss", "lr", "grad_norm", "tok_per_s", "mfu"}
    assert set(evaluation[0]) == {"iter", "tokens", "elapsed_s", "val_loss", "val_ppl", "val_bpb"}
    assert abs(training[0]["train_loss"] - math.log(48)) < 1e-4 and training[0]["lr"] == pytest.approx(1e-2 / 5)
    assert all(a["elapsed_s"] < b["elapsed_s"] for a, b in zip(training, training[1:]))
    for m in evaluation:
        assert m["val_ppl"] == pytest.approx(math.exp(m["val_loss"]))
        assert m["val_bpb"] == pytest.approx(m["val_loss"] * 699 / 700 / math.log(2))  # 699 targets, 700 bytes


def test_evaluation_is_the_mean_over_every_target_of_the_split(trained, data):
    """Against a plain loop over windows, in float64."""
    out, _ = trained
    model, state = checkpoint.load_model(out / "ckpt_00000100.pt")
    ids = torch.from_numpy(np.fromfile(data / "val.bin", "<u2").astype(np.int64))
    nats = [F.cross_entropy(model(ids[None, i:j])[0][0].double(), ids[i + 1:j + 1], reduction="sum").item()
            for i in range(0, 699, 16) for j in [min(i + 16, 699)]]
    assert [m for m in metrics(out) if "val_loss" in m][-1]["val_loss"] == pytest.approx(sum(nats) / 699, rel=1e-5)


def test_config_json_repeats_the_run(trained, tmp_path):
    out, _ = trained
    config = json.loads((out / "config.json").read_text())
    source = (ROOT / "train.py").read_text(encoding="utf-8")
    assert list(config["settings"]) == re.findall(r"^([a-z]\w*) = ", source, re.M)  # what the source has, and nothing else
    assert config["settings"]["dtype"] == "auto" and config["settings"]["n_embd"] == 32
    assert {"commit", "python", "torch", "device"} <= set(config["environment"])
    ok(run("train.py", out / "config.json", f"--out_dir={tmp_path / 'again'}", cwd=tmp_path))
    assert same_run(out / "ckpt_00000100.pt", tmp_path / "again" / "ckpt_00000100.pt")


def test_a_batch_can_be_cut_into_micro_batches(tmp_path, data):
    ok(train(tmp_path / "a", data, "--batch_size=8", "--gradient_accumulation_steps=1"))
    ok(train(tmp_path / "b", data, "--batch_size=2", "--gradient_accumulation_steps=4"))
    a, b = losses(tmp_path / "a"), losses(tmp_path / "b")
    assert a[1] == pytest.approx(b[1], abs=1e-6) and a[20] == pytest.approx(b[20], abs=1e-3)


def test_masked_tokens_weigh_nothing_in_loss_and_gradient(tmp_path):
    """One micro-batch of eight rows against eight of one, with rows of very different numbers of targets."""
    folder = make_data(tmp_path / "masked")
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        n = (folder / f"{split}.bin").stat().st_size // 2
        (rng.random(n) < np.repeat(rng.random(n // 50), 50)).astype(np.uint8).tofile(folder / f"{split}.mask.bin")
    ok(train(tmp_path / "a", folder, "--batch_size=8", "--gradient_accumulation_steps=1"))
    ok(train(tmp_path / "b", folder, "--batch_size=1", "--gradient_accumulation_steps=8"))
    a, b = losses(tmp_path / "a"), losses(tmp_path / "b")
    assert a[1] == pytest.approx(math.log(48), abs=1e-4) and a[20] == pytest.approx(b[20], abs=1e-3)
    norms = [[m["grad_norm"] for m in metrics(tmp_path / r) if "grad_norm" in m] for r in "ab"]
    assert norms[0][0] == pytest.approx(norms[1][0], rel=1e-4)


def test_checkpoints_are_plain_and_the_newest_two_and_the_best_stay(trained, data):
    out, _ = trained
    assert sorted(p.name for p in out.iterdir()) == [".lock", "best.pt", "ckpt_00000080.pt", "ckpt_00000100.pt", "config.json", "metrics.jsonl"]
    state = torch.load(out / "ckpt_00000100.pt", weights_only=True)
    assert set(state) == {"model", "model_args", "optimizer", "scaler", "iter_num", "cursor", "tokens", "elapsed_s", "best_val_loss",
                          "evals_without_gain", "eval_due", "config", "tokenizer", "dataset_fingerprint"}
    assert state["iter_num"] == 100 and state["cursor"] == 800 and state["tokens"] == 12800
    assert set(state["optimizer"]) == set(state["model"]) and not any("_orig_mod" in k or "module." in k for k in state["model"])
    best = min((m for m in metrics(out) if "val_loss" in m), key=lambda m: m["val_loss"])
    assert torch.load(out / "best.pt", weights_only=True)["iter_num"] == best["iter"]


@pytest.mark.parametrize("flags, words, iters", [
    (["--max_epochs=0.5"], "max_epochs=0.5 is reached", math.ceil(0.5 * 248 / 8)),
    (["--target_loss=3.5", "--max_iters=1000", "--eval_interval=5"], "target_loss=3.5 is reached", None),
    (["--patience=2", "--learning_rate=1e-9", "--min_lr=0", "--max_iters=1000", "--eval_interval=5", "--lr_schedule=constant"], "patience=2", None),
    (["--max_hours=0.001", "--max_iters=10**6"], "max_hours=0.001 is over", None)])
def test_every_way_to_stop(tmp_path, data, flags, words, iters):
    printed = ok(train(tmp_path / "out", data, *flags))
    last = printed.strip().splitlines()[-1]
    assert words in last and "ckpt_" in last
    done = checkpoint.read(checkpoint.steps(tmp_path / "out")[0])["iter_num"]
    assert 0 < done < 10**6 and iters in (None, done)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules(schedule):
    at = [lr_factor(i, schedule, warmup_iters=10, decay_end=100, decay_frac=0.5, floor=0.1) for i in range(120)]
    assert at[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert all(a >= b for a, b in zip(at[9:], at[10:]))
    half = {"constant": 1.0, "cosine": 0.55, "linear": 1.0, "wsd": 1.0}[schedule]
    assert at[55] == pytest.approx(half, abs=0.02 if schedule == "cosine" else 0.1 + (schedule == "wsd") * 0.2)
    assert at[100:] == pytest.approx([1.0 if schedule == "constant" else 0.1] * 20)
    assert at[75] == pytest.approx({"constant": 1, "cosine": 0.1 + 0.45 * (1 + math.cos(math.pi * 65 / 90)), "linear": 0.55,
                                    "wsd": 1 - 0.9 * math.sqrt(0.5)}[schedule])
    assert lr_factor(0, schedule, warmup_iters=0, decay_end=10, decay_frac=1, floor=0) == 1


def test_rates_change_with_the_root_of_the_tokens_of_an_iteration(tmp_path, data):
    """TINY has 2 micro-batches * 4 rows * 16 = 128 tokens."""
    peaks = {}
    for tokens in (0, 128, 32):
        printed = ok(train(tmp_path / str(tokens), data, f"--lr_tokens={tokens}", "--muon_lr=0.02", "--max_iters=6"))
        peaks[tokens] = max(m["lr"] for m in metrics(tmp_path / str(tokens)) if "lr" in m)
        assert ("lr 4.00e-02" in printed) == (tokens == 32)  # Muon's in the table
    assert peaks[0] == peaks[128] == pytest.approx(1e-2) and peaks[32] == pytest.approx(2e-2)


def test_only_matrices_are_decayed():
    from model import GPT, GPTConfig
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=32, bias=True, norm="layernorm", vocab_size=64, block_size=16))
    groups = [g for o in configure_optimizers(model, "adamw", 1e-3, weight_decay=0.1) for g in o.param_groups]
    decay = {n: g["weight_decay"] for g in groups for n in g["param_names"]}
    assert decay == {n: 0.1 if p.dim() >= 2 else 0.0 for n, p in model.named_parameters()}


def test_a_dry_run_says_what_a_run_would_take_and_writes_nothing(tmp_path, data):
    printed = ok(train(tmp_path / "out", data, "--dry_run"))
    assert re.search(r"dry run .* s an iteration, [\d,]+ tokens/s, \S+ in all; [\d.]+ GiB", printed) and not list(tmp_path.iterdir())


def test_training_starts_from_a_checkpoints_weights(trained, tmp_path, data):
    out, _ = trained
    printed = ok(run("train.py", f"--init_from={out / 'best.pt'}", *[f for f in TINY if not f.startswith("--n_")], f"--dataset={data}",
                     f"--out_dir={tmp_path / 'fine'}", "--max_iters=1", cwd=tmp_path))
    assert "1 iterations" in printed and losses(tmp_path / "fine")[1] < 1.5


def test_auto_resumes_where_there_is_something_and_else_starts(tmp_path, data):
    ok(train(tmp_path / "out", data, "--init_from=auto", "--max_iters=5"))
    assert "at iteration 5" in ok(train(tmp_path / "out", data, "--init_from=auto", "--max_iters=8"))
    assert sorted(losses(tmp_path / "out")) == list(range(1, 9))
    assert "done already" in ok(train(tmp_path / "out", data, "--init_from=auto", "--max_iters=8"))


def test_compile_trains_the_same_run(tmp_path, data):
    printed = ok(train(tmp_path / "out", data, "--compile", "--max_iters=3", timeout=300))
    assert "compile    on (as set)" in printed
    ok(train(tmp_path / "eager", data, "--max_iters=3"))
    a, b = losses(tmp_path / "out"), losses(tmp_path / "eager")
    assert a[1] == pytest.approx(b[1], abs=1e-5) and a[3] == pytest.approx(b[3], abs=1e-3)
    assert not any("_orig_mod" in k for k in checkpoint.read(tmp_path / "out" / "ckpt_00000003.pt")["model"])


def test_without_a_compiler_it_warns_and_trains_eagerly(tmp_path, data):
    process = train(tmp_path / "out", data, "--compile", "--max_iters=2", CXX="/nowhere/c++", TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))
    assert "max_iters=2 is reached" in ok(process) and "torch.compile failed" in process.stderr


def test_bfloat16_autocast_learns(tmp_path, data):
    ok(train(tmp_path / "out", data, "--dtype=bfloat16", "--max_iters=60"))
    assert losses(tmp_path / "out")[60] < 2.0


@pytest.mark.parametrize("flags, words", [
    (["--n_embd=33"], ["n_embd=33", "n_head=2"]), (["--batch_size=0"], ["batch_size=0"]), (["--learning_rate=0"], ["learning_rate"]),
    (["--lr_schedule=x", "--beta1=1"], ["lr_schedule='x'", "beta1=1"]), (["--dataset=nowhere"], ["nowhere", "prepare.py", "make demo"]),
    (["--block_size=5000"], ["train.bin", "block_size=5000"]), (["--init_from=resume"], ["nothing to resume"]), (["--init_from=gpt5"], ["init_from='gpt5'"]),
    (["--device=cuda:7"], ["device='cuda:7'"]), (["--dtype=float8"], ["dtype='float8'"]), (["--min_lr=1"], ["min_lr"]), (["--keep_checkpoints=1"], ["keep_checkpoints"]),
    (["--decay_frac=2"], ["decay_frac=2"])])
def test_bad_settings_end_in_one_line_before_anything_is_written(tmp_path, data, flags, words):
    refused(train(tmp_path / "out", data, *flags, python=("-O",)), *words)
    assert not (tmp_path / "out").exists()


def test_the_defaults_without_data_name_the_command_that_makes_it(tmp_path):
    refused(run("train.py", f"--dataset={tmp_path}", cwd=tmp_path), "prepare.py", "make demo")
    if not (ROOT / "data/openwebtext/train.bin").exists():
        refused(run("train.py", cwd=ROOT), "`python data/openwebtext/prepare.py`", "make demo")


# ---------------------------------------------------------------------------------------------------------------
# sample.py


def sample(out, *flags, cwd, **kwargs):
    return run("sample.py", f"--out_dir={out}", "--num_samples=2", "--max_new_tokens=20", "--device=cpu", *flags, cwd=cwd, **kwargs)


def test_prompts_come_from_a_flag_a_file_or_standard_input(trained, tmp_path):
    out, _ = trained
    (tmp_path / "p.txt").write_text("!(/")
    a, b, c = (ok(sample(out, *f, cwd=tmp_path, stdin=i)) for f, i in ((["--start=!(/"], None), (["--start=FILE:p.txt"], None), (["--start=-"], "!(/")))
    assert a == b == c and a.count("!(/") >= 2 and len(a.split("-" * 72)) == 3
    first, second = a.split("-" * 72)[:2]
    assert len(first.strip()) == 23 and first.strip() != second.strip()
    assert ok(sample(out, "--start=!(/", cwd=tmp_path)) == a != ok(sample(out, "--start=!(/", "--seed=2", cwd=tmp_path))


def test_the_checkpoint_is_all_that_sampling_needs(trained, tmp_path):
    out, _ = trained
    (tmp_path / "alone.pt").write_bytes((out / "best.pt").read_bytes())
    assert "!(" in ok(run("sample.py", "--init_from=alone.pt", "--start=!(", "--temperature=0", "--num_samples=1", cwd=tmp_path))


@pytest.mark.parametrize("flags, words", [
    (["--start=!(é"], ["'é'", "character 2"]), (["--start=FILE:none.txt"], ["none.txt"]), (["--start=FILE:latin.txt"], ["latin.txt", "byte 1"]), (["--top_p=2"], ["top_p=2"]),
    (["--temperature=-1"], ["temperature=-1"]), (["--init_from=none.pt"], ["none.pt"]), (["--out_dir=empty"], ["empty"]), (["--init_from=latin.txt"], ["latin.txt"])])
def test_bad_requests_end_in_one_line(trained, tmp_path, flags, words):
    (tmp_path / "latin.txt").write_bytes(b"!\xe9")
    refused(sample(trained[0], *flags, cwd=tmp_path), *words)


def test_switches_that_save_memory_leave_the_run_as_it_is(tmp_path, data):
    for name, flags in {"plain": [], "saving": ["--gradient_checkpointing", "--loss_chunk=24"]}.items():
        ok(train(tmp_path / name, data, "--dropout=0.1", *flags))
    assert losses(tmp_path / "saving") == pytest.approx(losses(tmp_path / "plain"), abs=1e-4)


def test_the_writer_keeps_to_one_thread_and_leaves_the_loop_its_own():
    """A second OpenMP team puts the loop's threads to sleep between any two operations: 1.65 times the time of a step."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        writer = checkpoint.Writer()
        assert writer.pool.submit(torch.get_num_threads).result() == 1 and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
