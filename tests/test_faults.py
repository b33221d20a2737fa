"""The fault gauntlet: 28 things that happen to real runs, each with real processes, real signals and real files.

A test's name begins with the number of its case; `make gauntlet` runs all of them and ends with a table.
"""
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, equal, losses, make_data, metrics, ok, refused, run, same_run, torchrun, train

import checkpoint

slow = pytest.mark.slow
SHARED = ["--dropout=0.1", "--gradient_accumulation_steps=2"]
ENDLESS = ["--max_iters=10**6", "--eval_interval=10**6", "--lr_schedule=constant"]


@contextmanager
def started(script, *flags, cwd, ranks=0, launch=(), **environment):
    """A script as a process in a session of its own, whose output is read from a file; killed at the end in any case."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *launch] if ranks else []
    with open(cwd / f"log_{time.monotonic_ns()}", "w+") as log:
        process = subprocess.Popen([sys.executable, *launch, str(ROOT / script), *map(str, flags)], cwd=cwd, stdout=log, stderr=log, text=True,
                                   env=os.environ | environment, start_new_session=True)
        process.log = log.name
        try:
            yield process
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            for pid in ranks_of(process.pid):  # torchrun gives its ranks sessions of their own
                os.kill(pid, signal.SIGKILL)
            process.wait()


def printed(process):
    with open(process.log) as log:
        return log.read()


def wait_for(process, pattern, seconds=60):
    """Wait until the process has printed `pattern`."""
    deadline = time.monotonic() + seconds
    while not re.search(pattern, printed(process)):
        assert process.poll() is None and time.monotonic() < deadline, printed(process)
        time.sleep(0.02)


def ranks_of(parent):
    """Process ids of torchrun's children, rank 0 first."""
    found = {}
    for entry in os.listdir("/proc"):
        try:
            environment = open(f"/proc/{entry}/environ", "rb").read().split(b"\0") if entry.isdigit() else []
            if int(open(f"/proc/{entry}/stat").read().rsplit(")", 1)[1].split()[1]) == parent:
                found[next(int(v[5:]) for v in environment if v.startswith(b"RANK="))] = int(entry)
        except (OSError, ValueError, StopIteration, IndexError):
            pass  # ended, somebody else's, or no rank
    return [found[rank] for rank in sorted(found)]


def flags(data, out, *more):
    return [*TINY, f"--dataset={data}", f"--out_dir={out}", *more]


def faulty(fault, data, out, *more, **kwargs):
    return run("tests/faulty.py", fault, *flags(data, out, *more), cwd=out.parent, **kwargs)


def last_line(process, *words, code=2):
    """Assert that a process ended with this status and a last line on stderr that has all the words, and no traceback."""
    assert process.returncode == code and "Traceback" not in process.stderr, process.stdout + process.stderr
    for word in words:
        assert word in process.stderr.strip().splitlines()[-1], process.stderr


def own_error(text):
    """Rank 0's own last line, among torchrun's."""
    lines = [line for line in text.splitlines() if line.startswith("error: ")]
    assert lines, text
    return next((line for line in lines if not line.startswith("error: rank")), lines[0])


def finite(path):
    state = checkpoint.read(path)
    tensors = [*state["model"].values(), *(v for s in state["optimizer"].values() for v in s.values())]
    return all(bool(v.isfinite().all()) for v in tensors)


def files(out):
    return sorted(p.name for p in out.iterdir())


# ---------------------------------------------------------------------------------------------------------------
# resume


@slow
def test_01_the_same_command_twice_gives_the_same_run_and_keeps_the_first(tmp_path, data):
    out = tmp_path / "out"
    ok(train(out, data))
    assert "before_1" in ok(train(out, data))
    assert same_run(out / "before_1" / "ckpt_00000020.pt", out / "ckpt_00000020.pt")


@pytest.mark.parametrize("more", [["--dropout=0.1"], pytest.param(["--dropout=0.1", "--lr_schedule=wsd", "--gradient_accumulation_steps=3"], marks=slow)])
def test_02_a_resume_is_bit_exact(tmp_path, data, more):
    ok(train(tmp_path / "straight", data, *more))
    ok(train(tmp_path / "parts", data, *more, "--max_iters=13", "--lr_decay_iters=20"))
    ok(run("train.py", "--init_from=resume", "--max_iters=20", f"--out_dir={tmp_path / 'parts'}", cwd=tmp_path))
    a, b = (checkpoint.read(tmp_path / r / "ckpt_00000020.pt") for r in ("straight", "parts"))
    assert all(equal(a[k], b[k]) for k in ("model", "optimizer", "iter_num", "cursor", "tokens"))
    a, b = losses(tmp_path / "straight"), losses(tmp_path / "parts")
    assert a == b and len(a) == 20


@slow
def test_02_a_resume_in_float16_is_bit_exact_with_its_loss_scale(tmp_path, data):
    """On a CPU, whose kernels repeat: the scale begins at 2^30 and halves until the gradients are finite."""
    parts, straight, more = tmp_path / "parts", tmp_path / "straight", ["--dropout=0.1", "--lr_decay_iters=20"]
    said = ok(faulty("half+loss_scale=30", data, straight, *more))
    for end in 7, 13, 20:
        ok(faulty("half+loss_scale=30", data, parts, *more, f"--max_iters={end}", "--init_from=auto"))
    a, b = (checkpoint.read(out / "ckpt_00000020.pt") for out in (straight, parts))
    assert all(equal(a[k], b[k]) for k in ("model", "optimizer", "scaler", "iter_num", "cursor", "tokens"))
    assert losses(straight) == losses(parts) and a["scaler"]["scale"] == 2.0 ** (30 - said.count("skipped")) and "skipped" in said


