"""What makes a run survive: checkpoints that are whole or not there, found newest first, and kept.

A checkpoint is a plain dict of tensors, numbers, strings, lists and dicts. ckpt_<iteration>.pt are a run's steps,
best.pt is the one with the lowest validation loss.
"""
import os
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from logging import getLogger
from pathlib import Path

import torch

from model import GPT, GPTConfig


def write(state, path):
    """Write `state` to `path`, so that at any moment `path` is absent, the old file or the whole new one.

    Raises OSError (a full disk, for one) with the temporary file removed and the old one untouched, and ValueError
    before anything is written where a weight is not finite.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    for name, weight in state["model"].items():
        if not (weight.sum().isfinite() or weight.isfinite().all()):  # a sum is quick, but can overflow by itself
            raise ValueError(f"{path} was not written: {name} is not finite; lower --learning_rate, then --init_from=resume")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())  # on disk before the name says so
        rename(temporary, path)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        cause = error
        while cause.__context__ and not isinstance(cause, OSError):  # torch's zip writer raises RuntimeErrors on top of it
            cause = cause.__context__
        reason = getattr(cause, "strerror", None) or str(error).splitlines()[0]
        raise OSError(f"could not write {path}: {reason}; free some space or name another --out_dir") from error


def rename(temporary, path):
    """Rename so that it survives a power cut, too."""
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_DIRECTORY)
    os.fsync(folder)
    os.close(folder)


def read(path):
    """Return the checkpoint dict at `path`, its tensors on the CPU. Nothing in the file is executed.
    Raises ValueError that names the file when it is not a whole, sound checkpoint; FileNotFoundError when absent."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # compares checksums, which torch.load does not
        if damaged is not None:
            raise ValueError(f"checksum of {damaged} does not match")
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or not {"model", "model_args"} <= set(state):
            raise ValueError("it holds no model")
        return state
    except Exception as error:  # whatever zipfile and torch raise for the ways in which bytes can be wrong
        raise ValueError(f"{path} is not a sound checkpoint: {(str(error) or repr(error)).splitlines()[0]}") from None


def steps(out_dir):
    """Paths of the run's checkpoints, newest first."""
    return sorted(Path(out_dir).glob("ckpt_" + "[0-9]" * 8 + ".pt"), reverse=True)


def newest_sound(out_dir):
    """Return (path, checkpoint) of the newest one that is whole, each rejected one named on stderr; None if
    there is none at all. Raises ValueError if there are some but none is sound: that is no fresh start."""
    for path in steps(out_dir):
        try:
            return path, read(path)
        except ValueError as error:
            getLogger("bareGPT").warning(f"warning: {error}; trying the one before")
    if steps(out_dir):
        raise ValueError(f"no checkpoint in {out_dir} is sound; --init_from={out_dir}/best.pt starts from the best "
                         "weights, another --out_dir from scratch")
    return None


def origin(init_from, out_dir):
    """What a run starts from: (path, checkpoint, whether it is a resume), or (None, None, False) for a new run.
    Raises ValueError where `init_from` names nothing that is there and sound."""
    if init_from not in ("scratch", "resume", "auto"):
        if not Path(init_from).is_file():
            raise ValueError(f"init_from={init_from!r} is neither 'scratch', 'resume', 'auto' nor a checkpoint file")
        return Path(init_from), read(init_from), False
    found = newest_sound(out_dir) if init_from != "scratch" else None
    if init_from == "resume" and not found:
        raise ValueError(f"out_dir={str(out_dir)!r} holds nothing to resume; --init_from=auto would start from scratch")
    return (*found, True) if found else (None, None, False)


def save(out_dir, state, keep, best=False):
    """Write ckpt_<iter_num>.pt, also as best.pt where it is the best; the `keep` newest stay. Returns the path."""
    path = Path(out_dir) / f"ckpt_{state['iter_num']:08d}.pt"
    write(state, path)
    damaged = [p for p in steps(out_dir) if p > path]  # ahead of the run, which resumed behind them
    for old in damaged + [p for p in steps(out_dir) if p <= path][keep:]:
        old.unlink()
    if best:
        link = path.with_name("best.pt.tmp")
        try:
            os.link(path, link)  # the same bytes under a second name
            rename(link, path.with_name("best.pt"))
        except OSError:  # a file system without hard links
            write(state, path.with_name("best.pt"))
    return path


