"""What only an NVIDIA GPU can show: `make gpu`, or `python -m pytest -m gpu tests/test_gpu.py` with the packages of the machine.

Real processes of train.py on tiny data; the sizes are those that take CUDA's own paths (heads of 64 for flash attention, more
than 3,072 tokens at once for the sorted gradient of an embedding). Memory and speed are those of the default, 124M in blocks
and embedding.
"""
import math
import re
import shutil
import signal

import pytest
import torch
from conftest import ROOT, equal, losses, make_data, metrics, ok, run, same_run, torchrun
from test_faults import ENDLESS, finite, flags, last_line, newest, printed, started, wait_for

import checkpoint
from machine import memory
from model import GPT, GPTConfig

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA here")]
GPU = ["--device=cuda", "--block_size=64", "--n_embd=128", "--batch_size=64"]
EXACT = [*GPU, "--dtype=bfloat16", "--deterministic", "--dropout=0.1"]


def on_gpu(out, data, *more, faults="", **kwargs):
    """A run of 20 iterations in bfloat16, not compiled, unless `more` says otherwise."""
    script = ["tests/faulty.py", faults] if faults else ["train.py"]
    return run(*script, *flags(data, out, *GPU, "--dtype=bfloat16", *more), cwd=out.parent, timeout=300, **kwargs)


def resumed(out, *more):
    return ok(run("train.py", "--init_from=resume", f"--out_dir={out}", *more, cwd=out.parent))


def same_ends(a, b):
    """The newest checkpoints of two runs, equal to the last bit, but for what evaluations on the way left."""
    a, b = (checkpoint.read(checkpoint.steps(out)[0]) for out in (a, b))
    return all(equal(a[k], b[k]) for k in ("model", "optimizer", "scaler", "iter_num", "cursor", "tokens"))


@pytest.fixture(scope="module")
def straight(tmp_path_factory, data):
    """20 iterations of EXACT without a break."""
    out = tmp_path_factory.mktemp("straight") / "out"
    ok(on_gpu(out, data, *EXACT))
    return out


# ---------------------------------------------------------------------------------------------------------------
# repeatable


def test_deterministic_means_the_same_run_twice(tmp_path, data, straight):
    ok(on_gpu(tmp_path / "out", data, *EXACT))
    assert same_run(tmp_path / "out" / "ckpt_00000020.pt", straight / "ckpt_00000020.pt") and losses(tmp_path / "out") == losses(straight)


def test_a_resume_is_bit_exact_in_bfloat16(tmp_path, data, straight):
    out = tmp_path / "out"
    ok(on_gpu(out, data, *EXACT, "--max_iters=13", "--lr_decay_iters=20"))
    assert "at iteration 13" in resumed(out, "--max_iters=20")
    assert same_ends(out, straight) and losses(out) == losses(straight) and len(losses(out)) == 20


def test_float16_halves_its_scale_until_it_fits_and_a_resume_goes_on_with_that(tmp_path, data):
    """A scale of 2^30 makes the first gradients infinite: they are left out. The scale travels in the checkpoint."""
    straight, out, more = tmp_path / "straight", tmp_path / "out", [*EXACT, "--dtype=float16"]
    said = ok(on_gpu(straight, data, *more, faults="loss_scale=30"))
    skipped = [int(n) for n in re.findall(r"skipped.*not finite \((\d+) in a row\)", said)]
    state = checkpoint.read(straight / "ckpt_00000020.pt")
    assert skipped and skipped[0] == 1 and state["scaler"]["scale"] == 2.0 ** (30 - len(skipped))
    assert len(skipped) < 13 and finite(straight / "ckpt_00000020.pt")
    curve = losses(straight)
    assert all(map(math.isfinite, curve.values())) and curve[20] < curve[1] - 0.1
    ok(on_gpu(out, data, *more, "--max_iters=13", "--lr_decay_iters=20", faults="loss_scale=30"))
    resumed(out, "--max_iters=20")
    assert same_ends(out, straight) and losses(out) == curve


def test_gradient_checkpointing_draws_the_same_dropout_twice(tmp_path, data, straight):
    ok(on_gpu(tmp_path / "out", data, *EXACT, "--gradient_checkpointing"))
    a, b = losses(tmp_path / "out"), losses(straight)
    assert a[1] == b[1] and all(abs(a[i] - b[i]) < 1e-3 for i in b), (a, b)


