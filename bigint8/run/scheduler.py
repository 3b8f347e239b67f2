"""Which rows run in the next step: continuous batching over a pipeline of P stages.

New requests join at any step and finished ones leave (Yu et al. 2022, Orca). With P stages there are P + 1 slots for
steps under way, so that a stage finds its next step while the driver hands out tokens. A sequence is in one slot until
its token is back. A slot takes its share of the sequences that decode, and prompt tokens up to a chunk, spread over the
slots that are free: no slot gets a whole burst of arrivals, and none starves.

Pure: no thread, no clock, no torch. The same calls give the same steps.
"""

from collections import deque
from collections.abc import Sequence as Several
from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike

from ..errors import BigInt8Error, PlanError
from ..model.step import Result, Step
from ..options import PAGE_TOKENS, SERVED_CPU_CHUNK, Workload
from .feed import Feeds
from .flights import Flight, Rows
from .refill import Refill
from .requests import Completion
from .sequence import Request, Sequence
from .steps import StepMaker
from .tables import Copy, Table, Tables


class Scheduler:
    """The requests that wait, those that run, and the steps that are under way."""

    def __init__(self, tables: Tables, stages: int, workload: Workload, slots: int | None = None) -> None:
        self.tables, self.workload = tables, workload
        self.slots = slots or (1 if stages == 1 else stages + 1)
        self.stages = min(stages, self.slots)  # that can compute at the same time
        self.prompt_flights = _prompt_flights(tables, workload, self.slots)
        self._in_flight = self.prompt_flights * workload.chunk
        self.maker = StepMaker(tables)
        self.feeds = Feeds(tables, workload.context, workload.chunk, self.prompt_flights)
        self.waiting: deque[Request] = deque()
        self.prompts: list[Request] = []  # with tokens that were not sent
        self.ready: deque[Sequence] = deque()  # whose next token can be computed
        self.flights: deque[Flight] = deque()
        self.live: dict[Sequence, Request] = {}
        self.admitted = 0  # sequences that were promised their pages
        self.decoding = 0  # sequences whose prompt is done, or all under way
        self._unsent = 0  # prompt tokens of `waiting` and `prompts`
        self._no_room_at = -1
        self._fed_last = self._soonest_last = False

    # --- requests ------------------------------------------------------------------------------------------------

    def add(self, prompt: ArrayLike, completions: Several[Completion]) -> Request:
        """A request for one continuation of the prompt for each completion.

        Raises BigInt8Error for one without tokens, PlanError for one that could never fit.
        """
        request = Request(np.asarray(prompt, np.int32).reshape(-1), completions)
        self._check_fits(request)
        self.waiting.append(request)
        self._unsent += request.tokens
        return request

    def _check_fits(self, request: Request) -> None:
        tokens, sequences = request.tokens, len(request.completions)
        wanted = request.completions[0].settings.max_new_tokens
        if not tokens:
            raise BigInt8Error("the prompt has no tokens; give at least one")
        context = self.workload.context
        if tokens + wanted > context:
            raise PlanError(
                f"a prompt of {tokens} tokens and {wanted} new ones are {tokens + wanted}, but the model was loaded "
                f"for a context of {context}; shorten the prompt, ask for fewer tokens, or load with a larger context="
            )
        if sequences > self.workload.sequences:
            raise PlanError(
                f"{sequences} continuations at once, but the model was loaded for {self.workload.sequences} sequences; "
                "ask for fewer, or load with a larger batch_size="
            )
        for pool, need in zip(self.tables.pools, self._needs(request), strict=True):
            if need > pool.group.pages:
                raise PlanError(
                    f"a prompt of {tokens} tokens with {sequences} x {wanted} new ones takes up to {need} pages of "
                    f"{PAGE_TOKENS} tokens, but there are {pool.group.pages}; ask for fewer new tokens, or load with a "
                    "larger context= or batch_size="
                )

    def _needs(self, request: Request) -> list[int]:
        """The most pages of each group that such a request holds at once: whole pages of the prompt are shared."""
        needs = []
        for pool in self.tables.pools:
            most = pool.group.most_runs(request.places, self._in_flight)
            shared = request.tokens // PAGE_TOKENS if pool.group.window is None else 0
            needs.append(shared + len(request.completions) * (most - shared))
        return needs

    def cancel(self, request: Request) -> None:
        """Some of its completions were ended by others: their pages are left when no step of them is under way."""
        if not request.sequences:
            if request.dropped and request in self.waiting:
                self.waiting.remove(request)
                self._unsent -= request.tokens
        elif not request.prompted:
            if request.dropped and not request.sequences[0].flights:
                self._abandon(request)
        else:
            for sequence in [each for each in self.ready if self.live[each] is request and _ended(each)]:
                self.ready.remove(sequence)
                self._finish(sequence, request)

    # --- the next step -------------------------------------------------------------------------------------------

    def next(self) -> Step | None:
        """The next step, or None if there is nothing to send, or nothing that is worth a slot."""
        if len(self.flights) >= self.slots:
            return None
        makers = (self._requested, self._fed) if self._fed_last else (self._fed, self._requested)
        for make in makers:  # in turn, where both have something
            flight = make()
            if flight is not None:
                self._fed_last = flight.feed is not None
                for rows in flight.rows:
                    rows.sequence.flights += 1
                self.flights.append(flight)
                return flight.step
        return None

    @property
    def _is_last_slot(self) -> bool:
        return self.slots > 1 and len(self.flights) == self.slots - 1

    def _requested(self) -> Flight | None:
        copies: list[Copy] = []
        share = -(-self.decoding // self.stages)
        rows = self._prompt_rows(copies) if self.prompts or self.waiting else []
        if not rows and (not self.ready or (len(self.flights) >= self.stages and len(self.ready) < share)):
            return None  # a few sequences alone in the last slot would split the batches for good
        short = [each for each in rows if each.few]
        rows = self._decode_rows(min(share, len(self.ready)), copies) + short + [each for each in rows if not each.few]
        keep: list[int] = []
        takers: list[Sequence] = []
        end = 0
        for each in rows:
            end += each.stop - each.start
            if each.request is None:
                keep.append(end - 1)
                takers.append(each.sequence)
            elif each.stop == each.request.tokens:
                keep += [end - 1] * len(each.request.sequences)
                takers += each.request.sequences
        return Flight(self.maker.step(rows, keep, takers, copies), rows, takers, copies)

    def _decode_rows(self, count: int, copies: list[Copy]) -> list[Rows]:
        rows = []
        for _ in range(count):
            sequence = self.ready.popleft()
            start = sequence.sent
            table = sequence.table
            if table.shared_tail or start >= table.runs * PAGE_TOKENS:
                self.tables.extend(table, start, start + 1, copies)
            sequence.sent = start + 1
            rows.append(Rows(sequence, start, start + 1))
        return rows

    def _prompt_rows(self, copies: list[Copy]) -> list[Rows]:
        """The next tokens of prompts, up to this slot's part of those that wait.

        First come first served, so that none starves. Where the first would take all, in turn with what is soonest
        done: a short prompt does not wait for the whole of a long one. Chunks of CPUs that serve many take so long
        that the last slot is left to whoever comes: all stages are busy without it, but for a hop.
        """
        left = self.workload.piece(self._unsent, self.stages)
        rows: list[Rows] = []
        first = self.prompts[0] if self.prompts else None
        all_for_one = first is not None and first.tokens - first.sequences[0].sent > left
        others = len(self.prompts) + len(self.waiting) > 1
        self._soonest_last = all_for_one and others and not self._soonest_last
        if all_for_one and not others and self._is_last_slot and self.workload.chunk <= SERVED_CPU_CHUNK:
            return []
        if self._soonest_last:
            return self._soonest_rows(left, copies)
        for request in list(self.prompts):
            if left and request.sequences[0].flights < self.prompt_flights and not request.dropped:
                rows.append(self._prompt_part(request, left, copies))
                left -= rows[-1].stop - rows[-1].start
        while left and self.waiting and self._admit(self.waiting[0]):
            request = self.waiting.popleft()
            self.prompts.append(request)
            rows.append(self._prompt_part(request, left, copies))
            left -= rows[-1].stop - rows[-1].start
        return rows

    def _soonest_rows(self, left: int, copies: list[Copy]) -> list[Rows]:
        """Of the prompts with the fewest tokens left, those that fit; one that does not has a step without others."""
        while self.waiting and self._admit(self.waiting[0]):
            self.prompts.append(self.waiting.popleft())
        rows: list[Rows] = []
        for request in sorted(self.prompts, key=lambda each: each.tokens - each.sequences[0].sent):
            first = request.sequences[0]
            if rows and request.tokens - first.sent > left:
                break
            if left and first.flights < self.prompt_flights and not request.dropped:
                rows.append(self._prompt_part(request, left, copies))
                left -= rows[-1].stop - rows[-1].start
        return rows

    def _prompt_part(self, request: Request, most: int, copies: list[Copy]) -> Rows:
        first = request.sequences[0]
        if not request.few and not first.flights and first.sent % PAGE_TOKENS == 0:
            found = self.tables.shared_runs(first.table, request.prompt)
            self.tables.adopt(first.table, found)
            self._adopt(first, len(found))
        start = first.sent
        stop = first.sent = min(request.tokens, start + most)
        self.tables.extend(first.table, start, stop, copies)
        if not request.few:
            self.tables.publish(first.table, request.prompt, start, stop)
        self._unsent -= stop - start
        if stop == request.tokens:
            self.prompts.remove(request)
            self.decoding += len(request.sequences)
        return Rows(first, start, stop, request.few, request)

    def _adopt(self, sequence: Sequence, runs: int) -> None:
        """The stages have so many more runs of this prompt already."""
        sequence.sent += runs * PAGE_TOKENS
        sequence.settled = sequence.sent
        self._unsent -= runs * PAGE_TOKENS

    def _admit(self, request: Request) -> bool:
        """Promise a request what it can need at most; whether there is room for it."""
        if self.admitted + len(request.completions) > self.workload.sequences:
            return False
        if self._no_room_at == self.tables.left:
            return False
        table = self.tables.open()
        if not self.tables.admit(table, request.prompt, self._needs(request), share=not request.few):
            self.tables.drop(table)
            self._no_room_at = self.tables.left
            return False
        for index, completion in enumerate(request.completions):
            self._start(request, table if index == 0 else self.tables.open(), completion, index)
            request.sequences[index].table.promise = table.promise
        self.admitted += len(request.sequences)
        request.open = len(request.sequences)
        self._adopt(request.sequences[0], table.runs)
        return True

    def _start(self, request: Request, table: Table, completion: Completion, index: int) -> None:
        """The sequence of one continuation."""
        tokens = np.zeros(request.places + 1, np.int32)
        tokens[: request.tokens] = request.prompt
        kinds = [(request.tokens, request.few)]
        sequence = Sequence(table, tokens, request.tokens, kinds, completion=completion)
        self.maker.choose(sequence, completion.settings.choice(index))
        completion.admitted = True
        request.sequences.append(sequence)
        self.live[sequence] = request

    def _fed(self) -> Flight | None:
        """The next rows of a call of `forward`."""
        found = self.feeds.next_rows()
        if found is None:
            return None
        feed, rows, keep, kept = found
        copies: list[Copy] = []
        for each in rows:
            self.tables.extend(each.sequence.table, each.start, each.stop, copies)
            each.sequence.sent = each.stop
        return Flight(self.maker.step(rows, keep, [], copies), rows, [], copies, feed, kept)

    # --- results -------------------------------------------------------------------------------------------------

    def settle(self, result: Result) -> int:
        """The oldest step is back: hand out its tokens; how many."""
        flight = self.flights.popleft()
        self.tables.copied(flight.copies)
        for rows in flight.rows:
            rows.sequence.flights -= 1
            rows.sequence.settled = rows.stop
        if flight.feed is not None:
            assert flight.kept is not None
            self.feeds.settle(flight.feed, flight.rows, flight.kept, np.asarray(result.values, np.float32))
            return 0
        for rows in flight.rows:
            self.tables.retire(rows.sequence.table, rows.stop)
            if rows.request is not None:
                self._settle_prompt(rows, rows.request)
        for row, (sequence, token) in enumerate(zip(flight.takers, result.tokens, strict=True)):
            self._hand_out(sequence, token, result, row)
        return len(flight.takers)

    def _settle_prompt(self, rows: Rows, request: Request) -> None:
        first, *others = request.sequences
        if rows.stop == request.tokens:
            request.prompted = True
            for other in others:
                self.tables.fork(first.table, other.table)
                other.copy_tokens(first)
        elif request.dropped and not first.flights:
            self._abandon(request)

    def _hand_out(self, sequence: Sequence, token: int, result: Result, row: int) -> None:
        request, completion = self.live[sequence], sequence.completion
        assert completion is not None
        sequence.append(token)
        wanted = completion.settings.logprobs
        logprobs = None if wanted is None else result.logprobs(row, wanted)
        if completion.done or completion.put(token, logprobs) is not None:
            self._finish(sequence, request)
        else:
            self.ready.append(sequence)

    def _finish(self, sequence: Sequence, request: Request) -> None:
        """A sequence whose prompt is done has ended: its pages are left, and what it was promised besides."""
        table = sequence.table
        del self.live[sequence]
        self.decoding -= 1
        self.admitted -= 1
        request.open -= 1
        assert table.promise is not None
        if not request.open:
            self.tables.end(table.promise)
        else:
            needs = [pool.group.most_runs(request.places, self._in_flight) for pool in self.tables.pools]
            windowed = [pool.group.window is not None for pool in self.tables.pools]
            rest = [need if window else need - table.runs for need, window in zip(needs, windowed, strict=True)]
            self.tables.give_back(table.promise, rest)
        self.tables.drop(table)

    def _abandon(self, request: Request) -> None:
        """A request that nobody wants, before its prompt is done."""
        first = request.sequences[0]
        if request in self.prompts:
            self.prompts.remove(request)
        self._unsent -= request.tokens - first.sent
        if first.table.promise is not None:
            self.tables.end(first.table.promise)
            self.admitted -= len(request.sequences)
        for sequence in request.sequences:
            del self.live[sequence]
            self.tables.drop(sequence.table)

    # --- when steps are lost -------------------------------------------------------------------------------------

    def send_again(self) -> list[Step]:
        """The steps under way, in their order, under new numbers."""
        for flight in self.flights:
            flight.step = replace(flight.step, number=self.maker.number())
        return [flight.step for flight in self.flights]

    def refill(self, stages: int) -> Refill:
        """The steps that fill the pages of the first `stages` stages with what had come back."""
        live = [*self.live, *self.feeds.live]
        return Refill(self.tables, self.maker, self.flights, stages, self.workload.chunk, live)

    def end_all(self, error: BigInt8Error) -> None:
        """All requests and calls fail. Nothing is to be asked of this scheduler any more."""
        feeds = [*self.feeds.calls, *(flight.feed for flight in self.flights if flight.feed is not None)]
        for feed in feeds:
            if not feed.result.done():
                feed.result.set_exception(error)
        for request in [*self.waiting, *self.live.values()]:
            for completion in request.completions:
                completion.end(error)


def _ended(sequence: Sequence) -> bool:
    return sequence.completion is not None and sequence.completion.done


def _prompt_flights(tables: Tables, workload: Workload, slots: int) -> int:
    """How many chunks of one prompt may be under way: as many as the windows' pages allow for all sequences."""
    for flights in range(slots, 1, -1):
        most = [p.group.most_runs(workload.context, flights * workload.chunk) for p in tables.pools if p.group.window]
        sizes = [p.group.pages for p in tables.pools if p.group.window]
        if all(workload.sequences * need <= size for need, size in zip(most, sizes, strict=True)):
            return flights
    return 1
