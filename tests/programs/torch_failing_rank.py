"""Two workers of torchrun, of which the second fails and tells of it later, when no error is being handled any more."""

from __future__ import annotations

import sys
import time

from supervise_torch import StoreMembership


def misread(label: str) -> int:
    return int(label)


membership = StoreMembership.from_environment()
errors: list[BaseException] = []
if membership.rank == 1:
    try:
        misread("seven")
    except ValueError as error:
        error.add_note("while reading labels.csv")
        errors.append(error)
    before = (errors[0].__traceback__, errors[0].__context__)
    membership.record_failure(errors[0])
    assert before == (errors[0].__traceback__, errors[0].__context__)
    sys.exit(1)
time.sleep(600)
