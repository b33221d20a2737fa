"""The rules of the house: small files, imports that run nothing, arrows that run one way, a README that is true."""
import ast
import re
import subprocess
import sys

import pytest
from conftest import ROOT, run

BUDGETS = {"model.py": 400, "train.py": 450, "checkpoint.py": 200, "machine.py": 360, "optim.py": 150, "configurator.py": 130, "bench.py": 250, "sample.py": 150,
           "data/tokenizer.py": 280, "data/bpe.py": 200, "data/writer.py": 200, "data/reader.py": 190, "data/download.py": 90, "data/splits.py": 135}
SOURCES = sorted(p for p in ROOT.rglob("*.py") if not {".venv", "tests", "out"} & set(p.relative_to(ROOT).parts))
MODULES = [p for p in SOURCES if p.parent.name != "config"]


def lines(path):
    return len(path.read_text(encoding="utf-8").splitlines())


def test_every_file_keeps_its_budget():
    over = {n: lines(ROOT / n) for n, most in BUDGETS.items() if lines(ROOT / n) > most}
    over |= {str(p): lines(p) for p in SOURCES if p.name == "prepare.py" and lines(p) > 80 or p.parent.name == "config" and lines(p) > 40}
    assert not over and sum(map(lines, SOURCES)) <= 3600


def imported(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {name.split(".")[0] for node in ast.walk(tree) for name in
            ([a.name for a in node.names] if isinstance(node, ast.Import) else [node.module] if isinstance(node, ast.ImportFrom) else [])}


def test_arrows_run_one_way():
    ours = {p.stem for p in SOURCES if p.parent == ROOT} | {"data"}
    assert imported(ROOT / "configurator.py") <= set(sys.stdlib_module_names)
    assert not imported(ROOT / "model.py") & ours and "distributed" not in (ROOT / "model.py").read_text()
    for name in ("checkpoint", "optim"):
        assert imported(ROOT / f"{name}.py") & ours <= {"model"}
    for preset in (ROOT / "config").glob("*.py"):
        assert not imported(preset)


def test_importing_a_file_runs_nothing(tmp_path):
    """All in one process, for the sake of torch's seconds: nothing printed, nothing written, no settings applied."""
    code = f"""import sys, importlib.util as u
sys.path.insert(0, {str(ROOT)!r})
sys.argv += ["--nonsense"]
for path in {[str(p) for p in MODULES]!r}:
    spec = u.spec_from_file_location("m", path)
    spec.loader.exec_module(u.module_from_spec(spec))
print("done")"""
    process = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (process.returncode, process.stdout, process.stderr, list(tmp_path.iterdir())) == (0, "done\n", "", [])


def test_the_readmes_commands_exist():
    """Every script and preset that README.md runs is there, and has every setting that is set there."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").replace("torchrun --nproc_per_node=8", "python")
    settings = re.findall(r"--(\w+)", (ROOT / "config/README.md").read_text(encoding="utf-8"))
    assert set(settings) <= set(re.findall(r"^(\w+) = ", (ROOT / "train.py").read_text(encoding="utf-8"), re.M))
    commands = re.findall(r"python ((?:[\w/]+/)?\w+\.py)((?: +(?:config/\S+|--[a-z]\S*))*)", text)
    assert len(commands) > 10
    for script, arguments in commands:
        owner = "train.py" if script == "tests/bench_overhead.py" else script  # which hands its flags on
        source = (ROOT / owner).read_text(encoding="utf-8")
        for argument in re.findall(r"config/\w+\.py", arguments):
            assert (ROOT / argument).is_file()
        for key in re.findall(r"--(\w+)", arguments):
            assert key == "help" or re.search(rf"^{key} = |[\"']{key}[\"']", source, re.M), f"{script} has no {key}"
    for target in re.findall(r"`?make (\w+)`?", text):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M), f"make {target}"


@pytest.mark.parametrize("preset", sorted((ROOT / "config").glob("*.py")), ids=lambda p: p.name)
def test_every_preset_sets_what_train_has(preset, tmp_path):
    process = run("train.py", preset, "--help", cwd=tmp_path)  # --help is answered where the settings before it were right
    assert process.returncode == 0, process.stderr
