# mypy: allow-untyped-defs, allow-untyped-decorators
"""The rows of a step as kernels on the CPU read them, and the kernels that take one row after the other.

Everything is float32. A row is computed by the same code whatever the other rows are, so its result is the same bits.
"""

import ctypes

import numpy as np
from numba import njit

from .cpu_threads import kernel, record_at
from .numba_bits import float32_at, intp_at
from .numba_floats import exp, multiply_add
from .reference import BLOCK

ACTIVATIONS = ("silu", "relu", "gelu", "gelu_tanh")


class Rows(ctypes.Structure):
    """What changes from step to step: how many rows there are, the addresses of a `step.Batch`, and memory for it.

    results: of attention, `cpu_scores.RESULTS` for each chunk of up to `most_split` tiles
    """

    _fields_ = [(name, ctypes.c_ssize_t) for name in ("rows", "few", "places", "sequences", "cos", "sin", "results")]


class Table(ctypes.Structure):
    """The pages of a group's sequences: the address of int32 (S, width)."""

    _fields_ = [("pages", ctypes.c_ssize_t), ("width", ctypes.c_ssize_t)]


class NormWork(ctypes.Structure):
    """x float32 (T, width) and what is added to it; y, the norm of x, with a weight and a bias. 0 where one is not."""

    _fields_ = [
        *((name, ctypes.c_ssize_t) for name in ("x", "delta", "y", "weight", "bias", "rows_at", "width", "centered")),
        ("epsilon", ctypes.c_float),
    ]


class ActivationWork(ctypes.Structure):
    """x float32 (T, width), or (T, 2 * width) where gated, and y (T, width). activation: an index of ACTIVATIONS."""

    _fields_ = [(name, ctypes.c_ssize_t) for name in ("x", "y", "rows_at", "width", "gated", "activation")]


norm_at, activation_at = record_at(NormWork), record_at(ActivationWork)


@njit(fastmath={"reassoc", "contract"}, no_cpython_wrapper=True, no_cfunc_wrapper=True)
def norm_row(x, y, width, weight, bias, epsilon, centered):
    """The norm of one row: `reference_step.norm`. weight and bias are addresses, x and y may be the same."""
    mean = np.float32(0.0)
    if centered:
        for k in range(width):
            mean += x[k]
        mean /= np.float32(width)
    square = np.float32(0.0)
    for k in range(width):
        square += (x[k] - mean) * (x[k] - mean)
    inverse = np.float32(1.0) / np.sqrt(square / np.float32(width) + epsilon)
    weight_K, bias_K = float32_at(weight, 0), float32_at(bias, 0)
    if weight and bias:
        for k in range(width):
            y[k] = (x[k] - mean) * inverse * weight_K[k] + bias_K[k]
    elif weight:
        for k in range(width):
            y[k] = (x[k] - mean) * inverse * weight_K[k]
    else:
        for k in range(width):
            y[k] = (x[k] - mean) * inverse
        if bias:
            for k in range(width):
                y[k] += bias_K[k]


@kernel
def add_norm(address, part, parts):
    """x += delta, then y = norm(x), each where there is one."""
    work = norm_at(address)
    rows, width = intp_at(work.rows_at, 0)[0], work.width
    for t in range(part * rows // parts, (part + 1) * rows // parts):
        x = float32_at(work.x, t * width)
        if work.delta:
            delta = float32_at(work.delta, t * width)
            for k in range(width):
                x[k] += delta[k]
        if work.y:
            y = float32_at(work.y, t * width)
            norm_row(x, y, width, work.weight, work.bias, work.epsilon, work.centered)


@njit(no_cpython_wrapper=True, no_cfunc_wrapper=True)
def _sigmoid_times(x, factor):
    """factor / (1 + exp(-x))."""
    return factor / (np.float32(1.0) + exp(-x))


@njit(no_cpython_wrapper=True, no_cfunc_wrapper=True)
def erf(x):
    """The error function, within 1e-7: two polynomials, near zero and for exp of the tail (N. Juffa's my_erff)."""
    t, s = abs(x), x * x
    far = multiply_add(np.float32(-1.72853470e-5), t, np.float32(3.83197126e-4))
    near = multiply_add(np.float32(-3.88396438e-3), t, np.float32(2.42546219e-2))
    far = multiply_add(far, s, near)
    far = multiply_add(far, t, np.float32(-1.06777877e-1))
    far = multiply_add(far, t, np.float32(-6.34846687e-1))
    far = multiply_add(far, t, np.float32(-1.28717512e-1))
    far = np.float32(1.0) - exp(multiply_add(far, t, -t))
    near = multiply_add(np.float32(-5.96761703e-4), s, np.float32(4.99119423e-3))
    near = multiply_add(near, s, np.float32(-2.67681349e-2))
    near = multiply_add(near, s, np.float32(1.12819925e-1))
    near = multiply_add(near, s, np.float32(-3.76125336e-1))
    near = multiply_add(near, s, np.float32(1.28379166e-1))
    near = multiply_add(near, x, x)
    if t > np.float32(0.927734375):
        return far if x > np.float32(0.0) else -far
    return near


@njit(no_cpython_wrapper=True, no_cfunc_wrapper=True)
def _activate(x, y, count, activation):
    if activation == 0:
        for k in range(count):
            y[k] = _sigmoid_times(x[k], x[k])
    elif activation == 1:
        for k in range(count):
            y[k] = max(x[k], np.float32(0.0))
    elif activation == 2:
        for k in range(count):
            y[k] = np.float32(0.5) * x[k] * (np.float32(1.0) + erf(x[k] * np.float32(0.5**0.5)))
    else:  # 0.5 * x * (1 + tanh(u)) is x times the sigmoid of 2 * u
        for k in range(count):
            twice_u = np.float32(1.5957691216) * (x[k] + np.float32(0.044715) * x[k] * x[k] * x[k])
            y[k] = _sigmoid_times(twice_u, x[k])


@kernel
def activate(address, part, parts):
    """y = activation(x), times the second half of the row of x where gated. A row is cut into blocks of BLOCK."""
    work = activation_at(address)
    rows, width = intp_at(work.rows_at, 0)[0], work.width
    blocks = (width + BLOCK - 1) // BLOCK
    stride = 2 * width if work.gated else width
    for task in range(part * rows * blocks // parts, (part + 1) * rows * blocks // parts):
        t, first = task // blocks, task % blocks * BLOCK
        count = min(BLOCK, width - first)
        y = float32_at(work.y, t * width + first)
        _activate(float32_at(work.x, t * stride + first), y, count, work.activation)
        if work.gated:
            up = float32_at(work.x, t * stride + width + first)
            for k in range(count):
                y[k] *= up[k]
