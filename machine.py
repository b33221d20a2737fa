"""What a run stands on: device, dtype, ranks, signals, its folder, logs. Every script asks here what 'auto' means."""
import atexit
import ctypes
import fcntl
import json
import os
import platform
import re
import resource
import signal
import subprocess
import sys
import time
import warnings
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from logging import getLogger
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

# Dense bf16 operations a second by the data sheets; those of fp16 for the V100 and the T4, which have no bf16.
PEAK_FLOPS = {"B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "A100": 312e12,
              "L40S": 362e12, "L40": 181e12, "L4": 121e12, "A10G": 70e12, "A10": 125e12, "RTX 4090": 165e12,
              "RTX 3090": 71e12, "V100": 125e12, "T4": 65e12}


class Machine:
    """Device, dtype and compile with 'auto' resolved, the reasons, and this process's place among the ranks.

    Raises ValueError for a device, dtype or backend that is not to be had here.
    """
    def __init__(self, device="auto", dtype="auto", compile="auto", backend="auto", timeout_s=600, deterministic=False,
                 fsdp=False):
        cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
        self.rank, self.world_size, local_rank = (int(os.environ.get(name, default)) for name, default in
                                                  (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))  # torchrun's
        why = dict.fromkeys(("device", "dtype", "compile"), "as set")
        if device == "auto":
            device, why["device"] = "cuda" if cuda else "mps" if mps else "cpu", "the first there is of CUDA, MPS, CPU"
        self.type, _, index = str(device).partition(":")
        there = {"cuda": torch.cuda.device_count(), "mps": int(mps), "cpu": 1}.get(self.type, 0)  # how many
        if not (index or "0").isdecimal() or int(index or 0) >= there:
            raise ValueError(f"device={device!r} is not here for torch {torch.__version__}; --device=auto takes the best")
        self.device = torch.device(f"cuda:{local_rank}" if device == "cuda" else device)
        if dtype == "auto":
            # An emulated bfloat16 is slower than float32, so only the real one counts.
            has_bf16 = self.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
            dtype = "bfloat16" if has_bf16 else "float16" if self.type == "cuda" else "float32"
            why["dtype"] = ("this GPU has it in hardware" if has_bf16 else "this GPU has no bfloat16" if self.type == "cuda"
                            else f"the safe one on {self.type}")
        if dtype not in ("float32", "bfloat16", "float16") or (dtype == "float16" and self.type != "cuda"):
            raise ValueError(f"dtype={dtype!r} does not go with device={device!r}; --dtype=auto takes the fastest safe one")
        self.dtype = getattr(torch, dtype)
        if compile not in ("auto", True, False):
            raise ValueError(f"compile={compile!r} is none of auto, true, false")
        if compile == "auto":
            compile, why["compile"] = self.type == "cuda", "on for CUDA; elsewhere --compile pays in longer runs"
        self.compile, self.why, self.fsdp, self.shards = compile, why, fsdp, self.world_size if fsdp else 1
        if fsdp and (self.world_size == 1 or self.type == "mps"):
            raise ValueError(f"fsdp=True needs torchrun --nproc_per_node=2 or more, on CUDA or CPUs; drop --fsdp")
        self.backend = ("nccl" if self.type == "cuda" else "gloo") if backend == "auto" else backend
        if self.type == "cuda":
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high")  # tf32 where autocast leaves a product in float32
        else:
            keep_freed_memory()
        if deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
            torch.use_deterministic_algorithms(True)
        if self.world_size > 1:
            if self.backend == "nccl" and self.type != "cuda":
                raise ValueError(f"backend='nccl' needs CUDA, and the device is {self.device}; --backend=gloo runs on any")
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated|FSDP2-wrapped module .* returned a view")
            dist.init_process_group(self.backend, timeout=timedelta(seconds=timeout_s),
                                    device_id=self.device if self.backend == "nccl" else None)

    def autocast(self):
        """Matrix products in `dtype`, sums in float32; nothing where dtype is float32."""
        return nullcontext() if self.dtype == torch.float32 else torch.autocast(self.type, self.dtype)

    def name(self):
        return torch.cuda.get_device_name(self.device) if self.type == "cuda" else self.type

    def describe(self):
        """What was chosen and why, a line each."""
        return [f"device     {self.name()} ({self.why['device']}), {self.world_size} rank{'s' * (self.world_size > 1)}",
                f"dtype      {str(self.dtype).removeprefix('torch.')} ({self.why['dtype']})",
                f"compile    {'on' if self.compile else 'off'} ({self.why['compile']})"]

    def peak_gib(self):
        """The most memory that this process has held so far, in GiB: the GPU's on CUDA, else resident memory."""
        if self.type == "cuda":
            return torch.cuda.max_memory_allocated() / 2**30
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB, on macOS bytes
        return used / (2**30 if platform.system() == "Darwin" else 2**20)

    def peak_flops(self):
        """Operations a second by the data sheet, of all ranks together; None for a device that is not in the table."""
        known = next((f for name, f in PEAK_FLOPS.items() if re.search(rf"\b{name}\b", self.name())), None)
        return known and known * self.world_size

    def sum(self, *numbers):
        """The numbers, each summed over the ranks."""
        if self.world_size == 1:
            return numbers
        total = torch.tensor(numbers, dtype=torch.float32 if self.type == "mps" else torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def to_device(self, tensor):
        """A CPU tensor's copy on the device; on CUDA the host does not wait for it."""
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.type == "cuda" else tensor.to(self.device)

    def place(self, model):
        """Put a model on the device; under FSDP2 every rank keeps its rows of each parameter there, and a block is
        gathered for as long as it is used, in `dtype`. Embedding and head stay in float32, as they do without FSDP."""
        if not self.fsdp:
            return model.to(self.device)
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
        mesh = dist.init_device_mesh(self.type, (self.world_size,))
        policy = MixedPrecisionPolicy(param_dtype=self.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for block in model.blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        return fully_shard(model, mesh=mesh)

    def parallel(self, model):
        """DDP's or FSDP's model: its gradients become the ranks' mean where set_requires_gradient_sync says so."""
        if self.world_size > 1 and not self.fsdp:
            model = DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
            model.set_requires_gradient_sync = lambda wanted: setattr(model, "require_backward_grad_sync", wanted)
        return model

    def synchronize(self):
        if self.type in ("cuda", "mps"):
            getattr(torch, self.type).synchronize()

    def try_compile(self, model, x, y):
        """torch.compile's version of the model if that is wanted and a training step through it works, else the model."""
        if not self.compile:
            return model
        try:
            compiled = model if self.fsdp else torch.compile(model)
            for block in model.blocks if self.fsdp else ():  # between two of them FSDP gathers and drops parameters
                block.forward = torch.compile(block.forward)
            with self.autocast():
                compiled(x, y, reduction="sum")[1].backward()
            return compiled
        except Exception as error:  # compilers fail in many ways, and none of them is a reason not to train
            for block in model.blocks:
                block.__dict__.pop("forward", None)
            getLogger("bareGPT").warning(f"warning: torch.compile failed ({first_line(error)}); going on without it")
            return model
        finally:
            model.zero_grad()

    def environment(self):
        """Versions and device, for config.json; nothing that could be a secret."""
        try:
            git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
            commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
        except OSError:  # no git on this machine
            commit = ""
        return {"commit": commit, "python": platform.python_version(), "torch": torch.__version__,
                "device": self.name(), "world_size": self.world_size}

    def close(self, status=0):
        """Leave the other ranks, and end the process with `status`."""
        if dist.is_initialized():
            dist.barrier()  # a rank that leaves early takes its connections with it
            dist.destroy_process_group()
            atexit._run_exitfuncs()  # wandb's, say
            sys.stdout.flush()
            os._exit(status)  # not through the interpreter's end, where a thread of gloo's now and then aborts the process
        sys.exit(status)


class LateFlags:
    """Two numbers, combined over the ranks (the maximum) and read by the host without a wait.

    On CUDA a flag is read one `push` late, when its iteration is long done; elsewhere at once.
    """
    def __init__(self, machine):
        self.machine, self.pending = machine, []

    def push(self, iter_num, streak, asked, wait):
        """Add an iteration's `streak`, (1,) float32 on the device, and what this rank is `asked` to stop for; return what
        can be read, with `wait` everything, as a list of (iteration, streak, asked)."""
        flags = torch.cat([streak, streak.new_full((1,), asked)])
        if self.machine.world_size > 1:
            dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        if self.machine.type != "cuda":
            return [(iter_num, *flags.tolist())]
        self.pending.append((iter_num, flags.to("cpu", non_blocking=True), torch.cuda.Event()))
        self.pending[-1][2].record()
        done, self.pending = (self.pending, []) if wait else (self.pending[:-1], self.pending[-1:])
        for _, _, copied in done:
            copied.synchronize()
        return [(iter_num, *flags.tolist()) for iter_num, flags, _ in done]


class StopSignals:
    """SIGTERM, Ctrl-C and max_hours as a number to look at between iterations; a second Ctrl-C ends the process at once."""
    def __init__(self, started, max_hours, writer):
        self.received, self.when, self.looked, self.slowest, self.writer = 0, 0.0, time.monotonic(), 0.0, writer
        self.ends = started + 3600 * max_hours if max_hours else float("inf")  # on the clock of time.monotonic
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.handle)

    def handle(self, number, frame):
        # torchrun passes a Ctrl-C on to ranks that may have had it (within a second it is the same), a second as SIGTERM.
        torchrun = "TORCHELASTIC_RUN_ID" in os.environ
        again = number == signal.SIGINT or torchrun and self.received == signal.SIGINT
        if self.received and again and not (torchrun and time.monotonic() - self.when < 1):
            os.write(2, b"\nended at once by a second Ctrl-C; --init_from=resume goes on from the newest checkpoint\n")
            os._exit(128 + number)
        if not self.received:
            self.received, self.when = int(number), time.monotonic()

    def look(self):
        """The signal that came; 1 where max_hours leaves no time for two more iterations and two writes; else 0."""
        self.slowest, self.looked = max(self.slowest, time.monotonic() - self.looked), time.monotonic()
        return self.received or int(self.looked + 2 * self.slowest + 2 * self.writer.seconds > self.ends)


def keep_freed_memory():
    """Make glibc keep freed memory for the next step, instead of fetching each large tensor page by page from the
    kernel: a fifth of the demo's time on a CPU. Other C libraries are left as they are."""
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL("libc.so.6")
    libc.mallopt(-4, 0)          # M_MMAP_MAX: no mapping of its own for a large tensor
    libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: give nothing back


@contextmanager
def explained(settings):
    """Turn what the hardware and the other ranks do to a run into a ValueError of one line that says what helps."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        s, text = settings, str(error)
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in text:  # the CPU's says so
            divisor = next((k for k in range(2, s["batch_size"] + 1) if s["batch_size"] % k == 0), 0)
            cheaper = [f"--batch_size={s['batch_size'] // divisor} --gradient_accumulation_steps="
                       f"{s['gradient_accumulation_steps'] * divisor}"] if divisor else []
            cheaper += ["--gradient_checkpointing"] if not s["gradient_checkpointing"] else []
            same = f"the same run in less: {', then '.join(cheaper)}; a smaller run: " if cheaper else ""
            raise ValueError(f"out of memory with batch_size={s['batch_size']} ({first_line(error)}); {same}a block_size "
                             f"below {s['block_size']}, an n_layer below {s['n_layer']}") from None
        if dist.is_initialized() and ("gloo" in text or isinstance(error, dist.DistError)):
            raise ValueError(f"lost another rank, which ended or did not answer for timeout_s={s['timeout_s']} "
                             f"({first_line(error)}); see its own message, then --init_from=resume") from None
        raise


def lock(out_dir):
    """Claim out_dir for this process until it ends, however it ends; returns what must be kept alive.

    Makes the folder. Raises ValueError if another live process has it, OSError if it cannot be written.
    """
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    file = open(out_dir / ".lock", "a+")
    try:  # the kernel drops such a lock with the process, so a kill -9 leaves nothing behind
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise ValueError(f"{out_dir} is in use by another run ({file.read().strip()}); name another --out_dir") from None
    file.truncate(0)
    file.write(f"process {os.getpid()}")
    file.flush()
    for stale in out_dir.glob("*.pt.tmp"):  # of a run that was killed while writing; no one else can be writing now
        stale.unlink()
    return file


class Log:
    """config.json, metrics.jsonl, and where wanted Weights & Biases and TensorBoard; the latter two never end a run."""
    def __init__(self, settings, environment, silent=False):
        self.others, self.file = [], None  # others: functions of (line, iteration)
        if silent:
            return
        config = Path(settings["out_dir"], "config.json")
        config.with_suffix(".tmp").write_text(json.dumps({"settings": settings, "environment": environment}, indent=1) + "\n")
        os.replace(config.with_suffix(".tmp"), config)  # whole or not at all
        self.path = config.with_name("metrics.jsonl")
        self.file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        for wanted, start in (("wandb_log", start_wandb), ("tensorboard_log", start_tensorboard)):
            try:
                if settings[wanted]:
                    self.others.append(start(settings))
            except Exception as error:  # not installed, no key, no network: each has an exception of its own
                getLogger("bareGPT").warning(f"warning: {wanted} is off: {first_line(error)}")

    def write(self, **line):
        """Append one JSON object; numbers that are not finite have no place in JSON and become null."""
        if self.file is None:
            return
        line = {k: None if isinstance(v, float) and not abs(v) < float("inf") else v for k, v in line.items()}
        try:
            os.write(self.file, (json.dumps(line) + "\n").encode())
        except OSError as error:
            raise OSError(f"could not write {self.path}: {error.strerror}; free space, then --init_from=resume") from None
        for other in list(self.others):
            try:
                other({k: v for k, v in line.items() if v is not None}, line["iter"])
            except Exception as error:
                getLogger("bareGPT").warning(f"warning: a log failed and is off from here on: {first_line(error)}")
                self.others.remove(other)


def start_wandb(s):
    import wandb
    run = wandb.init(project=s["wandb_project"], name=s["wandb_run_name"] or Path(s["out_dir"]).name, config=s,
                     dir=s["out_dir"], settings=wandb.Settings(init_timeout=15))
    return lambda line, step: run.log(line, step=step)


def start_tensorboard(s):
    from torch.utils.tensorboard import SummaryWriter  # pip install tensorboard
    writer = SummaryWriter(s["out_dir"])
    return lambda line, step: [writer.add_scalar(k, v, step) for k, v in line.items()]


def first_line(error):
    return (str(error).strip() or repr(error)).splitlines()[0]


def memory(model, batch_size, optimizer, matmul_bytes=4, shards=1, micro_batches=2):
    """{part: bytes} of a rank at the peak of a training step, and their 'total'; README.md explains the terms.
    matmul_bytes: of a number in matrix products. shards: FSDP's ranks, else 1; micro_batches of an iteration, over all
    ranks. A model of any size can be asked about that was built under torch.device("meta").
    """
    c, a, P, tokens = model.config, matmul_bytes, model.num_params(), batch_size * model.config.block_size
    hidden = sum(p.numel() for p in model.blocks.parameters() if p.dim() > 1)
    heads = (c.n_head + c.n_kv_head) * c.head_dim * (3 if c.qk_norm or c.pos_emb == "rope" else 2)
    layer = 8 * c.n_embd + a * (2 * c.n_embd + heads + c.n_ff * (4 if c.mlp == "swiglu" else 2))  # bytes a token
    layers = 4 * c.n_embd * c.n_layer + layer if model.gradient_checkpointing else layer * c.n_layer
    logits = (12 + a) * c.vocab_size * min(model.loss_chunk or tokens, tokens)
    cast = a if a < 4 else 0  # a byte count of autocast's copies, which float32 has none of
    blocks = cast * hidden if shards == 1 else 4 * (P - hidden) + (2 * a + 4) * hidden // c.n_layer
    parts = {"parameters": 4 * P // shards, "gradients": 4 * P // (shards if micro_batches <= shards else 1),
             "optimizer": (8 * P - 4 * hidden * (optimizer == "muon")) // shards,
             "activations": tokens * (layers + (4 + a) * c.n_embd) + logits,
             "copies": blocks + cast * c.vocab_size * c.n_embd}
    return parts | {"total": sum(parts.values())}


def duration(seconds):
    """Seconds for people: 59s, 12m34s, 5h06m, 3d04h."""
    m, s = divmod(round(seconds), 60)
    h, m = divmod(m, 60)
    d, h = divmod(h, 24)
    return f"{d}d{h:02d}h" if d else f"{h}h{m:02d}m" if h else f"{m}m{s:02d}s" if m else f"{s}s"
