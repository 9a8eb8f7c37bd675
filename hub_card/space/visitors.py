"""What the page keeps of its visitors, in memory only: the study of each, and its last report."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .uploads import View

#: Visitors whose studies are kept; of more, the one away longest is forgotten.
MAX_VISITORS = 64
#: Seconds for which a study is kept after its page was closed, because a phone drops connections for a moment.
KEPT_AFTER_LEAVING = 120


class Written(NamedTuple):
    """A report and the views that it is of, whatever is in the form by now."""

    views: Sequence[View]
    record: dict[str, Any]


@dataclass
class Visitor:
    """One open page."""

    views: list[View] = field(default_factory=list)
    #: The last whole report.
    written: Written | None = None
    #: What was begun last: Gradio lets a report that is cancelled go on for a moment.
    turn: int = 0
    #: When the page was closed, by the monotonic clock.
    left: float | None = None

    def take_turn(self) -> int:
        """Begin something, which ends what was begun before."""
        self.turn += 1
        return self.turn


class Visitors:
    """Visitors by their session, which is a random word that Gradio gives each page."""

    def __init__(self):
        self._visitors: OrderedDict[str, Visitor] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._visitors)

    def get(self, session: str | None) -> Visitor:
        """The visitor of a session, a new one where there is none."""
        if session is None:
            return Visitor()
        with self._lock:
            visitor = self._visitors.setdefault(session, Visitor())
            self._visitors.move_to_end(session)
            visitor.left = None
            if len(self._visitors) > MAX_VISITORS:
                self._visitors.popitem(last=False)
            return visitor

    def leave(self, session: str | None) -> None:
        """Note that the page was closed."""
        with self._lock:
            if session in self._visitors:
                self._visitors[session].left = time.monotonic()

    def forget(self, session: str | None) -> bool:
        """Drop what is kept of a session that was left long enough ago, and return whether nothing is kept of it."""
        with self._lock:
            visitor = self._visitors.get(session)
            if visitor is not None and (visitor.left is None or time.monotonic() - visitor.left < KEPT_AFTER_LEAVING):
                return False
            self._visitors.pop(session, None)
            return True


__all__ = ["KEPT_AFTER_LEAVING", "MAX_VISITORS", "Visitor", "Visitors", "Written"]
