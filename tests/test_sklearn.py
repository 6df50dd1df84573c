"""The estimators for scikit-learn: its own checks of every estimator, and what people do with one."""

import dataclasses
import pickle

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.sparse import csr_array
from sklearn.base import clone
from sklearn.datasets import load_iris
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

import cronos_flax as cf
from cronos_flax.sklearn import CronosClassifier, CronosRegressor

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")


@pytest.fixture
def iris():
    """120 rows of iris in random order, and their labels."""
    X, y = load_iris(return_X_y=True)
    order = np.random.RandomState(0).permutation(len(X))[:120]
    return X[order], y[order]


def classifier(**settings):
    return CronosClassifier(**{"n_neurons": 16, "max_iter": 20, "random_state": 0, **settings})


def regressor(**settings):
    return CronosRegressor(**{"n_neurons": 16, "max_iter": 20, "random_state": 0, **settings})


@pytest.mark.slow
@parametrize_with_checks([CronosClassifier(16, max_iter=20), CronosRegressor(16, max_iter=20)])
def test_scikit_learns_own_checks(estimator, check):
    check(estimator)


def test_search_validation_pipelines_and_clones_do_what_people_expect(iris):
    X, y = iris
    pipeline = make_pipeline(StandardScaler(), classifier())
    search = GridSearchCV(pipeline, {"cronosclassifier__beta": [1e-3, 10.0]}, cv=3).fit(X, y)
    assert search.best_params_ == {"cronosclassifier__beta": 1e-3}
    assert search.best_score_ > 0.9
    np.testing.assert_allclose(
        cross_val_score(clone(pipeline).set_params(cronosclassifier__beta=1e-3), X, y, cv=3),
        [search.cv_results_[f"split{i}_test_score"][0] for i in range(3)],
    )
    assert clone(classifier(beta="path")).get_params() == classifier(beta="path").get_params()


def test_units_of_features_do_not_matter_and_a_constant_column_says_nothing(iris):
    X, y = iris
    units, zero = np.array([1e8, 1e-8, 1.0, 1e30]), np.array([1e10, 0.0, -5.0, 0.0])
    plain = classifier().fit(X, y).predict_proba(X)
    np.testing.assert_allclose(classifier().fit(X * units + zero, y).predict_proba(X * units + zero), plain, atol=1e-3)
    with_constant = classifier().fit(np.column_stack([X[:, :3], np.full(len(X), 7.1)]), y)
    assert not with_constant.kernel1_[3].any()
    assert np.all(np.abs(plain.sum(axis=1) - 1) < 1e-12)


def test_neither_order_nor_repetition_of_rows_matters_and_weights_are_repetitions(iris):
    X, y = iris
    weight = np.random.RandomState(0).randint(0, 3, len(y))
    rows = np.random.RandomState(1).permutation(np.repeat(np.arange(len(y)), weight))
    weighted = classifier().fit(X, y, sample_weight=weight)
    np.testing.assert_array_equal(classifier().fit(X[rows], y[rows]).predict_proba(X), weighted.predict_proba(X))


def test_balanced_classes_count_weights_as_repetitions_and_the_unit_of_weights_does_not_matter(iris):
    X, y = iris
    weight = np.random.RandomState(0).randint(0, 3, len(y))
    weighted = classifier(class_weight="balanced").fit(X, y, sample_weight=weight).predict_proba(X)
    rows = np.repeat(np.arange(len(y)), weight)
    np.testing.assert_array_equal(classifier(class_weight="balanced").fit(X[rows], y[rows]).predict_proba(X), weighted)
    for unit in (2.0**-900, 2.0**1022):  # the sum of the large ones was infinite, and the mean of every column zero
        other = classifier(class_weight="balanced").fit(X, y, sample_weight=weight * unit)
        np.testing.assert_array_equal(other.predict_proba(X), weighted)
        y_other, y_one = (regressor().fit(X, y, sample_weight=weight * by).predict(X) for by in (unit, 1))
        np.testing.assert_array_equal(y_other, y_one)


def test_the_attributes_are_the_network_and_plain_numpy(iris):
    X, y = iris
    fitted = classifier().fit(X, y)
    kinds = {type(value) for value in vars(pickle.loads(pickle.dumps(fitted))).values()}
    assert kinds <= {np.ndarray, int, float, str, bool, type(None)}
    network = cf.TwoLayer(fitted.kernel1_, fitted.bias1_, fitted.kernel2_, fitted.bias2_)
    outputs = np.asarray(cf.predict(network, X))
    np.testing.assert_allclose(outputs, fitted.decision_function(X), rtol=1e-3, atol=1e-3)
    assert not hasattr(fitted, "transform")  # so there is nothing for set_output to set


