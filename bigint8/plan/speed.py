"""What a device does in a second: measured by `doctor --save`, else computed from its data sheet.

No torch. An operation is a multiplication or an addition, as data sheets count them.
"""

import json
import os
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from ..errors import BigInt8Error

MEMORY_SHARE, ROW_SHARE, PROMPT_SHARE, ATTENTION_SHARE = 0.8, 0.2, 0.45, 0.2
"""What kernels get of a GPU's data sheet: of its memory's bandwidth, of its 16-bit operations for few rows, of its int8
operations for prompts, of its 16-bit operations for a prompt's attention. Assumed, not measured: `doctor --save` on the
GPU measures them."""

BUS_SHARE = 0.85
"""What copies get of a PCIe link's rate."""

PLAIN_TORCH_BYTES = 5
"""What crosses a GPU's memory for an int8 weight where no kernel of ours runs: the weight is read, its 16-bit copy is
written and read."""

VALUE_BYTES = 8
"""What crosses a GPU's memory for each value that goes into a prompt's int8 layer or comes out: it is written and read
in 16 bits, and may be again. Assumed."""

GPU_BLOCK_SECONDS = 25e-6
"""Of a block on a GPU besides its bytes: 8 launches in a CUDA graph. Assumed."""

GPU_HOP_SECONDS, CPU_HOP_SECONDS = 100e-6, 300e-6
"""Between two workers of one box, besides the bytes: through page-locked host memory (assumed), and between two CPU
workers (measured by `benchmarks/pipeline.py --hops`)."""


@dataclass(frozen=True)
class Speed:
    """Rates of one device, as the time model takes them.

    read_bytes_per_s: of weights, by the product with one row; cache_bytes_per_s: of keys and values
    row_ops_per_s: of each further row of a step, and of values that are not int8 in float_row_ops_per_s
    prompt_ops_per_s: of a prompt's products; attention_ops_per_s: of its attention
    prompt_read_bytes_per_s: of weights, by a prompt's products, which on a CPU rearrange them first
    prompt_values_per_s: of what goes into a prompt's int8 layers and comes out of them
    block_seconds: of a block besides; bus_bytes_per_s: from the host's memory to the device
    source: where the figures are from
    """

    read_bytes_per_s: float
    cache_bytes_per_s: float
    row_ops_per_s: float
    float_row_ops_per_s: float
    prompt_ops_per_s: float
    prompt_read_bytes_per_s: float
    prompt_values_per_s: float
    attention_ops_per_s: float
    block_seconds: float
    bus_bytes_per_s: float
    source: str


def gpu_speed(
    bandwidth_bytes_per_s: float, int8_ops_per_s: float, float16_ops_per_s: float, bus_bytes_per_s: float
) -> Speed:
    """A GPU's, computed from its data sheet: dense tensor operations, and both directions of the bus apart."""
    return Speed(
        read_bytes_per_s=MEMORY_SHARE * bandwidth_bytes_per_s,
        cache_bytes_per_s=MEMORY_SHARE * bandwidth_bytes_per_s,
        row_ops_per_s=ROW_SHARE * float16_ops_per_s,
        float_row_ops_per_s=ROW_SHARE * float16_ops_per_s,
        prompt_ops_per_s=PROMPT_SHARE * int8_ops_per_s,
        prompt_read_bytes_per_s=MEMORY_SHARE * bandwidth_bytes_per_s,
        prompt_values_per_s=MEMORY_SHARE * bandwidth_bytes_per_s / VALUE_BYTES,
        attention_ops_per_s=ATTENTION_SHARE * float16_ops_per_s,
        block_seconds=GPU_BLOCK_SECONDS,
        bus_bytes_per_s=BUS_SHARE * bus_bytes_per_s,
        source="computed from the data sheet",
    )


def plain_torch_speed(speed: Speed, float16_ops_per_s: float) -> Speed:
    """The same GPU's where int8 products run in plain torch: in 16 bits, on copies of the weights."""
    return replace(
        speed,
        read_bytes_per_s=speed.read_bytes_per_s / PLAIN_TORCH_BYTES,
        prompt_read_bytes_per_s=speed.prompt_read_bytes_per_s / PLAIN_TORCH_BYTES,
        prompt_ops_per_s=PROMPT_SHARE * float16_ops_per_s,
        source=f"{speed.source}, for plain torch",
    )


UNKNOWN_GPU = replace(gpu_speed(5e11, 1.5e14, 5e13, 16e9), source="assumed: no preset and no measurement of this GPU")

UNKNOWN_CORE = Speed(
    read_bytes_per_s=12e9,
    cache_bytes_per_s=8e9,
    row_ops_per_s=8e10,
    float_row_ops_per_s=4e10,
    prompt_ops_per_s=1e11,
    prompt_read_bytes_per_s=3e9,
    prompt_values_per_s=5e8,
    attention_ops_per_s=2e10,
    block_seconds=2e-5,
    bus_bytes_per_s=8e9,
    source="assumed: this CPU was not measured",
)
"""One core of a CPU that nobody measured."""

MOST_READING_CORES = 4
"""So many cores of an unmeasured CPU read as fast as its memory can."""


@dataclass(frozen=True)
class DiskSpeed:
    """What one thread reads of files: past the system's file cache, and from it."""

    bytes_per_s: float
    cached_bytes_per_s: float
    source: str


UNKNOWN_DISK = DiskSpeed(3e9, 6e9, "assumed: this disk was not measured")


