"""Fine-tuning a pretrained network on few images: CRONOS-AM, Adam on everything, and a linear probe first (LP-FT).

    python docs/benchmarks/fine_tuning.py --data-dir DIR --weights DIR [--out fine_tuning.jsonl]

ResNet-20 with weights of CIFAR-10, on 1,000 images of Fashion-MNIST; 1,000 images of the test split are scored after
every epoch. All methods train everything by Adam, at four rates. CRONOS-AM solves the head first, and has its
defaults; LP-FT begins with logistic regression, its strength chosen by cross-validation: on the network without a
hidden layer, or, "two layers", in the head of CRONOS-AM, on the features that its first solve sees. Every run is one
row of the file, written when it is done; rows that are there are not run again. Ends with the tables, of scores and of
CRONOS-AM less each other method, seed by seed; ``--out docs/benchmarks/fine_tuning.jsonl.gz`` prints those of the kept
rows.
"""

import functools
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from resnet import MEAN, STD, ResNet, read_safetensors, variables_of
from rows import Row, kept, missing, parser
from sklearn.linear_model import LogisticRegressionCV
from suite import optimizer

import cronos_flax as cf
from cronos_flax._alternation.backbone import rated
from cronos_flax.compare.data import load_tfds
from cronos_flax.compare.frozen import Linear, in_head
from cronos_flax.compare.methods import BaselineState
from cronos_flax.compare.tables import markdown

ROWS, SCORED, BATCH, HIDDEN, CLASSES = 1000, 1000, 50, 64, 10
EPOCHS, OURS_EPOCHS = 10, 9  # of about the same CPU time
RATES = (10**-3.5, 1e-3, 10**-2.5, 1e-2)
DECAYS = (None, "cosine")
OURS = "CRONOS-AM"


