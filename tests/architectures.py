"""Which GPU architectures the tests compile for."""

import os


def architectures_compiled() -> list[int]:
    """The GPU architectures whose machine code is read: by default those of an RTX 3090 and of an RTX 5090, because all
    five take as long as the rest of the tests. BIGINT8_ARCHITECTURES="80 86 89 90 120" asks for all."""
    return [int(number) for number in os.environ.get("BIGINT8_ARCHITECTURES", "86 120").split()]
