"""A white-box transformer as backbone: CRATE blocks, masked autoencoding, and a solved head on what they learnt.

    python examples/neighbours/crate_mae.py
    python examples/neighbours/crate_mae.py --data fashion_mnist --data-dir DIR --steps 1200

Without DIR, scikit-learn's digits; DIR has prepared TFDS sets. After Pai et al., "Masked Completion via Structured
Diffusion with White-Box Transformers" (ICLR 2024). Three in four patches are hidden: the encoder gets the others, the
decoder draws all. Then 1,000 labels are used, by a linear probe and by a solved head on the frozen encoder, each with
its strength chosen on held-out rows. Ends with their test accuracy, and with the compression term of each layer.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training.train_state import TrainState
from sklearn import linear_model, pipeline, preprocessing

import cronos_flax as cf
from cronos_flax.compare import data

WIDTH, HEADS, DEPTH, VISIBLE = 64, 4, (3, 2), 4  # blocks of encoder and decoder; patches that are not hidden, of 16
ETA, LAMBDA, EPS2 = 0.1, 0.1, 0.25  # of an ISTA step; squared distortion of a code word
STRENGTHS, RATIOS = (0.001, 0.01, 0.1, 1.0, 10.0), (0.03, 0.01, 3e-3, 1e-3, 3e-4)  # of probes and of solved heads
PATCH = {"digits": 2, "fashion_mnist": 7, "cifar10_airplane_automobile": 8}  # 16 patches of each image
Rows = tuple[np.ndarray, np.ndarray]  # images, about the mean image and in units of the deviation from it, and labels


class Attention(nn.Module):
    """``MSSA(Z) = Σ_k U_k (U_kᵀZ) softmax((U_kᵀZ)ᵀ(U_kᵀZ)/√p)``, tokens as columns; one U in all places."""

    @nn.compact
    def __call__(self, Z: jax.Array) -> tuple[jax.Array, jax.Array]:
        """``MSSA(Z)``, where tokens are rows, and U, shape ``(d, d)``: the U_k side by side."""
        U = self.param("U", nn.initializers.lecun_normal(), (Z.shape[-1], Z.shape[-1]))
        V = (Z @ U).reshape(*Z.shape[:2], HEADS, -1).swapaxes(1, 2)  # U_kᵀZ
        mixed = nn.softmax(V @ V.swapaxes(2, 3) / V.shape[-1] ** 0.5) @ V
        return mixed.swapaxes(1, 2).reshape(Z.shape) @ U.T, U


class Sparse(nn.Module):
    """An ISTA step, ``ISTA(Z) = relu(Z − η Dᵀ(DZ − Z) − ηλ)``."""

    @nn.compact
    def __call__(self, Z: jax.Array) -> jax.Array:
        """Tokens are rows here too."""
        D = self.param("D", nn.initializers.lecun_normal(), (Z.shape[-1], Z.shape[-1]))
        return nn.relu(Z - ETA * (Z @ D.T - Z) @ D - ETA * LAMBDA)


class Encoder(nn.Module):
    """Patches, then blocks: compress (attention), then sparsify (ISTA)."""

    patch: int

    @nn.compact
    def __call__(self, images: jax.Array, order: jax.Array | None = None) -> jax.Array:
        """Tokens, shape ``(images, tokens, WIDTH)``; of the first patches alone, if their order is given."""
        Z = nn.Dense(WIDTH)(patches(images, self.patch)) + positions(images.shape[1] // self.patch)
        if order is not None:
            Z = jnp.take_along_axis(Z, order[:, :VISIBLE, None], axis=1)
        for _ in range(DEPTH[0]):
            step, U = Attention()(nn.LayerNorm()(Z))
            self.sow("layers", "terms", (compression(Z, U), compression(Z + step, U)))
            Z = Sparse()(nn.LayerNorm()(Z + step))
        return nn.LayerNorm()(Z)


class Autoencoder(nn.Module):
    """The encoder, then the blocks backwards: a dictionary, then attention taken away."""

    patch: int

    @nn.compact
    def __call__(self, images: jax.Array, order: jax.Array) -> jax.Array:
        """All patches in their places, shape ``(images, tokens, patch² channels)``."""
        hidden = self.param("hidden", nn.initializers.normal(0.02), (WIDTH,))  # stands for each hidden patch
        Z = nn.Dense(WIDTH)(Encoder(self.patch, name="encoder")(images, order))
        Z = jnp.concatenate([Z, jnp.broadcast_to(hidden, (len(Z), order.shape[1] - VISIBLE, WIDTH))], axis=1)
        Z = jnp.take_along_axis(Z, order.argsort(axis=1)[..., None], axis=1) + positions(images.shape[1] // self.patch)
        for _ in range(DEPTH[1]):
            Z = nn.Dense(WIDTH, use_bias=False)(nn.LayerNorm()(Z))
            Z = Z - Attention()(nn.LayerNorm()(Z))[0]
        return nn.Dense(self.patch**2 * images.shape[-1])(nn.LayerNorm()(Z))


def patches(images: jax.Array, size: int) -> jax.Array:
    """Shape ``(images, tokens, size² channels)``."""
    n, h, w, c = images.shape
    return images.reshape(n, h // size, size, w // size, size, c).swapaxes(2, 3).reshape(n, -1, size * size * c)


def positions(side: int) -> np.ndarray:
    """Sines and cosines of row and column, shape ``(side², WIDTH)``: near places are alike. Nothing is learnt."""
    angles = np.arange(side)[:, None] * np.pi / side * (side / 2) ** np.linspace(0, 1, WIDTH // 4)
    one = 2 * np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    return np.concatenate([np.repeat(one, side, axis=0), np.tile(one, (side, 1))], axis=1).astype("float32")


def compression(Z: jax.Array, U: jax.Array) -> jax.Array:
    """``R_c(Z|U) = ½ Σ_k log det(I + p/(nε²) V_kᵀV_k)``, a mean over images; columns of ``V_k = U_kᵀZ`` of length 1."""
    V = (Z @ U).reshape(*Z.shape[:2], HEADS, -1).swapaxes(1, 2)
    V = V / jnp.linalg.norm(V, axis=-1, keepdims=True)
    gram = jnp.eye(V.shape[3]) + V.shape[3] / (V.shape[2] * EPS2) * V.swapaxes(2, 3) @ V
    return 0.5 * jnp.linalg.slogdet(gram)[1].sum(axis=1).mean()


def pretrain(images: np.ndarray, patch: int, steps: int, seed: int) -> tuple[Any, Any, list[float]]:
    """The encoder's parameters before and after masked autoencoding; squared errors of hidden patches, by step."""
    model, key, tokens = Autoencoder(patch), jax.random.key(seed), (images.shape[1] // patch) ** 2
    start = model.init(key, images[:2], jnp.zeros((2, tokens), int))["params"]
    tx = optax.adamw(optax.warmup_cosine_decay_schedule(0, 3e-3, steps // 10, steps), b2=0.99, weight_decay=0.01)
    state, rng, errors = TrainState.create(apply_fn=model.apply, params=start, tx=tx), np.random.default_rng(seed), []

    def error(params: Any, x: jax.Array, key: jax.Array) -> jax.Array:
        order = jax.random.uniform(key, (len(x), tokens)).argsort(axis=1)
        drawn: Any = model.apply({"params": params}, x, order)
        return jnp.take_along_axis(((drawn - patches(x, patch)) ** 2).mean(axis=2), order, axis=1)[:, VISIBLE:].mean()

    @jax.jit
    def step(state: TrainState, x: jax.Array, key: jax.Array) -> tuple[TrainState, jax.Array]:
        value, grads = jax.value_and_grad(error)(state.params, x, key)
        return state.apply_gradients(grads=grads), value

    for i in range(steps):
        state, value = step(state, images[rng.choice(len(images), 64, replace=False)], jax.random.fold_in(key, i))
        errors.append(value)
    return start["encoder"], state.params["encoder"], [float(value) for value in errors]


def classifier(encoder: Any, patch: int, rows: Rows, seed: int) -> tuple[nn.Module, Any]:
    """The encoder, the mean of its tokens, and two layers, the head that is solved: module and variables."""
    last: list[Any] = [lambda Z: Z.mean(axis=1), nn.Dense(128), nn.relu, nn.Dense(int(rows[1].max()) + 1)]
    model = nn.Sequential([Encoder(patch), *last])
    return model, {"params": {**model.init(jax.random.key(seed), rows[0][:2])["params"], "layers_0": encoder}}


def judge(encoder: Any, patch: int, fit: Rows, held: Rows, test: Rows, seed: int) -> dict[str, Any]:
    """For each strength of a linear probe and a solved head: held-out and test accuracy in %, strength, CPU seconds."""
    model, start = classifier(encoder, patch, fit, seed)
    head = cf.find_head(model, start, fit[0][:64])
    features, *others = (cf.gather_features(head, start, rows) for rows in (fit, held, test))

    def probe(strength: float) -> Any:
        linear = linear_model.LogisticRegression(C=strength, max_iter=2000)
        return pipeline.make_pipeline(preprocessing.StandardScaler(), linear).fit(features.X, features.y).predict

    def solved(ratio: float) -> Any:
        params = cf.fit_head(head, start, features, solver=cf.Cronos(loss="softmax", beta_ratio=ratio))[1].params
        return lambda X: np.asarray(cf.predict(params, jnp.asarray(X))).argmax(axis=1)

    scores: dict[str, list[tuple[float, ...]]] = {}
    for method, make, settings in (("linear probe", probe, STRENGTHS), ("solved head", solved, RATIOS)):
        for setting in settings:
            began, predict = time.process_time(), make(setting)
            seconds = time.process_time() - began
            right = (100 * float(np.mean(predict(rows.X) == rows.y)) for rows in others)
            scores.setdefault(method, []).append((*right, setting, seconds))
    return scores


def load(data_dir: Path | None, name: str, seed: int, few: int = 1000) -> tuple[np.ndarray, Rows, Rows, Rows]:
    """Images whose labels are not used; rows to fit (four fifths of the few), held out, and to test."""
    every = data.load(name, data_dir)
    order, cut = np.random.default_rng(seed).permutation(len(every.x)), 4 * few // 5
    x, y, mean = every.x[order].astype("float32"), every.y[order], every.x.mean(axis=0, dtype="float32")
    x, x_test = ((images - mean) / (x - mean).std() for images in (x, every.x_test))
    return x, (x[:cut], y[:cut]), (x[cut:few], y[cut:few]), (x_test, every.y_test)


def main() -> None:
    """Autoencode, judge, print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", choices=PATCH, default="digits")
    parser.add_argument("--data-dir", type=Path, help="directory of prepared TFDS sets, for all but digits")
    parser.add_argument("--steps", type=int, default=600, help="of masked autoencoding")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    x, fit, held, test = load(args.data_dir, args.data, args.seed)
    before, after, errors = pretrain(x, PATCH[args.data], args.steps, args.seed)
    print(f"{len(x):,} images; {100 * (1 - np.mean(errors[-100:])):.0f} % of the hidden variance is explained")
    for name, encoder in (("untrained", before), ("trained", after)):
        for method, scores in judge(encoder, PATCH[args.data], fit, held, test, args.seed).items():
            _, accuracy, strength, _ = max(scores, key=lambda score: score[0])
            print(f"{name} encoder, {method}: {accuracy:.1f} % test accuracy (strength {strength:g})")
    _, seen = Encoder(PATCH[args.data]).apply({"params": after}, test[0][:200], mutable="layers")
    for i, (first, then) in enumerate(seen["layers"]["terms"], 1):
        print(f"layer {i}: compression term {first:.2f} before attention, {then:.2f} after it")


if __name__ == "__main__":
    main()
