"""Run train.py as it is, with faults in what surrounds it: python tests/faulty.py FAULT[+FAULT...] train.py's-flags.

nan_gradient=7        the gradient of iteration 7 holds a NaN
nan_gradient=7,1      ... on rank 1 alone, before the ranks' gradients meet
slow_step=0.2         an iteration takes as many seconds longer
slow_write=2          so does a checkpoint
slow_setup=3          so does the set-up
slow_eval=0.2         so does each batch of an evaluation
held_write=5          the first checkpoint's write goes on until training is as many iterations further, or for 20 s
no_module=wandb       a package that is not installed
no_memory=300         so many MB of address space beyond what the set-up takes
file_limit=200000     no file grows beyond as many bytes: what a full disk does, where no small disk can be mounted
loss_scale=30         float16's loss scaler begins at 2^30, and overflows until it has come down
half                  none: float16 and its loss scaler, on a CPU
late                  none: a CPU that calls itself CUDA, and whose copies to the host are there no sooner than waited for
peak_memory           none: prints the largest resident memory in MB at the end
count_bytes           none: each rank prints at the end how many bytes of parameters and optimizer state it holds
host_reads            none: prints for each iteration how often the host asked for a tensor's value, and so waited for the device
no_wait               none: an operation that makes the host wait for CUDA within an update is an error
"""
import atexit
import os
import resource
import runpy
import signal
import sys
import time
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import checkpoint
import machine
import model
import optim


def nan_gradient(value):
    plain_forward, calls = model.GPT.forward, [0]
    iteration, rank = (*map(int, value.split(",")), None)[:2]

    def forward(self, idx, targets=None, **options):
        logits, loss = plain_forward(self, idx, targets, **options)
        if self.training and targets is not None:
            calls[0] += 1
            if calls[0] == iteration and rank in (None, int(os.environ.get("RANK", 0))):
                loss.register_hook(lambda gradient: gradient * float("nan"))
        return logits, loss

    model.GPT.forward = forward


def slow_step(value):
    plain_push = machine.LateFlags.push
    machine.LateFlags.push = lambda *a, **k: (time.sleep(float(value)), plain_push(*a, **k))[1]


def slow_write(value):
    print("clock", time.monotonic())
    plain_write = checkpoint.write
    checkpoint.write = lambda *a: (time.sleep(float(value)), plain_write(*a))[1]


def slow_setup(value):
    plain_check = model.check_causality
    model.check_causality = lambda config: (print("setting up", flush=True), time.sleep(float(value)), plain_check(config))


def slow_eval(value):
    plain_forward, calls = model.GPT.forward, [0]

    def forward(self, *args, **options):
        if not self.training and options.get("reduction") == "sum":
            calls[0] += 1
            if calls[0] == 2:  # the evaluation is under way
                sys.stdout.write("evaluating\n")
                sys.stdout.flush()
            time.sleep(float(value))
        return plain_forward(self, *args, **options)

    model.GPT.forward = forward


def held_write(value):
    plain_push, plain_write, calls = machine.LateFlags.push, checkpoint.write, [0]

    def push(*args, **options):
        calls[0] += 1  # once an iteration, at its end
        return plain_push(*args, **options)

    def write(state, path):
        checkpoint.write, began, here = plain_write, time.monotonic(), calls[0]
        while calls[0] < here + int(value) and time.monotonic() < began + 20:
            time.sleep(0.01)
        sys.stdout.write(f"{path.name} was held for {time.monotonic() - began:.2f} s and {calls[0] - here} iterations\n")
        plain_write(state, path)

    machine.LateFlags.push, checkpoint.write = push, write


def no_module(value):
    sys.modules[value] = None


def no_memory(value):
    plain_init = machine.LateFlags.__init__

    def init(self, *args):
        plain_init(self, *args)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + int(value) * 2**20,) * 2)

    machine.LateFlags.__init__ = init


def file_limit(value):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(value),) * 2)


def loss_scale(value):
    torch.amp.GradScaler = partial(torch.amp.GradScaler, init_scale=2.0**int(value))


