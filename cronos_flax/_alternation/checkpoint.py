"""Checkpoints by Orbax, with a checksum for every leaf: damage is detected, and an earlier step restored.

Orbax detects a file that is cut short, but restores a changed byte silently. So a checkpoint also holds a list of its
leaves, with the name, shape, dtype and checksum of each; and the list has a checksum itself.
"""

import contextlib
import errno
import gc
import json
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax import Array
from orbax.checkpoint.checkpoint_managers import preservation_policy

from cronos_flax._alternation import optimizer_code
from cronos_flax._alternation.silence import silence
from cronos_flax._head import fingerprint
from cronos_flax._head.files import check_path, locked_by_all, named
from cronos_flax._head.fingerprint import said
from cronos_flax._head.head import Head, check_there
from cronos_flax._head.operations import others_than_saved, with_versions
from cronos_flax._solver.arrays import is_key
from cronos_flax._solver.checks import positive_integer
from cronos_flax._solver.cronos import Cronos
from cronos_flax._solver.processes import by_first, everywhere
from cronos_flax._solver.transfer import on_device, on_host
from cronos_flax._solver.user_warnings import warn

State = TypeVar("State")

_FORMAT = "cronos_flax checkpoint 1"
_ASIDE = "damaged"
_ITEMS = ("state", "meta")  # directories that a checkpoint consists of
_LIST = "_CHECKPOINT_METADATA"  # Orbax's own, beside them
_SAID, _DONE = "metadata", "commit_success.txt"  # files of the second one, the latter on some file systems
_SOLVED_BY = ("loss", "class_weight", "beta", "beta_ratio")  # settings that the saved β and least loss go by
_STATED = {"format", "body", "checksum"}
_LONGEST = 200  # characters of what Orbax says
_STATUS, _CODE = re.compile("[A-Z_]+: "), re.compile(r"os_error_code='(\d+)'")  # of errors of TensorStore


class _DamagedError(Exception):
    """A checkpoint that differs from what was saved."""


class _MisfitError(ValueError):
    """A sound checkpoint of another structure or format."""


def save_checkpoint(
    directory: str | Path, state: Any, step: int, *, extra: Any = None, keep: int | None = None
) -> None:
    """Save all arrays of a train state, or of any pytree.

    All arrays of the state are saved: parameters, collections, optimizer, guard, keys. Everything else (functions, the
    head, the solver) comes from the state that :func:`restore_checkpoint` is given. When this function returns, the
    checkpoint is complete on the disk; if the process dies before, there is none.

    Args:
        directory: where the checkpoints of this run lie, one directory for each step; made if it does not exist.
        state: a ``CronosTrainState`` or any other pytree of arrays and numbers. For NNX:
            ``nnx.state((model, optimizer))``.
        step: the number of the checkpoint, ``≥ 0``.
        extra: anything else to save with it, as JSON takes it.
        keep: the number of newest checkpoints to keep; None keeps all.

    Raises:
        ValueError: if there is a sound checkpoint of this step already or, where ``keep`` is given, of a later one; if
            there are checkpoints that something else has made, or an argument does not fit.
        BlockingIOError: if another process, or a run of ``cf.train``, is writing into the directory.
        OSError: if the directory cannot be written to; the checkpoints there are as before.
    """
    check_path("save_checkpoint", "directory", directory)
    content = _content(state, step, extra, keep)
    directory = Path(directory).absolute()
    with locked_by_all(directory, "save_checkpoint: `directory`"):
        _write(directory, step, content, keep)


def save_locked(
    directory: str | Path, state: Any, step: int, *, extra: Any, keep: int, besides: int | None = None
) -> None:
    """As :func:`save_checkpoint`, into a directory that the caller has locked; one more step is kept ``besides``."""
    _write(Path(directory).absolute(), step, _content(state, step, extra, keep), keep, besides)


