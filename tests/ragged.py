"""Stages that run ragged steps in this process, and sequences that are driven through them by hand."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bigint8_kernels.step import PAGE

from bigint8 import Int8Config
from bigint8.families.layout import Layout
from bigint8.families.table import family_of
from bigint8.load.fill import check_planned_bytes, fill, move_buffers
from bigint8.model.general import GeneralStage
from bigint8.model.open_stage import open_stage
from bigint8.model.ragged import RaggedStage, Room
from bigint8.model.skeleton import skeleton_of
from bigint8.model.stage import StageModel
from bigint8.model.step import Step
from bigint8.plan.cut import make_plan
from bigint8.plan.devices import cpu_device
from bigint8.plan.spec import ModelSpec
from bigint8.session import find_model

PAGES, TABLE_PAGES, CHUNK, MOST_ROWS = 48, 5, 4, 24
NO_INT8 = ("q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "gate_proj", "up_proj", "down_proj", "fc1", "fc2",
           "query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h", "c_attn", "c_proj", "c_fc", "project_in",
           "project_out", "lm_head")  # fmt: skip
"""The names of all linear layers of all families: what leaves a model as it is stored."""


def loaded_stages(folder: Path, count: int, device: str = "cpu", **config: Any) -> tuple[list[StageModel], ModelSpec]:
    """The stages of a checkpoint's model, loaded on one device, in float32, as workers load them."""
    found = find_model(folder, Int8Config(**({"dtype": "float32"} | config)))
    plan = make_plan(found.spec, [cpu_device(share=count)] * count, found.spec.workload())
    stages = []
    for planned in plan.stages:
        skeleton = skeleton_of(found.checkpoint, found.spec, plan.dtype)
        stage = StageModel(skeleton, family_of(skeleton.model.config.model_type), planned.modules)
        check_planned_bytes(planned, stage.slots)
        fill(found.checkpoint, skeleton, stage.slots, lambda name: device)
        if stage.is_first and stage.has_head:
            skeleton.tie()
        move_buffers(stage, lambda name: device)
        stages.append(stage.eval())
    return stages, plan.spec


def room_for(layout: Layout, device: str = "cpu") -> Room:
    """Room for the sequences of these tests."""
    return Room((PAGES,) * len(layout.groups), TABLE_PAGES, MOST_ROWS, torch.float32, torch.device(device))


