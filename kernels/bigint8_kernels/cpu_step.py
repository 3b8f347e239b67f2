"""A step of a model on the CPU, recorded once: `step.Operations` whose operations are kernels of one program.

What can be decided once is decided when an operation is recorded: addresses, kernels, parts. A step then is one native
call for all blocks. Where rows belong to prompts, int8 layers compute these between two calls (`cpu_prompt`).

    step = CpuStep(most_rows)
    x = step.rows("x", width)
    y = step.linear(step.add_norm(x, None, norm), [layer], "y")
    x[:rows] = hidden
    step.run(batch)  # now y[:rows] is the output

Each row's result is the same bits whatever the other rows are, and on any number of threads.
"""

from collections.abc import Callable, Sequence
from ctypes import addressof
from dataclasses import replace

import torch
from torch import Tensor

from . import cpu, cpu_attention, cpu_float, cpu_pages, cpu_product, cpu_rows, cpu_threads
from .cpu_outliers import MOST_LISTED
from .cpu_pages import AttentionWork
from .cpu_program import Program
from .cpu_prompt import Prompt
from .cpu_rows import ACTIVATIONS, ActivationWork, NormWork, Rows, Table
from .cpu_scores import CHUNK, RESULTS
from .cpu_threads import Kernel, Work
from .reference import BLOCK
from .step import PAGE, Activation, Attention, Batch, Linear, Norm, pool_shape

ALIGNMENT = 64
"""Rows begin with a cache line, so that no vector lies in two where the width is a multiple of 16."""

PART_BYTES = 2**18
"""Weights of a part of a product: threads that wait for each other wait for at most one part."""

SPLIT_TILES_A_THREAD = 4
"""Tiles of attention for each thread, up to which threads share tiles: with more, each thread has enough of them."""

PARTS_A_THREAD = 4
"""Parts of a product, and of attention, for each thread at most: what one is late with, another takes."""


