"""Fine-tune a sentence encoder: MiniLM (BERT) in NNX, from its safetensors file to a classifier of bank queries.

    python examples/pretrained/text.py --weights DIR --data-dir DIR
    python examples/pretrained/text.py

DIR of the weights has ``config.json``, ``tokenizer.json`` and ``model.safetensors`` of a BERT sentence encoder, such as
all-MiniLM-L6-v2; with ``reference.json`` and ``reference_embeddings.npy`` beside them the port is checked. DIR of the
data has TFDS's ``banking77``. Without them a small encoder with random weights reads made-up sentences.

Texts of a few examples per class (``--shots``) go through the encoder once; their features are kept. A linear probe and
a solved head cost seconds from there. Then the encoder is trained too: by LP-FT (the probe, then Adam on everything),
and by CRONOS-AM (Adam on the encoder, the head solved for). Ends with a table, and a picture of accuracy against time.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from alternatives import Curve, Results, few, layer_of, probe_of
from flax import nnx
from rich.console import Console
from safetensors.numpy import load_file
from tokenizers import Tokenizer, models, pre_tokenizers

import cronos_flax as cf

LONGEST, BATCH, PASS_BATCH = 128, 32, 64  # tokens; texts of a gradient step, and of a pass for features
Batch = tuple[jax.Array, jax.Array, np.ndarray]  # token ids (n, length), mask (n, length), labels (n,)

# ------------------------------------------------------------------------------------------------ the model


class Layer(nnx.Module):
    """A layer of BERT: attention and two fully connected layers, each with a residual and a norm after it."""

    def __init__(self, config: dict[str, Any], rngs: nnx.Rngs) -> None:
        width, wide, eps = config["hidden_size"], config["intermediate_size"], config["layer_norm_eps"]
        self.heads = config["num_attention_heads"]
        self.query, self.key, self.value, self.mixed = (nnx.Linear(width, width, rngs=rngs) for _ in range(4))
        self.up, self.down = nnx.Linear(width, wide, rngs=rngs), nnx.Linear(wide, width, rngs=rngs)
        self.norm1, self.norm2 = (nnx.LayerNorm(width, epsilon=eps, rngs=rngs) for _ in range(2))

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """Tokens ``(n, length, width)``."""
        q, k, v = (f(x).reshape(*x.shape[:2], self.heads, -1) for f in (self.query, self.key, self.value))
        seen = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None, None, :].astype(bool))
        x = self.norm1(x + self.mixed(seen.reshape(x.shape)))
        return self.norm2(x + self.down(nnx.gelu(self.up(x), approximate=False)))


class Encoder(nnx.Module):
    """BERT without its pooler; ``config`` is that of ``config.json``."""

    def __init__(self, config: dict[str, Any], rngs: nnx.Rngs) -> None:
        width = config["hidden_size"]
        self.words = nnx.Embed(config["vocab_size"], width, rngs=rngs)
        self.places = nnx.Embed(config["max_position_embeddings"], width, rngs=rngs)
        self.kinds = nnx.Embed(config["type_vocab_size"], width, rngs=rngs)
        self.norm = nnx.LayerNorm(width, epsilon=config["layer_norm_eps"], rngs=rngs)
        self.layers = nnx.List([Layer(config, rngs) for _ in range(config["num_hidden_layers"])])

    def __call__(self, ids: jax.Array, mask: jax.Array) -> jax.Array:
        """Tokens ``(n, length, width)`` of ids and mask ``(n, length)``."""
        x = self.words(ids) + self.places(jnp.arange(ids.shape[1])) + self.kinds(jnp.zeros_like(ids))
        x = self.norm(x)
        for layer in self.layers:
            x = layer(x, mask)
        return x


def sentence(tokens: jax.Array, ids: jax.Array, mask: jax.Array) -> jax.Array:
    """The mean of the tokens, of unit length: the ``pool`` of the head."""
    del ids
    x = jnp.sum(tokens * mask[..., None], 1) / jnp.sum(mask, 1)[:, None]
    return x / jnp.linalg.norm(x, axis=1, keepdims=True)


class Probed(nnx.Module):
    """The encoder with one layer on it, for LP-FT."""

    def __init__(self, encoder: Encoder, kernel: np.ndarray, bias: np.ndarray) -> None:
        self.encoder = nnx.clone(encoder)
        self.out = nnx.Linear(*kernel.shape, kernel_init=nnx.initializers.zeros, rngs=nnx.Rngs(0))
        self.out.kernel, self.out.bias = nnx.Param(jnp.float32(kernel)), nnx.Param(jnp.float32(bias))

    def __call__(self, ids: jax.Array, mask: jax.Array) -> jax.Array:
        """Logits ``(n, classes)``."""
        return self.out(sentence(self.encoder(ids, mask), ids, mask))


# ------------------------------------------------------------------------------------------------ weights from the file

PARTS = {  # a module of ours, and its name in the file
    "words": "embeddings.word_embeddings",
    "places": "embeddings.position_embeddings",
    "kinds": "embeddings.token_type_embeddings",
    "norm": "embeddings.LayerNorm",
    "layers": "encoder.layer",
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "mixed": "attention.output.dense",
    "norm1": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "norm2": "output.LayerNorm",
    "embedding": "weight",
    "scale": "weight",
    "kernel": "weight",  # transposed
    "bias": "bias",
}
UNUSED = ("pooler.", "embeddings.position_ids")


def load(path: Path, config: dict[str, Any]) -> Encoder:
    """The encoder with the weights of a file, in float32; every tensor of the file finds its place or is ``UNUSED``."""
    tensors = load_file(path)
    encoder = nnx.eval_shape(lambda: Encoder(config, nnx.Rngs(0)))  # shapes only
    for place, parameter in nnx.to_flat_state(nnx.state(encoder, nnx.Param)):
        name = ".".join(PARTS.get(str(part), str(part)) for part in place)
        value = tensors.pop(name).astype("float32")
        value = value.T if place[-1] == "kernel" else value
        if value.shape != parameter.shape:
            raise ValueError(f"{name} has shape {value.shape}, and the model wants {parameter.shape}")
        parameter.set_value(jnp.asarray(value))
    if left := [name for name in tensors if not name.startswith(UNUSED)]:
        raise ValueError(f"the model has no place for {', '.join(left)}")
    return encoder


def least_cosine(encoder: Encoder, tokenizer: Tokenizer, weights: Path) -> float:
    """Between the sentences of the reference file and ours; the tokens must be the same."""
    reference = json.loads((weights / "reference.json").read_text())
    ids = [text.ids for text in tokenizer.encode_batch(reference["sentences"])]
    if ids != reference["input_ids"]:
        raise ValueError("the tokens are not those of reference.json")
    theirs = np.load(weights / "reference_embeddings.npy")
    ours = nnx.jit(lambda encoder, ids, mask: sentence(encoder(ids, mask), ids, mask))(encoder, *padded(ids))
    return float(np.min(np.sum(ours * theirs, 1) / np.linalg.norm(theirs, axis=1)))


# ------------------------------------------------------------------------------------------------ data


def padded(ids: list[list[int]]) -> tuple[jax.Array, jax.Array]:
    """Ids and mask ``(n, length)``; the length is a power of two, so that few programs are compiled."""
    length = 16
    while length < max(map(len, ids)):
        length *= 2
    out, mask = (np.zeros((len(ids), length), kind) for kind in ("int32", "float32"))
    for i, row in enumerate(ids):
        out[i, : len(row)], mask[i, : len(row)] = row, 1
    return jnp.asarray(out), jnp.asarray(mask)


def batches(ids: list[list[int]], labels: np.ndarray, size: int, order: np.ndarray) -> Iterator[Batch]:
    """Texts in this order, so many at a time; those that do not fill a batch too."""
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        yield *padded([ids[i] for i in rows]), labels[rows]


def by_length(ids: list[list[int]], labels: np.ndarray) -> list[Batch]:
    """All texts, short ones first: little padding."""
    order = np.argsort([len(row) for row in ids], kind="stable")
    return list(batches(ids, labels, PASS_BATCH, order))


def unpack(batch: Batch) -> tuple[tuple[jax.Array, jax.Array], np.ndarray]:
    """The model's arguments and the targets."""
    return batch[:2], batch[2]


