"""Data sets, embedded, prepared by TFDS or in a file: rows to fit, to choose by and to report.

TFDS sets are read without TensorFlow and without a network. Needs scikit-learn (the extra ``examples``).
"""

import math
import zlib
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import tensorflow_datasets as tfds
from sklearn import datasets
from sklearn.model_selection import train_test_split

from cronos_flax._head.fingerprint import crc
from cronos_flax.compare.arrays import inputs, targets

EMBEDDED = ("digits", "wine", "breast_cancer", "diabetes")
SCALINGS = ("standardise", "unit", "none")
_NAMES = 10  # of classes, printed at most
_ROWS = 1024  # of which moments are taken at a time
TEST_SHARE = 0.2  # of sets that come without a test split


class Dataset(NamedTuple):
    """A whole set: inputs ``(n, ...)``, and labels or, for regression, floats ``(n,)``.

    ``classes`` are the names of labels that were not numbers 0, 1, … where they came from, in the order of the labels.
    ``unused`` are the names of other arrays of a file.
    """

    x: np.ndarray
    y: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    classes: tuple[str, ...] | None = None
    unused: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        x: np.ndarray,
        y: np.ndarray,
        x_test: np.ndarray | None = None,
        y_test: np.ndarray | None = None,
        kind: str | None = None,
    ) -> Self:
        """A set of arrays as users store them.

        Args:
            x: inputs ``(n, ...)``: real numbers.
            y: labels or values ``(n,)``, as :func:`cronos_flax.compare.arrays.targets` takes them.
            x_test: inputs of a test split, of the same shape but for the number of rows; None for a fifth of the rows,
                always the same.
            y_test: its labels or values.
            kind: ``"classes"``, ``"values"``, or None to decide by the dtype of y.

        Raises:
            ValueError: if they are of a wrong dtype or shape, are not finite, or do not fit together.
        """
        if (x_test is None) != (y_test is None):
            raise ValueError("there must be both of x_test and y_test, or none.")
        for split, part, labels in (("", x, y), ("_test", x_test, y_test)):
            if part is not None and labels is not None and (labels.ndim != 1 or part.shape[:1] != labels.shape):
                raise ValueError(
                    f"x{split} must have shape (n, ...) and y{split} (n,), got {part.shape} and {labels.shape}."
                )
        x = inputs("x", x)
        if x_test is not None:
            x_test = inputs("x_test", x_test)
            if x_test.shape[1:] != x.shape[1:]:
                raise ValueError(
                    f"x_test must have rows like those of x, {x.shape[1:]}, got {x_test.shape[1:]} (shapes {x.shape} "
                    f"and {x_test.shape})."
                )
        made = targets(y, y_test, kind)
        if x_test is not None and made.y_test is not None:
            return cls(x, made.y, x_test, made.y_test, made.classes)
        labels = made.y if np.issubdtype(made.y.dtype, np.integer) else None
        fit, test = _apart(len(x), math.ceil(TEST_SHARE * len(x)), 0, labels)
        return cls(x[fit], made.y[fit], x[test], made.y[test], made.classes)

    @property
    def num_classes(self) -> int | None:
        """How many classes there are; None for regression."""
        if not np.issubdtype(self.y.dtype, np.integer):
            return None
        return len(self.classes) if self.classes else int(max(self.y.max(), self.y_test.max())) + 1

    @property
    def checksum(self) -> str:
        """Of all values and shapes: another set, or another order of rows, has another one."""
        total = 0
        for array in (self.x, self.y, self.x_test, self.y_test):
            total = crc(array, zlib.crc32(str(array.shape).encode(), total))
        return f"{total:08x}"

    @property
    def notes(self) -> dict[str, str]:
        """What the arrays were taken as: ``inputs``, ``targets``, ``rare`` (classes of one row), ``not used``."""
        as_float = "" if self.x.dtype == "float32" else f" {self.x.dtype}, used as float32"
        notes = {"inputs": f"{self.x.shape[1:]}{as_float}", "targets": "values (regression)"}
        if self.num_classes is not None:
            names = self.classes or ()
            said = ", ".join(f"{name!r} is {label}" for label, name in enumerate(names[:_NAMES]))
            more = f", … {names[-1]!r} is {len(names) - 1}" if len(names) > _NAMES else ""
            notes["targets"] = f"{self.num_classes} classes" + (f": {said}{more}" if said else "")
            labels, counts = np.unique(self.y, return_counts=True)
            alone = [names[label] if names else str(label) for label in labels[counts == 1]]
            if alone:
                notes["rare"] = f"classes of one row, which is never held back ({len(alone)}): " + ", ".join(
                    alone[:_NAMES] + ["…"] * (len(alone) > _NAMES)
                )
        if self.unused:
            notes["not used"] = f"the arrays {', '.join(self.unused)}: only x, y, x_test and y_test are"
        return notes


