"""What devices have left for a second model beside one that runs on them. Pure functions over plain data."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace

from .devices import Device


def left_beside(
    taken: Iterable[tuple[Device, int]], whole: Sequence[Device], now: Sequence[Device], one_box: bool
) -> list[Device]:
    """The devices as they are `now`, each with the memory that a second model may take of it.

    taken: bytes of the running model's stages, each with its device
    whole: the devices as they were when nothing was loaded; now: as they are measured while the model runs
    one_box: all of them are in one box, by whatever name

    A model may not have touched all that it was promised: pages of keys and values come when they are first written.
    So what is free now is too much; and what was there less what the model was promised may be too much too, where
    something else has begun since. The smaller of the two is left. CPU workers of one box share what it has.
    """

    def place(device: Device) -> tuple[str, str]:
        return "" if one_box else device.box.name, device.name

    room: Counter[tuple[str, str]] = Counter()
    for device in whole:
        room[place(device)] += device.usable_bytes
    known = set(room)
    for device, nbytes in taken:
        room[place(device)] -= nbytes
    sharers = Counter(map(place, now))

    def left(device: Device) -> int:
        key = place(device)
        if key not in known:
            return device.usable_bytes
        return min(device.usable_bytes, max(0, room[key]) // sharers[key])

    return [replace(device, usable_bytes=left(device)) for device in now]
