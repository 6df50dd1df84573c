"""Models of many kinds, linen and NNX: those that end in a head that can be solved for, and those that do not.

All accepted ones have the same head, of 6 features, 20 neurons and 4 outputs on 32 rows, so that one compiled solve
serves them all.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (32, 6))
IMAGES = jax.random.normal(KEY, (32, 8, 8, 1))
TOKENS = X.reshape(8, 4, 6)
IDS = jax.random.randint(KEY, (32, 5), 0, 11)
MASK = jnp.arange(5) < 1 + jnp.arange(32)[:, None] % 5
FEATURES, HIDDEN, OUTPUTS = 6, 20, 4


class Member(NamedTuple):
    """A model, how it is called, and the two paths of its head, or the reason of its refusal."""

    model: Any
    args: tuple
    kwargs: dict
    expected: Any


def tail(**kind):
    """The head that all accepted models share."""
    return nn.Sequential([nn.Dense(HIDDEN, **kind), nn.relu, nn.Dense(OUTPUTS, **kind)])


class Lie(nn.Module):
    """Names its output layer Dense_0."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(OUTPUTS)(nn.relu(nn.Dense(HIDDEN)(x)))


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(FEATURES)(x))
        return Lie()(nn.Dropout(0.5, deterministic=not train)(x))


