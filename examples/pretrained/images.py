"""Fine-tune an image model: EfficientNet-Lite0 in linen, from its safetensors file to a classifier of flowers.

    python examples/pretrained/images.py --weights DIR --data-dir DIR
    python examples/pretrained/images.py

DIR of the weights has the ``model.safetensors`` of EfficientNet-Lite0 with the names of PyTorch; with ``reference.npz``
beside it the port is checked. DIR of the data has TFDS's ``flowers128``, or another set of images (``--dataset``).
Without them a small model with random weights sees scikit-learn's digits.

Some images of each class (``--shots``) go through the model once; their features are kept. A linear probe and a solved
head cost seconds from there. Then the backbone is trained too, on images that are shifted and mirrored: by LP-FT (the
probe, then Adam on everything), and by CRONOS-AM (Adam on the backbone, the head solved for). Batch norms stay as they
were trained, or take the statistics of the batch (``--norms batch``). Ends with a table, and a picture of accuracy
against time.
"""

import argparse
import dataclasses
import functools
import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from alternatives import Curve, Results, few, layer_of, probe_of
from flax.training.train_state import TrainState
from rich.console import Console
from safetensors.numpy import load_file
from sklearn.datasets import load_digits

import cronos_flax as cf
from cronos_flax.compare.data import load_tfds

BATCH = 32
ON_CPU = jax.default_backend() == "cpu"

# ------------------------------------------------------------------------------------------------ the model

