"""What a simulation is asked: which requests arrive when, and which devices die."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import inf, log

import numpy as np
from numpy.typing import NDArray

from ..errors import BigInt8Error, PlanError

RESTART_SECONDS = 15.0
"""From the death of a worker until its successor reads weights: a process, its imports, the device. Assumed."""


@dataclass(frozen=True)
class Load:
    """Requests that arrive by chance, alike for the same seed. Raises BigInt8Error for what makes no sense.

    rate_per_s: requests a second, on average; None, or infinity, which becomes None: all are there at once
    sessions: instead of a rate, so many people each of whom asks when they have their answer; None: nobody waits
    prompt_tokens, new_tokens: of each request, or their mean
    spread: of both, the standard deviation of their logarithms (they are lognormal); 0: all are alike. Lengths beyond
        the plan's context are cut to it, so that the mean is lower then
    shared_tokens: tokens with which all prompts begin alike
    """

    requests: int
    rate_per_s: float | None = None
    prompt_tokens: int = 512
    new_tokens: int = 128
    spread: float = 0.0
    shared_tokens: int = 0
    sessions: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rate_per_s == inf:
            object.__setattr__(self, "rate_per_s", None)  # JSON has no infinity
        allowed = {
            "requests": (self.requests >= 1, "at least 1"),
            "rate_per_s": (self.rate_per_s is None or self.rate_per_s > 0, "above 0"),
            "prompt_tokens": (self.prompt_tokens >= 1, "at least 1"),
            "new_tokens": (self.new_tokens >= 1, "at least 1"),
            "spread": (0 <= self.spread < 10, "0 (all alike) or more, and below 10"),
            "shared_tokens": (0 <= self.shared_tokens < self.prompt_tokens, "0 or more, and below prompt_tokens"),
            "sessions": (self.sessions is None or self.sessions >= 1, "at least 1"),
            "seed": (self.seed >= 0, "0 or more"),
        }
        for name, (fine, wanted) in allowed.items():
            if not fine:
                raise BigInt8Error(f"{name}={getattr(self, name)}: must be {wanted}")
        if self.sessions is not None and self.rate_per_s is not None:
            raise BigInt8Error(
                f"rate_per_s={self.rate_per_s} and sessions={self.sessions}: requests come at a rate, or when an "
                "answer is there; give one of them"
            )

    def asked(self, context: int) -> "list[Asked]":
        """The requests, in the order in which they arrive. Raises PlanError if their mean does not fit the context."""
        if self.prompt_tokens + self.new_tokens > context:
            raise PlanError(
                f"prompts of {self.prompt_tokens} tokens with {self.new_tokens} new ones are "
                f"{self.prompt_tokens + self.new_tokens}, but the plan is for a context of {context}; ask for fewer, "
                "or plan with a larger context"
            )
        when, prompts, answers = (np.random.default_rng([self.seed, stream]) for stream in range(3))
        seconds = np.zeros(self.requests)
        if self.rate_per_s is not None:
            seconds = when.exponential(1 / self.rate_per_s, self.requests).cumsum()
        new = self._lengths(answers, self.new_tokens).clip(1, context - 1)
        prompt = np.minimum(self._lengths(prompts, self.prompt_tokens).clip(1), context - new)
        columns = zip(seconds.tolist(), prompt.tolist(), new.tolist(), strict=True)
        return [Asked(number, *row) for number, row in enumerate(columns)]

    def _lengths(self, chance: np.random.Generator, mean: int) -> NDArray[np.int64]:
        if not self.spread:
            return np.full(self.requests, mean, np.int64)
        drawn = chance.lognormal(log(mean) - self.spread**2 / 2, self.spread, self.requests)
        return drawn.clip(1, 2**31).round().astype(np.int64)


@dataclass(frozen=True)
class Asked:
    """One request: when it arrives, and its tokens."""

    number: int
    seconds: float
    prompt_tokens: int
    new_tokens: int

    def prompt(self, shared: int) -> NDArray[np.int32]:
        """Token ids: zeros as far as all prompts begin alike, then this request's number."""
        ids = np.full(self.prompt_tokens, self.number + 1, np.int32)
        ids[:shared] = 0
        return ids


@dataclass(frozen=True)
class Failure:
    """A device dies: when, and the stage of which pipeline it has, both counted from 0."""

    seconds: float
    pipeline: int
    stage: int


@dataclass(frozen=True)
class Failures:
    """Devices that die, and are replaced after `restart_seconds` and the time to load the stage.

    device_seconds: mean time between two failures of one device, None for none by chance; at: those that are given
    """

    device_seconds: float | None = None
    at: tuple[Failure, ...] = ()
    restart_seconds: float = RESTART_SECONDS
    seed: int = 0

    def __post_init__(self) -> None:
        if self.device_seconds is not None and not 0 < self.device_seconds < inf:
            raise BigInt8Error(
                f"device_seconds={self.device_seconds}: the mean time between failures must be above 0 and finite; "
                "leave it out for none"
            )
        if not 0 <= self.restart_seconds < inf:
            raise BigInt8Error(f"restart_seconds={self.restart_seconds}: must be 0 or more")

    def check(self, pipelines: int, stages: int) -> None:
        """Raise BigInt8Error for a failure of what is not there."""
        for each in self.at:
            if not (0 <= each.pipeline < pipelines and 0 <= each.stage < stages and each.seconds >= 0):
                raise BigInt8Error(
                    f"a failure of stage {each.stage} of pipeline {each.pipeline} at {each.seconds} s: there are "
                    f"{pipelines} pipelines of {stages} stages, counted from 0, and time begins at 0"
                )

    def by_chance(self, pipelines: int, stages: int) -> Iterator[Failure]:
        """Without end, in order: each device dies at a constant rate."""
        if self.device_seconds is None:
            return
        chance, seconds = np.random.default_rng([self.seed, 3]), 0.0
        while True:
            seconds += float(chance.exponential(self.device_seconds / (pipelines * stages)))
            yield Failure(seconds, int(chance.integers(pipelines)), int(chance.integers(stages)))