@dataclass
class Text:
    """A sequence: its tokens so far, how many of them have run, in which step it arrives, how many it is to have."""

    tokens: list[int]
    arrives: int = 0
    new: int = 12
    done: int = 0
    logits: list[torch.Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.prompt, self.wanted = len(self.tokens), len(self.tokens) + self.new
        self.pages: list[dict[int, int]] = []

    @property
    def is_generating(self) -> bool:
        return self.done >= self.prompt


class Stages:
    """The stages of a model one after the other, and the pages that their pools have free, in no order."""

    def __init__(self, folder: Path, count: int, general: bool = False, device: str = "cpu", **config: Any) -> None:
        stages, spec = loaded_stages(folder, count, device, **config)
        self.layout, room = spec.known_layout, room_for(spec.known_layout, device)
        self.stages: list[RaggedStage] = [
            GeneralStage(stage, self.layout, room) if general else open_stage(stage, spec, room) for stage in stages
        ]
        shuffled = np.random.default_rng(0)
        self.free = [shuffled.permutation(PAGES).tolist() for _ in self.layout.groups]
        self.number = 0

    def generate(self, texts: list[Text]) -> list[list[int]]:
        """All tokens of all sequences, greedily; the logits of those that were chosen are kept with them."""
        for text in texts:
            text.pages = [{} for _ in self.layout.groups]
        while any(len(text.tokens) < text.wanted for text in texts):
            self.next([text for text in texts if text.arrives <= self.number and len(text.tokens) < text.wanted])
        return [text.tokens for text in texts]

    def next(self, running: list[Text]) -> None:
        """One step: a token of each sequence that generates, and a chunk of each prompt."""
        running = sorted(running, key=lambda text: not text.is_generating)
        rows, keep = [], {}
        for index, text in enumerate(running):
            stop = min(text.done + CHUNK, len(text.tokens))
            self._give_pages(text, stop)
            rows += [(text.tokens[place], place, index) for place in range(text.done, stop)]
            if stop == len(text.tokens):
                keep[index] = len(rows) - 1
            text.done = stop
        few = sum(text.done > text.prompt for text in running)
        logits = self.run(rows, few, [text.pages for text in running], list(keep.values()))
        for index, values in zip(keep, logits, strict=True):
            running[index].logits.append(values)
            running[index].tokens.append(int(values.argmax()))

    def run(
        self,
        rows: Sequence[tuple[int, int, int]],
        few: int,
        pages: Sequence[Sequence[dict[int, int]]],
        keep: Sequence[int],
        copies: Sequence[tuple[int, int, int]] = (),
    ) -> torch.Tensor:
        """Logits of the kept rows; a row is a token, its place and its sequence; `pages` by sequence and group."""
        self.number += 1
        if not rows:
            return torch.empty(0)
        ids, places, sequences = np.array(rows, np.int32).T.copy()
        step = Step(
            self.number, ids, places, places, sequences, few, self._tables(pages), np.array(keep, np.int32),
            copies=np.array(copies, np.int32).reshape(-1, 3),
        )  # fmt: skip
        hidden = None
        for stage in self.stages:
            hidden = stage.run(step, hidden)
        assert hidden is not None and hidden.dtype == torch.float32
        return self.stages[0 if self.layout.tied else -1].logits(hidden)

    def _give_pages(self, text: Text, stop: int) -> None:
        """Pages for the places up to `stop`. Those that lie before the window of the next row are given back."""
        for group, window in enumerate(self.layout.groups):
            pages = text.pages[group]
            for run in range(text.done // PAGE, -(-stop // PAGE)):
                if run not in pages:
                    pages[run] = self.free[group].pop()
            first = 0 if window is None else max(0, text.done + 1 - window)
            for run in [run for run in pages if (run + 1) * PAGE <= first]:
                self.free[group].append(pages.pop(run))

    def _tables(self, pages: Sequence[Sequence[dict[int, int]]]) -> np.ndarray:
        most = 1 + max(run for by_group in pages for runs in by_group for run in runs)
        tables = np.full((len(self.layout.groups), len(pages), most), -1, np.int32)
        for index, by_group in enumerate(pages):
            for group, runs in enumerate(by_group[: len(tables)]):
                for run, page in runs.items():
                    tables[group, index, run] = page
        return tables


PROMPTS = ([5, 17, 99, 3, 42, 7], [9, 8], list(range(60, 83)), [33])


def texts() -> list[Text]:
    """Sequences of different lengths, which arrive one after the other."""
    return [Text(list(prompt), arrives=2 * i) for i, prompt in enumerate(PROMPTS)]


def generated_by(model: Any, text: Text) -> tuple[list[int], torch.Tensor]:
    """What transformers' generate() gives for the sequence by itself: its tokens, and the logits of the new ones."""
    prompt = torch.tensor([text.tokens[: text.prompt]])
    out = model.generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=text.new, do_sample=False,
        pad_token_id=0, return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    return out.sequences[0].tolist(), torch.cat(out.logits)


FLOAT, ROUNDED_TO_16_BITS, ROUNDED_TO_INT8 = 2e-5, 5e-4, 0.02
"""What logits may differ by, as a part of the largest: where activations are rounded, a last bit may round on."""


def assert_generates_as(model: Any, stages: Stages, tolerance: float = FLOAT) -> None:
    """Sequences that run together give the tokens that the model gives for each by itself, and its logits."""
    given = texts()
    for tokens, text in zip(stages.generate(given), given, strict=True):
        expected, logits = generated_by(model, text)
        assert tokens == expected
        assert_close(torch.stack(text.logits), logits, tolerance)


def assert_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = FLOAT) -> None:
    """The largest difference is at most this part of the largest value."""
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()
