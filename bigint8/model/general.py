"""A stage that runs ragged steps through transformers' own blocks: for models without a recipe.

For the blocks, the rows of a step are one sequence of T tokens. Only attention knows which of them belong together: it
is a function of ours, registered with transformers' `AttentionInterface`, over the pool of keys and values. In these
blocks, int8 layers choose their activations by the number of rows, and outliers by columns: unlike in fused blocks, a
token's values depend a little on what runs with it.
"""

from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from bigint8_kernels.step import Attention, Batch
from torch import Tensor, nn
from transformers import AttentionInterface

from ..errors import BigInt8Error
from ..families.layout import Layout
from .fused import alibi_slopes
from .host_numbers import on_device
from .program import Rows
from .ragged import Pools, Room, batch_of
from .rotary import refuse_changing_frequencies
from .stage import StageModel
from .step import Step

NAME = "bigint8"
"""What transformers knows our attention function by. It makes no masks for one whose masks it does not know."""

BEYOND_US = ("softcap", "s_aux", "position_bias")
"""What some models give to an attention function and ours does not do."""


class GeneralStage:
    """A loaded stage that runs transformers' own modules. See `ragged.RaggedStage` for what it does."""

    @torch.no_grad()
    def __init__(self, stage: StageModel, layout: Layout, room: Room) -> None:
        """Find out how the blocks attend, and allocate the keys and values.

        Raises BigInt8Error for a model whose tokens cannot run beside those of other sequences.
        """
        refuse_other_attention(stage.base)
        self._stage, self._room = stage, room
        windows = [(layout.sizes.windows[index], layout.group_of(index)) for index in stage.indices]
        self._attention = _RaggedAttention(windows, room)
        if stage.config.model_type == "bloom":
            for index, block in enumerate(stage.blocks):
                block.self_attention = _BloomAttention(cast(nn.Module, block.self_attention), index, self._attention)
        stage.config._attn_implementation = NAME
        floats = (parameter.dtype for parameter in stage.parameters() if parameter.is_floating_point())
        self._dtype = next(floats, room.dtype)
        self._run(_one_row(len(layout.groups)), None if stage.is_first else torch.zeros(1, layout.sizes.hidden))
        self._attention.allocate()

    def prepare(self) -> None:
        """Nothing: transformers' modules decide at each step what they launch, so that no step is captured."""

    @property
    def kv_bytes(self) -> int:
        """Bytes of the keys and values that it has room for."""
        return self._attention.pools.nbytes

    @torch.no_grad()
    def run(self, step: Step, hidden: Tensor | None) -> Tensor:
        """As `RaggedStage.run`."""
        self._room.check(step)
        self._attention.pools.copy(step.copies)
        hidden_TH = self._run(step, hidden)
        if self._stage.is_last:
            hidden_TH = hidden_TH[on_device(step.keep, hidden_TH.device)]
        return hidden_TH.float() if self._room.device.type == "cpu" else hidden_TH

    @torch.no_grad()
    def logits(self, hidden_RW: Tensor) -> Tensor:
        """As `RaggedStage.logits`."""
        return self._stage.head(hidden_RW.to(self._room.device, self._dtype)).float()

    def _run(self, step: Step, hidden: Tensor | None) -> Tensor:
        device = self._room.device
        ids_1T, positions_1T = (on_device(part, device)[None].long() for part in (step.ids, step.positions))
        inputs = ids_1T if hidden is None else hidden.to(device, self._dtype)[None]
        self._attention.batch = batch_of(step, None, device)
        no_padding_1T = torch.ones_like(positions_1T)  # without it, some models warn of padding
        return cast(Tensor, self._stage(inputs, no_padding_1T, positions_1T, None, ragged=self._attention))[0]


def _one_row(groups: int) -> Step:
    """A step of one row that is no token."""
    nothing = np.zeros(1, np.int32)
    return Step(0, nothing, nothing, nothing, nothing, 0, np.full((groups, 1, 1), -1, np.int32))