def _content(state: Any, step: int, extra: Any, keep: int | None) -> dict[str, Any]:
    """What a checkpoint consists of: leaves, and the list of them."""
    positive_integer("save_checkpoint", "step", step, least=0)
    if keep is not None:
        positive_integer("save_checkpoint", "keep", keep)
    check_there("save_checkpoint", state)
    leaves = _by_path(state)
    if not any(map(np.size, leaves.values())):
        raise ValueError(f"save_checkpoint: `state` must have arrays, got {type(state).__name__} without any.")
    for name, leaf in leaves.items():
        if not (leaf.dtype.kind in "biuf" or jnp.issubdtype(leaf.dtype, jnp.number)):
            raise ValueError(
                f"save_checkpoint: `state` must have arrays and numbers, got {leaf.dtype} at {name}. Leave it out, "
                "or give it as `extra`."
            )
    try:
        made_of = {"optimizer": optimizer_code.made_of(state), "solver": _solver_of(state)}
        body = json.dumps({"leaves": _listed(leaves), "extra": extra, "function": _function_of(state), **made_of})
    except TypeError as error:
        raise ValueError(f"save_checkpoint: `extra` must be what JSON takes: {error}.") from None
    meta = {"format": _FORMAT, "body": body, "checksum": zlib.crc32((_FORMAT + body).encode())}
    stored = {name: leaf for name, leaf in leaves.items() if leaf.size}  # Orbax takes no others
    return {"state": ocp.args.StandardSave(stored), "meta": ocp.args.JsonSave(meta)}


def _write(directory: Path, step: int, content: dict[str, Any], keep: int | None, besides: int | None = None) -> None:
    later = [s for s in _steps(directory, "save_checkpoint") if s > step]  # raises where nothing must be saved
    if keep is not None and (sound := [s for s in later if _is_sound(directory, s)]):
        raise ValueError(
            f"save_checkpoint: `step` must be later than all in {directory} where `keep` is given, got {step} beside "
            f"{sound}, which it could delete. Give a later step, keep=None, or another directory."
        )
    taken = directory / str(step)
    if taken.exists():
        if _is_sound(directory, step):
            raise ValueError(
                f"save_checkpoint: `step` {step} is in {directory} already. Give a later step, or another directory."
            )
        by_first(lambda: taken.rename(_free(directory, f"{step}.{_ASIDE}")))
    with _system_errors(directory), _manager(directory, keep, besides) as manager:
        manager.save(step, args=ocp.args.Composite(**content), force=True)
        manager.wait_until_finished()


def _is_sound(directory: Path, step: int) -> bool:
    """Whether the checkpoint of a step has what was saved."""
    try:
        _read(directory, step)
    except _DamagedError:
        return False
    return True


@contextlib.contextmanager
def _system_errors(directory: Path) -> Iterator[None]:
    """An error of the operating system is an OSError that names the directory, whatever Orbax makes of it."""
    try:
        with silence.of_late_answers(), named(directory):
            yield
    except ValueError as error:
        if not _STATUS.match(str(error)):
            raise
        code = _CODE.search(str(error))
        number = errno.EIO if code is None else int(code[1])
        more = f" ({_first_of(error)})" if code is None else ""
        raise OSError(number, os.strerror(number) + more, str(directory)) from error


def _first_of(error: BaseException) -> str:
    """The beginning of what an error says."""
    return f"{error!s} ".splitlines()[0][:_LONGEST].strip()


def restore_checkpoint(directory: str | Path, state: State, *, step: int | None = None) -> State:
    """Restore the newest undamaged checkpoint into the structure of ``state``.

    Args:
        directory: the directory given to :func:`save_checkpoint`.
        state: a state of the same structure, freshly made; it is not changed, and is returned if the directory holds no
            checkpoint.
        step: which checkpoint; None means the newest. If it is damaged, the newest one before it is restored, with a
            warning.

    Returns:
        A state with the arrays of the checkpoint, and everything else of ``state``.

    Raises:
        ValueError: if the checkpoint's leaves differ from those of ``state`` in name, shape or dtype, if its format is
            unknown, if ``step`` is not there, if something else has made the newest, or if all are damaged.

    Warns:
        UserWarning: if a train state has another backbone or optimizer than the one that was saved, as far as the names
            of their operations tell, if its solver has another loss, class weight or weight decay, or if checkpoints
            are damaged.
    """
    found, at, described = _restored(directory, state, step)
    then, now = described.get("solver"), _solver_of(state)
    if then and now and (other := [name for name in now if then.get(name) != now[name]]):
        differs = ", ".join(f"{name}={now[name]} (before: {then.get(name)})" for name in other)
        warn(
            f"restore_checkpoint: the solver of `state` should be the one that was saved, got {differs}. What step "
            f"{at} of {directory} has goes on: its weight decay, and the loss that the guard compares with. To let the "
            "next solve set both: state.replace(beta=jnp.asarray(jnp.inf), guard=state.guard.forgetful())."
        )
    return found