class Writer:
    """Saves in a thread, from a copy, so that training does not wait for the disk; one checkpoint at a time.

    What goes wrong in the thread is raised by the next `wait` or `start`. A process that ends waits for its thread.
    """
    def __init__(self, last=None, main=True):  # main: of several ranks the one that writes
        self.last, self.seconds = last, 0.0  # the newest checkpoint that is on disk; how long the slowest took, or may take
        # One thread, also within torch: with a second team on the same cores, OpenMP's threads sleep between any
        # two operations of the training loop, which on a CPU took two fifths of the time.
        self.pool = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,))
        self.main, self.job, self.copies = main, None, {}

    def prepare(self, state, room=True):
        """Estimate a write, and make room for the copies in the thread: fresh memory takes longer than the copy itself."""
        self.job = self.job or (self.pool.submit(self.copy, state, {}) if room else None)
        n_bytes = 3 * sum(weight.nbytes for weight in state["model"].values())  # AdamW's state is as large as two models
        self.seconds = self.seconds or n_bytes / 100e6  # not measured yet: say 100 MB/s

    def start(self, out_dir, state, keep, best):
        """Save a copy of `state` as it is now; under FSDP all ranks must call it, for each has other rows."""
        self.wait()
        kept, self.copies = self.copies, {}
        state = self.copy(state, kept)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.job = self.pool.submit(self.save, out_dir, state, keep, best) if self.main else None

    def copy(self, value, kept):
        """`value` with its tensors on the CPU, in the room that `kept` has for them."""
        if isinstance(value, dict):
            return {k: self.copy(v, kept) for k, v in value.items()}
        if not isinstance(value, torch.Tensor):
            return value
        local = getattr(value, "to_local", lambda: value)()
        value = getattr(value, "full_tensor", lambda: value)()  # what FSDP has sharded is gathered, one tensor at a time
        key = local.data_ptr(), value.shape  # a matrix that two names share is copied, and written, once
        if self.main and key not in self.copies:
            room = kept[key] if key in kept else torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
            self.copies[key] = room.copy_(value, non_blocking=value.is_cuda)
        return self.copies.get(key)

    def save(self, *args):
        began = time.monotonic()
        self.last = save(*args)
        self.seconds = max(self.seconds, time.monotonic() - began)

    def busy(self):
        return self.job is not None and not self.job.done()

    def wait(self, block=True):
        """Return when nothing is being written (without `block`: at once), and raise what went wrong."""
        if self.job and (block or not self.busy()):
            job, self.job = self.job, None
            job.result()


def set_aside(out_dir):
    """Move an earlier run's files, if there are any, into a folder of their own inside out_dir, and say so."""
    out_dir = Path(out_dir)
    others = [out_dir / name for name in ("best.pt", "config.json", "metrics.jsonl")]
    files = steps(out_dir) + [p for p in others if p.exists()]
    if not files:
        return
    taken = [int(p.name[7:]) for p in out_dir.glob("before_*") if p.name[7:].isdecimal()]
    folder = out_dir / f"before_{max(taken, default=0) + 1}"
    folder.mkdir()
    for path in files:
        path.rename(folder / path.name)
    print(f"moved the earlier run in {out_dir} to {folder}")


def load_model(path_or_out_dir, device="cpu"):
    """Return (GPT in eval mode on `device`, checkpoint dict) from a file, or a run's best.pt, else its newest.
    Raises ValueError or FileNotFoundError that names what is missing or broken."""
    path = Path(path_or_out_dir)
    best = path / "best.pt"
    state = read(best) if best.exists() else origin("resume", path)[1] if path.is_dir() else read(path)
    model = GPT(GPTConfig(**state["model_args"]))
    model.load_state_dict(state["model"])
    return model.to(device).eval(), state