@slow
def test_03_several_resumes_neither_repeat_nor_skip_a_batch(tmp_path, data):
    """Of 31 windows, in 12 iterations of 8: each row must come as often as in a straight run, in its order."""
    ok(train(tmp_path / "straight", data, "--max_iters=12", "--lr_schedule=constant"))
    for end in (3, 4, 9, 12):
        ok(train(tmp_path / "parts", data, f"--max_iters={end}", "--lr_schedule=constant", "--init_from=auto"))
    assert losses(tmp_path / "parts") == losses(tmp_path / "straight") and len(metrics(tmp_path / "parts")) == 12 + 5  # 5 evaluations
    assert checkpoint.newest_sound(tmp_path / "parts")[1]["cursor"] == 12 * 8


@slow
def test_04_looking_does_not_change_the_run(tmp_path, data):
    """Evaluation and sampling, often or never: the training losses stay."""
    ok(train(tmp_path / "a", data, "--eval_interval=1000", "--dropout=0.1"))
    ok(train(tmp_path / "b", data, "--eval_interval=3", "--sample_interval=2", "--dropout=0.1", "--eval_iters=2"))
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


@slow
def test_05_two_ranks_are_one_run(tmp_path, data):
    ok(train(tmp_path / "one", data, "--dropout=0.1"))
    ok(torchrun(2, *flags(data, tmp_path / "two", "--dropout=0.1"), cwd=tmp_path))
    assert same_run(tmp_path / "one" / "ckpt_00000020.pt", tmp_path / "two" / "ckpt_00000020.pt")
    assert losses(tmp_path / "one") == losses(tmp_path / "two")


@slow
def test_05_two_ranks_with_more_micro_batches_follow_the_same_curve(tmp_path, data):
    more = ["--dropout=0.1", "--gradient_accumulation_steps=4"]
    ok(train(tmp_path / "one", data, *more))
    ok(torchrun(2, *flags(data, tmp_path / "two", *more), cwd=tmp_path))
    a, b = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert abs(a[1] - b[1]) < 1e-6 and all(abs(a[i] - b[i]) < 1e-3 for i in a)


@slow
@pytest.mark.parametrize("before, after", [(2, 1), (1, 2)])
def test_06_another_number_of_ranks_continues_the_same_run(tmp_path, data, before, after):
    ok(train(tmp_path / "straight", data, *SHARED))
    for ranks, more in (before, ["--max_iters=10", "--lr_decay_iters=20"]), (after, ["--init_from=auto", "--lr_decay_iters=20"]):
        words = flags(data, tmp_path / "parts", *SHARED, *more)
        ok(torchrun(2, *words, cwd=tmp_path) if ranks == 2 else run("train.py", *words, cwd=tmp_path))
    assert losses(tmp_path / "parts") == losses(tmp_path / "straight")
    a, b = (checkpoint.read(tmp_path / r / "ckpt_00000020.pt") for r in ("straight", "parts"))
    assert equal(a["model"], b["model"]) and equal(a["optimizer"], b["optimizer"])


def test_07_a_resume_never_changes_architecture_data_or_tokenizer(trained, tmp_path):
    out, _ = trained
    resume = lambda *more: run("train.py", "--init_from=resume", f"--out_dir={out}", "--max_iters=101", "--dry_run", *more, cwd=tmp_path)
    refused(resume("--n_layer=3"), "n_layer=2 there, 3 here")
    other = make_data(tmp_path / "other", seed=1)
    refused(resume(f"--dataset={other}"), "other data", "--change_data")
    ok(resume(f"--dataset={other}", "--change_data"))
    refused(resume(f"--dataset={make_data(tmp_path / 'larger', vocab_size=50)}"), "vocab_size=48 there, 50 here")
    spelled = make_data(tmp_path / "spelled")
    state = json.loads((spelled / "tokenizer.json").read_text())
    (spelled / "tokenizer.json").write_text(json.dumps(state | {"chars": state["chars"][::-1]}))
    refused(resume(f"--dataset={spelled}", "--change_data"), "another tokenizer")


def test_08_eval_only_evaluates_every_split_and_updates_nothing(trained, tmp_path):
    out, _ = trained
    before = {p: p.read_bytes() for p in out.iterdir()}
    said = ok(run("train.py", "--init_from=resume", f"--out_dir={out}", "--eval_only", cwd=tmp_path))
    val = [m for m in metrics(out) if "val_loss" in m][-1]["val_loss"]
    assert f"val loss {val:.4f}" in said and "test loss" in said and "train loss" in said
    assert before == {p: p.read_bytes() for p in out.iterdir()}


# ---------------------------------------------------------------------------------------------------------------
# checkpoints


@pytest.mark.parametrize("kills", [1, pytest.param(50, marks=slow)])
def test_09_kill_9_at_random_moments_with_a_checkpoint_every_iteration(tmp_path, data, kills):
    out, draw, moments = tmp_path / "out", random.Random(kills), []
    words = flags(data, out, *ENDLESS, "--checkpoint_interval=1", "--init_from=auto")
    for _ in range(kills):
        with started("train.py", *words, cwd=tmp_path) as process:
            wait_for(process, r"\niter ")
            time.sleep(draw.uniform(0, 0.3))
            process.kill()
            process.wait()
            assert "warning" not in printed(process) and (not moments or f"at iteration {moments[-1]:,}" in printed(process))
        moments.append(checkpoint.newest_sound(out)[1]["iter_num"])
        assert moments[-1] >= max(losses(out)) - 2  # the interval, and the write that was in flight
    ok(run("train.py", *words, f"--max_iters={moments[-1] + 2}", cwd=tmp_path))
    assert not list(out.glob("*.tmp")) and moments == sorted(moments)
    seen = {}
    for m in metrics(out):  # whatever was computed twice came out the same
        assert "train_loss" not in m or seen.setdefault(m["iter"], m["train_loss"]) == m["train_loss"]
    assert sorted(seen) == list(range(1, moments[-1] + 3))


