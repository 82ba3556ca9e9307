"""Ends of sessions, and queue runners, beside TensorFlow's own: README_supervisor.md lists the items."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from conftest import Seen

CLEAN = ["a clean end", True]


def test_6_2_threads_wind_down_before_the_writer_and_the_session_are_closed(seen: Seen) -> None:
    pair = seen("order_at_the_end")
    assert pair.ours == pair.theirs
    assert pair.ours["did"] == [3, None]
    assert pair.ours["events"] == ["last words", "STOP"]
    assert pair.ours["closed"]
    assert pair.ours["left"] == []


def test_6_3_a_thread_that_waits_in_the_session_is_freed(seen: Seen) -> None:
    pair = seen("blocked_thread")
    assert pair.theirs == {"ran": "RuntimeError", "freed": ["CancelledError"]}, "DEFECT"
    assert pair.ours == {"ran": None, "freed": ["CancelledError"]}


def test_6_4_the_last_step_is_saved(seen_in_all: Seen) -> None:
    pair = seen_in_all("last_step")
    assert pair.theirs == [[20, 0, [0.0, 0.0]]] * 2, "DEFECT"
    assert pair.ours == [[20, 20, [20.0, 20.0]]] * 2


def test_6_5_the_end_of_the_input_is_a_clean_end_and_a_damaged_file_is_none(seen_in_all: Seen) -> None:
    pair = seen_in_all("end_of_input")
    assert pair.theirs == dict.fromkeys(("iterator", "queue", "own", "restore"), CLEAN), "DEFECT: the last one"
    assert pair.ours == {"iterator": CLEAN, "queue": CLEAN, "own": CLEAN, "restore": ["OutOfRangeError", True]}


def test_6_6_and_6_7_and_4_19_errors_of_the_block_come_out_as_themselves(seen_in_all: Seen) -> None:
    pair = seen_in_all("errors_of_the_block")
    assert pair.ours == pair.theirs
    assert {tuple(seen[1:]) for seen in pair.ours["found"]} == {(True, True, True, False)}
    assert pair.ours["left"] == []


def test_6_8_and_6_15_an_error_of_a_service_is_raised_at_the_end_and_again(seen: Seen) -> None:
    pair = seen("error_of_a_service")
    assert pair.ours == pair.theirs == {"same": True, "made": [0], "again": ["LookupError"] * 2}


def test_6_9_and_1_6_of_two_errors_the_second_is_a_note_of_the_first(seen: Seen) -> None:
    pair = seen("error_of_both")
    for order in ("service first", "block first"):
        assert pair.ours[order][:2] == pair.theirs[order][:2]
        assert pair.theirs[order][2] == [], "DEFECT"
        assert len(pair.ours[order][2]) == 1
        assert "failed too" in pair.ours[order][2][0]


def test_6_10_what_fails_while_preparing_comes_out_and_the_session_is_closed(seen: Seen) -> None:
    pair = seen("failed_preparation")
    assert [error for error, _ in pair.theirs] == [
        ["ValueError", "no data", []],
        ["RuntimeError", "generator didn't yield", []],
        ["KeyboardInterrupt", "no data", []],
    ], "DEFECT: the second"
    assert [closed for _, closed in pair.theirs] == [False] * 3
    assert [error[:2] for error, _ in pair.ours] == [
        ["ValueError", "no data"], ["OutOfRangeError", "no data"], ["KeyboardInterrupt", "no data"],
    ]  # fmt: skip
    assert [closed for _, closed in pair.ours] == [True] * 3


def test_6_11_a_supervisor_serves_several_sessions(seen_in_all: Seen) -> None:
    pair = seen_in_all("several_sessions")
    assert pair.ours == pair.theirs
    assert [seen[1] for seen in pair.ours] == [3, 3, 3, 6]
    assert all(seen[0] is False and seen[2:] == [True, True] for seen in pair.ours)


def test_6_12_stop_leaves_the_session_and_if_asked_the_writer_open(seen: Seen) -> None:
    pair = seen("stop_by_hand")
    for found in (pair.theirs, pair.ours):
        assert found["usable"] == 2
        assert found["writing"] is None
        assert found["stops before"] == 0
        assert found["stops"] == 1
        assert found["graphs"] == 1
        assert found["joined"] == [False, True]
        assert found["late"] == "ValueError"
        assert found["twice"] == {"value": None}


def test_6_12_stop_waits_for_the_threads_it_is_given(seen: Seen) -> None:
    pair = seen("stop_with_threads")
    for found in (pair.theirs, pair.ours):
        assert found[0][1:] == [True, True]
        assert found[1:] == [[None, False, False], [False]]


def test_6_13_a_writer_of_the_program_stays_open(seen: Seen) -> None:
    pair = seen("own_writer_at_the_end")
    assert pair.theirs == {"written": False, "warned": 1, "stops": 1}, "DEFECT"
    assert pair.ours == {"written": True, "warned": 0, "stops": 1}


def test_6_14_stop_says_how_a_run_ended(seen: Seen) -> None:
    pair = seen("stop_events")
    assert pair.theirs == [[None, [0, "", ""]], ["ValueError", [0, "", ""]]]
    assert pair.ours == [
        [None, [2, "", "the end of the training block"]],
        ["ValueError", [2, "", "the training block: ValueError: mine"]],
    ]


def test_6_16_a_thread_left_behind_does_not_stop_the_next_session(seen: Seen) -> None:
    pair = seen("straggler_in_the_next_session")
    assert pair.theirs == {"second": ["RuntimeError", "Attempted to use a closed Session.", []], "told": [False]}
    assert pair.ours == {"second": 5, "told": [True]}


def test_6_17_the_methods_of_the_coordinator(seen: Seen) -> None:
    pair = seen("stop_methods")
    assert pair.ours == pair.theirs
    assert pair.ours["gave"] == [None, True]
    assert pair.ours["timeout"] == "TypeError"
    assert [kept[0] for kept in pair.ours["kept"]] == [
        ["ValueError", "mine", []],
        "a clean end",
        ["SystemExit", "4", []],
    ]
    assert [kept[1] for kept in pair.ours["kept"]] == [[True]] * 3
    assert pair.ours["asked"] == ["ArithmeticError", "mine", []]


def test_6_18_and_6_19_a_worker_does_not_hear_the_chief_and_waits_up_to_its_limit(seen: Seen) -> None:
    pair = seen("stop_of_the_chief")
    for found in (pair.theirs, pair.ours):
        assert [found["heard"], found["made"]] == [False, 2]
        assert "DeadlineExceededError" in found["is"]


def test_6_20_the_old_names(seen_once: Seen) -> None:
    pair = seen_once("old_names")
    for name in ("same", "seen", "managed"):
        assert pair.ours[name] == pair.theirs[name]
    assert all(pair.ours["same"].values())
    assert pair.theirs["own"] == [], "TRAP"
    assert pair.ours["own"] == ["own"]


def test_6_21_basic_train_loop_takes_the_supervisor(seen: Seen) -> None:
    pair = seen("basic_train_loop")
    assert pair.ours == pair.theirs
    assert pair.ours == {"AbortedError": [None, [1, 2, 1, 2, 3]], "UnavailableError": ["UnavailableError", [1, 2]]}


def test_7_2_blocked_enqueues_end_at_the_stop(seen: Seen) -> None:
    pair = seen("blocked_enqueues")
    assert pair.ours == pair.theirs == {"made": 2, "left": [], "stopped": True}


def test_7_3_a_source_that_is_closed_ends_the_training(seen_in_all: Seen) -> None:
    pair = seen_in_all("input_queue_ends")
    assert pair.ours == pair.theirs == {"ran": "a clean end", "got": [1.0, 2.0, 3.0], "kept": 0}


def test_7_3_an_error_of_an_enqueue_comes_out(seen: Seen) -> None:
    pair = seen("failing_enqueue")
    assert pair.ours == pair.theirs
    assert pair.ours["about"]


def test_7_3_what_the_stop_cancels_is_no_error(seen: Seen) -> None:
    pair = seen("cancelled_dequeue")
    assert pair.ours == pair.theirs == {"ran": "a clean end", "left": []}


def test_7_4_and_7_5_the_function_of_the_module_takes_the_coordinator(seen: Seen) -> None:
    pair = seen("module_function")
    assert pair.ours == pair.theirs == {"number": 3, "got": 10.0, "again": 0, "alive": [False] * 3}
