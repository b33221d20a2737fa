"""What makes a run survive: checkpoints that are whole or not there, found newest first, kept and locked.

A checkpoint is a plain dict of tensors, numbers, strings, lists and dicts. ckpt_<iteration>.pt are a run's steps,
best.pt is the one with the lowest validation loss.
"""
import json
import os
import sys
import zipfile
from dataclasses import asdict
from pathlib import Path

import torch

from model import GPT, GPTConfig


def write(state, path):
    """Write `state` to `path`, so that at any moment `path` is absent, the old file or the whole new one.

    Raises OSError (a full disk, for one) with the temporary file removed and the old one untouched.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())  # on disk before the name says so
        os.replace(temporary, path)
        sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch's zip writer reports a failing write as a RuntimeError
        temporary.unlink(missing_ok=True)
        reason = error.strerror if isinstance(error, OSError) else str(error).splitlines()[0]
        raise OSError(f"could not write {path}: {reason}; free some space or name another --out_dir") from error


def sync_folder(folder):
    """Make a rename in `folder` survive a power cut; a no-op where folders cannot be opened (Windows)."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_DIRECTORY)
        os.fsync(descriptor)
        os.close(descriptor)


def read(path):
    """Return the checkpoint dict at `path`, its tensors on the CPU. Nothing in the file is executed.

    Raises ValueError that names the file when it is not a whole, sound checkpoint; FileNotFoundError when absent.
    """
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
        raise ValueError(f"{path} is not a sound checkpoint: {str(error).splitlines()[0] if str(error) else error!r}") from None


def write_json(value, path):
    """Write JSON as `write` writes checkpoints: whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


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
            print(f"warning: {error}; trying the one before", file=sys.stderr)
    if steps(out_dir):
        raise ValueError(f"no checkpoint in {out_dir} is sound; --init_from={out_dir}/best.pt starts from the best weights, "
                         "another --out_dir from scratch")
    return None


def save_step(out_dir, state, keep):
    """Write ckpt_<iter_num>.pt and remove all but the `keep` newest; returns the path."""
    path = Path(out_dir) / f"ckpt_{state['iter_num']:08d}.pt"
    write(state, path)
    for old in steps(out_dir)[keep:]:
        old.unlink()
    return path


def save_best(out_dir, state):
    """Make `state` out_dir/best.pt; a step of the same iteration lends it its bytes."""
    best, step = Path(out_dir) / "best.pt", Path(out_dir) / f"ckpt_{state['iter_num']:08d}.pt"
    if not step.exists():
        return write(state, best)
    link = best.with_name("best.pt.tmp")
    link.unlink(missing_ok=True)
    try:
        os.link(step, link)
    except OSError:  # a file system without hard links
        write(state, best)
    else:
        os.replace(link, best)
        sync_folder(out_dir)


def lock(out_dir):
    """Claim out_dir for this process until it ends, however it ends; returns what must be kept alive.

    Makes the folder. Raises ValueError if another live process has it, OSError if it cannot be written.
    """
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    file = open(out_dir / ".lock", "a+")
    try:
        import fcntl  # the kernel drops such a lock with the process, so a kill -9 leaves nothing behind
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        print("note: this system has no flock; see to it that no second run writes the same out_dir", file=sys.stderr)
    except BlockingIOError:
        file.seek(0)
        raise ValueError(f"{out_dir} is in use by another run ({file.read().strip()}); name another --out_dir") from None
    file.truncate(0)
    file.write(f"process {os.getpid()}")
    file.flush()
    for stale in out_dir.glob("*.pt.tmp"):  # of a run that was killed while writing; no one else can be writing now
        stale.unlink()
    return file


def set_aside(out_dir):
    """Move an earlier run's files, if there are any, into a folder of their own inside out_dir, and say so."""
    out_dir = Path(out_dir)
    files = [p for p in (*steps(out_dir), *(out_dir / n for n in ("best.pt", "config.json", "metrics.jsonl"))) if p.exists()]
    if not files:
        return
    folder = out_dir / f"before_{1 + len(list(out_dir.glob('before_*')))}"
    folder.mkdir()
    for path in files:
        path.rename(folder / path.name)
    print(f"moved the earlier run in {out_dir} to {folder}")


def check_architecture(path, state, config):
    """Raise ValueError that names what differs between the checkpoint's GPTConfig and `config`; dropout may."""
    theirs, ours = asdict(GPTConfig(**state["model_args"])), asdict(config)
    differ = [f"{k}={theirs[k]!r} there, {ours[k]!r} here" for k in ours if k != "dropout" and theirs[k] != ours[k]]
    if differ:
        raise ValueError(f"{path} has another architecture: {'; '.join(differ)}; drop the flag, or start from scratch")


def load_model(path_or_out_dir, device="cpu"):
    """Return (GPT in eval mode on `device`, checkpoint dict) from a file, or a run's best.pt, else its newest.

    Raises ValueError or FileNotFoundError that names what is missing or broken.
    """
    path = Path(path_or_out_dir)
    if path.is_dir():
        best = path / "best.pt"
        state = read(best) if best.exists() else (newest_sound(path) or (None, None))[1]
        if state is None:
            raise FileNotFoundError(f"there is no checkpoint in {path}; train one, or name another --out_dir")
    else:
        state = read(path)
    model = GPT(GPTConfig(**state["model_args"]))
    model.load_state_dict(state["model"])
    return model.to(device).eval(), state
