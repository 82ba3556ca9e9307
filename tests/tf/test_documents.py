"""The programs of TensorFlow's two documents of its Supervisor run as written, in each mode, with either variables."""

from __future__ import annotations

from pathlib import Path

import pytest
from processes.tf_driving import KINDS, MODES, run

PROGRAMS = [
    "single_program",
    "default_graph",
    "additional_services",
    "summaries_by_hand",
    "fewer_services",
    "initialised_by_a_function",
    "initialised_locally",
    "session_manager_alone",
    "queue_runners",
    "chief_and_worker",
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MODES)
def test_the_programs_of_the_documents(tmp_path: Path, mode: str, kind: str) -> None:
    outcome = run("tf_documents.py", tmp_path, mode, kind)
    assert outcome.status == 0, outcome.errors
    assert [facts["program"] for facts in outcome.said if "program" in facts] == PROGRAMS
    assert outcome.done is not None
