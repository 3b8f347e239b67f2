"""Pages and tables: who holds which page, what is promised, and which prompts' beginnings are still there."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigint8.errors import PlanError
from bigint8.run.pages import PageGroup, Pool, Prefix
from bigint8.run.tables import Tables

PROMPT = np.arange(70, dtype=np.int32)


def tables_of(*groups, context=256):
    return Tables([PageGroup(window, pages) for window, pages in groups], context)


def filled(tables, prompt):
    """A sequence that has computed this prompt, as others may find it."""
    table = tables.open()
    tables.extend(table, 0, len(prompt), [])
    tables.publish(table, prompt, 0, len(prompt))
    return table


def pages_of(tables, table, group=0):
    return tables.array[group, table.row, table.begins[group] : table.runs].tolist()


def available(tables):
    return [pool.available for pool in tables.pools]


# --- a pool --------------------------------------------------------------------------------------------------------


def test_idle_pages_are_taken_when_no_free_one_is_left_the_longest_idle_first():
    pool, root = Pool(PageGroup(None, 3), 0), Prefix(None, b"", [-1])
    pages = [pool.take() for _ in range(3)]
    for name, page in zip([b"a", b"b"], pages, strict=False):
        pool.remember(page, root.child(name))
    for page in reversed(pages):
        assert pool.leave(page)
    assert pool.available == 3
    assert [pool.take() for _ in range(3)] == [pages[2], pages[1], pages[0]], "free, then b, then a"
    assert not root.children


def test_a_page_is_free_when_its_last_holder_has_left():
    pool = Pool(PageGroup(None, 1), 0)
    page = pool.take()
    pool.hold(page)
    assert not pool.leave(page) and pool.available == 0
    assert pool.leave(page) and pool.available == 1


@pytest.mark.parametrize(("window", "pages"), [(0, 4), (None, 0)])
def test_a_group_without_pages_or_with_an_empty_window_is_refused(window, pages):
    with pytest.raises(PlanError, match="must be at least 1"):
        PageGroup(window, pages)


@given(st.integers(1, 70), st.integers(1, 60), st.integers(0, 300))
def test_a_window_never_holds_more_runs_than_is_said(window, in_flight, settled):
    """From the first place that the next query sees, to the last that is under way."""
    group = PageGroup(window, 1)
    sent = settled + in_flight
    held = -(-sent // 16) - group.first_seen(settled)
    assert held <= group.most_runs(sent, in_flight)


# --- tables --------------------------------------------------------------------------------------------------------


def test_a_sequence_has_a_page_for_each_run_of_places():
    tables = tables_of((None, 8))
    table = tables.open()
    for places, runs in [(1, 1), (16, 1), (17, 2), (70, 5)]:
        tables.extend(table, 0, places, [])
        assert table.runs == runs
    assert available(tables) == [3]
    tables.drop(table)
    tables.drop(table)
    assert available(tables) == [8] and (tables.array == -1).all()


def test_what_has_fallen_out_of_a_window_is_given_back():
    tables = tables_of((None, 8), (20, 8))
    table = tables.open()
    tables.extend(table, 0, 64, [])
    tables.retire(table, 34)  # the next query sees 15 to 34
    assert table.begins == [0, 0]
    tables.retire(table, 35)
    assert table.begins == [0, 1]
    tables.retire(table, 64)
    assert table.begins == [0, 2] and available(tables) == [4, 6]
    assert tables.rows_of([table])[1, 0].tolist()[:2] == [-1, -1]


def test_the_last_page_is_copied_by_all_but_one_of_those_who_share_it():
    tables = tables_of((None, 8))
    first, copies = tables.open(), []
    tables.extend(first, 0, 20, copies)
    others = [tables.open(), tables.open()]
    for other in others:
        tables.fork(first, other)
    for table in [*others, first]:
        tables.extend(table, 20, 21, copies)
    whole, last = pages_of(tables, first)
    assert [group for group, _, _ in copies] == [0, 0] and {source for _, source, _ in copies} == {last}
    assert [pages_of(tables, other) for other in others] == [[whole, to] for _, _, to in copies]
    tables.drop(first)
    assert available(tables) == [4], "the source stays until the copies are made"
    tables.copied(copies)
    assert available(tables) == [5]


def test_whole_pages_are_shared_without_a_copy():
    tables = tables_of((None, 8))
    first, other, copies = tables.open(), tables.open(), []
    tables.extend(first, 0, 32, copies)
    tables.fork(first, other)
    tables.extend(other, 32, 33, copies)
    assert not copies and pages_of(tables, first) == pages_of(tables, other)[:2]


def test_a_sequence_goes_back_as_far_as_its_windows_allow():
    tables = tables_of((None, 8), (20, 8))
    table = tables.open()
    tables.extend(table, 0, 100, [])
    tables.retire(table, 80)
    tables.crop(table, 80)
    assert table.runs == 5 and available(tables) == [3, 6]
    with pytest.raises(PlanError, match=r"back to 60 tokens: its window of 20 has moved on"):
        tables.crop(table, 60)
    assert table.runs == 5


def test_rows_are_reused_and_more_are_made_when_there_are_none():
    tables = Tables([PageGroup(None, 100)], 64, rows=2)
    opened = [tables.open() for _ in range(9)]
    assert len({table.row for table in opened}) == 9
    tables.extend(opened[8], 0, 1, [])
    tables.drop(opened[3])
    assert tables.open().row == opened[3].row


# --- promises ------------------------------------------------------------------------------------------------------


def test_what_is_promised_nobody_else_gets():
    tables = tables_of((None, 8), (20, 4))
    promise = tables.promise([5, 3])
    assert promise is not None
    assert tables.promise([4, 1]) is None and tables.promise([3, 2]) is None
    other = tables.promise([3, 1])
    assert other is not None and [tables.room(pool) for pool in tables.pools] == [0, 0]
    tables.end(promise)
    tables.end(promise)
    assert [tables.room(pool) for pool in tables.pools] == [5, 3]


def test_pages_that_are_taken_are_not_promised_any_more():
    tables = tables_of((None, 8))
    table = tables.open()
    assert tables.admit(table, PROMPT, [6], share=True)
    tables.extend(table, 0, 70, [])
    assert tables.room(tables.pools[0]) == 2 and available(tables) == [3]


def test_shared_pages_are_counted_once():
    tables = tables_of((None, 8))
    filled(tables, PROMPT)  # 5 of 8 pages, 4 of them whole
    assert not tables.admit(tables.open(), PROMPT + 1, [5], share=True)
    table = tables.open()
    assert tables.admit(table, PROMPT, [7], share=True)
    assert table.runs == 4 and available(tables) == [3] and tables.room(tables.pools[0]) == 0


def test_idle_pages_that_are_shared_again_are_counted():
    tables = tables_of((None, 8))
    tables.drop(filled(tables, PROMPT))
    assert available(tables) == [8]
    table = tables.open()
    assert not tables.admit(table, PROMPT, [9], share=True)
    assert tables.admit(table, PROMPT, [8], share=True)
    assert table.runs == 4 and available(tables) == [4]


# --- beginnings ----------------------------------------------------------------------------------------------------


def test_a_beginning_is_found_as_far_as_all_tokens_are_the_same():
    tables = tables_of((None, 32))
    filled(tables, PROMPT)
    for differs, runs in [(69, 4), (64, 4), (63, 3), (16, 1), (15, 0)]:
        prompt = PROMPT.copy()
        prompt[differs] = 99
        assert len(tables.shared_runs(tables.open(), prompt)) == runs
    shifted = np.concatenate([PROMPT[16:], PROMPT[:16]])
    assert not tables.shared_runs(tables.open(), shifted), "a run is shared only after the same runs"


def test_the_last_token_of_a_prompt_is_never_shared():
    tables = tables_of((None, 32))
    filled(tables, PROMPT)
    assert len(tables.shared_runs(tables.open(), PROMPT[:64])) == 3
    assert len(tables.shared_runs(tables.open(), PROMPT[:65])) == 4


def test_a_beginning_outlives_its_sequence_until_its_pages_are_needed():
    tables = tables_of((None, 8))
    tables.drop(filled(tables, PROMPT))
    assert len(tables.shared_runs(tables.open(), PROMPT)) == 4
    tables.extend(tables.open(), 0, 16 * 5, [])
    assert len(tables.shared_runs(tables.open(), PROMPT)) == 3, "the end of a prompt goes first"
    tables.forget_idle()
    assert not tables.shared_runs(tables.open(), PROMPT) and not tables._root.children


def test_with_windows_a_beginning_is_shared_where_each_window_is_whole():
    tables = tables_of((None, 32), (20, 32))
    table = filled(tables, PROMPT)
    tables.retire(table, 70)  # runs 0 to 2 are idle in the second group
    other = tables.open()
    found = tables.shared_runs(other, PROMPT)
    assert len(found) == 4
    tables.adopt(other, found)
    assert other.begins == [0, 2] and pages_of(tables, other, 1) == [node.pages[1] for node in found[2:]]
    tables.pools[1].forget_idle()
    found = tables.shared_runs(tables.open(), PROMPT)
    assert len(found) == 4 and found[0].pages[1] == -1


def test_a_beginning_whose_window_is_gone_is_not_shared():
    tables = tables_of((None, 32), (40, 32))
    table = filled(tables, PROMPT)
    tables.retire(table, 70)
    assert table.begins == [0, 1]
    tables.pools[1].forget_idle()
    assert len(tables.shared_runs(tables.open(), PROMPT)) == 4, "the query at 64 sees from 25 on"
    assert not tables.shared_runs(tables.open(), PROMPT[:50]), "the one at 48 sees from 9 on"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(17, 80)), min_size=1, max_size=30), st.data())
def test_holders_and_tables_agree_whatever_happens(prompts, data):
    tables = tables_of((None, 40), (24, 40))
    open_tables = []
    for kind, length in prompts:
        prompt = np.full(length, kind, np.int32)
        table = tables.open()
        if tables.admit(table, prompt, [-(-length // 16)] * 2, share=True):
            start = table.runs * 16
            tables.extend(table, start, length, [])
            tables.publish(table, prompt, start, length)
            tables.retire(table, length)
            open_tables.append(table)
        if open_tables and data.draw(st.booleans()):
            leaving = open_tables.pop(data.draw(st.integers(0, len(open_tables) - 1)))
            tables.end(leaving.promise)
            tables.drop(leaving)
        for pool in tables.pools:
            held = [page for each in open_tables for page in pages_of(tables, each, pool.index)]
            assert all(pool.holders[page] == held.count(page) for page in range(40))
            assert pool.available == 40 - len(set(held)) and tables.room(pool) >= 0
