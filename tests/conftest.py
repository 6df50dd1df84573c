"""What the tests share: data, twins, and the skip for data that is not part of the project."""

import gc
import itertools
import os
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace

# A test compiles for seconds what runs for milliseconds. Subprocesses inherit this; tests that are about the code that
# users run take the fixture `optimised`. With JAX_DISABLE_MOST_OPTIMIZATIONS=0 in the environment all do. (An XLA that
# does not know these flags stops at once and says so.)
if os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1") == "1":
    flags = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    if flags not in os.environ.get("XLA_FLAGS", ""):  # workers inherit them
        os.environ["XLA_FLAGS"] = f"{flags} {os.environ.get('XLA_FLAGS', '')}".strip()

# Checkpoints and rows are written through to the disk, which a process waits for: in memory it does not wait.
if "TMPDIR" not in os.environ and os.access("/dev/shm", os.W_OK) and shutil.disk_usage("/dev/shm").free > 1 << 30:
    os.environ["TMPDIR"] = tempfile.tempdir = "/dev/shm"  # for subprocesses, and for this one, which may have looked

import flax.linen as nn
import jax
import numpy as np
import pytest
from hypothesis import settings
from sklearn.datasets import load_digits

from cronos_flax.compare import programs

# The same examples in every run. HYPOTHESIS_PROFILE=default draws others, and keeps those that fail.
settings.register_profile("repeatable", derandomize=True, database=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_configure(config):
    """Keep compiled programs where the command line keeps its own, so that the next run need not compile them.

    JAX_ENABLE_COMPILATION_CACHE=0 keeps none.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ or os.environ.get("JAX_ENABLE_COMPILATION_CACHE", "1") == "0":
        return
    programs.keep()
    for name in ("compilation_cache_dir", "persistent_cache_min_compile_time_secs"):  # for subprocesses
        os.environ[f"JAX_{name.upper()}"] = str(jax.config.values[f"jax_{name}"])


def pytest_collection_finish():
    """Traced programs are objects that stay: do not look through all of them for garbage again and again."""
    gc.freeze()
    gc.set_threshold(100_000, 20, 20)


def pytest_collection_modifyitems(items):
    """The longest tests come first, so that no worker is left with one of them at the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture
def little_garbage():
    """Garbage is looked for among what the test makes, not among all that earlier tests have left."""
    gc.freeze()


_finished = itertools.count(1)


@pytest.fixture(autouse=True)
def _forget_compiled_programs():
    """Compiled programs hold memory maps; Linux allows a process 65,530, and beyond that XLA's compiler crashes.

    A test adds some hundreds; to count them takes as long as many a test, so they are counted after every tenth.
    """
    yield
    maps = Path("/proc/self/maps")
    if next(_finished) % 10 == 0 and maps.exists() and maps.read_bytes().count(b"\n") > 30_000:
        jax.clear_caches()


_compiled = jax.make_user_context("cheaply")  # programs that were made under another value are not taken


@pytest.fixture
def optimised():
    """Programs compiled in this test are optimised, as users' are."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", False)
    with _compiled("optimised"):
        yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="session")
def digits():
    """Digits 0-9: X (1797, 64) float32 in 0..16, labels, in a fixed random order."""
    X, labels = load_digits(return_X_y=True)
    order = np.random.RandomState(0).permutation(len(X))
    return X[order].astype("float32"), labels[order]


@pytest.fixture(scope="session")
def tfds_dir():
    """The directory of prepared TFDS sets; skips where there is none."""
    if not (SHARED / "tfds").is_dir():
        pytest.skip(f"no prepared TFDS sets at {SHARED / 'tfds'}")
    return SHARED / "tfds"


@pytest.fixture(params=["float32", "float64"])
def dtype(request):
    """Both precisions; x64 mode is on for the second."""
    with jax.enable_x64(request.param == "float64"):
        yield request.param


@pytest.fixture
def strict_promotion():
    """No implicit mixing of dtypes."""
    with jax.numpy_dtype_promotion("strict"):
        yield


def drawn(model, rngs, *args, init=nn.Module.init, **kwargs):
    """Variables of a linen module, as ``init`` gives them but by NumPy, which compiles nothing; no biases are zero."""
    shapes = jax.eval_shape(lambda: init(model, rngs, *args, **kwargs))
    rng = np.random.default_rng(np.concatenate([jax.random.key_data(key).ravel() for key in jax.tree.leaves(rngs)]))

    def draw(path, leaf):
        names = [str(getattr(entry, "key", "")) for entry in path]
        fan_in = np.prod(leaf.shape[:-1]) if "kernel" in names else leaf.shape[-1] if "embedding" in names else 100
        value = np.ones(leaf.shape) if {"scale", "var"} & set(names) else rng.normal(size=leaf.shape) / np.sqrt(fan_in)
        return jax.device_put(value.astype(leaf.dtype))

    return jax.tree_util.tree_map_with_path(draw, shapes)


@pytest.fixture
def cheap_init(monkeypatch):
    """``init`` compiles nothing: for tests to which it does not matter which random parameters there are."""
    monkeypatch.setattr(nn.Module, "init", drawn)


def random_problem(seed, n=40, p=5, C=1, dtype="float32"):
    """Features and targets of a small regression problem."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, p)).astype(dtype), rng.normal(size=(n, C)).astype(dtype)


def random_targets(loss, seed, n, C):
    """Targets of the kind that a loss takes, float64, shape (n, C)."""
    rng = np.random.default_rng(seed + 1)
    if loss == "softmax":
        return np.eye(C)[rng.integers(0, C, size=n)]
    if loss == "logistic":
        return rng.integers(0, 2, size=(n, C)).astype(float)
    if loss == "hinge":
        return rng.choice([-1.0, 1.0], size=(n, C))
    return rng.normal(size=(n, C))


def random_network(seed, p=5, m=6, C=1, hidden_bias=True, output_bias=True, dtype="float32"):
    """A network of ordinary size."""
    import cronos_flax as cf

    rng = np.random.default_rng(seed)

    def draw(*shape):
        return rng.normal(size=shape).astype(dtype)

    return cf.TwoLayer(draw(p, m), draw(m) if hidden_bias else None, draw(m, C), draw(C) if output_bias else None)


@pytest.fixture
def unsolved(monkeypatch):
    """Solves change nothing, and compile nothing; the data that they were given."""
    import cronos_flax as cf
    from cronos_flax._head.data import UserData

    seen = []

    def solve_head(self, data, unpack=None, **kwargs):
        seen.append(list(UserData(data, unpack).batches()))
        stats = SimpleNamespace(initial_objective=1.0, objective=1.0, null_loss=1.0, beta=1.0)
        return self, SimpleNamespace(stats=stats, status=cf.Status.max_iters)

    monkeypatch.setattr(cf.CronosTrainState, "solve_head", solve_head)
    return seen
