"""Run train.py as it is, with one fault in what surrounds it: python tests/faulty.py FAULT train.py's-flags.

nan_gradient=7        the gradient of iteration 7 holds a NaN
nan_gradient=7,1      ... on rank 1 alone, before the ranks' gradients meet
slow_step=0.2         an iteration takes as many seconds longer
slow_write=2          so does a checkpoint
slow_setup=3          so does the set-up
slow_eval=0.2         so does each batch of an evaluation
held_write=5          the first checkpoint's write goes on until training is as many iterations further, or for 20 s
no_module=wandb       a package that is not installed
no_memory=300         so many MB of address space beyond what the set-up takes
peak_memory           none: prints the largest resident memory in MB at the end
count_bytes           none: each rank prints at the end how many bytes of parameters and optimizer state it holds
file_limit=200000     no file grows beyond as many bytes: what a full disk does, where no small disk can be mounted
"""
import atexit
import os
import resource
import runpy
import signal
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
fault, _, value = sys.argv[1].partition("=")
sys.argv = [str(ROOT / "train.py"), *sys.argv[2:]]

import checkpoint
import machine
import model
import optim

calls = [0]
if fault == "nan_gradient":
    iteration, rank = (*map(int, value.split(",")), None)[:2]

    def forward(self, idx, targets=None, **options):
        logits, loss = plain_forward(self, idx, targets, **options)
        if self.training and targets is not None:
            calls[0] += 1
            if calls[0] == iteration and rank in (None, int(os.environ.get("RANK", 0))):
                loss.register_hook(lambda gradient: gradient * float("nan"))
        return logits, loss

    plain_forward, model.GPT.forward = model.GPT.forward, forward
elif fault == "slow_step":
    plain_push = machine.LateFlags.push
    machine.LateFlags.push = lambda *a, **k: (time.sleep(float(value)), plain_push(*a, **k))[1]
elif fault == "slow_write":
    print("clock", time.monotonic())
    plain_write = checkpoint.write
    checkpoint.write = lambda *a: (time.sleep(float(value)), plain_write(*a))[1]
elif fault == "held_write":
    plain_push, plain_write = machine.LateFlags.push, checkpoint.write

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
elif fault == "slow_eval":
    def forward(self, *args, **options):
        if not self.training and options.get("reduction") == "sum":
            calls[0] += 1
            if calls[0] == 2:  # the evaluation is under way
                sys.stdout.write("evaluating\n")
                sys.stdout.flush()
            time.sleep(float(value))
        return plain_forward(self, *args, **options)

    plain_forward, model.GPT.forward = model.GPT.forward, forward
elif fault == "slow_setup":
    plain_check = model.check_causality
    model.check_causality = lambda config: (print("setting up", flush=True), time.sleep(float(value)), plain_check(config))
elif fault == "no_module":
    sys.modules[value] = None
elif fault == "no_memory":
    plain_init = machine.LateFlags.__init__

    def init(self, *args):
        plain_init(self, *args)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + int(value) * 2**20,) * 2)

    machine.LateFlags.__init__ = init
elif fault == "peak_memory":
    atexit.register(lambda: print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))
elif fault == "count_bytes":
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
elif fault == "file_limit":
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(value),) * 2)
else:
    sys.exit(f"no fault is called {fault!r}")
runpy.run_path(sys.argv[0], run_name="__main__")
