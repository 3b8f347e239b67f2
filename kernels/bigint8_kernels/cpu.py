"""Int8 on the CPU: row kernels in numba, products in integer or float GEMMs.

Three ways to multiply, each within rounding of `reference.int8_linear`:

- `multiply_few_rows`: each int8 weight is read once, converted in registers and multiplied by every row of X. For
  decoding, where reading the weights is the whole cost.
- `multiply_int8`: `torch._int_mm`, then one pass that rescales. Where the CPU has int8 dot products (VNNI); elsewhere
  torch runs that product as a plain loop, some 25 times slower than float32.
- `multiply_float`: a slice of the weight at a time becomes float32 and goes through the float GEMM. The activations
  are rounded to their int8 grid first and outlier columns stay as they are, so one product gives both parts.

Dimensions: T tokens, K input features, N output features, R rows of a weight slice.
"""

import threading

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import njit, prange, types
from numba.extending import intrinsic
from torch import Tensor

from .reference import SMALLEST_ABSMAX, Activations, resolve_activations

SLICE_FLOATS = 2**18
"""Size of the float32 slice of a weight in `multiply_float`: 1 MiB stays in a core's L2 cache."""

# numba's fallback threading layer aborts the process when two threads start parallel kernels at once.
_numba_lock = threading.Lock()


# --- bits to numbers ---------------------------------------------------------------------------------------------
# float16 arrives viewed as uint16 and bfloat16 as int16, since numpy knows no bfloat16 and numba no float16 on the CPU.


@intrinsic
def to_float32(typingctx, x):
    """float16 bits (uint16), bfloat16 bits (int16) or a float32, as float32."""

    def codegen(context, builder, signature, args):
        (value,) = args
        if x == types.uint16:
            return builder.fpext(builder.bitcast(value, ir.HalfType()), ir.FloatType())
        if x == types.int16:
            wide = builder.shl(builder.zext(value, ir.IntType(32)), ir.Constant(ir.IntType(32), 16))
            return builder.bitcast(wide, ir.FloatType())
        return value

    return types.float32(x), codegen


@intrinsic
def magnitude(typingctx, x):
    """The bits of x without its sign: unsigned integers that order as |x| does, NaN and infinity above all else."""

    def codegen(context, builder, signature, args):
        (value,) = args
        if x == types.float32:
            return builder.and_(builder.bitcast(value, ir.IntType(32)), ir.Constant(ir.IntType(32), 0x7FFFFFFF))
        return builder.and_(value, ir.Constant(ir.IntType(16), 0x7FFF))

    return (types.uint32 if x == types.float32 else types.uint16)(x), codegen


@intrinsic
def magnitude_to_float32(typingctx, bits, like):
    """The float32 whose magnitude in the format of `like` has these bits."""

    def codegen(context, builder, signature, args):
        value = args[0]
        if like == types.uint16:
            return builder.fpext(builder.bitcast(value, ir.HalfType()), ir.FloatType())
        if like == types.int16:
            wide = builder.shl(builder.zext(value, ir.IntType(32)), ir.Constant(ir.IntType(32), 16))
            return builder.bitcast(wide, ir.FloatType())
        return builder.bitcast(value, ir.FloatType())

    return types.float32(bits, like), codegen


@intrinsic
def round_to_int8(typingctx, x):
    """float32 to the nearest int8, ties to even."""

    def codegen(context, builder, signature, args):
        rint = builder.module.declare_intrinsic("llvm.rint", [ir.FloatType()])
        wide = builder.fptosi(builder.call(rint, args), ir.IntType(32))
        return builder.trunc(wide, ir.IntType(8))

    return types.int8(x), codegen


# --- quantization ------------------------------------------------------------------------------------------------


@njit(inline="always")
def _scales(absmax):
    """The scale of a row and the factor that quantizes it, in float32; zeros for a row of zeros."""
    if absmax < np.float32(SMALLEST_ABSMAX):
        return np.float32(0.0), np.float32(0.0)
    return absmax / np.float32(127.0), np.float32(127.0) * (np.float32(1.0) / absmax)


@njit(parallel=True, nogil=True, cache=True)
def _quantize_rows(source_RK, out_RK, scale_R):
    bad = 0
    for r in prange(source_RK.shape[0]):
        row = source_RK[r]
        out = out_RK[r]
        largest = magnitude(row[0])
        for k in range(row.shape[0]):
            m = magnitude(row[k])
            if m > largest:
                largest = m
        absmax = magnitude_to_float32(largest, row[0])
        if not absmax < np.float32(np.inf):
            bad += 1
        scale, inverse = _scales(absmax)
        scale_R[r] = scale
        for k in range(row.shape[0]):
            out[k] = round_to_int8(to_float32(row[k]) * inverse)
    return bad