class Remat(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.remat(Lie)()(nn.relu(nn.remat(nn.Dense)(FEATURES)(x)))


class Jitted(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.jit(Lie)()(x)


class Two(nn.Module):
    @nn.compact
    def __call__(self, x):
        gelu = nn.Dense(OUTPUTS)(nn.gelu(nn.Dense(HIDDEN)(x)))
        return {"gelu": gelu, "relu": nn.Dense(OUTPUTS)(nn.relu(nn.Dense(HIDDEN)(x)))}


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.relu(nn.Dense(FEATURES)(x)), None


class HeadBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.Dense(FEATURES)(nn.relu(nn.Dense(HIDDEN)(x))), None


class Scanned(nn.Module):
    block: Any
    head: bool

    @nn.compact
    def __call__(self, x):
        over = nn.scan(self.block, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        x, _ = over()(x, None)
        return Lie()(x) if self.head else x


class Vmapped(nn.Module):
    @nn.compact
    def __call__(self, x):
        over = nn.vmap(Lie, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=None, axis_size=2)
        return over()(x).mean(axis=0)


class Siamese(nn.Module):
    @nn.compact
    def __call__(self, left, right):
        encoder = nn.Sequential([nn.Dense(9), nn.tanh, nn.Dense(FEATURES)])
        return Lie()(jnp.abs(encoder(left) - encoder(right)))


class DictInput(nn.Module):
    @nn.compact
    def __call__(self, batch):
        return Lie()(jnp.concatenate([nn.Dense(3)(batch["wide"]), nn.Dense(3)(batch["deep"])], axis=-1))


class Text(nn.Module):
    """Embeds token ids, attends, and takes the mean over those that the mask lets through."""

    @nn.compact
    def __call__(self, ids, *, mask):
        x = nn.Embed(11, FEATURES)(ids)
        x = x + nn.MultiHeadDotProductAttention(num_heads=2)(nn.LayerNorm()(x), mask=mask[:, None, None, :])
        weight = mask[..., None].astype(x.dtype)
        return Lie()(jnp.sum(x * weight, axis=1) / jnp.sum(weight, axis=1))


class ResBlock(nn.Module):
    width: int
    train: bool

    @nn.compact
    def __call__(self, x):
        y = nn.Conv(self.width, (3, 3), use_bias=False)(x)
        y = nn.relu(nn.BatchNorm(use_running_average=not self.train)(y))
        y = nn.BatchNorm(use_running_average=not self.train)(nn.Conv(self.width, (3, 3), use_bias=False)(y))
        return nn.relu(y + nn.Conv(self.width, (1, 1), use_bias=False)(x))


class ResNet(nn.Module):
    """Ends in one Dense, as ResNets do, or in a two-layer head."""

    two_layers: bool

    @nn.compact
    def __call__(self, images, train=True):
        x = ResBlock(4, train)(images)
        x = ResBlock(FEATURES, train)(nn.max_pool(x, (2, 2), (2, 2))).mean(axis=(1, 2))
        return Lie()(x) if self.two_layers else nn.Dense(OUTPUTS, name="fc")(x)


class ViT(nn.Module):
    @nn.compact
    def __call__(self, images):
        x = nn.Conv(FEATURES, (4, 4), strides=(4, 4), name="patches")(images).reshape(len(images), -1, FEATURES)
        x = jnp.concatenate([jnp.zeros((len(x), 1, FEATURES)) + self.param("cls", nn.zeros, (FEATURES,)), x], axis=1)
        x = x + self.param("positions", nn.initializers.normal(0.02), x.shape[1:])
        for _ in range(2):
            y = nn.LayerNorm()(x)
            x = x + nn.MultiHeadDotProductAttention(num_heads=2)(y, y)
            x = x + nn.Dense(FEATURES)(nn.gelu(nn.Dense(12)(nn.LayerNorm()(x))))
        return Lie()(nn.LayerNorm()(x)[:, 0])


class CNN(nn.Module):
    """The shape of the network that every MNIST example has."""

    @nn.compact
    def __call__(self, images):
        x = images
        for width in (4, FEATURES):
            x = nn.avg_pool(nn.relu(nn.Conv(width, (3, 3))(x)), (2, 2), (2, 2))
        return Lie()(x.mean(axis=(1, 2)))


class Shared(nn.Module):
    """Its head lives in the scope of the module itself."""

    def setup(self):
        self.inner = Lie()
        nn.share_scope(self, self.inner)

    def __call__(self, x):
        return self.inner(jnp.tanh(x))


class Methods(nn.Module):
    def setup(self):
        self.encoder, self.fc1, self.fc2 = nn.Dense(FEATURES), nn.Dense(HIDDEN), nn.Dense(OUTPUTS)

    def __call__(self, x):
        return self.logits(x)

    def logits(self, x, scale=1.0):
        return self.fc2(nn.relu(self.fc1(scale * nn.tanh(self.encoder(x)))))


class Between(nn.Module):
    layer: Any

    @nn.compact
    def __call__(self, x):
        return nn.Dense(OUTPUTS)(self.layer(nn.relu(nn.Dense(HIDDEN)(x))))


class WeightNormed(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.WeightNorm(nn.Dense(OUTPUTS))(nn.relu(nn.Dense(HIDDEN)(x)))


class Skip(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(OUTPUTS)(x)
        return x + Lie()(x)


class Tied(nn.Module):
    @nn.compact
    def __call__(self, x):
        dense = nn.Dense(FEATURES)
        return nn.Dense(OUTPUTS)(nn.relu(dense(nn.relu(dense(x)))))


class Recurrent(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        return Lie()(nn.RNN(nn.LSTMCell(HIDDEN))(tokens)[:, -1, :FEATURES])


class MappedByJax(nn.Module):
    """Bound layers, called one row at a time by ``jax.vmap``: an encoder, or the head too."""

    head: bool

    def setup(self):
        self.encoder, self.lie = nn.Dense(FEATURES), Lie()

    def __call__(self, x):
        if self.is_initializing():
            return self.lie(self.encoder(x))
        if self.head:
            return jax.vmap(self.lie)(self.encoder(x))
        return self.lie(jax.vmap(self.encoder)(x))


class BridgedBackbone(nn.Module):
    @nn.compact
    def __call__(self, x):
        return Lie()(nn.tanh(nnx.bridge.ToLinen(nnx.Linear, (6, 6))(x)))


class Bridged(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nnx.bridge.ToLinen(NnxMLP, kwargs={})(x)


class HalfHead(nn.Module):
    """Computes its head in bfloat16 and returns float32."""

    @nn.compact
    def __call__(self, x):
        return tail(dtype=jnp.bfloat16)(nn.tanh(nn.Dense(FEATURES)(x))).astype(jnp.float32)


def boxed(name):
    return nn.with_partitioning(nn.initializers.lecun_normal(), (None, name))


NORMED, BATCH_STATS = ("Lie_0", "Dense_1"), {"train": True, "mutable": ["batch_stats"], "rngs": {"dropout": KEY}}
IN_TAIL, IN_LIE = (("layers_0",), ("layers_2",)), (("Lie_0", "Dense_1"), ("Lie_0", "Dense_0"))

LINEN = {
    "names lie": Member(Lie(), (X,), {}, (("Dense_1",), ("Dense_0",))),
    "sequential": Member(tail(), (X,), {}, IN_TAIL),
    "norm and dropout before": Member(Normed(), (X,), {"train": False}, IN_LIE),
    "positional flag": Member(Normed(), (X, False), {}, IN_LIE),
    "train mode": Member(Normed(), (X,), BATCH_STATS, IN_LIE),
    "remat": Member(Remat(), (X,), {}, (("CheckpointLie_0", "Dense_1"), ("CheckpointLie_0", "Dense_0"))),
    "jit": Member(Jitted(), (X,), {}, (("JitLie_0", "Dense_1"), ("JitLie_0", "Dense_0"))),
    "scanned backbone": Member(Scanned(Block, True), (X,), {}, IN_LIE),
    "recurrent": Member(Recurrent(), (X.reshape(32, 3, 2),), {}, IN_LIE),
    "backbone in jax.vmap": Member(MappedByJax(False), (X,), {}, (("lie", "Dense_1"), ("lie", "Dense_0"))),
    "siamese": Member(Siamese(), (X, X[::-1]), {}, IN_LIE),
    "chosen output": Member(Two(), (X,), {"output": "relu"}, (("Dense_3",), ("Dense_2",))),
    "output by function": Member(Two(), (X,), {"output": lambda out: out["relu"]}, (("Dense_3",), ("Dense_2",))),
    "tokens": Member(Lie(), (TOKENS,), {}, (("Dense_1",), ("Dense_0",))),
    "dict input": Member(DictInput(), ({"wide": X, "deep": X[:, :2]},), {}, IN_LIE),
    "text with mask": Member(Text(), (IDS,), {"mask": MASK}, IN_LIE),
    "bridged backbone": Member(BridgedBackbone(), (X,), {}, IN_LIE),
    "residual network": Member(ResNet(True), (IMAGES,), {"train": False}, IN_LIE),
    "vision transformer": Member(ViT(), (IMAGES,), {}, IN_LIE),
    "MNIST network": Member(CNN(), (IMAGES,), {}, IN_LIE),
    "share_scope": Member(Shared(), (X,), {}, (("Dense_1",), ("Dense_0",))),
    "method": Member(Methods(), (X,), {"method": "logits", "scale": 0.5}, (("fc1",), ("fc2",))),
    "paths by hand": Member(
        Two(), (X,), {"output": "relu", "paths": ("Dense_3", "Dense_2")}, (("Dense_3",), ("Dense_2",))
    ),
    "DenseGeneral": Member(
        nn.Sequential([nn.DenseGeneral(HIDDEN), nn.relu, nn.DenseGeneral(OUTPUTS)]), (X,), {}, IN_TAIL
    ),
    "partitioned": Member(tail(kernel_init=boxed("model")), (X,), {}, IN_TAIL),
    "bfloat16 head": Member(HalfHead(), (X,), {}, (("Dense_0",), ("Dense_1",))),
    "bfloat16": Member(tail(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16), (X,), {}, IN_TAIL),
    "no biases": Member(tail(use_bias=False), (X,), {}, IN_TAIL),
}  # fmt: skip

LINEN_REFUSED = {
    "several outputs": Member(Two(), (X,), {}, "output="),
    "gelu": Member(Two(), (X,), {"output": "gelu"}, "gelu stands between"),
    "leaky relu": Member(nn.Sequential([nn.Dense(5), nn.leaky_relu, nn.Dense(2)]), (X,), {}, "leaky relu stands"),
    "nothing between": Member(nn.Sequential([nn.Dense(5), nn.Dense(2)]), (X,), {}, "nothing stands between"),
    "softmax after": Member(nn.Sequential([tail(), nn.softmax]), (X,), {}, "a softmax follows"),
    "bounded activation": Member(nn.Sequential([nn.Dense(5), nn.relu6, nn.Dense(2)]), (X,), {}, "relu6 stands between"),
    "bounded output": Member(
        nn.Sequential([tail(), lambda z: 30 * jnp.tanh(z / 30)]), (X,), {}, "something follows"
    ),
    "norm between": Member(Between(nn.LayerNorm()), (X,), {}, "differ"),
    "dropout between": Member(
        Between(nn.Dropout(0.5, deterministic=False)), (X,), {"rngs": {"dropout": KEY}}, "differ"
    ),
    "skip": Member(Skip(), (X,), {}, "is added"),
    "tied": Member(Tied(), (X,), {}, "used elsewhere"),
    "scanned head": Member(Scanned(HeadBlock, False), (X,), {}, "nn.scan"),
    "mapped head": Member(Vmapped(), (X,), {}, "nn.vmap"),
    "head in jax.vmap": Member(MappedByJax(True), (X,), {}, "those of JAX itself; got lie/Dense_1, lie/Dense_0 inside"),
    "weight norm": Member(WeightNormed(), (X,), {}, "nn.WeightNorm"),
    "single Dense": Member(nn.Dense(3), (X,), {}, r"one nn.Dense only .*cf.graft"),
    "residual network": Member(ResNet(False), (IMAGES,), {"train": False}, r"one nn.Dense only \(fc\)"),
    "no Dense": Member(nn.LayerNorm(), (X,), {}, r"no nn.Dense"),
    "bridged": Member(Bridged(), (X,), {}, "no nn.Dense"),
    "wrong paths": Member(Two(), (X,), {"output": "relu", "paths": ("Dense_3", "Dense_0/x")}, "layers called: Dense_1"),
}  # fmt: skip


def rngs():
    return nnx.Rngs(0)


class NnxMLP(nnx.Module):
    """Linear layers with a norm and dropout before the head."""

    def __init__(self, activation=nnx.relu, rngs=None, **kind):
        rngs = rngs or nnx.Rngs(0)
        self.encoder = nnx.Linear(6, FEATURES, rngs=rngs)
        self.norm = nnx.BatchNorm(FEATURES, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.fc1 = nnx.Linear(FEATURES, HIDDEN, rngs=rngs, **kind)
        self.fc2 = nnx.Linear(HIDDEN, OUTPUTS, rngs=rngs, **kind)
        self.activation = activation

    def __call__(self, x):
        return self.logits(x)

    def logits(self, x, scale=1.0):
        x = self.dropout(self.norm(self.encoder(scale * x)))
        return self.fc2(self.activation(self.fc1(x)))


class NnxInside(nnx.Module):
    """Calls its only part through a transform."""

    def __init__(self, transform):
        self.body, self.transform = NnxMLP(), transform

    def __call__(self, x):
        return self.transform(lambda body, x: body(x))(self.body, x)


class NnxScanned(nnx.Module):
    """Three layers in a scan, and then a head."""

    def __init__(self):
        self.blocks = nnx.vmap(lambda key: nnx.Linear(6, 6, rngs=nnx.Rngs(key)))(jax.random.split(KEY, 3))
        self.head = NnxMLP()

    def __call__(self, x):
        over = nnx.scan(lambda block, x: nnx.relu(block(x)), in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        return self.head(over(self.blocks, x))


class NnxRecurrent(nnx.Module):
    """Cells of as many units as the head has neurons: each goes through a scan that must give it back as it was."""

    def __init__(self):
        cells = nnx.LSTMCell(2, HIDDEN, rngs=rngs()), nnx.GRUCell(2, HIDDEN, rngs=rngs())
        self.rnn, self.head = nnx.Bidirectional(*map(nnx.RNN, cells), rngs=rngs()), NnxMLP()

    def __call__(self, tokens):
        return self.head(self.rnn(tokens)[:, -1, :6])


class NnxMapped(nnx.Module):
    """A part is called one row at a time, by a transform of JAX or of NNX: the encoder, or the head."""

    def __init__(self, over, head):
        self.encoder, self.norm, self.lie = nnx.Linear(6, 6, rngs=rngs()), nnx.BatchNorm(6, rngs=rngs()), NnxMLP()
        self.over, self.mapped = over, head

    def encoded(self, x):
        return self.norm(self.encoder(x))

    def __call__(self, x):
        if self.mapped:
            return self.over(self.lie.logits)(self.encoded(x))
        return self.lie(self.over(self.encoded)(x))


def merged_over_rows(method):
    """The method of a model that is merged within a transform of JAX, of Variables from outside."""
    graphdef, state = nnx.split(method.__self__)
    return jax.vmap(lambda x: method.__func__(nnx.merge(graphdef, state), x))


class NnxConv(nnx.Module):
    def __init__(self):
        self.conv, self.head = nnx.Conv(1, 6, (3, 3), rngs=rngs()), NnxMLP()

    def __call__(self, batch):
        x = nnx.relu(self.conv(batch["image"])).mean(axis=(1, 2))
        return {"logits": self.head(x), "features": x}


class NnxTied(nnx.Module):
    def __init__(self):
        self.a = self.b = nnx.Linear(6, 6, rngs=rngs())
        self.out = nnx.Linear(6, OUTPUTS, rngs=rngs())

    def __call__(self, x):
        return self.out(nnx.relu(self.b(nnx.relu(self.a(x)))))


class NnxTransformer(nnx.Module):
    def __init__(self):
        self.embed = nnx.Embed(11, 6, rngs=rngs())
        self.norm = nnx.LayerNorm(6, rngs=rngs())
        self.attend = nnx.MultiHeadAttention(2, 6, decode=False, rngs=rngs())
        self.head = NnxMLP()

    def __call__(self, ids, *, mask):
        x = self.embed(ids)
        x = x + self.attend(self.norm(x), mask=mask[:, None, None, :])
        weight = mask[..., None].astype(x.dtype)
        return self.head(jnp.sum(x * weight, axis=1) / jnp.sum(weight, axis=1))


def nnx_sequential(*between, out=OUTPUTS):
    return nnx.Sequential(nnx.Linear(6, HIDDEN, rngs=rngs()), *between, nnx.Linear(HIDDEN, out, rngs=rngs()))


def bridged_to_nnx():
    return nnx.bridge.ToNNX(Lie(), rngs=rngs()).lazy_init(X)


class NnxBridged(nnx.Module):
    """A backbone of linen, and a head of NNX."""

    def __init__(self):
        backbone = nn.Sequential([nn.Dense(6), nn.tanh])
        self.backbone, self.head = nnx.bridge.ToNNX(backbone, rngs=rngs()).lazy_init(X), NnxMLP()

    def __call__(self, x):
        return self.head(self.backbone(x))


def over_rows(method):
    """``nnx.vmap`` of a method over the rows of its input, with one and the same module."""
    call = nnx.vmap(lambda module, x: method.__func__(module, x), in_axes=(None, 0))
    return lambda x: call(method.__self__, x)


NNX = {
    "plain": Member(NnxMLP, (X,), {}, (("fc1",), ("fc2",))),
    "sequential": Member(lambda: nnx_sequential(nnx.relu), (X,), {}, (("layers", 0), ("layers", 2))),
    "jit": Member(lambda: NnxInside(nnx.jit), (X,), {}, (("body", "fc1"), ("body", "fc2"))),
    "remat": Member(lambda: NnxInside(nnx.remat), (X,), {}, (("body", "fc1"), ("body", "fc2"))),
    "scanned backbone": Member(NnxScanned, (X,), {}, (("head", "fc1"), ("head", "fc2"))),
    "recurrent": Member(NnxRecurrent, (X.reshape(32, 3, 2),), {}, (("head", "fc1"), ("head", "fc2"))),
    "backbone in jax.vmap": Member(lambda: NnxMapped(jax.vmap, False), (X,), {}, (("lie", "fc1"), ("lie", "fc2"))),
    "backbone in jax.jit": Member(lambda: NnxMapped(jax.jit, False), (X,), {}, (("lie", "fc1"), ("lie", "fc2"))),
    "backbone merged in jax.vmap": Member(
        lambda: NnxMapped(merged_over_rows, False), (X,), {}, (("lie", "fc1"), ("lie", "fc2"))
    ),
    "backbone in nnx.vmap": Member(
        lambda: NnxMapped(over_rows, False), (X,), {}, (("lie", "fc1"), ("lie", "fc2"))
    ),
    "bridged backbone": Member(NnxBridged, (X,), {}, (("head", "fc1"), ("head", "fc2"))),
    "dict input, chosen output": Member(
        NnxConv, ({"image": IMAGES},), {"output": "logits"}, (("head", "fc1"), ("head", "fc2"))
    ),
    "text with mask": Member(NnxTransformer, (IDS,), {"mask": MASK}, (("head", "fc1"), ("head", "fc2"))),
    "tokens": Member(lambda: nnx_sequential(nnx.relu), (TOKENS,), {}, (("layers", 0), ("layers", 2))),
    "method": Member(NnxMLP, (X,), {"method": "logits", "scale": 0.5}, (("fc1",), ("fc2",))),
    "paths by hand": Member(NnxMLP, (X,), {"paths": ("fc1", "fc2")}, (("fc1",), ("fc2",))),
    "bfloat16": Member(
        lambda: NnxMLP(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16), (X,), {}, (("fc1",), ("fc2",))
    ),
}  # fmt: skip

NNX_REFUSED = {
    "gelu": Member(lambda: NnxMLP(nnx.gelu), (X,), {}, "gelu stands between"),
    "softmax after": Member(
        lambda: nnx.Sequential(nnx_sequential(nnx.relu), nnx.softmax), (X,), {}, "a softmax follows"
    ),
    "single Linear": Member(lambda: nnx.Linear(6, 3, rngs=rngs()), (X,), {}, r"one nnx.Linear only .*cf.nnx.graft"),
    "head in jax.vmap": Member(lambda: NnxMapped(jax.vmap, True), (X,), {}, "got lie/encoder, lie/fc1, lie/fc2 inside"),
    "head in nnx.vmap": Member(lambda: NnxMapped(over_rows, True), (X,), {}, "got .*lie/fc1, lie/fc2 inside"),
    "tied": Member(NnxTied, (X,), {}, "one nnx.Linear only|used elsewhere|no two|differ"),
    "bridged": Member(bridged_to_nnx, (X,), {}, "linen module is bridged"),
    "dropout on": Member(
        lambda: nnx_sequential(nnx.relu, nnx.Dropout(0.5, rngs=rngs())), (X,), {"eval_mode": False}, "differ"
    ),
}  # fmt: skip