class Split(NamedTuple):
    """Rows to fit, to choose by and to report, inputs scaled, float32."""

    x: np.ndarray
    y: np.ndarray
    x_validation: np.ndarray
    y_validation: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray

    @classmethod
    def of(
        cls,
        dataset: Dataset,
        seed: int,
        validation: int,
        scaling: str,
        rows: int | None = None,
        shots: int | None = None,
    ) -> Self:
        """Hold rows of the training part back, at random; the same for the same seed.

        Each class is split in proportion, where there are rows enough. The row of a class that has one is fitted.

        Args:
            dataset: the whole set.
            seed: of the rows that are held back.
            validation: how many these are.
            scaling: ``"standardise"``: each feature of a table, each channel of images, to mean 0 and deviation 1 on
                the rows to fit; ``"unit"``: by the largest number that the dtype of the inputs holds or, of floats
                and of integers of 32 bits and more, the largest there; ``"none"``. Regression targets are standardised
                with any but the last.
            rows: how many to fit at most; None for all that are left.
            shots: how many rows of each class to fit; None for no such choice.

        Raises:
            ValueError: if nothing is left to fit; or if a class has fewer rows than ``shots``, or there are none.
        """
        left = len(dataset.y) - validation
        if validation < 1 or not 0 < (left if rows is None else rows) <= left:
            raise ValueError(
                "`rows` and `validation` must leave rows to fit and hold back at least one, got "
                f"{rows} and {validation} of {len(dataset.y)}."
            )
        labels = None if dataset.num_classes is None else dataset.y
        fit, held = _apart(len(dataset.y), validation, seed, labels)
        fit = fit[:rows] if shots is None else _of_each(shots, fit, labels)
        shift, scale = _scale(dataset.x, fit, scaling)
        x, x_held, x_test = (
            ((part - shift) / scale).astype("float32") for part in (dataset.x[fit], dataset.x[held], dataset.x_test)
        )
        y, y_held, y_test = dataset.y[fit], dataset.y[held], dataset.y_test
        if dataset.num_classes is None:
            shift, scale = (y.mean(dtype=float), y.std(dtype=float) or 1) if scaling != "none" else (0, 1)
            y, y_held, y_test = (((part - shift) / scale).astype("float32") for part in (y, y_held, y_test))
        return cls(x, y, x_held, y_held, x_test, y_test)


def _of_each(shots: int, rows: np.ndarray, labels: np.ndarray | None) -> np.ndarray:
    """So many rows of each class, in the order in which they come."""
    if labels is None:
        raise ValueError("`shots` is for sets with classes, and the targets of this one are values. Use `rows`.")
    classes, counts = np.unique(labels[rows], return_counts=True)
    if counts.min() < shots:
        raise ValueError(
            f"`shots` must be at most {counts.min()}, the rows of the smallest class, {classes[counts.argmin()]}, that "
            f"are not held back, got {shots}."
        )
    chosen = np.concatenate([np.flatnonzero(labels[rows] == label)[:shots] for label in classes])
    return rows[np.sort(chosen)]


def _scale(x: np.ndarray, fit: np.ndarray, scaling: str) -> tuple[Any, Any]:
    """What to subtract from the inputs, and what to divide them by."""
    if scaling == "none":
        return 0, 1
    if scaling == "unit":
        is_of_pixels = np.issubdtype(x.dtype, np.integer) and x.dtype.itemsize <= 2
        return 0, float(np.iinfo(x.dtype).max if is_of_pixels else np.abs(x).max() or 1)
    exact, used = (np.result_type(x.dtype, dtype) for dtype in ("float64", "float32"))
    pieces = np.split(fit, range(_ROWS, len(fit), _ROWS))  # all rows in float64 may be too much
    axes, count = tuple(range(x.ndim - 1)), len(fit) * math.prod(x.shape[1:-1])
    first = x[fit[0]].reshape(-1, x.shape[-1])[0].astype(exact)  # from which the mean of a constant is exact
    mean = first + sum((x[rows] - first).sum(axis=axes) for rows in pieces) / count
    deviation = np.sqrt(sum(np.square(x[rows] - mean).sum(axis=axes) for rows in pieces) / count)
    return mean.astype(used), np.where(deviation > 0, deviation, 1).astype(used)


