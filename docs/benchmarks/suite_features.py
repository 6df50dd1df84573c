"""Features of sentences and photographs from frozen pretrained networks, which tasks of the suite are made of.

    python docs/benchmarks/suite_features.py --data-dir DIR --weights DIR --cache DIR

One file for each set in the directory of ``--cache``; those that are there are left. The directory of the weights has
``minilm`` and ``efficientnet_lite0``; the networks are those of ``examples/pretrained``. Minutes.
"""

import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from rows import parser
from sentences import texts_of, vectors

from cronos_flax.compare.data import load_tfds

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "pretrained"))
import images as example

BLOCK = 200  # photographs of a pass
# Sets of texts, and how many training and test rows; None for all. The test rows of noisy_ag_news are not used.
TEXTS: dict[str, tuple[int | None, int | None]] = {
    "noisy_ag_news": (None, 1),
    "banking77": (None, None),
    "imdb_reviews": (2400, 4000),
}


def of_texts(name: str, data_dir: Path, weights: Path) -> dict[str, np.ndarray]:
    """The vectors of the training and test rows of a set, and their labels, the true ones if there are others."""
    made: dict[str, np.ndarray] = {}
    for split, most in zip(("train", "test"), TEXTS[name], strict=True):
        texts, labels = texts_of(data_dir, name, split, most)
        made |= {
            f"x_{split}": vectors(weights / "minilm", texts),
            f"y_{split}": labels.get("true_label", labels["label"]),
        }
    return made


def of_photographs(name: str, data_dir: Path, weights: Path) -> dict[str, np.ndarray]:
    """The pooled features of EfficientNet-Lite0, and labels."""
    model, made = example.Lite(), {}
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 128, 128, 3)))
    variables = example.load(weights / "efficientnet_lite0" / "model.safetensors", shapes)

    @jax.jit
    def pooled(x: jax.Array) -> jax.Array:
        _, seen = model.apply(variables, x, capture_intermediates=lambda module, _: module.name == "top_norm")
        return nn.relu6(seen["intermediates"]["top_norm"]["__call__"][0]).mean(axis=(1, 2))

    for split in ("train", "test"):
        x, y = load_tfds(name, split, data_dir)
        blocks = [np.asarray(pooled(x[i : i + BLOCK])) for i in range(0, len(x), BLOCK)]
        made |= {f"x_{split}": np.concatenate(blocks), f"y_{split}": np.asarray(y)}
    return made


if __name__ == "__main__":
    given = parser(__file__, __doc__, data=True, pretrained=True).parse_args()
    given.cache.mkdir(parents=True, exist_ok=True)
    for set_name in (*TEXTS, "flowers128"):
        path = given.cache / f"{set_name}.npz"
        if not path.exists():
            make = of_texts if set_name in TEXTS else of_photographs
            part = path.with_suffix(".part.npz")  # a run that is killed leaves no half file
            np.savez(part, **make(set_name, given.data_dir, given.weights))
            part.rename(path)
            print(set_name, flush=True)
