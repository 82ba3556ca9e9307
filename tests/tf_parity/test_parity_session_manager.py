"""SessionManager beside TensorFlow's own, item by item and in every mode (README.md lists them)."""

from __future__ import annotations

import os
from typing import Any

import pytest

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
pytest.importorskip("tensorflow", reason="TensorFlow is not installed")

from parity import MODES, Pair, is_kind, observed

OPEN = {"made": 1, "closed": 0}
CLOSED = {"made": 1, "closed": 1}


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def seen(mode: str, name: str) -> Pair:
    return observed("programs_session_manager.py", mode, name)


def same(mode: str, name: str) -> Any:
    """What the program sees with our class, which has to be what it sees with TensorFlow's."""
    pair = seen(mode, name)
    assert pair.ours == pair.theirs
    return pair.ours


def fails_with(found: Any, error: str, *said: str) -> bool:
    """Whether it is that error or one derived from it, and says this."""
    return is_kind(found, error) and all(word in found["message"] for word in said)


def test_3_01_the_constructor(mode: str) -> None:
    pair = seen(mode, "constructor")
    assert is_kind(pair.theirs[0], "ValueError")
    assert fails_with(pair.ours[0], "ValueError", "ready_for_local_init_op", "local_init_op")
    assert pair.ours[1:] == pair.theirs[1:] == [{"value": None}, True, True]


def test_3_02_the_order_of_a_preparation(mode: str) -> None:
    order, result = same(mode, "order_of_preparation")
    assert order == ["init_op", "init_fn of Session with [3.0]", "ready_for_local_init_op", "local_init_op", "ready_op"]
    assert result == {"value": [3.0], "sessions": OPEN}


def test_3_02_with_nothing_to_initialise_it_is_an_error(mode: str) -> None:
    pair = seen(mode, "nothing_to_initialise_with")
    assert fails_with(pair.theirs[0], "RuntimeError", "init_op", "init_fn", "local_init_op")
    assert fails_with(pair.ours[0], "RuntimeError", "init_op", "init_fn", "local_init_op")
    assert pair.ours[1:] == pair.theirs[1:] == [{"value": True, "sessions": OPEN}] * 3


def test_3_03_what_was_restored_is_not_initialised(mode: str) -> None:
    assert same(mode, "restored_is_not_initialised") == [{"value": [20.0], "sessions": OPEN}, []]


def test_3_03_variables_that_the_saver_does_not_cover_are_named(mode: str) -> None:
    pair = seen(mode, "variables_that_the_saver_does_not_cover")
    assert fails_with(pair.theirs, "RuntimeError", "uncovered")
    assert fails_with(pair.ours, "RuntimeError", "uncovered", "restored step 1", "not run: init, init_fn")


def test_3_04_a_restore_needs_a_saver_and_a_place(mode: str) -> None:
    *results, made, left = same(mode, "what_a_restore_needs")
    assert [result["value"] for result in results] == [[0.0]] * 4 + [[10.0]]
    assert not made
    assert "model.ckpt-1.index" in left


def test_3_05_a_directory_and_a_file_are_refused_before_there_is_a_session(mode: str) -> None:
    pair = seen(mode, "directory_and_file")
    for found, sessions in ((pair.theirs, OPEN), (pair.ours, {"made": 0, "closed": 0})):
        for result in found:
            assert fails_with(result, "ValueError", "checkpoint_dir", "checkpoint_filename_with_path")
            assert result["sessions"] == sessions


def test_3_05_a_file_is_restored_as_it_is(mode: str) -> None:
    pair = seen(mode, "one_file")
    for (there, missing, recovered, last), sessions in ((pair.theirs, OPEN), (pair.ours, CLOSED)):
        assert there == {"value": [10.0], "sessions": OPEN}
        assert fails_with(missing, "ValueError", "model.ckpt-9")
        assert missing["sessions"] == sessions
        assert recovered == [[10.0], True]
        assert last == []


def test_3_06_the_saver_goes_on_removing_the_oldest(mode: str) -> None:
    prepared, left, recovered, left_again = same(mode, "the_saver_goes_on_counting")
    assert prepared == ["model.ckpt-2", "model.ckpt-3"]
    assert left == left_again == ["model.ckpt-3.index", "model.ckpt-4.index", "model.ckpt-5.index"]
    assert recovered == ["model.ckpt-3", "model.ckpt-4", "model.ckpt-5"]