@dataclass(frozen=True)
class MeasuredSpeeds:
    """The speeds of one kind of device that were measured: of a CPU by the number of cores, of a GPU as of one core."""

    by_cores: dict[int, Speed]

    def of(self, cores: int) -> Speed:
        """Between two measurements and beyond, operations grow with the cores, and bytes up to the most measured."""
        if cores in self.by_cores:
            return self.by_cores[cores]
        nearest = min(self.by_cores, key=lambda measured: abs(measured - cores))
        return _scaled(self.by_cores[nearest], cores / nearest, max(s.read_bytes_per_s for s in self.by_cores.values()))


def _scaled(speed: Speed, factor: float, most_bytes_per_s: float) -> Speed:
    """The speed of `factor` times as many cores, which read no more than that."""
    read = min(speed.read_bytes_per_s * factor, most_bytes_per_s)
    return replace(
        speed,
        read_bytes_per_s=read,
        cache_bytes_per_s=speed.cache_bytes_per_s * read / speed.read_bytes_per_s,
        row_ops_per_s=speed.row_ops_per_s * factor,
        float_row_ops_per_s=speed.float_row_ops_per_s * factor,
        prompt_ops_per_s=speed.prompt_ops_per_s * factor,
        prompt_read_bytes_per_s=min(speed.prompt_read_bytes_per_s * factor, most_bytes_per_s),
        attention_ops_per_s=speed.attention_ops_per_s * factor,
        block_seconds=speed.block_seconds,
    )


def cpu_speed(model: str, cores: int) -> Speed:
    """So many cores of this CPU: as measured, or assumed."""
    measured = saved_speeds().get(model)
    if measured is not None:
        return measured.of(cores)
    return _scaled(UNKNOWN_CORE, cores, MOST_READING_CORES * UNKNOWN_CORE.read_bytes_per_s)


def shared_cpu_speed(model: str, cores: int, share: int) -> Speed:
    """One of `share` workers with so many cores each, while all of them compute: they share what the memory gives.

    Their operations are each one's own; what all cores do for one process is no measure of them, since parts of a step
    run on one core.
    """
    alone, together = cpu_speed(model, cores), cpu_speed(model, cores * share)
    return replace(
        alone,
        read_bytes_per_s=min(alone.read_bytes_per_s, together.read_bytes_per_s / share),
        cache_bytes_per_s=min(alone.cache_bytes_per_s, together.cache_bytes_per_s / share),
    )


def measured_gpu(model: str) -> Speed | None:
    """What was measured of a GPU of this kind here, None if nothing was."""
    measured = saved_speeds().get(model)
    return None if measured is None else measured.of(1)


# --- what was measured ---


def speeds_file() -> Path:
    """Where `doctor --save` keeps what it measured: beside what bigint8 converts."""
    from ..sources.gguf import cache_folder

    return cache_folder() / "speeds.json"


@cache
def _read_speeds(file: Path, changed_ns: int) -> dict[str, MeasuredSpeeds]:
    del changed_ns  # part of the cache's key
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        return {
            model: MeasuredSpeeds({int(cores): _checked(Speed(**speed)) for cores, speed in by_cores.items()})
            for model, by_cores in kept.items()
            if all(speed.keys() == _RATES for speed in by_cores.values())  # else an older version measured other rates
        }
    except (ValueError, TypeError, AttributeError) as error:
        raise _damaged(file, error) from None


_RATES = {field.name for field in fields(Speed)}

Rates = TypeVar("Rates", Speed, DiskSpeed)


def _checked(speed: Rates) -> Rates:
    for name, value in asdict(speed).items():
        if name != "source" and not 0 < value < 1e18 and not (name == "block_seconds" and value == 0):
            raise ValueError(f"{name} {value}")
    return speed


def saved_speeds() -> dict[str, MeasuredSpeeds]:
    """What was measured, by the device's model. Raises BigInt8Error for a file that is damaged."""
    file = speeds_file()
    try:
        changed_ns = file.stat().st_mtime_ns
    except OSError:
        return {}
    return _read_speeds(file, changed_ns)


def save_speeds(model: str, by_cores: dict[int, Speed]) -> Path:
    """Keep what was measured of a device, beside what is known of others; where."""
    kept = {name: {str(c): asdict(s) for c, s in known.by_cores.items()} for name, known in saved_speeds().items()}
    kept[model] = {str(cores): asdict(speed) for cores, speed in by_cores.items()}
    return _write(speeds_file(), kept)


def saved_disk() -> DiskSpeed:
    """What was measured of this machine's disk, or assumed. Raises BigInt8Error for a file that is damaged."""
    file = _disk_file()
    try:
        speed = DiskSpeed(**json.loads(file.read_text(encoding="utf-8")))
        return _checked(speed)
    except OSError:
        return UNKNOWN_DISK
    except (ValueError, TypeError) as error:
        raise _damaged(file, error) from None


def save_disk(speed: DiskSpeed) -> Path:
    """Keep what was measured of the disk; where."""
    return _write(_disk_file(), asdict(speed))


def _disk_file() -> Path:
    return speeds_file().with_name("disk.json")


def _write(file: Path, kept: dict[str, Any]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(f".{os.getpid()}")
    unfinished.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
    unfinished.replace(file)
    return file


def _damaged(file: Path, error: Exception) -> BigInt8Error:
    return BigInt8Error(f"{file}: not what `bigint8 doctor --save` writes: {error}; delete it and run that again")
