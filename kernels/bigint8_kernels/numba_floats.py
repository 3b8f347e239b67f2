# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, disable-error-code="call-arg"
"""Vectors of 16 float32 for numba kernels on the CPU: what `numba_vectors` has for integers.

A multiplication and addition is one instruction where the CPU has one, in every kernel alike: so the same sum has the
same bits whichever kernel computes it.
"""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .numba_vectors import Vector

WIDTH = 16
"""Values of a vector: the places of a page of keys, one 512-bit register or two of 256 bits."""

_INT1, _INT8, _INT16, _INT32, _FLOAT = ir.IntType(1), ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.FloatType()

FLOATS16 = Vector(_FLOAT, WIDTH)

_VECTOR = ir.VectorType(_FLOAT, WIDTH)


def _spread(builder, value):
    """One number in all lanes."""
    kind = ir.VectorType(value.type, WIDTH)
    first = builder.insert_element(ir.Constant(kind, ir.Undefined), value, _INT32(0))
    return builder.shuffle_vector(first, first, ir.Constant(ir.VectorType(_INT32, WIDTH), [0] * WIDTH))


def _stored(pointer: types.CPointer) -> ir.Type:
    """The LLVM type of values that are float32, float16 (uint16), bfloat16 (int16) or int8 in memory."""
    return {types.float32: _FLOAT, types.uint16: ir.HalfType(), types.int16: _INT16, types.int8: _INT8}[pointer.dtype]


def _widened(builder, vector, item: ir.Type):
    if item == _FLOAT:
        return vector
    if item == _INT16:
        wide = ir.VectorType(_INT32, WIDTH)
        bits = builder.shl(builder.zext(vector, wide), ir.Constant(wide, [16] * WIDTH))
        return builder.bitcast(bits, _VECTOR)
    if item == _INT8:
        return builder.sitofp(vector, _VECTOR)
    return builder.fpext(vector, _VECTOR)


def _lanes_below(builder, count):
    """Which of the lanes 0 to 15 are below a count."""
    lanes = ir.Constant(ir.VectorType(_INT32, WIDTH), list(range(WIDTH)))
    return builder.icmp_signed("<", lanes, _spread(builder, builder.trunc(count, _INT32)))


@intrinsic
def load(typingctx, pointer, index):
    """16 values from an index of a pointer to float32, float16, bfloat16 or int8 on, as float32."""

    def codegen(context, builder, signature, args):
        item = _stored(signature.args[0])
        at = builder.bitcast(builder.gep(args[0], [args[1]]), ir.VectorType(item, WIDTH).as_pointer())
        vector = builder.load(at, typ=ir.VectorType(item, WIDTH))
        vector.align = {_FLOAT: 4, _INT8: 1}.get(item, 2)
        return _widened(builder, vector, item)

    return FLOATS16(pointer, types.intp), codegen


@intrinsic
def load_first(typingctx, pointer, index, count):
    """`load` of the first `count` values only, not int8: the other lanes are 0, and their memory is not touched."""

    def codegen(context, builder, signature, args):
        item = _stored(signature.args[0])
        read = _INT16 if item != _FLOAT else _FLOAT
        kind = ir.VectorType(read, WIDTH)
        at = builder.bitcast(builder.gep(args[0], [args[1]]), kind.as_pointer())
        mask = _lanes_below(builder, args[2])
        signature_ = ir.FunctionType(kind, [at.type, _INT32, mask.type, kind])
        name = f"llvm.masked.load.v{WIDTH}{'f32' if read == _FLOAT else 'i16'}.p0"
        function = cgutils.get_or_insert_function(builder.module, signature_, name)
        zeros = ir.Constant(kind, None)
        vector = builder.call(function, [at, _INT32(4 if read == _FLOAT else 2), mask, zeros])
        return _widened(builder, vector if item == read else builder.bitcast(vector, ir.VectorType(item, WIDTH)), item)

    return FLOATS16(pointer, types.intp, types.intp), codegen


@intrinsic
def store(typingctx, pointer, index, vector):
    """16 values to float32 memory from an index of a pointer on."""

    def codegen(context, builder, signature, args):
        at = builder.bitcast(builder.gep(args[0], [args[1]]), _VECTOR.as_pointer())
        stored = builder.store(args[2], at)
        stored.align = 4
        return context.get_dummy_value()

    return types.void(pointer, types.intp, FLOATS16), codegen


@intrinsic
def spread(typingctx, value):
    """A float32 in all lanes."""

    def codegen(context, builder, signature, args):
        return _spread(builder, args[0])

    return FLOATS16(types.float32), codegen


@intrinsic
def count_from(typingctx, first):
    """first, first + 1, ..., first + 15 of an integer, as float32."""

    def codegen(context, builder, signature, args):
        lanes = ir.Constant(ir.VectorType(_INT32, WIDTH), list(range(WIDTH)))
        return builder.sitofp(builder.add(_spread(builder, builder.trunc(args[0], _INT32)), lanes), _VECTOR)

    return FLOATS16(types.intp), codegen


@intrinsic
def keep(typingctx, vector, first, last, other):
    """The lanes from `first` to `last - 1` of a vector; `other` in all others."""

    def codegen(context, builder, signature, args):
        below_last, below_first = _lanes_below(builder, args[2]), _lanes_below(builder, args[1])
        kept = builder.and_(below_last, builder.not_(below_first))
        return builder.select(kept, args[0], _spread(builder, args[3]))

    return FLOATS16(FLOATS16, types.intp, types.intp, types.float32), codegen