def spoil(path, how):
    content = bytearray(path.read_bytes())
    if how == "flipped":
        content[len(content) // 2] ^= 1
    path.unlink()  # best.pt may be the same file
    path.write_bytes(content[:{"empty": 0, "half": len(content) // 2, "ten bytes short": -10, "flipped": None}[how]])


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory, data):
    """A straight run to 20 iterations, with a checkpoint at 10, too."""
    out = tmp_path_factory.mktemp("straight") / "out"
    ok(train(out, data))
    return out


@pytest.mark.parametrize("how", ["flipped", *(pytest.param(how, marks=slow) for how in ("empty", "half", "ten bytes short"))])
def test_10_a_damaged_newest_checkpoint_is_named_and_the_one_before_used(tmp_path, two_checkpoints, how):
    out = tmp_path / "out"
    shutil.copytree(two_checkpoints, out)
    spoil(out / "ckpt_00000020.pt", how)
    process = run("train.py", "--init_from=resume", f"--out_dir={out}", cwd=tmp_path)
    assert "at iteration 10" in ok(process) and "ckpt_00000020.pt is not a sound checkpoint" in process.stderr
    assert same_run(out / "ckpt_00000020.pt", two_checkpoints / "ckpt_00000020.pt")


@slow
def test_10_a_damaged_checkpoint_ahead_of_the_run_is_not_kept_as_one_of_the_newest(tmp_path, two_checkpoints):
    out = tmp_path / "out"
    shutil.copytree(two_checkpoints, out)
    spoil(out / "ckpt_00000020.pt", "half")
    ok(run("train.py", "--init_from=resume", f"--out_dir={out}", "--max_iters=15", cwd=tmp_path))
    assert [p.name for p in checkpoint.steps(out)] == ["ckpt_00000015.pt", "ckpt_00000010.pt"]


def test_11_without_a_sound_checkpoint_nothing_starts_from_scratch(tmp_path, two_checkpoints):
    out = tmp_path / "out"
    shutil.copytree(two_checkpoints, out)
    for path in checkpoint.steps(out):
        spoil(path, "half")
    before = files(out)
    for init in ("resume", "auto"):
        last_line(run("train.py", f"--init_from={init}", f"--out_dir={out}", cwd=tmp_path), "no checkpoint in", "is sound", "--init_from=")
    assert files(out) == before


def mounted(folder, size):
    folder.mkdir()
    return subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)], capture_output=True).returncode == 0


def test_12_a_full_disk_is_named_and_the_previous_checkpoint_loads(tmp_path, data):
    """A disk with room for three checkpoints of about 400 KB, where four are to be kept."""
    disk = tmp_path / "disk"
    if not mounted(disk, "1400k"):
        pytest.skip("a small disk needs the right to mount one; the case below has a limit on files instead")
    try:
        process = train(disk / "out", data, "--checkpoint_interval=4", "--keep_checkpoints=9", cwd=tmp_path)
        last_line(process, "could not write", "ckpt_", "No space left on device", "free some space")
        assert not list(disk.glob("out/*.tmp"))
        path, state = checkpoint.newest_sound(disk / "out")
        assert state["iter_num"] in (4, 8, 12, 16)
        for old in checkpoint.steps(disk / "out")[1:]:
            old.unlink()
        ok(run("train.py", "--init_from=resume", f"--out_dir={disk / 'out'}", "--keep_checkpoints=2", "--checkpoint_interval=100", cwd=tmp_path))
        assert sorted(losses(disk / "out")) == list(range(1, 21))
    finally:
        subprocess.run(["umount", str(disk)])


@slow
def test_12_a_file_that_cannot_grow_is_named_and_leaves_no_temporary_one(tmp_path, data):
    last_line(faulty("file_limit=100000", data, tmp_path / "out"), "ckpt_00000010.pt", "File too large", "--out_dir")
    assert not list((tmp_path / "out").glob("*.pt*"))


def test_13_an_out_dir_that_cannot_be_written_is_an_error_before_the_first_iteration(tmp_path, data):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "out"):
        process = train(out, data, cwd=tmp_path)
        refused(process, str(out))
        assert "iter " not in process.stdout
    if os.getuid():  # root may write anywhere
        (tmp_path / "closed").mkdir(mode=0o555)
        refused(train(tmp_path / "closed" / "out", data, cwd=tmp_path), "closed")


def test_14_two_runs_in_one_out_dir_and_a_third_after_kill_9(tmp_path, data):
    out = tmp_path / "out"
    with started("train.py", *flags(data, out, *ENDLESS, "--checkpoint_interval=10"), cwd=tmp_path) as first:
        wait_for(first, r"\niter +20/")
        refused(train(out, data), "in use by another run", str(first.pid), "--out_dir")
        assert first.poll() is None
        first.kill()
        first.wait()
    assert "resume " in ok(train(out, data, "--init_from=resume", "--max_iters=10**5", "--max_hours=0.0001"))


@slow
def test_15_keep_checkpoints_keeps_exactly_two_and_the_best(tmp_path, data):
    ok(train(tmp_path / "out", data, "--eval_interval=2"))
    assert files(tmp_path / "out") == [".lock", "best.pt", "ckpt_00000018.pt", "ckpt_00000020.pt", "config.json", "metrics.jsonl"]
    best = min((m for m in metrics(tmp_path / "out") if "val_loss" in m), key=lambda m: m["val_loss"])
    assert checkpoint.read(tmp_path / "out" / "best.pt")["iter_num"] == best["iter"]


# ---------------------------------------------------------------------------------------------------------------
# signals


def newest(out):
    return checkpoint.newest_sound(out)[1]["iter_num"]


def test_16_sigterm_saves_the_current_iteration_and_the_resume_is_exact(tmp_path, data):
    out, straight = tmp_path / "out", tmp_path / "straight"
    with started("tests/faulty.py", "slow_step=0.1", *flags(data, out, *ENDLESS, *SHARED), cwd=tmp_path) as process:
        wait_for(process, r"\niter +5/")
        process.terminate()
        assert process.wait(30) == 128 + signal.SIGTERM, printed(process)
        assert "stopped by SIGTERM" in printed(process).splitlines()[-1]
    done = newest(out)
    assert done == max(losses(out)) and 5 <= done < 9
    ok(run("train.py", "--init_from=resume", f"--out_dir={out}", f"--max_iters={done + 5}", cwd=tmp_path))
    ok(train(straight, data, *ENDLESS, *SHARED, f"--max_iters={done + 5}"))
    assert losses(out) == losses(straight)
    a, b = (checkpoint.read(checkpoint.steps(o)[0]) for o in (out, straight))
    assert equal(a["model"], b["model"]) and equal(a["optimizer"], b["optimizer"])


