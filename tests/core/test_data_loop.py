"""Where a loop stands in its data: epochs, passes, positions; by the rules of the module."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from supervise_core import CheckpointDirectory, DataPositionError, EverySteps, KeepAll, SessionStateError, Supervisor
from supervise_numpy import ArrayBackend


def supervisor(logdir: Path | None = None, **options: Any) -> Supervisor[Any]:
    options.setdefault("save_every", None)
    return Supervisor(ArrayBackend({"w": np.zeros(1)}), logdir, summarize_every=None, **options)


@pytest.fixture
def sv() -> Iterator[Supervisor[Any]]:
    made = supervisor()
    with made.managed_session():
        yield made


# ---- without a resume


def test_epochs_count_from_zero(sv: Supervisor[Any]) -> None:
    assert list(sv.epochs(3)) == [0, 1, 2]


def test_no_epochs_are_none(sv: Supervisor[Any]) -> None:
    assert list(sv.epochs(0)) == []


def test_items_come_in_their_order_and_each_pass_begins_anew(sv: Supervisor[Any]) -> None:
    assert [list(sv.batches("abc")) for _ in sv.epochs(2)] == [["a", "b", "c"]] * 2


def test_passes_can_follow_one_another_without_epochs(sv: Supervisor[Any]) -> None:
    assert [list(sv.batches(range(3))) for _ in range(2)] == [[0, 1, 2], [0, 1, 2]]


def test_two_open_with_one_name_are_an_error(sv: Supervisor[Any]) -> None:
    with pytest.raises(SessionStateError, match=r"two sv\.batches named 'batches' are open at once"):  # noqa: PT012
        for _ in sv.batches(range(3)):
            next(iter(sv.batches(range(3))))


def test_a_validation_pass_within_a_training_pass_has_a_name(sv: Supervisor[Any]) -> None:
    seen = [(item, list(sv.batches("xy", name="validation"))) for item in sv.batches(range(2))]
    assert seen == [(0, ["x", "y"]), (1, ["x", "y"])]


def test_epochs_of_one_name_are_used_once(sv: Supervisor[Any]) -> None:
    list(sv.epochs(2))
    with pytest.raises(SessionStateError, match="used before in this loop; give the second one a name of its own"):
        list(sv.epochs(2))
    assert list(sv.epochs(2, name="fine-tuning")) == [0, 1]


def test_a_pass_can_be_left_early(sv: Supervisor[Any]) -> None:
    seen: list[int] = []
    for _ in sv.epochs(2):
        for item in sv.batches(range(10)):
            seen.append(item)
            if item == 2:
                break
    assert seen == [0, 1, 2, 0, 1, 2]


def test_a_stop_ends_both(sv: Supervisor[Any]) -> None:
    seen: list[tuple[int, int]] = []
    for epoch in sv.epochs(5):
        for item in sv.batches(range(4)):
            seen.append((epoch, item))
            if len(seen) == 6:
                sv.request_stop()
    assert seen[-1] == (1, 1)


def test_a_stop_before_the_loop_ends_it_before_it_begins(sv: Supervisor[Any]) -> None:
    sv.request_stop()
    assert list(sv.epochs(5)) == []
    assert list(sv.batches(range(5))) == []


def test_the_length_is_what_is_left(sv: Supervisor[Any]) -> None:
    batches: Any = sv.batches(range(5))
    assert len(batches) == 5
    next(batches)
    assert len(batches) == 4
    with pytest.raises(TypeError, match="has no len"):
        len(sv.batches((item for item in "ab"), name="lazy"))  # type: ignore[arg-type]


def test_what_cannot_be_iterated_over_is_named(sv: Supervisor[Any]) -> None:
    with pytest.raises(TypeError, match="takes something to iterate over, not 7"):
        next(iter(sv.batches(7)))


def test_an_error_of_the_data_comes_out_as_itself(sv: Supervisor[Any]) -> None:
    def broken() -> Iterator[int]:
        yield 1
        raise OSError("the data is broken")

    with pytest.raises(OSError, match="the data is broken"):
        list(sv.batches(broken()))


# ---- resumed


def whole_and_in_parts(
    tmp_path: Path,
    body: Callable[[Supervisor[Any], Any, list[Any], Callable[[], None]], None],
    counted: bool,
    last: int,
) -> None:
    """Run the body at once, and stopped after each of its steps in turn; what both saw must be the same."""

    def run(logdir: Path, stop_after: int | None) -> list[Any]:
        seen: list[Any] = []
        sv = supervisor(logdir, resume="auto")
        made = 0

        def step() -> None:
            nonlocal made
            made += 1
            if counted:
                sess.global_step += 1
            if made == stop_after:
                sv.request_stop()

        with sv.managed_session() as sess:
            body(sv, sess, seen, step)
        return seen

    whole = run(tmp_path / "whole", None)
    for stop_after in range(1, last):
        logdir = tmp_path / f"stopped after {stop_after}"
        assert run(logdir, stop_after) + run(logdir, None) == whole, stop_after


@pytest.mark.parametrize("counted", [True, False])
def test_epochs_and_batches_go_on_where_they_were(tmp_path: Path, counted: bool) -> None:
    def body(sv: Supervisor[Any], sess: Any, seen: list[Any], step: Callable[[], None]) -> None:
        for epoch in sv.epochs(3):
            for item in sv.batches(range(4)):
                seen.append((epoch, item))
                step()

    whole_and_in_parts(tmp_path, body, counted, 12)


@pytest.mark.parametrize("counted", [True, False])
def test_passes_without_epochs_go_on_where_they_were(tmp_path: Path, counted: bool) -> None:
    def body(sv: Supervisor[Any], sess: Any, seen: list[Any], step: Callable[[], None]) -> None:
        for item in sv.batches(range(6)):
            seen.append(item)
            step()

    whole_and_in_parts(tmp_path, body, counted, 6)


def test_two_passes_in_one_epoch_go_on_where_they_were(tmp_path: Path) -> None:
    def body(sv: Supervisor[Any], sess: Any, seen: list[Any], step: Callable[[], None]) -> None:
        for epoch in sv.epochs(2):
            for name in ("labelled", "unlabelled"):
                for item in sv.batches(range(3), name=name):
                    seen.append((epoch, name, item))
                    step()

    whole_and_in_parts(tmp_path, body, True, 12)


def test_one_name_twice_in_an_epoch_goes_on_where_it_was(tmp_path: Path) -> None:
    def body(sv: Supervisor[Any], sess: Any, seen: list[Any], step: Callable[[], None]) -> None:
        for epoch in sv.epochs(2):
            for _ in range(2):
                for item in sv.batches(range(3)):
                    seen.append((epoch, item))
                    step()

    whole_and_in_parts(tmp_path, body, True, 12)


def test_rounds_of_should_stop_are_counted(tmp_path: Path) -> None:
    for expected in (4, 8):
        sv = supervisor(tmp_path)
        with sv.managed_session() as sess:
            rounds = 0
            while not sv.should_stop():
                sess["w"][...] += 1
                rounds += 1
                if rounds == 4:
                    sv.request_stop()
            sv.should_stop()
        assert sv.report.last_step == expected
        assert sess["w"] == [expected]


def test_a_save_waits_until_every_item_in_hand_is_used(tmp_path: Path) -> None:
    sv = supervisor(tmp_path, save_every=EverySteps(1), keep=KeepAll())
    with sv.managed_session() as sess:
        for number, _ in enumerate(sv.batches(range(12)), 1):
            sv.save()
            sess["w"][...] += 1
            if number % 4 == 0:
                sess.global_step += 1
    directory = CheckpointDirectory(tmp_path)
    assert [(step, float(directory.at(step).load("model")["w"][0])) for step in directory.steps()] == [
        (0, 0.0), (1, 4.0), (2, 8.0), (3, 12.0)
    ]  # fmt: skip


def test_data_that_has_become_shorter_is_told_of(tmp_path: Path) -> None:
    for items in (9, 3):
        sv = supervisor(tmp_path)
        with sv.managed_session() as sess:
            batches = sv.batches(range(items))
            if items == 3:
                with pytest.raises(DataPositionError, match="has 3 items where the checkpoint says that 6"):
                    next(iter(batches))
                break
            for item in batches:
                sess.global_step += 1
                if item == 5:
                    sv.request_stop()


def test_data_that_keeps_its_own_position_is_asked_for_it(tmp_path: Path) -> None:
    class Cursor:
        def __init__(self) -> None:
            self.at = 0

        def __iter__(self) -> Iterator[int]:
            while self.at < 6:
                self.at += 1
                yield self.at
            self.at = 0

        def state_dict(self) -> dict[str, int]:
            return {"at": self.at}

        def load_state_dict(self, state: dict[str, int]) -> None:
            self.at = state["at"]

    seen: list[int] = []
    for stop_at in (2, 5, None):
        sv = supervisor(tmp_path)
        with sv.managed_session() as sess:
            for item in sv.batches(Cursor()):
                seen.append(item)
                sess.global_step += 1
                if item == stop_at:
                    sv.request_stop()
    assert seen == [1, 2, 3, 4, 5, 6]


def test_a_pass_within_a_step_is_completed_on_a_stop(tmp_path: Path) -> None:
    def body(sv: Supervisor[Any], sess: Any, seen: list[Any], step: Callable[[], None]) -> None:
        for item in sv.batches(range(5)):
            step()
            seen.append((item, list(sv.batches("xy", name="validation"))))

    whole_and_in_parts(tmp_path, body, True, 5)


@pytest.mark.parametrize("breaks", [True, False])
def test_what_follows_the_news_of_a_stop_is_not_saved(tmp_path: Path, breaks: bool) -> None:
    sv = supervisor(tmp_path)
    with sv.managed_session() as sess:
        for _ in sv.epochs(3):
            for item in sv.batches(range(4)):
                sess["w"][...] += 1
                sess.global_step += 1
                if item == 1:
                    sv.request_stop()
            sess["w"][...] = 100.0
            if breaks:
                break
        sess["w"][...] = 200.0
        list(sv.batches(range(4)))
        assert list(sv.epochs(3, name="more")) == []
        sess["w"][...] = 300.0
    with CheckpointDirectory(tmp_path).newest() as newest:
        assert (newest.step, float(newest.load("model")["w"][0])) == (2, 2.0)


def test_passes_within_a_step_are_begun_anew_in_every_epoch(tmp_path: Path) -> None:
    def body(sv: Supervisor[Any], sess: Any, seen: list[Any], step: Callable[[], None]) -> None:
        for _ in sv.epochs(2):
            for item in sv.batches(range(4)):
                step()
                if item % 2:
                    seen.append((item, list(sv.batches("xy", name="validation"))))
            seen.extend(sv.batches("z", name="validation"))

    whole_and_in_parts(tmp_path, body, True, 8)


def test_two_passes_in_step_go_on_together(tmp_path: Path) -> None:
    def body(sv: Supervisor[Any], sess: Any, seen: list[Any], step: Callable[[], None]) -> None:
        for _ in sv.epochs(2):
            for pair in zip(sv.batches(range(4), name="left"), sv.batches("abcd", name="right"), strict=True):
                seen.append(pair)
                step()

    whole_and_in_parts(tmp_path, body, True, 8)


def test_a_micro_batch_that_no_step_was_made_with_is_not_used_up(tmp_path: Path) -> None:
    def body(sv: Supervisor[Any], sess: Any, seen: list[Any], step: Callable[[], None]) -> None:
        sess.global_step += 0  # from the beginning it is this program that counts
        group: list[int] = []
        for item in sv.batches(range(12)):
            group.append(item)
            sv.save()
            if len(group) == 4:
                seen.append(tuple(group))
                group.clear()
                step()

    whole_and_in_parts(tmp_path, body, True, 3)


def test_a_run_killed_within_a_group_begins_it_anew(tmp_path: Path) -> None:
    sv = supervisor(tmp_path)
    with sv.managed_session() as sess:
        sess.global_step = 0
        for item in sv.batches(range(8)):
            if item == 3:
                sess.global_step += 1
                sv.request_stop()
    sv = supervisor(tmp_path)
    with pytest.raises(KeyboardInterrupt), sv.managed_session():  # noqa: PT012
        for item in sv.batches(range(8)):
            sv.save()
            if item == 6:
                raise KeyboardInterrupt
    sv = supervisor(tmp_path)
    with sv.managed_session():
        assert list(sv.batches(range(8))) == [4, 5, 6, 7]


def test_validation_is_no_training(sv: Supervisor[Any]) -> None:
    seen: list[int] = []
    for _ in sv.batches(range(2)):
        sv.coord.request_stop()
    seen.extend(sv.batches(range(100), name="validation"))
    assert seen == []
