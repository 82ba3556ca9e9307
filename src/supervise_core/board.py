"""The port through which the processes of one run tell each other something: pages on a board.

A page is a few bytes under a name. Each page has one writer; everybody reads it whole, as it was put up last. That is
little enough for plain files on a shared directory, and all that ``Membership`` needs: no locks, no counters, no order
between pages.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Final

_PAGE: Final = re.compile(r"[A-Za-z0-9-]{1,100}(?:/[A-Za-z0-9-]{1,100})*")
_LONGEST: Final = 200


def check_page(page: str) -> str:
    """The name, if a page may have it.

    :raises ValueError: otherwise.
    """
    if len(page) > _LONGEST or not _PAGE.fullmatch(page):
        raise ValueError(f"{page!r} is not the name of a page: letters, digits, '-', and '/' between its words")
    return page


class Board(ABC):
    """Pages by name. A name is made of letters, digits, ``-``, and ``/`` between its words (``beat/12``).

    ``beat`` and ``beat/12`` may both be there. A word has 100 characters at most, a name 200.

    All methods may be called by several threads at once; one that waits keeps no other from its call.

    What the place of the pages answers in the way of errors (``OSError``, ``RuntimeError`` of a lost server) is raised
    as a ``ConnectionError``, and so is every call after ``close``. A name that no page may have is a ``ValueError``.
    """

    location: str
    """Where the pages are, for people."""

    @abstractmethod
    def put(self, page: str, content: bytes) -> None:
        """Put a page up, in place of what it said before. Readers see the one or the other, never a part."""

    @abstractmethod
    def get(self, pages: Sequence[str]) -> list[bytes | None]:
        """What pages say, in that order; None for one that is not there."""

    @abstractmethod
    def remove(self, page: str) -> None:
        """Take a page down; nothing if it is not there."""

    @abstractmethod
    def await_change(self, page: str, known: bytes | None, timeout: float) -> bytes | None:
        """Wait, ``timeout`` seconds at most, until a page says something else than ``known``; what it says then.

        It is no error if nothing changes: the answer is ``known`` then.
        """

    @abstractmethod
    def ring(self, page: str) -> None:
        """Have whoever listens look at a page. Rings for the same page that nobody heard yet may become one."""

    @abstractmethod
    def rung(self, timeout: float) -> set[str]:
        """Wait, ``timeout`` seconds at most, for rings, and take them; there is one listener. The pages, if any.

        A ring may be lost where its process died in the midst of it, so a listener looks at all pages now and then.
        """

    @abstractmethod
    def close(self) -> None:
        """Let go of files and connections; what waits returns soon. Pages stay. Safe to call twice."""
