"""Names and sizes of number formats, and bytes as people read and write them. No torch."""

SAFETENSORS_BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8, "C64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
"""Bits of a value, by the name that safetensors has for its format."""

TORCH_NAMES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "I8": "int8", "U8": "uint8"}
"""The formats that can be loaded, from safetensors' names to torch's."""

SAFETENSORS_NAMES = {name: stored for stored, name in TORCH_NAMES.items()}

FLOAT_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}
"""What weights may be stored as and computed in, by torch's names, with the bytes of a value."""

STORED_FLOATS = tuple(SAFETENSORS_NAMES[name] for name in FLOAT_BYTES)
"""The same formats by safetensors' names."""

TABLE_FORMATS = tuple(SAFETENSORS_NAMES[name] for name, size in FLOAT_BYTES.items() if size == 2)
"""A model that computes in float32 keeps token embeddings and head in these formats, if they are stored so."""

GIB, MIB, KIB = 2**30, 2**20, 2**10


def readable(size: int) -> str:
    """A number of bytes for people: 1.50 GiB, 3.00 KiB."""
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if abs(size) >= unit:
            return f"{size / unit:.2f} {name}"
    return f"{size} bytes"


def decimal(size: float) -> str:
    """A number of bytes as disks and networks count them, with three digits or more: 13.31 GB, 269 MB, 4.10 kB."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(size) >= unit:
            return f"{size / unit:.{2 if abs(size) < 100 * unit else 0}f} {name}"
    return f"{size:.0f} bytes"


def speed(size: float, seconds: float) -> str:
    """Bytes a second: 4.09 GB/s."""
    return f"{decimal(size / max(seconds, 1e-9))}/s"


def parse_bytes(size: int | str) -> int:
    """A number of bytes from what a person writes: 500MB, 5GiB, 1000. Raises ValueError for anything else."""
    from accelerate.utils import convert_file_size_to_int

    try:
        return int(convert_file_size_to_int(size))
    except (ValueError, AttributeError, TypeError, OverflowError):
        raise ValueError(f"{size!r} is not a number of bytes, as 500MB or 5GiB") from None