@slow
def test_16_sigterm_to_torchrun_leaves_one_checkpoint_of_all_ranks(tmp_path, data):
    out = tmp_path / "out"
    with started("tests/faulty.py", "slow_step=0.1", *flags(data, out, *ENDLESS), cwd=tmp_path, ranks=2) as process:
        wait_for(process, r"\niter +3/")
        process.terminate()
        assert process.wait(30) != 0
        assert "stopped by SIGTERM" in printed(process) and "error: " not in printed(process)
    assert len(checkpoint.steps(out)) == 1 and newest(out) == max(losses(out))


@slow
def test_16_sigterm_to_one_rank_stops_all_at_the_same_iteration(tmp_path, data):
    out = tmp_path / "out"
    with started("tests/faulty.py", "slow_step=0.1", *flags(data, out, *ENDLESS), cwd=tmp_path, ranks=2) as process:
        wait_for(process, r"\niter +3/")
        os.kill(ranks_of(process.pid)[1], signal.SIGTERM)
        assert process.wait(30) != 0 and "stopped by SIGTERM" in printed(process)
    assert len(checkpoint.steps(out)) == 1 and newest(out) == max(losses(out))


@slow
@pytest.mark.parametrize("ranks, at", [(0, 10), (2, 10), (0, 20)])
def test_16_sigterm_in_a_long_evaluation_is_noticed_and_the_resume_begins_with_it(tmp_path, ranks, at):
    """625 batches of 0.2 s, 10 iterations after the first or at the planned end; the resume leaves what a straight run does."""
    data, out, straight = make_data(tmp_path / "data", val_tokens=40_000), tmp_path / "out", tmp_path / "straight"
    words = [*SHARED, f"--eval_interval={at}"]
    with started("tests/faulty.py", "slow_eval=0.2", *flags(data, out, *words), cwd=tmp_path, ranks=ranks) as process:
        wait_for(process, "evaluating")
        process.terminate()
        began = time.monotonic()
        assert process.wait(25) == 1 if ranks else process.wait(25) == 128 + signal.SIGTERM, printed(process)
        assert "stopped by SIGTERM" in printed(process) and "error: " not in printed(process), time.monotonic() - began
    assert newest(out) == max(losses(out)) == at and not any("val_loss" in m for m in metrics(out))
    again = run("train.py", "--init_from=resume", f"--out_dir={out}", cwd=tmp_path)
    assert at < 20 or "done already" in again.stdout.splitlines()[-1]
    ok(again)
    ok(train(straight, data, *words))
    a, b = ([(m["iter"], m["val_loss"]) for m in metrics(o) if "val_loss" in m] for o in (out, straight))
    assert a == b and len(a) == 20 // at and losses(out) == losses(straight)
    assert same_run(out / "ckpt_00000020.pt", straight / "ckpt_00000020.pt") and same_run(out / "best.pt", straight / "best.pt")
    assert not checkpoint.newest_sound(out)[1]["eval_due"]


def test_17_ctrl_c_once_saves_and_ends(tmp_path, data):
    with started("train.py", *flags(data, tmp_path / "out", *ENDLESS), cwd=tmp_path) as process:
        wait_for(process, r"\niter +5/")
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 128 + signal.SIGINT
        assert "stopped by SIGINT" in printed(process) and "Traceback" not in printed(process)
    assert newest(tmp_path / "out") == max(losses(tmp_path / "out"))


def test_17_ctrl_c_twice_ends_at_once_and_keeps_the_last_checkpoint(tmp_path, data, two_checkpoints):
    out = tmp_path / "out"
    shutil.copytree(two_checkpoints, out)
    with started("tests/faulty.py", "slow_write=60", *flags(data, out, *ENDLESS, "--init_from=resume"), cwd=tmp_path) as process:
        wait_for(process, r"\niter +25/")
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        began = time.monotonic()
        assert process.wait(30) == 128 + signal.SIGINT and time.monotonic() - began < 2
        assert "second Ctrl-C" in printed(process) and "Traceback" not in printed(process)
    assert newest(out) == 20


@slow
@pytest.mark.parametrize("also_the_ranks", [False, True])
def test_17_ctrl_c_on_torchrun_saves_and_ends(tmp_path, data, also_the_ranks):
    """A terminal signals its whole process group. torchrun's ranks have groups of their own; where they get the signal
    all the same (`srun` reaches every process), they get it twice, for torchrun passes it on."""
    out = tmp_path / "out"
    with started("tests/faulty.py", "slow_step=0.1", *flags(data, out, *ENDLESS), cwd=tmp_path, ranks=2) as process:
        wait_for(process, r"\niter +5/")
        for pid in ranks_of(process.pid) * also_the_ranks:
            os.kill(pid, signal.SIGINT)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(30) == 1  # torchrun's own
        assert "stopped by SIGINT" in printed(process) and "second Ctrl-C" not in printed(process)
    assert len(checkpoint.steps(out)) == 1 and newest(out) == max(losses(out))


