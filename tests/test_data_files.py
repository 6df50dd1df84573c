"""Sets in files of users: labels of every kind, and no value that changes without a word."""

import zipfile
from pathlib import Path

import numpy as np
import pytest
from stopped import stopped

from cronos_flax.compare.cli import main
from cronos_flax.compare.data import Dataset, Split, load
from cronos_flax.compare.results import kept
from cronos_flax.compare.sweep import sweep
from cronos_flax.compare.task import Run, Settings

ROWS = 60
X = np.random.default_rng(0).normal(size=(ROWS, 3))
LABELS = np.arange(ROWS) % 3
NAMES = np.array(["cat", "dog", "emu"])


def stored(tmp_path, **arrays):
    np.savez(tmp_path / "set.npz", **{"x": X, "y": LABELS} | arrays)
    return str(tmp_path / "set.npz")


CLASSES = {
    "strings": (NAMES[LABELS], ("cat", "dog", "emu")),
    "bytes": (NAMES[LABELS].astype("S"), ("cat", "dog", "emu")),
    "big-endian strings": (NAMES[LABELS].astype(">U3"), ("cat", "dog", "emu")),
    "whole floats": (LABELS * 5.0 - 5, ("-5", "0", "5")),
    "big-endian half floats": ((LABELS + 1).astype(">f2"), ("1", "2", "3")),
    "bools": (LABELS > 0, ("False", "True")),
    "integers": (LABELS, None),
    "big-endian bytes": (LABELS.astype(">u2"), None),
}


@pytest.mark.parametrize("case", CLASSES)
def test_labels_of_every_kind_become_classes(case, tmp_path):
    """Bools and whole floats became regression, strings a traceback."""
    y, names = CLASSES[case]
    data = load(stored(tmp_path, y=y))
    assert data.classes == names
    assert data.num_classes == (len(names) if names else 3)
    assert data.y.dtype == data.y_test.dtype == "int64"
    split = load(stored(tmp_path, y=y, x_test=X[:7], y_test=y[:7]))
    expected = np.minimum(LABELS, (data.num_classes or 0) - 1)
    np.testing.assert_array_equal(split.y, expected)
    np.testing.assert_array_equal(split.y_test, expected[:7])
    said = split.notes["targets"]
    assert said.startswith(f"{data.num_classes} classes")
    assert all(f"{name!r} is {label}" in said for label, name in enumerate(names or ()))