def half(_):
    plain_init = machine.Machine.__init__

    def init(self, *args):
        plain_init(self, *args)
        self.dtype = torch.float16

    machine.Machine.__init__ = init


def late(_):
    plain_init, plain_to, stream = machine.Machine.__init__, torch.Tensor.to, []  # stream: (what to copy, where to)

    def init(self, *args):
        plain_init(self, *args)
        self.type = "cuda"

    def to(self, *args, non_blocking=False, **options):
        if not non_blocking or args != ("cpu",):
            return plain_to(self, *args, **options)
        stream.append((self, torch.full_like(self, float("nan"))))  # what a host that does not wait would read
        return stream[-1][1]

    class Event:
        def record(self):
            self.behind = list(stream)

        def synchronize(self):
            for value, copy in self.behind:
                copy.copy_(value)

    machine.Machine.__init__, torch.Tensor.to, torch.cuda.Event = init, to, Event
    torch.Tensor.pin_memory = lambda self: self
    torch.cuda.get_device_name = lambda device: "CPU"
    torch.cuda.max_memory_allocated, torch.cuda.synchronize = lambda: 0, lambda: None


def peak_memory(_):
    atexit.register(lambda: print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))


def count_bytes(_):
    plain_configure = optim.configure_optimizers

    def count(model, optimizers):
        tensors = [*model.parameters(), *(v for o in optimizers for state in o.state.values() for v in state.values())]
        storages = {s.data_ptr(): s.nbytes() for s in (getattr(t, "_local_tensor", t).untyped_storage() for t in tensors)}
        print(f"rank {os.environ.get('RANK', 0)} holds {sum(storages.values())} bytes of {sum(p.numel() for p in model.parameters())} parameters")

    def configure(model, *args):
        optimizers = plain_configure(model, *args)
        atexit.register(count, model, optimizers)
        return optimizers

    optim.configure_optimizers = configure


class HostReads(TorchDispatchMode):
    """Counts what on CUDA waits for the device: item(), float(), bool(), int(), and operations that ask for values themselves."""
    asking = {"_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive"}
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket.__name__ in self.asking
        return function(*args, **kwargs or {})


def host_reads(_):
    plain_init, plain_push, plain_close, counter = machine.LateFlags.__init__, machine.LateFlags.push, machine.Machine.close, HostReads()

    def init(self, *args):
        plain_init(self, *args)
        counter.__enter__()  # from here on, the loop

    def report(what):
        print(f"host reads {counter.count} {what}", flush=True)
        counter.count = 0

    def push(self, iter_num, *args, **options):
        report(f"since the last push, before {iter_num}'s")  # the last iteration's log line, and this one's update
        return plain_push(self, iter_num, *args, **options)

    def close(self, *args):
        report("at the end")
        plain_close(self, *args)

    machine.LateFlags.__init__, machine.LateFlags.push, machine.Machine.close = init, push, close


def no_wait(_):
    plain_set, plain_push = optim.set_lr, machine.LateFlags.push

    def set_lr(*args):
        plain_set(*args)
        torch.cuda.set_sync_debug_mode("error")  # an update begins with its rate

    def push(*args, **options):
        flags = plain_push(*args, **options)
        torch.cuda.set_sync_debug_mode("default")
        return flags

    optim.set_lr, machine.LateFlags.push = set_lr, push


FAULTS = {f.__name__: f for f in (nan_gradient, slow_step, slow_write, slow_setup, slow_eval, held_write, no_module, no_memory, file_limit,
                                  loss_scale, half, late, peak_memory, count_bytes, host_reads, no_wait)}

if __name__ == "__main__":
    for fault in sys.argv[1].split("+"):
        name, _, value = fault.partition("=")
        if name not in FAULTS:
            sys.exit(f"no fault is called {name!r}")
        FAULTS[name](value)
    sys.argv = [str(ROOT / "train.py"), *sys.argv[2:]]
    runpy.run_path(sys.argv[0], run_name="__main__")