@slow
def test_17_ctrl_c_on_torchrun_twice_ends_at_once_and_keeps_the_last_checkpoint(tmp_path, data, two_checkpoints):
    out = tmp_path / "out"
    shutil.copytree(two_checkpoints, out)
    with started("tests/faulty.py", "slow_write=60", *flags(data, out, *ENDLESS, "--init_from=resume"), cwd=tmp_path, ranks=2) as process:
        wait_for(process, r"\niter +25/")
        pids = ranks_of(process.pid)
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(2)  # more than the second within which it would be the same Ctrl-C
        assert process.poll() is None and all(os.path.exists(f"/proc/{pid}") for pid in pids)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(10) == 1 and "second Ctrl-C" in printed(process)  # far from slow_write's 60 s, and torchrun's 30
        assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)
    assert newest(out) == 20 and not list(out.glob("ckpt*25.pt"))


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=slow)])
def test_17_a_signal_during_set_up_ends_it_without_a_traceback(tmp_path, data, number):
    with started("tests/faulty.py", "slow_setup=30", *flags(data, tmp_path / "out"), cwd=tmp_path) as process:
        wait_for(process, "setting up")
        process.send_signal(number)
        assert process.wait(5) == -number and printed(process) == "setting up\n"


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=slow)])
def test_18_kill_9_of_one_rank_ends_the_job(tmp_path, data, rank):
    out = tmp_path / "out"
    with started("train.py", *flags(data, out, *ENDLESS, "--checkpoint_interval=5"), cwd=tmp_path, ranks=2) as process:
        wait_for(process, r"\niter +20/")
        pids = ranks_of(process.pid)
        os.kill(pids[rank], signal.SIGKILL)
        assert process.wait(60) != 0
        error = own_error(printed(process))  # of the other rank, whichever that is
        assert error.startswith("error: rank 1: ") == (rank == 0)
        assert "lost another rank" in error and "timeout_s" in error and "--init_from=resume" in error
        assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)
    assert newest(out) % 5 == 0


@slow
def test_18_a_stopped_rank_is_an_error_at_the_time_out(tmp_path, data):
    out = tmp_path / "out"
    with started("train.py", *flags(data, out, *ENDLESS, "--checkpoint_interval=5", "--timeout_s=5"), cwd=tmp_path, ranks=2) as process:
        wait_for(process, r"\niter +20/")
        pids = ranks_of(process.pid)
        os.kill(pids[1], signal.SIGSTOP)
        stopped = time.monotonic()
        wait_for(process, "error: ", 15)
        assert 4 < time.monotonic() - stopped < 12 and "timeout_s=5" in own_error(printed(process))
        assert process.wait(60) != 0 and not any(os.path.exists(f"/proc/{pid}") for pid in pids)
    assert newest(out) % 5 == 0


@slow
def test_19_max_hours_saves_and_exits_within_the_limit(tmp_path, data):
    """The write takes 2 s, the limit is 20: the first checkpoint shows what has to be left for the last."""
    out = tmp_path / "out"
    process = faulty("slow_write=2", data, out, *ENDLESS, "--max_hours=20/3600", "--checkpoint_interval=100")
    began = float(re.search(r"clock (\S+)", ok(process)).group(1))
    assert 5 < time.monotonic() - began < 21
    assert "max_hours" in ok(process).splitlines()[-1] and newest(out) == max(losses(out))


@slow
def test_19_max_hours_is_this_process_s_wall_clock_and_not_the_first_one_s(tmp_path, data):
    """Two runs of 15 s each, one after the other: the second would end at once, were the start of the first a setting."""
    out = tmp_path / "out"
    for more in [], ["--init_from=resume"]:
        before = newest(out) if more else 0
        said = ok(train(out, data, *ENDLESS, "--max_hours=15/3600", "--checkpoint_interval=100", *more))
        assert "max_hours" in said.splitlines()[-1] and newest(out) > before + 2


@slow
def test_19_max_hours_does_not_wait_for_a_long_evaluation(tmp_path):
    """An evaluation of two minutes that begins before the limit of 20 s: it is abandoned, and due at the resume."""
    data, out = make_data(tmp_path / "data", val_tokens=40_000), tmp_path / "out"
    began = time.monotonic()
    said = ok(faulty("slow_eval=0.2", data, out, "--max_hours=20/3600"))
    assert time.monotonic() - began < 40 and "max_hours" in said.splitlines()[-1]
    assert newest(out) == max(losses(out)) == 10 and checkpoint.newest_sound(out)[1]["eval_due"]


# ---------------------------------------------------------------------------------------------------------------
# numbers


def test_20_a_nan_gradient_ends_the_run_with_finite_weights(tmp_path, data):
    out = tmp_path / "out"
    last_line(faulty("nan_gradient=7", data, out, "--gradient_accumulation_steps=1", "--checkpoint_interval=1"),
              "not finite at iteration 7", "ckpt_00000006.pt", "--learning_rate", "--init_from=resume")
    assert newest(out) == 6 and finite(out / "ckpt_00000006.pt")


@slow
def test_20_a_nan_gradient_is_skipped_and_logged_where_chosen(tmp_path, data):
    out = tmp_path / "out"
    said = ok(faulty("nan_gradient=7", data, out, "--gradient_accumulation_steps=1", "--checkpoint_interval=1", "--keep_checkpoints=20", "--skip_nonfinite=1"))
    assert re.search(r"iter +7/20 +skipped.*not finite \(1 in a row\)", said)
    before, after = (checkpoint.read(out / f"ckpt_0000000{i}.pt") for i in (6, 7))
    assert equal(before["model"], after["model"]) and equal(before["optimizer"], after["optimizer"])
    assert all(finite(path) for path in checkpoint.steps(out))
    assert [m["iter"] for m in metrics(out) if m.get("grad_norm", 0) is None] == [7]


@slow
def test_20_a_run_whose_first_update_was_skipped_resumes(tmp_path, data):
    """Its checkpoint holds no optimizer state yet."""
    out, more = tmp_path / "out", ["--gradient_accumulation_steps=1", "--skip_nonfinite=1"]
    ok(faulty("nan_gradient=1", data, out, *more, "--max_iters=1", "--lr_decay_iters=20"))
    assert checkpoint.newest_sound(out)[1]["optimizer"] == {}
    ok(train(out, data, *more, "--init_from=resume"))
    assert newest(out) == 20 and losses(out)[20] < losses(out)[2] - 0.1


@slow
def test_20_a_run_that_goes_on_in_float16_gets_a_scaler_of_its_own(tmp_path, data):
    """float32 has none whose state it could take up; and the other way round."""
    out = tmp_path / "out"
    for end, fault in (5, "peak_memory"), (10, "half"), (15, "peak_memory"):
        ok(faulty(fault, data, out, "--init_from=auto", f"--max_iters={end}", "--lr_decay_iters=20"))
        scaler = checkpoint.read(out / f"ckpt_{end:08}.pt")["scaler"]
        assert scaler == {} if fault != "half" else scaler["scale"] == 2.0**16


