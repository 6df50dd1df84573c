"""The pages for pretrained models: weights from files, ports that agree with their references, and whole runs."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import SHARED
from flax import nnx, traverse_util
from pages import page
from safetensors.numpy import load_file, save_file


def weights(name):
    directory = SHARED / "weights" / name
    if not directory.is_dir():
        pytest.skip(f"no pretrained weights at {directory}")
    return directory


def test_the_sentence_encoder_agrees_with_its_reference():
    import json

    from tokenizers import Tokenizer

    text, directory = page("pretrained", "text"), weights("minilm")
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(json.loads((directory / "reference.json").read_text())["max_length"])
    encoder = text.load(directory / "model.safetensors", json.loads((directory / "config.json").read_text()))
    assert text.least_cosine(encoder, tokenizer, directory) >= 0.9999


def test_the_image_model_agrees_with_its_reference():
    images, directory = page("pretrained", "images"), weights("efficientnet_lite0")
    model = images.Lite()
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 128, 128, 3)))
    variables = images.load(directory / "model.safetensors", shapes)
    assert images.largest_difference(model, variables, directory / "reference.npz") < 1e-3


def text_file(text, path):
    """Random weights of a small encoder under the names of the file, and the encoder."""
    encoder = text.Encoder(text.SMALL, nnx.Rngs(1))
    tensors = {"pooler.dense.weight": np.zeros((2, 2), "float16")}
    for place, leaf in nnx.to_flat_state(nnx.state(encoder, nnx.Param)):
        value = np.asarray(leaf[...])
        name = ".".join(text.PARTS.get(str(part), str(part)) for part in place)
        tensors[name] = np.ascontiguousarray(value.T if place[-1] == "kernel" else value)
    save_file(tensors, path)
    return encoder


def image_file(images, path):
    """The same for a small image model."""
    model = images.Lite(images.SMALL, 4, 8, 3)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 16, 16, 1)))
    rng, tensors, variables = np.random.default_rng(0), {}, {}
    for place, leaf in traverse_util.flatten_dict(shapes).items():
        value = variables[place] = rng.normal(size=leaf.shape).astype("float32")
        name = ".".join(images.PARTS.get(p, p) for p in (part.replace("block_", "_blocks.") for part in place[1:]))
        back = {2: (1, 0), 4: (3, 2, 0, 1)}  # height, width, in, out as out, in, height, width
        tensors[name] = np.ascontiguousarray(value.transpose(back[value.ndim]) if place[-1] == "kernel" else value)
    save_file(tensors, path)
    return shapes, variables


def test_every_tensor_of_a_file_finds_its_place_or_is_named(tmp_path):
    text, images, path = page("pretrained", "text"), page("pretrained", "images"), tmp_path / "model.safetensors"
    encoder = text_file(text, path)
    for one, two in zip(
        *(jax.tree.leaves(nnx.state(m, nnx.Param)) for m in (encoder, text.load(path, text.SMALL))), strict=True
    ):
        np.testing.assert_array_equal(one, two)
    assert "encoder.layer.1.attention.self.query.weight" in load_file(path)
    wrong = load_file(path) | {"encoder.layer.2.output.dense.bias": np.zeros(3, "float32")}
    save_file(wrong, path)
    with pytest.raises(ValueError, match=r"no place for encoder\.layer\.2\.output\.dense\.bias"):
        text.load(path, text.SMALL)
    with pytest.raises(ValueError, match="has shape"):
        text.load(path, {**text.SMALL, "intermediate_size": 97})

    shapes, variables = image_file(images, path)
    loaded = traverse_util.flatten_dict(images.load(path, shapes))
    assert loaded.keys() == variables.keys()
    for place, value in variables.items():
        np.testing.assert_array_equal(loaded[place], value)
    assert load_file(path)["_blocks.1._depthwise_conv.weight"].shape == (32, 1, 3, 3)
    save_file(load_file(path) | {"_se.weight": np.zeros(3, "float32")}, path)
    with pytest.raises(ValueError, match=r"no place for _se\.weight"):
        images.load(path, shapes)


def test_batches_are_padded_to_few_lengths_and_augmented_anew():
    text, images = page("pretrained", "text"), page("pretrained", "images")
    ids, mask = text.padded([[5, 6, 7], [8] * 20])
    assert ids.shape == mask.shape == (2, 32)
    assert mask.sum(1).tolist() == [3, 20]
    assert ids[0, :4].tolist() == [5, 6, 7, 0]
    batches = images.Augmented(*images.digits(), False, np.random.default_rng(0))
    (one, labels), (two, _) = next(iter(batches)), next(iter(batches))
    assert one.shape == (32, 32, 32, 1)
    assert labels.shape == (32,)
    assert not np.array_equal(one, two)
    for shots, rows in ((3, 30), (0, 1797)):
        assert len(set(images.few(batches.labels, shots, 0))) == rows


@pytest.mark.slow
@pytest.mark.parametrize(("name", "rows"), [("text", 5 * 8), ("images", 10 * 8)])
def test_a_page_runs_without_weights_and_keeps_its_features(name, rows, tmp_path, monkeypatch, capsys):
    module, picture = page("pretrained", name), tmp_path / "picture.png"
    options = "--shots", "8", "--hidden", "8", "--epochs", "1", "--test-rows", "64", "--beta", "1e-3"
    monkeypatch.setattr(sys, "argv", [name, *options, "--cache", str(tmp_path / "cache"), "--out", str(picture)])
    module.main()
    printed = capsys.readouterr().out
    for method in ("linear probe", "solved head", "LP-FT", "CRONOS-AM"):
        assert f"│ {method}" in printed
    assert picture.stat().st_size > 10_000
    (cache,) = (tmp_path / "cache").iterdir()
    assert len(np.load(cache / "X.npy")) == rows
    monkeypatch.setattr(sys, "argv", [name, "--weights", str(tmp_path)])
    with pytest.raises(SystemExit):
        module.main()
    assert "--weights needs --data-dir" in capsys.readouterr().err
