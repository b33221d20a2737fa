"""What share of training is not the model: a run of train.py under cProfile, whose own cost makes the shares upper bounds.

    python tests/bench_overhead.py config/train_small.py --max_iters=100 --eval_iters=1
"""
import cProfile
import json
import pstats
import runpy
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PARTS = {  # the functions, as (file, name), whose time with all that they call belongs to a part
    "data": [("train.py", "get_batch"), ("machine.py", "to_device")],
    "schedule": [("optim.py", "lr_factor"), ("optim.py", "set_lr")],
    "clipping": [("clip_grad.py", "clip_grad_norm_")],
    "agreement on stopping": [("machine.py", "push"), ("checkpoint.py", "wait")],
    "logging": [("machine.py", "write"), ("machine.py", "sum"), ("model.py", "flops_per_token"), ("~", "<built-in method builtins.print>")],
    "the optimizer's step": [("optimizer.py", "wrapper")],
}


def main(arguments):
    sys.path.insert(0, str(ROOT))
    with tempfile.TemporaryDirectory() as out:
        sys.argv = [str(ROOT / "train.py"), *arguments, f"--out_dir={out}"]
        profile = cProfile.Profile()
        try:
            profile.runcall(runpy.run_path, sys.argv[0], run_name="__main__")
        except SystemExit as end:
            if end.code:
                raise
        lines = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    training = max(line["elapsed_s"] for line in lines)
    cumulative = {}
    for (path, _, name), (_, _, _, seconds, _) in pstats.Stats(profile).stats.items():
        key = Path(path).name, name
        cumulative[key] = cumulative.get(key, 0.0) + seconds
    shares = {part: sum(cumulative.get(key, 0.0) for key in keys) / training for part, keys in PARTS.items()}
    print(f"{training:.1f} s of training, {max(line['iter'] for line in lines)} iterations")
    for part, share in shares.items():
        print(f"{part:24} {share:6.2%}")
    print(f"all but the model and the optimizer's step: {sum(list(shares.values())[:-1]):.2%}")


if __name__ == "__main__":
    main(sys.argv[1:])