@slow
@pytest.mark.parametrize("more", [[], ["--skip_nonfinite=1"]])
def test_20_a_nan_gradient_on_one_rank_is_one_on_all(tmp_path, data, more):
    out = tmp_path / "out"
    process = run("tests/faulty.py", "nan_gradient=7,1", *flags(data, out, *more), cwd=tmp_path,
                  python=("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"))
    if more:
        assert "skipped" in ok(process) and finite(out / "ckpt_00000020.pt")
    else:
        assert process.returncode and "not finite at iteration 7" in own_error(process.stderr) and not checkpoint.steps(out)


@pytest.mark.parametrize("at", [7, pytest.param(10, marks=slow)])  # 10: at a checkpoint, which waits for the flags
def test_20_a_nan_gradient_that_the_host_sees_late_ends_the_run_all_the_same(tmp_path, data, at):
    """On CUDA the host looks at a gradient's flag one iteration later, and by then the next update is made."""
    out = tmp_path / "out"
    process = faulty(f"late+nan_gradient={at}", data, out, "--gradient_accumulation_steps=1", "--checkpoint_interval=5")
    last_line(process, f"not finite at iteration {at},", "weights were left alone", "ckpt_00000005.pt", "--init_from=resume")
    assert newest(out) == 5 and all(finite(path) for path in out.glob("*.pt"))
    assert re.search(rf"\niter +{at}/.* norm +nan ", process.stdout) or at == 10


@slow
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_20_skipped_late_or_at_once_it_is_the_same_run(tmp_path, data, optimizer):
    """Late, the host makes the step, and the device leaves the weights alone; at once, the host makes none."""
    more = ["--gradient_accumulation_steps=1", "--skip_nonfinite=1", "--dropout=0.1", f"--optimizer={optimizer}", "--checkpoint_interval=4"]
    said = [ok(faulty(f"{late}nan_gradient=7", data, tmp_path / f"{late}out", *more)) for late in ("", "late+")]
    for text, out in zip(said, (tmp_path / "out", tmp_path / "late+out")):
        assert re.findall(r"iter +(\d+)/20 +skipped.*not finite \((\d) in a row\)", text) == [("7", "1")]
        assert all(finite(path) for path in out.glob("*.pt"))
    a, b = tmp_path / "out", tmp_path / "late+out"
    assert same_run(a / "ckpt_00000020.pt", b / "ckpt_00000020.pt") and losses(a) == losses(b) and len(losses(a)) == 20


@slow
def test_20_a_nan_gradient_on_one_rank_is_seen_late_by_all(tmp_path, data):
    process = run("tests/faulty.py", "late+nan_gradient=7,1", *flags(data, tmp_path / "out", "--checkpoint_interval=5"), cwd=tmp_path,
                  python=("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"))
    assert process.returncode and re.search("not finite at iteration 7,.*ckpt_00000005.pt", own_error(process.stderr))
    assert newest(tmp_path / "out") == 5


@slow
def test_20_a_stop_that_is_seen_late_saves_and_the_resume_is_exact(tmp_path, data):
    out, straight = tmp_path / "out", tmp_path / "straight"
    with started("tests/faulty.py", "late+slow_step=0.1", *flags(data, out, *ENDLESS, *SHARED), cwd=tmp_path) as process:
        wait_for(process, r"\niter +5/")
        process.terminate()
        assert process.wait(30) == 128 + signal.SIGTERM, printed(process)
        assert "stopped by SIGTERM" in printed(process).splitlines()[-1]
    done = newest(out)
    assert done == max(losses(out)) and 6 <= done < 10  # one more than at once
    ok(faulty("late", data, out, "--init_from=resume", f"--max_iters={done + 5}", *ENDLESS[1:]))
    ok(train(straight, data, *ENDLESS, *SHARED, f"--max_iters={done + 5}"))
    assert losses(out) == losses(straight)
    a, b = (checkpoint.read(checkpoint.steps(o)[0]) for o in (out, straight))
    assert equal(a["model"], b["model"]) and equal(a["optimizer"], b["optimizer"])


@pytest.mark.parametrize("more", [["--dropout=0.1"], *(pytest.param(more, marks=slow) for more in (
    ["--optimizer=adamw"], ["--grad_clip=0"], ["--optimizer=adamw", "--grad_clip=0"], ["--gradient_checkpointing", "--loss_chunk=10"]))])
def test_20_read_late_nothing_is_read_between_two_log_lines(tmp_path, data, more):
    """Or the host would wait for the device in every iteration, instead of preparing the next one."""
    def reads(faults):
        """{iteration: how often the host asked in its update, and behind the update before}"""
        said = ok(faulty(faults, data, tmp_path / faults, "--log_interval=10", "--max_iters=25", "--eval_interval=100", *more))
        return {int(i): int(n) for n, i in re.findall(r"host reads (\d+) since the last push, before (\d+)'s", said)}

    late = reads("late+host_reads")
    assert list(late) == list(range(1, 26)) and {i for i, n in late.items() if n} == {11, 21}  # behind the log lines of 10 and 20
    if "--dropout=0.1" in more:
        assert all(reads("host_reads").values())  # what reads at once is counted in every iteration


@pytest.mark.parametrize("optimizer, rate", [("adamw", "1e39"), pytest.param("adamw", "1e30", marks=slow), pytest.param("muon", "1e30", marks=slow)])
def test_21_an_absurd_learning_rate_stops_and_leaves_finite_checkpoints(tmp_path, data, optimizer, rate):
    """At 1e30 the second gradient is not finite; at 1e39 the first update is not, while its gradient was."""
    out = tmp_path / "out"
    process = train(out, data, f"--learning_rate={rate}", f"--optimizer={optimizer}", f"--muon_lr={rate}", "--checkpoint_interval=1", "--warmup_iters=0")
    last_line(process, "not finite", "lower --learning_rate")
    assert all(finite(path) for path in out.glob("*.pt")) and not list(out.glob("*.tmp"))


# ---------------------------------------------------------------------------------------------------------------
# data