def test_column_names_are_kept_and_compared(iris):
    pandas = pytest.importorskip("pandas")
    X, y = iris
    frame = pandas.DataFrame(X, columns=list("abcd"))
    fitted = classifier().fit(frame, pandas.Series(y))
    assert fitted.feature_names_in_.tolist() == list("abcd")
    assert fitted.n_features_in_ == 4
    with pytest.raises(ValueError, match="feature names"):
        fitted.predict(frame[list("dcba")])


def test_targets_come_back_in_their_shape_and_units(iris):
    X = iris[0]
    y = np.stack([X[:, 0] ** 2, -X[:, 1], X[:, 2] * X[:, 3]], axis=1)
    plain = regressor().fit(X, y)
    assert plain.predict(X[:7]).shape == (7, 3)
    assert plain.score(X, y) > 0.9
    moved = regressor().fit(X, 1e9 * y + 1e12)
    np.testing.assert_allclose((moved.predict(X) - 1e12) / 1e9, plain.predict(X), atol=0.1)
    assert regressor().fit(X, y[:, 0]).predict(X[:7]).shape == (7,)


@pytest.mark.parametrize("loss", ["softmax", "logistic", "squared", "hinge"])
def test_two_classes_with_each_loss(iris, loss):
    X, y = iris
    names = np.where(y == 2, "yes", "no")
    fitted = classifier(loss=loss).fit(X, names)
    assert fitted.classes_.tolist() == ["no", "yes"]
    assert fitted.score(X, names) > 0.9
    scores = fitted.decision_function(X)
    assert scores.shape == (120,)
    assert hasattr(fitted, "predict_proba") == (loss in ("softmax", "logistic"))
    if hasattr(fitted, "predict_proba"):
        np.testing.assert_allclose(fitted.predict_proba(X)[:, 1], 1 / (1 + np.exp(-scores)))


def test_weight_decay_chosen_on_held_out_rows(iris):
    fitted = classifier(beta="path").fit(*iris)
    assert fitted.beta_ > 0
    assert fitted.score(*iris) > 0.9


def test_fewer_than_ten_rows_of_positive_weight_are_too_few_to_choose_on(iris):
    """Those of a class of weight zero were counted, and the fit was refused."""
    rows = np.concatenate([np.flatnonzero(iris[1] == label)[:8] for label in (0, 1)])
    X, y = iris[0][rows], iris[1][rows]
    few, none = (classifier(beta=beta, class_weight={0: 0, 1: 1}).fit(X, y) for beta in ("path", None))
    np.testing.assert_array_equal(few.predict_proba(X), none.predict_proba(X))


def test_a_fit_that_is_refused_leaves_the_estimator_as_it_was(iris):
    X, y = iris
    fitted = classifier(loss="logistic").fit(X, np.where(y == 2, "yes", "no"))
    before = fitted.predict(X)
    with pytest.raises(ValueError, match="two classes"):
        fitted.fit(X, y)
    np.testing.assert_array_equal(fitted.predict(X), before)


@pytest.mark.parametrize("estimator", [classifier(), regressor()])
def test_after_a_fit_that_is_refused_the_columns_are_those_of_the_network(iris, estimator):
    """They were those of the refused rows, and predictions asked for them."""
    X, y = iris
    fitted, unfitted = clone(estimator).fit(X, y), clone(estimator)
    before = dict(vars(fitted))
    for refused in (fitted, unfitted):
        with pytest.raises(ValueError, match="zero"):
            refused.fit(X[:, :2], y, np.zeros(len(y)))
    assert vars(fitted).keys() == before.keys()
    assert all(vars(fitted)[name] is value for name, value in before.items())
    assert fitted.predict(X).shape == y.shape
    assert not hasattr(unfitted, "n_features_in_")


@pytest.mark.parametrize("columns", [1, 2])
def test_a_regression_that_is_refused_leaves_the_shape_of_predictions(iris, columns):
    """Those of a vector had two axes after it."""
    X = iris[0]
    vector, matrix = X[:, 0], X[:, :columns]
    for good, bad in ((vector, matrix), (matrix, vector)):
        fitted = regressor().fit(X, good)
        with pytest.raises(ValueError, match="beta"):
            fitted.set_params(beta=-1.0).fit(X, bad)
        assert fitted.predict(X).shape == good.shape


def test_too_few_iterations_are_said(iris):
    with pytest.warns(ConvergenceWarning, match=r"max_iter=1\."):
        classifier(max_iter=1).fit(*iris)


