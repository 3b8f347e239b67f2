"""What can go wrong, as the caller sees it. Each message names the file, tensor, device or setting and the way out."""


class BigInt8Error(Exception):
    """Base of every error that bigint8 raises on purpose; the command line prints it and exits with 2."""


class CheckpointError(BigInt8Error):
    """A checkpoint that is missing, damaged, hostile or does not belong to its config."""


class PlanError(BigInt8Error):
    """A model that does not fit, or a device map that does not cover it.

    `ways_out` is what was needed and what would help (`bigint8.plan.ways_out.WaysOut`), None where nothing was planned.
    """

    def __init__(self, *message: object, ways_out: object | None = None) -> None:
        super().__init__(*message)
        self.ways_out = ways_out


class WorkerError(BigInt8Error):
    """A worker or the Ray cluster that cannot do its part."""


class WorkerDied(WorkerError):
    """A worker whose process or box is gone."""


def in_one_line(error: BaseException, most: int = 400) -> str:
    """What a foreign exception says, on one line of at most `most` characters; its kind if it says nothing."""
    return " ".join(str(error).split())[:most] or type(error).__name__
