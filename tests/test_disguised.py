"""Models that end in Dense → relu → Dense by chance only: something around the two layers is the identity now.

Where only the head's own weights are redrawn, such heads are accepted; after training, the loss of the module is not
that of the solution.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import cronos_flax as cf

X = np.asarray(jax.random.normal(jax.random.key(0), (32, 5)))
Y = np.asarray(jax.random.normal(jax.random.key(1), (32, 3)))
HIDDEN = 6


def low_rank(scope, h, width):
    """A low-rank adapter beside the output layer; its second factor starts at zero."""
    down = scope.param("down", nn.initializers.normal(), (h.shape[-1], 2))
    return h @ down @ scope.param("up", nn.initializers.zeros, (2, width))


def film(scope, out):
    gain, shift = (scope.param(name, nn.initializers.zeros, out.shape[-1:]) for name in ("gain", "shift"))
    return out * (1 + gain) + shift


# What is done to pre-activations z, activations h, or outputs (of features x and activations h).
BEFORE = {
    "norm before the relu": lambda scope, z: nn.BatchNorm(use_running_average=True, name="norm")(z),
    "scale before the relu": lambda scope, z: z * scope.param("scale", nn.initializers.ones, z.shape[-1:]),
}
AFTER = {
    "norm after the relu": lambda scope, h: nn.BatchNorm(use_running_average=True, name="norm")(h),
    "adapter of factor 0": lambda scope, h: (
        h + scope.param("factor", nn.initializers.zeros, ()) * nn.Dense(HIDDEN, name="adapter")(h)
    ),
    "mask of ones": lambda scope, h: h * scope.variable("masks", "mask", jnp.ones, h.shape[-1:]).value,
    "mask of bools": lambda scope, h: h * scope.variable("masks", "mask", jnp.ones, h.shape[-1:], bool).value,
}
END = {
    "norm at the end": lambda scope, out, x, h: nn.BatchNorm(use_running_average=True, name="norm")(out),
    "temperature of 1": lambda scope, out, x, h: out / scope.param("temperature", nn.initializers.ones, ()),
    "skip of factor 0": lambda scope, out, x, h: (
        out + scope.param("factor", nn.initializers.zeros, ()) * nn.Dense(3, name="skip")(x)
    ),
    "low rank of 0": lambda scope, out, x, h: out + low_rank(scope, h, 3),
    "film at identity": lambda scope, out, x, h: film(scope, out),
    "filter of complex ones": lambda scope, out, x, h: jnp.fft.irfft(
        jnp.fft.rfft(out) * scope.param("filter", nn.initializers.ones, (2,), jnp.complex64), n=3
    ),
    "running scale of 1": lambda scope, out, x, h: out * scope.variable("batch_stats", "scale", jnp.ones, ()).value,
}
KINDS = [*BEFORE, *AFTER, *END]


class Disguised(nn.Module):
    """``on`` is no floating number, so it is not redrawn: with 0 the model is its head, with 1 it is disguised."""

    kind: str
    on: int = 1

    @nn.compact
    def __call__(self, x):
        on = self.variable("switch", "on", lambda: jnp.asarray(self.on, jnp.int32)).value

        def placed(there, value, *rest):
            return jnp.where(on > 0, there[self.kind](self, value, *rest), value) if self.kind in there else value

        x = jnp.tanh(nn.Dense(8, name="backbone")(x))
        h = placed(AFTER, nn.relu(placed(BEFORE, nn.Dense(HIDDEN, name="hidden")(x))))
        return placed(END, nn.Dense(3, name="out")(h), x, h)


def moved(variables):
    """All floating variables and masks but the three layers', away from where they are the identity."""
    layers = "backbone", "hidden", "out"

    def move(path, leaf):
        if any(getattr(entry, "key", None) in layers for entry in path):
            return leaf
        return leaf + 0.7 if jnp.issubdtype(leaf.dtype, jnp.inexact) else leaf & (jnp.arange(leaf.size) > 2)

    return jax.tree_util.tree_map_with_path(move, variables)


