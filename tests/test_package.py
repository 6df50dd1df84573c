"""The package as a whole: import order, a quiet import, and the example."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest
from forked import Forked

ROOT = Path(__file__).resolve().parents[1]
WINGS = ["_solver", "_head", "_alternation", "compare"]  # each imports from itself and those before it


def modules():
    """Every module of the package, by the parts of its name, with its syntax tree."""
    for path in (ROOT / "cronos_flax").rglob("*.py"):
        parts = path.relative_to(ROOT / "cronos_flax").with_suffix("").parts
        yield parts[:-1] if parts[-1] == "__init__" else parts, ast.parse(path.read_text())


def imports(tree):
    """The names that a module imports from, relative to the package, and the packages outside it."""
    inside, outside = set(), set()
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            top, *rest = name.split(".")
            inside |= {tuple(rest)} if top == "cronos_flax" else set()
            outside |= {top} - {"cronos_flax"}
    return inside, outside


def test_each_wing_imports_from_itself_and_those_before_it():
    for name, tree in modules():
        inside, outside = imports(tree)
        allowed = WINGS[: WINGS.index(name[0]) + 1] if name and name[0] in WINGS else [*WINGS, "nnx"]
        assert {parts[0] for parts in inside} <= set(allowed), name  # so nobody imports cronos_flax.sklearn
        assert "flax" not in outside or allowed != WINGS[:1], name
        assert "optax" not in outside or len(allowed) > 2, name


def test_no_module_imports_itself_by_way_of_others():
    files = dict(modules())
    needs = {name: {part[:2] for part in imports(tree)[0] if part[:2] in files} for name, tree in files.items()}
    order = graphlib.TopologicalSorter(needs)
    order.prepare()  # raises CycleError


def test_import_is_silent_and_starts_no_device():
    code = "import cronos_flax, jax._src.xla_bridge as b; assert not b._backends, b._backends"
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code], capture_output=True, text=True, cwd=ROOT
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.slow
def test_quickstart_ends_with_its_table_and_picture(tmp_path):
    picture = tmp_path / "picture.png"
    status, out, err = Forked(tmp_path, "examples/quickstart.py", "--seconds", 0.3, "--out", picture).wait()
    assert status == 0, err
    assert "CRONOS-AM" in out
    assert picture.stat().st_size > 10_000


def test_quickstart_refuses_a_missing_data_set(tmp_path):
    script = ["examples/quickstart.py", "--dataset", "mnist", "--data-dir", "/nonexistent"]
    status, _, err = Forked(tmp_path, *script).wait()
    assert status == 2
    assert "Prepare it" in err


def test_load_tfds_reads_a_real_split(tfds_dir):
    from cronos_flax.compare.data import load_tfds

    images, labels = load_tfds("cifar10_airplane_automobile", "test", tfds_dir)
    assert images.shape == (2000, 32, 32, 3)
    assert images.dtype == "uint8"
    assert sorted(set(labels.tolist())) == [0, 1]
    with pytest.raises(ValueError, match="split"):
        load_tfds("cifar10_airplane_automobile", "nonesuch", tfds_dir)
