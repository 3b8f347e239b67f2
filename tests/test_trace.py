"""The trace file: what Chrome's Trace Event Format asks for, whoever writes, however much."""

import json
import threading

import pytest

from bigint8.run.trace import Trace


def events(path):
    return json.loads(path.read_text(encoding="utf-8"))["traceEvents"]


def test_each_row_has_its_name_and_place(tmp_path):
    trace = Trace()
    trace.row("driver")
    trace.span("stage 1", "step 1", 5_000, 9_500, {"rows": 3})
    trace.span("driver", "send 1", 1_000, 2_000)
    trace.write(tmp_path / "a" / "trace.json")
    written = events(tmp_path / "a" / "trace.json")
    names = {each["tid"]: each["args"]["name"] for each in written if each["name"] == "thread_name"}
    order = {names[e["tid"]]: e["args"]["sort_index"] for e in written if e["name"] == "thread_sort_index"}
    assert order["driver"] < order["stage 1"]
    spans = [(names[each["tid"]], each["name"], each["ts"], each["dur"]) for each in written if each["ph"] == "X"]
    assert spans == [("driver", "send 1", 1.0, 1.0), ("stage 1", "step 1", 5.0, 4.5)]
    assert next(each for each in written if each["name"] == "step 1")["args"] == {"rows": 3}


def test_an_arrow_ends_where_it_began(tmp_path):
    trace = Trace()
    for number in range(2):
        trace.arrow("hop", "stage 1", 100 + number, "stage 2", 200 + number)
    trace.write(tmp_path / "trace.json")
    ends = {phase: [e for e in events(tmp_path / "trace.json") if e["ph"] == phase] for phase in "sf"}
    assert [each["id"] for each in ends["s"]] == [each["id"] for each in ends["f"]] == [1, 2]
    assert {each["tid"] for each in ends["s"]}.isdisjoint(each["tid"] for each in ends["f"])
    assert all(each["bp"] == "e" and each["cat"] == "hop" for each in ends["f"])


def test_the_oldest_are_forgotten_and_the_file_says_so(tmp_path):
    trace = Trace(most=3)
    for number in range(10):
        trace.span("driver", f"step {number}", number, number + 1)
    trace.write(tmp_path / "trace.json")
    assert [e["name"] for e in events(tmp_path / "trace.json") if e["ph"] == "X"] == ["step 7", "step 8", "step 9"]
    assert json.loads((tmp_path / "trace.json").read_text())["otherData"] == {"forgotten_events": 7}


def test_a_file_that_was_there_stays_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "trace.json"
    path.write_text("before")
    trace = Trace()
    trace.span("driver", "step", 0, 1, {"not JSON": object()})
    with pytest.raises(TypeError):
        trace.write(path)
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


def test_several_threads_may_record_at_once(tmp_path):
    trace = Trace()

    def record(row):
        for number in range(300):
            trace.span(row, "step", number, number + 1)
            trace.arrow("hop", row, number, "driver", number)

    threads = [threading.Thread(target=record, args=(f"stage {n}",)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    trace.write(tmp_path / "trace.json")
    written = events(tmp_path / "trace.json")
    assert len([e for e in written if e["ph"] == "X"]) == 1200
    assert sorted(e["id"] for e in written if e["ph"] == "s") == list(range(1, 1201))
