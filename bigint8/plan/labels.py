"""What pictures and pages of a plan call devices, and the parts of their memory."""

from collections.abc import Sequence

from .devices import CONTEXT_BYTES, SLACK_BYTES, Device
from .plan import Plan, Stage

PARTS = ("weights", "keys and values", "workspace", "reserved", "free")
"""Of a device's memory, in the order in which they are drawn."""

MOST_SIGNS = 32
"""Of a device's model."""


def memory_parts(stage: Stage) -> dict[str, int]:
    """What the memory of a stage's device is for, in bytes, by the names of `PARTS`."""
    workspace = stage.workspace_bytes + stage.buffer_bytes
    sizes = (stage.weight_bytes, stage.kv_bytes, workspace, reserved_bytes(stage.device))
    return dict(zip(PARTS, (*sizes, max(0, stage.headroom_bytes)), strict=True))


def reserved_bytes(device: Device) -> int:
    """What is held back on a device besides its usable bytes: on a GPU for the CUDA context and the allocator."""
    return CONTEXT_BYTES + SLACK_BYTES if device.kind == "cuda" else 0


def short_model(device: Device) -> str:
    """A device's model in at most 32 signs: without the maker of a GPU, and without words that say nothing."""
    name = device.model.removeprefix("NVIDIA ").removeprefix("GeForce ").replace(" Processor", "")
    return name if len(name) <= MOST_SIGNS else f"{name[: MOST_SIGNS - 1].rstrip()}…"


def devices_in_words(devices: Sequence[Device]) -> str:
    """How many of each model: 4 × RTX 3060 + 2 × RTX 3090."""
    names = [short_model(device) for device in devices]
    return " + ".join(f"{names.count(name)} × {name}" for name in dict.fromkeys(names))


def place(plan: Plan, stage: Stage) -> str:
    """A stage's device by name, with its box where the plan has several."""
    device = stage.device
    boxes = {each.device.box.name for each in plan.stages}
    return f"{device.box.name}/{device.name}" if len(boxes) > 1 else device.name
