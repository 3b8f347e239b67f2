"""A stage whose blocks are fused: it runs ragged steps through the operations of its device."""

from collections.abc import Sequence
from functools import partial
from typing import cast

import torch
from bigint8_kernels import dispatch
from bigint8_kernels.step import Batch, Operations
from torch import Tensor, nn

from ..errors import BigInt8Error
from ..families.layout import Layout, Recipe
from .fused import FusedBlock, fuse, linear_of, norm_of, run_block
from .graphs import Graphs, Run, Shape, compile_steps
from .host_numbers import on_device
from .offload import Kept, TwoBuffers, buffers_of
from .program import Program, Rows
from .ragged import Pools, Room, batch_of, batch_without_attention
from .rotary import Rotary, refuse_changing_frequencies
from .stage import ModelPart, StageModel
from .step import Step


class FusedStage:
    """A loaded stage of a family that has a recipe. See `ragged.RaggedStage` for what it does."""

    @torch.no_grad()
    def __init__(
        self, stage: StageModel | ModelPart, recipe: Recipe, layout: Layout, room: Room, kept: Kept | None = None
    ) -> None:
        """Allocate the keys and values, and the buffers of the blocks in `kept`, which are offloaded.

        Raises BigInt8Error for rotary positions that change with the batch.
        """
        refuse_changing_frequencies(stage)
        self._stage, self._room = stage, room
        self._rotary = _rotary_of(stage, recipe, room.device)
        blocks = [
            fuse(block, recipe, layout.sizes.windows[index], layout.group_of(index))
            for block, index in zip(stage.blocks, stage.indices, strict=True)
        ]
        self._pools = Pools([block.attention for block in blocks], room)
        offloaded = [i for i, index in enumerate(stage.indices) if index in (kept or {})]
        self._buffers = buffers_of([(kept or {})[stage.indices[i]] for i in offloaded], room.device)
        self._dtype = torch.float32 if room.device.type == "cpu" else room.dtype
        hidden, width = layout.sizes.hidden, layout.sizes.width or layout.sizes.hidden
        most_kept = min(room.head_rows, room.most_rows)
        self._hidden = hidden
        through = Rows(_through(blocks, self._pools, offloaded, self._buffers), hidden, room.most_rows, room.device)
        self._blocks = _run_of(through)
        self._before = _rows(_before(stage), width, room.most_rows, room.device)
        self._after = _rows(_after(stage), hidden, most_kept, room.device)
        self._head = _rows(_head(stage), width, most_kept, room.device)
        self._all_rows = [through, *filter(None, [self._before, self._after, self._head])]

    def prepare(self) -> None:
        """Where Triton serves the device: compile its kernels, and capture the blocks' steps of generated tokens.

        From then on these steps replay a CUDA graph (`graphs.Graphs`). The embeddings, the head and the copies of pages
        are launched at each step as before. Elsewhere this does nothing. No GPU has run this yet: the tests let a
        pretended one capture and replay what is launched. That a GPU captures all of it, in which memory, and how much
        time a replay saves, is not known.
        """
        if dispatch.backend_of(self._room.device) != "triton":
            return
        rotated = 0 if self._rotary is None else self._rotary.rotated
        tables = (self._room.table_pages,) * len(self._room.pages)
        shape = Shape(self._hidden, self._dtype, tables, rotated)
        compile_steps(self._blocks, shape, self._room.device, self._room.most_rows)
        if self._buffers is not None:  # the host lets blocks come, which no graph does; their bytes take far longer
            return
        graphs = Graphs(self._blocks, shape, self._room.device)
        graphs.capture()
        self._blocks = graphs

    @property
    def kv_bytes(self) -> int:
        """Bytes of the keys and values that it has room for."""
        return self._pools.nbytes

    @property
    def row_bytes(self) -> int:
        """Bytes of the memory that it keeps for the rows of a step: on the CPU."""
        return sum(rows.nbytes for rows in self._all_rows)

    @property
    def buffer_bytes(self) -> int:
        """Bytes of the buffers through which offloaded blocks come."""
        return 0 if self._buffers is None else self._buffers.nbytes

    @torch.no_grad()
    def run(self, step: Step, hidden: Tensor | None) -> Tensor:
        """As `RaggedStage.run`."""
        self._room.check(step)
        self._pools.copy(step.copies)
        x_TH = self._embed(step) if hidden is None else hidden.to(self._room.device, self._dtype, copy=True)
        x_TH = self._blocks(x_TH, batch_of(step, self._rotary, self._room.device))
        if not self._stage.is_last:
            return x_TH.clone()
        kept_RH = x_TH[on_device(step.keep, x_TH.device)]
        return kept_RH if self._after is None else self._by_themselves(self._after, kept_RH)

    @torch.no_grad()
    def logits(self, hidden_RW: Tensor) -> Tensor:
        """As `RaggedStage.logits`."""
        if self._head is None:
            raise RuntimeError("this stage has no head")
        return self._by_themselves(self._head, hidden_RW.to(self._room.device, self._dtype)).float()

    def _embed(self, step: Step) -> Tensor:
        """The rows that go into the first block (T, H)."""
        embeddings, positions = self._stage.part(self._stage.family.embeddings), self._positions()
        assert embeddings is not None
        x_TW = cast(Tensor, embeddings(on_device(step.ids, self._room.device))).to(self._dtype)
        if self._before is not None:
            x_TW = self._before.run(batch_without_attention(step.rows, step.few, self._room.device), x_TW)
        if positions is not None:
            index_T = on_device(step.positions, self._room.device) + getattr(positions, "offset", 0)
            x_TW = x_TW + positions.weight[index_T].to(self._dtype)
        return x_TW

    def _positions(self) -> nn.Embedding | None:
        found = self._stage.part(self._stage.family.positions)
        return found if isinstance(found, nn.Embedding) else None

    def _by_themselves(self, rows: Rows, x_RK: Tensor) -> Tensor:
        """Rows that were kept, some at a time. Their activations stay 16-bit where the layers leave it open."""
        batches = [batch_without_attention(len(x), len(x), self._room.device) for x in x_RK.split(rows.most_rows)]
        first = rows.run(batches[0], x_RK[: batches[0].rows])
        y_RN = first.new_empty(len(x_RK), first.shape[1])
        y_RN[: len(first)] = first
        for i, batch in enumerate(batches[1:], start=1):
            start = i * rows.most_rows
            y_RN[start : start + batch.rows] = rows.run(batch, x_RK[start : start + batch.rows])
        return y_RN


