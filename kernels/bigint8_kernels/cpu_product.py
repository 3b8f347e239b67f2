"""Products of int16 activations with int8 weights: the linear layer on the CPU, for one row of X and for many.

Both operands lie along K, so nothing is packed or turned: a step widens 16 weights of each row to int16 in registers,
multiplies them by 16 activations of each token and adds neighbouring products into 32-bit lanes. On x86 that is one
instruction (`pmaddwd`, AVX2; with VNNI the addition too), twice the products of a float32 one.

After each BLOCK values along K, of which even a single sum of all products would stay below 2**31, the lanes become
float32, times the scale that the activations of this token have in this block, and counting begins anew.

The tile is written in LLVM's own language, since numba has no vectors of fixed width: left to itself, the compiler
keeps neither the widened weights nor the sums in registers.

Dimensions: T tokens, K input features, N output features, B blocks of K.
"""

import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.arrayobj import make_array

from .reference import BLOCK

STEP = 16
"""Values along K that one step takes."""

SLICE_BYTES = 2**17
"""Size of the slice of the weight that all tokens are multiplied with before the next: it stays in a core's cache."""


PREFETCH_BYTES = 512
"""How far ahead of where it reads a row a tile asks for weights."""


def make_tile(tokens: int, rows: int):
    """A numba function of tokens x rows dot products.

    `tile(x, x_stride, x_scale, scale_stride, w, w_stride, steps, out)`, pointers and strides in values: x int16, a
    token every `x_stride`; x_scale float32, one for each BLOCK; w int8, a row every `w_stride`; `steps` of STEP values.
    Writes float32 out[t * rows + r] = sum over k of x[t, k] * x_scale[t, k // BLOCK] * w[r, k].
    """

    @intrinsic
    def tile(typingctx, x, x_stride, x_scale, scale_stride, w, w_stride, steps, out):
        signature = types.void(
            types.CPointer(types.int16), types.intp, types.CPointer(types.float32), types.intp,
            types.CPointer(types.int8), types.intp, types.intp, types.CPointer(types.float32),
        )  # fmt: skip
        return signature, _codegen(tokens, rows)

    return tile


