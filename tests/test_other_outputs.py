"""Outputs that share the head's hidden layer are told of: a solve for one of them changes the others."""

import dataclasses
import warnings
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import cronos_flax as cf

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (32, 5))
ZEROS = nn.initializers.zeros
# What a model returns beside its head's output a: of its features x, activations h, and a itself.
SHARED = {
    "dense": lambda x, h, a, dense: dense(h),
    "activations": lambda x, h, a, dense: h,
    "skipped": lambda x, h, a, dense: dense(x) + 1e-2 * dense(h),
    "masked": lambda x, h, a, dense: dense(h).at[0].set(-jnp.inf),
    "label": lambda x, h, a, dense: dense(h).argmax(axis=1),
    "nested": lambda x, h, a, dense: [{"deep": dense(h)}],
}
OWN = {
    "dense": lambda x, h, a, dense: dense(x),
    "probabilities": lambda x, h, a, dense: jax.nn.softmax(a),
    "label": lambda x, h, a, dense: a.argmax(axis=1),
    "masked": lambda x, h, a, dense: dense(x).at[0].set(jnp.nan),
    "empty": lambda x, h, a, dense: x[:0],
    "nothing": lambda x, h, a, dense: None,
}


class Linen(nn.Module):
    other: Any
    dtype: Any = jnp.float32
    kernel_init: Any = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(6, dtype=self.dtype)(x)
        h = nn.relu(nn.Dense(8, name="hidden", dtype=self.dtype)(x))
        a = nn.Dense(3, name="a", dtype=self.dtype)(h)
        return {"a": a, "b": self.other(x, h, a, lambda z: nn.Dense(7, kernel_init=self.kernel_init)(z)), "c": a + 1}


class Nnx(nnx.Module):
    def __init__(self, other):
        rngs = nnx.Rngs(0)
        self.body, self.hidden = nnx.Linear(5, 6, rngs=rngs), nnx.Linear(6, 8, rngs=rngs)
        self.a, self.b = nnx.Linear(8, 3, rngs=rngs), nnx.Linear(8, 7, rngs=rngs)
        self.of_x = nnx.Linear(6, 7, rngs=rngs)
        self.other = nnx.static(other)

    def dense(self, z):
        return self.b(z) if z.shape[1] == 8 else self.of_x(z)

    def __call__(self, x):
        x = self.body(x)
        h = nnx.relu(self.hidden(x))
        a = self.a(h)
        return a, self.other(x, h, a, self.dense)


def linen(other, output="a", **kind):
    model = Linen(other, **kind)
    variables = jax.jit(model.init)(KEY, X)
    return model, variables, lambda: cf.find_head(model, variables, X, output=output)


@pytest.mark.parametrize("name", list(SHARED))
def test_other_outputs_of_the_hidden_layer_are_named(name):
    named = "b/0/deep" if name == "nested" else "b"
    _, _, find = linen(SHARED[name])
    with pytest.warns(UserWarning, match=rf"use it too: {named}\. A solve for output 'a' .*cf\.graft") as told:
        assert find().paths == (("hidden",), ("a",))
    assert told[0].filename == __file__
    model = Nnx(SHARED[name])
    with pytest.warns(UserWarning, match=rf"use it too: {named.replace('b', '1', 1)}\. A solve for output 0 ") as told:
        assert cf.nnx.find_head(model, X, output=0).paths == (("hidden",), ("a",))
    assert told[0].filename == __file__


@pytest.mark.parametrize("name", list(OWN))
def test_other_outputs_that_do_not_use_it_pass_without_a_word(name):
    linen(OWN[name])[2]()
    linen(OWN[name], output=lambda out: out["a"])[2]()
    cf.nnx.find_head(Nnx(OWN[name]), X, output=0)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_it_is_seen_behind_zeros_and_in_every_precision(dtype):
    find = linen(SHARED["dense"], output=lambda out: out["a"], dtype=dtype, kernel_init=ZEROS)[2]
    with pytest.warns(UserWarning, match="use it too: b. A solve for this output"):
        find()
    linen(OWN["probabilities"], dtype=dtype)[2]()


@dataclasses.dataclass
class Both:
    """Outputs in a class of the user's, which is no pytree."""

    a: Any
    b: Any


