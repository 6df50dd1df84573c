"""A solved head on a CRATE encoder, against a linear probe and fine-tuning, after masked autoencoding and without it.

    python docs/benchmarks/masked.py --data-dir DIR --out masked.jsonl
    python docs/benchmarks/masked.py --out docs/benchmarks/masked.jsonl.gz  # the tables of rows that are there

The method is ``examples/neighbours/crate_mae.py``. Every seed draws its 1,000 labels: 800 rows to fit, 200 to choose
the setting of each method on. One row of the file for each set and seed, written when it is done.
"""

import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from rows import Row, kept, missing, parser

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "neighbours"))
import crate_mae as example

SETS, SEEDS, STEPS = ("fashion_mnist", "cifar10_airplane_automobile"), range(3), 600
RATES, EPOCHS, BATCH = (1e-3, 3e-3, 1e-2), 15, 50  # of fine-tuning
DEFAULT = 1e-3  # strength of a solved head
ENCODERS = ("untrained", "trained")
PROBE, SOLVED, TUNED = "linear probe", "solved head", "fine-tuning"


def tuned(encoder: Any, patch: int, fit: Any, held: Any, test: Any, seed: int) -> list[list[float]]:
    """All layers by Adam, the rate falling to zero by a cosine; the columns of ``judge``, for each rate."""
    model, start = example.classifier(encoder, patch, fit, seed)
    adam = optax.scale_by_adam()

    @jax.jit
    def step(variables: Any, state: Any, x: jax.Array, y: jax.Array, rate: float) -> tuple[Any, Any]:
        def loss(variables: Any) -> jax.Array:
            logits: Any = model.apply(variables, x)
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

        updates, state = adam.update(jax.grad(loss)(variables), state)
        return jax.tree.map(lambda v, u: v - rate * u, variables, updates), state

    apply: Any = jax.jit(model.apply)
    scores = []
    for rate in RATES:
        began, variables, state, rng = time.process_time(), start, adam.init(start), np.random.default_rng(seed)
        steps = EPOCHS * len(fit[0]) // BATCH
        batches = np.concatenate([rng.permutation(len(fit[0])) for _ in range(EPOCHS)]).reshape(steps, BATCH)
        for i, rows in enumerate(batches):
            now = rate * (0.5 + 0.5 * np.cos(np.pi * i / steps))
            variables, state = step(variables, state, fit[0][rows], fit[1][rows], now)
        jax.block_until_ready(variables)
        seconds = time.process_time() - began
        right = [100 * float(np.mean(np.asarray(apply(variables, x)).argmax(axis=1) == y)) for x, y in (held, test)]
        scores.append([*right, rate, seconds])
    return scores


def once(data_dir: Path, name: str, seed: int) -> Row:
    """Every method and setting on both encoders; what the autoencoder learnt; the compression terms."""
    patch = example.PATCH[name]
    x, *parts = example.load(data_dir, name, seed)
    began = time.process_time()
    *encoders, errors = example.pretrain(x, patch, STEPS, seed)
    row: Row = {"pretrain_seconds": time.process_time() - began}
    row["explained"] = [100 * (1 - float(np.mean(part))) for part in np.array_split(errors, 8)]
    for which, encoder in zip(ENCODERS, encoders, strict=True):
        _, seen = example.Encoder(patch).apply({"params": encoder}, parts[2][0][:200], mutable="layers")
        row[f"terms, {which}"] = [[float(term) for term in pair] for pair in seen["layers"]["terms"]]
        row[which] = {**example.judge(encoder, patch, *parts, seed), TUNED: tuned(encoder, patch, *parts, seed)}
    return row


def best(scores: list[list[float]]) -> list[float]:
    """Of all settings, the best on held-out rows."""
    return max(scores, key=lambda score: score[0])


def spread(values: Any) -> str:
    """Mean ± standard error; the value, if it is one."""
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{np.mean(values):.1f} ± {np.std(values, ddof=1) / len(values) ** 0.5:.1f}"


def show(rows: list[Row]) -> None:
    """The tables."""
    for name in SETS:
        of = [row for row in rows if row["set"] == name]
        if not of:
            continue
        print(f"\n{name}, {len(of)} seed(s)\n")
        print("| encoder | method | test accuracy, % | less the probe | settings | CPU s |")
        print("|---|---|---|---|---|---|")
        for which in ENCODERS:
            probes = np.array([best(row[which][PROBE])[1] for row in of])
            for method in (PROBE, SOLVED, f"{SOLVED}, default", TUNED):
                tried = [row[which][method.removesuffix(", default")] for row in of]
                if method.endswith("default"):
                    tried = [[score for score in scores if score[2] == DEFAULT] for scores in tried]
                chosen = [best(scores) for scores in tried]
                accuracy = np.array([score[1] for score in chosen])
                settings = ", ".join(f"{score[2]:g}" for score in chosen)
                seconds = np.median([sum(score[3] for score in scores) for scores in tried])
                cells = (which, method, spread(accuracy), spread(accuracy - probes), settings, f"{seconds:.1f}")
                print("|", " | ".join(cells), "|")
        parts = np.mean([row["explained"] for row in of], axis=0)
        print(
            "\nexplained of the hidden variance, %, by eighths of the run:", " ".join(f"{part:.0f}" for part in parts)
        )
        print("in the last eighth:", spread([row["explained"][-1] for row in of]))
        print("CPU seconds of masked autoencoding:", spread([row["pretrain_seconds"] for row in of]))
        print("\n| layer | encoder | before attention | after | falls in |\n|---|---|---|---|---|")
        for which in ENCODERS:
            terms = np.array([row[f"terms, {which}"] for row in of])  # (seeds, layers, 2)
            for i, layer in enumerate(terms.swapaxes(0, 1), 1):
                falls = f"{(layer[:, 1] < layer[:, 0]).sum()} of {len(of)}"
                print(f"| {i} | {which} |", spread(layer[:, 0]), "|", spread(layer[:, 1]), "|", falls, "|")


def main() -> None:
    """Run what has no row yet, where there are data; print."""
    made = parser(__file__, __doc__, data=False)
    made.add_argument("--sets", nargs="+", choices=SETS, default=SETS, help="to run")
    given = made.parse_args()
    if given.data_dir is None:
        show(kept(given.out))
    else:
        wanted = [(name, seed) for seed in SEEDS for name in given.sets]
        show(missing(given.out, ("set", "seed"), wanted, lambda name, seed: once(given.data_dir, name, seed)))


if __name__ == "__main__":
    main()
