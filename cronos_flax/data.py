"""Image sets as arrays, from directories that TensorFlow Datasets prepared; no TensorFlow and no network needed.

Not imported by ``cronos_flax`` itself: ``from cronos_flax import data``.
"""

from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds


def load_tfds(name: str, split: str, data_dir: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of one split of a prepared TFDS classification set, read at once.

    Args:
        name: a TFDS name, such as ``"fashion_mnist"``; ``name/config`` where there are configurations.
        split: such as ``"train"``, ``"test"`` or ``"train[:6000]"``.
        data_dir: the directory that holds ``name/version/…`` in the ``array_record`` format.

    Returns:
        Images, uint8, shape ``(n, height, width, channels)``, and integer labels, shape ``(n,)``.

    Raises:
        ValueError: if the set is not there, has no such split, or is not one of equally sized images with labels. The
            message says how to prepare it.
    """
    directory = Path(data_dir)
    # TFDS looks on the network, for minutes, for what is not prepared: look here first.
    if not any((directory / name).glob("**/dataset_info.json")):
        have = sorted(p.name for p in directory.iterdir() if p.is_dir()) if directory.is_dir() else []
        raise ValueError(
            f"load_tfds: `name` must be a data set prepared in {directory}, got {name!r}; there: "
            f"{', '.join(have) or 'nothing'}. Prepare it once, with tensorflow-cpu installed: tfds.builder({name!r}, "
            f"data_dir={str(directory)!r}, file_format='array_record').download_and_prepare()"
        )
    try:
        source = tfds.data_source(name, split=split, data_dir=str(directory))
    except (ValueError, NotImplementedError) as error:
        raise ValueError(
            f"load_tfds: split {split!r} of {name!r} in {directory} cannot be read as array_record: {error}"
        ) from error
    if not {"image", "label"} <= set(source.dataset_info.features):
        raise ValueError(
            f"load_tfds: {name!r} must have the features 'image' and 'label', "
            f"got {sorted(source.dataset_info.features)}."
        )
    examples = source.__getitems__(range(len(source)))
    images = [example["image"] for example in examples]
    shapes = {image.shape for image in images}
    if len(shapes) != 1:
        raise ValueError(f"load_tfds: the images of {name!r} must have one size, got {len(shapes)} sizes.")
    return np.stack(images), np.asarray([example["label"] for example in examples])