def restored(directory: str | Path, state: State, *, step: int | None = None) -> tuple[State, int | None, Any]:
    """As :func:`restore_checkpoint`, with the checkpoint's step and ``extra``; None for both if there is none.

    The solver is not compared.
    """
    found, at, described = _restored(directory, state, step)
    return found, at, described.get("extra")


def _restored(directory: str | Path, state: State, step: int | None) -> tuple[State, int | None, dict[str, Any]]:
    """The state, the checkpoint's step, and what is said of it: None and nothing if there is no checkpoint."""
    check_path("restore_checkpoint", "directory", directory)
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(state)):
        raise ValueError(
            "restore_checkpoint: `state` must have arrays, freshly made, got shapes alone, as of jax.eval_shape. Make "
            "it as for a run from the start."
        )
    directory = Path(directory).absolute()
    steps = [s for s in _steps(directory) if step is None or s <= step]
    if step is not None and step not in steps:
        raise ValueError(f"restore_checkpoint: `step` {step} is not in {directory}; there: {steps or 'none'}.")
    damage = []
    for candidate in steps:
        try:
            leaves, described = _read(directory, candidate, _by_path(state))
        except _DamagedError as error:
            damage.append(f"step {candidate}: {error}")
            continue
        if damage:
            warn(
                f"restore_checkpoint: restored step {candidate} of {directory}; passed over what is damaged: "
                + "; ".join(damage)
            )
        if other := others_than_saved(described.get("function"), _function_of(state)):
            warn(
                "restore_checkpoint: the backbone of `state` should be the one that was saved, got another function of "
                f"the same parameters than that of step {candidate} of {directory}. Its operations: {other}. Make the "
                "state by the same module, called in the same way by find_head; for another one use another directory."
            )
        if other := others_than_saved(described.get("optimizer"), optimizer_code.made_of(state)):
            warn(
                "restore_checkpoint: the optimizer of `state` should be the one that was saved, got another one whose "
                f"state has the same structure as that of step {candidate} of {directory}. Its operations: {other}. It "
                "goes on from what the other one has gathered. Make the state by the same optimizer, at any rate; for "
                "another one use another directory."
            )
        return _filled(state, leaves), candidate, described
    if damage:
        raise ValueError(
            f"restore_checkpoint: none of the checkpoints in {directory} can be read: {'; '.join(damage)}."
        )
    return state, None, {}


def _manager(directory: Path, keep: int | None = None, besides: int | None = None) -> ocp.CheckpointManager:
    one = preservation_policy.CustomSteps([] if besides is None else [besides])
    kept = preservation_policy.AnyPreservationPolicy([preservation_policy.LatestN(keep), one])
    options = ocp.CheckpointManagerOptions(preservation_policy=kept, enable_async_checkpointing=False)
    return ocp.CheckpointManager(directory, options=options, item_names=_ITEMS)


