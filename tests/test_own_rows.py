"""Keyword arguments that belong to the rows of a batch: they are found, and no other rows get them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import drawn
from flax import nnx

import cronos_flax as cf

N, L, D = 16, 4, 5
rng = np.random.default_rng(0)
TOKENS = rng.normal(size=(2 * N, L, D)).astype("float32")
LABELS = rng.integers(0, 3, 2 * N)
FIRST, SECOND = slice(0, N), slice(N, 2 * N)
LENGTHS = rng.integers(1, L + 1, (2 * N, 1))
MASK = np.arange(L) < LENGTHS
SOLVER = cf.Cronos(loss="softmax", max_iters=2)
REFUSED = "each batch must come with `{}` of its own rows"


class Model(nn.Module):
    """Means over the tokens that count, of tokens and of their kinds; what it is called with says which it has."""

    dtype: str = "float32"
    noise: float = 0.0
    norm: bool = False
    flat: bool = False

    @nn.compact
    def __call__(self, tokens, mask=None, padded=None, kinds=None, scale=None, given=None, bias=None, lengths=None):
        x = nn.Dense(D, dtype=self.dtype)(tokens if scale is None else tokens * scale)
        if kinds is not None:
            x = x + nn.Embed(3, D, dtype=self.dtype)(kinds)
        x = nn.tanh(x) if given is None else nn.tanh(x + sum(value[:, None] for value in given.values()))
        x = nn.Dropout(self.noise, deterministic=False)(x)
        counts = jnp.ones(tokens.shape[:2], x.dtype)
        if mask is not None:
            counts = mask.reshape(tokens.shape[:2]).astype(x.dtype)
        if padded is not None:
            counts = 1 - padded.astype(x.dtype)
        if lengths is not None:
            counts = (jnp.arange(L) < lengths[:, None]).astype(x.dtype)
        if bias is not None:
            counts = nn.softmax(jnp.tanh(tokens.sum(axis=-1)) + bias).astype(x.dtype)
        if not self.flat:
            x = jnp.sum(x * counts[..., None], axis=1) / jnp.sum(counts, axis=1, keepdims=True)
        else:
            x = (x * counts[..., None]).reshape(-1, D)
        if self.norm:
            x = nn.BatchNorm(use_running_average=False)(x)
        return nn.Dense(3, dtype=self.dtype)(nn.relu(nn.Dense(6, dtype=self.dtype)(x)))


def found(model=None, rows=FIRST, tokens=TOKENS, **kwargs):
    """The variables, and the head that is found on these rows."""
    model = Model() if model is None else model
    variables = drawn(model, {"params": jax.random.key(0), "dropout": jax.random.key(1)}, tokens[rows], **kwargs)
    kwargs |= {"mutable": ["batch_stats"]} if getattr(model, "norm", False) else {}
    kwargs |= {"rngs": {"dropout": jax.random.key(2)}} if getattr(model, "noise", 0) else {}
    return variables, cf.find_head(model, variables, tokens[rows], **kwargs)


MASKS = {
    "drawn": ("mask", MASK[FIRST]),
    "of ones": ("mask", np.ones((N, L), "float32")),
    "of nothing padded": ("padded", np.zeros((N, L), bool)),
    "of kinds 0": ("kinds", np.zeros((N, L), int)),
    "of kinds": ("kinds", rng.integers(0, 3, (N, L))),
    "with an axis of one": ("mask", MASK[FIRST, :, None]),
    "of equal lengths": ("lengths", np.full(N, L)),
    "of lengths": ("lengths", LENGTHS[FIRST, 0]),
    "added to a softmax": ("bias", np.zeros((N, L), "float32")),
    "with minus infinity": ("bias", np.where(MASK[FIRST], 0, -np.inf).astype("float32")),
    "on the device": ("mask", jnp.asarray(MASK[FIRST])),
}


@pytest.mark.parametrize("name", list(MASKS))
def test_a_mask_is_found_to_belong_to_its_rows(name):
    argument, mask = MASKS[name]
    assert found(**{argument: mask})[1].of_rows == (argument,)


@pytest.mark.parametrize(
    "model",
    [
        Model(dtype="bfloat16"),
        Model(noise=0.3),
        Model(norm=True),
        Model(dtype="bfloat16", noise=0.3, norm=True),
        Model(flat=True),
    ],
)
@pytest.mark.parametrize("name", ["drawn", "of nothing padded"])
@pytest.mark.filterwarnings("ignore:find_head. the head's input must be the same")
def test_it_is_in_half_precision_with_noise_and_where_rows_are_coupled(model, name):
    argument, mask = MASKS[name]
    assert found(model, **{argument: mask})[1].of_rows == (argument,)


@pytest.mark.parametrize("seed", list(range(5)))
@pytest.mark.parametrize("rows", [D, 3 * D])
def test_what_scales_all_rows_alike_belongs_to_none(seed, rows):
    scale = np.random.default_rng(seed).normal(size=D).astype("float32")
    for value in (scale, np.ones(D, "float32"), np.zeros(D, bool)):
        assert found(rows=slice(rows), scale=value)[1].of_rows == ()


def test_many_arguments_in_a_tree_and_beside_it_are_found():
    given = {str(i): rng.normal(size=(N, D)).astype("float32") for i in range(6)}
    _, head = found(given=given, mask=MASK[FIRST], kinds=np.zeros((N, L), int))
    assert set(head.of_rows) == {"given", "mask", "kinds"}


class Convolved(nn.Module):
    @nn.compact
    def __call__(self, x, adjacency):
        for width in (8, 8):
            x = nn.tanh(adjacency @ nn.Dense(width)(x) / jnp.sum(adjacency, axis=1, keepdims=True))
        return nn.Dense(3)(nn.relu(nn.Dense(6)(x)))


NODES = TOKENS[:, 0]
EDGES = np.eye(N, dtype="float32") + np.eye(N, k=1, dtype="float32") + np.eye(N, k=-1, dtype="float32")


def named(batch):
    return {"x": batch["x"]}, batch["y"]


@pytest.mark.parametrize("adjacency", [EDGES, EDGES / 2, rng.random((N, N)).astype("float32")])
def test_a_graph_is_fitted_and_no_other_with_its_edges(adjacency):
    variables, head = found(Convolved(), tokens=NODES, adjacency=adjacency)
    assert head.of_rows == ("adjacency",)
    cf.fit_head(head, variables, (NODES[FIRST].astype("float64"), LABELS[FIRST]), solver=SOLVER)
    one = {"x": jnp.asarray(NODES[FIRST]), "y": LABELS[FIRST]}
    cf.fit_head(head, variables, one, unpack=named, solver=SOLVER)
    made = cf.CronosTrainState.create(
        apply_fn=Convolved().apply, params=variables["params"], tx=optax.sgd(0.1), head=head, solver=SOLVER
    )
    graph = NODES[FIRST], LABELS[FIRST]
    made.solve_head(graph, validation=graph)
    _, history = cf.train(made, [one], epochs=1, unpack=named, validation=[one], train_kwargs={"adjacency": adjacency})
    assert np.isfinite(history[-1]["validation_loss"])
    with pytest.raises(ValueError, match=REFUSED.format("adjacency")):
        cf.fit_head(head, variables, (NODES[SECOND], LABELS[SECOND]), solver=SOLVER)


def test_a_single_batch_of_other_rows_is_refused_wherever_it_is_given():
    """As many other rows got the mask of those that the head was found on, without a word."""
    variables, head = found(mask=MASK[FIRST])
    made = cf.CronosTrainState.create(
        apply_fn=Model().apply, params=variables["params"], tx=optax.sgd(0.1), head=head, solver=SOLVER
    )
    first, second = ((TOKENS[rows], LABELS[rows]) for rows in (FIRST, SECOND))
    refused = REFUSED.format("mask")
    for call in (
        lambda: cf.fit_head(head, variables, second, solver=SOLVER),
        lambda: cf.fit_head(head, variables, [second], solver=SOLVER),
        lambda: cf.gather_features(head, variables, second),
        lambda: made.solve_head(second),
        lambda: made.solve_head(first, validation=second),
        lambda: cf.train(made, [first], epochs=1, solve_data=[first], validation=[second]),
        lambda: jax.jit(lambda x: head.inputs(variables, x))(TOKENS[SECOND]),
    ):
        with pytest.raises(ValueError, match=refused):
            call()
    with pytest.raises(ValueError, match=refused + ".*Give it by keyword"):
        head.inputs(variables, TOKENS[SECOND])
    there = head.inputs(variables, TOKENS[FIRST])
    np.testing.assert_array_equal(there, head.inputs(variables, TOKENS[FIRST], mask=MASK[FIRST]))
    assert head.inputs(variables, TOKENS[SECOND], mask=MASK[SECOND]).shape == there.shape


def test_an_nnx_model_with_dropout_is_found_to_have_a_mask_too():
    class Masked(nnx.Module):
        def __init__(self, rngs):
            self.first, self.drop = nnx.Linear(D, D, rngs=rngs), nnx.Dropout(0.3, rngs=rngs)
            self.hidden, self.out = nnx.Linear(D, 6, rngs=rngs), nnx.Linear(6, 3, rngs=rngs)

        def __call__(self, tokens, padded):
            x = jnp.mean(self.drop(nnx.tanh(self.first(tokens))) * (1 - padded[..., None]), axis=1)
            return self.out(nnx.relu(self.hidden(x)))

    model = Masked(nnx.Rngs(0))
    head = cf.nnx.find_head(model, TOKENS[FIRST], padded=np.zeros((N, L), int))
    assert head.of_rows == ("padded",)
    with pytest.raises(ValueError, match=REFUSED.format("padded")):
        cf.nnx.fit_head(head, model, (TOKENS[SECOND], LABELS[SECOND]), solver=SOLVER)


class TimeFirst(nn.Module):
    """Means over time of ``(time, batch, features)``, where a mask ``(time, batch)`` lets them through."""

    @nn.compact
    def __call__(self, tokens, mask=None, table=None):
        x = nn.tanh(nn.Dense(D)(tokens if table is None else tokens + table[:, None]))
        counts = jnp.ones(tokens.shape[:2]) if mask is None else mask.astype(x.dtype)
        x = jnp.sum(x * counts[..., None], axis=0) / jnp.maximum(jnp.sum(counts, axis=0), 1)[:, None]
        return nn.Dense(3)(nn.relu(nn.Dense(6)(x)))


@pytest.mark.parametrize("length", [3, L, N])
@pytest.mark.parametrize("full", [False, True])
def test_a_mask_with_time_first_is_found(length, full):
    """All other rows got it: only the first axis was looked at."""
    tokens = rng.normal(size=(length, N, D)).astype("float32")
    mask = np.ones((length, N), bool) if full else np.arange(length)[:, None] < rng.integers(1, length + 1, N)
    table = rng.normal(size=(length, D)).astype("float32")
    variables = drawn(TimeFirst(), jax.random.key(0), tokens, mask, table)
    head = cf.find_head(TimeFirst(), variables, tokens, mask=mask, table=table)
    assert head.of_rows == ("mask",)
    with pytest.raises(ValueError, match=REFUSED.format("mask")):
        cf.fit_head(head, variables, [(tokens[:, ::-1], LABELS[FIRST])], solver=SOLVER)


class Passed(nn.Module):
    """Sums over the edges of a graph; or an embedding of positions that all rows share."""

    @nn.compact
    def __call__(self, x, edges=None, senders=None, receivers=None, positions=None):
        if positions is not None:
            x = x + nn.tanh(nn.Embed(64, D)(positions)).mean(axis=0)
        senders, receivers = (senders, receivers) if edges is None else edges
        for width in (8, 8):
            messages = nn.Dense(width)(x)[senders]
            x = nn.tanh(nn.Dense(width)(x) + jax.ops.segment_sum(messages, receivers, len(x)))
        return nn.Dense(3)(nn.relu(nn.Dense(6)(x)))


@pytest.mark.parametrize("count", [41, 64, 200])
@pytest.mark.parametrize("apart", [False, True])
def test_a_list_of_edges_is_found(count, apart):
    """Other graphs got it: it has no entry for each row."""
    nodes = 64
    x = rng.normal(size=(nodes, D)).astype("float32")
    edges = np.sort(rng.integers(0, nodes, (2, count)), axis=1)
    edges[:, -1] = nodes - 1
    given = {"senders": edges[0], "receivers": rng.permutation(edges[1])} if apart else {"edges": edges}
    given["positions"] = np.arange(40)
    variables = drawn(Passed(), jax.random.key(0), x, **given)
    head = cf.find_head(Passed(), variables, x, **given)
    assert set(head.of_rows) == given.keys() - {"positions"}
    y = rng.integers(0, 3, nodes)
    cf.fit_head(head, variables, (x, y), solver=SOLVER)  # this graph may come again
    with pytest.raises(ValueError, match="each batch must come with"):
        cf.fit_head(head, variables, (x[::-1], y), solver=SOLVER)


class Coded(nn.Module):
    """An embedding of what a table says of each row, or of each entry of a row."""

    norm: bool = False

    @nn.compact
    def __call__(self, x, table, mask=None):
        codes = jnp.argsort(x, axis=-1)[:, :2] % len(table)
        h = nn.Dense(8)(x if mask is None else x * mask) + nn.Embed(64, 8)(jnp.asarray(table)[codes]).sum(axis=1)
        h = nn.BatchNorm(use_running_average=False)(h) if self.norm else nn.tanh(h)
        return nn.Dense(3)(nn.relu(nn.Dense(6)(h)))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("model", [Coded(), Coded(norm=True)])
def test_a_table_of_integers_is_not_taken_for_edges(model, masked):
    """Its numbers are below the number of rows, and a change of one moves few rows: other rows were refused."""
    draw = np.random.default_rng(1)
    x, table = draw.normal(size=(32, D)).astype("float32"), np.r_[31, draw.integers(0, 32, D - 1)]
    given = {"table": table, **({"mask": draw.random((32, D)) < 0.7} if masked else {})}
    variables = drawn(model, jax.random.key(0), x, **given)
    how = {"mutable": ["batch_stats"]} if model.norm else {}
    x, given = jax.device_put((x, given))
    with jax.transfer_guard("disallow"):
        assert set(cf.find_head(model, variables, x, **given, **how).of_rows) == given.keys() - {"table"}


class Strict(nn.Module):
    """Takes no other values than those of the batch: it raises, gives what is not finite, or does not change."""

    how: str

    @nn.compact
    def __call__(self, tokens, value):
        x = nn.tanh(nn.Dense(D)(tokens.mean(axis=1)))
        if self.how == "raises":
            jax.debug.callback(self.look, value)
        if self.how == "nan":
            x = jnp.where(jnp.any(value != 1), jnp.nan, x)
        return nn.Dense(3)(nn.relu(nn.Dense(6)(x)))

    @staticmethod
    def look(value):
        if np.any(value != 1):
            raise ValueError("only ones")


@pytest.mark.filterwarnings("ignore:.*only ones")
@pytest.mark.parametrize("how", ["raises", "nan", "unused"])
def test_what_cannot_be_told_is_decided_by_shape_and_type(how):
    shapes = {(N, L): "float32", (N, 1): int, (N,): bool}
    for shape, dtype in shapes.items():
        assert found(Strict(how), value=np.ones(shape, dtype))[1].of_rows == ("value",)
    for shape, dtype in {(N,): "float32", (L, N): "float32", (): bool}.items():
        assert found(Strict(how), value=np.ones(shape, dtype))[1].of_rows == ()


def test_of_a_batch_of_one_row_too():
    assert found(rows=slice(1), mask=MASK[:1])[1].of_rows == ("mask",)
    assert found(rows=slice(1), scale=np.ones(1, "float32"))[1].of_rows == ()


def test_nothing_is_transferred_unasked():
    model, (tokens, mask) = Model(), jax.device_put((TOKENS[FIRST], MASK[FIRST]))
    variables = drawn(model, jax.random.key(0), tokens, mask=mask)
    with jax.transfer_guard("disallow"):
        head = cf.find_head(model, variables, tokens, mask=mask, scale=np.ones(D, "float32"))
        assert head.of_rows == ("mask",)
        head.inputs(variables, tokens)
        with pytest.raises(ValueError, match="each batch must come with"):
            head.inputs(variables, TOKENS[SECOND])
