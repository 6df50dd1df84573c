"""The ordinary loops of the examples, and the lines of the guides that make them CRONOS-AM."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LOOPS = "cnn", "resnet", "nnx_cnn"
EPOCHS = 1


def changed(name):
    """The loop after the diff of the docs, and how many lines that adds."""
    guides = "".join(path.read_text() for path in sorted((ROOT / "docs" / "guides").glob("*.md")))
    source = (ROOT / "examples" / "loops" / f"{name}.py").read_text()
    (diff,) = re.findall(rf"`examples/loops/{name}\.py`:\n\n```diff\n(.*?)```", guides, re.DOTALL)
    for hunk in diff.split("@@\n"):
        lines = hunk.splitlines()
        old, new = ("\n".join(line[1:] for line in lines if line[:1] in (" ", sign)) for sign in "-+")
        assert source.count(old) == 1, f"not once in {name}.py: {old}"
        source = source.replace(old, new)
    return source, sum(line.startswith("+") for line in diff.splitlines())


def accuracies(path):
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", str(path), "--epochs", str(EPOCHS)],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    printed = re.findall(r"epoch \d+: ([\d.]+)", done.stdout)
    assert len(printed) == EPOCHS
    return [float(value) for value in printed]


@pytest.mark.slow
@pytest.mark.parametrize("name", LOOPS)
def test_five_lines_make_an_ordinary_loop_cronos_am(name, tmp_path):
    source, added = changed(name)
    assert added <= 5
    path = tmp_path / f"{name}.py"
    path.write_text(source)
    solved = accuracies(path)
    assert solved[-1] > 0.85