def _steps(directory: Path, where: str = "restore_checkpoint") -> list[int]:
    """The steps in the directory, the newest first.

    Raises:
        NotADirectoryError: if it is a file.
        ValueError: if it is a checkpoint itself; or if its newest one was made by something else, such as a manager of
            Orbax's own: saving would put it aside as damaged, or delete it as one too many to ``keep``.
    """
    if directory.exists() and not directory.is_dir():
        raise NotADirectoryError(f"{where}: `directory` must be a directory, got the file {directory}.")
    if not directory.is_dir():
        return []
    if (directory / _LIST).exists():
        raise ValueError(
            f"{where}: `directory` must be one of checkpoints, got {directory}, which is a checkpoint. Give "
            f"its parent, and step={directory.name}."
        )
    steps = sorted((int(p.name) for p in directory.iterdir() if p.name.isdecimal() and p.is_dir()), reverse=True)
    if steps and _is_of_others(directory / str(steps[0])):
        raise ValueError(
            f"{where}: `directory` must be for checkpoints of cf.save_checkpoint, got {directory}, where step "
            f"{steps[0]} was made by something else. Give another directory."
        )
    return steps


def _is_of_others(checkpoint: Path) -> bool:
    """Whether something else has made a checkpoint, and it is not one of ours that is damaged."""
    there = {path.name for path in checkpoint.iterdir()}
    if not there or there.issuperset(_ITEMS):
        return bool(there) and _is_list_of_others(checkpoint / _ITEMS[1])
    try:
        listed = json.loads((checkpoint / _LIST).read_text())["item_handlers"]
    except (OSError, ValueError, KeyError, TypeError):
        return there.isdisjoint(_ITEMS)
    return not isinstance(listed, dict) or listed.keys() != set(_ITEMS)


def _is_list_of_others(meta: Path) -> bool:
    """Whether an item of this name is something else's: a list of ours that is damaged has lost a key at most."""
    try:
        if not (meta / _SAID).exists():
            return bool({path.name for path in meta.iterdir()} - {_DONE})
        stated = json.loads((meta / _SAID).read_text())
    except (OSError, ValueError):
        return False
    return not isinstance(stated, dict) or len(_STATED & stated.keys()) < 2


def _free(directory: Path, name: str) -> Path:
    """A path that does not exist, of this name, numbered if necessary."""
    taken, number = directory / name, 1
    while taken.exists():
        number += 1
        taken = directory / f"{name}.{number}"
    return taken


def _by_path(tree: Any) -> dict[str, Any]:
    """All leaves by their path, as arrays; a key as its data."""
    paths, _ = jax.tree_util.tree_flatten_with_path(tree)
    leaves = {jax.tree_util.keystr(path): leaf for path, leaf in paths}
    arrays = {
        name: jax.random.key_data(leaf) if is_key(leaf) else leaf if isinstance(leaf, Array) else np.asarray(leaf)
        for name, leaf in leaves.items()
    }
    if jax.process_count() == 1:
        return arrays
    # What each process has for itself is the same in all: Orbax takes it from the first, as an array of NumPy.
    return {
        name: on_host(leaf) if getattr(leaf, "is_fully_addressable", False) else leaf for name, leaf in arrays.items()
    }


def _function_of(state: Any) -> dict[str, Any] | None:
    """What the backbone of a state is made of; None for other trees."""
    head = getattr(state, "head", None)
    return with_versions(head.operations) if isinstance(head, Head) else None


def _solver_of(state: Any) -> dict[str, str] | None:
    """What a state is solved for, in words; None for other trees."""
    solver = getattr(state, "solver", None)
    return {name: said(getattr(solver, name)) for name in _SOLVED_BY} if isinstance(solver, Cronos) else None


