"""The pages of one group of blocks, and the prompts' beginnings that pages still hold.

A page that a sequence holds is counted. One that nobody holds is free, or it is idle: it still has the keys and values
of a prompt's beginning, and is taken when there is no free one, the longest idle first.
"""

from dataclasses import dataclass, field

from ..errors import PlanError
from ..options import PAGE_TOKENS


@dataclass(frozen=True)
class PageGroup:
    """Blocks that share a table: how many places a query of theirs sees, None for all, and how many pages they have."""

    window: int | None
    pages: int

    def __post_init__(self) -> None:
        if self.pages < 1 or (self.window is not None and self.window < 1):
            raise PlanError(f"{self.pages} pages with a window of {self.window}: both must be at least 1")

    def first_seen(self, place: int) -> int:
        """The first run of PAGE_TOKENS places that a query at `place` or later may see."""
        return 0 if self.window is None else max(0, place - self.window + 1) // PAGE_TOKENS

    def most_runs(self, places: int, in_flight: int) -> int:
        """The most pages that a sequence of so many places holds at once, with `in_flight` rows under way at most."""
        runs = -(-places // PAGE_TOKENS)
        if self.window is None:
            return runs
        seen = min(places, self.window - 1 + in_flight)
        return min(runs, (seen + PAGE_TOKENS - 2) // PAGE_TOKENS + 1)


@dataclass(eq=False)
class Prefix:
    """A prompt's beginning: PAGE_TOKENS tokens after those of its parent, and the page of each group, -1 without.

    The beginnings form a tree, so one that is found equals the prompt token for token (as in SGLang's radix tree,
    Zheng et al. 2024, with whole pages for edges).
    """

    parent: "Prefix | None"
    tokens: bytes
    pages: list[int]
    children: dict[bytes, "Prefix"] = field(default_factory=dict)

    def child(self, tokens: bytes) -> "Prefix":
        """The beginning that goes on with these tokens, a new one if there is none."""
        found = self.children.get(tokens)
        if found is None:
            found = self.children[tokens] = Prefix(self, tokens, [-1] * len(self.pages))
        return found

    def lose(self, group: int) -> None:
        """Its page of this group is another's now. A leaf without pages goes, and so do its parents."""
        self.pages[group] = -1
        node = self
        while node.parent is not None and not node.children and max(node.pages, default=-1) < 0:
            if node.parent.children.get(node.tokens) is node:
                del node.parent.children[node.tokens]
            node = node.parent


class Pool:
    """The pages of group `index`: how many hold each, which are free, which are idle."""

    def __init__(self, group: PageGroup, index: int) -> None:
        self.group, self.index = group, index
        self.holders = [0] * group.pages
        self._free = list(range(group.pages - 1, -1, -1))
        self._idle: dict[int, None] = {}  # in the order in which they were left
        self._prefixes: dict[int, Prefix] = {}

    @property
    def available(self) -> int:
        """How many pages nobody holds."""
        return len(self._free) + len(self._idle)

    def take(self) -> int:
        """A page for one holder. The caller knows that one is available."""
        if self._free:
            page = self._free.pop()
        else:
            page = next(iter(self._idle))
            del self._idle[page]
            self._prefixes.pop(page).lose(self.index)
        self.holders[page] = 1
        return page

    def hold(self, page: int) -> None:
        """One more holder of a page that is held, or idle."""
        if not self.holders[page]:
            del self._idle[page]
        self.holders[page] += 1

    def leave(self, page: int) -> bool:
        """One holder less; whether it was the last."""
        self.holders[page] -= 1
        if self.holders[page]:
            return False
        if page in self._prefixes:
            self._idle[page] = None
        else:
            self._free.append(page)
        return True

    def remember(self, page: int, prefix: Prefix) -> None:
        """This page has the keys and values of the last tokens of a prompt's beginning."""
        prefix.pages[self.index] = page
        self._prefixes[page] = prefix

    def forget_idle(self) -> None:
        """Idle pages are free: what they had is lost."""
        for page in self._idle:
            self._prefixes.pop(page).lose(self.index)
            self._free.append(page)
        self._idle.clear()