def _binary(operation: str, description: str):
    @intrinsic
    def combine(typingctx, a, b):
        def codegen(context, builder, signature, args):
            if operation == "max":
                return builder.select(builder.fcmp_ordered(">", *args), *args)
            return getattr(builder, operation)(*args)

        return FLOATS16(FLOATS16, FLOATS16), codegen

    combine.__doc__ = description
    return combine


add = _binary("fadd", "a + b, lane by lane.")
subtract = _binary("fsub", "a - b, lane by lane.")
multiply = _binary("fmul", "a * b, lane by lane.")
larger = _binary("max", "The larger of a and b, lane by lane; b where one is NaN.")


@intrinsic
def multiply_add(typingctx, a, b, c):
    """a * b + c, lane by lane or of three float32: rounded once where the CPU does that in one instruction."""
    kind = FLOATS16 if a == FLOATS16 else types.float32

    def codegen(context, builder, signature, args):
        name = "llvm.fmuladd.v16f32" if kind == FLOATS16 else "llvm.fmuladd.f32"
        type_ = args[0].type
        function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(type_, [type_] * 3), name)
        return builder.call(function, args)

    return kind(kind, kind, kind), codegen


def _reduction(operation: str):
    @intrinsic
    def reduce(typingctx, vector):
        def codegen(context, builder, signature, args):
            (value,), width = args, WIDTH
            while width > 1:
                width //= 2
                low, high = (
                    builder.shuffle_vector(
                        value,
                        ir.Constant(value.type, ir.Undefined),
                        ir.Constant(ir.VectorType(_INT32, width), list(range(first, first + width))),
                    )
                    for first in (0, width)
                )
                if operation == "max":
                    value = builder.select(builder.fcmp_ordered(">", low, high), low, high)
                else:
                    value = builder.fadd(low, high)
            return builder.extract_element(value, _INT32(0))

        return types.float32(FLOATS16), codegen

    return reduce


sum_of, largest_of = _reduction("add"), _reduction("max")
"""The sum and the largest of all lanes: the upper half with the lower one, until one is left."""

LOG2_E = 1.44269504088896341
LN2_HIGH, LN2_LOW = 0.693359375, -2.12194440e-4
EXP_TERMS = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
"""The polynomial of expf of the Cephes library (Moshier 1989): relative error about 1e-7."""

SMALLEST_EXPONENT, LARGEST_EXPONENT = -87.0, 88.0
"""exp of less is 0 here, and exp of more what exp of this is: 1.7e38."""


@intrinsic
def exp(typingctx, x):
    """e to the power of each lane, or of a float32; of NaN, NaN."""
    kind = FLOATS16 if x == FLOATS16 else types.float32

    def codegen(context, builder, signature, args):
        (x,) = args
        vector = kind == FLOATS16
        suffix, type_ = ("v16f32", _VECTOR) if vector else ("f32", _FLOAT)
        bits = ir.VectorType(_INT32, WIDTH) if vector else _INT32

        def number(value, of=type_):
            return ir.Constant(of, [value] * WIDTH) if vector else ir.Constant(of, value)

        def call(name, *values):
            function_type = ir.FunctionType(type_, [type_] * len(values))
            return builder.call(
                cgutils.get_or_insert_function(builder.module, function_type, f"llvm.{name}.{suffix}"), values
            )

        top = number(LARGEST_EXPONENT)
        inside = builder.select(builder.fcmp_unordered("<", x, top), x, top)  # NaN stays what it is
        bottom = number(SMALLEST_EXPONENT)
        inside = builder.select(builder.fcmp_unordered(">", inside, bottom), inside, bottom)
        n = call("rint", builder.fmul(inside, number(LOG2_E)))
        r = call("fmuladd", n, number(-LN2_HIGH), inside)
        r = call("fmuladd", n, number(-LN2_LOW), r)
        y = number(EXP_TERMS[0])
        for term in EXP_TERMS[1:]:
            y = call("fmuladd", y, r, number(term))
        y = builder.fadd(call("fmuladd", y, builder.fmul(r, r), r), number(1.0))
        exponent = builder.shl(builder.add(builder.fptosi(n, bits), number(127, bits)), number(23, bits))
        y = builder.fmul(y, builder.bitcast(exponent, type_))
        return builder.select(builder.fcmp_ordered("<", x, bottom), number(0.0), y)

    return kind(kind), codegen


def _on_stack(builder, item: ir.Type, count: int):
    """Not as an array, which numba would fill with zeros, value by value: LLVM takes minutes for many."""
    memory = cgutils.alloca_once(builder, item, size=count)
    memory.align = 64
    return memory


@intrinsic
def stack_floats(typingctx, count):
    """Memory for a constant number of float32 that lasts until the function returns."""
    if not isinstance(count, types.IntegerLiteral):
        return None

    def codegen(context, builder, signature, args):
        return _on_stack(builder, _FLOAT, count.literal_value)

    return types.CPointer(types.float32)(count), codegen


@intrinsic
def stack_bytes(typingctx, count):
    """The address of a constant number of bytes, a multiple of 64, that last until the function returns."""
    if not isinstance(count, types.IntegerLiteral):
        return None

    def codegen(context, builder, signature, args):
        memory = _on_stack(builder, _INT8, count.literal_value)
        return builder.ptrtoint(memory, context.get_value_type(types.intp))

    return types.intp(count), codegen


@intrinsic
def prefetch(typingctx, pointer, index):
    """Ask for the cache line at an index of a pointer, which will be read soon; it may lie outside the array."""

    def codegen(context, builder, signature, args):
        at = builder.bitcast(builder.gep(args[0], [args[1]]), ir.IntType(8).as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [at.type, _INT32, _INT32, _INT32])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(function, [at, _INT32(0), _INT32(3), _INT32(1)])
        return context.get_dummy_value()

    return types.void(pointer, types.intp), codegen