def test_3_07_a_checkpoint_that_is_waited_for(mode: str) -> None:
    assert same(mode, "a_checkpoint_that_comes_later") == [[40.0], None]


def test_3_07_a_wait_ends_when_its_time_is_over(mode: str) -> None:
    pair = seen(mode, "a_wait_that_runs_out")
    assert pair.theirs["took"] >= 1.0  # the limit is 0.2, and one poll takes 1.0
    assert pair.ours["took"] >= 0.2
    assert "waited 0.2 s" in pair.ours["prepared"]["message"]


def test_3_08_a_wait_that_runs_out_begins_nothing_anew(mode: str) -> None:
    pair = seen(mode, "a_wait_that_runs_out")
    assert pair.theirs["prepared"] == {"value": [0.0], "sessions": OPEN}
    assert pair.theirs["recovered"] == {"value": False}
    for found in (pair.ours["prepared"], pair.ours["recovered"]):
        assert fails_with(found, "DeadlineExceededError", "checkpoint")
        assert is_kind(found, "TimeoutError")
    assert pair.ours["prepared"]["sessions"] == pair.ours["sessions"] == CLOSED


@pytest.mark.parametrize(
    ("harm", "there", "here"),
    [
        ("garbage", [0.0], [20.0]),
        ("binary_garbage", "UnicodeDecodeError", [20.0]),
        ("empty_state", "ValueError", [20.0]),
        ("no_state", [0.0], [20.0]),
        ("newest_is_gone", "ValueError", [10.0]),
        ("newest_is_cut", "OutOfRangeError", [10.0]),
    ],
)
def test_3_09_a_damaged_state_file_or_checkpoint_loses_no_good_one(mode: str, harm: str, there: Any, here: Any) -> None:
    """There it ends the program, or begins the training anew without a word above a warning."""
    pair = seen(mode, "damage")
    theirs, ours = pair.theirs[harm], pair.ours[harm]
    assert theirs.get("value", theirs.get("error")) == there
    assert ours == {"value": here, "sessions": OPEN}


def test_3_09_if_all_are_damaged_it_is_an_error_that_is_no_clean_stop(mode: str) -> None:
    pair = seen(mode, "all_are_damaged")
    assert is_kind(pair.theirs, "OutOfRangeError")
    assert not is_kind(pair.ours, "OutOfRangeError")
    assert fails_with(pair.ours, "AllCheckpointsDamagedError", "model.ckpt-1", "model.ckpt-2")
    assert pair.ours["sessions"] == CLOSED


def test_3_10_a_copied_directory_is_one_of_its_own(mode: str) -> None:
    pair = seen(mode, "a_directory_that_was_copied")
    assert pair.theirs[0]["value"] == [77.0], "the original's, which was trained on meanwhile"
    assert is_kind(pair.theirs[1], "ValueError")
    assert [found["value"] for found in pair.ours] == [[10.0], [10.0]]


def test_3_11_a_checkpoint_of_another_model(mode: str) -> None:
    pair = seen(mode, "another_model")
    missing, other_shape = zip(pair.theirs[:2], pair.ours[:2], strict=True)
    theirs, ours = other_shape
    assert fails_with(ours, "InvalidArgumentError", "shape")
    if mode == "v1":
        assert is_kind(theirs, "InvalidArgumentError")
    else:  # TensorFlow's resource variables take another shape without a word
        assert theirs == {"value": True, "sessions": OPEN}
    assert all(fails_with(found, "NotFoundError", "checkpoint") for found in missing)
    assert [found["sessions"] for found in missing] == [OPEN, CLOSED]
    assert pair.ours[2] == pair.theirs[2], "a good checkpoint stays where it is"


def test_3_12_local_initialisation(mode: str) -> None:
    pair = seen(mode, "local_initialisation")
    done, unready, without = zip(pair.theirs, pair.ours, strict=True)
    assert done == ({"value": [5.0, 7.0], "sessions": OPEN},) * 2
    assert without == ({"value": [5.0], "sessions": OPEN},) * 2
    for found in unready:
        assert fails_with(found, "RuntimeError", "local", "an_init_op", "named_init_fn", "weight")


