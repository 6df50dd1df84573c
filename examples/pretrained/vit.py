"""Fine-tune somebody else's model: a Vision Transformer in NNX, from a Hugging Face directory to a classifier.

    python examples/pretrained/vit.py --weights DIR --data-dir DIR
    python examples/pretrained/vit.py

DIR of the weights has ``config.json`` and ``model.safetensors`` of a ViT as Hugging Face writes them, with a classifier
or without. Images are normalised as ``preprocessor_config.json`` says; without it they go from -1 to 1. With
``reference.npz`` there too (``pixel_values`` and ``output`` of Hugging Face's model) the port is checked. DIR of the
data has a TFDS set of images (``--dataset``); without it there are scikit-learn's digits. Without weights the page
writes such a directory, of a tiny ViT, and reads it. **Its weights are random, not pretrained: the table then shows how
the page runs, not how good a pretrained ViT is.**

The model is in the style of Google's Bonsai and knows nothing of this package: ``cf.nnx.graft`` puts the head on the
class token. Some images of each class (``--shots``) go through the model once; their features are kept. A linear probe
and a solved head cost seconds from there. Then the backbone is trained too: by LP-FT (the probe, then Adam on
everything), and by CRONOS-AM (Adam on the backbone, the head solved for). Ends with a table, and a picture of accuracy
against time.
"""

import argparse
import dataclasses
import functools
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax
from alternatives import Curve, Results, few, layer_of, probe_of
from flax import nnx
from rich.console import Console
from safetensors.numpy import load_file, save_file
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegressionCV

import cronos_flax as cf
from cronos_flax.compare.data import load_tfds

BATCH = 32

# ------------------------------------------------------------------------------------------------ the model


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """The settings of Hugging Face's files under their names; what a file does not say is as in ViT-B/16."""

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    image_size: int = 224
    patch_size: int = 16
    num_channels: int = 3
    layer_norm_eps: float = 1e-12
    qkv_bias: bool = True
    image_mean: tuple[float, ...] = (0.5,)
    image_std: tuple[float, ...] = (0.5,)

    @classmethod
    def tiny(cls) -> Self:
        """For a test, and for a page without weights."""
        return cls(64, 1, 4, 128, image_size=16, patch_size=4)

    @classmethod
    def from_directory(cls, directory: Path) -> Self:
        """What the two files of settings say; a model or images of another kind are refused."""
        files = directory / "config.json", directory / "preprocessor_config.json"
        found: dict[str, Any] = {}
        for file in files[: 1 + files[1].exists()]:
            found |= json.loads(file.read_text())
        for name, only in (("model_type", "vit"), ("hidden_act", "gelu"), ("do_normalize", True)):
            if found.get(name, only) != only:
                raise ValueError(f"{name} must be {only!r}, got {found[name]!r} in {directory}")
        known = {field.name for field in dataclasses.fields(cls)}
        lists = {name: tuple(value) for name, value in found.items() if isinstance(value, list)}
        settings: dict[str, Any] = {name: value for name, value in (found | lists).items() if name in known}
        return cls(**settings)


