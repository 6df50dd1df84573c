"""Arrays as users store them, turned into inputs and targets, or refused: no value changes without a word."""

from typing import NamedTuple

import numpy as np

KINDS = ("classes", "values")
_ROUNDED = 1e-2  # of the standard deviation of values: what rounding to float32 may add
_KINDS_OF_DTYPES = {"c": "complex", "O": "objects", "M": "dates", "m": "time spans", "V": "records or raw bytes"}


class Targets(NamedTuple):
    """Labels, int64, or values, float32; of the test split if there is one. ``classes`` are names of the labels."""

    y: np.ndarray
    y_test: np.ndarray | None
    classes: tuple[str, ...] | None = None


def inputs(name: str, x: np.ndarray) -> np.ndarray:
    """Rows of finite real numbers ``(n, ...)``, in native byte order, bools as float32.

    Args:
        name: of the array, for messages.
        x: the array.

    Raises:
        ValueError: if it is not that.
    """
    _refuse_dtype(name, x, "biuf", "real numbers (bool, integer or float)")
    if x.ndim < 2 or not x.size:
        raise ValueError(f"{name} must have shape (n, ...), got {x.shape}.")
    _refuse_infinite(name, x)
    if x.dtype.kind == "f" and x.dtype.itemsize > 4 and np.abs(x).max() > np.finfo("float32").max:
        raise ValueError(f"{name} as float32 must be finite, got values up to {np.abs(x).max():.3g}. Divide it.")
    return x.astype("float32" if x.dtype.kind == "b" else x.dtype.newbyteorder("="), copy=False)


def targets(y: np.ndarray, y_test: np.ndarray | None, kind: str | None = None) -> Targets:
    """Labels or values.

    Integers ≥ 0 are labels as they are. Strings, bools and floats that are whole numbers become labels 0, 1, … in
    increasing order of what they are. Floats that are not whole are values, for regression.

    Args:
        y: the targets ``(n,)``.
        y_test: those of the test split.
        kind: ``"classes"`` or ``"values"``; None decides as above, and refuses what may be either: whole floats of more
            different values than each has rows.

    Raises:
        ValueError: if they are neither, or ``y_test`` has labels that ``y`` does not have.
    """
    if kind not in (None, *KINDS):
        raise ValueError(f"`targets` must be one of {', '.join(KINDS)}, got {kind!r}.")
    parts = {"y": y} if y_test is None else {"y": y, "y_test": y_test}
    for name, part in parts.items():
        _refuse_dtype(name, part, "biufUS", "labels (integers, strings, bools, whole floats) or values (floats)")
        if part.dtype.kind == "f":
            _refuse_infinite(name, part)
    if y_test is not None and {y.dtype.kind, y_test.dtype.kind} & set("US") and y.dtype.kind != y_test.dtype.kind:
        raise ValueError(f"y and y_test must be of one kind, got {y.dtype} and {y_test.dtype}.")
    is_whole = all(part.dtype.kind != "f" or bool(np.all(part == np.floor(part))) for part in parts.values())
    if kind == "values" or (kind is None and not is_whole and y.dtype.kind == "f"):
        values = _values(y)
        if len(y) > 1 and np.all(values == values[:1]):
            raise ValueError(f"y as float32 must have at least two values, got only {values[0]:.6g}.")
        if np.std(values - y.astype(float)) > _ROUNDED * np.std(y, dtype=float):
            raise ValueError(
                f"y must vary around zero, got values up to {np.abs(y).max():.3g} with a standard deviation of "
                f"{np.std(y, dtype=float):.3g}, which float32 rounds away in part. Subtract their mean before they are "
                "stored."
            )
        return Targets(values, None if y_test is None else _values(y_test))
    if not is_whole:
        raise ValueError("y and y_test must be whole numbers to be classes, got floats that are not.")
    if kind is None and y.dtype.kind == "f" and len(np.unique(y)) ** 2 > len(y):
        raise ValueError(
            f"y has {len(np.unique(y))} different whole numbers as floats in {len(y)} rows: these may be classes or "
            "values. Say which: `targets` (--targets) must be classes or values."
        )
    return _labels(y, y_test)


def _labels(y: np.ndarray, y_test: np.ndarray | None) -> Targets:
    found = np.unique(y)
    if y.dtype.kind in "iu":
        if y.min() < 0:
            raise ValueError(f"labels must be integers ≥ 0, got {y.min()}.")
        if y.max() >= max(len(y), 2):
            raise ValueError(
                f"labels must be 0, 1, …, number of classes − 1, got up to {y.max()} in {len(y)} rows. For regression "
                "say `targets` (--targets) values, or store floats."
            )
    if len(found) < 2:
        raise ValueError(f"y must have at least two classes, got only {_name(found[0])}.")
    unknown = np.setdiff1d([] if y_test is None else y_test, found)
    if y_test is not None and len(unknown):
        names = ", ".join(map(_name, unknown[:5]))
        raise ValueError(f"y_test must have labels that y has, got {len(unknown)} that it does not: {names}.")
    if y.dtype.kind in "iu":
        return Targets(y.astype("int64"), None if y_test is None else y_test.astype("int64"))
    test = None if y_test is None else np.searchsorted(found, y_test).astype("int64")
    return Targets(np.searchsorted(found, y).astype("int64"), test, tuple(map(_name, found)))


def _values(y: np.ndarray) -> np.ndarray:
    if y.dtype.kind in "US":
        raise ValueError(f"y and y_test must be numbers to be values, got {y.dtype}.")
    with np.errstate(over="ignore"):
        values = y.astype("float32")
    _refuse_infinite("y as float32", values)
    return values


def _name(label: object) -> str:
    """Of a class, as it is printed."""
    if isinstance(label, bytes):
        return label.decode(errors="replace")
    return str(int(label)) if isinstance(label, np.floating) else str(label)


def _refuse_dtype(name: str, array: np.ndarray, kinds: str, said: str) -> None:
    kind = array.dtype.kind
    if kind not in kinds:
        got = f"{_KINDS_OF_DTYPES.get(kind, 'text')} ({array.dtype})"
        raise ValueError(f"{name} must be {said}, got {got}. Convert it before it is stored.")


def _refuse_infinite(name: str, array: np.ndarray) -> None:
    rows = np.any(~np.isfinite(array).reshape(len(array), -1), axis=1)
    if rows.any():
        raise ValueError(
            f"{name} must be finite, got NaN or infinity in {rows.sum()} of {len(rows)} rows. "
            "Remove or impute them before the file is written."
        )
