"""bench.py as a process: it measures what it says, on small shapes."""
import json
import shlex

import pytest
from conftest import TINY, refused, run

SMALL = ["--n_layer=2", "--n_head=2", "--n_embd=32", "--block_size=32", "--vocab_size=256", "--batch_size=4", "--repeats=3", "--seconds=0.1",
         "--device=cpu", "--compile=False", "--new_tokens=24", "--json"]


@pytest.mark.parametrize("flags, names", [
    (["--task=loader", "--batch_size=12", "--block_size=1024"], ["get_batch", "loop over rows"]),
    (["--task=step", "--vs=--optimizer=adamw --mlp=gelu"], ["this", "--optimizer=adamw --mlp=gelu"]),
    (["--task=sample"], ["cached", "uncached"])])
def test_it_reports_medians_and_ratios(tmp_path, flags, names):
    process = run("bench.py", *SMALL, *flags, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    report = json.loads(process.stdout)
    assert list(report["results"]) == names and report["machine"].startswith("cpu")
    for row in report["results"].values():
        assert 0 < row["lowest"] <= row["median"] <= row["highest"]
    assert report["results"][names[0]]["ratio"] == 1
    if "--task=loader" in flags:
        assert report["results"]["loop over rows"]["ratio"] > 2  # 5 and more on a quiet machine


def test_the_table_is_for_people(tmp_path):
    printed = run("bench.py", *[f for f in SMALL if f != "--json"], cwd=tmp_path).stdout
    for words in ("tokens/s", "forward and backward: ", "of a large matrix product's", "peak memory", "1.00 x as fast"):
        assert words in printed


def test_time_to_loss_runs_train_and_says_what_was_not_reached(tmp_path, data):
    flags = shlex.join([*TINY, f"--dataset={data}", "--eval_interval=10"])
    report = run("bench.py", "--task=time_to_loss", f"--args={flags}", "--vs=--learning_rate=1e-9 --min_lr=0 --muon_lr=0", "--target_loss=3.5",
                 "--repeats=2", "--json", cwd=tmp_path)
    assert report.returncode == 0, report.stderr
    reached, stuck = json.loads(report.stdout)["results"].values()
    assert 0 < reached["lowest"] <= reached["median"] <= reached["highest"] and max(reached["losses"]) <= 3.5 < min(stuck["losses"])
    assert stuck["median"] is None and len(reached["tokens"]) == 2 and max(reached["tokens"]) <= min(stuck["tokens"])
    refused(run("bench.py", "--task=time_to_loss", "--args=--batch_size=0", "--target_loss=1", cwd=tmp_path), "batch_size=0")
    refused(run("bench.py", "--task=time_to_loss", cwd=tmp_path), "target_loss=0", "--target_loss=3.5")


def test_an_unknown_task_is_refused(tmp_path):
    refused(run("bench.py", "--task=stp", cwd=tmp_path), "task='stp'")
    refused(run("bench.py", *SMALL, "--vs=--nope=1", cwd=tmp_path), "nope")