def _codegen(tokens, rows):
    i16, i32, f32 = ir.IntType(16), ir.IntType(32), ir.FloatType()
    lanes = STEP // 2
    ints, floats = ir.VectorType(i32, lanes), ir.VectorType(f32, lanes)
    evens = ir.Constant(ir.VectorType(i32, lanes), list(range(0, STEP, 2)))
    odds = ir.Constant(ir.VectorType(i32, lanes), list(range(1, STEP, 2)))

    def codegen(context, builder, signature, args):
        x, x_stride, x_scale, scale_stride, w, w_stride, steps, out = args
        index = steps.type

        kind = ir.FunctionType(ir.VoidType(), [w.type, i32, i32, i32])
        prefetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")

        def load(pointer, offset, item, count, align):
            at = builder.gep(pointer, [offset])
            vector = builder.load(builder.bitcast(at, ir.VectorType(item, count).as_pointer()))
            vector.align = align
            return vector

        def products(activations, weights):
            """Neighbouring products, added: the pattern that the compiler turns into one instruction."""
            wide = ir.VectorType(i32, STEP)
            product = builder.mul(builder.sext(activations, wide), builder.sext(weights, wide))
            undefined = ir.Constant(wide, ir.Undefined)
            even = builder.shuffle_vector(product, undefined, evens)
            return builder.add(even, builder.shuffle_vector(product, undefined, odds))

        sums = []
        for _ in range(tokens * rows):
            slot = builder.alloca(floats)
            slot.align = 4 * lanes
            builder.store(ir.Constant(floats, [0.0] * lanes), slot)
            sums.append(slot)
        before = builder.block
        blocks, inner, after, end = (builder.append_basic_block(n) for n in ("blocks", "inner", "after", "end"))
        one, per_block = ir.Constant(index, 1), ir.Constant(index, BLOCK // STEP)
        distance, to_read_soon = ir.Constant(index, PREFETCH_BYTES), [ir.Constant(i32, value) for value in (0, 3, 1)]
        builder.cbranch(builder.icmp_signed(">", steps, ir.Constant(index, 0)), blocks, end)

        builder.position_at_end(blocks)
        block, first = builder.phi(index), builder.phi(index)
        block.add_incoming(ir.Constant(index, 0), before)
        first.add_incoming(ir.Constant(index, 0), before)
        full = builder.add(first, per_block)
        last = builder.select(builder.icmp_signed("<", full, steps), full, steps)
        builder.branch(inner)

        builder.position_at_end(inner)
        step = builder.phi(index)
        step.add_incoming(first, blocks)
        accumulators = [builder.phi(ints) for _ in range(tokens * rows)]
        for accumulator in accumulators:
            accumulator.add_incoming(ir.Constant(ints, [0] * lanes), blocks)
        k = builder.mul(step, ir.Constant(index, STEP))
        x_rows = [
            load(x, builder.add(builder.mul(x_stride, ir.Constant(index, t)), k), i16, STEP, 2) for t in range(tokens)
        ]
        added = [None] * (tokens * rows)
        for r in range(rows):
            narrow = load(w, builder.add(builder.mul(w_stride, ir.Constant(index, r)), k), ir.IntType(8), STEP, 1)
            ahead = builder.add(builder.mul(w_stride, ir.Constant(index, r)), builder.add(k, distance))
            builder.call(prefetch, [builder.gep(w, [ahead]), *to_read_soon])
            weights = builder.sext(narrow, ir.VectorType(i16, STEP))
            for t in range(tokens):
                i = t * rows + r
                added[i] = builder.add(accumulators[i], products(x_rows[t], weights))
        next_step = builder.add(step, one)
        step.add_incoming(next_step, inner)
        for accumulator, value in zip(accumulators, added, strict=True):
            accumulator.add_incoming(value, inner)
        builder.cbranch(builder.icmp_signed("<", next_step, last), inner, after)

        builder.position_at_end(after)
        for t in range(tokens):
            at = builder.add(builder.mul(scale_stride, ir.Constant(index, t)), block)
            scale = builder.load(builder.gep(x_scale, [at]))
            splat = builder.insert_element(ir.Constant(floats, ir.Undefined), scale, ir.Constant(i32, 0))
            splat = builder.shuffle_vector(splat, splat, ir.Constant(ir.VectorType(i32, lanes), [0] * lanes))
            for r in range(rows):
                i = t * rows + r
                part = builder.fmul(builder.sitofp(added[i], floats), splat)
                builder.store(builder.fadd(builder.load(sums[i]), part), sums[i])
        next_block = builder.add(block, one)
        block.add_incoming(next_block, after)
        first.add_incoming(last, after)
        builder.cbranch(builder.icmp_signed("<", last, steps), blocks, end)

        builder.position_at_end(end)
        for i, slot in enumerate(sums):
            total = builder.load(slot)
            width = lanes
            while width > 1:  # halves onto halves
                width //= 2
                mask = ir.Constant(ir.VectorType(i32, width), list(range(width)))
                upper = ir.Constant(ir.VectorType(i32, width), list(range(width, 2 * width)))
                total = builder.fadd(
                    builder.shuffle_vector(total, total, mask), builder.shuffle_vector(total, total, upper)
                )
            value = builder.extract_element(total, ir.Constant(i32, 0))
            builder.store(value, builder.gep(out, [ir.Constant(index, i)]))
        return context.get_dummy_value()

    return codegen


@intrinsic
def _pointer(typingctx, array, offset):
    """The address of a value of a contiguous array, so many values from its start."""

    def codegen(context, builder, signature, args):
        data = make_array(signature.args[0])(context, builder, args[0]).data
        return builder.gep(data, [args[1]])

    return types.CPointer(array.dtype)(array, types.intp), codegen


_tile_4x2, _tile_4x1 = make_tile(4, 2), make_tile(4, 1)
_tile_1x4, _tile_1x1 = make_tile(1, 4), make_tile(1, 1)


@njit(nogil=True, cache=True)
def multiply(x_TK, x_scale_TB, w_NK, scale_N, bias_N, y_TN, start, stop):
    """Y = X W^T * scale (+ bias, unless that is empty) for the output features from start to stop.

    The rows of a tile lie far apart, so that each is read on from where the tile before stopped: several long streams,
    which the CPU fetches ahead by itself. Rows side by side are as many short ones, which it does not.
    """
    tokens, features = x_TK.shape
    blocks = x_scale_TB.shape[1]
    steps = features // STEP
    out = np.empty(8, np.float32)
    once = tokens // 4 + tokens % 4 == 1  # one tile takes all tokens: W is read through only once, without slices
    slice_rows = max(1, stop - start) if once else max(8, SLICE_BYTES // max(1, features))
    for first in range(start, stop, slice_rows):
        last = min(first + slice_rows, stop)
        t = 0
        while t < tokens:
            x, x_scale = _pointer(x_TK, t * features), _pointer(x_scale_TB, t * blocks)
            count, rows = (4, 2) if t + 4 <= tokens else (1, 4)
            apart = (last - first) // rows
            for n in range(first, first + apart):
                w = _pointer(w_NK, n * features)
                if count == 4:
                    _tile_4x2(x, features, x_scale, blocks, w, apart * features, steps, _pointer(out, 0))
                else:
                    _tile_1x4(x, features, x_scale, blocks, w, apart * features, steps, _pointer(out, 0))
                _finish(x_TK, x_scale_TB, w_NK, scale_N, bias_N, y_TN, out, t, count, n, rows, apart)
            for n in range(first + rows * apart, last):
                w = _pointer(w_NK, n * features)
                if count == 4:
                    _tile_4x1(x, features, x_scale, blocks, w, features, steps, _pointer(out, 0))
                else:
                    _tile_1x1(x, features, x_scale, blocks, w, features, steps, _pointer(out, 0))
                _finish(x_TK, x_scale_TB, w_NK, scale_N, bias_N, y_TN, out, t, count, n, 1, 1)
            t += count


@njit(nogil=True, cache=True)
def _finish(x_TK, x_scale_TB, w_NK, scale_N, bias_N, y_TN, sums, token, tokens, row, rows, apart):
    """Values of a tile into Y: what no step took of K, the scales and the bias."""
    features = x_TK.shape[1]
    for i in range(tokens):
        t = token + i
        for j in range(rows):
            n = row + j * apart
            y = sums[i * rows + j]
            for k in range(features // STEP * STEP, features):
                y += np.float32(x_TK[t, k]) * np.float32(w_NK[n, k]) * x_scale_TB[t, k // BLOCK]
            y *= scale_N[n]
            y_TN[t, n] = y + bias_N[n] if bias_N.shape[0] else y


@njit(parallel=True, nogil=True, cache=True)
def multiply_parallel(x_TK, x_scale_TB, w_NK, scale_N, bias_N, y_TN, parts):
    """`multiply` of all output features by `parts` threads."""
    rows = w_NK.shape[0]
    for part in prange(parts):
        start, stop = part * rows // parts, (part + 1) * rows // parts
        multiply(x_TK, x_scale_TB, w_NK, scale_N, bias_N, y_TN, start, stop)