@pytest.mark.parametrize("size, words", [(2 * 4000 - 1, ["7,999 bytes", "cut off"]), (2 * 16, ["16 tokens", "--block_size"]),
                                         *(pytest.param(*case, marks=slow) for case in ((None, ["there is no", "prepare.py"]), (0, ["0 tokens"])))])
def test_22_a_bad_train_bin_is_one_line_before_the_model_is_built(tmp_path, size, words):
    folder = make_data(tmp_path / "data")
    (folder / "train.bin").unlink() if size is None else os.truncate(folder / "train.bin", size)
    process = train(tmp_path / "out", folder)
    refused(process, "train.bin", *words)
    assert not process.stdout and not (tmp_path / "out").exists()


@slow
def test_22_one_token_more_than_block_size_trains(tmp_path):
    folder = make_data(tmp_path / "data", tokens=17, val_tokens=17)
    assert "max_iters=2 is reached" in ok(train(tmp_path / "out", folder, "--max_iters=2"))


def put(folder, split, at, token):
    ids = np.memmap(folder / f"{split}.bin", "<u2", mode="r+")
    ids[at] = token
    ids.flush()


@pytest.mark.parametrize("split", ["train", pytest.param("val", marks=slow)])
def test_23_an_id_equal_to_vocab_size_at_the_very_end_is_caught_at_start_up(tmp_path, split):
    folder = make_data(tmp_path / "data")
    put(folder, split, -1, 48)
    refused(train(tmp_path / "out", folder), f"{split}.bin", "token id 48", "vocab_size=48", "prepare")


@slow
def test_23_an_id_in_the_middle_is_caught_by_max_id_or_by_its_batch(tmp_path):
    folder = make_data(tmp_path / "data", tokens=150_000)
    put(folder, "train", 75_000, 48)
    process = train(tmp_path / "out", folder, "--max_iters=10**5", "--max_epochs=1", "--batch_size=500", "--gradient_accumulation_steps=1")
    last_line(process, "train.bin", "token id 48", "vocab_size=48")
    meta = json.loads((folder / "meta.json").read_text()) | {"max_id": 48}
    (folder / "meta.json").write_text(json.dumps(meta))
    refused(train(tmp_path / "out", folder), "token id 48")


