"""Settings: what is accepted, what is refused by name, and what --help says."""
import json
import subprocess
import sys

import pytest
from conftest import ROOT, refused

SCRIPT = f'''"""A script."""
import sys
sys.path.insert(0, {str(ROOT)!r})
from configurator import configure
CONSTANT = 3
_private = 4
batch_size = 12  # rows # and more
learning_rate = 6e-4
compile = "auto"  # or True
name = ""  # free text, "# in quotes"
max_iters = 100
lr_decay_iters = 0
flag = False
if __name__ == "__main__":
    import json
    print(json.dumps(configure(globals())))
    assert batch_size == configure(globals())["batch_size"]
    print(json.dumps(configure(globals(), start_from=dict(batch_size=99, gone=1))))
'''


@pytest.fixture
def script(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)

    def call(*args, python=()):
        return subprocess.run([sys.executable, *python, "script.py", *args], cwd=tmp_path, capture_output=True, text=True)
    return call


def settings(process, line=0):
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[line])


DEFAULTS = dict(batch_size=12, learning_rate=6e-4, compile="auto", name="", max_iters=100, lr_decay_iters=0, flag=False)


@pytest.mark.parametrize("flag, key, value", [
    ("--batch_size=16", "batch_size", 16), ("--batch_size=1e3", "batch_size", 1000), ("--batch_size=2**4", "batch_size", 16),
    ("--batch_size=-3", "batch_size", -3), ("--batch_size=3*4+1", "batch_size", 13), ("--learning_rate=1", "learning_rate", 1.0),
    ("--learning_rate=1e-3", "learning_rate", 1e-3), ("--learning_rate=2**-3", "learning_rate", 0.125), ("--flag", "flag", True),
    ("--flag=true", "flag", True), ("--flag=1", "flag", True), ("--flag=False", "flag", False), ("--compile", "compile", True),
    ("--compile=false", "compile", False), ("--compile=0", "compile", "0"), ("--compile=auto", "compile", "auto"), ("--name=a=b", "name", "a=b"), ("--name=", "name", ""),
    ("--name=1e3", "name", "1e3"), ("--name=None", "name", "None")])
def test_a_flag_is_read_in_the_type_of_its_default(script, flag, key, value):
    got = settings(script(flag))
    assert got == DEFAULTS | {key: value} and type(got[key]) is type(value)


@pytest.mark.parametrize("python", [(), ("-O",)])
@pytest.mark.parametrize("flag, words", [
    ("--batchsize=3", ["batchsize", "'3'", "'batch_size'"]), ("--nope=1", ["nope", "nearest"]), ("--batch_size=1.5", ["batch_size", "1.5"]),
    ("--batch_size=", ["batch_size"]), ("--batch_size", ["batch_size"]), ("--batch_size=True", ["batch_size"]), ("--__name__=x", ["__name__"]),
    ("--CONSTANT=1", ["CONSTANT"]), ("--_private=1", ["_private"]), ("--learning_rate=nan", ["learning_rate"]),
    ("--learning_rate=1e999", ["learning_rate"]), ("--learning_rate=__import__('os')", ["learning_rate"]), ("--flag=2", ["flag", "true or false"]),
    ("-x", ["-x"]), ("nothing.py", ["nothing.py", "not found"]), ("notes.txt", ["notes.txt", "config file"])])
def test_a_wrong_flag_is_refused_by_name(script, flag, words, python):
    refused(script(flag, python=python), *words)


def test_later_ones_win_whatever_their_kind(script, tmp_path):
    (tmp_path / "a.py").write_text("batch_size = 7\n")
    assert settings(script("--batch_size=3", "a.py"))["batch_size"] == 7
    assert settings(script("a.py", "--batch_size=3"))["batch_size"] == 3


def test_a_config_file_sees_the_settings_so_far_and_may_compute(script, tmp_path):
    (tmp_path / "a.py").write_text("import math\n_half = max_iters // 2\ndef f(x): return x\nlr_decay_iters = f(_half)\nlearning_rate = math.sqrt(4)\n")
    got = settings(script("--max_iters=50", "a.py"))
    assert got == DEFAULTS | dict(max_iters=50, lr_decay_iters=25, learning_rate=2.0)


@pytest.mark.parametrize("text, words", [
    ("batchsize = 3", ["bad.py", "batchsize", "batch_size"]), ("batch_size = 1.5", ["bad.py", "batch_size", "1.5"]), ("batch_size = [3]", ["bad.py", "[3]"]),
    ("betas = [1, 2]", ["bad.py", "betas"]), ("nlayer = None", ["bad.py", "nlayer"]), ("x = = 1", ["bad.py", "line 1"]), ("flag = True\nmax_iters = 1 / 0", ["bad.py", "line 2", "ZeroDivision"]),
    ("compile = 'auto'\nname = 3", ["bad.py", "name"])])
def test_a_wrong_config_file_is_refused_by_name(script, tmp_path, text, words):
    (tmp_path / "bad.py").write_text(text)
    refused(script("bad.py"), *words)


def test_the_json_of_a_finished_run_repeats_it(script, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"settings": DEFAULTS | {"batch_size": 5}, "environment": {"torch": "2"}}))
    assert settings(script("config.json")) == DEFAULTS | {"batch_size": 5}
    (tmp_path / "broken.json").write_text("{")
    refused(script("broken.json"), "broken.json")
    (tmp_path / "other.json").write_text('{"settings": {"batchsize": 5}}')
    refused(script("other.json"), "other.json", "batchsize", "batch_size")


def test_a_resume_starts_from_other_settings_and_the_command_line_wins(script, tmp_path):
    assert settings(script("--max_iters=7"), 1) == DEFAULTS | dict(batch_size=99, max_iters=7)
    assert settings(script("--batch_size=3"), 1)["batch_size"] == 3
    (tmp_path / "a.py").write_text("max_iters = batch_size + 1\n")  # in a file, too, they stand in for the defaults
    assert settings(script("a.py"), 1)["max_iters"] == 100


def test_help_prints_every_setting_with_default_and_comment(script):
    process = script("--help")
    assert process.returncode == 0 and "A script." in process.stdout
    lines = {line.split("=")[0].strip(): line for line in process.stdout.splitlines() if line.startswith("  --")}
    assert set(lines) == {f"--{key}" for key in DEFAULTS}
    assert "--batch_size=12" in lines["--batch_size"] and lines["--batch_size"].endswith("  rows # and more")


def test_a_typo_is_answered_before_torch_is_imported(tmp_path):
    code = ("import sys, runpy\nsys.argv = ['train.py', '--batchsize=3']\n"
            f"try:\n    runpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')\n"
            "except SystemExit as end:\n    print(end.code, 'torch' in sys.modules)")
    env_path = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
    process = subprocess.run([sys.executable, "-c", env_path + code], capture_output=True, text=True, cwd=tmp_path)
    assert process.stdout == "2 False\n", process.stderr


@pytest.mark.parametrize("bug", ["import json; json.loads('{')", "import torch; torch.optim.SGD([])"])  # torch: below .venv
def test_a_bug_keeps_its_traceback(bug):
    code = f"from configurator import user_errors\nwith user_errors():\n    {bug}"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert process.returncode == 1 and "Traceback" in process.stderr
