"""Data sets, embedded, prepared by TFDS or in a file: rows to fit, to choose by and to report.

TFDS sets are read without TensorFlow and without a network. Needs scikit-learn (the extra ``examples``).
"""

from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import tensorflow_datasets as tfds
from sklearn import datasets
from sklearn.model_selection import train_test_split

EMBEDDED = ("digits", "wine", "breast_cancer", "diabetes")
SCALINGS = ("standardise", "unit", "none")
TEST_SHARE = 0.2  # of sets that come without a test split


class Dataset(NamedTuple):
    """A whole set: inputs ``(n, ...)``, and labels or, for regression, floats ``(n,)``."""

    x: np.ndarray
    y: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray

    @property
    def num_classes(self) -> int | None:
        """How many classes there are; None for regression."""
        return int(max(self.y.max(), self.y_test.max())) + 1 if np.issubdtype(self.y.dtype, np.integer) else None


class Split(NamedTuple):
    """Rows to fit, to choose by and to report, inputs scaled, float32."""

    x: np.ndarray
    y: np.ndarray
    x_validation: np.ndarray
    y_validation: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray

    @classmethod
    def of(cls, dataset: Dataset, seed: int, validation: int, scaling: str, rows: int | None = None) -> Self:
        """Hold rows of the training part back, at random; the same for the same seed.

        Args:
            dataset: the whole set.
            seed: of the rows that are held back.
            validation: how many these are.
            scaling: ``"standardise"``: each feature of a table, each channel of images, to mean 0 and deviation 1 on
                the rows to fit; ``"unit"``: by the largest number that the dtype of the inputs holds or, of floats,
                the largest there; ``"none"``. Regression targets are standardised with any but the last.
            rows: how many to fit at most; None for all that are left.

        Raises:
            ValueError: if nothing is left to fit.
        """
        left = len(dataset.y) - validation
        if not 0 < (left if rows is None else rows) <= left:
            raise ValueError(
                f"`rows` and `validation` must leave rows to fit, got {rows} and {validation} of {len(dataset.y)}."
            )
        classes = dataset.num_classes
        labels = dataset.y if classes is not None and classes <= min(validation, left) else None
        order = np.arange(len(dataset.y))
        fit, held = train_test_split(order, test_size=validation, random_state=seed, stratify=labels)
        fit = fit[:rows]
        shift, scale = _scale(dataset.x, fit, scaling)
        x, x_held, x_test = (
            ((part - shift) / scale).astype("float32") for part in (dataset.x[fit], dataset.x[held], dataset.x_test)
        )
        y, y_held, y_test = dataset.y[fit], dataset.y[held], dataset.y_test
        if dataset.num_classes is None:
            shift, scale = (y.mean(), y.std() or 1) if scaling != "none" else (0, 1)
            y, y_held, y_test = (((part - shift) / scale).astype("float32") for part in (y, y_held, y_test))
        return cls(x, y, x_held, y_held, x_test, y_test)


def _scale(x: np.ndarray, fit: np.ndarray, scaling: str) -> tuple[Any, Any]:
    """What to subtract from the inputs, and what to divide them by."""
    if scaling == "none":
        return 0, 1
    if scaling == "unit":
        return 0, float(np.iinfo(x.dtype).max if np.issubdtype(x.dtype, np.integer) else np.abs(x).max() or 1)
    x = x[fit].astype("float32")
    axes = 0 if x.ndim == 2 else tuple(range(x.ndim - 1))
    deviation = x.std(axis=axes)
    return x.mean(axis=axes), np.where(deviation > 0, deviation, 1)


def load(name: str, data_dir: str | Path | None = None) -> Dataset:
    """A data set by name.

    Args:
        name: one of ``EMBEDDED``; a path that ends in ``.npz``, with arrays ``x``, ``y`` and, if there is a test split,
            ``x_test`` and ``y_test``; or a TFDS name, with splits ``train`` and ``test``.
        data_dir: for TFDS, the directory that holds ``name/version/…``.

    Returns:
        The set; where it has no test split, a fifth of the rows, always the same, is that.

    Raises:
        ValueError: if it is not there or does not fit. The message says what would.
    """
    if name in EMBEDDED:
        source = getattr(datasets, f"load_{name}")()
        x = source.images[..., None] if name == "digits" else source.data
        dtype = "float32" if name == "diabetes" else "int64"
        return _with_test(x.astype("float32"), source.target.astype(dtype))
    if name.endswith(".npz"):
        return _load_npz(Path(name))
    if data_dir is None:
        raise ValueError(
            f"load: `data_dir` is needed for a TFDS set, and {name!r} is none of {', '.join(EMBEDDED)}, nor a path "
            "that ends in .npz. Say where prepared TFDS sets lie."
        )
    return Dataset(*_typed(*load_tfds(name, "train", data_dir)), *_typed(*load_tfds(name, "test", data_dir)))


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


def _load_npz(path: Path) -> Dataset:
    """A set in a file of NumPy's."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except (OSError, ValueError) as error:
        raise ValueError(f"load: {path} must be an .npz file of plain arrays: {error}.") from None
    if not {"x", "y"} <= set(arrays):
        raise ValueError(f"load: {path} must have the arrays x and y, got {', '.join(arrays) or 'none'}.")
    if ("x_test" in arrays) != ("y_test" in arrays):
        raise ValueError(f"load: {path} must have both of x_test and y_test, or none.")
    for x_name, y_name in (("x", "y"), ("x_test", "y_test"))[: 1 + ("x_test" in arrays)]:
        x, y = arrays[x_name], arrays[y_name]
        if y.ndim != 1 or len(x) != len(y) or x.ndim < 2 or not x.size:
            raise ValueError(
                f"load: in {path} {x_name} must have shape (n, ...) and {y_name} (n,), got {x.shape} and {y.shape}."
            )
        if not (np.all(np.isfinite(x)) and np.all(np.isfinite(y))):
            raise ValueError(f"load: in {path} {x_name} and {y_name} must be finite, got NaN or infinity.")
    x, y = _typed(arrays["x"], arrays["y"])
    return Dataset(x, y, *_typed(arrays["x_test"], arrays["y_test"])) if "x_test" in arrays else _with_test(x, y)


def _typed(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Labels as int64, other targets as float32."""
    if np.issubdtype(y.dtype, np.integer) and y.min() < 0:
        raise ValueError(f"load: labels must be integers ≥ 0, got {y.min()}.")
    return x, y.astype("int64" if np.issubdtype(y.dtype, np.integer) else "float32")


def _with_test(x: np.ndarray, y: np.ndarray) -> Dataset:
    labels = y if np.issubdtype(y.dtype, np.integer) and np.bincount(y).min() > 1 else None
    x, x_test, y, y_test = train_test_split(x, y, test_size=TEST_SHARE, random_state=0, stratify=labels)
    return Dataset(x, y, x_test, y_test)