class Net(nn.Module):
    """ResNet-20 with a linear classifier, or with ``Dense → relu → Dense``."""

    hidden: int | None

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Outputs ``(n, 10)`` of normalised images ``(n, 32, 32, 3)``."""
        x = ResNet(name="backbone")(images, train)
        if self.hidden is not None:
            x = nn.relu(nn.Dense(self.hidden, name="hidden")(x))
        return nn.Dense(CLASSES, name="outputs")(x)


class Method(NamedTuple):
    """What starts, and how it goes on."""

    start: str  # "fresh", "probe", "probe in head" or "solve"
    rate: float
    decay: str | None = None
    largest_step: float | None = None  # of an optimizer alone


METHODS: dict[str, Method] = {}
_LIMIT = cf.Alternation().largest_step
for _rate in RATES:
    METHODS[f"{OURS} {_rate:.2g}"] = Method("solve", _rate)
    METHODS |= {f"LP-FT {_rate:.2g} {decay or 'constant'}": Method("probe", _rate, decay) for decay in DECAYS}
    # With the limit of steps and the decay that CRONOS-AM has, and no solves.
    METHODS[f"LP-FT {_rate:.2g} wsd, limited"] = Method("probe", _rate, "wsd", _LIMIT)
    METHODS[f"LP-FT, two layers {_rate:.2g} cosine"] = Method("probe in head", _rate, "cosine")
METHODS |= {f"Adam {rate:.2g} cosine": Method("fresh", rate, "cosine") for rate in RATES}
METHODS |= {f"Adam {rate:.2g} wsd, limited": Method("fresh", rate, "wsd", _LIMIT) for rate in RATES}


def prepared(images: np.ndarray) -> np.ndarray:
    """Grey images of 28 × 28 as the network takes them."""
    wide = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0))) / np.float32(255)
    return (wide - MEAN) / STD


@functools.cache
def rows_of(data_dir: Path, seed: int) -> tuple[np.ndarray, ...]:
    """Images and labels to fit, and to score."""
    x, y = load_tfds("fashion_mnist", "train", data_dir)
    x_scored, y_scored = load_tfds("fashion_mnist", f"test[:{SCORED}]", data_dir)
    chosen = np.random.default_rng(seed).permutation(len(x))[:ROWS]
    return prepared(x[chosen]), np.asarray(y)[chosen], prepared(x_scored), np.asarray(y_scored)


def probed(features: np.ndarray, y: np.ndarray) -> Linear:
    """Logistic regression, its strength chosen by cross-validation."""
    strengths = {"Cs": np.logspace(-3, 4, 8), "cv": 3, "l1_ratios": (0,), "scoring": "accuracy", "max_iter": 500}
    probe = LogisticRegressionCV(**strengths, use_legacy_attributes=False).fit(features, y)
    return Linear(probe.coef_.T, probe.intercept_)


def started(method: Method, seed: int, pretrained: dict[str, Any], x: np.ndarray, y: np.ndarray) -> Any:
    """The train state before the first epoch: with a fresh head, a linear probe, or a solved head."""
    model = Net(None if method.start == "probe" else HIDDEN)
    variables = model.init(jax.random.key(seed), x[:1])
    params = {**variables["params"], "backbone": pretrained["params"]}
    variables = {"params": params, "batch_stats": {"backbone": pretrained["batch_stats"]}}
    common = {"apply_fn": model.apply, "model_state": {"batch_stats": variables["batch_stats"]}}
    if method.start == "solve":
        head = cf.find_head(model, variables, x[:BATCH], train=False, statistics="batch")
        tx, solver = optimizer("adam", method.rate), cf.Cronos(loss="softmax")
        state = cf.CronosTrainState.create(params=params, tx=tx, head=head, solver=solver, **common)
        return state.solve_head((x, y), key=jax.random.key(seed))[0]
    if method.start == "probe":
        probe = probed(np.asarray(jax.jit(ResNet().apply)(pretrained, x)), y)
        outputs = {"kernel": jnp.asarray(probe.kernel, jnp.float32), "bias": jnp.asarray(probe.bias, jnp.float32)}
        params = {**params, "outputs": outputs}
    if method.start == "probe in head":
        head = cf.find_head(model, variables, x[:BATCH], train=False, statistics="batch")
        rows, moments = head.gather(variables, (x, y))
        features = np.asarray(rows.X)
        network = in_head(probed(features, np.asarray(rows.y)), features, head.read(variables))
        variables = head.module.recalibrated(head.write(variables, network), moments)
        params, common["model_state"] = variables["params"], {"batch_stats": variables["batch_stats"]}
    tx = optimizer("adam", method.rate, method.decay is not None)
    if method.largest_step is not None:
        tx = rated(optimizer("adam", method.rate), largest_step=method.largest_step)
    return BaselineState.create(params=params, tx=tx, run_decay=method.decay, **common)


def run(name: str, seed: int, *, data_dir: Path, weights: Path) -> Row:
    """Train once; accuracy after each epoch in %, and seconds until then."""
    method, (x, y, x_scored, y_scored) = METHODS[name], rows_of(data_dir, seed)
    pretrained = variables_of(read_safetensors(weights / "resnet20_cifar10.safetensors"))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        began = time.process_time()
        state = started(method, seed, pretrained, x, y)
        at_start = time.process_time() - began
        state, history = cf.train(
            state,
            (x, y),
            epochs=OURS_EPOCHS if method.start == "solve" else EPOCHS,
            batch_size=BATCH,
            loss="softmax",
            validation=(x_scored, y_scored),
            train_kwargs={"train": True},
            eval_kwargs={"train": False},
            key=jax.random.key(seed),
            compile_first=True,
        )
    figures, scored = getattr(state, "figures", {}), [row for row in history if "validation_accuracy" in row]
    return {
        "accuracy": [100 * row["validation_accuracy"] for row in scored],
        "seconds": [row["seconds"] for row in scored],  # of training
        "start_cpu": at_start,
        "solving": sum(row.get("solve_seconds", 0.0) for row in history),
        "rejections": figures.get("rejections", 0),
        "warned": sorted({str(warning.message)[:60] for warning in told if warning.category is UserWarning}),
        "cpu": time.process_time() - began,
    }


def report(rows: list[Row]) -> None:
    """Print accuracy during training and at its end by rate, what CRONOS-AM has more, and what runs cost."""
    heads, runs = [f"{rate:.2g}" for rate in RATES], cells(rows)
    for title, epoch in ("one epoch", 0), ("four epochs", 3), ("the last epoch", -1):
        scores = {
            name: {rate: {seed: row["accuracy"][epoch] for seed, row in cell.items()} for rate, cell in its.items()}
            for name, its in runs.items()
        }
        printed(f"Accuracy after {title}, and that of each seed", heads, {n: by_rate(its) for n, its in scores.items()})
        ours = scores.get(OURS, {})
        less = {n: by_rate({r: minus(ours.get(r, {}), its[r]) for r in its}) for n, its in scores.items() if n != OURS}
        printed(f"{OURS} less each other method at the same rate after {title}, and of each seed", heads, less)
    best = {name: of_two for name, its in scores.items() if (of_two := best_of(its))}
    ours = best.get(OURS, (0.0, {}))[1]
    lines = {name: [f"{rate:.2g}", each(its), each(minus(ours, its))] for name, (rate, its) in best.items()}
    columns = ["rate", "accuracy", f"{OURS} less it"]
    printed("The best rate at the end, by these test rows, of those with two seeds", columns, lines)
    costs = {name: cost([row for cell in its.values() for row in cell.values()]) for name, its in runs.items()}
    printed("Of all runs of a method", ["runs", "epochs", "CPU seconds, mean of a run", "rejected solves"], costs)


def cells(rows: list[Row]) -> dict[str, dict[float, dict[int, Row]]]:
    """The rows by method, rate and seed; methods in their order."""
    found: dict[str, dict[float, dict[int, Row]]] = {}
    for name, method in METHODS.items():
        cell = {row["seed"]: row for row in rows if row["method"] == name}
        if cell:
            found.setdefault(name.replace(f" {method.rate:.2g}", ""), {})[method.rate] = cell
    return found


def minus(ours: dict[int, float], theirs: dict[int, float]) -> dict[int, float]:
    """Differences of the seeds that both have."""
    return {seed: ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())}


def best_of(scores: dict[float, dict[int, float]]) -> tuple[float, dict[int, float]] | None:
    """The rate with the highest mean and the scores there, of the rates with more than one seed, if there are any."""
    several = [(rate, its) for rate, its in scores.items() if len(its) > 1]
    return max(several, key=lambda item: np.mean([*item[1].values()]), default=None)


def by_rate(scores: dict[float, dict[int, float]]) -> list[str]:
    """What :func:`each` says of each rate."""
    return [each(scores.get(rate, {})) for rate in RATES]


def each(scores: dict[int, float]) -> str:
    """The mean, and the score of each seed."""
    return f"{np.mean([*scores.values()]):.2f} ({', '.join(f'{i:.1f}' for i in scores.values())})" if scores else "–"


def cost(runs: list[Row]) -> list[str]:
    """How many runs, how many epochs and CPU seconds one takes, and how many solves were rejected."""
    seconds, rejected = np.mean([run["cpu"] for run in runs]), sum(run["rejections"] for run in runs)
    return [f"{len(runs)}", f"{len(runs[0]['accuracy'])}", f"{seconds:.0f}", f"{rejected}"]


def printed(title: str, heads: list[str], lines: dict[str, list[str]]) -> None:
    """Print a table."""
    print("\n".join([f"{title}:", "", *markdown(["method", *heads], [[n, *its] for n, its in lines.items()]), ""]))


def main() -> None:
    """Run what is missing, print the tables."""
    made = parser(__file__, __doc__, data=False, weights=True)
    made.add_argument("--seeds", type=int, nargs="*", default=[0, 1])
    made.add_argument("--methods", nargs="*", default=list(METHODS), help="some of the methods")
    given = made.parse_args()
    rows = kept(given.out)
    if given.data_dir is not None:
        do = functools.partial(run, data_dir=given.data_dir, weights=given.weights)
        rows = missing(given.out, ("method", "seed"), ((name, s) for s in given.seeds for name in given.methods), do)
    report(rows)


if __name__ == "__main__":
    main()