class _RaggedAttention:
    """The attention of a stage's blocks. Until `allocate` it only notes what they ask for.

    `batch` is that of the step that runs.
    """

    def __init__(self, windows: list[tuple[int | None, int]], room: Room) -> None:
        """`windows`: of each block the sliding window, and its group of pages."""
        self.batch: Batch | None = None
        self.device = room.device
        self._windows, self._room = windows, room
        self._asked: dict[int, Attention] = {}
        self._rows: dict[Attention, Rows] = {}
        self._pools: Pools | None = None

    @property
    def pools(self) -> Pools:
        assert self._pools is not None
        return self._pools

    def allocate(self) -> None:
        """Make room for the keys and values of the blocks. Raises BigInt8Error for a block that did not attend."""
        silent = [index for index in range(len(self._windows)) if index not in self._asked]
        if silent:
            raise BigInt8Error(
                f"block {silent[0]} of this stage does not attend through transformers' interface; load_sharded_int8 "
                "runs the model in one process with transformers' own cache"
            )
        asked = [self._asked[index] for index in range(len(self._windows))]
        self._pools = Pools(asked, self._room)

    def _rows_of(self, attention: Attention, pool: Tensor) -> Rows:
        """What runs this attention: the same for all blocks that attend alike, since it has memory of its own."""
        alike = replace(attention, slopes=None)
        if alike not in self._rows:
            width = (attention.heads + 2 * attention.kv_heads) * attention.head_dim
            self._rows[alike] = Rows(
                lambda ops, x_TN: ops.attend(x_TN, attention, pool), width, self._room.most_rows, pool.device
            )
        return self._rows[alike]

    def attend(self, block: int, heads_TN: Tensor, attention: Attention) -> Tensor:
        """The results (T, heads * D) for rows that hold q, k and v of all heads, side by side."""
        if self._pools is None:
            self._asked[block] = attention
            return heads_TN[:, : attention.heads * attention.head_dim]
        assert self.batch is not None
        pool, first = self._pools.together(block)
        tables = tuple(torch.where(table < 0, table, table + first) for table in self.batch.tables)
        rows_TN = heads_TN.float() if heads_TN.device.type == "cpu" else heads_TN.clone()
        attended_TN = self._rows_of(attention, pool).run(replace(self.batch, tables=tables), rows_TN)
        return attended_TN.to(heads_TN.dtype, copy=True)

    def window(self, block: int, told: int | None) -> tuple[int | None, int]:
        """The block's window and group. Raises BigInt8Error if that is not what the model says."""
        window, group = self._windows[block]
        if told != window:
            raise BigInt8Error(
                f"block {block} of this stage has a sliding window of {told}, but its pages are planned for {window}; "
                "please report this with the model's config.json"
            )
        return window, group


def ragged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """What transformers' blocks call: query (1, heads, T, D), key and value (1, kv_heads, T, D); (1, T, heads, D).

    Raises BigInt8Error for what our attention does not do.
    """
    ragged, name = options.get("ragged"), type(module).__name__
    if not isinstance(ragged, _RaggedAttention):
        raise BigInt8Error(
            f"{name} keeps to itself what the model is called with, so its tokens' sequences are unknown"
        )
    beyond = [option for option in BEYOND_US if options.get(option) is not None]
    if beyond or value.shape != key.shape or not getattr(module, "is_causal", True):
        raise BigInt8Error(
            f"{name} asks for {', '.join(beyond) or 'attention of another shape'}, which bigint8's attention does not "
            "do; load_sharded_int8 runs the model in one process with transformers' own"
        )
    block = cast(int, module.layer_idx)
    window, group = ragged.window(block, options.get("sliding_window"))
    _, heads, rows, d = query.shape
    kv_heads = key.shape[1]
    attention = Attention(
        heads, kv_heads, d, (0, d), (heads * d, d), ((heads + kv_heads) * d, d),
        scale=d**-0.5 if scaling is None else scaling, window=window, group=group,
    )  # fmt: skip
    heads_TN = torch.cat([part[0].transpose(0, 1).reshape(rows, -1) for part in (query, key, value)], dim=1)
    return ragged.attend(block, heads_TN, attention).view(1, rows, heads, d), None


AttentionInterface.register(NAME, ragged_attention)


class _BloomAttention(nn.Module):
    """BLOOM's attention, which does not go through transformers' interface, on the layers of the original."""

    def __init__(self, original: nn.Module, block: int, ragged: _RaggedAttention) -> None:
        super().__init__()
        self.query_key_value, self.dense = cast(nn.Module, original.query_key_value), cast(nn.Module, original.dense)
        self._block, self._ragged = block, ragged
        heads, d = cast(int, original.num_heads), cast(int, original.head_dim)
        window, group = ragged.window(block, None)
        slopes = alibi_slopes(heads).to(ragged.device)
        self._attention = Attention(
            heads, heads, d, (0, 3 * d), (d, 3 * d), (2 * d, 3 * d), d**-0.5, slopes=slopes, window=window, group=group
        )

    def forward(self, hidden_states: Tensor, residual: Tensor, **_: Any) -> tuple[Tensor, None]:
        """Hidden states (1, T, H) to residual + attention, as the block expects it."""
        heads_TN = self.query_key_value(hidden_states)[0]
        attended = self._ragged.attend(self._block, heads_TN, self._attention)
        return residual + self.dense(attended[None]), None


def refuse_other_attention(model: Any) -> None:
    """Raise BigInt8Error for a model whose tokens cannot run beside those of other sequences.

    That is one whose attention does not go through transformers' `AttentionInterface` (`_supports_attention_backend`),
    but for BLOOM's, which is replaced here; and one with rotary positions that change with the batch.
    """
    refuse_changing_frequencies(model)
    if not model.is_backend_compatible() and model.config.model_type != "bloom":
        raise BigInt8Error(
            f"{type(model).__name__} ({model.config.model_type}) brings an attention of its own, which cannot run the "
            "tokens of several sequences side by side; load_sharded_int8 runs it in one process with transformers' "
            "own cache"
        )
