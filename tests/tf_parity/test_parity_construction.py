"""The construction of a Supervisor beside TensorFlow's own: README_supervisor.md lists the items and their tests."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from parity import is_kind, observed

if TYPE_CHECKING:
    from conftest import Seen


def without(seen: dict[str, object], *names: str) -> dict[str, object]:
    """All but these."""
    return {name: value for name, value in seen.items() if name not in names}


def test_4_1_and_6_1_arguments_have_the_same_names_order_and_defaults(seen_once: Seen) -> None:
    pair = seen_once("signatures")
    assert pair.ours == pair.theirs
    assert len(pair.ours["__init__"]) == 20


def test_4_2_eager_execution_is_refused_at_construction() -> None:
    pair = observed("programs_supervisor.py", "v2", "eager_resource")
    for seen in (pair.theirs, pair.ours):
        assert seen["eager"]
        assert seen["made"]["error"] == "RuntimeError"
        assert seen["files"] == []


def test_4_3_zero_is_the_default_and_none_is_nothing(seen: Seen) -> None:
    zero = seen("zero_is_default")
    assert zero.ours == zero.theirs
    assert zero.ours["constant"] == 0
    assert [name for name, there in zero.ours["there"].items() if not there] == ["summary_writer"]  # no logdir
    none = seen("none_is_none")
    assert none.ours == none.theirs
    assert none.ours["none"] == [True] * 7
    assert none.ours["nothing to initialise with"]
    assert none.ours["added"] == [0, 0, 0]


def test_4_4_to_4_10_what_is_not_there_is_made_and_collected(seen: Seen) -> None:
    made = seen("made_defaults")
    assert made.ours == made.theirs
    assert made.ours["keeps"] == 5
    assert made.ours["step"] == "global_step"
    empty = seen("empty_graph_defaults")
    assert empty.ours == empty.theirs


def test_4_4_to_4_11_the_first_item_of_a_collection_is_taken(seen: Seen) -> None:
    pair = seen("collected_defaults")
    assert pair.ours["first"] == pair.theirs["first"] == dict.fromkeys(pair.ours["first"], True)
    assert without(pair.ours, "said") == without(pair.theirs, "said")
    assert pair.ours["local init"] == 1.0
    assert pair.ours["said"] == 6


def test_4_6_the_feed_is_for_the_init_op_and_init_fn_comes_after_it(seen: Seen) -> None:
    pair = seen("fed_init_op")
    assert pair.ours == pair.theirs == {"value": 7.0, "seen by init_fn": [7.0], "feed": [7.0]}


def test_4_7_local_variables_and_tables_are_initialised_for_every_session(seen: Seen) -> None:
    pair = seen("local_init_each_session")
    assert pair.ours == pair.theirs == [[1.0, 5, 9.0], [1.0, 5, 9.0]]


def test_4_8_a_saver_that_is_not_collected_is_not_found(seen: Seen) -> None:
    pair = seen("forgotten_saver")
    assert pair.ours is pair.theirs is False


def test_4_10_a_global_step_is_found_by_its_name(seen: Seen, request: pytest.FixtureRequest) -> None:
    pair = seen("step_by_name")
    assert pair.ours == {"found": "global_step", "ran": None, "starts": [0]}
    if "resource" in request.node.name:
        assert pair.theirs["found"] is None, "DEFECT: the tensor of that name is a handle"
    else:
        assert pair.theirs == pair.ours


def test_4_10_a_step_of_floats_is_none(seen: Seen) -> None:
    pair = seen("step_of_floats")
    assert without(pair.ours, "starts") == without(pair.theirs, "starts")
    assert pair.ours["found"] is None


def test_4_10_a_step_of_shape_1_works(seen: Seen) -> None:
    pair = seen("step_of_shape_one")
    assert pair.theirs["ran"] == ("TypeError" if pair.theirs["numpy is strict"] else None), "DEFECT"
    assert pair.ours["ran"] is None
    assert pair.ours["starts"] == [0]


def test_4_12_the_graph_is_finalised_and_fits_a_second_supervisor(seen: Seen) -> None:
    pair = seen("finalised")
    assert pair.ours == pair.theirs
    assert pair.ours["finalised"]
    assert pair.ours["adding"] == "RuntimeError"
    assert pair.ours["saver"] == 5, "the meta graph has the definition of the saver"
    assert pair.ours["nodes"]


def test_4_13_only_a_chief_has_intervals_a_path_and_a_writer(seen: Seen) -> None:
    pair = seen("chief_only")
    assert pair.ours == pair.theirs
    assert pair.ours["worker"] == [None] * 4
    assert pair.ours["chief"] == [1, 2, "basename"]


def test_4_14_the_default_writer_a_given_one_and_none(seen: Seen) -> None:
    pair = seen("writers")
    assert pair.ours["given"] == pair.theirs["given"] == [True, True]
    assert pair.ours["none"] == pair.theirs["none"] == [True, True, []]
    assert pair.ours["at construction"] == ["events.out.tfevents."]
    assert pair.theirs["at construction"] in ([], ["events.out.tfevents."]), "made by a thread, so perhaps later"


def test_4_15_a_path_is_a_logdir(seen: Seen) -> None:
    pair = seen("path_as_logdir")
    assert pair.theirs["error"] == "AttributeError", "DEFECT"
    assert "model.ckpt-2.index" in pair.ours["value"]


def test_4_15_a_file_as_logdir_fails_in_the_constructor(seen: Seen) -> None:
    pair = seen("file_as_logdir")
    assert is_kind(pair.theirs, "OpError")
    assert is_kind(pair.ours, "OSError")


def test_4_15_a_second_chief_is_refused(seen: Seen) -> None:
    pair = seen("two_chiefs")
    assert pair.theirs == {"value": True}, "DEFECT: both write the same files"
    assert pair.ours["error"] == "LeaseHeldError"


def test_4_16_a_session_manager_of_the_program_is_asked_the_same(seen: Seen) -> None:
    pair = seen("own_session_manager")
    assert pair.ours == pair.theirs
    assert pair.ours["made"] == 2
    assert pair.ours["init_fn"] == [True]
    assert [asked[0] for asked in pair.ours["asked"]] == ["prepare", "wait"]


def test_4_17_a_worker_needs_devices_for_its_variables(seen: Seen, request: pytest.FixtureRequest) -> None:
    pair = seen("worker_without_device")
    assert pair.ours["error"] == "ValueError"
    assert "weights" in pair.ours["message"]
    if "resource" in request.node.name:
        assert pair.theirs == {"value": "Supervisor"}, "DEFECT: resource variables are not looked at"
    else:
        assert pair.theirs["error"] == "ValueError"


def test_4_18_the_properties(seen_once: Seen) -> None:
    pair = seen_once("properties")
    assert pair.ours == pair.theirs
    assert all(pair.ours["properties"].values())
    assert set(pair.ours["settable"]) == {"AttributeError"}
    assert pair.ours["absent"] == [False] * 3


def test_4_20_a_supervisor_prepares_again_after_a_stop(seen: Seen) -> None:
    pair = seen("again")
    told = [[False, False, 3], [True, True], [False, False, 3], [True, True]]
    assert [part[:3] for part in pair.theirs["seen"]] == told
    assert [part[:3] for part in pair.ours["seen"]] == told
    assert pair.theirs["seen"][2][3] == 3, "the steps of the first session are lost (6.4)"
    assert pair.ours["seen"][2][3] == 6
    assert pair.ours["events"] == [["START", 0], ["STOP", 3], ["START", 3], ["STOP", 6]]
    assert pair.ours["summaries"] == 6