class Block(nnx.Module):
    """Attention and two fully connected layers, each with a norm before it and a residual around both."""

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs) -> None:
        width, wide, eps = config.hidden_size, config.intermediate_size, config.layer_norm_eps
        self.heads = config.num_attention_heads
        self.query, self.key, self.value = (
            nnx.Linear(width, width, use_bias=config.qkv_bias, rngs=rngs) for _ in range(3)
        )
        self.mixed, self.up = nnx.Linear(width, width, rngs=rngs), nnx.Linear(width, wide, rngs=rngs)
        self.down = nnx.Linear(wide, width, rngs=rngs)
        self.before, self.after = (nnx.LayerNorm(width, epsilon=eps, rngs=rngs) for _ in range(2))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Tokens ``(n, length, width)``."""
        y = self.before(x)
        q, k, v = (f(y).reshape(*y.shape[:2], self.heads, -1) for f in (self.query, self.key, self.value))
        x = x + self.mixed(jax.nn.dot_product_attention(q, k, v).reshape(x.shape))
        return x + self.down(nnx.gelu(self.up(self.after(x)), approximate=False))


class ViT(nnx.Module):
    """A Vision Transformer; with ``num_labels`` its last layer is one on the class token."""

    def __init__(self, config: ViTConfig, num_labels: int = 0, *, rngs: nnx.Rngs) -> None:
        width, patch = config.hidden_size, (config.patch_size,) * 2
        self.patches = nnx.Conv(config.num_channels, width, patch, patch, padding="VALID", rngs=rngs)
        self.cls_token = nnx.Param(jax.random.normal(rngs.params(), (1, 1, width)))
        tokens = 1 + (config.image_size // config.patch_size) ** 2
        self.places = nnx.Param(jax.random.normal(rngs.params(), (1, tokens, width)))
        self.layers = nnx.List([Block(config, rngs=rngs) for _ in range(config.num_hidden_layers)])
        self.norm = nnx.LayerNorm(width, epsilon=config.layer_norm_eps, rngs=rngs)
        self.classifier = nnx.Linear(width, num_labels, rngs=rngs) if num_labels else None

    def __call__(self, pixels: jax.Array) -> jax.Array:
        """Tokens ``(n, length, width)``, or logits ``(n, num_labels)``, of pixels ``(n, size, size, channels)``."""
        x = self.patches(pixels)
        x = x.reshape(len(x), -1, x.shape[-1])
        x = jnp.concatenate([jnp.broadcast_to(self.cls_token[...], (len(x), 1, x.shape[-1])), x], 1)
        x = x + self.places[...]
        for layer in self.layers:
            x = layer(x)
        x = self.norm(x)
        return x if self.classifier is None else self.classifier(x[:, 0])


def class_token(tokens: jax.Array, pixels: jax.Array) -> jax.Array:
    """The first token, which stands for the image: the ``pool`` of the head."""
    del pixels
    return tokens[:, 0]


# ------------------------------------------------------------------------------------------------ weights from the file

PARTS = {  # a part of ours, and its name in the file
    "patches": "embeddings.patch_embeddings.projection",
    "cls_token": "embeddings.cls_token",
    "places": "embeddings.position_embeddings",
    "layers": "encoder.layer",
    "before": "layernorm_before",
    "query": "attention.attention.query",
    "key": "attention.attention.key",
    "value": "attention.attention.value",
    "mixed": "attention.output.dense",
    "after": "layernorm_after",
    "up": "intermediate.dense",
    "down": "output.dense",
    "norm": "layernorm",
    "scale": "weight",
    "kernel": "weight",  # with its axes in another order
}
AXES = {2: (1, 0), 4: (2, 3, 1, 0)}  # of a kernel: PyTorch's (out, in, height, width) as (height, width, in, out)
UNUSED = ("pooler.", "embeddings.mask_token")


def name_of(place: tuple[Any, ...]) -> str:
    """The name of a parameter in the file, without the ``vit.`` of models that have a classifier."""
    return ".".join(PARTS.get(str(part), str(part)) for part in place)


def load(directory: Path, config: ViTConfig) -> ViT:
    """The model of a directory, in float32; each parameter has one tensor, and other tensors must be ``UNUSED``."""
    tensors: dict[str, np.ndarray] = {}
    for name, value in load_file(directory / "model.safetensors").items():
        if name.removeprefix("vit.") in tensors:
            raise ValueError(f"{name.removeprefix('vit.')} is in the file twice, with and without vit.")
        tensors[name.removeprefix("vit.")] = value
    labels = len(tensors.get("classifier.bias", ()))
    model = nnx.eval_shape(lambda: ViT(config, labels, rngs=nnx.Rngs(0)))  # shapes only
    wanted = {name_of(place): (place, leaf) for place, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    if missing := wanted.keys() - tensors.keys():
        raise ValueError(f"the file has no {', '.join(sorted(missing))}")
    if left := [name for name in tensors if name not in wanted and not name.startswith(UNUSED)]:
        raise ValueError(f"the model has no place for {', '.join(left)}")
    for name, (place, parameter) in wanted.items():
        value = tensors[name].astype("float32")
        value = value.transpose(AXES[value.ndim]) if place[-1] == "kernel" else value
        if value.shape != parameter.shape:
            raise ValueError(f"{name} has shape {value.shape}, and the model wants {parameter.shape}")
        parameter.set_value(jnp.asarray(value))
    return model


def write_random(directory: Path, config: ViTConfig) -> None:
    """What Hugging Face would write of a model that nobody has trained."""
    (directory / "config.json").write_text(json.dumps({"model_type": "vit", **dataclasses.asdict(config)}))
    tensors, rng = {}, np.random.default_rng(0)
    model = nnx.eval_shape(lambda: ViT(config, rngs=nnx.Rngs(0)))
    for place, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        value = rng.standard_normal(leaf.shape) if place[-1] not in ("scale", "bias") else np.zeros(leaf.shape)
        value += place[-1] == "scale"
        if place[-1] == "kernel":
            value = (value / np.sqrt(np.prod(leaf.shape[:-1]))).transpose(np.argsort(AXES[value.ndim]))
        tensors[f"vit.{name_of(place)}"] = np.ascontiguousarray(value, "float32")
    save_file(tensors, directory / "model.safetensors")


def largest_difference(model: ViT, reference: Path) -> float:
    """Of the outputs of the reference file and ours, relative to the largest."""
    theirs = np.load(reference)
    ours = nnx.jit(lambda model, pixels: model(pixels))(model, theirs["pixel_values"].transpose(0, 2, 3, 1))
    return float(np.max(np.abs(ours - theirs["output"])) / np.max(np.abs(theirs["output"])))


# ------------------------------------------------------------------------------------------------ data


@functools.partial(jax.jit, static_argnums=1)
def pixel_values(images: jax.Array, config: ViTConfig) -> jax.Array:
    """Images as the model wants them: of its size, grey ones in each channel, normalised."""
    size = len(images), config.image_size, config.image_size
    x = jax.image.resize(images.astype("float32") / 255, (*size, images.shape[-1]), "bilinear")
    x = jnp.broadcast_to(x, (*size, config.num_channels))
    return (x - jnp.array(config.image_mean)) / jnp.array(config.image_std)


@dataclasses.dataclass
class Batches:
    """Batches of pixel values and labels, made when they are read; with ``rng`` in an order that each reading draws."""

    images: np.ndarray
    labels: np.ndarray
    config: ViTConfig
    rng: np.random.Generator | None = None

    def __iter__(self) -> Iterator[tuple[jax.Array, np.ndarray]]:
        n = len(self.labels)
        order = np.arange(n) if self.rng is None else self.rng.permutation(n)[: n // BATCH * BATCH]
        for start in range(0, len(order), BATCH):
            rows = order[start : start + BATCH]
            yield pixel_values(self.images[rows], self.config), self.labels[rows]


def digits() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's digits as images of 8 × 8 pixels."""
    data = load_digits()
    return (data.images * 15.9).astype("uint8")[..., None], data.target


