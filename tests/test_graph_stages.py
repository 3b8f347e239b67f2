"""Loaded stages whose steps of generated tokens are CUDA graphs, on a GPU that is not there (`pretend_graphs`).

Triton's interpreter computes what the kernels do. No GPU has shown yet that it captures all that a stage launches, nor
what a replay saves.
"""

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ragged
import torch
from bigint8_kernels import dispatch
from pretend import pretending
from pretend_graphs import Recorder, install
from ragged import ROUNDED_TO_16_BITS, TABLE_PAGES, Stages, Text, assert_close
from tiny import tiny_model

from bigint8 import load_sharded_int8
from bigint8.model import fused_stage, graphs
from bigint8.model.graphs import Graphs
from bigint8.model.step import Step
from bigint8.options import Workload
from bigint8.plan.cut import make_plan
from bigint8.plan.devices import Device
from bigint8.plan.memory import GRAPH_ROWS, graph_input_bytes
from bigint8.run.running import RunningStage
from bigint8.session import find_model

SMALL: dict[str, dict[str, Any]] = {
    "llama": {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1,
    },
    "qwen2": {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "max_window_layers": 1,
    },
    "opt-350m": {
        "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "word_embed_proj_dim": 16,
    },
}  # fmt: skip
"""Two blocks: with rotary positions, with a group of pages each, and with a norm after each part."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {kind: tmp_path_factory.mktemp(kind) for kind in SMALL}
    for kind, folder in made.items():
        tiny_model(kind, False, torch.float16, **SMALL[kind]).save_pretrained(folder)
    return made


@pytest.fixture
def folder(folders: dict[str, Path]) -> Path:
    return folders["llama"]


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    """Triton serves the GPU. Its interpreter takes its time, so stages compile and warm up with less than elsewhere."""
    made = install(monkeypatch)
    monkeypatch.setattr(ragged, "MOST_ROWS", 8)
    monkeypatch.setattr(graphs, "WARM_UPS", 1)
    serve(monkeypatch, "triton")
    capture(monkeypatch, 1)
    with pretending():
        yield made


def capture(monkeypatch: pytest.MonkeyPatch, *buckets: int) -> None:
    """Let stages have these buckets only."""
    monkeypatch.setattr(fused_stage, "Graphs", functools.partial(Graphs, buckets=buckets))


def serve(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    """Let this serve GPUs."""
    monkeypatch.setattr(dispatch, "backend_of", lambda device: backend if device.type == "cuda" else "cpu")


class OnGpu(Stages):
    """Stages on a GPU. `steps` says of each step whether it had generated tokens alone, and how many graphs ran."""

    def __init__(self, folder: Path, recorder: Recorder, count: int = 1) -> None:
        super().__init__(folder, count, device="cuda:0")
        self.recorder, self.steps = recorder, list[tuple[bool, int]]()

    def run(self, rows: Any, few: int, *others: Any) -> torch.Tensor:
        before = self.recorder.events.count("replay")
        logits = super().run(rows, few, *others).cpu()
        self.steps.append((few == len(rows), self.recorder.events.count("replay") - before))
        return logits


def texts() -> list[Text]:
    """A prompt by itself, generated tokens by themselves, and a prompt beside them."""
    return [Text([5, 17, 99, 3], new=5), Text([9, 8], arrives=3, new=2)]


@pytest.mark.parametrize(("kind", "count"), [("llama", 2), ("qwen2", 1), ("opt-350m", 1)])
def test_a_prepared_stage_gives_the_tokens_that_it_gives_without_graphs(recorder, folders, monkeypatch, kind, count):
    """Generated tokens are replayed, one graph for each stage; steps with rows of prompts are not."""
    capture(monkeypatch, 1, 4)
    plain, prepared = (OnGpu(folders[kind], recorder, count) for _ in range(2))
    for stage in prepared.stages:
        stage.prepare()
    assert len(recorder.graphs) == 2 * count
    expected, found = texts(), texts()
    assert prepared.generate(found) == plain.generate(expected)
    for mine, theirs in zip(found, expected, strict=True):
        assert_close(torch.stack(mine.logits), torch.stack(theirs.logits), ROUNDED_TO_16_BITS)
    assert {replays for _, replays in plain.steps} == {0}
    assert set(prepared.steps) == {(True, count), (False, 0)}
    assert len(recorder.graphs) == 2 * count and recorder.cuda.races == []


def test_a_sequence_longer_than_planned_runs_without_a_graph(recorder, folder):
    """Its page table is wider than the one that the graphs read."""
    stages = OnGpu(folder, recorder)
    stages.stages[0].prepare()
    for pages, replays in ((TABLE_PAGES, 1), (TABLE_PAGES + 1, 0)):
        stages.run([(5, 0, 0)], 1, [[dict.fromkeys(range(pages), 7)]], [0])
        assert stages.steps[-1] == (True, replays)


def loaded_as_a_worker_does(folder: Path) -> RunningStage:
    found = find_model(folder)
    plan = make_plan(found.spec, [Device("cuda:0", "a GPU", 2**33, "float16")], Workload(context=16))
    return RunningStage(plan, 0, "cuda:0", lambda done, total: None)


@pytest.mark.parametrize(("backend", "captured"), [("triton", 1), ("torch", 0)])
def test_a_worker_captures_when_it_loads_and_only_on_gpus_that_triton_serves(
    recorder, folder, monkeypatch, backend, captured
):
    serve(monkeypatch, backend)
    stage = loaded_as_a_worker_does(folder)
    assert len(recorder.graphs) == captured
    first = np.zeros(1, np.int32)
    stage.run(Step(0, first, first, first, first, 1, np.zeros((1, 1, 1), np.int32)), None)
    assert len(recorder.graphs) == captured and recorder.events.count("replay") == captured


@pytest.mark.parametrize(("device", "backend", "captured"), [(0, "triton", 1), (0, "torch", 0), ("cpu", "triton", 0)])
def test_a_model_in_one_process_is_captured_when_it_is_loaded(recorder, folder, monkeypatch, device, backend, captured):
    serve(monkeypatch, backend)
    model = load_sharded_int8(folder, device, context=16, progress=False)
    assert model.engine is not None and len(recorder.graphs) == captured


@pytest.mark.parametrize("kind", SMALL)
def test_a_plan_has_room_for_what_graphs_read(recorder, folders, monkeypatch, kind):
    """Planned is that as many values are rotated as a token's keys have: never fewer than there are."""
    shapes = []
    monkeypatch.setattr(fused_stage, "compile_steps", lambda run, shape, *_: shapes.append(shape))
    loaded_as_a_worker_does(folders[kind])
    layout, work = find_model(folders[kind]).spec.known_layout, Workload(context=16)
    (shape,) = shapes
    most = layout.sizes.kv_values // 2
    assert (
        shape.table_widths == (1,) * len(layout.groups) and shape.rotated == (0 if kind == "opt-350m" else 16) <= most
    )
    assert graph_input_bytes(layout, work, 2) == dataclasses.replace(shape, rotated=most).input_bytes(GRAPH_ROWS)