@pytest.mark.parametrize("environment", [pytest.param({}, marks=slow), {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0"}])
def test_24_text_comes_back_exactly_or_is_refused_by_name(tmp_path, environment):
    prepare = lambda *more: run("data/text/prepare.py", f"--input={tmp_path / 'text.txt'}", f"--out={tmp_path / 'out'}", "--tokenizer=char", *more,
                                cwd=tmp_path, **environment)
    for content, word in (b"abc\xff\xfe def" * 50, "UTF-8"), (b"", "text.txt"):
        (tmp_path / "text.txt").write_bytes(content)
        process = prepare()
        last_line(process, word)
        assert not list((tmp_path / "out").glob("*.bin"))
    text = "Zeile eins\r\nline two\n\n\u00e9\u4e16\U0001f600\r" * 400
    (tmp_path / "text.txt").write_bytes(text.encode())
    ok(prepare())
    from data.tokenizer import Tokenizer
    tokenizer = Tokenizer.load(tmp_path / "out" / "tokenizer.json")
    ids = [np.fromfile(tmp_path / "out" / f"{split}.bin", "<u2").tolist() for split in ("train", "val")]
    assert tokenizer.decode(ids[0]) + tokenizer.decode(ids[1]) == text


@slow
def test_25_a_sparse_20_gb_file_trains_in_little_memory(tmp_path, data):
    small, big = tmp_path / "small", tmp_path / "big"
    for folder in (small, big):
        shutil.copytree(data, folder)
    os.truncate(small / "train.bin", 40_000)
    os.truncate(big / "train.bin", 20_000_000_000)
    peaks = []
    for folder in (small, big):
        process = faulty("peak_memory", folder, tmp_path / f"out_{folder.name}", "--batch_size=64", "--max_iters=40")
        peaks.append(float(ok(process).split()[-1]))
    assert peaks[1] - peaks[0] < 200, peaks


# ---------------------------------------------------------------------------------------------------------------
# flags and security


@pytest.mark.parametrize("python", [(), ("-O",)])
def test_26_wrong_flags_are_refused_by_name_and_right_ones_accepted(tmp_path, data, python):
    (tmp_path / "typo.py").write_text("batch_sise = 3\n")
    for flag, words in [("--lr=", ["lr"]), ("--nope=1", ["nope"]), ("--batch_size=1.5", ["batch_size", "1.5"]), ("--__name__=x", ["__name__"]),
                        ("typo.py", ["typo.py", "batch_sise", "batch_size"])]:
        refused(run("train.py", flag, cwd=tmp_path, python=python), *words)
    if python:
        return  # the rest needs torch; test_train.py refuses such values under -O, too
    refused(train(tmp_path / "out", data, "--batch_size=0"), "batch_size=0")
    refused(train(tmp_path / "out", data, "--n_embd=33"), "n_embd=33", "n_head=2")
    said = ok(train(tmp_path / "out", data, "--learning_rate=1", "--compile", "--compile=False", "--wandb_run_name=a=b", "--max_iters=1"))
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["settings"]
    assert settings["learning_rate"] == 1.0 and settings["wandb_run_name"] == "a=b" and "max_iters=1 is reached" in said


class Evil:
    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def test_27_nothing_in_a_malicious_pickle_runs(tmp_path, data, trained):
    import pickle
    marker = tmp_path / "it_ran"
    out, folder = tmp_path / "out", make_data(tmp_path / "evil_data")
    out.mkdir()
    torch.save({"model": Evil(marker), "model_args": {}}, out / "ckpt_00000001.pt")
    torch.save({"model": Evil(marker), "model_args": {}}, out / "best.pt", _use_new_zipfile_serialization=False)
    last_line(train(out, data, "--init_from=resume"), str(out))
    last_line(train(tmp_path / "new", data, f"--init_from={out / 'best.pt'}"), "best.pt")
    last_line(run("sample.py", f"--out_dir={out}", cwd=tmp_path), "best.pt")
    for name in ("tokenizer.json", "meta.json"):
        kept = (folder / name).read_bytes()
        (folder / name).write_bytes(pickle.dumps(Evil(marker)))
        last_line(train(tmp_path / "new", folder), name)
        (folder / name).write_bytes(kept)
    (folder / "meta.json").unlink()
    (folder / "meta.pkl").write_bytes(pickle.dumps(Evil(marker)))
    refused(train(tmp_path / "new", folder), "meta.pkl")
    (folder / "meta.pkl").unlink()
    np.save(folder / "train.npy", np.array([Evil(marker)], dtype=object), allow_pickle=True)
    (folder / "train.bin").unlink()
    last_line(train(tmp_path / "new", folder), "train.npy")
    assert not marker.exists()


SECRET = "s3cret" * 7  # as long as a key


@pytest.mark.parametrize("fault, module", [("no_module=wandb", "wandb"), pytest.param("no_module=torch.utils.tensorboard", "tensorboard", marks=slow)])
def test_28_without_a_logging_package_it_says_so_and_trains(tmp_path, data, fault, module):
    process = faulty(fault, data, tmp_path / "out", f"--{module}_log")
    said = ok(process)
    assert f"{module}_log is off" in process.stderr and "max_iters=20 is reached" in said and len(process.stderr.splitlines()) == 1


@pytest.mark.parametrize("key", ["", pytest.param(SECRET[:40], marks=slow)])
def test_28_wandb_without_a_key_or_a_network_is_off_and_the_run_goes_on(tmp_path, data, key):
    pytest.importorskip("wandb")
    environment = {"WANDB_BASE_URL": "http://127.0.0.1:9", "HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc"), "MY_TOKEN": SECRET}
    with started("train.py", *flags(data, tmp_path / "out", "--wandb_log"), cwd=tmp_path, WANDB_API_KEY=key, **environment) as process:
        assert process.wait(120) == 0
        said = printed(process)
    assert 0 < said.find("wandb_log is off") < said.find("iter  1/20") and "max_iters=20 is reached" in said and "Traceback" not in said
    written = [p for p in (tmp_path / "out").rglob("*") if p.is_file()]
    assert len(losses(tmp_path / "out")) == 20 and not any(SECRET[:40].encode() in p.read_bytes() for p in written)


# ---------------------------------------------------------------------------------------------------------------
# beyond the 28: what the same machinery promises


def test_out_of_memory_names_what_helps_in_order(tmp_path, data):
    process = faulty("no_memory=100", data, tmp_path / "out", "--batch_size=4096")
    last_line(process, "out of memory with batch_size=4096", "--batch_size=2048 --gradient_accumulation_steps=4, then --gradient_checkpointing", "block_size below 16", "n_layer below 2")


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, data):
    """The first write is held until training is 5 iterations further; a loop that waits for it would never get there."""
    out = tmp_path / "out"
    said = ok(faulty("held_write=5", data, out, "--checkpoint_interval=10", "--eval_interval=100"))
    seconds, iterations = re.search(r"ckpt_00000010.pt was held for (\S+) s and (\d+) iterations", said).groups()
    assert int(iterations) >= 5 and float(seconds) < 20
    assert len(checkpoint.steps(out)) == 2 and "ckpt_00000020.pt" in said.splitlines()[-1]
    assert torch.load(out / "ckpt_00000010.pt", weights_only=True)["iter_num"] == 10


def test_before_a_write_was_measured_its_time_is_estimated_from_its_size():
    """max_hours leaves room for the last write, which may be the first."""
    writer = checkpoint.Writer()
    writer.prepare({"model": {"w": torch.zeros(10**6)}, "optimizer": {}})
    writer.wait()
    assert writer.seconds == pytest.approx(0.12)  # 4 MB, and twice as much for AdamW, at 100 MB/s


def test_an_earlier_run_is_set_aside_behind_all_others(tmp_path):
    for name in "before_2", "before_10", "before_it":  # before_1 was deleted
        (tmp_path / name).mkdir()
    for n in 11, 12:
        (tmp_path / "metrics.jsonl").write_text(str(n))
        checkpoint.set_aside(tmp_path)
        assert (tmp_path / f"before_{n}" / "metrics.jsonl").read_text() == str(n)
    checkpoint.set_aside(tmp_path)
    assert files(tmp_path) == ["before_10", "before_11", "before_12", "before_2", "before_it"]


@slow
def test_under_torchrun_a_warning_is_printed_once(tmp_path):
    """For data without a meta.json, for a damaged checkpoint and for a compiler that is not there."""
    data, out = make_data(tmp_path / "data"), tmp_path / "out"
    (data / "meta.json").unlink()
    said = train(out, data, "--tie_weights")
    assert said.returncode == 0 and said.stderr.count("has no meta.json") == 1
    spoil(out / "ckpt_00000020.pt", "half")
    process = torchrun(2, "--init_from=resume", f"--out_dir={out}", "--max_iters=12", "--compile", cwd=tmp_path, CXX="/nowhere/c++",
                       TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))
    ok(process)
    assert [process.stderr.count(word) for word in ("has no meta.json", "is not a sound checkpoint", "torch.compile failed")] == [1, 1, 1]


@slow
def test_a_checkpoint_is_of_its_own_moment_though_training_goes_on(tmp_path, data):
    out = tmp_path / "out"
    ok(faulty("slow_write=1.5", data, out, "--checkpoint_interval=10", "--eval_interval=100"))
    ok(train(tmp_path / "plain", data, "--checkpoint_interval=10", "--eval_interval=100"))
    assert all(same_run(a, b) for a, b in zip(checkpoint.steps(out), checkpoint.steps(tmp_path / "plain")))  # of their own moment


@slow
def test_deterministic_is_accepted_and_the_same_run_on_a_cpu(tmp_path, data, two_checkpoints):
    ok(train(tmp_path / "out", data, "--deterministic"))
    assert same_run(tmp_path / "out" / "ckpt_00000020.pt", two_checkpoints / "ckpt_00000020.pt")
