"""What a device does in a second: kept, read again, shared among workers; and measured with real steps."""

import json
from dataclasses import asdict, fields, replace

import pytest
import torch

from bigint8 import measure_speed
from bigint8.errors import BigInt8Error
from bigint8.families.table import layout_of
from bigint8.options import Int8Config, Workload
from bigint8.plan.cut import make_plan
from bigint8.plan.devices import Device, cpu_device, preset_gpus
from bigint8.plan.predict import PlanTimes, predict
from bigint8.plan.spec import spec_of
from bigint8.plan.speed import (
    UNKNOWN_CORE,
    MeasuredSpeeds,
    cpu_speed,
    measured_gpu,
    save_speeds,
    shared_cpu_speed,
    speeds_file,
)
from bigint8.plan.time import Rows, TimeModel
from bigint8.simulation.load import Load
from bigint8.simulation.simulate import simulate
from bigint8.sources.find import find_source


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BIGINT8_CACHE", str(tmp_path))


FAST = replace(UNKNOWN_CORE, read_bytes_per_s=30e9, row_ops_per_s=2e11, source="measured")


def test_what_was_measured_takes_the_place_of_what_is_assumed():
    before = cpu_device()
    assert before.speed.source.startswith("assumed")
    file = save_speeds(before.model, {1: FAST, 2: FAST})
    assert file == speeds_file() and cpu_device().speed.source == "measured"
    save_speeds("NVIDIA GeForce RTX 3090", {1: replace(FAST, read_bytes_per_s=8e11)})
    assert preset_gpus("rtx-3090", 1)[0].speed.read_bytes_per_s == 8e11
    assert cpu_device().speed.source == "measured"  # the other's is kept
    assert measured_gpu("NVIDIA GeForce RTX 4090") is None


@pytest.mark.parametrize(
    "text",
    ["{", "[]", '{"a CPU": {"1": 5}}', json.dumps({"a CPU": {"1": asdict(replace(FAST, read_bytes_per_s=-1.0))}})],
    ids=["no JSON", "a list", "no speeds", "a negative rate"],
)
def test_a_damaged_file_of_speeds_is_refused_by_name(text):
    speeds_file().parent.mkdir(parents=True, exist_ok=True)
    speeds_file().write_text(text)
    with pytest.raises(BigInt8Error, match=r"speeds\.json: .*doctor --save"):
        cpu_speed("a CPU", 1)


def test_a_file_of_an_older_version_is_as_none():
    older = {name: value for name, value in asdict(FAST).items() if name != "prompt_values_per_s"}
    speeds_file().parent.mkdir(parents=True, exist_ok=True)
    speeds_file().write_text(json.dumps({"a CPU": {"1": older}}))
    assert cpu_speed("a CPU", 1) == UNKNOWN_CORE


def test_workers_that_compute_together_share_what_the_memory_gives():
    save_speeds("a CPU", {1: FAST, 2: replace(FAST, read_bytes_per_s=36e9, cache_bytes_per_s=30e9)})
    shared = shared_cpu_speed("a CPU", 1, 2)
    assert shared == replace(FAST, read_bytes_per_s=18e9)  # half of 30e9 is more than one reads


def test_more_cores_compute_more_and_read_no_more_than_was_measured():
    one, two = FAST, replace(FAST, read_bytes_per_s=36e9, row_ops_per_s=4e11)
    measured = MeasuredSpeeds({1: one, 2: two})
    assert measured.of(2) == two
    eight = measured.of(8)
    assert eight.row_ops_per_s == 1.6e12 and eight.read_bytes_per_s == 36e9


def test_workers_that_share_a_cpu_have_a_core_each():
    save_speeds(cpu_device().model, {1: replace(FAST, source="one core"), 64: replace(FAST, source="64 cores")})
    assert cpu_device(share=10**6).speed.source == "one core"


def test_a_step_reads_its_weights_once_and_computes_every_further_row():
    layout = layout_of(spec_of(find_source("tinyllama-1.1b", fetch=False)).config, Int8Config(), "bfloat16")
    times, part = TimeModel(layout, 2), layout.blocks[0].part
    one, nine = (times.block_seconds(0, FAST, Rows(decode=rows)) for rows in (1, 9))
    assert one == pytest.approx(FAST.block_seconds + part.weight_bytes(2) / FAST.read_bytes_per_s)
    operations = 2 * (part.int8_values / FAST.row_ops_per_s + part.other_values / FAST.float_row_ops_per_s)
    assert nine - one == pytest.approx(8 * operations)
    seen = times.block_seconds(0, FAST, Rows(decode=9, context=100)) - nine
    assert seen == pytest.approx(9 * 100 * layout.sizes.kv_values * 2 / FAST.cache_bytes_per_s)


def test_a_sliding_window_bounds_what_a_token_reads():
    config = {
        "model_type": "mistral", "hidden_size": 64, "num_hidden_layers": 1, "vocab_size": 100, "sliding_window": 128,
        "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 128,
    }  # fmt: skip
    times = TimeModel(layout_of(config, Int8Config(), "bfloat16"), 2)
    seconds = [times.block_seconds(0, FAST, Rows(decode=1, context=context)) for context in (64, 128, 4096)]
    assert seconds[0] < seconds[1] == seconds[2]


def test_a_prediction_adds_up():
    spec = spec_of(find_source("tinyllama-1.1b", fetch=False))
    plan = make_plan(spec, [Device("cpu", "a core", 2**33, None, FAST)] * 2, Workload(1024, 16))
    found = predict(plan)
    assert (found.rows, found.groups) == (8, 2)
    slowest = max(stage.decode_seconds for stage in found.stages)
    assert found.token_seconds == pytest.approx(2 * slowest) and found.tokens_per_s == pytest.approx(8 / slowest)
    alone = predict(plan, sequences=1)
    total = sum(stage.decode_seconds + stage.hop_seconds for stage in alone.stages)
    assert alone.token_seconds == pytest.approx(total) and alone.tokens_per_s < found.tokens_per_s


@pytest.mark.parametrize("tokens", [40, 300, 1000])
@pytest.mark.parametrize("stages", [1, 2, 3])
def test_a_prompt_takes_as_long_as_in_the_simulation_with_the_scheduler_that_runs(stages, tokens):
    spec = spec_of(find_source("tinyllama-1.1b", fetch=False))
    plan = make_plan(spec, [Device("cpu", "a core", 2**33, None, FAST)] * stages, Workload(2048, 1))
    simulated = simulate(plan, Load(1, prompt_tokens=tokens, new_tokens=1)).first_token.mean_seconds
    assert PlanTimes(plan).prompt_seconds(tokens) == pytest.approx(simulated, rel=0.03)


def test_every_rate_is_measured_with_real_steps(monkeypatch):
    for name, value in {
        "HIDDEN": 128, "BLOCKS": 2, "SMALL_HIDDEN": 64, "SMALL_BLOCKS": 1, "CONTEXT": 512, "HEAD_ROWS": 512,
        "COPY_BYTES": 2**20,
    }.items():  # fmt: skip
        monkeypatch.setattr(measure_speed, name, value)
    threads = torch.get_num_threads()
    speeds = dict(measure_speed.measure_device(cpu_device()))
    assert 1 in speeds and torch.get_num_threads() == threads
    for speed in speeds.values():
        assert all(getattr(speed, field.name) > 0 for field in fields(speed) if field.name != "source")
        assert speed.source.startswith("measured")
    save_speeds(cpu_device().model, speeds)
    assert cpu_device().speed in speeds.values()
