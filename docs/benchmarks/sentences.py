"""Texts of prepared sets, and their vectors by MiniLM (the encoder of ``examples/pretrained/text.py``)."""

import json
import sys
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from flax import nnx
from tokenizers import Tokenizer

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "pretrained"))
import text as example


def texts_of(data_dir: Path, name: str, split: str, most: int | None) -> tuple[list[str], dict[str, np.ndarray]]:
    """Texts of a set in a fixed random order, at most so many, and their labels by column."""
    source = tfds.data_source(name, split=split, data_dir=str(data_dir))
    chosen = np.random.default_rng(0).permutation(len(source))[:most]
    found = source.__getitems__([int(i) for i in chosen])
    columns = [column for column in ("label", "true_label") if column in found[0]]
    return [row["text"].decode() for row in found], {c: np.array([row[c] for row in found]) for c in columns}


def vectors(weights: Path, texts: list[str]) -> np.ndarray:
    """Of MiniLM, ``(n, 384)``, in the order of the texts; ``weights`` is its directory."""
    encoder = example.load(weights / "model.safetensors", json.loads((weights / "config.json").read_text()))
    tokenizer = Tokenizer.from_file(str(weights / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(example.LONGEST)
    ids = [text.ids for text in tokenizer.encode_batch(texts)]
    read = nnx.jit(lambda encoder, ids, mask: example.sentence(encoder(ids, mask), ids, mask))
    batches = example.by_length(ids, np.arange(len(ids)))
    out = np.concatenate([read(encoder, *batch[:2]) for batch in batches])
    return out[np.argsort(np.concatenate([batch[2] for batch in batches]))]
