"""Fine-tuning an encoder of sentences on few texts, by ``cronos-flax compare``: a limit of seconds, rates searched.

    python docs/benchmarks/few_shot.py --data-dir DIR --weights DIR --cache DIR --out few_shot.jsonl [--seeds 3]

banking77 (77 classes) on MiniLM, an NNX model. Every run has the same limit of seconds, from the first pass through
the encoder on. Texts are cut after 32 tokens; 500 of the test texts are scored. The directory
of ``--cache`` gets the tokens and what ``compare`` writes, which it goes on from; then all rows are written to the file
of ``--out``. Run each process on a core of its own: seconds are those of the clock.
``--out docs/benchmarks/few_shot.jsonl.gz``, without ``--cache``, prints the table of the kept rows.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from rows import kept, parser
from sentences import example, texts_of
from tokenizers import Tokenizer

import cronos_flax as cf
from cronos_flax.compare import cli, shots

LENGTH, HELD, SCORED, HIDDEN = 32, 231, 500, 512
WEIGHTS = "FEW_SHOT_WEIGHTS"  # the environment variable that tells the factory, which compare imports by name
METHODS = "cronos-ft:adam", "lp-ft+cosine", "adam+cosine", "cronos", "linear-probe"


class Sentences(nnx.Module):
    """The encoder as a function of token ids ``(n, length)``, 0 where a text has ended: features ``(n, 384)``."""

    def __init__(self, encoder: Any) -> None:
        self.encoder = encoder

    def __call__(self, ids: jax.Array) -> jax.Array:
        """Unit vectors."""
        ids = ids.astype("int32")
        mask = (ids > 0).astype("float32")
        return example.sentence(self.encoder(ids, mask), ids, mask)


def model(outputs: int, rngs: nnx.Rngs) -> nnx.Module:
    """MiniLM with its published weights, and a head with fresh ones."""
    weights = Path(os.environ[WEIGHTS])
    encoder = example.load(weights / "model.safetensors", json.loads((weights / "config.json").read_text()))
    width = encoder.words.embedding.shape[1]
    return cf.nnx.graft(Sentences(encoder), hidden=HIDDEN, features=outputs, in_features=width, rngs=rngs)


def tokens(args: Any) -> Path:
    """The file of token ids and labels, made if it is not there."""
    path = args.cache / "banking77-tokens.npz"
    if not path.exists():
        args.cache.mkdir(parents=True, exist_ok=True)
        tokenizer = Tokenizer.from_file(str(args.weights / "tokenizer.json"))
        tokenizer.enable_truncation(LENGTH)
        tokenizer.enable_padding(length=LENGTH)
        arrays = {}
        for split, end, most in (("train", "", None), ("test", "_test", SCORED)):
            texts, labels = texts_of(args.data_dir, "banking77", split, most)
            arrays[f"x{end}"] = np.array([text.ids for text in tokenizer.encode_batch(texts)], "int32")
            arrays[f"y{end}"] = labels["label"].astype("int32")
        np.savez(path, **arrays)
    return path


def main() -> None:
    """Run what is missing, print the table."""
    made = parser(__file__, __doc__, data=False, pretrained=True)
    made.add_argument("--seeds", type=int, default=3)
    made.add_argument("--shots", default="5", help="texts of each class, such as 5,10")
    made.add_argument("--seconds", type=int, default=40, help="of a run")
    made.add_argument("--rates", type=int, default=3)
    made.add_argument("--methods", nargs="+", default=METHODS)
    args = made.parse_args()
    if args.cache is not None:
        os.environ[WEIGHTS] = str(args.weights)
        sys.path.insert(0, str(Path(__file__).parent))
        data = f"--dataset {tokens(args)} --scaling none --batch-size 32 --validation {HELD} --shots {args.shots}"
        runs = f"--seeds {args.seeds} --rates {args.rates} --rate-range 1e-4 1e-3 --seconds {args.seconds}"
        where = f"--model few_shot:model --methods {','.join(args.methods)} --out {args.cache / 'few_shot'}"
        cli.main(["compare", *data.split(), *runs.split(), *where.split()])
        paths = sorted((args.cache / "few_shot").glob("shots-*/results.jsonl"))
        args.out.write_text("".join(path.read_text() for path in paths))
    sweeps: dict[int, list[Any]] = {}
    for row in kept(args.out):
        sweeps.setdefault(row["shots"], []).append(row)
    print(shots.table(sweeps))


if __name__ == "__main__":
    main()