@pytest.mark.parametrize("kind", KINDS)
def test_a_disguised_head_is_refused_when_it_is_looked_for(kind):
    """Before: only the head's own weights were redrawn, so what was the identity passed."""
    model = Disguised(kind)
    with pytest.raises(ValueError, match="must end in Dense → relu → Dense; the nearest candidate is"):
        cf.find_head(model, jax.jit(model.init)(jax.random.key(0), X), X)


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_that_no_longer_holds_is_refused_at_the_next_feature_pass(kind):
    """Before: features could stop fitting later, without a word."""
    model = Disguised(kind, on=0)
    variables = jax.jit(model.init)(jax.random.key(0), X)
    head = cf.find_head(model, variables, X)
    head.gather(variables, (X, Y))
    on = {"switch": {"on": jnp.asarray(1, jnp.int32)}}
    changed = moved({name: collection for name, collection in variables.items() if name != "switch"}) | on
    with pytest.raises(ValueError, match=r"as when the head was found; now they differ.*Call find_head again"):
        cf.fit_head(head, changed, (X, Y))


class Recurrent(nn.Module):
    """A long linear recurrence with complex numbers near the unit circle, as in state-space models."""

    @nn.compact
    def __call__(self, x):
        pole = self.param("pole", lambda _: jnp.asarray([0.999j, 0.99, -0.9 + 0.1j], jnp.complex64))
        carried = jax.lax.fori_loop(0, 4000, lambda _, carry: pole * carry + x[:, :3], jnp.zeros((32, 3), pole.dtype))
        return nn.Dense(3)(nn.relu(nn.Dense(HIDDEN)(carried.real)))


def test_a_complex_recurrence_before_the_head_does_not_overflow():
    """Redrawn poles were outside of the unit circle, and outputs NaN."""
    model = Recurrent()
    assert cf.find_head(model, jax.jit(model.init)(jax.random.key(0), X), X).hidden == HIDDEN


class Masked(nn.Module):
    """Rules out some outputs, as actors do with actions that are not allowed."""

    ruled_out: float

    @nn.compact
    def __call__(self, x, allowed):
        out = nn.Dense(3)(nn.relu(nn.Dense(HIDDEN)(jnp.tanh(x))))
        return jnp.where(allowed, out, self.ruled_out)


@pytest.mark.parametrize("ruled_out", [-1e9, -np.inf, 0.0])
def test_a_mask_of_outputs_in_any_batch_is_refused(ruled_out):
    """Where it let all through in the first batch, a solve was for outputs that the module does not have."""
    model, all_allowed, some = Masked(ruled_out), np.ones((32, 3), bool), np.ones((32, 3), bool)
    some[5, 1] = False
    variables = jax.jit(model.init)(jax.random.key(0), X, all_allowed)
    head = cf.find_head(model, variables, X, all_allowed)

    def fit(*batches):
        return cf.fit_head(head, variables, batches, solver=cf.Cronos(max_iters=2), unpack=lambda batch: batch)

    with pytest.raises(ValueError, match=r"as for the first batch of `data`; in a later one they differ by"):
        fit(((X, all_allowed), Y), ((X, some), Y))
    with pytest.raises(ValueError, match=r"as when the head was found; now they differ by"):
        fit(((X, some), Y))  # of -inf it was let through
    weight = np.ones(32)
    fit(((X, all_allowed), Y, weight), ((X, some), Y, weight - (np.arange(32) == 5)))  # a row that does not count
    fit(((X, all_allowed), Y), ((X[:1] * 1e-6, all_allowed[:1]), Y[:1]))  # rounding of one row is not judged by itself


def in_tf32(a, b, *args, **kwargs):
    """A product with factors of 10 bits, as fast products of float32 have them unless "highest" is asked for."""
    if jax.config.jax_default_matmul_precision == "highest":
        return jax.lax.dot_general(a, b, *args, **kwargs)
    a, b = (jax.lax.reduce_precision(factor, exponent_bits=8, mantissa_bits=10) for factor in (a, b))
    return jax.lax.dot_general(a, b, *args, **kwargs)


class Shifted(nn.Module):
    """Adds to its outputs what comes with a batch."""

    settings: Any

    @nn.compact
    def __call__(self, x, shift):
        out = nn.Dense(3, **self.settings)(nn.relu(nn.Dense(HIDDEN, **self.settings)(jnp.tanh(x))))
        return out + shift[..., None].astype(out.dtype)


