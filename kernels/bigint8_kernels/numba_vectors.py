# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, disable-error-code="call-arg"
"""Vectors of fixed width for numba kernels on the CPU, which numba itself does not have.

A vector is a value like any other: a kernel keeps it in a variable, the compiler keeps it in registers. Each function
below becomes one or a few instructions. A vector holds STEP int16 values, which are read from memory, or half as many
int32 or float32 lanes, in which their products are added.
"""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.datamodel import models
from numba.extending import intrinsic, register_model

STEP = 16
"""Values of K that one vector holds."""

LANES = STEP // 2

_INT8, _INT16, _INT32, _FLOAT = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.FloatType()


class Vector(types.Type):
    """The numba type of `count` values side by side, each an LLVM number of the type `item`."""

    def __init__(self, item: ir.Type, count: int) -> None:
        self.llvm = ir.VectorType(item, count)
        super().__init__(name=f"Vector({item} x {count})")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager, vector: Vector) -> None:
        super().__init__(manager, vector, vector.llvm)


SHORTS, INTS, FLOATS = Vector(_INT16, STEP), Vector(_INT32, LANES), Vector(_FLOAT, LANES)


def _load(builder, pointer, index, item: ir.Type):
    """STEP values from an address that need not be a multiple of anything but their own size."""
    at = builder.bitcast(builder.gep(pointer, [index]), ir.VectorType(item, STEP).as_pointer())
    vector = builder.load(at)
    vector.align = item.width // 8
    return vector


def _pick(builder, vector, places: range):
    """The values of a vector at some places, as a shorter vector."""
    mask = ir.Constant(ir.VectorType(_INT32, len(places)), list(places))
    return builder.shuffle_vector(vector, ir.Constant(vector.type, ir.Undefined), mask)


@intrinsic
def load_int16(typingctx, pointer, index):
    """STEP int16 values from an index of a pointer on."""

    def codegen(context, builder, signature, args):
        return _load(builder, *args, _INT16)

    return SHORTS(types.CPointer(types.int16), types.intp), codegen


@intrinsic
def load_int8(typingctx, pointer, index):
    """STEP int8 values from an index of a pointer on, widened to int16."""

    def codegen(context, builder, signature, args):
        return builder.sext(_load(builder, *args, _INT8), SHORTS.llvm)

    return SHORTS(types.CPointer(types.int8), types.intp), codegen


@intrinsic
def zero_ints(typingctx):
    """LANES int32 zeros."""

    def codegen(context, builder, signature, args):
        return ir.Constant(INTS.llvm, [0] * LANES)

    return INTS(), codegen


@intrinsic
def zero_floats(typingctx):
    """LANES float32 zeros."""

    def codegen(context, builder, signature, args):
        return ir.Constant(FLOATS.llvm, [0.0] * LANES)

    return FLOATS(), codegen


@intrinsic
def add_products(typingctx, sums, x, w):
    """sums[i] + x[2i] * w[2i] + x[2i + 1] * w[2i + 1], in int32.

    On x86 the compiler turns this into `vpmaddwd` and an addition, or into `vpdpwssd` where the CPU has it.
    """

    def codegen(context, builder, signature, args):
        sums, x, w = args
        wide = ir.VectorType(_INT32, STEP)
        products = builder.mul(builder.sext(x, wide), builder.sext(w, wide))
        pairs = builder.add(_pick(builder, products, range(0, STEP, 2)), _pick(builder, products, range(1, STEP, 2)))
        return builder.add(sums, pairs)

    return INTS(INTS, SHORTS, SHORTS), codegen


@intrinsic
def add_scaled(typingctx, totals, sums, scale):
    """totals + float32(sums) * scale, lane by lane."""

    def codegen(context, builder, signature, args):
        totals, sums, scale = args
        first = builder.insert_element(ir.Constant(FLOATS.llvm, ir.Undefined), scale, _INT32(0))
        scales = builder.shuffle_vector(first, first, ir.Constant(INTS.llvm, [0] * LANES))
        return builder.fadd(totals, builder.fmul(builder.sitofp(sums, FLOATS.llvm), scales))

    return FLOATS(FLOATS, INTS, types.float32), codegen


@intrinsic
def sum_of(typingctx, totals):
    """The sum of all lanes: the upper half onto the lower one, until one is left."""

    def codegen(context, builder, signature, args):
        (vector,) = args
        width = LANES
        while width > 1:
            half = width // 2
            vector = builder.fadd(_pick(builder, vector, range(half)), _pick(builder, vector, range(half, width)))
            width = half
        return builder.extract_element(vector, _INT32(0))

    return types.float32(FLOATS), codegen


@intrinsic
def sums_of(typingctx, a, b, c, d, e, f, g, h):
    """The sums of all lanes of LANES vectors, side by side: the additions of `sum_of`, all at once."""

    def codegen(context, builder, signature, args):
        vectors, width = list(args), LANES
        while width > 1:  # a vector holds rows of `width` lanes; the two halves of each row of two vectors are added
            half, joined = width // 2, []
            for first, second in zip(vectors[::2], vectors[1::2], strict=True):
                rows = range(0, 2 * LANES, width)
                low, high = ([row + place + i for row in rows for i in range(half)] for place in (0, half))
                parts = (
                    builder.shuffle_vector(first, second, ir.Constant(ir.VectorType(_INT32, LANES), places))
                    for places in (low, high)
                )
                joined.append(builder.fadd(*parts))
            vectors, width = joined, half
        return vectors[0]

    return FLOATS(*(FLOATS,) * LANES), codegen


def _binary(operation: str):
    @intrinsic
    def combine(typingctx, a, b):
        def codegen(context, builder, signature, args):
            return getattr(builder, operation)(*args)

        return FLOATS(FLOATS, FLOATS), codegen

    return combine


multiply_floats, add_floats = _binary("fmul"), _binary("fadd")
"""a * b and a + b, lane by lane."""


@intrinsic
def halves(typingctx, a, b):
    """A vector of float32 whose lower half is a and whose upper half is b."""

    def codegen(context, builder, signature, args):
        pair = ir.Constant(ir.VectorType(_FLOAT, 2), ir.Undefined)
        for i, value in enumerate(args):
            pair = builder.insert_element(pair, value, _INT32(i))
        places = [0] * (LANES // 2) + [1] * (LANES // 2)
        return builder.shuffle_vector(pair, pair, ir.Constant(ir.VectorType(_INT32, LANES), places))

    return FLOATS(types.float32, types.float32), codegen


@intrinsic
def lane(typingctx, vector, index):
    """A lane of a vector of float32."""

    def codegen(context, builder, signature, args):
        return builder.extract_element(args[0], builder.trunc(args[1], _INT32))

    return types.float32(FLOATS, types.intp), codegen


@intrinsic
def prefetch(typingctx, pointer, index):
    """Ask for the cache line at an index of an int8 pointer, which will be read soon; it may lie outside the array."""

    def codegen(context, builder, signature, args):
        pointer, index = args
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, _INT32, _INT32, _INT32])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        read, keep, data = _INT32(0), _INT32(3), _INT32(1)
        builder.call(function, [builder.gep(pointer, [index]), read, keep, data])
        return context.get_dummy_value()

    return types.void(types.CPointer(types.int8), types.intp), codegen