def quantize_rows(source_RK: Tensor, out_RK: Tensor, scale_R: Tensor) -> bool:
    """Quantize rows in place; a transposed source is copied first. False if a value is NaN or infinite."""
    if source_RK.numel() == 0:
        scale_R.zero_()
        return True
    bits = {torch.float16: torch.uint16, torch.bfloat16: torch.int16, torch.float32: torch.float32}[source_RK.dtype]
    source = source_RK.contiguous().view(bits).numpy()
    _share_threads()
    with _numba_lock:
        return bool(_quantize_rows(source, out_RK.numpy(), scale_R.numpy()) == 0)


@njit(parallel=True, nogil=True, cache=True)
def _find_outliers(x_TK, threshold, absmax_T, outliers_K):
    """The absmax of each row, and a mark on each column with a value at or above the threshold."""
    any_T = np.zeros(x_TK.shape[0], dtype=np.bool_)
    for t in prange(x_TK.shape[0]):
        row = x_TK[t]
        largest = np.uint32(0)
        for k in range(row.shape[0]):
            m = magnitude(row[k])
            if m > largest:
                largest = m
        absmax_T[t] = magnitude_to_float32(largest, row[0])
        if threshold > 0 and absmax_T[t] >= threshold:
            any_T[t] = True
            for k in range(row.shape[0]):
                if abs(row[k]) >= threshold:
                    outliers_K[k] = True
    return any_T.any()


@njit(parallel=True, nogil=True, cache=True)
def _absmax_without(x_TK, outliers_K, absmax_T):
    for t in prange(x_TK.shape[0]):
        row = x_TK[t]
        largest = np.uint32(0)
        for k in range(row.shape[0]):
            m = np.uint32(0) if outliers_K[k] else magnitude(row[k])
            if m > largest:
                largest = m
        absmax_T[t] = magnitude_to_float32(largest, row[0])


@njit(parallel=True, nogil=True, cache=True)
def _to_int8(x_TK, outliers_K, absmax_T, q_TK, scale_T):
    """int8 values with outlier columns zero, and the scales of rows."""
    for t in prange(x_TK.shape[0]):
        scale_T[t], inverse = _scales(absmax_T[t])
        for k in range(x_TK.shape[1]):
            q_TK[t, k] = 0 if outliers_K[k] else round_to_int8(x_TK[t, k] * inverse)


@njit(parallel=True, nogil=True, cache=True)
def _to_int8_grid(x_TK, outliers_K, absmax_T, rounded_TK):
    """X with all but the outlier columns rounded to the int8 grid of their row."""
    for t in prange(x_TK.shape[0]):
        scale, inverse = _scales(absmax_T[t])
        for k in range(x_TK.shape[1]):
            x = x_TK[t, k]
            rounded_TK[t, k] = x if outliers_K[k] else np.float32(round_to_int8(x * inverse)) * scale


def _outliers_and_absmax(x_TK: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray, bool]:
    t, k = x_TK.shape
    absmax_T, outliers_K = np.empty(t, np.float32), np.zeros(k, np.bool_)
    found = _find_outliers(x_TK, np.float32(threshold), absmax_T, outliers_K)
    if found:
        _absmax_without(x_TK, outliers_K, absmax_T)
    return outliers_K, absmax_T, found


