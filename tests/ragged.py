"""Stages that run ragged steps in this process, and sequences that are driven through them by hand."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bigint8_kernels.step import PAGE

from bigint8 import Int8Config
from bigint8.families.layout import Layout
from bigint8.families.table import family_of
from bigint8.load.fill import fill, move_buffers
from bigint8.model.fused_stage import FusedStage
from bigint8.model.ragged import RaggedStage, Room
from bigint8.model.skeleton import skeleton_of
from bigint8.model.stage import StageModel
from bigint8.model.step import Step
from bigint8.plan.cut import make_plan
from bigint8.plan.devices import cpu_device
from bigint8.session import find_model

PAGES, CHUNK, MOST_ROWS = 48, 4, 24


def stage_models(folder: Path, count: int, **config: Any) -> tuple[list[StageModel], Layout, Any]:
    """The stages of a checkpoint's model, loaded in float32, its layout and its config.json."""
    found = find_model(folder, Int8Config(dtype="float32", **config))
    plan = make_plan(found.spec, [cpu_device(share=count)] * count, found.spec.workload())
    stages = []
    for planned in plan.stages:
        skeleton = skeleton_of(found.checkpoint, found.spec, plan.dtype)
        stage = StageModel(skeleton, family_of(skeleton.model.config.model_type), planned.modules)
        fill(found.checkpoint, skeleton, stage.slots, lambda name: "cpu")
        if stage.has_head:
            skeleton.tie()
        move_buffers(stage, lambda name: "cpu")
        stages.append(stage.eval())
    return stages, found.spec.known_layout, found.spec.config


def room_for(layout: Layout) -> Room:
    return Room((PAGES,) * len(layout.groups), MOST_ROWS, torch.float32, torch.device("cpu"))


def fused_stages(folder: Path, count: int, **config: Any) -> tuple[list[RaggedStage], Layout]:
    stages, layout, values = stage_models(folder, count, **config)
    recipe = stages[0].family.recipe(values)
    assert recipe is not None
    return [FusedStage(stage, recipe, layout, room_for(layout)) for stage in stages], layout


@dataclass
class Sequence_:
    """One sequence: its tokens so far, those that have run, the step in which it arrives, its pages by group."""

    tokens: list[int]
    arrives: int
    wanted: int
    done: int = 0
    prompt: int = 0
    pages: list[dict[int, int]] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.prompt = len(self.tokens)
        self.wanted += self.prompt


class Run:
    """Sequences on their way through stages, greedily: generated tokens first, then chunks of prompts."""

    def __init__(self, stages: Sequence[RaggedStage], layout: Layout, tied: bool, seed: int = 0) -> None:
        self.stages, self.layout, self.tied = stages, layout, tied
        shuffled = np.random.default_rng(seed)
        self.free = [list(map(int, shuffled.permutation(PAGES))) for _ in layout.groups]
        self.number = 0

    def generate(self, sequences: list[Sequence_]) -> list[list[int]]:
        """All tokens of all sequences; every token's logits are kept with its sequence."""
        for sequence in sequences:
            sequence.pages = [{} for _ in self.layout.groups]
        while any(len(sequence.tokens) < sequence.wanted for sequence in sequences):
            self.step([s for s in sequences if s.arrives <= self.number and len(s.tokens) < s.wanted])
        return [sequence.tokens for sequence in sequences]

    def step(self, running: list[Sequence_]) -> None:
        decoding = [s for s in running if s.done == len(s.tokens) - 1 and s.done >= s.prompt]
        prompts = [s for s in running if s not in decoding]
        rows, keep, kept = [], [], []
        for index, sequence in enumerate([*decoding, *prompts]):
            stop = min(sequence.done + CHUNK, len(sequence.tokens))
            for place in range(sequence.done, stop):
                rows.append((sequence.tokens[place], place, index))
                self._give_page(sequence, place)
            if stop == len(sequence.tokens):
                keep.append(len(rows) - 1)
                kept.append(sequence)
            sequence.done = stop
        self.number += 1
        if rows:
            logits = self._run(rows, [*decoding, *prompts], len(decoding), keep)
            for sequence, values in zip(kept, logits, strict=True):
                sequence.logits.append(values)
                sequence.tokens.append(int(values.argmax()))

    def _run(self, rows: list[tuple[int, int, int]], order: list[Sequence_], few: int, keep: list[int]) -> torch.Tensor:
        ids, places, sequences = np.array(rows, np.int32).T.copy()
        step = Step(self.number, ids, places, places, sequences, few, self._tables(order), np.array(keep, np.int32))
        hidden = None
        for stage in self.stages:
            hidden = stage.run(step, hidden)
        assert hidden is not None
        return self.stages[0 if self.tied else -1].logits(hidden)

    def _give_page(self, sequence: Sequence_, place: int) -> None:
        for group, window in enumerate(self.layout.groups):
            pages = sequence.pages[group]
            if place // PAGE not in pages:
                pages[place // PAGE] = self.free[group].pop()
            first = 0 if window is None else max(0, sequence.done + 1 - window)  # what the first row of the step sees
            for run in [run for run in pages if (run + 1) * PAGE <= first]:
                self.free[group].append(pages.pop(run))

    def _tables(self, order: list[Sequence_]) -> np.ndarray:
        most = max(max(pages, default=0) for sequence in order for pages in sequence.pages) + 1
        tables = np.full((len(self.layout.groups), len(order), most), -1, np.int32)
        for index, sequence in enumerate(order):
            for group, pages in enumerate(sequence.pages):
                for run, page in pages.items():
                    tables[group, index, run] = page
        return tables


Reference = Callable[[list[int], int], list[int]]
