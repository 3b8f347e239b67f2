"""What a plan says is what a load does: the same bytes, through every entry, for every family and setting."""

import json
from dataclasses import replace

import pytest
import torch
from folders import replace as replace_tensor
from tiny import SIZES, save_tiny
from transformers import AutoConfig

from bigint8 import BigInt8Error, CheckpointError, Int8Config, PlanError, Workload, load_sharded_int8
from bigint8.families.table import layout_of
from bigint8.launch import LaunchFlags, _plan_only
from bigint8.options import Access
from bigint8.plan.cut import make_plan
from bigint8.plan.devices import Device
from bigint8.run.running import RunningStage
from bigint8.session import find_model, quantize

SETTINGS = {
    "as it is": Int8Config(),
    "head": Int8Config(int8_head=True),
    "everything": Int8Config(skip_modules=[]),
    "a layer of each block": Int8Config(skip_modules=["down_proj", "fc2", "dense_4h_to_h", "c_proj"]),
    "a block": Int8Config(skip_modules=["model.layers.1", "model.decoder.layers.1", "h.1", "gpt_neox.layers.1"]),
    "projections": Int8Config(skip_modules=["project_in", "lm_head"], int8_head=True),
}
DTYPES = ("float16", "bfloat16", "float32")


def devices(count):
    return [Device("cpu", "a CPU", 2**40, None)] * count


def assert_loaded_as_planned(found, count, config):
    """Over `count` stages in this process, as workers would load them; a tied head as a copy in the last one too."""
    copied = found.spec.with_copied_head() if count > 1 else None
    for spec in filter(None, (found.spec, copied)):
        plan = make_plan(spec, devices(count), spec.workload())
        for stage in plan.stages:
            report = RunningStage(plan, stage.index, "cpu", lambda done, total: None).report
            assert sum(report.device_bytes.values()) == stage.weight_bytes, (config, plan.dtype, stage.index)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", sorted(SIZES))
def test_planned_bytes_are_loaded_bytes_in_every_stage(kind, tied, tmp_path):
    save_tiny(kind, tied, tmp_path)
    for i, (name, config) in enumerate(SETTINGS.items()):
        chosen = config.model_copy(update={"dtype": DTYPES[i % 3]})
        assert_loaded_as_planned(find_model(tmp_path, chosen), 1 + i % 3, name)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype", DTYPES)
def test_planned_bytes_follow_the_stored_dtype(stored, dtype, tmp_path):
    save_tiny("opt-350m", False, tmp_path, stored)
    for count in (1, 2):
        assert_loaded_as_planned(find_model(tmp_path, Int8Config(dtype=dtype)), count, stored)


@pytest.mark.parametrize("table", ["model.embed_tokens.weight", "lm_head.weight"])
def test_a_table_in_another_dtype_than_the_rest_is_planned_as_it_is_stored(table, tmp_path):
    save_tiny("llama", False, tmp_path)
    replace_tensor(tmp_path, table, lambda tensor: tensor.float())
    assert_loaded_as_planned(find_model(tmp_path, Int8Config(dtype="float32")), 2, table)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", sorted(SIZES))
def test_planned_bytes_of_an_int8_checkpoint_are_those_of_its_layers(kind, tied, tmp_path):
    save_tiny(kind, tied, tmp_path / "16")
    for i, name in enumerate(("as it is", "head", "a layer of each block")):
        folder = tmp_path / str(i)
        quantize(tmp_path / "16", folder, SETTINGS[name], progress=False)
        found = find_model(folder, Int8Config(dtype=DTYPES[i % 3]))
        assert_loaded_as_planned(found, 1 + i % 3, name)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", sorted(SIZES))
def test_one_process_loads_what_its_plan_says(kind, tied, tmp_path):
    save_tiny(kind, tied, tmp_path)
    for config in (SETTINGS["a layer of each block"], SETTINGS["head"]):
        for device_map in ("auto", {"": "cpu"}):
            model = load_sharded_int8(tmp_path, device_map, config=config, progress=False)
            assert {s.device.name: s.weight_bytes for s in model.plan.stages} == model.load_report.device_bytes
            weights = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
            assert sum(model.load_report.device_bytes.values()) <= sum(weights.values())


def test_a_plan_on_the_command_line_is_that_of_the_checkpoint(tmp_path, capsys):
    """Not of its config alone: one of its tables is stored in float32."""
    from rich.console import Console

    save_tiny("llama", False, tmp_path / "model")
    replace_tensor(tmp_path / "model", "lm_head.weight", lambda tensor: tensor.float())
    flags = LaunchFlags(
        model=str(tmp_path / "model"), gpus=2, device="cpu", dtype="float32", json_file=tmp_path / "plan.json"
    )
    found = find_model(flags.model, flags.int8(), Access(), weights=False)
    _plan_only(Console(), found, flags)
    planned = json.loads((tmp_path / "plan.json").read_text())["plan"]["stages"]
    plan = make_plan(found.spec, devices(2), found.spec.workload())
    for stage, said in zip(plan.stages, planned, strict=True):
        report = RunningStage(plan, stage.index, "cpu", lambda done, total: None).report
        assert sum(report.device_bytes.values()) == said["weight_bytes"]