# ------------------------------------------------------------------------------------------------ training


def with_probe(model: ViT, probe: LogisticRegressionCV) -> ViT:
    """The model with a linear probe as its classifier, for LP-FT."""
    kernel, bias = layer_of(probe)
    model = nnx.clone(model)
    model.classifier = nnx.data(nnx.Linear(*kernel.shape, kernel_init=nnx.initializers.zeros, rngs=nnx.Rngs(0)))
    model.classifier.kernel.set_value(jnp.float32(kernel))
    model.classifier.bias = nnx.Param(jnp.float32(bias))
    return model


@nnx.jit
def step(model: nnx.Module, optimizer: nnx.Optimizer, pixels: jax.Array, labels: Any) -> None:
    """One gradient step."""

    def loss(model: Any) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(model(pixels), labels).mean()

    optimizer.update(model, nnx.grad(loss)(model))


@nnx.jit
def predicted(model: Any, pixels: jax.Array) -> jax.Array:
    """Labels ``(n,)``."""
    return model(pixels).argmax(1)


def accuracy(model: nnx.Module, test: Batches) -> float:
    """In %."""
    return 100 * sum(np.sum(np.asarray(predicted(model, x)) == y) for x, y in test) / len(test.labels)


def fine_tune(
    model: nnx.Module,
    optimizer: nnx.Optimizer,
    train: Batches,
    test: Batches,
    epochs: int,
    start: float,
    solve: Callable[[], Any] | None = None,
) -> Curve:
    """Epochs of gradient steps, with a solve after each if there is one; accuracy after each, not counted as time."""
    curve, train = [], dataclasses.replace(train, rng=np.random.default_rng(0))
    seconds, began = start, time.perf_counter()
    for _ in range(epochs):
        for pixels, labels in train:
            step(model, optimizer, pixels, labels)
        if solve is not None:
            solve()
        jax.block_until_ready(nnx.state(model))
        seconds += time.perf_counter() - began
        curve.append((seconds, accuracy(model, test)))
        began = time.perf_counter()
    return curve


# ------------------------------------------------------------------------------------------------ the page