def test_sigterm_saves_and_the_resume_is_exact(tmp_path, data):
    out, straight, more = tmp_path / "out", tmp_path / "straight", [*EXACT, *ENDLESS]
    with started("tests/faulty.py", "slow_step=0.1", *flags(data, out, *more), cwd=tmp_path) as process:
        wait_for(process, r"\niter +5/", seconds=120)
        process.terminate()
        assert process.wait(30) == 128 + signal.SIGTERM, printed(process)
        assert "stopped by SIGTERM" in printed(process).splitlines()[-1]
    done = newest(out)
    assert done == max(losses(out)) and done >= 5
    resumed(out, f"--max_iters={done + 5}")
    ok(on_gpu(straight, data, *more, f"--max_iters={done + 5}"))
    assert same_ends(out, straight) and losses(out) == losses(straight)


def test_a_checkpoint_of_a_gpu_goes_on_on_a_cpu(tmp_path, straight):
    """Without dropout, which another device draws differently: the loss stays where it was, and ends below that."""
    out = tmp_path / "out"
    shutil.copytree(straight, out)
    resumed(out, "--device=cpu", "--dtype=float32", "--dropout=0", "--max_iters=25", "--deterministic=False")
    curve = losses(out)
    assert sorted(curve) == list(range(1, 26)) and all(curve[i] < curve[20] + 0.2 for i in range(21, 26)), curve


# ---------------------------------------------------------------------------------------------------------------
# compiled


def test_compile_is_on_and_gives_the_curve_of_eager_and_the_same_run_twice(tmp_path, data):
    more = [*EXACT, "--dropout=0"]
    ok(on_gpu(tmp_path / "eager", data, *more))
    for name in "once", "twice":
        process = on_gpu(tmp_path / name, data, *more, "--compile=auto")
        assert "compile    on" in ok(process) and "torch.compile failed" not in process.stderr, process.stderr
    eager, compiled = losses(tmp_path / "eager"), losses(tmp_path / "once")
    assert abs(eager[1] - compiled[1]) < 1e-3 and all(abs(eager[i] - compiled[i]) < 0.05 for i in eager), (eager, compiled)
    assert eager[20] < eager[1] - 0.1
    assert same_run(*(tmp_path / name / "ckpt_00000020.pt" for name in ("once", "twice")))


# ---------------------------------------------------------------------------------------------------------------
# numbers that are not finite, and what the host waits for


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_nan_gradient_ends_the_run_with_the_weights_untouched(tmp_path, data, optimizer):
    out, more = tmp_path / "out", ["--gradient_accumulation_steps=1", f"--optimizer={optimizer}", "--checkpoint_interval=5"]
    process = on_gpu(out, data, *more, faults="nan_gradient=7")
    last_line(process, "not finite at iteration 7,", "weights were left alone", "ckpt_00000005.pt", "--init_from=resume")
    assert newest(out) == 5 and all(finite(path) for path in out.glob("*.pt"))


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_nan_gradient_is_skipped_where_chosen_and_changes_nothing(tmp_path, data, optimizer):
    out, more = tmp_path / "out", ["--gradient_accumulation_steps=1", f"--optimizer={optimizer}", "--skip_nonfinite=1"]
    said = ok(on_gpu(out, data, *more, "--checkpoint_interval=1", "--keep_checkpoints=20", faults="nan_gradient=7"))
    assert re.findall(r"iter +(\d+)/20 +skipped.*not finite \((\d) in a row\)", said) == [("7", "1")]
    before, after = (checkpoint.read(out / f"ckpt_0000000{i}.pt") for i in (6, 7))
    assert equal(before["model"], after["model"]) and equal(before["optimizer"], after["optimizer"])
    assert all(finite(path) for path in checkpoint.steps(out))
    assert [m["iter"] for m in metrics(out) if m.get("grad_norm", 0) is None] == [7]


@pytest.mark.parametrize("more", [["--dropout=0.1"], ["--optimizer=adamw", "--dtype=float16", "--grad_clip=0"],
                                  ["--gradient_checkpointing", "--loss_chunk=1000"], ["--compile=auto"]])
def test_the_host_does_not_wait_for_the_gpu_within_an_update(tmp_path, data, more):
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchronizing"):  # what faulty.py counts on
            torch.ones(1, device="cuda").item()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    ok(on_gpu(tmp_path / "out", data, "--log_interval=10", "--eval_interval=20", *more, faults="no_wait"))


# ---------------------------------------------------------------------------------------------------------------
# ranks


def test_torchrun_with_one_rank_is_the_plain_run(tmp_path, data, straight):
    ok(torchrun(1, *flags(data, tmp_path / "out", *EXACT), cwd=tmp_path))
    assert same_run(tmp_path / "out" / "ckpt_00000020.pt", straight / "ckpt_00000020.pt")


ONE_RUN = [*GPU, "--dtype=float32", "--deterministic", "--gradient_accumulation_steps=4"]