def quantize_activations(x_TK: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.quantize_activations` of float32 X: int8 (T, K), float32 scales (T,), outlier mask (K,)."""
    q_TK, scale_T = torch.empty(x_TK.shape, dtype=torch.int8), torch.empty(x_TK.shape[0])
    with _numba_lock:
        outliers_K, absmax_T, _ = _outliers_and_absmax(x_TK.numpy(), threshold)
        _to_int8(x_TK.numpy(), outliers_K, absmax_T, q_TK.numpy(), scale_T.numpy())
    return q_TK, scale_T, torch.from_numpy(outliers_K)


def round_activations(x_TK: Tensor, threshold: float) -> Tensor:
    """Float32 X with every value outside the outlier columns rounded to its row's int8 grid (T, K)."""
    rounded_TK = torch.empty_like(x_TK)
    with _numba_lock:
        outliers_K, absmax_T, _ = _outliers_and_absmax(x_TK.numpy(), threshold)
        _to_int8_grid(x_TK.numpy(), outliers_K, absmax_T, rounded_TK.numpy())
    return rounded_TK


# --- products ----------------------------------------------------------------------------------------------------


@njit(parallel=True, nogil=True, cache=True, fastmath={"reassoc", "contract", "nsz"})
def _few_rows(x_TK, weight_NK, scale_N, y_TN):
    tokens, features = x_TK.shape
    for n in prange(weight_NK.shape[0]):
        row = weight_NK[n]
        scale = scale_N[n]
        t = 0
        while t + 4 <= tokens:
            a = np.float32(0.0)
            b = np.float32(0.0)
            c = np.float32(0.0)
            d = np.float32(0.0)
            for k in range(features):
                w = np.float32(row[k])
                a += w * x_TK[t, k]
                b += w * x_TK[t + 1, k]
                c += w * x_TK[t + 2, k]
                d += w * x_TK[t + 3, k]
            y_TN[t, n] = a * scale
            y_TN[t + 1, n] = b * scale
            y_TN[t + 2, n] = c * scale
            y_TN[t + 3, n] = d * scale
            t += 4
        while t < tokens:
            a = np.float32(0.0)
            for k in range(features):
                a += np.float32(row[k]) * x_TK[t, k]
            y_TN[t, n] = a * scale
            t += 1


def multiply_few_rows(x_TK: Tensor, weight_NK: Tensor, scale_N: Tensor) -> Tensor:
    """Float32 X (T, K) times int8 weights converted in registers: float32 (T, N)."""
    y_TN = torch.empty(x_TK.shape[0], weight_NK.shape[0])
    with _numba_lock:
        _few_rows(x_TK.numpy(), weight_NK.numpy(), scale_N.numpy(), y_TN.numpy())
    return y_TN


def multiply_float(x_TK: Tensor, weight_NK: Tensor, scale_N: Tensor) -> Tensor:
    """Float32 X (T, K) times int8 weights, a slice of them at a time in float32: float32 (T, N)."""
    n, k = weight_NK.shape
    y_TN = torch.empty(x_TK.shape[0], n)
    step = max(16, SLICE_FLOATS // max(1, k))
    w_RK = torch.empty(min(step, n), k)
    for start in range(0, n, step):
        stop = min(start + step, n)
        w = w_RK[: stop - start].copy_(weight_NK[start:stop])
        torch.mm(x_TK, w.T, out=y_TN[:, start:stop])
    return y_TN.mul_(scale_N)


@njit(parallel=True, nogil=True, cache=True)
def _rescale(acc_TN, x_scale_T, scale_N, y_TN):
    for t in prange(acc_TN.shape[0]):
        x_scale = x_scale_T[t]
        for n in range(acc_TN.shape[1]):
            y_TN[t, n] = np.float32(acc_TN[t, n]) * (x_scale * scale_N[n])


def multiply_int8(x_TK: Tensor, weight_NK: Tensor, scale_N: Tensor, threshold: float) -> Tensor:
    """LLM.int8() of float32 X (T, K) with an integer GEMM and a float one over the outlier columns: float32 (T, N)."""
    q_TK, x_scale_T, outliers_K = quantize_activations(x_TK, threshold)
    acc_TN = torch._int_mm(q_TK, weight_NK.T)
    y_TN = torch.empty(acc_TN.shape)
    with _numba_lock:
        _rescale(acc_TN.numpy(), x_scale_T.numpy(), scale_N.numpy(), y_TN.numpy())
    columns = outliers_K.nonzero().squeeze(1)
    if columns.numel():
        w_NC = weight_NK.index_select(1, columns).float() * scale_N[:, None]
        y_TN.addmm_(x_TK.index_select(1, columns), w_NC.T)
    return y_TN


def has_int8_dot() -> bool:
    """Whether `torch._int_mm` is fast here: the CPU multiplies int8 with VNNI."""
    return bool(torch.cpu._is_vnni_supported())


def int8_linear(
    x_TK: Tensor,
    weight_NK: Tensor,
    scale_N: Tensor,
    bias_N: Tensor | None,
    threshold: float,
    activations: Activations,
) -> Tensor:
    """`reference.int8_linear` in float32, returned in X's dtype (T, N)."""
    dtype, tokens = x_TK.dtype, x_TK.shape[0]
    x_TK = x_TK.detach().float().contiguous()
    weight_NK, scale_N = weight_NK.detach(), scale_N.detach()
    mode = resolve_activations(activations, tokens)
    few = tokens <= 16
    _share_threads()
    if mode == "int8" and has_int8_dot():
        y_TN = multiply_int8(x_TK, weight_NK, scale_N, threshold)
    else:
        if mode == "int8":
            x_TK = round_activations(x_TK, threshold)
        y_TN = (multiply_few_rows if few else multiply_float)(x_TK, weight_NK, scale_N)
    if bias_N is not None:
        y_TN += bias_N
    return y_TN.to(dtype)


def _share_threads() -> None:
    """One setting for both libraries: numba uses as many threads as torch does."""
    numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))
