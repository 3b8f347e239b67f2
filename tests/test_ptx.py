"""The PTX inside the GPU kernels, by the definition of its instructions: Triton's interpreter does not run it."""

import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from bigint8_kernels.triton_numbers import BFLOAT16_TO_FLOAT32, INT8_TO

Registers = np.ndarray  # of uint32, one for each thread

EVERY_BYTE = np.arange(256, dtype=np.uint32)
FOUR_BYTES = EVERY_BYTE | (EVERY_BYTE + 77) % 256 << 8 | (255 - EVERY_BYTE) << 16 | (EVERY_BYTE + 128) % 256 << 24


def permute(a: Registers, b: Registers, selector: Registers) -> Registers:
    """`prmt.b32`: four bytes chosen from the eight of b:a. The modes that repeat a sign are not used here."""
    eight = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    result = np.zeros_like(a)
    for place in range(4):
        chosen = selector >> np.uint32(4 * place) & np.uint32(0xF)
        assert (chosen < 8).all()
        byte = eight >> (chosen.astype(np.uint64) * np.uint64(8)) & np.uint64(0xFF)
        result |= byte.astype(np.uint32) << np.uint32(8 * place)
    return result


def lookup(a: Registers, b: Registers, c: Registers, table: Registers) -> Registers:
    """`lop3.b32`: bit by bit, bit 4 a + 2 b + c of the table."""
    result = np.zeros_like(a)
    for bit in range(32):
        at = np.uint32(bit)
        index = (a >> at & np.uint32(1)) << np.uint32(2) | (b >> at & np.uint32(1)) << np.uint32(1) | c >> at & 1
        result |= (table >> index & np.uint32(1)) << at
    return result


def float32_minus(a: Registers, b: Registers) -> Registers:
    return (a.view(np.float32) - b.view(np.float32)).view(np.uint32)


def float16_pair_minus(a: Registers, b: Registers) -> Registers:
    return (a.view(np.float16) - b.view(np.float16)).view(np.uint32)


def bfloat16_pair_fused(a: Registers, b: Registers, c: Registers) -> Registers:
    """`fma.rn.bf16x2`: float64 holds such a product and sum exactly, so it is rounded once."""
    a, b, c = (torch.from_numpy(value.view(np.int16)).view(torch.bfloat16).double() for value in (a, b, c))
    return (a * b + c).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint32)


INSTRUCTIONS: dict[str, Callable[..., Registers]] = {
    "mov.b32": lambda a: a,
    "xor.b32": np.bitwise_xor,
    "and.b32": np.bitwise_and,
    "shl.b32": np.left_shift,
    "prmt.b32": permute,
    "lop3.b32": lookup,
    "sub.f32": float32_minus,
    "sub.f16x2": float16_pair_minus,
    "fma.rn.bf16x2": bfloat16_pair_fused,
}


def run(ptx: str, given: Registers, outputs: int) -> list[Registers]:
    """The output registers $0, $1, ... of a block of PTX, whose input is the register after them."""
    registers = {f"${outputs}": given}

    def value_of(operand: str) -> Registers:
        if operand in registers:
            return registers[operand]
        number = int(operand[2:], 16) if operand.startswith("0f") else int(operand, 0)
        return np.full_like(given, number)

    for line in (line.strip() for line in ptx.strip().strip("{}").split(";")):
        if line and not line.startswith(".reg"):
            name, operands = line.split(None, 1)
            into, *operands = re.split(r"\s*,\s*", operands)
            assert into != f"${outputs}", "an input is not written to"
            registers[into] = INSTRUCTIONS[name](*(value_of(operand) for operand in operands))
    return [registers[f"${i}"] for i in range(outputs)]


@pytest.mark.parametrize(
    ("name", "dtype", "outputs"), [("fp32", torch.float32, 4), ("fp16", torch.float16, 2), ("bf16", torch.bfloat16, 2)]
)
def test_every_byte_becomes_its_number_in_every_place_of_a_register(name, dtype, outputs):
    results = np.stack(run(INT8_TO[name], FOUR_BYTES, outputs), axis=1)
    numbers = torch.from_numpy(results.view(np.int32 if outputs == 4 else np.int16)).view(dtype)
    assert numbers.shape == (256, 4)
    assert numbers.double().tolist() == FOUR_BYTES.view(np.int8).reshape(256, 4).astype(float).tolist()


@pytest.mark.parametrize(("name", "outputs"), [("fp32", 4), ("fp16", 2), ("bf16", 2)])
def test_the_input_is_read_before_an_output_is_written(name, outputs):
    """The compiler may put both into one register."""
    check_order(INT8_TO[name], outputs)


def test_the_input_of_the_bfloat16_conversion_is_read_before_an_output_is_written():
    check_order(BFLOAT16_TO_FLOAT32, 2)


def check_order(ptx: str, outputs: int) -> None:
    lines = [line for line in ptx.split(";") if ".reg" not in line]
    last_read = max(i for i, line in enumerate(lines) if f"${outputs}" in line)
    first_write = min(i for i, line in enumerate(lines) if re.search(r"\s\$0,", line))
    assert last_read < first_write


def test_every_bfloat16_becomes_the_same_float32_in_both_places_of_a_register():
    patterns = np.arange(2**16, dtype=np.uint32)
    pairs = patterns | (patterns ^ np.uint32(0x5A5A)) << np.uint32(16)
    low, high = run(BFLOAT16_TO_FLOAT32, pairs, 2)
    expected = torch.from_numpy(pairs.view(np.int16).copy()).view(torch.bfloat16).float().view(-1, 2)
    assert np.array_equal(low, expected[:, 0].contiguous().numpy().view(np.uint32))
    assert np.array_equal(high, expected[:, 1].contiguous().numpy().view(np.uint32))


def test_the_evaluator_tells_a_wrong_instruction():
    wrong = INT8_TO["fp32"].replace("0x7442", "0x7441")
    assert wrong != INT8_TO["fp32"]
    numbers = np.stack(run(wrong, FOUR_BYTES, 4), axis=1).view(np.float32)
    assert numbers.tolist() != FOUR_BYTES.view(np.int8).reshape(256, 4).astype(float).tolist()