PRECISIONS = {
    "float32": {},
    "tf32": {"dot_general": in_tf32},
    "bfloat16": {"dtype": jnp.bfloat16},
    "float16": {"dtype": jnp.float16, "param_dtype": jnp.float16},
}


@pytest.mark.parametrize("name", PRECISIONS)
@pytest.mark.parametrize("size", [1.0, 1e-3])
def test_a_large_bias_does_not_hide_what_a_batch_adds(name, size):
    """A change that is as large as what the rows bring was small beside the bias: it was taken for rounding."""
    none, some = np.zeros(32, "float32"), 100.0 * (np.arange(32) == 5).astype("float32")
    model = Shifted(PRECISIONS[name])
    variables = jax.jit(model.init)(jax.random.key(0), X, none)
    head = cf.find_head(model, variables, X, none)
    network = head.read(variables)
    network = dataclasses.replace(network, kernel2=size * network.kernel2, bias2=network.bias2 + 1000.0)
    variables = head.write(variables, network)

    def fit(shift, before=(1, 0.1, 10)):
        data = [((scale * X, none), Y) for scale in before] + [((X, shift), Y)]
        return cf.fit_head(head, variables, data, solver=cf.Cronos(max_iters=2), unpack=lambda batch: batch)

    fit(none)  # rounding, of fast products and of few bits too, is none
    least = {"float32": 0.01, "tf32": 0.01}.get(name, 1.0)
    with pytest.raises(ValueError, match=r"in a later one they differ by .*, of .* at most without the bias"):
        fit(least * some)
    fit(none, before=())
    with pytest.raises(ValueError, match=r"as when the head was found; now they differ by"):
        fit(least * some, before=())


class Scored(nn.Module):
    """Outputs that begin at zero, one divided by the noise of each row, as the scores of diffusion models are."""

    zeros: nn.initializers.Initializer = nn.initializers.zeros

    @nn.compact
    def __call__(self, x, noise):
        out = nn.Dense(3, kernel_init=self.zeros)(nn.relu(nn.Dense(HIDDEN)(jnp.tanh(x))))
        return out / noise[:, None] ** (jnp.arange(3) == 1)


def one_column(key, shape, dtype):
    return nn.initializers.normal()(key, shape, dtype).at[:, 1].set(0)


@pytest.mark.parametrize("zeros", [nn.initializers.zeros, one_column])
@pytest.mark.parametrize("batches", [1, 2])
def test_outputs_that_begin_at_zero_do_not_hide_what_changes_them(zeros, batches):
    """All that is multiplied by zero is zero: a solve was for outputs that the module does not have."""
    ones, noise = np.ones(32, "float32"), np.linspace(0.5, 2, 32, dtype="float32")
    model = Scored(zeros)
    variables = jax.jit(model.init)(jax.random.key(0), X, ones)
    head = cf.find_head(model, variables, X, ones)

    def fit(noise):
        data = [((X, ones), Y), ((X, noise), Y)][-batches:]
        return cf.fit_head(head, variables, data, solver=cf.Cronos(max_iters=2), unpack=lambda batch: batch)

    with pytest.raises(ValueError, match=r"Dense_. and Dense_. for all rows that count, .* another one they differ"):
        fit(noise)
    fitted, solution = fit(ones)
    assert solution.stats.objective < solution.stats.initial_objective
    features = np.asarray(head.inputs(fitted, X, ones))
    np.testing.assert_allclose(cf.predict(head.read(fitted), features), model.apply(fitted, X, ones), atol=1e-5)


@dataclasses.dataclass
class Place:
    """What an NNX model has besides its head, and where it is applied."""

    where: str
    make: Callable
    apply: Callable = lambda part, value: part(value)


def norm(width):
    return lambda rngs: nnx.BatchNorm(width, rngs=rngs)


def variable(kind, value):
    return lambda rngs: kind(jnp.asarray(value))