def test_3_13_what_counts_as_ready(mode: str) -> None:
    pair = seen(mode, "what_counts_as_ready")
    for name, theirs in pair.theirs.items():
        ours = pair.ours[name]
        if "value" in theirs:
            assert ours == theirs, name
        else:
            names = "a, b" if name == "names" else "größe"
            assert fails_with(theirs, "RuntimeError", f"Variables not initialized: {names}")
            assert fails_with(ours, "RuntimeError", f"Variables not initialized: {names}")


def test_3_13_a_ready_op_of_another_type_is_explained(mode: str) -> None:
    pair = seen(mode, "ready_ops_of_other_types")
    for name in ("float", "int64"):
        assert fails_with(pair.theirs[name], "AttributeError", "decode")
        assert fails_with(pair.ours[name], "TypeError", "ready op")


def test_3_14_a_failed_precondition_is_not_ready_only_if_something_is_uninitialised(mode: str) -> None:
    pair = seen(mode, "failed_preconditions")
    expected = {
        "reads, initialised": "", "reads, uninitialised": "RuntimeError", "of another kind": "FailedPreconditionError",
        "before local init": "RuntimeError", "in local init": "FailedPreconditionError",
    }  # fmt: skip
    for name, error in expected.items():
        for found in (pair.theirs[name], pair.ours[name]):
            assert is_kind(found, error) if error else found["value"], name


def test_3_15_not_ready_at_the_end(mode: str) -> None:
    pair = seen(mode, "not_ready_at_the_end")
    for found in (pair.theirs, pair.ours):
        names = "an_init_op", "named_init_fn", "a_local_init_op", "Variables not initialized: forgotten"
        assert fails_with(found, "RuntimeError", *names)


def test_3_16_recover_session(mode: str) -> None:
    uninitialised = "FailedPreconditionError"
    assert same(mode, "recovering") == {
        "ready, full": [True, [10.0], [4.0]],
        "ready, empty": [False, uninitialised, [4.0]],
        "not ready for local init, full": [False, [10.0], uninitialised],
        "not ready for local init, empty": [False, uninitialised, uninitialised],
        "not ready, full": [False, [10.0], uninitialised],
        "not ready, empty": [False, uninitialised, uninitialised],
        "without saver": "Session",
    }


def test_3_17_waiting_for_the_chief(mode: str) -> None:
    """One session is asked again and again here, and there a new one each time; the program gets one that is open."""
    pair = seen(mode, "waiting_for_the_chief")
    assert pair.ours["seen"] == pair.theirs["seen"] == [True, [6.0, 4.0], "Session"]
    assert pair.theirs["made while waiting"] > 0
    assert pair.ours["made while waiting"] == 0


def test_3_18_a_wait_is_not_given_up_early(mode: str) -> None:
    pair = seen(mode, "waiting_in_vain")
    longer = "one poll is longer than the limit"
    for name in ("polls", longer):
        assert is_kind(pair.theirs[name], "DeadlineExceededError")
        assert fails_with(pair.ours[name], "DeadlineExceededError", "waited", "weight")
        assert pair.ours[name]["open"] == pair.theirs[name]["open"] == 0
    assert pair.theirs[longer]["took"] < pair.ours[longer]["took"]
    assert pair.ours[longer]["took"] >= 0.5


def test_3_19_a_model_that_becomes_ready_is_seen_soon(mode: str) -> None:
    pair = seen(mode, "ready_soon_after_a_poll")
    assert pair.theirs >= 1.2  # a whole poll, from a moment after the look that came too early
    assert pair.ours < pair.theirs


def test_3_20_errors_leave_no_session_open(mode: str) -> None:
    pair = seen(mode, "errors_while_bringing_up")
    for name, theirs in pair.theirs.items():
        ours = pair.ours[name]
        assert is_kind(ours, theirs["error"]), name
        assert (theirs["sessions"], ours["sessions"]) == (OPEN, CLOSED), name


def test_3_22_workers_are_let_in_before_init_fn_has_ended(mode: str) -> None:
    assert same(mode, "workers_during_init_fn") == [[0.0], [9.0]]


def test_3_23_initialisers_of_saved_models_run_before_the_restore(mode: str) -> None:
    """So what the checkpoint holds counts more, and what only they initialise is there."""
    assert same(mode, "saved_model_initialisers") == [{"value": [10.0, 200.0], "sessions": OPEN}] * 2