def _rotary_of(stage: StageModel | ModelPart, recipe: Recipe, device: torch.device) -> Rotary | None:
    """The rotary positions of the model. Raises BigInt8Error where they are not what the recipe says."""
    module = stage.part(recipe.rotary)
    if module is None:
        return None
    rotary = Rotary(module, device)
    if rotary.rotated != recipe.rotated:
        raise BigInt8Error(
            f"{recipe.rotary} rotates {rotary.rotated} values of a head, but the config's recipe says "
            f"{recipe.rotated}; please report this with the model's config.json"
        )
    return rotary


def _rows(program: Program | None, width: int, most_rows: int, device: torch.device) -> Rows | None:
    return None if program is None else Rows(program, width, most_rows, device)


def _run_of(rows: Rows) -> Run:
    def run(x_TH: Tensor, batch: Batch) -> Tensor:
        return rows.run(batch, x_TH)

    return run


def _through(
    blocks: Sequence[FusedBlock], pools: Pools, offloaded: Sequence[int], buffers: TwoBuffers | None
) -> Program:
    """All blocks. Those of `offloaded` compute with weights in the buffers, once these are there."""

    def program(ops: Operations, x_TH: Tensor) -> Tensor:
        delta_TH: Tensor | None = None
        for index, block in enumerate(blocks):
            if buffers is None or index not in offloaded:
                x_TH, delta_TH = run_block(ops, block, x_TH, delta_TH, pools.of(index))
                continue
            number = offloaded.index(index)
            ops.call(partial(buffers.wait, number))
            x_TH, delta_TH = run_block(ops, buffers.fused(number, block), x_TH, delta_TH, pools.of(index))
            ops.call(partial(buffers.release, number))
        return x_TH if delta_TH is None else ops.add_norm(x_TH, delta_TH, None)

    return program


def _before(stage: StageModel | ModelPart) -> Program | None:
    """What is between the token embeddings and the first block."""
    return _in_a_row(stage.part(stage.family.embedding_norm), stage.part(stage.family.project_in))


def _after(stage: StageModel | ModelPart) -> Program | None:
    """What is between the last block and the head."""
    return _in_a_row(stage.part(stage.family.final_norm), stage.part(stage.family.project_out))


def _head(stage: StageModel | ModelPart) -> Program | None:
    return None if stage.lm_head is None else _in_a_row(None, stage.lm_head)


def _in_a_row(norm: nn.Module | None, linear: nn.Module | None) -> Program | None:
    """A norm, then a linear layer, of which either may be missing. On other stages the identity is in their place."""
    norm = None if isinstance(norm, nn.Identity) else norm
    linear = None if isinstance(linear, nn.Identity) else linear
    if norm is None and linear is None:
        return None

    def program(ops: Operations, x_TK: Tensor) -> Tensor:
        if norm is not None:
            x_TK = ops.add_norm(x_TK, None, norm_of(norm))
        return x_TK if linear is None else ops.linear(x_TK, [linear_of(linear)], "projected")

    return program