class CpuStep:
    """Operations on the CPU, recorded and run as often as needed. One thread at a time uses it."""

    def __init__(self, most_rows: int, threads: int | None = None) -> None:
        """`most_rows`: that a run may have. `threads`: by default as torch uses; one where there is little to do."""
        self.most_rows, self._weights, self._may_run_alone = most_rows, 0, threads is None
        self._program = Program(threads)
        self._rows, self._tables = Rows(), list[Table]()
        self._buffers: dict[tuple[str, int, torch.dtype], Tensor] = {}
        # what runs between native calls: after which groups, whether at every run, and what, on rows from first to last
        self._between: list[tuple[int, bool, Callable[[int, int], None]]] = []
        self._kept: list[Tensor] = []
        self._outliers = torch.empty(2, MOST_LISTED, dtype=torch.int32)
        self._rotated = 0
        self._most_split, self._split = 0, torch.empty(0)

    def rows(self, name: str, width: int) -> Tensor:
        """The memory of a name: float32 (most_rows, width), the same for the same name and width."""
        return self._memory(name, width, torch.float32)

    def _memory(self, name: str, width: int, dtype: torch.dtype) -> Tensor:
        key = name, width, dtype
        if key not in self._buffers:
            memory = torch.zeros(self.most_rows * width * dtype.itemsize + ALIGNMENT, dtype=torch.uint8)
            first = -memory.data_ptr() % ALIGNMENT
            memory = memory[first : first + self.most_rows * width * dtype.itemsize]
            self._buffers[key] = memory.view(dtype).view(self.most_rows, width)
        return self._buffers[key]

    @property
    def nbytes(self) -> int:
        """Bytes of the memory of all names, which stays as long as this does."""
        return sum(memory.untyped_storage().nbytes() for memory in self._buffers.values())

    # --- operations ---

    def add_norm(self, x_TH: Tensor, delta_TH: Tensor | None, norm: Norm | None, out: str = "normed") -> Tensor:
        """See `step.Operations`. Raises ValueError for a weight or bias of another width."""
        width = x_TH.shape[1]
        y_TH = x_TH if norm is None else self.rows(out, width)
        work = NormWork(
            x=self._row_address(x_TH), delta=0 if delta_TH is None else self._row_address(delta_TH),
            rows_at=self._rows_address("rows"), width=width,
        )  # fmt: skip
        if norm is not None:
            work.y, work.epsilon, work.centered = y_TH.data_ptr(), norm.epsilon, norm.centered
            work.weight, work.bias = self._address(norm.weight, width), self._address(norm.bias, width)
        if norm is not None or delta_TH is not None:
            self._program.add([(cpu_rows.add_norm, work, self._program.threads)])
        return y_TH

    def linear(self, x_TK: Tensor, layers: Sequence[Linear], out: str) -> Tensor:
        """See `step.Operations`. Raises ValueError and TypeError for weights that do not fit."""
        layers = [self._checked(layer, x_TK.shape[1]) for layer in layers]
        y_TN = self.rows(out, sum(layer.weight.shape[0] for layer in layers))
        kept = {layer.activations for layer in layers if layer.scale is not None} - {"int8"}
        if kept:
            self._round_to_16bit(x_TK, "rows" if "16bit" in kept else "few")
        products, first = [], 0
        for layer in layers:
            last = first + layer.weight.shape[0]
            if layer.scale is None or layer.activations != "int8":
                products.append(self._product(x_TK, layer, y_TN[:, first:last]))
            first = last
        if products:
            self._program.add(products)
        self._record_prompt(x_TK, layers, y_TN)
        return y_TN

    def _checked(self, layer: Linear, features: int) -> Linear:
        """The layer with its tensors as kernels read them, kept alive."""
        if layer.weight.ndim != 2 or layer.weight.shape[1] != features:
            raise ValueError(f"a weight {tuple(layer.weight.shape)} does not take rows of {features} values")
        if layer.scale is None and layer.weight.dtype not in cpu_float.PRODUCTS:
            raise TypeError(f"a weight without a scale is float16, bfloat16 or float32, not {layer.weight.dtype}")
        if layer.scale is not None and (layer.weight.dtype != torch.int8 or layer.scale.dtype != torch.float32):
            raise TypeError(f"a weight with a scale is int8, its scale float32, not {layer.weight.dtype}")
        outputs = layer.weight.shape[0]
        bias = None if layer.bias is None else self._vector(layer.bias, outputs)
        scale = None if layer.scale is None else self._vector(layer.scale, outputs)
        self._weights += layer.weight.numel()
        return replace(layer, weight=self._keep(layer.weight), scale=scale, bias=bias)

    def _integers(self, features: int) -> tuple[Tensor, Tensor]:
        """Memory for rows as integers: int16 (most_rows, features), and the float32 scales of their blocks."""
        return self._memory("int16", features, torch.int16), self.rows("int16 scales", -(-features // BLOCK))

    def _round_to_16bit(self, x_TK: Tensor, which: str) -> None:
        q_TK, x_scale_TB = self._integers(x_TK.shape[1])
        work = Work(
            x=self._row_address(x_TK), q=q_TK.data_ptr(), features=x_TK.shape[1], x_scale=x_scale_TB.data_ptr(),
            tokens_at=self._rows_address(which),
        )  # fmt: skip
        self._program.add([(cpu.to_int16, work, self._program.threads)])

    def _product(self, x_TK: Tensor, layer: Linear, y_TN: Tensor) -> tuple[Kernel, Work, int]:
        rows, features = layer.weight.shape
        work = Work(
            x=self._row_address(x_TK), weight=layer.weight.data_ptr(), features=features, rows=rows,
            bias=0 if layer.bias is None else layer.bias.data_ptr(), y=y_TN.data_ptr(), y_stride=y_TN.stride(0),
        )  # fmt: skip
        most = PARTS_A_THREAD * self._program.threads if self._program.threads > 1 else 1
        parts = min(most, -(-layer.weight.nbytes // PART_BYTES))
        if layer.scale is None:
            work.tokens_at = self._rows_address("rows")
            return cpu_float.PRODUCTS[layer.weight.dtype], work, parts
        work.tokens_at = self._rows_address("rows" if layer.activations == "16bit" else "few")
        q_TK, x_scale_TB = self._integers(features)
        work.q, work.x_scale, work.scale = q_TK.data_ptr(), x_scale_TB.data_ptr(), layer.scale.data_ptr()
        return cpu_product.multiply, work, parts

    def _record_prompt(self, x_TK: Tensor, layers: Sequence[Linear], y_TN: Tensor) -> None:
        """What int8 layers need between native calls: for rows of prompts, or for all where a layer says so."""
        if all(layer.scale is None or layer.activations == "16bit" for layer in layers):
            return
        for always in (False, True):
            first, prompt = 0, Prompt(x_TK, *self._integers(x_TK.shape[1]), self._outliers)
            for layer in layers:
                last = first + layer.weight.shape[0]
                if layer.scale is not None and layer.activations == ("int8" if always else "auto"):
                    prompt.add(layer, y_TN[:, first:last])
                first = last
            if len(prompt):
                self._between.append((len(self._program), always, prompt))

    def attend(self, qkv_TN: Tensor, attention: Attention, pool: Tensor) -> Tensor:
        """See `step.Operations`. Raises ValueError and TypeError for a pool that does not fit."""
        self._check(attention, pool, qkv_TN.shape[1])
        width = attention.heads * attention.head_dim
        out_TN = self.rows("attended", width)
        while len(self._tables) <= attention.group:
            self._tables.append(Table())
        work = AttentionWork(
            qkv=self._row_address(qkv_TN), q=self.rows("queries", width).data_ptr(), out=out_TN.data_ptr(),
            pool=pool.data_ptr(), state=addressof(self._rows), table=addressof(self._tables[attention.group]),
            slopes=self._address(attention.slopes, attention.heads), qkv_stride=qkv_TN.shape[1],
            page_stride=pool.stride(0), heads=attention.heads, kv_heads=attention.kv_heads, head_dim=attention.head_dim,
            q_offset=attention.q[0], q_stride=attention.q[1], k_offset=attention.k[0], k_stride=attention.k[1],
            v_offset=attention.v[0], v_stride=attention.v[1], rotated=attention.rotated,
            window=attention.window or 0, scale=attention.scale,
        )  # fmt: skip
        for name, norm in (("q", attention.q_norm), ("k", attention.k_norm)):
            if norm is not None:
                setattr(work, f"{name}_norm", 1)
                setattr(work, f"{name}_weight", self._address(norm.weight, attention.head_dim))
                setattr(work, f"{name}_bias", self._address(norm.bias, attention.head_dim))
                setattr(work, f"{name}_centered", int(norm.centered))
                setattr(work, f"{name}_epsilon", norm.epsilon)
        self._kept.append(pool)
        threads = self._program.threads
        self._program.add([(cpu_pages.PREPARE[pool.dtype], work, threads)])
        self._program.add([(cpu_attention.ATTEND[pool.dtype], work, PARTS_A_THREAD * threads)])
        if threads > 1:
            work.most_split = self._most_split = SPLIT_TILES_A_THREAD * threads
            self._program.add([(cpu_attention.add_chunks, work, threads)])
        return out_TN

    def _check(self, attention: Attention, pool: Tensor, width: int) -> None:
        """Whether a pool and rows of this width are those of an attention."""
        if pool.dtype not in cpu_pages.PREPARE:
            raise TypeError(f"a pool on the CPU is float32, float16 or bfloat16, not {pool.dtype}")
        shape = pool_shape(pool.shape[0], attention)
        if pool.shape != shape or not pool[:1].is_contiguous():
            raise ValueError(f"a pool {tuple(pool.shape)}, where {shape} with contiguous pages belongs")
        heads, kv_heads, head_dim = attention.heads, attention.kv_heads, attention.head_dim
        if head_dim > cpu_pages.MOST_HEAD_DIM or heads % kv_heads or attention.rotated > head_dim:
            raise ValueError(
                f"{heads} heads of {head_dim} values, {attention.rotated} of them rotated, for {kv_heads} key heads: "
                f"the CPU's kernels take up to {cpu_pages.MOST_HEAD_DIM} values, and as many heads for each key head"
            )
        for (offset, stride), count in ((attention.q, heads), (attention.k, kv_heads), (attention.v, kv_heads)):
            if offset + (count - 1) * stride + head_dim > width:
                raise ValueError(f"{count} heads from {offset} on, {stride} apart, in rows of {width} values")
        if attention.rotated and self._rotated not in (0, attention.rotated):
            raise ValueError(f"heads of which {attention.rotated} values are rotated, after some with {self._rotated}")
        self._rotated = attention.rotated or self._rotated

    def activate(self, x_TN: Tensor, activation: Activation, gated: bool) -> Tensor:
        """See `step.Operations`."""
        width = x_TN.shape[1] // 2 if gated else x_TN.shape[1]
        y_TF = self.rows("activated", width)
        work = ActivationWork(
            x=self._row_address(x_TN), y=y_TF.data_ptr(), rows_at=self._rows_address("rows"), width=width,
            gated=int(gated), activation=ACTIVATIONS.index(activation),
        )  # fmt: skip
        self._program.add([(cpu_rows.activate, work, self._program.threads)])
        return y_TF

    def call(self, function: Callable[[], None]) -> None:
        """See `step.Operations`."""
        self._between.append((len(self._program), True, lambda first, last: function()))

    # --- addresses ---

    def _results(self, chunks: int) -> int:
        """Memory for attention whose tiles are split into chunks; only what is written to takes any."""
        values = self._most_split * chunks * RESULTS
        if values > self._split.numel():
            self._split = torch.empty(values)
        return self._split.data_ptr()

    def _keep(self, tensor: Tensor) -> Tensor:
        tensor = tensor.detach().contiguous()
        self._kept.append(tensor)
        return tensor

    def _address(self, tensor: Tensor | None, length: int) -> int:
        """The address of a copy in float32, or of the tensor itself if it is float32; 0 for None."""
        return 0 if tensor is None else self._vector(tensor, length).data_ptr()

    def _vector(self, tensor: Tensor, length: int) -> Tensor:
        if tensor.shape != (length,):
            raise ValueError(f"a weight, bias or scale {tuple(tensor.shape)}, where ({length},) belongs")
        return self._keep(tensor.float())

    def _row_address(self, rows: Tensor) -> int:
        if rows.dtype != torch.float32 or rows.ndim != 2 or len(rows) != self.most_rows or not rows.is_contiguous():
            raise ValueError(f"{rows.dtype} {tuple(rows.shape)} is not what `rows` of this step returned")
        return self._keep(rows).data_ptr()

    def _rows_address(self, name: str) -> int:
        return addressof(self._rows) + int(getattr(Rows, name).offset)

    # --- runs ---

    def run(self, batch: Batch) -> None:
        """Compute what was recorded for the rows of a batch: the first `batch.rows` of each tensor."""
        tensors = [batch.places_T, batch.sequences_T, *batch.tables]
        numbers = [t if t.dtype == torch.int32 and t.is_contiguous() else t.int().contiguous() for t in tensors]
        places_T, sequences_T, *tables = numbers
        if len(tables) < len(self._tables):
            raise ValueError(f"a batch with tables of {len(tables)} groups, where attention has {len(self._tables)}")
        turns = [None if t is None else t.float().contiguous() for t in (batch.cos_TR, batch.sin_TR)]
        if self._rotated and [t is not None and t.shape for t in turns] != 2 * [(batch.rows, self._rotated // 2)]:
            raise ValueError(f"a batch whose cos_TR and sin_TR are not {(batch.rows, self._rotated // 2)}")
        state = self._rows
        state.places, state.sequences = places_T.data_ptr(), sequences_T.data_ptr()
        state.cos, state.sin = (0 if t is None else t.data_ptr() for t in turns)
        for table, pages in zip(self._tables, tables, strict=False):
            table.pages, table.width = pages.data_ptr(), pages.shape[1]
        chunks = max(-(-table.width * PAGE // CHUNK) for table in self._tables) if self._tables else 0
        state.results = self._results(chunks)
        self._run(batch.rows, batch.few)

    def run_rows(self, rows: int, few: int | None = None) -> None:
        """`run` of what was recorded without attention: `rows` rows, of which `few`, by default all, stay 16-bit."""
        if self._tables:
            raise ValueError("attention was recorded, which needs a batch: call run")
        self._run(rows, rows if few is None else few)

    def _run(self, rows: int, few: int) -> None:
        if not 0 <= few <= rows <= self.most_rows:
            raise ValueError(f"{few} of {rows} rows for a step of at most {self.most_rows}")
        self._rows.rows, self._rows.few, start = rows, few, 0
        alone = self._may_run_alone and rows * self._weights < cpu_threads.PARALLEL_VALUES
        for end, always, run in self._between:
            if always or few < rows:
                if end > start:
                    self._program.run(start, end, alone)
                run(0 if always else few, rows)
                start = end
        self._program.run(start, alone=alone)
