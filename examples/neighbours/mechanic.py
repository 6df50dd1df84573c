"""CRONOS-AM without a rate: Mechanic and other learning-rate-free optimizers move the backbone, solves the head.

    python examples/neighbours/mechanic.py
    python examples/neighbours/mechanic.py --backbones mechanic prodigy --first-scale 1

Mechanic (Cutkosky, Defazio, Mehta, NeurIPS 2023) wraps any optimizer and learns a factor on its steps, the scale. The
guard of CRONOS-AM has a factor too: it lowers it after a solve that ends above earlier ones, and raises it again up to
1. The loop prints both at each solve. Data are scikit-learn's digits. Ends with a table. ``--first-scale`` is the scale
that Mechanic begins with (1e-6 by default): with a large one the guard has something to do.
"""

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
import optax
from flax.training.train_state import TrainState
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits

import cronos_flax as cf

SCALE = 1e-6  # of Mechanic's first steps
WARM, BATCH, EVERY = 1, 64, 3  # epochs before the first solve, rows of a step, epochs from one solve to the next

BACKBONES: dict[str, Callable[[], optax.GradientTransformation]] = {
    "mechanic": lambda: optax.contrib.mechanize(optax.adam(1.0)),
    "mechanic, SGD": lambda: optax.contrib.mechanize(optax.sgd(1.0, momentum=0.9)),
    "dadapt_adamw": lambda: optax.contrib.dadapt_adamw(1.0),
    "prodigy": lambda: optax.contrib.prodigy(1.0),
    "cocob": optax.contrib.cocob,
    "dog": optax.contrib.dog,
    "momo": lambda: optax.contrib.momo(1.0),
}


class Rows(NamedTuple):
    """Rows to fit and rows to score."""

    x: np.ndarray
    y: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray


class MLP(nn.Module):
    """Two layers of a backbone and the head."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits ``(n, 10)`` of images ``(n, 64)``."""
        for width in (64, 32):
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(10)(nn.relu(nn.Dense(64)(x)))


def digits() -> Rows:
    """1,200 rows to fit."""
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(y))
    x, y = x[order].astype("float32") / 16, y[order]
    return Rows(x[:1200], y[:1200], x[1200:], y[1200:])


@jax.jit
def step(state: cf.CronosTrainState, x: jax.Array, y: jax.Array) -> cf.CronosTrainState:
    """One gradient step. ``value`` is for momo, which takes the loss; the others do without."""

    def loss(params: Any) -> jax.Array:
        logits = state.apply_fn({"params": params}, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    value, grads = jax.value_and_grad(loss)(state.params)
    return state.apply_gradients(grads=grads, value=value)


def scale(state: TrainState) -> float | None:
    """What Mechanic multiplies the steps of its optimizer by; None for another optimizer."""
    kind = optax.contrib.MechanicState
    nodes = jax.tree.leaves(state.opt_state, is_leaf=lambda node: isinstance(node, kind))
    scales = [float(node.s.sum()) for node in nodes if isinstance(node, kind)]
    return scales[0] if scales else None


def create(tx: optax.GradientTransformation, rows: Rows, **settings: Any) -> cf.CronosTrainState:
    """The state of an alternation; settings are those of ``CronosTrainState.create``."""
    model = MLP()
    variables = model.init(jax.random.key(0), rows.x[:1])
    head = cf.find_head(model, variables, rows.x[:1])
    common = {"apply_fn": model.apply, "params": variables["params"], "tx": tx, "head": head}
    return cf.CronosTrainState.create(**common, solver=cf.Cronos(loss="softmax"), **settings)


def accuracy(state: cf.CronosTrainState, rows: Rows) -> float:
    """On the rows to score, in %."""
    predicted = state.apply_fn(state.variables, rows.x_test).argmax(axis=1)
    return 100 * float(np.mean(np.asarray(predicted) == rows.y_test))


def alternate(
    state: cf.CronosTrainState, rows: Rows, epochs: int, tell: Callable[[dict[str, Any]], Any]
) -> cf.CronosTrainState:
    """Gradient steps, and a solve after the first epoch, then one in ``EVERY``, and at the end.

    Args:
        state: the state.
        rows: the data.
        epochs: of gradient steps.
        tell: called at each solve with the loss, whether it was accepted, the guard's rate and Mechanic's scale before
            and after it.
    """
    rng = np.random.default_rng(0)
    for epoch in range(1, epochs + 1):
        order = rng.permutation(len(rows.x))
        for start in range(0, len(order) - BATCH + 1, BATCH):
            places = order[start : start + BATCH]
            state = step(state, rows.x[places], rows.y[places])
        if epoch == epochs or (epoch - WARM) % EVERY == 0:
            before = scale(state)
            state, solution = state.solve_head((rows.x, rows.y))
            figures = state.figures
            tell(
                {"epoch": epoch, "loss": float(solution.stats.objective), "accepted": figures["accepted"]}
                | {"rate": figures["backbone_rate"], "scale before": before, "scale": scale(state)}
            )
    return state


def main() -> None:
    """Train with each backbone, print what guard and scale do, and the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--backbones", nargs="*", choices=list(BACKBONES), default=list(BACKBONES))
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--first-scale", type=float, default=SCALE, help="of Mechanic")
    parser.add_argument("--not-limited", action="store_true", help="no limit of steps")
    args = parser.parse_args()
    rows, console = digits(), Console()
    parts = cf.Alternation(largest_step=None) if args.not_limited else cf.Alternation()
    table = Table(title="digits")
    for column in ("backbone", "accuracy, %", "rejected solves", "guard's rate", "Mechanic's scale"):
        table.add_column(column, justify="left" if column == "backbone" else "right")
    for name in args.backbones:
        tx = BACKBONES[name]()
        if name == "mechanic":
            tx = optax.contrib.mechanize(optax.adam(1.0), s_init=args.first_scale)

        def tell(row: dict[str, Any], name: str = name) -> None:
            said = {key: f"{value:.3g}" if isinstance(value, float) else str(value) for key, value in row.items()}
            console.print(f"{name}: {', '.join(f'{key} {value}' for key, value in said.items())}", highlight=False)

        state = alternate(create(tx, rows, alternation=parts), rows, args.epochs, tell)
        figures, learned = state.figures, scale(state)
        cells = [f"{accuracy(state, rows):.1f}", str(figures["rejections"]), f"{figures['backbone_rate']:.2g}"]
        table.add_row(name, *cells, "–" if learned is None else f"{learned:.2g}")
    console.print(table)


if __name__ == "__main__":
    main()
