"""A head that is tied to the embeddings, as a copy of them in the last stage: planned where it is better, exact in
bytes, with the results that it has beside the embeddings."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from staged import SeveralStages
from test_families import slot_bytes, stage_of
from test_planner import CORE, SHORT, devices_with, preset, spec_with
from tiny import SIZES, save_tiny, tiny_config

from bigint8 import Int8Config, PlanError, load_sharded_int8, plan_command
from bigint8.checkpoint.headers import open_checkpoint
from bigint8.compare_plans import our_cut
from bigint8.families.table import layout_of
from bigint8.load.device_map import place
from bigint8.model.config import read_hf_config
from bigint8.model.skeleton import build_skeleton, skeleton_of
from bigint8.options import Access, Workload
from bigint8.plan.cut import make_plan
from bigint8.plan.devices import Box, preset_gpus
from bigint8.plan.memory import cpu_row_bytes
from bigint8.plan.predict import PlanTimes, predict
from bigint8.run.driver import PipelineModel
from bigint8.run.engine import Engine
from bigint8.session import find_model, quantize
from bigint8.simulation.load import Load
from bigint8.simulation.simulate import simulate

# --- bytes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("int8_head", [False, True], ids=["head16", "head8"])
@pytest.mark.parametrize("kind", sorted(SIZES))
def test_stage_bytes_are_those_of_the_real_stage_with_its_copy(kind, int8_head):
    int8 = Int8Config(int8_head=int8_head)
    tied = layout_of(tiny_config(kind, True).to_dict(), int8)
    layout, blocks = tied.with_copied_head(), len(tied.blocks)
    for dtype, size in ((torch.float16, 2), (torch.float32, 4)):
        for first, last in ((0, 1), (1, 2), (blocks - 1, blocks)):
            stage = stage_of(build_skeleton(tiny_config(kind, True), int8, dtype), layout, first, last)
            assert layout.part(first, last).weight_bytes(size) == slot_bytes(stage.slots), (first, last)
            assert (stage.is_first, stage.has_head) == (first == 0, last == blocks)
        copy = layout.weight_bytes(size) - tied.weight_bytes(size)
        assert copy == tied.first[0].part.weight_bytes(size) > 0


@pytest.mark.parametrize("int8_head", [False, True], ids=["head16", "head8"])
@pytest.mark.parametrize("kind", ["llama", "opt-350m", "bloom"])
def test_a_copy_of_a_table_that_stays_16_bit_in_a_float32_model_is_16_bit(kind, int8_head, tmp_path):
    found = find_model(save_tiny(kind, True, tmp_path), Int8Config(int8_head=int8_head))
    layout = found.spec.known_layout.with_copied_head()
    last = len(layout.blocks)
    stage = stage_of(skeleton_of(found.checkpoint, found.spec, "float32"), layout, last - 1, last)
    assert layout.part(last - 1, last).weight_bytes(4) == slot_bytes(stage.slots)
    table = layout.sizes.vocab * layout.sizes.width
    assert layout.head.part.weight_bytes(4) == (table + 4 * layout.sizes.vocab if int8_head else 2 * table)


@pytest.mark.parametrize("kind", sorted(SIZES))
def test_an_int8_head_and_a_copied_one_are_the_same_layout_whichever_came_first(kind):
    tied = layout_of(tiny_config(kind, True).to_dict())
    assert tied.with_int8_head().with_copied_head() == tied.with_copied_head().with_int8_head()


# --- which of the two is planned ---------------------------------------------------------------------------------

LIGHT, HEAVY, TABLE = 10**8, 3 * 10**8, 10**8


def test_the_copy_is_planned_where_the_slowest_stage_is_faster_with_it():
    spec = spec_with([LIGHT, LIGHT, HEAVY, HEAVY], embeddings=TABLE)
    plan = make_plan(spec, devices_with([2**33] * 2), SHORT)
    ring = make_plan(replace(spec, one_process=True), devices_with([2**33] * 2), SHORT)
    assert (plan.copied_head_bytes, ring.copied_head_bytes) == (2 * TABLE, 0)
    assert [stage.last_block for stage in plan.stages] == [3, 4]
    assert slowest(plan) < slowest(ring)
    assert [stage.weight_bytes for stage in plan.stages] == [2 * LIGHT + HEAVY + 2 * TABLE, HEAVY + 2 * TABLE]
    assert plan.notes == (
        "the output head is a copy of the embeddings in the last stage (190.73 MiB): with the head in the first stage, "
        "the slowest stage would be slower",
    )


def slowest(plan):
    return max(PlanTimes(plan).decode(1, plan.workload.context).stages)


@pytest.mark.parametrize("sizes", [[LIGHT] * 4, [HEAVY, HEAVY, LIGHT, LIGHT]])
def test_the_ring_is_planned_where_the_slowest_stage_is_as_fast_with_it(sizes):
    plan = make_plan(spec_with(sizes, embeddings=TABLE), devices_with([2**33] * 2), SHORT)
    assert len(plan.stages) == 2 and plan.copied_head_bytes == 0 and plan.notes == ()
    assert plan.stages[0].modules[-1] == "head" and plan.to_dict()["copied_head_bytes"] == 0


def test_for_latency_the_copy_saves_the_way_back_to_the_first_stage():
    spec, gpus = preset("opt-30b"), preset_gpus("rtx-3090", 2)
    plan = make_plan(spec, gpus, Workload(), "latency")
    ring = make_plan(replace(spec, one_process=True), gpus, Workload(), "latency")
    assert len(plan.stages) == len(ring.stages) == 2 and ring.copied_head_bytes == 0
    assert plan.copied_head_bytes == 2 * 50272 * 7168
    with_it, without = PlanTimes(plan).decode(1, 2048), PlanTimes(ring).decode(1, 2048)
    assert with_it.seconds == pytest.approx(without.seconds - PlanTimes(ring).hop_seconds(1, 1))
    assert plan.notes == (
        "the output head is a copy of the embeddings in the last stage (687.31 MiB): so a step need not go back to the "
        "first stage",
    )
    assert plan.stages[-1].modules[-1] == "lm_head" and "lm_head" not in plan.stages[0].modules
    told = json.loads(json.dumps(plan.to_dict()))
    assert told["copied_head_bytes"] == plan.copied_head_bytes and told["notes"] == list(plan.notes)


def test_a_model_on_one_device_has_no_copy():
    for objective in ("throughput", "latency"):
        plan = make_plan(preset("opt-6.7b"), preset_gpus("rtx-3090", 1), Workload(), objective)
        assert len(plan.stages) == 1 and plan.copied_head_bytes == 0
    assert len(make_plan(preset("opt-6.7b"), preset_gpus("rtx-3090", 2), Workload(), "latency").stages) == 1


def test_for_latency_the_ring_is_planned_where_the_copy_has_no_room():
    spec = preset("opt-30b", Int8Config(int8_head=False))
    gpus = preset_gpus("rtx-3090", 2)
    draft = make_plan(replace(spec, one_process=True), gpus, Workload())
    needed = max(gpus[0].usable_bytes - stage.headroom_bytes for stage in draft.stages)
    small = [replace(gpu, usable_bytes=int(needed * 1.011)) for gpu in gpus]
    assert make_plan(spec, small, Workload(), "latency").copied_head_bytes == 0
    roomy = [replace(gpu, usable_bytes=int(needed * 1.05)) for gpu in gpus]
    assert make_plan(spec, roomy, Workload(), "latency").copied_head_bytes > 0


def long_positions():
    """A model whose first stage has more than a block's bytes in positions, and whose head needs as much on a CPU."""
    sizes = {"vocab_size": 30_000, "hidden_size": 16, "num_attention_heads": 1, "ffn_dim": 16, "num_hidden_layers": 4}
    config = {"model_type": "opt", "word_embed_proj_dim": 16, "max_position_embeddings": 30_000, **sizes}
    int8 = Int8Config(int8_head=False)
    spec = preset("opt-125m", int8)
    return replace(spec, config=config, layout=layout_of(config, int8, "float16"))


