"""SIGTERM (a cluster taking its machine back) and SIGINT (Ctrl-C) as something the loop asks about between steps."""

import signal
import threading
from types import FrameType
from typing import Any


class Interrupt:
    """Inside, the first SIGTERM or SIGINT is remembered in `number`; the next acts as it did outside."""

    def __init__(self) -> None:
        self.number = 0
        self.outside: dict[int, Any] = {}

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is threading.main_thread():  # no other thread may set handlers
            self.outside = {number: signal.signal(number, self._remember) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.outside.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        self.__exit__()
