"""A record of what ran when, as a file that https://ui.perfetto.dev opens."""

import json
import os
import tempfile
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

Args = dict[str, Any]

MOST_EVENTS = 500_000
"""Some 100 MB of file, which the viewer still opens."""

DRIVER = "driver"
"""The row of the process that makes steps and hands out tokens."""


class Trace:
    """Spans of time in rows, one row for each stage, the driver, and so on, and arrows between them.

    Times are `time.time_ns()`: processes of one machine have the same clock. May be used from any thread. Beyond `most`
    events the oldest are forgotten; the file says how many.
    """

    def __init__(self, most: int = MOST_EVENTS) -> None:
        self._lock = threading.Lock()
        self._events: deque[dict[str, Any]] = deque(maxlen=most)
        self._rows: dict[str, int] = {}
        self._arrows = self._added = 0

    def row(self, name: str) -> None:
        """Give a row its place: rows stand in the order in which they are first named."""
        with self._lock:
            self._row(name)

    def span(self, row: str, what: str, start_ns: int, end_ns: int, args: Args | None = None) -> None:
        """Something took place in this row from `start_ns` to `end_ns`. Spans of a row lie apart or in one another."""
        with self._lock:
            event = {"ph": "X", "name": what, "ts": start_ns / 1000, "dur": max(0, end_ns - start_ns) / 1000}
            self._add(row, event | ({"args": args} if args else {}))

    def arrow(self, what: str, from_row: str, from_ns: int, to_row: str, to_ns: int) -> None:
        """An arrow from the span that is in `from_row` at `from_ns` to the one that is in `to_row` at `to_ns`."""
        with self._lock:
            self._arrows += 1
            both = {"name": what, "cat": "hop", "id": self._arrows}
            self._add(from_row, both | {"ph": "s", "ts": from_ns / 1000})
            self._add(to_row, both | {"ph": "f", "bp": "e", "ts": to_ns / 1000})

    def _add(self, row: str, event: dict[str, Any]) -> None:
        self._events.append(event | {"pid": 1, "tid": self._row(row)})
        self._added += 1

    def _row(self, name: str) -> int:
        return self._rows.setdefault(name, len(self._rows) + 1)

    def write(self, path: str | Path) -> None:
        """Write the file, in Chrome's Trace Event Format. It appears when it is whole."""
        with self._lock:
            events, rows, forgotten = list(self._events), dict(self._rows), self._added - len(self._events)
        names: list[dict[str, Any]] = [{"ph": "M", "pid": 1, "name": "process_name", "args": {"name": "bigint8"}}]
        for name, number in rows.items():
            row = {"ph": "M", "pid": 1, "tid": number}
            names.append(row | {"name": "thread_name", "args": {"name": name}})
            names.append(row | {"name": "thread_sort_index", "args": {"sort_index": number}})
        whole = {
            "traceEvents": names + sorted(events, key=lambda event: event["ts"]),
            "displayTimeUnit": "ms",
            "otherData": {"forgotten_events": forgotten},
        }
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(whole, file)
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


class StepSpans:
    """What the driver does with each step, in its own row; the steps under way, each in the first row that is free."""

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        self._under_way: dict[int, tuple[int, int, Args]] = {}
        trace.row(DRIVER)

    def sent(self, number: int, start_ns: int, args: Args) -> None:
        """A step was made and sent, from `start_ns` to now."""
        now = time.time_ns()
        self._trace.span(DRIVER, f"send {number}", start_ns, now, args)
        taken = {row for row, _, _ in self._under_way.values()}
        row = next(row for row in range(1, len(taken) + 2) if row not in taken)
        self._under_way[number] = row, now, args

    def back(self, number: int, start_ns: int) -> None:
        """Its result was there at `start_ns`, and is handed out by now."""
        self._trace.span(DRIVER, f"hand out {number}", start_ns, time.time_ns())
        if number in self._under_way:
            row, sent_ns, args = self._under_way.pop(number)
            self._trace.span(f"steps under way {row}", f"step {number}", sent_ns, start_ns, args)

    def lost(self) -> None:
        """No result of the steps under way comes any more."""
        for number, (row, sent_ns, args) in self._under_way.items():
            self._trace.span(f"steps under way {row}", f"step {number}, lost", sent_ns, time.time_ns(), args)
        self._under_way.clear()

    def restored(self, start_ns: int, what: str) -> None:
        """What was done about lost steps took from `start_ns` to now."""
        self._trace.span(DRIVER, what, start_ns, time.time_ns())
