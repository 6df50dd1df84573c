"""The documents: code that runs, links that lead somewhere, and a reference that is complete."""

import contextlib
import io
import re
import runpy
import sys
from pathlib import Path

import pytest

import cronos_flax as cf
from cronos_flax import sklearn as estimators

ROOT = Path(__file__).resolve().parents[1]
DOCS, README = ROOT / "docs", ROOT / "README.md"
GUIDES = [DOCS / "getting-started.md", DOCS / "which-mode.md", *sorted((DOCS / "guides").glob("*.md"))]
DOCUMENTS = [README, *sorted(DOCS.rglob("*.md"))]
WORDS_OF_README = 450


def blocks(path, language):
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(), re.DOTALL)


def named(path):
    return str(path.relative_to(ROOT))


def test_readme_code_runs():
    (block,) = blocks(README, "python")
    scope = {}
    exec(block, scope)
    assert scope["solution"].stats.objective <= scope["solution"].stats.initial_objective


def test_readme_is_short():
    assert len(README.read_text().split()) <= WORDS_OF_README


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in GUIDES if blocks(page, "python")], ids=named)
def test_page_runs_and_its_report_is_what_is_printed(page):
    scope, out = {}, io.StringIO()
    with contextlib.redirect_stdout(out):
        for block in blocks(page, "python"):
            exec(block, scope)
    printed = [line.split() for line in out.getvalue().splitlines()]
    for report in blocks(page, "text"):
        if report.startswith("Head of"):
            assert all(line.split() in printed for line in report.splitlines() if "verified" not in line)
    assert scope.get("accuracy", 1.0) > 0.9
    if "refitted" in scope:
        assert scope["narrow"].width < scope["wide"].width
        assert scope["refitted"].stats.objective < 1.1 * scope["solution"].stats.objective


def anchors(path):
    """Of the headings, as GitHub and MyST make them."""
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    titles = re.findall(r"^#+ +(.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", DOCUMENTS, ids=named)
def test_links_lead_somewhere(path):
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith(("http://", "https://")):
            continue
        file, _, anchor = link.partition("#")
        target = path.parent / file if file else path
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_reference_has_every_public_name():
    text = "\n".join(path.read_text() for path in (DOCS / "reference").glob("*.md"))
    entries = re.findall(r"^\.\. auto\w+:: cronos_flax\.(\S+)$", text, re.MULTILINE)
    public = {*cf.__all__, *(f"nnx.{name}" for name in cf.nnx.__all__)} - {"nnx"}
    public |= {f"sklearn.{name}" for name in estimators.__all__}
    assert sorted(entries) == sorted(public)


@pytest.mark.parametrize("command", ["compare", "merge", "train", "info"])
def test_command_line_page_has_every_option(command, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["cronos-flax", command, "--help"])
    with pytest.raises(SystemExit):
        runpy.run_module("cronos_flax", run_name="__main__")
    options = set(re.findall(r"(?<!\S)--[a-z-]+", capsys.readouterr().out)) - {"--help"}
    assert options
    page = (DOCS / "reference" / "command-line.md").read_text()
    assert [option for option in sorted(options) if f"`{option}" not in page] == []