LITE0 = (  # repeats, kernel, stride, expansion, channels
    (1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)  # fmt: skip
SMALL = (1, 3, 1, 1, 8), (1, 3, 2, 4, 16)


class Block(nn.Module):
    """Expand the channels, convolve each by itself, project; around it the input is added if shapes are the same."""

    kernel: int
    stride: int
    expansion: int
    channels: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Images of ``channels`` channels, smaller by ``stride``."""
        y, wide = x, x.shape[-1] * self.expansion
        size, stride = (self.kernel,) * 2, (self.stride,) * 2
        if self.expansion > 1:
            y = nn.relu6(norm("expand_norm", train)(nn.Conv(wide, (1, 1), use_bias=False, name="expand")(y)))
        each: dict[str, Any] = {"feature_group_count": wide, "conv_general_dilated": by_shifts if ON_CPU else None}
        depthwise = nn.Conv(wide, size, stride, use_bias=False, name="depthwise", **each)
        y = nn.relu6(norm("depthwise_norm", train)(depthwise(y)))
        y = norm("project_norm", train)(nn.Conv(self.channels, (1, 1), use_bias=False, name="project")(y))
        return x + y if x.shape == y.shape else y


def by_shifts(x: jax.Array, kernel: jax.Array, strides: tuple, padding: str, **_: Any) -> jax.Array:
    """A convolution of each channel by itself, as a sum of shifted images: on a CPU faster than XLA's convolution.

    Args:
        x: images ``(n, height, width, channels)``.
        kernel: of shape ``(rows, columns, 1, channels)``.
        strides: for rows and columns.
        padding: "SAME" or "VALID".
    """
    rows, columns = kernel.shape[:2]
    down, right = strides
    pads = jax.lax.padtype_to_pads(x.shape[1:3], (rows, columns), strides, padding)
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    height, width = x.shape[1] - rows + 1, x.shape[2] - columns + 1
    places = itertools.product(range(rows), range(columns))
    shifted = (x[:, i : i + height : down, j : j + width : right] * kernel[i, j, 0] for i, j in places)
    return functools.reduce(jnp.add, shifted)


def norm(name: str, train: bool) -> nn.BatchNorm:
    """A batch norm as EfficientNet has it."""
    return nn.BatchNorm(use_running_average=not train, momentum=0.99, epsilon=1e-3, name=name)


class Lite(nn.Module):
    """EfficientNet-Lite.

    Args:
        stages: repeats, kernel, stride, expansion and channels of the stages.
        stem: channels of the first convolution.
        top: channels of the last one.
        classes: number of outputs.
    """

    stages: tuple[tuple[int, int, int, int, int], ...] = LITE0
    stem: int = 32
    top: int = 1280
    classes: int = 1000

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Logits ``(n, classes)`` of images ``(n, height, width, channels)`` with values 0 … 255."""
        x = (images.astype(jnp.float32) - 127) / 128
        x = nn.relu6(norm("stem_norm", train)(nn.Conv(self.stem, (3, 3), (2, 2), use_bias=False, name="stem")(x)))
        number = 0
        for repeats, kernel, stride, expansion, channels in self.stages:
            for i in range(repeats):
                x = Block(kernel, stride if i == 0 else 1, expansion, channels, name=f"block_{number}")(x, train)
                number += 1
        x = nn.relu6(norm("top_norm", train)(nn.Conv(self.top, (1, 1), use_bias=False, name="top")(x)))
        return nn.Dense(self.classes, name="fc")(x.mean(axis=(1, 2)))


# ------------------------------------------------------------------------------------------------ weights from the file

PARTS = {  # a layer of ours, and its name in the file
    "stem": "_conv_stem",
    "stem_norm": "_bn0",
    "expand": "_expand_conv",
    "expand_norm": "_bn0",
    "depthwise": "_depthwise_conv",
    "depthwise_norm": "_bn1",
    "project": "_project_conv",
    "project_norm": "_bn2",
    "top": "_conv_head",
    "top_norm": "_bn1",
    "fc": "_fc",
    "kernel": "weight",  # with its axes in another order
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}
AXES = {
    2: (1, 0),
    4: (2, 3, 1, 0),
}  # of a kernel: PyTorch's (out, in, height, width) as Flax's (height, width, in, out)
UNUSED = ("num_batches_tracked",)


def load(path: Path, like: Any) -> dict[str, Any]:
    """The variables of :class:`Lite` from a file; every tensor of the file finds its place or is ``UNUSED``.

    Args:
        path: of the file.
        like: the variables, or their shapes.
    """
    tensors, found = load_file(path), {}
    for place, leaf in flax.traverse_util.flatten_dict(like).items():
        parts = (part.replace("block_", "_blocks.") for part in place[1:])
        name = ".".join(PARTS.get(part, part) for part in parts)
        value = tensors.pop(name)
        value = value.transpose(AXES[value.ndim]) if place[-1] == "kernel" else value
        if value.shape != leaf.shape:
            raise ValueError(f"{name} has shape {value.shape}, and the model wants {leaf.shape}")
        found[place] = jnp.asarray(value)
    if left := [name for name in tensors if not name.endswith(UNUSED)]:
        raise ValueError(f"the model has no place for {', '.join(left)}")
    return flax.traverse_util.unflatten_dict(found)


def largest_difference(model: Lite, variables: Any, reference: Path) -> float:
    """Of the pooled features and the logits of the reference file and ours, relative to the largest of each."""
    theirs = np.load(reference)
    logits, seen = jax.jit(lambda v, x: model.apply(v, x, capture_intermediates=lambda m, _: m.name == "top_norm"))(
        variables, theirs["images"]
    )
    features = nn.relu6(seen["intermediates"]["top_norm"]["__call__"][0]).mean(axis=(1, 2))
    pairs = (features, theirs["features"]), (logits, theirs["logits"])
    return max(float(np.max(np.abs(ours - right)) / np.max(np.abs(right))) for ours, right in pairs)


# ------------------------------------------------------------------------------------------------ data


@dataclasses.dataclass
class Augmented:
    """Batches of random rows, shifted by up to an eighth of the width and, where that changes no class, mirrored.

    Each reading of it draws anew. A batch has ``BATCH`` rows.
    """

    images: np.ndarray
    labels: np.ndarray
    mirrored: bool
    rng: np.random.Generator

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for rows in self.rng.permutation(len(self.images))[: len(self) * BATCH].reshape(-1, BATCH):
            yield np.stack([self._changed(image) for image in self.images[rows]]), self.labels[rows]

    def __len__(self) -> int:
        return len(self.images) // BATCH

    def _changed(self, image: np.ndarray) -> np.ndarray:
        most = image.shape[0] // 8
        down, right = self.rng.integers(0, 2 * most + 1, 2)
        wide = np.pad(image, ((most, most), (most, most), (0, 0)), mode="edge")
        image = wide[down : down + image.shape[0], right : right + image.shape[1]]
        return image[:, ::-1] if self.mirrored and self.rng.random() < 0.5 else image


def digits() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's digits as images of 32 × 32 pixels."""
    data = load_digits()
    return (data.images * 15.9).astype("uint8").repeat(4, 1).repeat(4, 2)[..., None], data.target


# ------------------------------------------------------------------------------------------------ training


class ProbedState(TrainState):
    """Flax's train state with running statistics, for LP-FT."""

    model_state: Any


def curve(history: list[dict[str, float]], start: float) -> Curve:
    """Seconds and test accuracy after each epoch of ``cf.train``."""
    return [(start + row["seconds"], 100 * row["test_accuracy"]) for row in history if "test_accuracy" in row]


# ------------------------------------------------------------------------------------------------ the page


def options() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--weights", type=Path, help="directory of the weights; a small random model without it")
    parser.add_argument("--data-dir", type=Path, help="directory of prepared TFDS sets; digits without it")
    parser.add_argument("--dataset", default="flowers128", help="name of the TFDS set")
    parser.add_argument("--cache", type=Path, help="directory for the features, which a second run finds there")
    parser.add_argument("--shots", type=int, default=40, help="training images of each class; 0 for all")
    parser.add_argument("--test-rows", type=int, default=400, help="most test images")
    parser.add_argument("--hidden", type=int, default=256, help="neurons of the solved head")
    parser.add_argument("--epochs", type=int, default=2, help="of fine-tuning")
    parser.add_argument("--rate", type=float, default=3e-4, help="peak rate of AdamW")
    parser.add_argument("--norms", default="running", choices=["running", "batch"], help="statistics of batch norms")
    parser.add_argument("--beta", type=float, help="weight decay of the head; chosen on held-out rows without it")
    parser.add_argument("--seed", type=int, default=0, help="of the draw of training images")
    parser.add_argument("--out", type=Path, default=Path("images.png"), help="path of the picture")
    return parser


def main() -> None:
    """Load, check, cache, solve, fine-tune; print the table, save the picture."""
    parser = options()
    args, console = parser.parse_args(), Console()
    if args.weights is not None and args.data_dir is None:
        parser.error("--weights needs --data-dir: a model of photographs sees no digits")

    # The data and the model
    if args.data_dir is None:
        images, labels = digits()
        pool, tested = (images[400:], labels[400:]), (images[:400], labels[:400])
    else:
        pool, tested = (load_tfds(args.dataset, split, args.data_dir) for split in ("train", "test"))
    chosen, some = few(pool[1], args.shots, args.seed), few(tested[1], 0, 0)[: args.test_rows]
    x, y, x_test, y_test = pool[0][chosen], pool[1][chosen], tested[0][some], tested[1][some]
    classes = int(y.max()) + 1
    if args.weights is None:
        original = Lite(SMALL, 8, 64)
        pretrained = jax.jit(original.init)(jax.random.key(0), x[:1])
    else:
        original = Lite()
        shapes = jax.eval_shape(original.init, jax.random.key(0), jnp.zeros((1, *x.shape[1:])))
        pretrained = load(args.weights / "model.safetensors", shapes)
        if (args.weights / "reference.npz").exists():
            difference = largest_difference(original, pretrained, args.weights / "reference.npz")
            console.print(f"the port agrees with the reference: features and logits to {difference:.1e}")
            assert difference < 1e-3

    # One pass through the backbone; a second run with --cache finds it done
    model = cf.graft(original, at="fc", hidden=args.hidden, features=classes)
    variables = cf.graft_variables(model, pretrained, jax.random.key(args.seed), x[:1])
    head = cf.find_head(model, variables, x[:BATCH], train=False, statistics="running")
    console.print(head)
    began = time.perf_counter()
    kept = None if args.cache is None else args.cache / f"{args.dataset}-{args.shots}-{args.seed}"
    features = cf.gather_features(head, variables, (x, y), cache=kept)
    passed = time.perf_counter() - began
    seen, results = cf.gather_features(head, variables, (x_test, y_test)), Results(console)

    # What costs seconds from here: a linear probe with its strength chosen, and a solved head with its weight decay
    began = time.perf_counter()
    probe = probe_of(features.X, features.y)
    probed = passed + time.perf_counter() - began
    results.add("linear probe", [(probed, 100 * probe.score(seen.X, seen.y))])

    began = time.perf_counter()
    solver = cf.Cronos(loss="softmax", beta="path" if args.beta is None else args.beta)
    fitted, solution = cf.fit_head(head, variables, features, solver=solver)
    solved = passed + time.perf_counter() - began
    right = cf.predict(head.read(fitted), jnp.asarray(seen.X)).argmax(1) == seen.y
    results.add("solved head", [(solved, 100 * float(np.mean(right)))])

    # The backbone too: from the probe by Adam on everything, and from the solved head by CRONOS-AM
    batches = Augmented(x, y, args.data_dir is not None, np.random.default_rng(0))
    steps = args.epochs * len(batches)
    adam = optax.adamw(optax.warmup_cosine_decay_schedule(0, args.rate, steps // 10, steps + 1))
    how: dict[str, Any] = {"epochs": args.epochs, "loss": "softmax", "validation": {"test": (x_test, y_test)}}
    how |= {"train_kwargs": {"train": args.norms == "batch"}, "eval_kwargs": {"train": False}}

    linear = original.clone(classes=classes)
    fc = dict(zip(("kernel", "bias"), (jnp.asarray(part, jnp.float32) for part in layer_of(probe)), strict=True))
    statistics = {"batch_stats": pretrained["batch_stats"]}
    state = ProbedState.create(
        apply_fn=linear.apply, params={**pretrained["params"], "fc": fc}, tx=adam, model_state=statistics
    )
    _, history = cf.train(state, batches, **how)
    results.add("LP-FT", curve(history, probed), after="linear probe")

    ours = cf.CronosTrainState.create(
        apply_fn=model.apply,
        params=fitted["params"],
        tx=adam,
        head=cf.find_head(model, fitted, x[:BATCH], train=False, statistics=args.norms),
        solver=dataclasses.replace(solver, beta=float(solution.stats.beta)),
        model_state={"batch_stats": fitted["batch_stats"]},
    )
    batches.rng = np.random.default_rng(0)
    ours, history = cf.train(ours, batches, solve_data=(x, y), **how)
    results.add("CRONOS-AM", curve(history, solved), after="solved head")

    title = f"{'digits' if args.data_dir is None else args.dataset}: {len(x):,} images, {classes} classes"
    results.show(title)
    console.print(f"guard: {ours.figures}")
    results.draw(title, args.out)


if __name__ == "__main__":
    main()
