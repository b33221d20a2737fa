"""From one process to many nodes: DDP and FSDP over gloo, in real torchrun processes."""
import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, TINY, equal, losses, ok, refused, run, same_run, torchrun, train
from test_faults import ENDLESS, flags, newest, own_error, printed, ranks_of, started, wait_for

import checkpoint
from machine import memory
from model import GPT, GPTConfig
from optim import configure_optimizers

slow = pytest.mark.slow


def close(a, b, most=1e-5):
    """Two runs whose losses, weights and optimizer state are as good as the same."""
    a_losses, b_losses = losses(a), losses(b)
    assert a_losses.keys() == b_losses.keys() and all(abs(a_losses[i] - b_losses[i]) < most for i in a_losses)
    a, b = (checkpoint.read(checkpoint.steps(out)[0]) for out in (a, b))
    assert a["model"].keys() == b["model"].keys() and a["optimizer"].keys() == b["optimizer"].keys()
    pairs = [(a["model"][n], b["model"][n]) for n in a["model"]]
    pairs += [(v, b["optimizer"][n][k]) for n, state in a["optimizer"].items() for k, v in state.items()]
    for x, y in pairs:
        assert type(x) is type(y) is torch.Tensor
        torch.testing.assert_close(x, y, rtol=0, atol=10 * most)


def counted(ranks, data, out, *more):
    """Train on so many ranks; the bytes of parameters and optimizer state that each holds at the end."""
    process = run("tests/faulty.py", "count_bytes", *flags(data, out, *more), cwd=out.parent,
                  python=("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"))
    held = re.findall(r"rank \d holds (\d+) bytes", ok(process))
    assert len(held) == ranks
    return [int(n) for n in held]


@pytest.mark.parametrize("optimizer", ["muon", pytest.param("adamw", marks=slow)])
def test_fsdp_is_ddp_in_half_the_memory(tmp_path, data, optimizer):
    more = [f"--optimizer={optimizer}", "--gradient_accumulation_steps=4"]
    ddp, fsdp = (counted(2, data, tmp_path / name, *more, f"--fsdp={name == 'fsdp'}") for name in ("ddp", "fsdp"))
    close(tmp_path / "ddp", tmp_path / "fsdp")
    assert len(losses(tmp_path / "fsdp")) == 20 and max(fsdp) < 0.6 * min(ddp), (ddp, fsdp)


@slow
def test_what_does_not_divide_evenly_is_sharded_too(tmp_path, data):
    """Three ranks, a width of 20, a tied head, grouped heads, dropout, samples; FSDP with checkpointing and a loss in pieces."""
    more = ["--gradient_accumulation_steps=6", "--mlp=swiglu", "--n_kv_head=1", "--tie_weights", "--bias", "--norm=layernorm",
            "--pos_emb=learned", "--dropout=0.1", "--sample_interval=10", "--batch_size=3", "--n_embd=20"]
    fsdp = ["--fsdp", "--gradient_checkpointing", "--loss_chunk=10"]
    said = [ok(torchrun(3, *flags(data, tmp_path / name, *more, *also), cwd=tmp_path)) for name, also in (("ddp", []), ("fsdp", fsdp))]
    close(tmp_path / "ddp", tmp_path / "fsdp")
    samples = [[line for line in text.splitlines() if not re.match(r"\w+ |  |.*_00000020", line)] for text in said]
    assert samples[0] == samples[1] and len(samples[0]) == 2


@slow
@pytest.mark.parametrize("more", [["--fsdp"], []])
def test_four_ranks_follow_one_process(tmp_path, data, more):
    ok(train(tmp_path / "one", data, "--gradient_accumulation_steps=4"))
    ok(torchrun(4, *flags(data, tmp_path / "four", "--gradient_accumulation_steps=4", *more), cwd=tmp_path))
    close(tmp_path / "one", tmp_path / "four")