def _listed(leaves: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Shape, dtype and checksum of every leaf."""
    kinds = ("shape", "dtype", "checksum")
    return {name: dict(zip(kinds, leaf, strict=True)) for name, leaf in fingerprint.described(leaves).items()}


def _read(directory: Path, step: int, like: dict[str, Any] | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Leaves of a checkpoint, and what is said of them, with ``extra``.

    Raises:
        _DamagedError: if it differs from what was saved.
        ValueError: if it is sound, but its leaves are not those of ``like``.
    """
    with silence.of_late_answers():
        leaves, described, damage = _by_orbax(directory, step, like)
        if not everywhere(not damage):
            raise _DamagedError(damage or "another process could not read it")
    found = _listed(leaves)
    wrong = [name for name, leaf in described["leaves"].items() if found[name] != leaf]
    if wrong:
        raise _DamagedError(f"{', '.join(wrong)}: other values than were saved")
    return leaves, described


def _by_orbax(directory: Path, step: int, like: dict[str, Any] | None) -> tuple[dict[str, Any], dict[str, Any], str]:
    """Leaves, what is said of them, and what Orbax says of damage.

    Nothing holds its error any more when garbage is collected, or its abandoned reads would stay.
    """
    leaves: dict[str, Any] = {}
    described: dict[str, Any] = {}
    damage = ""
    with silence.of_all():
        try:
            with _manager(directory) as manager:
                meta = manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta
                stated, body, checksum = meta["format"], meta["body"], meta["checksum"]
                if checksum != zlib.crc32((stated + body).encode()):
                    raise _DamagedError("the list of its leaves has another checksum")
                if stated != _FORMAT:
                    raise _MisfitError(
                        f"restore_checkpoint: step {step} of {directory} must be of the format {_FORMAT!r}, got "
                        f"{stated!r}. It takes the version that wrote it."
                    )
                described = json.loads(body)
                if like is not None:
                    _check_same(described["leaves"], like, step)
                target = {
                    name: _target(d, None if like is None else like[name]) for name, d in described["leaves"].items()
                }
                empty = {name: np.empty(leaf.shape, leaf.dtype) for name, leaf in target.items() if 0 in leaf.shape}
                stored = {name: leaf for name, leaf in target.items() if name not in empty}
                args = ocp.args.Composite(state=ocp.args.StandardRestore(stored))
                leaves = {**manager.restore(step, args=args).state, **empty}
        except (_DamagedError, _MisfitError):
            raise
        except Exception as error:  # Orbax and TensorStore raise many kinds
            damage = f"{type(error).__name__}: {_first_of(error)}"
        if damage:
            gc.collect()  # abandoned reads complain when they are collected
    return leaves, described, damage


def _target(described: dict[str, Any], like: Any) -> Any:
    """The target that Orbax restores a leaf into: on the devices that ``like`` is committed to, or in host memory."""
    dtype = jnp.dtype(described["dtype"])
    if isinstance(like, Array) and like.committed and like.dtype == dtype:
        return ocp.utils.to_shape_dtype_struct(like)
    return np.empty(described["shape"], dtype)


def _fits(described: dict[str, Any], leaf: Any) -> bool:
    """Whether shape and dtype are the same; for scalars, which may be Python numbers, shape and kind.

    A NumPy array may have the dtype that it has after a step: on a device 64 bits are 32.
    """
    dtype = jnp.dtype(described["dtype"])
    same_dtype = dtype in (leaf.dtype, jax.dtypes.canonicalize_dtype(leaf.dtype))
    same_dtype = same_dtype or (leaf.ndim == 0 and dtype.kind == leaf.dtype.kind)
    return same_dtype and tuple(described["shape"]) == leaf.shape


def _check_same(described: dict[str, Any], like: dict[str, Any], step: int) -> None:
    """Raise a _MisfitError unless the leaves of a checkpoint are those of ``like``."""
    for name in [*like, *described]:
        have = described.get(name)
        want = like.get(name)
        if have is None or want is None or not _fits(have, want):
            got = "nothing" if have is None else f"{have['dtype']} of shape {tuple(have['shape'])}"
            expected = "nothing" if want is None else f"{want.dtype} of shape {np.shape(want)}"
            raise _MisfitError(
                f"restore_checkpoint: `state` must be of the structure that was saved; at {name} it has {expected}, "
                f"step {step} has {got}. Make it by the same model, optimizer and settings."
            )


def _filled(state: State, leaves: dict[str, Any]) -> State:
    """``state`` with these leaves."""

    def fill(path: Any, old: Any) -> Any:
        new = leaves[jax.tree_util.keystr(path)]
        if is_key(old):
            return jax.random.wrap_key_data(on_device(new), impl=jax.random.key_impl(old))
        if isinstance(old, Array):
            return new if isinstance(new, Array) else on_device(new, old.dtype)
        return new if isinstance(old, np.ndarray) else type(old)(np.asarray(new).item())

    return jax.tree_util.tree_map_with_path(fill, state)
