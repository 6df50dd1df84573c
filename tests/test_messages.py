"""What is easily given wrong is refused with the words that help."""

import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import jax_utils, nnx

import cronos_flax as cf

X = np.asarray(jax.random.normal(jax.random.key(0), (32, 5)))
MODEL = nn.Sequential([nn.Dense(8), nn.tanh, nn.Dense(6), nn.relu, nn.Dense(3)])
VARIABLES = MODEL.init(jax.random.key(0), X)
HEAD = cf.find_head(MODEL, VARIABLES, X)


class LoRADense(nn.Dense):
    @nn.compact
    def __call__(self, x):
        down = self.param("down", nn.initializers.normal(), (x.shape[-1], 2))
        up = self.param("up", nn.initializers.zeros, (2, self.features))
        return super().__call__(x) + x @ down @ up


@pytest.mark.parametrize("paths", [None, ("layers_2", "layers_4")])
def test_a_layer_with_parameters_of_its_own_is_refused_by_name(paths):
    model = nn.Sequential([nn.Dense(8), nn.tanh, nn.Dense(6), nn.relu, LoRADense(3)])
    with pytest.raises(ValueError, match=r"find_head: .*got more at layers_4 \(down, up\)"):
        cf.find_head(model, model.init(jax.random.key(0), X), X, paths=paths)


def test_an_object_that_holds_the_module_is_refused_with_its_attribute():
    holder = types.SimpleNamespace(module=MODEL, params=VARIABLES["params"])
    with pytest.raises(ValueError, match=r"find_head: `model` .*`\.module`"):
        cf.find_head(holder, {"params": holder.params}, X)


def test_replicated_variables_are_named_as_such():
    with pytest.raises(ValueError, match=r"fit_head: .*\(1, 8, 6\) at layers_2.*unreplicate"):
        cf.fit_head(HEAD, jax_utils.replicate(VARIABLES), (X, np.zeros(32, int)))


def test_collections_given_by_their_name_are_refused_with_the_right_keyword():
    given = {"apply_fn": MODEL.apply, "params": VARIABLES["params"], "tx": optax.sgd(0.1), "head": HEAD}
    with pytest.raises(ValueError, match=r'`batch_stats` is not a field.*model_state=\{"batch_stats": \.\.\.\}'):
        cf.CronosTrainState.create(**given, batch_stats={})


class Setup(nn.Module):
    def setup(self):
        self.fc = nn.Dense(3)

    def __call__(self, x):
        return self.fc(x)


def test_a_module_that_makes_its_layers_in_setup_cannot_be_replaced_but_its_layers_can():
    model = nn.Sequential([nn.Dense(8), Setup()])
    pretrained = model.init(jax.random.key(0), X)
    grafted = cf.graft(model, at="layers_1", hidden=6, features=3)
    with pytest.raises(ValueError, match=r"graft: `at` must be the path of a layer, got layers_1, a Setup"):
        cf.graft_variables(grafted, pretrained, jax.random.key(1), X)
    grafted = cf.graft(model, at="layers_1/fc", hidden=6)
    assert (
        "hidden"
        in cf.graft_variables(grafted, pretrained, jax.random.key(1), X)["params"]["backbone"]["layers_1"]["fc"]
    )


class Tokens(nnx.Module):
    def __call__(self, x, mask):
        return x


def test_pool_of_a_grafted_nnx_model_is_given_the_mask():
    x, mask = jnp.ones((4, 7, 5)), jnp.arange(7) < jnp.arange(1, 5)[:, None]
    x = jnp.where(mask[..., None], x, 100.0)

    def pool(x, tokens, mask):
        return (x * mask[..., None]).sum(axis=1) / mask.sum(axis=1, keepdims=True)

    grafted = cf.nnx.graft(Tokens(), hidden=6, features=3, in_features=5, pool=pool, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(grafted(x, mask), grafted(jnp.ones((4, 7, 5)), mask), rtol=1e-6)