NNX = {
    "norm before the relu": Place("before", norm(HIDDEN)),
    "norm after the relu": Place("after", norm(HIDDEN)),
    "norm at the end": Place("end", norm(3)),
    "temperature of 1": Place("end", variable(nnx.Param, 1.0), lambda t, out: out / t[...]),
    "mask of ones": Place("after", variable(nnx.Variable, np.ones(HIDDEN, "float32")), lambda mask, h: h * mask[...]),
    "mask of whole numbers": Place(
        "after", variable(nnx.Variable, np.ones(HIDDEN, "int32")), lambda mask, h: h * mask[...]
    ),
    "switch that is off": Place("end", variable(nnx.Variable, False), lambda on, out: jnp.where(on[...], 2 * out, out)),
    "low rank of 0": Place("low rank", lambda rngs: nnx.LoRA(HIDDEN, 2, 3, rngs=rngs)),
    "film at identity": Place(
        "end", variable(nnx.Param, np.zeros(3, "float32")), lambda gain, out: out * (1 + gain[...])
    ),
}


class DisguisedNnx(nnx.Module):
    def __init__(self, place, rngs):
        self.place, self.part = nnx.static(place), place.make(rngs)
        self.backbone, self.hidden = nnx.Linear(5, 8, rngs=rngs), nnx.Linear(8, HIDDEN, rngs=rngs)
        self.out = nnx.Linear(HIDDEN, 3, rngs=rngs)

    def __call__(self, x):
        def placed(where, value):
            return self.place.apply(self.part, value) if self.place.where == where else value

        h = placed("after", nnx.relu(placed("before", self.hidden(jnp.tanh(self.backbone(x))))))
        out = placed("end", self.out(h))
        return out + self.part(h) if self.place.where == "low rank" else out


@pytest.mark.parametrize("name", NNX)
def test_a_disguised_nnx_head_is_refused(name):
    """The same in NNX."""
    with pytest.raises(ValueError, match="is the identity now"):
        cf.nnx.find_head(DisguisedNnx(NNX[name], nnx.Rngs(0)), X)


def test_an_nnx_head_that_no_longer_holds_is_refused_at_the_next_feature_pass():
    """A single whole number is not redrawn, for it may count steps; the model's outputs tell."""
    times = Place("end", variable(nnx.Variable, np.int32(1)), lambda times, out: times[...] * out)
    model = DisguisedNnx(times, nnx.Rngs(0))
    head = cf.nnx.find_head(model, X)
    head.gather(model, (X, Y))
    model.part[...] = jnp.int32(2)
    kept = nnx.as_pure(nnx.state(model))
    with pytest.raises(ValueError, match=r"as when the head was found; now they differ.*Call find_head again"):
        cf.nnx.fit_head(head, model, (X, Y))
    jax.tree.map(np.testing.assert_array_equal, nnx.as_pure(nnx.state(model)), kept)


@pytest.mark.parametrize("eval_mode", [True, False])
def test_an_nnx_model_that_computes_something_else_now_is_refused(eval_mode):
    """A head found in the mode of the model went on seeing the model of then, and solved for that one."""
    place = Place("end", variable(nnx.Variable, np.int32(1)), lambda times, out: out)
    model = DisguisedNnx(place, nnx.Rngs(0))
    head = cf.nnx.find_head(model, X, eval_mode=eval_mode)
    model.eval()
    assert head.inputs(model, X).shape == (32, 8)  # the mode is not the structure
    model.place = nnx.static(dataclasses.replace(place, apply=lambda times, out: 2 * out))
    with pytest.raises(ValueError, match=r"`model` must be the DisguisedNnx that the head was found in, unchanged"):
        cf.nnx.fit_head(head, model, (X, Y))


def test_an_adapter_inside_the_output_layer_is_refused():
    """Before: LoRA with B = 0 passed."""
    rngs = nnx.Rngs(0)
    layers = nnx.Linear(5, 8, rngs=rngs), nnx.tanh, nnx.Linear(8, HIDDEN, rngs=rngs), nnx.relu
    model = nnx.Sequential(*layers, nnx.LoRALinear(HIDDEN, 3, lora_rank=2, rngs=rngs))
    with pytest.raises(ValueError, match=r"a kernel and a bias only, got more at layers/4 \(lora\)"):
        cf.nnx.find_head(model, X)
