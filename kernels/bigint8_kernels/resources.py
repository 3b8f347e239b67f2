"""What the GPU kernels need of a GPU: compiled to machine code for each architecture, on any machine, and read.

python -m bigint8_kernels.resources [--architecture 86]... [--kernel NAME]... [--json FILE]

The triton wheel brings what compiles (ptxas) and what reads the result (cuobjdump, nvdisasm). Registers and memory are
the assembler's own figures, occupancy is computed from them; nothing here is measured.
"""

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .gpu_tiles import ARCHITECTURES
from .triton_numbers import EXACT
from .variants import FLOAT_NUMBERS, KERNELS, POINTERS, Variant, variants

REGISTERS, WARP = 65536, 32
REGISTER_UNIT = 256
"""Registers are given to a warp in such units."""


@dataclass(frozen=True)
class Resources:
    """Of a variant: registers and bytes of local memory (spills) a thread, bytes of shared memory and blocks an SM.

    `instructions` counts each opcode, with its width, in the machine code; `loop` in the loop that loads and
    multiplies; `products` are the matrix instructions of the PTX.
    """

    variant: Variant
    registers: int
    local_bytes: int
    shared_bytes: int
    blocks: int
    occupancy: float
    instructions: dict[str, int] = field(repr=False)
    loop: dict[str, int] = field(repr=False)
    products: list[str]

    @property
    def instructions_per_weight(self) -> float:
        """Instructions of a thread in the loop for each weight that it multiplies, 0 without a loop."""
        return sum(self.loop.values()) * WARP / self.variant.weights if self.variant.weights else 0.0


def compile_variant(variant: Variant) -> Any:
    """The compiled kernel, for pointers and sizes that are multiples of 16. Raises what triton raises."""
    kernel = KERNELS[variant.kernel]
    constants = dict(variant.constants)
    signature, attributes = {}, {}
    unspecialized = {kernel.arg_names[i] if isinstance(i, int) else i for i in kernel.do_not_specialize or ()}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in FLOAT_NUMBERS:
            signature[name] = "fp32"
        else:
            signature[name] = POINTERS[name].format(dtype=variant.dtype) if name in POINTERS else "i32"
            if name not in unspecialized:
                attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    target = GPUTarget("cuda", variant.capability, WARP)
    options = {"num_warps": variant.warps, "num_stages": variant.stages, "enable_fp_fusion": True}
    if variant.kernel.startswith("quantize"):
        options |= EXACT
    return triton.compile(source, target=target, options=options)


def resources_of(variant: Variant) -> Resources:
    """Compile a variant and read its machine code."""
    compiled = compile_variant(variant)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        listing = _tool("nvdisasm", "-c", file.name)
    found = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    # dynamic shared memory is asked for at the launch; what is declared in the code comes to it
    shared = int(compiled.metadata.shared)
    architecture = ARCHITECTURES[variant.capability]
    lines = _instructions(listing)
    per_warp = -(-found["REG"] * WARP // REGISTER_UNIT) * REGISTER_UNIT
    by_registers = REGISTERS // (per_warp * variant.warps)
    by_threads = architecture.threads // (WARP * variant.warps)
    # a KB of each block's shared memory is the system's
    by_shared = (architecture.shared_bytes + 1024) // (shared + 1024)
    blocks = min(by_registers, by_threads, by_shared, architecture.blocks)
    return Resources(
        variant, found["REG"], found["LOCAL"] + found["STACK"], shared, blocks,
        blocks * WARP * variant.warps / architecture.threads, _count(lines), _count(_inner_loop(lines)),
        sorted(set(re.findall(r"\b(?:wg)?mma\S*", compiled.asm["ptx"]))),
    )  # fmt: skip


def _tool(name: str, *arguments: str) -> str:
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([program, *arguments], check=True, capture_output=True, text=True).stdout


def _instructions(listing: str) -> list[tuple[int, str, int | None]]:
    """(address, opcode, target of a branch) of each instruction."""
    labels: dict[str, int] = {}
    pending: list[str] = []
    parsed: list[tuple[int, str, str | None]] = []
    for line in listing.splitlines():
        if label := re.match(r"(\.L_x_\w+):", line.strip()):
            pending.append(label[1])
        elif found := re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)", line):
            address = int(found[1], 16)
            labels |= dict.fromkeys(pending, address)
            pending.clear()
            branch = re.search(r"`\((\.L_x_\w+)\)", found[3])
            parsed.append((address, found[2], branch[1] if branch else None))
    return [(address, opcode, labels.get(branch) if branch else None) for address, opcode, branch in parsed]


def _inner_loop(lines: Sequence[tuple[int, str, int | None]]) -> list[tuple[int, str, int | None]]:
    """The instructions of the first loop, by where it ends, that loads and multiplies; none if there is none."""
    loops = []
    for address, opcode, target in lines:
        if opcode.startswith("BRA") and target is not None and target < address:
            body = [line for line in lines if target <= line[0] <= address]
            loads = any(line[1].startswith(("LDG", "LDGSTS", "UBLKCP", "UTMALDG")) for line in body)
            products = any(re.match(r"[IHQ]G?MMA|FFMA", line[1]) for line in body)
            if loads and products:
                loops.append(body)
    return loops[0] if loops else []


def _count(lines: Sequence[tuple[int, str, int | None]]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for _, opcode, _ in lines:
        counts[opcode] = counts.get(opcode, 0) + 1
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", type=int, action="append", choices=sorted(ARCHITECTURES))
    parser.add_argument("--kernel", action="append", choices=sorted(KERNELS))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    wanted = [
        variant
        for capability in arguments.architecture or sorted(ARCHITECTURES)
        for variant in dict.fromkeys(variants(capability))
        if not arguments.kernel or variant.kernel in arguments.kernel
    ]
    with ProcessPoolExecutor() as pool:
        results = list(pool.map(resources_of, wanted))
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(result) for result in results]) + "\n")
    heads = f"{'registers':>9}{'local':>6}{'shared':>8}{'blocks':>7}{'occ.':>6}{'instr./weight':>14}"
    print(f"{'kernel':21}{'sm':>4} {'X':5}{'tile':32}{heads}")
    for result in results:
        v = result.variant
        print(
            f"{v.kernel:21}{v.capability:4} {v.dtype:5}{v.label:32}{result.registers:9}{result.local_bytes:6}"
            f"{result.shared_bytes:8}{result.blocks:7}{result.occupancy:6.0%}"
            + (f"{result.instructions_per_weight:14.1f}" if v.weights else "")
        )


if __name__ == "__main__":
    main()
