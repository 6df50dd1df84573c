"""Whatever goes wrong, a result is right or an error is clear, and nothing is lost: a sample, and what was met once."""

import json

import jax
import numpy as np
import pytest
from disks import largest_file
from faults import campaign
from faults.draw import PAIRS, SUBJECTS, case
from given import PARAMS, X, batched, plain, same, train

import cronos_flax as cf
from cronos_flax._alternation import checkpoint as _checkpoint
from cronos_flax._head import files
from cronos_flax._solver.blocks import Source
from cronos_flax.compare import sweep as _sweep
from cronos_flax.compare.results import kept
from cronos_flax.compare.task import Run, Settings, Task

LIGHT = ("cf.save_checkpoint", "cf.restore_checkpoint", "cf.fit_head", "CronosTrainState.solve_head", "compare.sweep")


@pytest.mark.slow
def test_of_fifty_faults_none_gives_a_wrong_result_or_an_unclear_error(tmp_path):
    wanted = campaign.cases(50, functions=LIGHT)
    rows = campaign.run(wanted, tmp_path / "rows.jsonl")
    bad = [row for row in rows if row["outcome"] == "other"]
    assert not bad, json.dumps(bad, indent=1)
    assert {row["function"] for row in rows} == set(LIGHT)
    assert campaign.run(wanted, tmp_path / "rows.jsonl") == rows  # none is run again
    assert "| all |" in campaign.table(rows)


def test_a_case_has_a_number_and_every_pair_comes_as_often():
    assert case(3, 777) == case(3, 777)
    assert case(3, 777).rng.random() == case(3, 777).rng.random()
    drawn = [case(0, number)[1:3] for number in range(2 * len(PAIRS))]
    assert sorted(drawn) == sorted(2 * PAIRS)
    assert drawn[: len(PAIRS)] != drawn[len(PAIRS) :]
    assert {fault for _, fault in PAIRS} == {fault for kind in SUBJECTS.values() for fault in kind.faults}


def test_what_is_wrong_or_lost_is_found(monkeypatch):
    """A restore that gives back what it is given is no right result, and a save that saves nothing none either."""
    monkeypatch.setattr(cf, "restore_checkpoint", lambda directory, state: state)
    wanted = [c for c in campaign.cases(12, functions=["cf.restore_checkpoint"]) if c.fault == "flipped byte"]
    assert {row["outcome"] for row in campaign.run(wanted)} == {"other"}


def test_a_run_into_the_directory_of_another_is_refused_and_does_no_harm(tmp_path):
    """The second took away what the first was writing, and the first stopped with a file that is not there."""
    said = []

    def second(row):
        with pytest.raises(BlockingIOError, match=r"train: `directory` .* is held by process .*give another directory"):
            train(directory=tmp_path)
        with pytest.raises(BlockingIOError, match="save_checkpoint: `directory`"):
            cf.save_checkpoint(tmp_path, PARAMS, 99)
        said.append(row)

    state, _ = train(directory=tmp_path, callbacks=[second])
    assert len(said) == 2
    again, _ = train(directory=tmp_path)
    same(again.params, state.params)


def test_where_a_file_system_has_no_locks_nothing_is_held(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(files.errno.ENOTSUP, "no locks")

    monkeypatch.setattr(files.fcntl, "flock", unsupported)
    cf.save_checkpoint(tmp_path, PARAMS, 1)
    same(cf.restore_checkpoint(tmp_path, PARAMS), PARAMS)


@pytest.mark.parametrize("size", [100, 1500, 2500])
def test_a_checkpoint_that_does_not_fit_on_the_disk_names_its_directory(tmp_path, size):
    """Orbax calls it a ValueError of 600 characters, or names no file; the checkpoint before must be there."""
    state = {"weights": np.random.default_rng(0).normal(size=(64, 8))}
    cf.save_checkpoint(tmp_path / "run", state, 1)
    with largest_file(size), pytest.raises(OSError, match=rf"File too large.*: '{tmp_path}/run") as raised:
        cf.save_checkpoint(tmp_path / "run", state, 2)
    assert len(str(raised.value)) < 400
    same(cf.restore_checkpoint(tmp_path / "run", {"weights": np.zeros((64, 8))}), state)
    cf.save_checkpoint(tmp_path / "run", state, 2)


def test_what_is_said_of_damage_is_short(tmp_path, monkeypatch):
    def long(*_):
        raise ValueError("DATA_LOSS: " + "much " * 500)

    (tmp_path / "1").mkdir()
    monkeypatch.setattr(_checkpoint, "_manager", long)
    with pytest.raises(ValueError, match="can be read: step 1: ValueError: DATA_LOSS") as raised:
        cf.restore_checkpoint(tmp_path, PARAMS)
    assert len(str(raised.value)) < 500


def test_parameters_that_are_lost_are_told_and_the_checkpoint_before_is_kept(tmp_path):
    """A TrainState became NaN without a word, and its checkpoints took the place of the sound ones."""
    bad = batched()
    bad[2] = (np.where(np.arange(64)[:, None] == 5, np.nan, bad[2][0]), bad[2][1])
    one, _ = train(data=batched(), epochs=1, directory=tmp_path)
    with pytest.warns(
        UserWarning, match=r"train: the parameters are not finite .* batch 2 of epoch 0 was nan.*not saved"
    ):
        lost, history = train(data=bad, epochs=5, directory=tmp_path / "bad")
    assert not np.all(np.isfinite(jax.tree.leaves(lost.params)[0]))
    assert np.isnan(history[-1]["loss"])
    assert _checkpoint._steps(tmp_path / "bad") == []
    same(cf.restore_checkpoint(tmp_path, plain().replace(step=np.int32(0))).params, one.params)


def test_blocks_that_are_not_finite_in_a_later_pass_are_refused():
    """The first pass was checked; what came later was solved on, and gave another result."""

    blocks = [X[:128], X[128:256].copy()]
    source = Source(blocks, (256, 5), X.dtype)
    np.testing.assert_array_equal(source.piece(0), X[:256])
    blocks[1][3, 2] = np.inf
    for read in (lambda: source.piece(0), lambda: source.take(np.array([200]))):
        with pytest.raises(ValueError, match="`X` must hold the same finite rows at every pass, got NaN or infinite"):
            read()


def test_what_the_callback_of_a_sweep_raises_is_raised(tmp_path, monkeypatch):
    """It was written down as a run that failed, for good."""

    def rows_of(task, run, watch):
        watch({"epoch": 1})

    def watch(*_):
        raise KeyError("mine")

    monkeypatch.setattr(_sweep, "rows_of", rows_of)
    task = Task.of(Settings("wine", model="two-layer", epochs=1))
    with pytest.raises(KeyError, match="mine"):
        _sweep.sweep(task.settings, [Run("adam", 1e-3, 0)], tmp_path, task=task, watch=watch)
    assert kept(tmp_path / "results.jsonl") == []
