"""CIFAR-10 ResNets in Flax, and features from published weights.

The networks of He et al. (2016) for 32 × 32 images, with option-A shortcuts, in the tensor names of
akamaster/pytorch_resnet_cifar10, whose ``safetensors`` this reads.
"""

import json
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

MEAN, STD = np.array([0.485, 0.456, 0.406], "float32"), np.array([0.229, 0.224, 0.225], "float32")


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """All float32 tensors of a file; the format is a length, a JSON header, and the bytes."""
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    tensors = {}
    for name, entry in json.loads(raw[8:start]).items():
        if name != "__metadata__" and entry["dtype"] == "F32":
            first, last = entry["data_offsets"]
            tensors[name] = np.frombuffer(raw[start + first : start + last], "<f4").reshape(entry["shape"])
    return tensors


class ResNet(nn.Module):
    """Three stages of basic blocks, 16, 32 and 64 channels wide, then the mean over pixels: features ``(n, 64)``."""

    blocks: int = 3  # a stage: 3 for ResNet-20, 9 for ResNet-56

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Of normalised images ``(n, 32, 32, 3)``; ``train`` says whether batch norms use the batch's statistics."""

        def conv(x, features, name, stride=1):
            return nn.Conv(features, (3, 3), stride, padding=1, use_bias=False, name=name)(x)

        def norm(x, name):
            return nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5, name=name)(x)

        x = nn.relu(norm(conv(images, 16, "conv1"), "bn1"))
        for stage, features in enumerate((16, 32, 64), start=1):
            for block in range(self.blocks):
                stride = 2 if stage > 1 and block == 0 else 1
                name = f"layer{stage}.{block}"
                y = nn.relu(norm(conv(x, features, f"{name}.conv1", stride), f"{name}.bn1"))
                y = norm(conv(y, features, f"{name}.conv2"), f"{name}.bn2")
                if stride == 2:
                    wider = (features - x.shape[-1]) // 2
                    x = jnp.pad(x[:, ::2, ::2], ((0, 0), (0, 0), (0, 0), (wider, wider)))
                x = nn.relu(x + y)
        return jnp.mean(x, axis=(1, 2))


def variables_of(tensors: dict[str, np.ndarray]) -> dict:
    """Flax variables from tensors named as in PyTorch."""
    params, stats = {}, {}
    for name, value in tensors.items():
        layer, leaf = name.rsplit(".", 1)
        if value.ndim == 4:
            params[layer] = {"kernel": value.transpose(2, 3, 1, 0)}
        elif leaf in ("running_mean", "running_var"):
            stats.setdefault(layer, {})[leaf.removeprefix("running_")] = value
        elif ".bn" in f".{layer}":
            params.setdefault(layer, {})[{"weight": "scale", "bias": "bias"}[leaf]] = value
    return {"params": params, "batch_stats": stats}


def resnet20_features(weights: Path, images: np.ndarray) -> np.ndarray:
    """The 64 features before the classifier, of images (n, 32, 32, 3) in 0..255."""
    variables = variables_of(read_safetensors(weights))
    apply = jax.jit(ResNet().apply)
    batches = [(images[i : i + 500] / np.float32(255) - MEAN) / STD for i in range(0, len(images), 500)]
    return np.concatenate([np.asarray(apply(variables, batch)) for batch in batches])