def banking(data_dir: Path, split: str) -> tuple[list[str], np.ndarray]:
    """Queries and their intents."""
    import tensorflow_datasets as tfds

    source = tfds.data_source("banking77", split=split, data_dir=str(data_dir))
    examples = source.__getitems__(range(len(source)))
    return [example["text"].decode() for example in examples], np.array([example["label"] for example in examples])


def made_up(rows: int, seed: int) -> tuple[list[str], np.ndarray]:
    """Sentences of five intents: each has words that it uses more often, and half of the words are anybody's."""
    rng = np.random.default_rng(seed)
    theirs = [[f"{stem}{i}" for i in range(12)] for stem in ("card", "loan", "fee", "cash", "app")]
    anybody = [f"word{i}" for i in range(60)]
    labels = rng.integers(0, len(theirs), rows)
    texts = [
        " ".join(rng.choice(theirs[label] if rng.random() < 0.5 else anybody) for _ in range(12)) for label in labels
    ]
    return texts, labels


SMALL = {
    "hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 130,
    "max_position_embeddings": 16, "type_vocab_size": 1, "layer_norm_eps": 1e-12,
}  # fmt: skip


def small_tokenizer(texts: list[str]) -> Tokenizer:
    """One token for each word."""
    words = sorted({word for text in texts for word in text.split()})
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["[UNK]", *words])}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


