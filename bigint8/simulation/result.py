"""What a simulation found, as plain data."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from .load import Failures, Load


@dataclass(frozen=True)
class Spread:
    """How some times are spread, in seconds; zeros where there is none."""

    mean_seconds: float = 0.0
    median_seconds: float = 0.0
    p95_seconds: float = 0.0
    p99_seconds: float = 0.0
    most_seconds: float = 0.0

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Spread":
        """Of these times."""
        if not len(seconds):
            return cls()
        values = np.asarray(seconds, np.float64)
        return cls(float(values.mean()), *np.percentile(values, [50, 95, 99, 100]).tolist())


@dataclass(frozen=True)
class Simulated:
    """Pipelines of one plan under a load: computed by the time model and the scheduler, not measured.

    seconds: from the first moment to the last token; tokens_per_s: generated ones over that; all_tokens_per_s: the
        prompts' too
    done, failed: requests; failed ones were with a pipeline whose stages died too often in a row
    first_token, whole: from a request's arrival to its first and to its last token; queue: until it was let in
    between_tokens: between two tokens of one request
    busy: of each stage, the share of the time in which it computes, on average over the pipelines
    steps: through the stages, those that fill pages again and those that were sent again too
    failures: devices that died; down_seconds: for which pipelines stood still, all together
    most_pages: of each group of blocks, the most that a pipeline held; pages: that there are
    """

    load: Load
    failures_asked: Failures | None
    pipelines: int
    devices: int
    seconds: float
    done: int
    failed: int
    prompt_tokens: int
    new_tokens: int
    tokens_per_s: float
    all_tokens_per_s: float
    first_token: Spread
    between_tokens: Spread
    queue: Spread
    whole: Spread
    busy: tuple[float, ...]
    steps: int
    failures: int
    down_seconds: float
    most_pages: tuple[int, ...]
    pages: tuple[int, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)