def test_the_copy_is_planned_where_the_head_has_no_room_in_the_first_stage():
    spec, work = long_positions(), Workload(context=64)
    cores = [replace(CORE, usable_bytes=2**40)] * 2
    needed = []
    for variant in (spec, spec.with_copied_head()):
        plan = make_plan(replace(variant, one_process=True), cores, work)
        needed.append(max(2**40 - stage.headroom_bytes for stage in plan.stages))
    assert needed[1] < needed[0]
    small = [replace(CORE, usable_bytes=sum(needed) // 2)] * 2
    plan = make_plan(spec, small, work)
    assert plan.copied_head_bytes == 2 * 30_000 * 16
    assert all(stage.headroom_bytes >= 0 for stage in plan.stages)
    assert plan.notes[0].endswith("with the head in the first stage, the model would not fit, or only barely")
    with pytest.raises(PlanError):
        make_plan(replace(spec, one_process=True), small, work)


def test_a_ring_over_boxes_counts_the_network_back_and_a_copy_does_not():
    """For latency. The ring's way back is over the network too, so it is worth a copy all the more."""
    gpus = preset_gpus("rtx-3090", 2)
    apart = [gpus[0], replace(gpus[1], box=Box("another"))]
    plan = make_plan(preset("opt-30b"), apart, Workload(), "latency")
    ring = make_plan(replace(preset("opt-30b"), one_process=True), apart, Workload(), "latency")
    there, back = PlanTimes(ring).decode(1, 2048).hops
    assert back > there * 0.9 and plan.copied_head_bytes > 0
    assert predict(plan).token_seconds == pytest.approx(predict(ring).token_seconds - PlanTimes(ring).hop_seconds(1, 1))


# --- times -------------------------------------------------------------------------------------------------------


def test_the_last_stage_computes_the_copy_and_answers_the_driver():
    spec = preset("smollm2-135m")
    plan = make_plan(spec.with_copied_head(), [CORE] * 3, Workload(512, 4))
    ring = make_plan(replace(spec, one_process=True), [CORE] * 3, Workload(512, 4))
    times = PlanTimes(plan)
    assert (times.is_ring, times.head_stage) == (False, 2)
    assert (PlanTimes(ring).is_ring, PlanTimes(ring).head_stage) == (True, 0)
    assert times.head == PlanTimes(ring).head
    decode = times.decode(4, 300)
    assert decode.stages[0] < PlanTimes(ring).decode(4, 300).stages[0]
    assert times.hop_seconds(2, 4) == 0.0 < PlanTimes(ring).hop_seconds(2, 4)
    assert our_cut(spec.with_copied_head(), preset_gpus("rtx-3060", 2), Workload()) is not None


def test_a_request_alone_takes_what_is_predicted_with_a_copy():
    plan = make_plan(preset("smollm2-135m").with_copied_head(), [CORE] * 3, Workload(512, 4))
    times, found = PlanTimes(plan), simulate(plan, Load(1, prompt_tokens=64, new_tokens=20))
    assert found.first_token.most_seconds == pytest.approx(predict(plan, prompt=64).prompt_seconds)
    later = sum(times.decode(1, 64 + n).seconds for n in range(1, 20))
    assert found.seconds == pytest.approx(found.first_token.most_seconds + later)


# --- one process has each tensor once ----------------------------------------------------------------------------


def test_a_plan_with_a_copy_has_no_device_map_and_the_same_model_for_one_process_has():
    spec, gpus = preset("opt-30b"), preset_gpus("rtx-3090", 2)
    with pytest.raises(PlanError, match=r"a device map is for one process.*one_process=True"):
        make_plan(spec, gpus, Workload(), "latency").device_map()
    devices = make_plan(replace(spec, one_process=True), gpus, Workload(), "latency").device_map()
    assert devices["lm_head"] == devices["model.decoder.embed_tokens"] == "cuda:0"


def test_the_command_says_that_there_is_a_copy_and_prints_a_device_map_without(run, tmp_path):
    asked = ("opt-30b", "--gpus", "2", "--gpu-type", "rtx-3090", "--objective", "latency")
    told = run(plan_command, *asked, "--json", tmp_path / "plan.json")
    assert "the output head is a copy of the embeddings in the last stage (687.31 MiB)" in " ".join(told.out.split())
    assert json.loads((tmp_path / "plan.json").read_text())["plan"]["copied_head_bytes"] == 2 * 50272 * 7168
    printed = json.loads(run(plan_command, *asked, "--device-map").out)
    assert printed["lm_head"] == printed["model.decoder.embed_tokens"]


def test_what_is_loaded_into_one_process_is_planned_without_a_copy(tmp_path, monkeypatch):
    found = find_model(save_tiny("qwen2", True, tmp_path))
    gpus = [replace(gpu, fast_16bit="float16") for gpu in preset_gpus("rtx-3090", 2)]
    assert make_plan(found.spec, gpus, Workload(128)).copied_head_bytes > 0
    monkeypatch.setattr("bigint8.load.device_map.cuda_devices", lambda: gpus)
    plan = place(found.spec, found.opened(), Workload(128), "auto").plan
    assert len(plan.stages) == 2 and plan.copied_head_bytes == 0


# --- results -----------------------------------------------------------------------------------------------------

WORK = Workload(context=96, sequences=3)
PADDED = torch.tensor([[0, 0, 0, 5, 17], [9, 8, 7, 6, 5], [0, 0, 33, 44, 55]])


engines = []


@pytest.fixture(autouse=True)
def engines_end_with_their_test():
    yield
    while engines:
        engines.pop().close()


def over_stages(folder, count, copied, **int8):
    """A model over stages in this process, loaded as workers load them: as transformers knows it, and the stages."""
    found = find_model(folder, Int8Config(**({"dtype": "float32"} | int8)))
    spec = found.spec.with_copied_head() if copied else replace(found.spec, one_process=True)
    plan = make_plan(spec, [CORE] * count, WORK)
    assert len(plan.stages) == count and bool(plan.copied_head_bytes) == copied
    stages = SeveralStages(plan)
    engines.append(Engine.of(plan, stages))
    return PipelineModel(read_hf_config(found.opened(), Access()), engines[-1], plan), stages.stages


def in_one_process(folder, dtype="float32", **int8):
    config = Int8Config(**int8)
    return load_sharded_int8(folder, "cpu", config=config, dtype=dtype, context=96, batch_size=3, progress=False)


def answers(model):
    """Tokens of a padded batch, greedily, and the logits of its prompts."""
    asked = {"attention_mask": (PADDED != 0).long()}
    tokens = model.generate(PADDED, max_new_tokens=12, do_sample=False, pad_token_id=0, **asked)
    with torch.no_grad():
        return tokens, model(PADDED, **asked).logits


@pytest.mark.parametrize("int8_head", [False, True], ids=["head16", "head8"])
@pytest.mark.parametrize("kind", sorted(SIZES))
def test_tokens_and_logits_are_those_of_the_ring_and_of_one_process(kind, int8_head, tmp_path):
    save_tiny(kind, True, tmp_path)
    tokens, logits = answers(in_one_process(tmp_path, int8_head=int8_head))
    assert len(set(tokens[:, 5:].flatten().tolist())) > 3
    for count in (2, 3):
        model, stages = over_stages(tmp_path, count, True, int8_head=int8_head)
        ours, ring = answers(model), answers(over_stages(tmp_path, count, False, int8_head=int8_head)[0])
        assert torch.equal(ours[0], tokens) and torch.equal(ring[0], tokens), f"{count} stages"
        assert torch.equal(ours[1], ring[1]) and torch.allclose(ours[1], logits, atol=1e-5), f"{count} stages"
        held = [sum(stage.report.device_bytes.values()) for stage in stages]
        assert held == [stage.weight_bytes for stage in model.plan.stages], "what was planned, to the byte"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("kind", ["llama", "bloom"])
def test_a_copy_keeps_a_16_bit_dtype(kind, dtype, tmp_path):
    save_tiny(kind, True, tmp_path)
    tokens, logits = answers(in_one_process(tmp_path, dtype))
    found = answers(over_stages(tmp_path, 2, True, dtype=dtype)[0])
    assert torch.equal(found[0], tokens) and torch.equal(found[1], logits)


@pytest.mark.parametrize("int8_head", [False, True], ids=["head16", "head8"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt-350m", "bloom"])
def test_a_copy_of_an_int8_checkpoint_is_that_of_its_source(kind, int8_head, tmp_path):
    source = save_tiny(kind, True, tmp_path / "source")
    quantize(source, tmp_path / "int8", Int8Config(int8_head=int8_head), progress=False)
    expected = answers(over_stages(source, 3, True, int8_head=int8_head)[0])
    model, stages = over_stages(tmp_path / "int8", 3, True)
    found = answers(model)
    assert all(map(torch.equal, found, expected))
    assert all(stage.report.bytes_mapped > 0 and stage.report.unused == [] for stage in stages)
    held = [sum(stage.report.device_bytes.values()) for stage in stages]
    assert held == [stage.weight_bytes for stage in model.plan.stages]


def test_the_first_and_the_last_stage_read_the_embeddings_and_no_other_tensor_is_read_twice(tmp_path):
    save_tiny("llama", True, tmp_path)
    _, stages = over_stages(tmp_path, 3, True)
    tensors = open_checkpoint(tmp_path).tensors
    read = {name: [] for name in tensors}
    for index, stage in enumerate(stages):
        report = stage.report
        assert report.bytes_read == sum(stop - start for _, start, stop in report.byte_ranges)
        for name, tensor in tensors.items():
            ranges = [(start, stop) for file, start, stop in report.byte_ranges if file == tensor.file.name]
            if any(tensor.start < stop and start < tensor.stop for start, stop in ranges):
                read[name].append(index)
    assert read.pop("model.embed_tokens.weight") == [0, 2]
    assert all(len(stages) == 1 for stages in read.values())


def test_the_embeddings_fill_the_copy_where_the_checkpoint_has_the_head_too(tmp_path):
    """Of a tied pair that is saved twice, the embeddings count, in one process and in every stage."""
    save_tiny("llama", True, tmp_path, shard="10GB")
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = torch.zeros_like(tensors["model.embed_tokens.weight"])
    save_file(tensors, tmp_path / "model.safetensors")
    expected = answers(in_one_process(tmp_path))
    model, stages = over_stages(tmp_path, 2, True)
    assert torch.equal(answers(model)[0], expected[0])
    assert [stage.report.unused for stage in stages] == [["lm_head.weight"]] * 2


@pytest.mark.parametrize("kind", sorted(SIZES))
def test_the_rows_that_a_stage_keeps_are_those_that_its_plan_counts(kind, tmp_path):
    """The memory for the head's rows is the last stage's, and no longer the first one's."""
    save_tiny(kind, True, tmp_path)
    model, stages = over_stages(tmp_path, 2, True)
    kept = cpu_row_bytes(model.plan.spec.known_layout, WORK)
    first, last = (stage._stage.row_bytes for stage in stages)
    assert (first, last) == (kept["blocks"] + kept["before"], kept["blocks"] + kept["after"] + kept["head"])