def options() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--weights", type=Path, help="directory of the model; a tiny random one without it")
    parser.add_argument("--data-dir", type=Path, help="directory of prepared TFDS sets; digits without it")
    parser.add_argument("--dataset", default="fashion_mnist", help="name of the TFDS set")
    parser.add_argument("--cache", type=Path, help="directory for the features, which a second run finds there")
    parser.add_argument("--shots", type=int, default=20, help="training images of each class; 0 for all")
    parser.add_argument("--test-rows", type=int, default=400, help="most test images")
    parser.add_argument("--hidden", type=int, default=128, help="neurons of the solved head")
    parser.add_argument("--epochs", type=int, default=4, help="of fine-tuning")
    parser.add_argument("--rate", type=float, default=1e-4, help="peak rate of AdamW")
    parser.add_argument("--beta", type=float, help="weight decay of the head; chosen on held-out rows without it")
    parser.add_argument("--seed", type=int, default=0, help="of the draw of training images")
    parser.add_argument("--out", type=Path, default=Path("vit.png"), help="path of the picture")
    return parser


def main() -> None:
    """Load, check, cache, solve, fine-tune; print the table, save the picture."""
    parser = options()
    args, console = parser.parse_args(), Console()
    if args.weights is not None and args.data_dir is None:
        parser.error("--weights needs --data-dir: a model of photographs sees no digits")

    # The model and the data
    with tempfile.TemporaryDirectory() as made:
        directory = args.weights or Path(made)
        if args.weights is None:
            write_random(directory, ViTConfig.tiny())
            console.print(
                "random weights, not pretrained: the table shows how this runs, not how good a pretrained ViT is"
            )
        config = ViTConfig.from_directory(directory)
        original = load(directory, config)
        if (directory / "reference.npz").exists():
            difference = largest_difference(original, directory / "reference.npz")
            console.print(f"the port agrees with the reference: outputs to {difference:.1e}")
            assert difference < 1e-3
    if args.data_dir is None:
        images, labels = digits()
        pool, tested = (images[400:], labels[400:]), (images[:400], labels[:400])
    else:
        pool, tested = (load_tfds(args.dataset, split, args.data_dir) for split in ("train", "test"))
    chosen = few(pool[1], args.shots, args.seed)
    some = np.random.default_rng(0).permutation(len(tested[1]))[: args.test_rows]
    train, test = Batches(pool[0][chosen], pool[1][chosen], config), Batches(tested[0][some], tested[1][some], config)
    classes, results = int(train.labels.max()) + 1, Results(console)

    # One pass through the backbone; a second run with --cache finds it done
    at: dict[str, Any] = {"at": "classifier"}
    if original.classifier is None:  # then the model gives tokens
        at = {"pool": class_token, "in_features": config.hidden_size}
    model = cf.nnx.graft(original, **at, hidden=args.hidden, features=classes, rngs=nnx.Rngs(args.seed))
    head = cf.nnx.find_head(model, next(iter(train))[0])
    console.print(head)
    began = time.perf_counter()
    kept = None if args.cache is None else args.cache / f"{args.dataset}-{args.shots}-{args.seed}"
    features = cf.gather_features(head, model, train, cache=kept)
    passed = time.perf_counter() - began
    seen = cf.gather_features(head, model, test)

    # What costs seconds from here: a linear probe with its strength chosen, and a solved head with its weight decay
    began = time.perf_counter()
    probe = probe_of(features.X, features.y)
    probed = passed + time.perf_counter() - began
    results.add("linear probe", [(probed, 100 * probe.score(seen.X, seen.y))])

    began = time.perf_counter()
    solver = cf.Cronos(loss="softmax", beta="path" if args.beta is None else args.beta)
    solution = cf.nnx.fit_head(head, model, features, solver=solver)
    solved = passed + time.perf_counter() - began
    results.add("solved head", [(solved, accuracy(model, test))])

    # The backbone too: from the probe by Adam on everything, and from the solved head by CRONOS-AM
    steps = args.epochs * (len(train.labels) // BATCH)
    adam = optax.adamw(optax.warmup_cosine_decay_schedule(0, args.rate, steps // 10, steps + 1))
    linear = with_probe(original, probe)
    points = fine_tune(linear, nnx.Optimizer(linear, adam, wrt=nnx.Param), train, test, args.epochs, probed)
    results.add("LP-FT", points, after="linear probe")
    solver = dataclasses.replace(solver, beta=float(solution.stats.beta))
    optimizer = cf.nnx.CronosOptimizer(model, adam, head=head, solver=solver)
    optimizer.solve_head(model, features)  # the guard knows this state
    points = fine_tune(
        model, optimizer, train, test, args.epochs, solved, solve=lambda: optimizer.solve_head(model, train)
    )
    results.add("CRONOS-AM", points, after="solved head")

    title = f"{'digits' if args.data_dir is None else args.dataset}: {len(chosen):,} images, {classes} classes"
    title += "; random weights" if args.weights is None else ""
    results.show(title)
    console.print(f"guard: {optimizer.figures}")
    results.draw(title, args.out)


if __name__ == "__main__":
    main()
