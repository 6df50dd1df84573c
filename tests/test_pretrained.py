"""The pages for pretrained models: weights from files, ports that agree with their references, and whole runs."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import SHARED
from flax import nnx, traverse_util
from pages import page
from safetensors.numpy import load_file, save_file
from scipy.special import erf
from sklearn.linear_model import LogisticRegression


def weights(name):
    directory = SHARED / "weights" / name
    if not directory.is_dir():
        pytest.skip(f"no pretrained weights at {directory}")
    return directory


def test_the_sentence_encoder_agrees_with_its_reference():
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


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [3, 5])
@pytest.mark.parametrize("width", [7, 8])
def test_shifted_images_are_a_depthwise_convolution(width, size, stride):
    images = page("pretrained", "images")
    keys = jax.random.split(jax.random.key(0))
    x, kernel = jax.random.normal(keys[0], (2, width, width, 6)), jax.random.normal(keys[1], (size, size, 1, 6))
    dimensions = {"dimension_numbers": ("NHWC", "HWIO", "NHWC"), "feature_group_count": 6}
    expected = jax.lax.conv_general_dilated(x, kernel, (stride, stride), "SAME", **dimensions)
    np.testing.assert_allclose(images.by_shifts(x, kernel, (stride, stride), "SAME"), expected, atol=1e-5)


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


def vit_directory(directory, prefix="vit.", labels=0):
    """A checkpoint of a small ViT as Hugging Face writes it, with random numbers; its settings and its tensors."""
    width, wide, rng = 8, 12, np.random.default_rng(0)
    settings = {"model_type": "vit", "hidden_act": "gelu", "hidden_size": width, "num_hidden_layers": 2}
    settings |= {"num_attention_heads": 2, "intermediate_size": wide, "image_size": 9, "patch_size": 3}
    settings |= {"num_channels": 2, "layer_norm_eps": 1e-3, "qkv_bias": True, "hidden_dropout_prob": 0.0}
    shapes = {
        "embeddings.cls_token": (1, 1, width),
        "embeddings.position_embeddings": (1, 10, width),
        "embeddings.patch_embeddings.projection.weight": (width, 2, 3, 3),
        "embeddings.patch_embeddings.projection.bias": (width,),
        "layernorm.weight": (width,),
        "layernorm.bias": (width,),
        "pooler.dense.weight": (width, width),
    }
    for layer in ("encoder.layer.0.", "encoder.layer.1."):
        for name in ("attention.attention.query", "attention.attention.key", "attention.attention.value"):
            shapes |= {f"{layer}{name}.weight": (width, width), f"{layer}{name}.bias": (width,)}
        for name, (out, inputs) in {
            "attention.output.dense": (width, width),
            "intermediate.dense": (wide, width),
            "output.dense": (width, wide),
        }.items():
            shapes |= {f"{layer}{name}.weight": (out, inputs), f"{layer}{name}.bias": (out,)}
        for name in ("layernorm_before", "layernorm_after"):
            shapes |= {f"{layer}{name}.weight": (width,), f"{layer}{name}.bias": (width,)}
    tensors = {prefix + name: rng.normal(size=shape).astype("float32") for name, shape in shapes.items()}
    if labels:
        tensors["classifier.weight"] = rng.normal(size=(labels, width)).astype("float32")
        tensors["classifier.bias"] = rng.normal(size=labels).astype("float32")
    (directory / "config.json").write_text(json.dumps(settings))
    save_file(tensors, directory / "model.safetensors")
    return settings, tensors


def vit_in_numpy(settings, tensors, images):
    """Tokens ``(n, length, width)`` of images ``(n, channels, size, size)``, in float64, from Hugging Face's names."""
    weights = {name.removeprefix("vit."): value.astype("float64") for name, value in tensors.items()}

    def dense(x, name):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + settings["layer_norm_eps"])
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    patch, heads = settings["patch_size"], settings["num_attention_heads"]
    rows, tokens = range(0, images.shape[2], patch), [np.repeat(weights["embeddings.cls_token"][0], len(images), 0)]
    for i in rows:
        for j in rows:
            part = images[:, :, i : i + patch, j : j + patch].reshape(len(images), -1)
            kernel = weights["embeddings.patch_embeddings.projection.weight"].reshape(settings["hidden_size"], -1)
            tokens.append(part @ kernel.T + weights["embeddings.patch_embeddings.projection.bias"])
    x = np.stack(tokens, 1) + weights["embeddings.position_embeddings"]
    for layer in (f"encoder.layer.{i}" for i in range(settings["num_hidden_layers"])):
        y, mixed = norm(x, f"{layer}.layernorm_before"), []
        q, k, v = (dense(y, f"{layer}.attention.attention.{name}") for name in ("query", "key", "value"))
        for part in np.split(np.arange(x.shape[-1]), heads):
            scores = np.exp(q[..., part] @ k[..., part].swapaxes(1, 2) / np.sqrt(len(part)))
            mixed.append(scores / scores.sum(-1, keepdims=True) @ v[..., part])
        x = x + dense(np.concatenate(mixed, -1), f"{layer}.attention.output.dense")
        y = dense(norm(x, f"{layer}.layernorm_after"), f"{layer}.intermediate.dense")
        x = x + dense(y * (1 + erf(y / np.sqrt(2))) / 2, f"{layer}.output.dense")
    return norm(x, "layernorm")