@pytest.fixture(scope="module")
def one(tmp_path_factory, data):
    """20 iterations of ONE_RUN by one process."""
    out = tmp_path_factory.mktemp("one") / "out"
    ok(on_gpu(out, data, *ONE_RUN))
    return out


def follows(out, one):
    a, b = losses(out), losses(one)
    assert a.keys() == b.keys() and abs(a[1] - b[1]) < 1e-5 and all(abs(a[i] - b[i]) < 5e-3 for i in a), (a, b)
    assert newest(out) == 20 and finite(checkpoint.steps(out)[0])


def test_two_ranks_that_share_one_gpu_through_gloo_follow_one_process(tmp_path, data, one):
    ok(torchrun(2, *flags(data, tmp_path / "out", *ONE_RUN, "--device=cuda:0", "--backend=gloo"), cwd=tmp_path, timeout=300))
    follows(tmp_path / "out", one)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL wants a GPU for each rank")
@pytest.mark.parametrize("more", [[], ["--fsdp"], ["--fsdp", "--optimizer=adamw", "--compile=auto"]])
def test_two_gpus_follow_one_process_through_nccl(tmp_path, data, one, more):
    if "--optimizer=adamw" in more:
        one = tmp_path / "one"
        ok(on_gpu(one, data, *ONE_RUN, "--optimizer=adamw"))
    ok(torchrun(2, *flags(data, tmp_path / "out", *ONE_RUN, *more), cwd=tmp_path, timeout=300))
    follows(tmp_path / "out", one)
    resumed(tmp_path / "out", "--fsdp=False", "--max_iters=25")  # by one process


# ---------------------------------------------------------------------------------------------------------------
# memory and speed of the default


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Random text in GPT-2's vocabulary."""
    return make_data(tmp_path_factory.mktemp("large") / "data", tokens=200_000, vocab_size=50257, val_tokens=2000)


def dry_run(data, cwd, *more):
    """What the default's two training steps with batch_size=8 in bfloat16 took, and GiB at the peak, measured and estimated."""
    said = ok(run("train.py", f"--dataset={data}", "--dry_run", "--device=cuda", "--dtype=bfloat16", "--batch_size=8",
                  "--compile=False", *more, cwd=cwd, timeout=300))
    gib = [float(re.search(pattern, said).group(1)) for pattern in (r"([\d.]+) GiB at the peak", r"total ([\d.]+) GiB a rank")]
    return said[said.index("dry run"):], *gib


LESS = ["--gradient_checkpointing", "--loss_chunk=2048"]


@pytest.mark.parametrize("more", [[], LESS[:1], LESS[1:]])
def test_the_memory_estimate_is_within_15_percent(tmp_path, large, more, capsys):
    said, measured, estimated = dry_run(large, tmp_path, *more)
    with capsys.disabled():
        print(f"\n{' '.join(more)}\n{said}")
    assert measured == pytest.approx(estimated, rel=0.15)


def test_three_times_the_micro_batch_fits_the_same_memory(tmp_path, large):
    assert dry_run(large, tmp_path, *LESS, "--batch_size=24")[1] < dry_run(large, tmp_path)[1]


def test_out_of_memory_is_one_line_that_names_what_helps(tmp_path, large):
    """The logits of 4096 * 1024 positions would take 400 GB; nothing before them is large."""
    process = run("train.py", f"--dataset={large}", f"--out_dir={tmp_path / 'out'}", "--device=cuda", "--compile=False",
                  "--batch_size=4096", "--n_layer=2", "--n_head=1", "--n_embd=64", cwd=tmp_path, timeout=300)
    last_line(process, "out of memory with batch_size=4096",
              "--batch_size=2048 --gradient_accumulation_steps=80, then --gradient_checkpointing")


def test_throughput_of_the_default(capsys):
    """Printed, for nobody knows what this GPU can do: tokens/s, the share of its peak, GiB."""
    with torch.device("meta"):
        model = GPT(GPTConfig())
    free = torch.cuda.mem_get_info()[0]
    batch_size = next((n for n in (64, 32, 16, 8, 4, 2) if memory(model, n, "muon", 2)["total"] < 0.85 * free), 1)
    process = run("bench.py", "--task=step", "--device=cuda", "--dtype=bfloat16", f"--batch_size={batch_size}", "--repeats=3",
                  cwd=ROOT, timeout=400)
    with capsys.disabled():
        print(f"\nbatch_size={batch_size}, compiled\n{ok(process)}{process.stderr}")
    assert "tokens/s" in process.stdout and "torch.compile failed" not in process.stderr