@slow
def test_bfloat16_and_compile_go_with_fsdp(tmp_path, data):
    for name, more in ("ddp", []), ("fsdp", ["--fsdp", "--compile"]):
        process = torchrun(2, *flags(data, tmp_path / name, "--dtype=bfloat16", *more), cwd=tmp_path, timeout=300)
        ok(process)
        assert "torch.compile failed" not in process.stderr
    a, b = losses(tmp_path / "ddp"), losses(tmp_path / "fsdp")
    assert abs(a[1] - b[1]) < 1e-3 and abs(a[20] - b[20]) < 0.02


@slow
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_run_goes_on_in_any_arrangement_of_ranks(tmp_path, data, optimizer):
    more = [f"--optimizer={optimizer}", "--gradient_accumulation_steps=4", "--dropout=0.1", "--lr_decay_iters=20", "--init_from=auto"]
    ok(train(tmp_path / "straight", data, *more))
    for end, ranks, fsdp in (5, 1, False), (10, 2, False), (15, 2, True), (20, 1, False):
        words = flags(data, tmp_path / "parts", *more, f"--max_iters={end}", f"--fsdp={fsdp}")
        ok(torchrun(2, *words, cwd=tmp_path) if ranks == 2 else run("train.py", *words, cwd=tmp_path))
    close(tmp_path / "straight", tmp_path / "parts")


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@slow
def test_two_nodes_meet_at_a_rendezvous(tmp_path, data):
    """Two torchruns on the loopback address, one rank each: the run of one process, bit for bit."""
    ok(train(tmp_path / "one", data))
    node = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", "--rdzv_id=7",
            f"--rdzv_endpoint=127.0.0.1:{free_port()}", "--local_addr=127.0.0.1", str(ROOT / "train.py"), *flags(data, tmp_path / "two")]
    nodes = [subprocess.Popen(node, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for _ in range(2)]
    said = [n.communicate(timeout=120)[0] for n in nodes]
    assert [n.returncode for n in nodes] == [0, 0], said
    assert sorted("max_iters=20 is reached" in text for text in said) == [False, True]  # rank 0 speaks for both
    assert same_run(tmp_path / "one" / "ckpt_00000020.pt", tmp_path / "two" / "ckpt_00000020.pt")


@slow
@pytest.mark.parametrize("more", [[], ["--fsdp"]])
def test_after_a_killed_worker_an_elastic_job_ends_as_a_straight_one(tmp_path, data, more):
    end = ["--max_iters=200", "--eval_interval=1000", "--checkpoint_interval=5", "--init_from=auto", "--log_interval=5", *more]
    out = tmp_path / "out"
    fresh = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # or the new workers may read the addresses of the old ones
    with started("train.py", *flags(data, out, *end), cwd=tmp_path, ranks=2, launch=("--max-restarts=1",), **fresh) as process:
        wait_for(process, r"\niter +20/")
        os.kill(ranks_of(process.pid)[1], signal.SIGKILL)
        assert process.wait(120) == 0, printed(process)
        resumed = int(re.search(r"at iteration (\d+)", printed(process)).group(1))
    assert 15 <= resumed < 200 and newest(out) == 200
    ok(torchrun(2, *flags(data, tmp_path / "straight", *end), cwd=tmp_path))
    assert same_run(out / "ckpt_00000200.pt", tmp_path / "straight" / "ckpt_00000200.pt")


def test_fsdp_needs_ranks(tmp_path, data):
    refused(train(tmp_path / "out", data, "--fsdp"), "fsdp=True", "torchrun --nproc_per_node=2", "drop --fsdp")
    assert not (tmp_path / "out").exists()


@slow
def test_settings_that_ranks_cannot_have_end_in_one_line(tmp_path, data):
    for more, words in (["--gradient_accumulation_steps=3"], ["=3 micro-batches", "2 ranks; 2 or 4"]), (["--backend=nccl"], ["needs CUDA", "--backend=gloo"]):
        process = torchrun(2, *flags(data, tmp_path / "out", *more), cwd=tmp_path)
        assert process.returncode and all(word in own_error(process.stderr) for word in words)
    assert not (tmp_path / "out").exists()


@slow
def test_an_evaluation_and_a_dry_run_under_fsdp(tmp_path, data):
    """On two ranks that get different numbers of batches."""
    ok(train(tmp_path / "out", data))
    last = lambda text: [line for line in text.splitlines() if line.startswith("eval")]
    evaluate = ["--init_from=resume", f"--out_dir={tmp_path / 'out'}", "--eval_only", "--batch_size=7"]
    said = ok(run("train.py", *evaluate, cwd=tmp_path)), ok(torchrun(2, *evaluate, "--fsdp", cwd=tmp_path))
    assert last(said[0]) == last(said[1]) and len(last(said[0])) == 3
    assert re.search(r"memory     parameters .* total \d+\.\d+ GiB a rank", ok(torchrun(2, *flags(data, tmp_path / "dry", "--fsdp", "--dry_run"), cwd=tmp_path)))
    assert not (tmp_path / "dry").exists()


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_memory_estimate_counts_what_is_there(optimizer, tied):
    model = GPT(GPTConfig(block_size=16, vocab_size=64, n_layer=2, n_head=2, n_embd=32, mlp="swiglu", bias=True, tie_weights=tied))
    optimizers = configure_optimizers(model, optimizer, 1e-3)
    model(torch.zeros(1, 16, dtype=torch.long), torch.zeros(1, 16, dtype=torch.long))[1].backward()
    [o.step() for o in optimizers]
    parts = memory(model, 1, optimizer)
    assert parts["parameters"] == sum(p.nbytes for p in model.parameters())
    assert parts["gradients"] == sum(p.grad.nbytes for p in model.parameters())
    assert parts["optimizer"] == sum(v.nbytes for o in optimizers for s in o.state.values() for k, v in s.items() if k != "step")
    halves = memory(model, 1, optimizer, shards=2, micro_batches=2)
    assert [halves[k] * 2 for k in ("parameters", "gradients", "optimizer")] == [parts[k] for k in ("parameters", "gradients", "optimizer")]
    assert memory(model, 1, optimizer, shards=2, micro_batches=4)["gradients"] == parts["gradients"]  # summed up whole before they are dealt


def peak_of_a_step(model, batch_size, dtype):
    """Bytes between a step's begin and its peak, as torch's CPU allocator reports them; gradients are there already."""
    idx = torch.randint(4000, (batch_size, 128))

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
            _, nats = model(idx, idx, reduction="sum")
        nats.backward()
    step()  # leaves gradients, as there are when micro-batches accumulate
    with torch.profiler.profile(profile_memory=True) as profile:
        step()
    now, peak = 0, 0
    for event in sorted((e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    assert peak > 1e6
    return peak


@pytest.mark.parametrize("norm, most", [("layernorm", 0.05), ("rmsnorm", 0.25)])  # torch fuses RMSNorm on GPUs only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_memory_estimate_is_near_the_measured_peak(norm, most, dtype):
    """GPT-2's parts, and the default's."""
    ours = norm == "rmsnorm"
    model = GPT(GPTConfig(block_size=128, vocab_size=4000, n_layer=3, n_head=4, n_embd=128, norm=norm, qk_norm=ours, tie_weights=not ours,
                          pos_emb="rope" if ours else "learned", mlp="relu2" if ours else "gelu", bias=not ours))
    parts = memory(model, 8, "adamw", dtype.itemsize)
    assert parts["activations"] + parts["copies"] == pytest.approx(peak_of_a_step(model, 8, dtype), rel=most)


def test_the_two_switches_let_three_times_the_micro_batch_into_less_memory():
    """12 layers, as at 124M, which tests/test_gpu.py measures."""
    model = GPT(GPTConfig(block_size=128, vocab_size=4000, n_layer=12, n_head=4, n_embd=128))
    plain = peak_of_a_step(model, 8, torch.float32)
    model.gradient_checkpointing, model.loss_chunk = True, 256
    assert peak_of_a_step(model, 24, torch.float32) < plain