@pytest.mark.parametrize(("prefix", "labels"), [("", 0), ("vit.", 3)])
def test_the_vision_transformer_agrees_with_one_in_numpy(prefix, labels, tmp_path):
    vit = page("pretrained", "vit")
    settings, tensors = vit_directory(tmp_path, prefix, labels)
    images = np.random.default_rng(1).normal(size=(4, 2, 9, 9)).astype("float32")
    output = vit_in_numpy(settings, tensors, images)
    if labels:
        output = output[:, 0] @ tensors["classifier.weight"].T + tensors["classifier.bias"]
    np.savez(tmp_path / "reference.npz", pixel_values=images, output=output)
    model = vit.load(tmp_path, vit.ViTConfig.from_directory(tmp_path))
    ours = np.asarray(nnx.jit(type(model).__call__)(model, images.transpose(0, 2, 3, 1)))
    assert ours.shape == output.shape
    assert np.max(np.abs(ours - output)) < 1e-4 * np.max(np.abs(output))
    assert vit.largest_difference(model, tmp_path / "reference.npz") < 1e-4
    model.norm.bias[...] += 1  # what is compared can differ
    assert vit.largest_difference(model, tmp_path / "reference.npz") > 1e-3


def test_a_checkpoint_of_another_model_is_refused_and_its_names_are_said(tmp_path):
    vit, path = page("pretrained", "vit"), tmp_path / "model.safetensors"
    settings, tensors = vit_directory(tmp_path)
    config = vit.ViTConfig.from_directory(tmp_path)
    missing = "vit.encoder.layer.1.attention.attention.key.bias"
    save_file({name: value for name, value in tensors.items() if name != missing}, path)
    with pytest.raises(ValueError, match=r"has no encoder\.layer\.1\.attention\.attention\.key\.bias$"):
        vit.load(tmp_path, config)
    save_file(tensors | {"vit.encoder.layer.2.output.dense.bias": np.zeros(8, "float32")}, path)
    with pytest.raises(ValueError, match=r"no place for encoder\.layer\.2\.output\.dense\.bias$"):
        vit.load(tmp_path, config)
    save_file(tensors | {"layernorm.bias": np.zeros(8, "float32")}, path)
    with pytest.raises(ValueError, match=r"layernorm\.bias is in the file twice"):
        vit.load(tmp_path, config)
    save_file(tensors | {"vit.layernorm.bias": np.zeros(7, "float32")}, path)
    with pytest.raises(ValueError, match=r"layernorm\.bias has shape \(7,\)"):
        vit.load(tmp_path, config)
    for name, other in (("model_type", "deit"), ("hidden_act", "gelu_new")):
        (tmp_path / "config.json").write_text(json.dumps(settings | {name: other}))
        with pytest.raises(ValueError, match=f"{name} must be .*{other}"):
            vit.ViTConfig.from_directory(tmp_path)


def test_images_become_what_the_vision_transformer_was_trained_on(tmp_path):
    vit = page("pretrained", "vit")
    vit_directory(tmp_path)
    said = {"do_normalize": True, "image_mean": [0.5, 0.25], "image_std": [0.5, 0.25], "size": 9}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(said))
    config = vit.ViTConfig.from_directory(tmp_path)
    assert (config.hidden_size, config.num_channels, config.image_mean) == (8, 2, (0.5, 0.25))
    batches = vit.Batches(np.full((40, 4, 4, 1), 255, "uint8"), np.arange(40), config)
    (pixels, labels), (rest, _) = batches
    assert pixels.shape == (32, 9, 9, 2)
    assert rest.shape == (8, 9, 9, 2)
    np.testing.assert_array_equal(labels, np.arange(32))
    np.testing.assert_allclose(pixels[0, 0, 0], [1, 3], rtol=1e-6)  # (1 - mean) / std


@pytest.mark.parametrize("classes", [2, 3])
def test_the_vision_transformer_starts_from_the_probe(classes, tmp_path):
    vit = page("pretrained", "vit")
    vit_directory(tmp_path)
    model = vit.load(tmp_path, vit.ViTConfig.from_directory(tmp_path))
    rng = np.random.default_rng(1)
    images, labels = rng.normal(size=(32, 9, 9, 2)).astype("float32"), np.arange(32) % classes
    call = nnx.jit(type(model).__call__)
    features = np.asarray(vit.class_token(call(model, images), images))
    probe = LogisticRegression(max_iter=500).fit(features, labels)
    logits = call(vit.with_probe(model, probe), images)
    np.testing.assert_allclose(jax.nn.softmax(logits), probe.predict_proba(features), atol=1e-5)
    assert model.classifier is None


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
@pytest.mark.parametrize(("name", "rows"), [("text", 5 * 8), ("images", 10 * 8), ("vit", 10 * 8)])
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
