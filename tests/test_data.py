"""Data as users have them: each comes out right or is refused by name."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import drawn
from given import HEAD, MODEL, PARAMS, WIDE, Foreign, Interface, X, Y, alternating, batched, losses, plain, same, train

import cronos_flax as cf
from cronos_flax._alternation.batch_check import balanced_weights
from cronos_flax._head.data import Batch
from cronos_flax._solver.arrays import is_array, native
from cronos_flax._solver.losses import LOSSES

# ------------------------------------------------------------------------------------------------ arrays


@pytest.mark.parametrize("kind", [Foreign, Interface, lambda a: a.astype(a.dtype.newbyteorder())])
def test_arrays_of_other_libraries_and_byte_orders_are_those_of_numpy(kind):
    """Before: big-endian arrays gave other features."""
    made = native(kind(X), "`x`")
    assert is_array(kind(X))
    assert made.dtype.isnative
    np.testing.assert_array_equal(made, X)
    same(HEAD.inputs({"params": PARAMS}, kind(X)), HEAD.inputs({"params": PARAMS}, X))
    rows = [HEAD.gather({"params": PARAMS}, [(as_(X[:64]), as_(Y[:64]))]) for as_ in (kind, np.asarray)]
    same(rows[0], rows[1])
    same(train(data=[(kind(x), kind(y)) for x, y in batched()])[0].params, train(data=batched())[0].params)
    same(train(data=(kind(X), kind(Y)))[0].params, train(data=(X, Y))[0].params)


def test_arrays_of_other_libraries_compile_one_program_for_all_batches():
    """Before: each batch made a program."""
    traces = []

    class Counting(nn.Module):
        @nn.compact
        def __call__(self, x):
            traces.append(1)
            return nn.Dense(2)(nn.relu(nn.Dense(6)(nn.tanh(nn.Dense(8)(x)))))

    model = Counting()
    variables = jax.jit(model.init)(jax.random.key(0), X)
    head = cf.find_head(model, variables, Foreign(X[:64]))
    head.gather(variables, [(Foreign(X[:64]), Foreign(Y[:64]))])
    before = len(traces)
    head.gather(variables, [(Foreign(x), Foreign(y)) for x, y in batched()])
    assert len(traces) == before


def test_types_and_constants_are_no_arrays():
    assert not any(map(is_array, (np.float32, jnp.float32, 3, True, "same", [1.0], None)))


def test_arrays_of_other_libraries_can_be_solved_on():
    X_, y = X[:, :3], X[:, :1]
    solver = cf.Cronos(max_iters=2, beta=1e-3)
    one = solver.solve(X_, y, hidden=4, sample_weight=np.ones(300, "float32"))
    for kind in (Foreign, lambda a: a.astype(">f4")):
        other = solver.solve(kind(X_), kind(y), hidden=4, sample_weight=kind(np.ones(300, "float32")))
        same(one.params, other.params)


REFUSED = {
    "a mask": (np.ma.masked_array(X[:64], X[:64] > 9e9).copy(), None),
    "masked entries": (np.ma.masked_array(X[:64], X[:64] > 0), "masked entries"),
    "objects": (X[:64].astype(object), "must be numbers, got dtype object"),
    "text": (X[:64].astype(str), "must be numbers, got dtype <U"),
    "dates": (X[:64].astype("datetime64[s]"), "must be numbers, got dtype datetime64"),
    "integers that would wrap": (np.full((64, 5), 2**40), "integers that fit int32, got int64"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_inputs_that_jax_cannot_hold_are_refused_by_name(case):
    x, message = REFUSED[case]
    for call in (lambda: HEAD.gather({"params": PARAMS}, [(x, Y[:64])]), lambda: train(data=[(x, Y[:64])], epochs=1)):
        if message is None:
            call()
            continue
        with pytest.raises(ValueError, match=f"the module's arguments.*{message}"):
            call()


def test_an_array_that_numpy_cannot_read_is_refused_with_the_reason():
    class OnAnotherDevice:
        def __array__(self, dtype=None, copy=None):
            raise TypeError("can't convert cuda:0 tensor to numpy")

    with pytest.raises(ValueError, match="NumPy can read, got OnAnotherDevice: can't convert cuda"):
        cf.fit_head(HEAD, {"params": PARAMS}, [(OnAnotherDevice(), Y[:64])])


# ------------------------------------------------------------------------------------------------ targets and weights

Y3 = Y[:256] + (X[:256, 2] > 1)
SIGNS = np.where(Y[:256, None] == np.arange(2), 1.0, -1.0).astype("float32")
NAN = np.where(np.arange(256)[:, None] == 3, np.nan, SIGNS)
TARGETS = {
    "labels out of range": ("softmax", Y3, r"labels in \[0, 2\), got values from 0 to 2"),
    "negative labels": ("softmax", Y[:256] - 1, r"labels in \[0, 2\)"),
    "labels that would wrap": ("softmax", WIDE, "integers that fit int32, got int64"),
    "signs that would wrap": ("hinge", np.where(SIGNS > 0, 2**32 + 1, -1), "integers that fit int32"),
    "true and false": ("softmax", Y[:256] > 0, "integer labels"),
    "probabilities": ("softmax", SIGNS, "probabilities"),
    "hinge of labels": ("hinge", (SIGNS > 0).astype("float32"), "−1 or \\+1"),
    "hinge of classes": ("hinge", 2 * Y[:256] - 1, "must have 2 value"),
    "logistic of signs": ("logistic", SIGNS, "0 or 1"),
    "labels broadcast": ("logistic", Y[:256], "must have 2 value"),
    "squared labels": ("squared", Y[:256], "floating"),
    "other columns": ("squared", np.ones((256, 3), "float32"), "2 value"),
    "NaN": ("squared", NAN, "finite"),
    "text": ("softmax", Y[:256].astype(str), "must be numbers"),
    "complex": ("squared", SIGNS + 1j, "real numbers"),
}


@pytest.mark.parametrize("case", TARGETS)
def test_targets_are_checked_in_gradient_steps_and_in_validation_too(case):
    """Before: only solves checked."""
    loss, y, message = TARGETS[case]
    good = {"softmax": Y[:256], "logistic": (SIGNS > 0).astype("float32")}.get(loss, SIGNS)
    with pytest.raises(ValueError, match=f"^train: .*{message}"):
        train(data=(X[:256], y), loss=loss)
    with pytest.raises(ValueError, match=f"^train: .*{message}"):
        train(data=batched(X, y), loss=loss, epochs=1)
    with pytest.raises(ValueError, match=f"^train: .*{message}"):
        train(data=(X[:256], good), validation=(X[:256], y), loss=loss, callbacks=[lambda row: pytest.fail("trained")])
    with pytest.raises(ValueError, match=f"^train: .*{message}"):
        train(data=(X[:256], good), validation=batched(X, y), loss=loss, epochs=1)


@pytest.mark.parametrize(
    ("given", "instead"),
    [
        (Y[:64] > 0, r"labels as y\.astype\(int\)"),
        (Y[:64, None], r"y\[:, 0\]"),
        (Y[:64].astype("float32"), r"y\.astype\(int\)"),
        (np.eye(2, dtype=bool)[Y[:64]], r"one-hot rows as y\.astype\(float\)"),
        (np.array(["no", "yes"])[Y[:64]], r"np\.unique\(labels, return_inverse=True\)\[1\]"),
    ],
    ids=["bools", "a column", "floats", "one-hot", "text"],
)
def test_of_targets_of_another_form_it_is_said_what_to_give(given, instead):
    with pytest.raises(ValueError, match=f"^fit_head: .*{instead}|^solve: .*{instead}"):
        cf.fit_head(HEAD, {"params": PARAMS}, (X[:64], given), solver=cf.Cronos(loss="softmax"))
    with pytest.raises(ValueError, match=f"^solve: `y` .*{instead}"):
        cf.Cronos(loss="softmax").solve(X[:64], given, hidden=6)


@pytest.mark.parametrize(("loss", "y"), [("softmax", WIDE), ("hinge", np.where(SIGNS > 0, 2**32 + 1, -1))])
def test_labels_that_would_wrap_are_refused_by_solves(loss, y):
    """Before: int64 labels wrapped before the check."""
    solver = cf.Cronos(loss=loss)
    with pytest.raises(ValueError, match="fit_head: the targets must be integers that fit int32"):
        cf.fit_head(HEAD, {"params": PARAMS}, (X[:256], y), solver=solver)
    with pytest.raises(ValueError, match="solve: `y` must be integers that fit int32"):
        solver.solve(X[:256], y, hidden=3)


def test_labels_that_would_wrap_are_refused_where_targets_are_made_of_them():
    for make in (cf.signed_targets, LOSSES["softmax"].from_labels, LOSSES["logistic"].from_labels):
        with pytest.raises(ValueError, match="`labels` must be integers that fit int32"):
            make(WIDE, 2)


def test_a_loss_of_ones_own_says_itself_which_targets_it_takes():
    class Positive(cf.Loss):
        def targets(self, y, num_classes):
            if not isinstance(y, jax.core.Tracer) and not bool(jnp.all(y > 0)):
                raise ValueError("`y` must be positive.")
            return super().targets(y, num_classes)

        def value(self, outputs, targets):
            return jnp.sum(jnp.square(outputs - targets), axis=1)

    with pytest.raises(ValueError, match=r"^train: `y` must be positive"):
        train(data=(X[:256], SIGNS), loss=Positive())
    _, history = train(data=(X[:256], np.abs(SIGNS)), loss=Positive())
    assert np.isfinite(losses(history)).all()


WEIGHTS = {
    "negative": (-np.ones(64), "finite and ≥ 0, got -1.0"),
    "NaN": (np.where(np.arange(64) == 9, np.nan, 1), "finite and ≥ 0, got nan"),
    "so small that float32 loses them": (np.full(64, 1e-44), "between 1e-30 and 1e\\+30"),
    "so large that their sum is infinite": (np.full(64, 1e38), "between 1e-30 and 1e\\+30"),
    "short": (np.ones(3), r"`weight` must have one entry"),
    "text": (np.full(64, "a"), "must be numbers"),
    "ragged": ([[1], [1, 2]], "NumPy can read"),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_weights_are_checked_wherever_they_come(case):
    """Before: gradients took negative weights."""
    weight, message = WEIGHTS[case]

    def unpack(batch):
        return (batch[0],), batch[1], weight

    with pytest.raises(ValueError, match=f"train: .*{message}"):
        train(data=batched(), unpack=unpack)
    with pytest.raises(ValueError, match=f"fit_head: .*{message}"):
        HEAD.gather({"params": PARAMS}, batched(), unpack)


# ------------------------------------------------------------------------------------------------ nothing in a batch


def masked(batch):
    return (batch[0],), batch[1], batch[2]


def at_one_rate():
    # A decay counts all batches of a list in the first epoch, as it has not read them.
    return alternating().replace(alternation=cf.Alternation(decay=None))


@pytest.mark.parametrize("made", [plain, at_one_rate])
def test_batches_without_a_row_that_counts_leave_everything_as_it_was(made, unsolved):
    """Before: one such batch made a state NaN."""
    ones, zeros = np.ones(64, "float32"), np.zeros(64, "float32")
    full = [(x, y, ones) for x, y in batched()]
    nothing = [(X[:64], Y[:64], zeros), (X[:0], Y[:0], ones[:0]), (X[:64] * np.nan, Y[:64] - 100, zeros)]
    rows = {"data": full, "validation": full}
    state, history = train(made(), unpack=masked, **rows)
    with_nothing = {name: [nothing[1], nothing[0], *full[:2], *nothing, *full[2:]] for name in rows}
    other, other_history = train(made(), unpack=masked, **with_nothing)
    same((state.params, state.opt_state, state.step), (other.params, other.opt_state, other.step))

    def untimed(rows):
        return [{name: v for name, v in row.items() if "seconds" not in name} for row in rows]

    assert untimed(history) == untimed(other_history)
    assert np.isfinite(losses(history)).all()
    for data, validation in ((nothing, full), (full, nothing)):
        with pytest.raises(ValueError, match="at least one batch with a row of positive weight, got none"):
            train(made(), data, unpack=masked, validation=validation)


def test_an_empty_batch_does_not_stop_a_fit():
    one = HEAD.gather({"params": PARAMS}, batched())
    two = HEAD.gather({"params": PARAMS}, [(X[:0], Y[:0]), *batched(), (X[:0], Y[:0])])
    same(one, two)


def test_what_a_padded_row_holds_does_not_matter():
    weight = (np.arange(64) < 50).astype("float32")
    padding = np.where(weight[:, None] > 0, 0, np.nan).astype("float32")
    clean = [(x, y, weight) for x, y in batched()]
    for y_there, loss in ((Y, "softmax"), (np.where(Y[:, None] == np.arange(2), 1, -1).astype("float32"), "hinge")):
        clean = [(x, y, weight) for x, y in batched(X, y_there)]
        hole = -100 if loss == "softmax" else np.nan
        dirty = [(x, np.where(weight.reshape(-1, *[1] * (y.ndim - 1)) > 0, y, hole), w) for x, y, w in clean]
        unseen = [(x + padding, y, w) for x, y, w in dirty]
        one, history = train(data=clean, unpack=masked, validation=clean, loss=loss)
        two, dirty_history = train(data=dirty, unpack=masked, validation=unseen, loss=loss)
        same(one.params, two.params)
        assert history[-1]["validation_loss"] == dirty_history[-1]["validation_loss"]


@pytest.mark.parametrize("as_", [np.asarray, jnp.asarray])
@pytest.mark.parametrize("hole", [np.nan, np.inf])
def test_inputs_of_padded_rows_that_are_not_finite_count_nowhere(as_, hole):
    """NaN · 0 is NaN: one padded row took all parameters with it."""
    weight = (np.arange(64) < 50).astype("float32")
    padding = np.where((np.arange(64)[:, None] > 55) & (np.arange(5) == 3), hole, 0).astype("float32")
    clean = [(as_(x), y, weight) for x, y in batched()]
    dirty = [(as_(x + padding), y, weight) for x, y in batched()]
    one, history = train(data=clean, unpack=masked, validation=clean)
    two, dirty_history = train(data=dirty, unpack=masked, validation=dirty)
    same(one.params, two.params)
    assert history[-1]["validation_loss"] == dirty_history[-1]["validation_loss"]
    same(HEAD.gather({"params": PARAMS}, clean, masked), HEAD.gather({"params": PARAMS}, dirty, masked))


WORDS = np.arange(24, dtype="float32").reshape(3, 4, 2)
SEEN = np.array([[1, 1, 0, 0], [0, 0, 0, 0], [1, 0, 2, 0]])


@pytest.mark.parametrize("as_", [np.asarray, jnp.asarray])
def test_a_padded_row_that_is_not_finite_is_one_that_counts(as_):
    """Masked tokens, masked examples; what is finite, or is no row, stays as it is."""
    holes = np.where(SEEN[..., None] > 0, WORDS, np.nan)
    holes[0, 3], holes[2, 0, 1] = 7, np.inf  # finite, and a row that counts
    given = {
        "words": as_(holes),
        "length": as_([1.0, np.nan, np.nan]),
        "ids": as_(SEEN),
        "scale": as_(np.float32("nan")),
    }
    before = jax.tree.map(np.array, given)
    made = Batch.of((), given, np.zeros((3, 4), int), SEEN).kwargs
    same(given, before)
    words, padded = np.asarray(made["words"]), SEEN == 0
    padded[0, 3] = False
    np.testing.assert_array_equal(words[~padded], holes[~padded])
    counting = holes[SEEN > 0].tolist()
    assert all(row.tolist() in counting for row in words[padded])
    assert len(np.unique(words[padded], axis=0)) == len(counting)  # in turn
    np.testing.assert_array_equal(made["length"], [1, 1, np.nan])  # the last one counts
    np.testing.assert_array_equal(made["ids"], SEEN)
    assert np.isnan(made["scale"])
    finite = Batch.of((WORDS,), {}, np.zeros((3, 4), int), SEEN)
    assert finite.args[0] is WORDS


# ------------------------------------------------------------------------------------------------ weights of classes


def test_weights_of_classes_are_in_gradients_and_in_the_losses_of_the_history(unsolved):
    """Before: only solves had them."""
    rare = np.where(np.arange(256) % 4 == 0, Y[:256], 0)
    counts = np.bincount(rare)
    weight = (256 / (2 * counts))[rare].astype("float32")
    labelled = [(x, y, w) for (x, y), w in zip(batched(X, rare), np.split(weight, 4), strict=True)]
    by_hand, expected = train(alternating(), labelled, unpack=masked, validation=labelled)
    ready, history = train(alternating(class_weight="balanced"), batched(X, rare), validation=batched(X, rare))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), ready.params, by_hand.params)
    for name in ("loss", "validation_loss"):
        assert history[-1][name] == pytest.approx(expected[-1][name], rel=1e-5)
    predicted = np.asarray(MODEL.apply({"params": ready.params}, X[:256])).argmax(axis=1)
    assert history[-1]["validation_accuracy"] == pytest.approx(np.mean(predicted == rare))
    without, _ = train(alternating(), batched(X, rare))
    assert not np.allclose(jax.tree.leaves(without.params)[0], jax.tree.leaves(ready.params)[0], atol=1e-4)


def test_weights_of_classes_are_those_of_a_solve():
    flat = [Batch.of((), {}, y).flat((64,), 3, LOSSES["softmax"], "train") for _, y in batched(X[:256], Y3)]
    weights = balanced_weights(LOSSES["softmax"], flat)
    there = np.bincount(Y3)
    np.testing.assert_allclose(weights, 256 / (3 * there), rtol=1e-6)
    masks = [b._replace(weight=np.where(b.y == 2, 0, 1)) for b in flat]
    np.testing.assert_allclose(balanced_weights(LOSSES["softmax"], masks)[:2], there[:2].sum() / (2 * there[:2]), 1e-6)


@pytest.mark.parametrize("name", ["softmax", "logistic"])
def test_probabilities_count_for_each_class_in_training_too(unsolved, name):
    """A row was counted for its likeliest class alone: of a rare class that never is, none was there."""
    rare = np.random.default_rng(0).uniform(0.0, 0.4, 256).astype("float32")
    shares = np.stack([1 - rare, rare], axis=1)
    each = 256 / (2 * shares.sum(axis=0))
    y = rare[:, None] if name == "logistic" else shares
    flat = [Batch.of((), {}, rows, None, "train") for rows in np.split(y, 4)]
    np.testing.assert_allclose(balanced_weights(LOSSES[name], flat), each, rtol=1e-5)
    if name == "softmax":
        weighted = [(x, p, p @ each) for (x, _), p in zip(batched(), np.split(shares, 4), strict=True)]
        by_hand, expected = train(alternating(), weighted, unpack=masked)
        ready, history = train(alternating(class_weight="balanced"), [(x, p) for x, p, _ in weighted])
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), ready.params, by_hand.params)
        assert history[-1]["loss"] == pytest.approx(expected[-1]["loss"], rel=1e-5)


# ------------------------------------------------------------------------------------------------ forms of data

LONE = {"x": X[:64], "y": Y[:64]}


def keyed(batch):
    return (batch["x"],), batch["y"]


def test_a_lone_dict_of_arrays_is_one_batch(unsolved):
    """Before: it was not taken."""
    same(HEAD.gather({"params": PARAMS}, LONE, keyed), HEAD.gather({"params": PARAMS}, [LONE], keyed))
    one, history = train(data=LONE, unpack=keyed, validation=LONE)
    two, expected = train(data=[LONE], unpack=keyed, validation={"validation": [LONE]})
    same(one.params, two.params)
    assert history[-1]["validation_loss"] == expected[-1]["validation_loss"]
    train(alternating(), LONE, unpack=keyed, solve_data=LONE)


def test_arrays_are_not_batches_of_unpack():
    """The first two rows of x and of y were taken for the inputs and the targets of two batches."""
    model = nn.Sequential([nn.Dense(6), nn.relu, nn.Dense(X.shape[1])])  # targets have the shape of inputs
    variables = drawn(model, jax.random.key(0), X)
    head = cf.find_head(model, variables, X)
    with pytest.raises(ValueError, match=r"^fit_head: `data` must be a list of batches .*got a tuple of two arrays"):
        cf.fit_head(head, variables, (X, X), unpack=lambda batch: ((batch[0],), batch[1]))


def trained(row):
    pytest.fail("it trained")


FORMS = {
    "a generator": ({"data": (b for b in batched())}, "`data` must be re-iterable"),
    "a generator to solve on": ({"solve_data": (b for b in batched())}, "`solve_data` must be re-iterable"),
    "a generator to validate on": ({"validation": iter(batched())}, "`validation` must be re-iterable"),
    "one of several": ({"validation": {"held": (X, Y), "b": iter(batched())}}, "`validation\\['b'\\]` must be re-iter"),
    "a lone dict": ({"data": LONE}, r"`data` is a dict \(x, y\), one batch.*Give unpack="),
    "a lone dict to validate on": ({"validation": LONE}, r"`validation` is a dict \(x, y\)"),
    "arrays beside unpack": ({"unpack": keyed}, "`data` must be a list of batches if `unpack` is given"),
    "arrays to validate on beside unpack": (
        {"data": LONE, "unpack": keyed, "validation": (X, Y)},
        "`validation` must be a list of batches if",
    ),
    "one array": ({"data": X}, "`data` must be \\(x, y\\) or an iterable"),
    "text to validate on": ({"validation": "digits"}, "`validation` must be \\(x, y\\) or an iterable"),
    "a number to validate on": ({"validation": 3}, "`validation` must be \\(x, y\\) or an iterable"),
    "rows of a loader": ({"data": batched(), "solve_rows": 64}, "`solve_rows` is for arrays, got a loader"),
    "steps": ({"steps_per_epoch": 0}, "`steps_per_epoch`"),
    "one stream": ({"rngs": "dropout"}, "`rngs` must be names"),
    "streams of numbers": ({"rngs": {"dropout": 3}}, "`rngs` must be names"),
    "unpack": ({"unpack": 3}, "`unpack` must be a function"),
    "a seed for a key": ({"key": 3}, "`key` must be one key"),
    "several keys": ({"key": jax.random.split(jax.random.key(0))}, "`key` must be one key"),
    "several keys of a stream": ({"rngs": {"dropout": jax.random.split(jax.random.key(0))}}, "`rngs` must be names"),
    "a number for arguments": ({"train_kwargs": 3}, "`train_kwargs` must be a dict of keyword arguments"),
    "a list of arguments to validate with": ({"eval_kwargs": ["train"]}, "`eval_kwargs` must be a dict of keyword arg"),
    "a number for a path": ({"directory": 3}, "`directory` must be a path, .*got 3"),
    "no time": ({"seconds": np.float32(0)}, "`seconds` must be a positive number"),
}


@pytest.mark.parametrize("case", FORMS)
def test_forms_of_data_that_cannot_be_used_are_refused_before_training(case):
    """Before: they failed late."""
    arguments, message = FORMS[case]
    with pytest.raises(ValueError, match=f"^train: {message}"):
        train(alternating(), **arguments, callbacks=[trained])


@pytest.mark.parametrize("callbacks", [None, trained, [3]])
def test_callbacks_that_are_no_list_of_functions_are_refused(callbacks):
    with pytest.raises(ValueError, match=r"^train: `callbacks` must be a list of functions"):
        cf.train(alternating(), (X, Y), epochs=1, callbacks=callbacks)


def test_a_loss_that_is_not_that_of_the_solves_is_told(unsolved):
    """Of a state whose solver has another one, by default the squared loss, nobody was told."""
    y = np.eye(2, dtype="float32")[Y[:256]]
    with pytest.warns(UserWarning, match=r"train: gradient steps lower Softmax\(\), and solves Squared\(\)"):
        train(plain(kind=cf.CronosTrainState, head=HEAD), (X[:256], y), epochs=1, loss="softmax")


def test_inside_jit_and_after_donation_it_is_said(tmp_path):
    """Each was an error of JAX, about a tracer or a buffer."""
    variables = jax.tree.map(jnp.copy, {"params": PARAMS})
    for call in (
        lambda v: cf.find_head(MODEL, v, X[:64]),
        lambda v: cf.fit_head(HEAD, v, (X[:64], Y[:64])),
        lambda v: cf.fit_head(HEAD, {"params": PARAMS}, (v["params"]["layers_0"]["kernel"], Y[:5])),
    ):
        with pytest.raises(ValueError, match="must be arrays with values, got traced ones, as inside jit"):
            jax.jit(call)(variables)
    state = plain(variables["params"])
    jax.tree.map(lambda leaf: leaf.delete(), variables)
    for where, call in {
        "fit_head": lambda: cf.fit_head(HEAD, variables, (X[:64], Y[:64])),
        "train": lambda: train(state),
        "save_checkpoint": lambda: cf.save_checkpoint(tmp_path, state, 0),
    }.items():
        said = f"{where}: variables and data must be those of now, got arrays that a step has"
        with pytest.raises(ValueError, match=said):
            call()


def test_no_rows_to_validate_on_are_said():
    """Before: an empty list failed late."""
    with pytest.raises(ValueError, match="`validation` must have at least one batch"):
        train(validation=[])


@pytest.mark.parametrize("as_", [tuple, lambda rows: [tuple(rows)]])
@pytest.mark.parametrize(
    ("argument", "name"),
    [
        (lambda rows: {"validation": rows}, "validation"),
        (lambda rows: {"validation": {"validation": rows}}, r"validation\['validation'\]"),
        (lambda rows: {"validation": {"held": (X[:64], Y[:64]), "test": rows}}, r"validation\['test'\]"),
    ],
)
def test_an_error_names_the_validation_rows_that_it_is_about(argument, name, as_):
    """Targets, inputs and forms: of several sets it was not said which one was wrong."""
    state = plain().replace(step=np.int32(0))
    for wrong, message in (
        ((X[:64], Y[:64] + 1), ": `y` must have labels"),
        ((X[:64, :3], Y[:64]), ": the batch must be one that the model takes"),
        ((X[:64], Y[:64].astype(str)), ": the targets must be numbers"),
    ):
        with pytest.raises(ValueError, match=f"^train: `{name}`{message}"):
            train(state, epochs=1, **argument(as_(wrong)))
    with pytest.raises(ValueError, match=f"^train: `{name}` must have at least one batch"):
        train(state, epochs=1, **argument([]))
    with pytest.raises(ValueError, match=f"^train: `{name}` must be re-iterable"):
        train(state, epochs=1, **argument(iter(batched())))


def test_models_of_nnx_take_the_same_data():
    """Before: NNX models were checked otherwise."""
    import flax.nnx as nnx

    layers = [nnx.Linear(5, 6, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(6, 2, rngs=nnx.Rngs(1))]
    model = nnx.Sequential(*layers)
    head = cf.nnx.find_head(model, Foreign(X[:64]))
    rows = head.gather(model, [(X[:0], Y[:0]), (Foreign(X[:64]), Foreign(Y[:64]))])
    same(rows, head.gather(model, [(X[:64], Y[:64])]))
    optimizer = cf.nnx.CronosOptimizer(model, optax.adam(1e-2), head=head, solver=cf.Cronos(loss="softmax"))
    with pytest.raises(ValueError, match="solve_head: the targets must be integers that fit int32"):
        optimizer.solve_head(model, (X[:64], WIDE[:64]))
    with pytest.raises(ValueError, match=r"labels in \[0, 2\), got values from 0 to 2"):
        optimizer.solve_head(model, (X[:64], Y[:64] + np.arange(64) % 2))


def test_what_a_mask_adds_to_scores_stays_and_tokens_that_are_not_finite_do_not():
    weight = np.array([[1, 1, 0], [1, 0, 0]])
    added = np.where(weight > 0, 0, -np.inf).astype("float32")
    tokens = np.where(weight[..., None] > 0, np.ones((2, 3, 4)), np.inf).astype("float32")
    for kind in (np.asarray, jnp.asarray):
        batch = Batch.of((kind(tokens), kind(added)), {}, np.zeros((2, 3), int), weight, "here")
        np.testing.assert_array_equal(batch.args[1], added)
        np.testing.assert_array_equal(batch.args[0], np.ones((2, 3, 4)))
    missing = Batch.of((np.where(weight > 0, 2.0, np.nan),), {}, np.zeros((2, 3), int), weight, "here")
    np.testing.assert_array_equal(missing.args[0], np.full((2, 3), 2.0))