@pytest.mark.parametrize(
    ("estimator", "change", "message"),
    [
        (classifier(loss="logistic"), {}, "two classes"),
        (classifier(loss="log"), {}, "`loss` must be"),
        (classifier(n_neurons=0), {}, "CronosClassifier: `n_neurons` must be an integer"),
        (classifier(max_iter=0), {}, "CronosClassifier: `max_iter` must be an integer"),
        (classifier(beta=-1.0), {}, "`beta` must be"),
        (classifier(), {"sample_weight": np.zeros(120)}, "zero"),
        (classifier(), {"sample_weight": -np.ones(120)}, "[Nn]egative"),
        (classifier(class_weight={0: -1.0}), {}, "`class_weight` must have finite numbers ≥ 0"),
        (classifier(class_weight={0: np.nan}), {}, "`class_weight` must have finite numbers ≥ 0"),
        (classifier(class_weight=dict.fromkeys(range(3), 0.0)), {}, "`class_weight` must have finite numbers ≥ 0"),
        (regressor(loss="softmax"), {}, "For classes use CronosClassifier"),
        (regressor(standardize="no"), {}, "`standardize` must be True or False, got 'no'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_fit_is_refused_by_its_name(iris, estimator, change, message):
    with pytest.raises(ValueError, match=message):
        estimator.fit(*iris, **change)


@pytest.mark.parametrize("estimator", [classifier(), regressor()])
def test_sparse_features_are_refused(iris, estimator):
    X, y = iris
    with pytest.raises(TypeError, match="dense"):
        estimator.fit(csr_array(X), y)


@dataclasses.dataclass(frozen=True)
class Counts(cf.Loss):
    """Poisson's, of the logarithm of a rate, in some unit."""

    unit: float = 1.0

    def value(self, outputs, targets):
        return self.unit * jnp.sum(jnp.exp(outputs) - targets * outputs, axis=1)


@dataclasses.dataclass(frozen=True)
class Pinball(cf.Loss):
    """Of the quantile .9, in some unit."""

    unit: float = 1.0

    def value(self, outputs, targets):
        r = targets - outputs
        return self.unit * jnp.sum(jnp.maximum(0.9 * r, -0.1 * r), axis=1)


@pytest.mark.parametrize("unit", [1.0, 1e-5])
def test_targets_are_standardised_for_losses_of_residuals_only(unit):
    """Counts became negative, so that the loss had no lower bound, and outputs went to −5,000."""
    X = np.random.RandomState(0).normal(size=(400, 3))
    counts = np.random.RandomState(1).poisson(np.exp(X[:, 0]))
    rates = np.exp(regressor(loss=Counts(unit), beta=1e-2 * unit).fit(X, counts).predict(X))
    assert np.corrcoef(np.log(rates), X[:, 0])[0, 1] > 0.95
    assert rates.mean() == pytest.approx(counts.mean(), rel=1e-2)
    far = 1e6 + 100 * X[:, 0]
    assert np.mean(far <= regressor(loss=Pinball(unit), max_iter=100).fit(X, far).predict(X)) == pytest.approx(
        0.9, abs=0.1
    )


@pytest.mark.filterwarnings("ignore:solve. `X` must differ from row to row")
def test_of_columns_that_never_vary_nothing_is_left(iris):
    """The rounding of their mean was: the network fitted it, and was returned without it."""
    X, y = iris
    np.testing.assert_allclose(regressor().fit(np.full((20, 2), 0.3), np.arange(20.0)).predict([[0.3, 0.3]]), 9.5)
    weight = np.random.RandomState(0).rand(len(y))
    beside = regressor().fit(X, np.column_stack([X[:, 0] * X[:, 1], np.full(len(y), 1e30)]), weight).predict(X)
    np.testing.assert_allclose(beside[:, 0], X[:, 0] * X[:, 1], atol=1)
    np.testing.assert_allclose(beside[:, 1], 1e30)


@pytest.mark.parametrize("estimator", [classifier(), regressor()])
@pytest.mark.parametrize("name", ["X", "y", "sample_weight"])
def test_masked_entries_are_refused(iris, estimator, name):
    """scikit-learn drops the mask, and takes what is under it."""
    X, y = iris
    given = {"X": X, "y": y, "sample_weight": np.ones(len(y))}
    given[name] = np.ma.masked_greater(given[name], given[name].max() - 0.5)
    with pytest.raises(ValueError, match=f"{type(estimator).__name__}: `{name}` must not have masked entries"):
        estimator.fit(**given)
    if name == "X":
        fitted = clone(estimator).fit(X, y)
        with pytest.raises(ValueError, match="`X` must not have masked entries"):
            fitted.predict(given["X"])
        np.testing.assert_array_equal(fitted.predict(np.ma.array(X)), fitted.predict(X))


def test_probabilities_are_those_of_the_loss_that_was_fitted(iris):
    """After `set_params`, outputs of the hinge loss were made probabilities, and those of softmax had none."""
    X, y = iris
    hinge = CronosClassifier(8, loss="hinge", max_iter=500, random_state=0).fit(X, y).set_params(loss="softmax")
    assert not hasattr(hinge, "predict_proba")
    softmax = CronosClassifier(8, random_state=0).fit(X, y)
    before = softmax.predict_proba(X)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(softmax.set_params(loss="hinge"))).predict_proba(X), before)
    assert not hasattr(softmax.fit(X, y), "predict_proba")
    assert hasattr(clone(hinge), "predict_proba")