def test_skipping_a_layer_that_is_stored_in_int8_is_refused_before_anything_is_planned(tmp_path):
    save_tiny("llama", False, tmp_path / "16")
    quantize(tmp_path / "16", tmp_path / "8", progress=False)
    with pytest.raises(BigInt8Error, match=r"skip_modules names model\.layers\.0\.mlp\.down_proj"):
        find_model(tmp_path / "8", Int8Config(skip_modules=["down_proj"]))


# --- what a plan says is enforced ---


def test_more_tokens_than_planned_are_refused(tmp_path):
    save_tiny("llama", True, tmp_path)
    model = load_sharded_int8(tmp_path, context=32, batch_size=2, progress=False)
    ids = torch.ones(2, 32, dtype=torch.long)
    model(ids)
    model(torch.ones(4, 16, dtype=torch.long))  # no more pages than two sequences of the context
    with pytest.raises(BigInt8Error, match=r"33 tokens in one sequence.*context of 32"):
        model(torch.ones(1, 33, dtype=torch.long))
    with pytest.raises(BigInt8Error, match=r"96 more tokens take 6 pages.*4 of 4.*batch_size="):
        model(torch.ones(3, 32, dtype=torch.long))
    with pytest.raises(BigInt8Error, match="context of 32"):
        model.generate(input_ids=ids, max_new_tokens=2, do_sample=False, pad_token_id=0)
    with pytest.raises(BigInt8Error, match=r"3 sequences of 32 tokens.*2 of 32.*batch_size="):
        model(torch.ones(3, 32, dtype=torch.long), output_hidden_states=True)  # through the model's own modules


def test_a_sliding_window_needs_no_more_pages_than_it_sees(tmp_path):
    save_tiny("mistral", True, tmp_path)
    model = load_sharded_int8(tmp_path, context=128, progress=False)
    assert model.plan.pages == (8,)
    model(torch.ones(1, 128, dtype=torch.long))
    model(torch.ones(2, 64, dtype=torch.long))
    with pytest.raises(BigInt8Error, match="pages"):
        model(torch.ones(9, 16, dtype=torch.long))


@pytest.mark.parametrize("values", [{"context": 0}, {"sequences": 0}, {"chunk": 0}, {"context": -3}])
def test_less_than_one_of_anything_is_no_workload(values):
    with pytest.raises(PlanError, match="at least 1"):
        Workload(**values)


# --- what config.json leaves out ---


@pytest.mark.parametrize(
    "model_type", ["llama", "mistral", "qwen2", "qwen3", "opt", "bloom", "gpt_neox", "gpt2", "phi"]
)
def test_a_key_that_config_json_lacks_counts_as_transformers_takes_it(model_type):
    """But for the sizes that make a model: these are asked for."""
    full = AutoConfig.for_model(model_type).to_dict()
    full.pop("layer_types", None)
    expected, refused = layout_of(full).sizes, []
    for key in full:
        try:
            assert layout_of({name: value for name, value in full.items() if name != key}).sizes == expected, key
        except (PlanError, KeyError):
            refused.append(key)
    assert set(refused) <= {
        "model_type", "vocab_size", "hidden_size", "n_embd", "num_hidden_layers", "n_layer"
    } and "model_type" in refused  # fmt: skip


def test_a_load_that_takes_other_bytes_than_planned_is_refused_before_it_reads(tmp_path):
    save_tiny("llama", False, tmp_path)
    found = find_model(tmp_path)
    plan = make_plan(found.spec, devices(1), found.spec.workload())
    wrong = replace(plan, stages=(replace(plan.stages[0], weight_bytes=1000),))
    with pytest.raises(PlanError, match="stage 0 was planned with 1,000 bytes"):
        RunningStage(wrong, 0, "cpu", lambda done, total: None)


def test_a_tensor_that_no_stage_has_is_refused_by_name(tmp_path):
    save_tiny("llama", False, tmp_path)
    found = find_model(tmp_path)
    plan = make_plan(found.spec, devices(1), found.spec.workload())
    modules = tuple(name for name in plan.stages[0].modules if name != "model.norm")
    wrong = replace(plan, stages=(replace(plan.stages[0], modules=modules),))
    with pytest.raises(CheckpointError, match=r"'model\.norm\.weight' is in no stage"):
        RunningStage(wrong, 0, "cpu", lambda done, total: None)