@pytest.mark.parametrize(
    ("y", "kind"),
    [(X[:, 0], None), (X[:, 0].astype(">f4"), None), *((y, "values") for y in (LABELS, LABELS * 1.0, LABELS > 1))],
)
def test_values_are_those_that_are_not_whole_or_that_one_says_are_values(y, kind, tmp_path):
    data = load(stored(tmp_path, y=y, x_test=X[:5], y_test=y[:5]), kind=kind)
    assert data.num_classes is None
    assert data.notes["targets"] == "values (regression)"
    assert data.y.dtype == "float32"
    np.testing.assert_allclose(data.y, y.astype(float), rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float64", ">f8", ">f4", "float16", "longdouble", "int64", ">i2", "uint8", "bool"])
def test_inputs_of_every_real_dtype_are_the_same_numbers(dtype, tmp_path):
    x = np.round(X * 2 + 4).clip(0, 1 if dtype == "bool" else 9)
    data = load(stored(tmp_path, x=x.astype(dtype), x_test=x[:5].astype(dtype), y_test=LABELS[:5]))
    assert data.x.dtype.isnative
    np.testing.assert_array_equal(data.x.astype(float), x)
    expected = "(3,)" if dtype in ("bool", ">f4") else f"(3,) {np.dtype(dtype).newbyteorder('=')}, used as float32"
    assert data.notes["inputs"] == expected
    split = Split.of(data, 0, 12, "unit")
    assert split.x.dtype == split.x_test.dtype == "float32"


@pytest.mark.parametrize(
    "x",
    [
        np.random.default_rng(0).normal(1e9, 1, (50, 2)),
        np.random.default_rng(0).normal(0, 1e30, (50, 2)),
        np.random.default_rng(0).integers(1_600_000_000, 1_600_000_500, (50, 2)),
        np.random.default_rng(0).integers(0, 256, (9000, 32, 32, 3), dtype="uint8"),  # sums past 2³² in float32
    ],
    ids=["far from zero", "large", "dates in seconds", "images"],
)
def test_features_of_any_range_are_standardised(x):
    """Means were taken in float32: at 50,000 images they were two thirds of what they are."""
    split = Split.of(Dataset.of(x, np.arange(len(x)) % 2, x[:2], np.arange(2)), 0, 10, "standardise")
    axes = tuple(range(x.ndim - 1))
    np.testing.assert_allclose(split.x.mean(axis=axes, dtype=float), 0, atol=1e-4)
    np.testing.assert_allclose(split.x.std(axis=axes, dtype=float), 1, rtol=1e-4)


def test_a_feature_that_never_varied_in_the_rows_to_fit_is_not_divided_by_rounding():
    """One that was .1 in float32 had a deviation of 1e-6, and .2 in a test row became 100,000."""
    x = np.full((1000, 2), 0.1, "float32")
    split = Split.of(Dataset.of(x, np.arange(1000) % 2, x[:2] * 2, np.arange(2)), 0, 10, "standardise")
    np.testing.assert_array_equal(split.x, 0)
    np.testing.assert_allclose(split.x_test, 0.1)


@pytest.mark.parametrize(("dtype", "largest"), [("uint8", 255), ("uint16", 65535), ("int64", 200), ("float32", 200)])
def test_the_unit_of_pixels_is_that_of_their_type_where_it_is_one_of_pixels(dtype, largest):
    """Pixels that are stored as int64, as tables are read, were divided by 9e18."""
    x = np.full((50, 2), 200, dtype)
    split = Split.of(Dataset.of(x, np.arange(50) % 2, x[:2], np.arange(2)), 0, 10, "unit")
    np.testing.assert_allclose(split.x, 200 / largest, rtol=1e-6)


def at(array, place, value):
    array = array.copy()
    array[place] = value
    return array


RECORDS = np.zeros(ROWS, [("a", "f4"), ("b", "i4")])
DATES = np.arange(ROWS).astype("M8[D]")
TEST = {"x_test": X[:4], "y_test": LABELS[:4]}
REFUSED = {
    "complex x": ({"x": X * (1 + 1j)}, "x must be real numbers (bool, integer or float), got complex (complex128)"),
    "string x": ({"x": X.astype(str)}, "x must be real numbers (bool, integer or float), got text (<U"),
    "record x": ({"x": np.zeros((ROWS, 2), RECORDS.dtype)}, "got records or raw bytes"),
    "complex x_test": (TEST | {"x_test": X[:4] + 0j}, "x_test must be real numbers"),
    "complex y": ({"y": LABELS + 0j}, "y must be labels (integers, strings, bools, whole floats) or values (floats)"),
    "dates": ({"y": DATES}, "got dates (datetime64[D])"),
    "time spans": ({"y": DATES - DATES[0]}, "got time spans (timedelta64[D])"),
    "records": ({"y": RECORDS}, "got records or raw bytes"),
    "NaN labels": ({"y": at(LABELS * 1.0, 3, np.nan)}, "y must be finite, got NaN or infinity in 1 of 60 rows"),
    "NaN x": ({"x": at(X, (slice(2), 1), np.nan)}, "x must be finite, got NaN or infinity in 2 of 60 rows"),
    "infinite x_test": (TEST | {"x_test": at(X[:4], 0, np.inf)}, "x_test must be finite"),
    "values too large": ({"y": at(X[:, 0], 0, 1e300)}, "y as float32 must be finite"),
    "inputs too large": ({"x": at(X, 0, 1e300)}, "x as float32 must be finite, got values up to 1e+300"),
    "values far from zero": ({"y": X[:, 0] + 1e6}, "y must vary around zero, got values up to 1e+06 with a standard"),
    "one value": ({"y": np.full(ROWS, 0.5)}, "y as float32 must have at least two values, got only 0.5"),
    "one column y": ({"y": LABELS[:, None]}, "y (n,), got (60, 3) and (60, 1)"),
    "scalar x": ({"x": np.float64(1), "y": np.float64(1)}, "must have shape"),
    "flat x": ({"x": X[:, 0]}, "x must have shape (n, ...), got (60,)"),
    "no columns": ({"x": X[:, :0]}, "x must have shape (n, ...), got (60, 0)"),
    "x_test of another width": (TEST | {"x_test": X[:4, :1]}, "x_test must have rows like those of x, (3,), got (1,)"),
    "x_test of another rank": (TEST | {"x_test": X[:4, :, None]}, "x_test must have rows like those of x"),
    "empty test split": ({"x_test": X[:0], "y_test": LABELS[:0]}, "x_test must have shape"),
    "strange test labels": (
        TEST | {"y": NAMES[LABELS], "y_test": np.array(["cat", "owl", "emu", "owl"])},
        "y_test must have labels that y has, got 1 that it does not: owl",
    ),
    "strange test numbers": (TEST | {"y_test": LABELS[:4] + 1}, "y_test must have labels that y has, got 1 that"),
    "other test kind": (TEST | {"y": NAMES[LABELS]}, "y and y_test must be of one kind, got <U3 and int64"),
    "one class": ({"y": np.ones(ROWS)}, "y must have at least two classes, got only 1"),
    "negative labels": ({"y": LABELS - 1}, "labels must be integers ≥ 0, got -1"),
    "huge labels": ({"y": LABELS.astype("uint64") + 2**63}, "labels must be 0, 1, …, number of classes − 1, got up to"),
    "either": ({"y": np.arange(ROWS) // 2 * 1.0}, "y has 30 different whole numbers as floats in 60 rows: these may"),
    "one row": ({"x": X[:1], "y": np.array([0.5])}, "there must be rows to fit and rows to hold back, got 1 rows"),
    "objects": ({"y": NAMES[LABELS].astype(object)}, "it has Python objects, which are not loaded"),
}


def test_arrays_of_other_names_are_told_of(tmp_path):
    """They were passed over without a word, as weights of rows were."""
    notes = load(stored(tmp_path, weights=LABELS, X_test=X)).notes
    assert notes["not used"] == "the arrays X_test, weights: only x, y, x_test and y_test are"
    assert "not used" not in load(stored(tmp_path)).notes


@pytest.mark.parametrize(("model", "x"), [("cnn", X[:, :, None]), ("strided-cnn", X), ("cnn", X[:, None, :, None])])
def test_inputs_that_are_no_images_are_refused_by_models_of_images(model, x, tmp_path, capsys):
    """Convolutions took rows for pixels, or ended in a ZeroDivisionError."""
    code, said = stopped(["info", "--model", model, "--dataset", stored(tmp_path, x=x)], capsys)
    assert code == 2
    assert f"the model {model} takes images (n, height, width, channels) of at least" in said


@pytest.mark.parametrize("case", REFUSED)
def test_arrays_that_would_change_without_a_word_are_refused(case, tmp_path, capsys):
    """Before: complex inputs lost their imaginary part."""
    arrays, message = REFUSED[case]
    code, said = stopped(["info", "--dataset", stored(tmp_path, **arrays)], capsys)
    assert code == 2
    assert message in said
    assert f"{tmp_path}/set.npz" in said


def test_kinds_that_do_not_fit_are_refused(tmp_path, capsys):
    for y, kind, message in (
        (NAMES[LABELS], "values", "y and y_test must be numbers to be values, got <U3"),
        (X[:, 0], "classes", "must be whole numbers to be classes"),
    ):
        code, said = stopped(["info", "--dataset", stored(tmp_path, y=y), "--targets", kind], capsys)
        assert (code, message in said) == (2, True)
    with pytest.raises(ValueError, match="`targets` must be one of classes, values, got 'labels'"):
        Dataset.of(X, LABELS, kind="labels")


def test_objects_that_nobody_asked_for_are_left_alone(tmp_path):
    data = load(stored(tmp_path, names=np.array([{}, None])))
    assert len(data.y) + len(data.y_test) == ROWS


def test_files_cut_anywhere_or_of_another_kind_are_one_line(tmp_path, capsys):
    """Before: a truncated file gave a traceback."""
    whole = Path(stored(tmp_path)).read_bytes()
    path = tmp_path / "bad.npz"
    for size in (0, 3, 100, len(whole) // 2, len(whole) - 300, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=rf"load: {path} must be an \.npz file of plain arrays, not cut short"):
            load(str(path))
    path.write_bytes(whole[:700] + bytes([whole[700] ^ 1]) + whole[701:])
    with pytest.raises(ValueError, match="Bad CRC"):
        load(str(path))
    with path.open("wb") as file:
        np.save(file, X)
    with pytest.raises(ValueError, match=r"one array \(\.npy\)"):
        load(str(path))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", b"no array")
    with pytest.raises(ValueError, match="must"):
        load(str(path))
    (tmp_path / "folder.npz").mkdir()
    code, said = stopped(["info", "--dataset", tmp_path / "folder.npz"], capsys)
    assert code == 2
    assert f"Is a directory: '{tmp_path}/folder.npz'" in said


def test_prepared_sets_that_are_not_whole_are_one_line(tmp_path, capsys):
    (tmp_path / "birds" / "1.0.0").mkdir(parents=True)
    (tmp_path / "birds" / "1.0.0" / "dataset_info.json").write_text('{"name": "bir')
    code, said = stopped(["info", "--dataset", "birds", "--data-dir", tmp_path], capsys)
    assert code == 2
    assert f"load_tfds: split 'train' of 'birds' in {tmp_path} cannot be read as array_record" in said


def test_a_sweep_does_not_go_on_with_other_data_of_the_same_name(tmp_path):
    """The rows of both would have stood in one table."""
    settings = Settings(stored(tmp_path), model="two-layer", epochs=1, validation=20)
    run = Run("linear-probe", 1.0, 0)
    rows = sweep(settings, [run, run], tmp_path / "out")
    assert sweep(settings, [run], tmp_path / "out") == rows == kept(tmp_path / "out" / "results.jsonl")
    assert len(rows) == 1
    stored(tmp_path, x=at(X, 0, 1.5))
    with pytest.raises(ValueError, match=r"holds runs on other data: .*set\.npz has changed since"):
        sweep(settings, [run], tmp_path / "out")


# --- Rare classes, and what is said ----------------------------------------------------------------------------------


@pytest.mark.parametrize("alone", [1, 2, 20, 58])
def test_classes_of_one_row_are_never_held_back(alone, tmp_path):
    """A class with one row ended `info` in scikit-learn's own error."""
    y = np.concatenate([np.arange(ROWS - alone) % 2, np.arange(2, 2 + alone)])
    data = load(stored(tmp_path, y=y))
    assert (f"never held back ({alone})" in data.notes.get("rare", "")) == (alone < 58)
    whole = load(stored(tmp_path, y=y, x_test=X[:5], y_test=y[:5]))
    held = ROWS // 5
    for rows in (None, 10):
        split = Split.of(whole, 0, held, "none", rows)
        assert len(split.y_validation) == held
        assert len(split.y) == (rows or ROWS - held)
        if alone < 58:  # otherwise there are no other rows
            assert split.y_validation.max() < 2
    if alone < 3:
        assert set(Split.of(whole, 0, held, "none").y) == set(y)


def test_info_says_what_it_took_the_arrays_as(tmp_path, capsys):
    y = at(NAMES[LABELS], 0, "auk")
    path = stored(tmp_path, x=(X > 0).astype("uint8"), y=y, x_test=X[:4], y_test=y[3:7])
    assert main(["info", "--dataset", path, "--model", "two-layer"]) == 0
    out = capsys.readouterr().out
    assert "inputs       (3,) uint8, used as float32\n" in out
    assert "targets      4 classes: 'auk' is 0, 'cat' is 1, 'dog' is 2, 'emu' is 3\n" in out
    assert "rare         classes of one row, which is never held back (1): auk\n" in out