def load(name: str, data_dir: str | Path | None = None, kind: str | None = None) -> Dataset:
    """A data set by name.

    Args:
        name: one of ``EMBEDDED``; a path that ends in ``.npz``, with arrays ``x``, ``y`` and, if there is a test split,
            ``x_test`` and ``y_test``; or a TFDS name, with splits ``train`` and ``test``.
        data_dir: for TFDS, the directory that holds ``name/version/…``.
        kind: ``"classes"`` or ``"values"``: what the targets are. None: ``diabetes`` has values; for other sets the
            dtype decides, see :func:`cronos_flax.compare.arrays.targets`.

    Returns:
        The set; where it has no test split, a fifth of the rows, always the same, is that.

    Raises:
        ValueError: if it is not there or does not fit. The message says what would.
    """
    if name in EMBEDDED:
        source = getattr(datasets, f"load_{name}")()
        x = source.images[..., None] if name == "digits" else source.data
        kind = kind or ("values" if name == "diabetes" else "classes")
        return Dataset.of(x.astype("float32"), source.target, kind=kind)
    if name.endswith(".npz"):
        return _load_npz(Path(name), kind)
    if data_dir is None:
        raise ValueError(
            f"load: `data_dir` is needed for a TFDS set, and {name!r} is none of {', '.join(EMBEDDED)}, nor a path "
            "that ends in .npz. Say where prepared TFDS sets lie."
        )
    return Dataset.of(*load_tfds(name, "train", data_dir), *load_tfds(name, "test", data_dir), kind=kind)


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
        features = set(source.dataset_info.features)
        examples = source.__getitems__(range(len(source))) if {"image", "label"} <= features else []
    except Exception as error:  # files that are not whole end in errors of many kinds
        raise ValueError(
            f"load_tfds: split {split!r} of {name!r} in {directory} cannot be read as array_record: {error}"
        ) from error
    if not {"image", "label"} <= features:
        raise ValueError(f"load_tfds: {name!r} must have the features 'image' and 'label', got {sorted(features)}.")
    images = [example["image"] for example in examples]
    shapes = {image.shape for image in images}
    if len(shapes) != 1:
        raise ValueError(f"load_tfds: the images of {name!r} must have one size, got {len(shapes)} sizes.")
    return np.stack(images), np.asarray([example["label"] for example in examples])


def _load_npz(path: Path, kind: str | None) -> Dataset:
    """A set in a file of NumPy's. Pickled objects are never loaded."""
    try:
        with path.open("rb") as opened:
            file = np.load(opened, allow_pickle=False)
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise ValueError("it holds one array (.npy), not several by name")
            there = list(file.files)
            arrays = {name: file[name] for name in ("x", "y", "x_test", "y_test") if name in there}
    except Exception as error:  # a file that is not whole ends in errors of many kinds
        said = str(error).rstrip(".") or type(error).__name__
        if "pickle" in said:  # which NumPy advises to load
            said = "it has Python objects, which are not loaded, or is not NumPy's"
        raise ValueError(f"load: {path} must be an .npz file of plain arrays, not cut short: {said}.") from None
    if not {"x", "y"} <= set(arrays):
        raise ValueError(f"load: {path} must have the arrays x and y, got {', '.join(there) or 'none'}.")
    try:
        return Dataset.of(**arrays, kind=kind)._replace(unused=tuple(sorted(set(there) - set(arrays))))
    except ValueError as error:
        raise ValueError(f"load: in {path} {error}") from None


def _apart(rows: int, held: int, seed: int, labels: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """The rows to fit and those to hold back, at random; by classes in proportion, where there are rows enough.

    A class of one row cannot be split: its row is not held back, if there are others enough.
    """
    if not 0 < held < rows:
        raise ValueError(f"there must be rows to fit and rows to hold back, got {rows} rows in all.")
    others, alone, stratify = np.arange(rows), np.zeros(rows, bool), None
    if labels is not None:
        _, inverse, counts = np.unique(labels, return_inverse=True, return_counts=True)
        if held < rows - np.sum(counts == 1):
            alone = counts[inverse] == 1
            others = np.flatnonzero(~alone)
            if np.sum(counts > 1) <= min(held, len(others) - held):
                stratify = labels[others]
    fit, back = train_test_split(others, test_size=held, random_state=seed, stratify=stratify)
    if alone.any():
        fit = np.random.default_rng(seed).permutation(np.concatenate([fit, np.flatnonzero(alone)]))
    return fit, back
