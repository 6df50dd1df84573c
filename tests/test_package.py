"""The package as a whole: import order, a quiet import, and documents that run."""

import ast
import contextlib
import io
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ORDER = [
    "_types", "_host", "_blocks", "_solution", "_losses", "_basis", "_program", "_nystrom", "_linsolve", "_anderson",
    "_admm", "_weights", "_refresh", "_path", "_checks",
    "_cronos", "_features", "_find", "_fit", "_head", "_graft", "_guard", "_train_state", "_checkpoint", "_driver",
    "nnx", "data", "__init__", "datasets", "models", "baselines", "compare", "tables", "plots", "progress", "cli",
    "__main__",
]  # fmt: skip


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "cronos_flax":
            parts = node.module.split(".")[1:]
            yield from (parts[:1] or [alias.name for alias in node.names])
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("cronos_flax."):
                    yield alias.name.split(".")[1]


def outside_imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


def test_files_import_only_files_before_them():
    files = {path.stem: path for path in (ROOT / "cronos_flax").glob("*.py")}
    assert set(files) == set(ORDER)
    for position, name in enumerate(ORDER):
        assert set(imports_of(files[name])) <= set(ORDER[:position]), name
        packages = set(outside_imports(files[name]))
        if position < ORDER.index("_head"):
            assert "flax" not in packages
        if position < ORDER.index("_guard"):
            assert "optax" not in packages


def test_import_is_silent_and_starts_no_device():
    code = "import cronos_flax, jax._src.xla_bridge as b; assert not b._backends, b._backends"
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code], capture_output=True, text=True, cwd=ROOT
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_readme_code_runs():
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    scope = {}
    exec(block, scope)
    assert scope["solution"].stats.objective <= scope["solution"].stats.initial_objective


@pytest.mark.slow
def test_usage_runs_and_its_report_is_what_is_printed():
    text = (ROOT / "docs" / "usage.md").read_text()
    scope, out = {}, io.StringIO()
    with contextlib.redirect_stdout(out):
        for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
            exec(block, scope)
    (report,) = re.findall(r"```text\n(.*?)```", text, re.DOTALL)
    printed = out.getvalue().splitlines()
    assert all(line in printed for line in report.splitlines() if "proved" not in line)  # how exactly differs
    assert scope["accuracy"] > 0.9
    assert scope["narrow"].width < 64
    assert scope["refitted"].stats.objective < 1.1 * scope["solution"].stats.objective


@pytest.mark.slow
def test_quickstart_ends_with_its_table_and_picture(tmp_path):
    picture = tmp_path / "picture.png"
    command = [sys.executable, "examples/quickstart.py", "--seconds", "0.3", "--out", str(picture)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "CRONOS-AM" in done.stdout
    assert picture.stat().st_size > 10_000


def test_quickstart_refuses_a_missing_data_set():
    command = [sys.executable, "examples/quickstart.py", "--dataset", "mnist", "--data-dir", "/nonexistent"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert "Prepare it" in done.stderr


def test_load_tfds_reads_a_real_split(tfds_dir):
    from cronos_flax.data import load_tfds

    images, labels = load_tfds("cifar10_airplane_automobile", "test", tfds_dir)
    assert images.shape == (2000, 32, 32, 3)
    assert images.dtype == "uint8"
    assert sorted(set(labels.tolist())) == [0, 1]
    with pytest.raises(ValueError, match="split"):
        load_tfds("cifar10_airplane_automobile", "nonesuch", tfds_dir)