def test_outputs_in_objects_that_jax_does_not_know_are_seen():
    """They were leaves, and no arrays: nothing was said."""

    class InObject(Linen):
        @nn.compact
        def __call__(self, x):
            out = super().__call__(x)
            return {"both": Both(out["a"], [out["b"]])}

    def find(other, output):
        variables = jax.jit(Linen(other).init)(KEY, X)
        cf.find_head(InObject(other), variables, X, output=output)

    with pytest.warns(UserWarning, match=r"use it too: both/b/0\. A solve for this output"):
        find(SHARED["dense"], lambda out: out["both"].a)
    with pytest.warns(UserWarning, match=r"use it too: both/a\. A solve for this output"):
        find(SHARED["dense"], lambda out: out["both"].b[0])
    find(OWN["dense"], lambda out: out["both"].a)
    in_object = {"method": lambda model, x: Both(*model(x)), "output": lambda out: out.a}
    with pytest.warns(UserWarning, match=r"use it too: b\. A solve for this output"):
        cf.nnx.find_head(Nnx(SHARED["dense"]), X, **in_object)


def test_an_object_among_outputs_may_hold_what_is_no_tree():
    """A dict with keys that cannot be sorted stopped the search; what stands beside it is seen."""
    model = Linen(SHARED["dense"])
    variables = jax.jit(model.init)(KEY, X)

    def method(bound, x):
        arrays = bound(x)
        out = Both(arrays["a"], arrays["b"])
        out.names, out.itself = {0: "zero", "one": 1}, out
        return out

    with pytest.warns(UserWarning, match=r"use it too: b\. A solve for this output"):
        cf.find_head(model, variables, X, method=method, output=lambda out: out.a)


def test_a_head_that_is_called_twice_is_told_of():
    """The same function of other features: no change of the network that keeps this output shows it."""

    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            head = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(3)])
            return head(jnp.tanh(x)), head(x)

    class NnxTwice(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            self.head = nnx.Sequential(nnx.Linear(5, 8, rngs=rngs), nnx.relu, nnx.Linear(8, 3, rngs=rngs))

        def __call__(self, x):
            return self.head(jnp.tanh(x)), self.head(x)

    with pytest.warns(UserWarning, match="a Twice whose head is called 2 times in one pass. A solve for output 1 "):
        cf.find_head(Twice(), jax.jit(Twice().init)(KEY, X), X, output=1)
    with pytest.warns(UserWarning, match="a NnxTwice whose head is called 2 times in one pass. A solve for output 1 "):
        cf.nnx.find_head(NnxTwice(), X, output=1)


def test_a_hidden_layer_that_is_called_again_after_the_head_is_named():
    """It was said that no two layers fit."""

    class Again(nn.Module):
        @nn.compact
        def __call__(self, x):
            hidden = nn.Dense(8, name="hidden")
            out = nn.Dense(3, name="out")(nn.relu(hidden(jnp.tanh(x))))
            return {"out": out, "projected": hidden(x)}

    class NnxAgain(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            self.hidden, self.out = nnx.Linear(5, 8, rngs=rngs), nnx.Linear(8, 3, rngs=rngs)

        def __call__(self, x):
            return {"out": self.out(nnx.relu(self.hidden(jnp.tanh(x)))), "projected": self.hidden(x)}

    with pytest.raises(ValueError, match=r"but hidden is called again after out, .* with cf\.graft"):
        cf.find_head(Again(), jax.jit(Again().init)(KEY, X), X, output="out")
    with pytest.raises(ValueError, match=r"but hidden is called again after out, .* with cf\.nnx\.graft"):
        cf.nnx.find_head(NnxAgain(), X, output="out")


def test_what_the_warning_says_is_so_and_a_graft_helps():
    y = jax.random.normal(KEY, (32, 3))
    model, variables, find = linen(SHARED["dense"])
    with pytest.warns(UserWarning, match="use it too: b"):
        head = find()
    fitted, _ = cf.fit_head(head, variables, (X, y), solver=cf.Cronos(max_iters=5))
    before, after = model.apply(variables, X), model.apply(fitted, X)
    assert not np.allclose(before["b"], after["b"], atol=0.1)

    grafted = cf.graft(model, at="a", hidden=7, features=3)
    variables = cf.graft_variables(grafted, variables, KEY, X)
    with warnings.catch_warnings(action="error"):
        head = cf.find_head(grafted, variables, X, output="a")
    fitted, _ = cf.fit_head(head, variables, (X, y), solver=cf.Cronos(max_iters=5))
    before, after = grafted.apply(variables, X), grafted.apply(fitted, X)
    np.testing.assert_array_equal(before["b"], after["b"])
    assert not np.allclose(before["a"], after["a"], atol=0.1)

    deeper = cf.nnx.graft(Nnx(SHARED["dense"]), at="a", hidden=7, rngs=nnx.Rngs(1))
    cf.nnx.find_head(deeper, X, output=0)
