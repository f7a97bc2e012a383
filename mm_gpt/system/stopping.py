"""Ctrl-C and SIGTERM as a request to end in good order."""

import logging
import signal
from types import FrameType
from typing import Any

logger = logging.getLogger(__name__)


class Stopper:
    """Turns the first Ctrl-C or SIGTERM into a request to stop after the step; a second one stops at once."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Stopper":
        try:
            self._previous = {s: signal.signal(s, self._request) for s in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not in the main thread: nobody can press Ctrl-C there
            self._previous = {}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        logger.warning("stopping after this step (again to stop at once)")
