from pathlib import Path

import pytest

from lorakit.errors import LorakitWarning, OutputError, TrainingError
from lorakit.train.callbacks import Cadence
from lorakit.train.checkpoints import Checkpoint, CheckpointStore, RunState
from lorakit.train.metrics import MetricsLog


def write(store: CheckpointStore, step: int, best: int | None = None) -> None:
    with store.write(step, RunState(best_step=best), {"config": {}}) as staging:
        (staging / "weights").write_bytes(bytes([step]) * 100)


def test_the_newest_stay_and_the_best_beside(tmp_path):
    store = CheckpointStore(tmp_path / "c", keep=2)
    for step in (1, 2, 3, 4):
        write(store, step, best=1)
    assert store.steps() == [1, 3, 4]
    write(store, 5, best=5)
    assert store.steps() == [4, 5]


def test_a_failed_write_leaves_the_checkpoints_as_they_were(tmp_path):
    store = CheckpointStore(tmp_path / "c", keep=1)
    write(store, 1)

    def fail() -> None:
        with store.write(2, RunState(), {}) as staging:
            (staging / "weights").write_bytes(b"half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert [p.name for p in store.directory.iterdir()] == ["step-00000001"]
    last = store.last()
    assert last is not None
    assert last.step == 1


def test_a_later_step_of_an_undone_future_is_removed(tmp_path):
    store = CheckpointStore(tmp_path / "c", keep=3)
    for step in (2, 4, 6):
        write(store, step)
    write(store, 3)
    assert store.steps() == [2, 3]


@pytest.mark.parametrize("damage", [b"", b"x" * 100])
def test_damage_is_seen_and_passed_over(tmp_path, damage):
    store = CheckpointStore(tmp_path / "c", keep=2)
    write(store, 1)
    write(store, 2)
    (store.path_of(2) / "weights").write_bytes(damage)
    assert store.read(2) == "weights is not what was written"
    with pytest.warns(LorakitWarning, match="passed over"):
        last = store.last()
    assert isinstance(last, Checkpoint)
    assert last.step == 1
    with pytest.raises(TrainingError, match="step 2 cannot be used"):
        store.require(2)


def test_what_a_kill_left_is_no_checkpoint_and_is_cleaned(tmp_path):
    store = CheckpointStore(tmp_path / "c", keep=2)
    write(store, 1)
    for name in (".step-00000002.x.partial", ".step-00000003.removed"):
        (store.directory / name).mkdir()
    assert store.steps() == [1]
    store.clean()
    assert [p.name for p in store.directory.iterdir()] == ["step-00000001"]


def test_patience_counts_validations_without_a_new_best():
    state = RunState().after_evaluation(1, 2.0, 2)
    assert (state.best_step, state.best_loss) == (1, 2.0)
    state = state.after_evaluation(2, 2.0, 2)
    assert (state.num_evals_since_best, state.stopped_early) == (1, False)
    assert state.after_evaluation(3, 2.5, 2).stopped_early
    better = state.after_evaluation(3, 1.5, 2)
    assert (better.best_step, better.num_evals_since_best) == (3, 0)
    assert not state.after_evaluation(3, 2.5, None).stopped_early


def test_the_cadence_always_has_the_last_step():
    cadence = Cadence(max_steps=7, eval_every=3, save_every=4)
    assert [s for s in range(1, 8) if cadence.evaluates(s)] == [3, 6, 7]
    assert [s for s in range(1, 8) if cadence.saves(s)] == [4, 7]
    assert not any(
        Cadence(max_steps=7, eval_every=None, save_every=4).evaluates(s) for s in range(1, 8)
    )


def test_metrics_are_cut_to_the_resumed_step_and_a_torn_line_is_dropped(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    assert log.read() == []
    for step in (1, 2, 3):
        log.append({"step": step, "loss": 0.1 * step})
    with log.path.open("a") as stream:
        stream.write('{"step": 4, "lo')
    log.cut_after(2)
    log.append({"step": 3, "loss": 0.5})
    assert log.read() == [
        {"step": 1, "loss": 0.1},
        {"step": 2, "loss": 0.2},
        {"step": 3, "loss": 0.5},
    ]


def test_damage_inside_the_metrics_is_an_error(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.path.write_text('{"step": 1}\nnonsense\n{"step": 3}\n')
    with pytest.raises(OutputError, match="damaged") as caught:
        log.cut_after(1)
    assert "line 2" in caught.value.where


def test_an_old_checkpoint_that_cannot_be_removed_stays(tmp_path, monkeypatch):
    store = CheckpointStore(tmp_path / "c", keep=1)
    with store.write(1, RunState(), {}):
        pass

    rename = Path.rename

    def refuse(self, target):
        if self.name == "step-00000001":
            raise PermissionError(13, "Permission denied", str(self))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.warns(LorakitWarning, match="step-00000001 stays"), store.write(2, RunState(), {}):
        pass
    assert store.steps() == [1, 2]