# ------------------------------------------------------------------------------------------------ training


@nnx.jit
def step(model: nnx.Module, optimizer: nnx.Optimizer, ids: jax.Array, mask: jax.Array, labels: Any) -> None:
    """One gradient step."""

    def loss(model: Any) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(model(ids, mask), labels).mean()

    optimizer.update(model, nnx.grad(loss)(model))


@nnx.jit
def predicted(model: Any, ids: jax.Array, mask: jax.Array) -> jax.Array:
    """Labels ``(n,)``."""
    return model(ids, mask).argmax(1)


def accuracy(model: nnx.Module, test: list[Batch]) -> float:
    """In %."""
    right = sum(np.sum(np.asarray(predicted(model, ids, mask)) == labels) for ids, mask, labels in test)
    return 100 * right / sum(len(labels) for *_, labels in test)


def fine_tune(
    model: nnx.Module,
    optimizer: nnx.Optimizer,
    ids: list[list[int]],
    labels: np.ndarray,
    epochs: int,
    test: list[Batch],
    start: float,
    solve: Callable[[], Any] | None = None,
) -> Curve:
    """Epochs of gradient steps, with a solve after each if there is one; accuracy after each, not counted as time."""
    curve, rng = [], np.random.default_rng(0)
    seconds, began = start, time.perf_counter()
    for _ in range(epochs):
        order = rng.permutation(len(ids))[: len(ids) // BATCH * BATCH]
        pools = [
            sorted(order[i : i + 8 * BATCH], key=lambda row: len(ids[row])) for i in range(0, len(order), 8 * BATCH)
        ]
        for batch in batches(ids, labels, BATCH, np.concatenate(pools)):  # of similar length: little padding
            step(model, optimizer, *batch)
        if solve is not None:
            solve()
        jax.block_until_ready(nnx.state(model))
        seconds += time.perf_counter() - began
        curve.append((seconds, accuracy(model, test)))
        began = time.perf_counter()
    return curve


def rate(args: argparse.Namespace, rows: int) -> optax.Schedule:
    """Warm-up for a tenth of the steps, then a cosine to zero."""
    steps = args.epochs * (rows // BATCH)
    return optax.warmup_cosine_decay_schedule(0, args.rate, steps // 10, steps + 1)


# ------------------------------------------------------------------------------------------------ the page


def options() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--weights", type=Path, help="directory of the encoder; a small random one without it")
    parser.add_argument("--data-dir", type=Path, help="directory of prepared TFDS sets; made-up sentences without it")
    parser.add_argument("--cache", type=Path, help="directory for the features, which a second run finds there")
    parser.add_argument("--shots", type=int, default=10, help="training texts of each class; 0 for all")
    parser.add_argument("--test-rows", type=int, default=600, help="most test texts")
    parser.add_argument("--hidden", type=int, default=512, help="neurons of the solved head")
    parser.add_argument("--epochs", type=int, default=4, help="of fine-tuning")
    parser.add_argument("--rate", type=float, default=1e-4, help="peak rate of AdamW")
    parser.add_argument("--beta", type=float, help="weight decay of the head; chosen on held-out rows without it")
    parser.add_argument("--seed", type=int, default=0, help="of the draw of training texts")
    parser.add_argument("--out", type=Path, default=Path("text.png"), help="path of the picture")
    return parser


def main() -> None:
    """Load, check, cache, solve, fine-tune; print the table, save the picture."""
    parser = options()
    args, console = parser.parse_args(), Console()
    if args.weights is not None and args.data_dir is None:
        parser.error("--weights needs --data-dir: an encoder of English reads no made-up sentences")

    # The data and the encoder
    if args.data_dir is None:
        (texts, labels), (test_texts, test_labels) = made_up(2000, 0), made_up(args.test_rows, 1)
    else:
        (texts, labels), (test_texts, test_labels) = (banking(args.data_dir, split) for split in ("train", "test"))
    if args.weights is None:
        tokenizer = small_tokenizer(texts)
        encoder = Encoder(
            {**SMALL, "vocab_size": tokenizer.get_vocab_size(), "max_position_embeddings": LONGEST}, nnx.Rngs(0)
        )
    else:
        config = json.loads((args.weights / "config.json").read_text())
        tokenizer = Tokenizer.from_file(str(args.weights / "tokenizer.json"))
        tokenizer.no_padding()
        encoder = load(args.weights / "model.safetensors", config)
        if (args.weights / "reference.json").exists():
            tokenizer.enable_truncation(json.loads((args.weights / "reference.json").read_text())["max_length"])
            cosine = least_cosine(encoder, tokenizer, args.weights)
            console.print(f"the port agrees with the reference: cosine at least {cosine:.6f}")
            assert cosine >= 0.9999
    tokenizer.enable_truncation(LONGEST)
    chosen = few(labels, args.shots, args.seed)
    tested = np.random.default_rng(0).permutation(len(test_labels))[: args.test_rows]
    ids, labels = [text.ids for text in tokenizer.encode_batch([texts[i] for i in chosen])], labels[chosen]
    test_ids = [text.ids for text in tokenizer.encode_batch([test_texts[i] for i in tested])]
    train, test = by_length(ids, labels), by_length(test_ids, test_labels[tested])
    classes, results = int(labels.max()) + 1, Results(console)

    # One pass through the encoder; a second run with --cache finds it done
    width = encoder.words.embedding.shape[1]
    model = cf.nnx.graft(
        encoder, hidden=args.hidden, features=classes, in_features=width, pool=sentence, rngs=nnx.Rngs(args.seed)
    )
    head = cf.nnx.find_head(model, *train[0][:2])
    console.print(head)
    began = time.perf_counter()
    kept = None if args.cache is None else args.cache / f"train-{args.shots}-{args.seed}"
    features = cf.gather_features(head, model, train, unpack=unpack, cache=kept)
    passed = time.perf_counter() - began
    seen = cf.gather_features(head, model, test, unpack=unpack)

    # What costs seconds from here: a linear probe with its strength chosen, and a solved head with its weight decay
    began = time.perf_counter()
    probe = probe_of(features.X, features.y, np.logspace(-1, 3, 5))
    probed = passed + time.perf_counter() - began
    results.add("linear probe", [(probed, 100 * probe.score(seen.X, seen.y))])

    began = time.perf_counter()
    solver = cf.Cronos(loss="softmax", beta="path" if args.beta is None else args.beta)
    solution = cf.nnx.fit_head(head, model, features, solver=solver)
    solved = passed + time.perf_counter() - began
    results.add("solved head", [(solved, accuracy(model, test))])

    # The encoder too: from the probe by Adam on everything, and from the solved head by CRONOS-AM
    adam = optax.adamw(rate(args, len(ids)))
    linear = Probed(encoder, *layer_of(probe))
    points = fine_tune(linear, nnx.Optimizer(linear, adam, wrt=nnx.Param), ids, labels, args.epochs, test, probed)
    results.add("LP-FT", points, after="linear probe")
    solver = dataclasses.replace(solver, beta=float(solution.stats.beta))
    optimizer = cf.nnx.CronosOptimizer(model, adam, head=head, solver=solver)
    optimizer.solve_head(model, features)  # the guard knows this state
    points = fine_tune(
        model, optimizer, ids, labels, args.epochs, test, solved,
        solve=lambda: optimizer.solve_head(model, train, unpack=unpack),
    )  # fmt: skip
    results.add("CRONOS-AM", points, after="solved head")

    title = f"{'made-up sentences' if args.data_dir is None else 'banking77'}: {len(ids):,} texts, {classes} classes"
    results.show(title)
    console.print(f"guard: {optimizer.figures}")
    results.draw(title, args.out)


if __name__ == "__main__":
    main()
