"""What is pinned for the tests, beside what torch pins itself."""

import re
from pathlib import Path

CONSTRAINTS = Path(__file__).parent.parent / "constraints.txt"


def test_nothing_that_a_build_of_torch_for_cuda_pins_is_pinned_here():
    """It asks for one version of triton and of each of NVIDIA's libraries; another one here cannot be installed."""
    lines = [line for line in CONSTRAINTS.read_text().splitlines() if line and not line.startswith("#")]
    names = {re.split(r"[=<>~! ]", line)[0].lower() for line in lines}
    assert "torch" in names
    theirs = {name for name in names if name == "triton" or name.startswith(("nvidia-", "cuda-"))}
    assert theirs <= {"nvidia-ml-py"}, "that one is ours: it asks the driver what GPUs there are"
