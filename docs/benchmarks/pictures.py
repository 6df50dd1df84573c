"""Draw all pictures that committed rows are enough for, and print the tables of budgets.

    python docs/benchmarks/pictures.py [--out docs/pictures]

Reads the rows beside this file (``*.jsonl.gz``), trains nothing. ``result.png`` and ``robust.png`` are for
``docs/results.md``; ``curves.png`` and ``budget.png`` are the pictures that ``cronos-flax compare`` makes of
Fashion-MNIST with a CNN, those with a longer name the same of the other comparisons.
"""

import argparse
from pathlib import Path

import numpy as np
from rows import Row, kept

from cronos_flax.compare import plots, style
from cronos_flax.compare.budget import budget
from cronos_flax.compare.methods import ALTERNATION
from cronos_flax.compare.style import OTHER, OURS, Label
from cronos_flax.compare.summaries import summaries
from cronos_flax.compare.tables import budget_table

HERE = Path(__file__).parent
COMPARISONS = {  # by the name of their rows
    "experiment1-batch128": "Planes or cars (CIFAR), MLP",
    "experiment1-batch1024": "The same, batches of 1,024",
    "fashion_mnist-cnn": "Fashion-MNIST, CNN",
    "digits": "Digits, MLP",
}
NAMES = {
    ALTERNATION: "CRONOS-AM", "adam": "Adam", "adamw": "AdamW", "sgd": "SGD", "yogi": "Yogi",
    "dadapt_adamw": "D-Adapt", "prodigy": "Prodigy",
}  # fmt: skip
ROBUST = {
    "cifar pixels/255": "Planes or cars,\npixels in [0, 1], MLP",
    "cifar standardised": "Planes or cars,\nstandardised, MLP",
    "fashion_mnist cnn": "Fashion-MNIST,\nCNN",
}


def of(comparison: str) -> list[Row]:
    """The rows of a comparison, CRONOS-AM first."""
    return sorted(kept(HERE / f"{comparison}.jsonl.gz"), key=lambda row: row["method"] != ALTERNATION)


def draw_result(path: Path) -> None:
    """Expected test accuracy against total training time, tuning included, in four comparisons."""
    with style.styled(7, 5.9) as figure:
        panels = figure.subplots(2, 2)
        for ax, (comparison, title) in zip(panels.flat, COMPARISONS.items(), strict=True):
            methods = [method for method in summaries(of(comparison)) if method.method in NAMES]
            budgets = [budget(method, timed=True) for method in methods]
            labels = plots.budget_panel(ax, budgets, ALTERNATION, is_accuracy=True)
            ax.set_title(title, fontweight="bold")
            style.label_ends(ax, [label._replace(text=NAMES[label.text]) for label in labels], 9)
        for ax in panels[1]:
            ax.set_xlabel("total training time, s")
        figure.supylabel("expected test accuracy, % (error on a log scale)", fontsize=10)
        figure.suptitle(
            "One run of CRONOS-AM, nothing tuned, against random search over 7 learning rates:\n"
            "each marker is one more run, the best chosen by validation; hollow, left: the usual rate",
            fontsize=10,
        )
        style.save(figure, path, dpi=200)


def draw_robust(path: Path) -> None:
    """Final validation accuracy against the learning rate, CRONOS-AM and plain Adam."""
    rows = [row for row in kept(HERE / "am.jsonl.gz") if row["case"] == "robust" and row["optimizer"] == "adam"]
    with style.styled(7, 3) as figure:
        panels = figure.subplots(1, len(ROBUST), sharey=True)
        for ax, (data, title) in zip(panels, ROBUST.items(), strict=True):
            labels = []
            for method, name, color in (("CRONOS-AM", "CRONOS-AM", OURS), ("plain", "Adam", OTHER)):
                mine = [row for row in rows if (row["data"], row["method"]) == (data, method)]
                rates = sorted({row["rate"] for row in mine})
                finals = np.array([[row["final"] for row in mine if row["rate"] == rate] for rate in rates])
                ax.fill_between(rates, finals.min(axis=1), finals.max(axis=1), color=color, alpha=0.2, linewidth=0)
                ax.plot(rates, finals.mean(axis=1), "o-", color=color, markersize=4, clip_on=False)
                labels.append(Label(rates[-1], float(finals[-1].mean()), name, color, method != "plain"))
            ax.set_xscale("log")
            ax.set_xlim(rates[0], rates[-1])
            ax.set_title(title)
        note = "lines: mean\nbands: all 3 seeds"
        panels[-1].text(0.96, 0.06, note, transform=panels[-1].transAxes, ha="right", fontsize=9, color="0.35")
        panels[1].set_xlabel("learning rate of the backbone (CRONOS-AM), of all layers (Adam)")
        panels[0].set_ylabel("final validation accuracy, %")
        style.label_ends(ax, labels)
        style.save(figure, path, dpi=200)


def main() -> None:
    """Draw everything, print the tables."""
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    made.add_argument("--out", type=Path, default=HERE.parent / "pictures", help="directory of the pictures")
    out = made.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for comparison in COMPARISONS:
        suffix = "" if comparison == "fashion_mnist-cnn" else f"-{comparison}"
        rows = of(comparison)
        plots.draw_curves(rows, out / f"curves{suffix}.png")
        plots.draw_budget(rows, out / f"budget{suffix}.png")
        print(f"{comparison}\n\n{budget_table(rows)}")
    draw_result(out / "result.png")
    draw_robust(out / "robust.png")


if __name__ == "__main__":
    main()
