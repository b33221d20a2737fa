"""bench.py as a process: it measures what it says, on small shapes."""
import json

import pytest
from conftest import refused, run

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


def test_an_unknown_task_is_refused(tmp_path):
    refused(run("bench.py", "--task=stp", cwd=tmp_path), "task='stp'")
    refused(run("bench.py", *SMALL, "--vs=--nope=1", cwd=tmp_path), "nope")
