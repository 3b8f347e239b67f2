"""Models that are larger than their devices: blocks that no device holds are brought in as int8, ahead of their use."""

import contextlib
import gc
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pretend import pretending
from pretend_cuda import Event, PretendCuda, Stream, install
from ragged import Stages, texts
from rich.console import Console
from safetensors.torch import save_file
from test_workers import WORK, AsOneStage
from tiny import SIZES, save_tiny, tiny_config, tiny_model
from transformers import AutoModelForCausalLM

from bigint8 import BigInt8Error, Int8Config, PlanError, Workload, load_sharded_int8, open_pipeline
from bigint8.load import device_map
from bigint8.model import offload
from bigint8.model_pipeline import ModelPipeline
from bigint8.options import PREFILL_CHUNK, Cluster
from bigint8.plan.cut import make_plan
from bigint8.plan.offload import Spill
from bigint8.plan.plan import Plan, Stage
from bigint8.run.pipeline import Pipeline
from bigint8.run.stages import LocalStages
from bigint8.session import find_model, quantize
from bigint8.terminal.tables import print_plan
from bigint8.units import MIB

PROMPT = torch.tensor([[5, 17, 99, 3, 42, 7]])
LONG = torch.arange(1, 91).view(1, -1)  # more rows than stay 16-bit: its activations are int8


@pytest.fixture(autouse=True)
def no_shorter_chunks(monkeypatch):
    """These models are so small that a shorter chunk of a prompt would save more than some blocks."""
    monkeypatch.setattr("bigint8.plan.cut.SHORTER_CHUNKS", (PREFILL_CHUNK,))


def load(folder, saving=None, **settings):
    """The model within what it needs less `saving` bytes, by default with all it asks for. Its head stays 16-bit."""
    options = {"config": Int8Config(int8_head=False), "context": 128, "progress": False} | settings
    if saving is None:
        return load_sharded_int8(folder, **options)
    (whole,) = load_sharded_int8(folder, **options).plan.stages
    return load_sharded_int8(folder, max_memory={"cpu": whole.needed_bytes - saving}, **options)


def tokens(model, prompt=PROMPT, new=16):
    mask = torch.ones_like(prompt)
    return model.generate(prompt, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=0).tolist()


def block_bytes(model) -> int:
    """What a block's int8 weights take."""
    return int(model.plan.spec.known_layout.blocks[0].part.int8_values)


def the_stage(model) -> Stage:
    (stage,) = model.plan.stages
    return stage


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", sorted(SIZES))
def test_offloaded_blocks_give_the_tokens_and_logits_of_those_that_stay(kind, tied, tmp_path):
    save_tiny(kind, tied, tmp_path)
    expected = load(tmp_path)
    model = load(tmp_path, block_bytes(expected) * 3 // 2)
    assert len(the_stage(model).disk_blocks) == 4 and model.engine is not None
    for prompt in (PROMPT, LONG):
        assert tokens(model, prompt) == tokens(expected, prompt)
        assert torch.equal(model(prompt).logits, expected(prompt).logits)


def tight_plan(folder, devices, blocks):
    """A plan over the devices, each with room for all but so many blocks of its stage."""
    found = find_model(folder, Int8Config(dtype="float32"))
    plan = make_plan(found.spec, devices, WORK)
    size = found.spec.known_layout.blocks[0].part.int8_values
    tight = [replace(stage.device, usable_bytes=stage.needed_bytes - blocks * size) for stage in plan.stages]
    return plan, make_plan(found.spec, tight, WORK, spill=Spill(disk_bytes=2**30))


@pytest.mark.parametrize("stored", ["16-bit", "int8"])
@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_two_workers_that_offload_give_the_tokens_of_two_that_do_not(pipeline, kind, stored, tmp_path):
    folder = tmp_path / "model"
    tiny_model(kind, kind == "opt", num_hidden_layers=9).save_pretrained(folder)
    if stored == "int8":
        quantize(folder, tmp_path / "int8", progress=False)
        folder = tmp_path / "int8"
    given = []
    for plan in tight_plan(folder, pipeline.devices()[:2], blocks=2):
        reports = pipeline.load(plan, progress=False)
        for stage, report in zip(plan.stages, reports, strict=True):
            assert report.device_bytes.get("disk", 0) == stage.disk_bytes
            assert report.device_bytes["cpu"] == stage.weight_bytes
        stages, ours = Stages(folder, 1), texts()
        stages.stages = [AsOneStage(pipeline)]
        given.append((plan, stages.generate(ours), torch.stack([torch.stack(text.logits) for text in ours])))
    (whole, tokens, logits), (offloaded, ours, our_logits) = given
    assert not whole.is_offloaded and all(stage.disk_blocks for stage in offloaded.stages)
    assert ours == tokens and torch.equal(our_logits, logits)


def test_a_pipeline_of_one_device_that_is_too_small_offloads_without_a_flag(tmp_path, monkeypatch, capsys):
    save_tiny("llama", True, tmp_path)
    workload = Workload(context=128)
    with open_pipeline(tmp_path, workload=workload, progress=False) as pipe:
        expected, (whole,) = pipe.generate([PROMPT[0].tolist()], max_new_tokens=12, do_sample=False), pipe.plan.stages
    small = replace(whole.device, usable_bytes=whole.needed_bytes - 20_000)
    monkeypatch.setattr("bigint8.model_pipeline.find_devices", lambda *args: ([small], None))
    with open_pipeline(tmp_path, config=Int8Config(int8_head=False), workload=workload, progress=False) as pipe:
        found = pipe.generate([PROMPT[0].tolist()], max_new_tokens=12, do_sample=False)
        assert pipe.plan.is_offloaded and found == expected
        print_plan(Console(width=200), pipe.plan)
    shown = capsys.readouterr().out
    assert "elsewhere" in shown and "Note: offloaded as int8, of 5 blocks" in shown


# --- limits --------------------------------------------------------------------------------------------------------

GROWTH = """
import sys, torch
from bigint8 import BigInt8Error, Int8Config, PlanError, Workload, load_sharded_int8, open_pipeline
from test_offload import LONG, load, tokens

def resident(key):
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))

folder, small, limit = sys.argv[1:]
tokens(load(small), LONG)  # libraries, kernels and threads are there
before = resident("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # the peak is counted from here on
model = load_sharded_int8(folder, max_memory={"cpu": int(limit)}, context=128, progress=False)
found = tokens(model, LONG, 4)
print(resident("VmHWM") - before, len(model.plan.stages[0].disk_blocks), found)
"""


def save_wide(folder: Path) -> None:
    """A Llama of 28 blocks of 7 MB in int8: rows that repeat are made at once."""
    sizes = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 28, "num_attention_heads": 12}
    config = tiny_config("llama", True, **sizes, num_key_value_heads=12)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in AutoModelForCausalLM.from_config(config).named_parameters()}
    torch.manual_seed(0)
    weights = {
        name: (torch.randn(16, *shape[1:]) / 20).half().repeat(shape[0] // 16, *[1] * (len(shape) - 1))
        for name, shape in shapes.items()
    }
    folder.mkdir()
    config.save_pretrained(folder)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.skipif(sys.platform != "linux", reason="reads what Linux says of a process's memory")
def test_a_model_of_three_times_its_limit_stays_within_it(tmp_path):
    """Really resident, of a process of its own, while it loads and while it runs."""
    save_wide(tmp_path / "wide")
    save_tiny("llama", True, tmp_path / "tiny")
    expected = load(tmp_path / "wide")
    whole, room = the_stage(expected), 5 * block_bytes(expected)
    assert whole.weight_bytes > 5 * room
    limit = whole.needed_bytes - whole.weight_bytes + room
    given = [str(tmp_path / "wide"), str(tmp_path / "tiny"), str(limit)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parent)])}
    ended = subprocess.run(
        [sys.executable, "-c", GROWTH, *given],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    growth, offloaded, found = ended.stdout.split(maxsplit=2)
    assert int(growth) < limit + 4 * MIB < whole.weight_bytes, f"{int(growth):,} of {limit:,}"
    assert int(offloaded) > 20 and found.strip() == str(tokens(expected, LONG, 4))


def test_planned_bytes_are_loaded_bytes_and_buffers(tmp_path):
    save_tiny("llama", False, tmp_path)
    size = block_bytes(load(tmp_path))
    model = load(tmp_path, 2 * size)
    stage = the_stage(model)
    assert len(stage.disk_blocks) == 4 and stage.disk_bytes == 4 * size and stage.buffer_bytes == 2 * size
    assert model.load_report.device_bytes == {"cpu": stage.weight_bytes, "disk": stage.disk_bytes}


def test_a_model_that_fits_is_not_offloaded(tmp_path):
    save_tiny("llama", False, tmp_path)
    model = load(tmp_path, 0)
    assert not model.plan.is_offloaded and not model.plan.notes and model.hf_device_map == {"": "cpu"}


def test_what_is_offloaded_is_said(tmp_path):
    save_tiny("llama", False, tmp_path)
    model = load(tmp_path, 1)
    assert any("offloaded as int8, of 5 blocks: 3 in files" in note for note in model.plan.notes)
    assert list(model.hf_device_map.values()).count("disk") == 3


@pytest.mark.usefixtures("on_running_workers")
def test_workers_of_a_cluster_offload_onto_the_disks_of_their_own_boxes(pipeline, monkeypatch, tmp_path):
    tiny_model("llama", False, num_hidden_layers=9).save_pretrained(tmp_path)
    found = find_model(tmp_path, Int8Config(dtype="float32", int8_head=False))
    device = pipeline.devices()[0]
    (whole,) = make_plan(found.spec, [device], WORK).stages
    block = found.spec.known_layout.blocks[0].part.int8_values

    def plan_with(disk_bytes: int) -> Plan:
        box = replace(device.box, disk_bytes=disk_bytes)
        tight = replace(device, usable_bytes=whole.needed_bytes - 2 * block, box=box)
        monkeypatch.setattr(Pipeline, "devices", lambda _: [tight])
        with ModelPipeline(found, 1, WORK, Cluster("cpu", "a cluster")) as model:
            return model.plan

    assert device.box.disk_bytes > 0 and plan_with(device.box.disk_bytes).stages[0].disk_blocks
    with pytest.raises(PlanError, match=f"in {socket.gethostname()} there are 0 bytes of the disk"):
        plan_with(0)


def test_too_little_for_two_buffers_is_refused_with_the_numbers(tmp_path):
    save_tiny("llama", False, tmp_path)
    whole = the_stage(load(tmp_path))
    with pytest.raises(
        PlanError, match=r"all its blocks offloaded, .* needs .* for two buffers of a block each"
    ) as told:
        load(tmp_path, whole.weight_bytes)
    assert "What would help" in str(told.value)


def test_a_disk_without_room_is_refused_with_the_numbers(tmp_path, monkeypatch):
    save_tiny("llama", False, tmp_path)
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    with pytest.raises(PlanError, match=r"Its blocks may be offloaded.*1000 bytes of the disk"):
        load(tmp_path, 1)


# --- where they are kept -------------------------------------------------------------------------------------------


def test_the_file_of_offloaded_blocks_has_no_name_and_goes_with_the_model(tmp_path):
    save_tiny("llama", False, tmp_path / "model")
    model = load(tmp_path / "model", 1, offload_folder=tmp_path / "here")
    assert list((tmp_path / "here").iterdir()) == []
    assert open_files(tmp_path / "here")
    assert tokens(model)
    del model
    gc.collect()
    assert open_files(tmp_path / "here") == []


def open_files(folder: Path) -> list[Path]:
    """The files below a folder that this process holds open, of those without a name too."""
    found = []
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # the one that lists them is closed by now
            if str(descriptor.readlink()).startswith(str(folder)):
                found.append(descriptor)
    return found


def test_an_int8_checkpoint_is_read_where_it_is(tmp_path):
    save_tiny("gpt2", True, tmp_path / "16")
    quantize(tmp_path / "16", tmp_path / "8", progress=False)
    expected = load(tmp_path / "8")
    model = load(tmp_path / "8", block_bytes(expected), offload_folder=tmp_path / "here")
    assert the_stage(model).disk_blocks and not open_files(tmp_path / "here")
    assert tokens(model) == tokens(expected)


def test_a_file_that_is_cut_short_while_it_is_used_is_an_error_that_names_it(tmp_path):
    save_tiny("llama", False, tmp_path / "model")
    model = load(tmp_path / "model", 1, offload_folder=tmp_path / "here")
    assert tokens(model)
    held, *_ = open_files(tmp_path / "here")
    os.truncate(held, 3000)
    with pytest.raises(BigInt8Error, match=r"here/bigint8-offload-\w+: ends at byte 3,000.*cut short"):
        tokens(model)


def test_an_offloaded_model_shows_its_weights_and_is_saved(tmp_path):
    save_tiny("llama", True, tmp_path / "model")
    expected, model = load(tmp_path / "model"), load(tmp_path / "model", 1)
    theirs = expected.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in model.state_dict().items())
    looked = model(PROMPT, output_hidden_states=True)
    assert torch.equal(looked.logits, expected(PROMPT, output_hidden_states=True).logits)
    model.save_int8(tmp_path / "saved")
    assert tokens(load(tmp_path / "saved")) == tokens(expected)


def test_layers_that_stay_16_bit_stay_on_the_device(tmp_path):
    save_tiny("llama", False, tmp_path)
    config = Int8Config(skip_modules=["down_proj", "lm_head"], int8_head=False)
    expected = load(tmp_path, config=config)
    model = load(tmp_path, 1, config=config)
    assert the_stage(model).disk_blocks and tokens(model) == tokens(expected)


def test_smollm2_gives_the_same_tokens(smollm2):
    expected = load(smollm2)
    model = load(smollm2, 12 * block_bytes(expected))
    assert len(the_stage(model).disk_blocks) == 14
    assert tokens(model, new=24) == tokens(expected, new=24)


# --- on GPUs that are not there ------------------------------------------------------------------------------------


def bring_there(self, k):
    with pretending():  # the reader's thread has no mode of its own
        BRING(self, k)


BRING = offload.GpuBuffers._bring


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> PretendCuda:
    made = install(monkeypatch, gpus=1)
    receive, read = LocalStages.receive, offload.KeptBlock.read

    def pretend_to_receive(stages, timeout):
        with pretending():  # the engine runs steps in a thread of its own
            return receive(stages, timeout)

    def watched(block, out):
        made.host_writes(out)
        read(block, out)

    monkeypatch.setattr(LocalStages, "receive", pretend_to_receive)
    monkeypatch.setattr(offload.GpuBuffers, "_bring", bring_there)
    monkeypatch.setattr(offload.KeptBlock, "read", watched)
    return made


def refuse(*args: object, **kwargs: object) -> None:
    raise PlanError("here nothing is computed on the CPU")


def load_on_gpu(folder, monkeypatch, host_bytes):
    """On a GPU without limit, and on one that has room for all but a block and a half, beside so much host memory."""
    settings = {"config": Int8Config(int8_head=False), "context": 64, "progress": False}
    monkeypatch.setattr(device_map, "fill_in_order", refuse)
    with pretending():
        whole = load_sharded_int8(folder, 0, **settings)
        limits = {0: the_stage(whole).needed_bytes - block_bytes(whole) * 3 // 2, "cpu": host_bytes}
        return whole, load_sharded_int8(folder, max_memory=limits, **settings)


HOMES = {"host": 2**30, "disk": 1}


@pytest.mark.parametrize(("home", "locked"), [("host", False), ("host", True), ("disk", False)])
def test_blocks_come_to_a_gpu_without_a_race_and_give_the_tokens_of_those_that_stay(
    cuda, home, locked, tmp_path, monkeypatch
):
    """`locked`: where CUDA page-locks memory that is there."""
    monkeypatch.setattr(offload, "page_lock", lambda *args: locked)
    save_tiny("llama", False, tmp_path)
    whole, model = load_on_gpu(tmp_path, monkeypatch, HOMES[home])
    stage = the_stage(model)
    assert len(stage.host_blocks if home == "host" else stage.disk_blocks) == 4
    assert model.load_report.device_bytes == {"cuda:0": stage.weight_bytes, home: 4 * block_bytes(whole)}
    with pretending():
        expected, found = (tokens(each, PROMPT.to("cuda:0"), 6) for each in (whole, model))
        assert found == expected and cuda.races == []
        looked = (each(PROMPT.to("cuda:0"), output_hidden_states=True).logits.cpu() for each in (whole, model))
        assert torch.equal(*looked)  # through transformers' own modules


@pytest.mark.parametrize(
    ("left_out", "race"),
    [
        ((Stream, "wait_event"), "does not wait for"),
        ((Event, "synchronize"), "the next read on the host does not wait for stream"),
    ],
    ids=lambda value: value[1] if isinstance(value, tuple) else None,
)
def test_every_wait_for_a_block_is_needed(cuda, left_out, race, tmp_path, monkeypatch):
    """The proof that the test above can fail."""
    save_tiny("llama", False, tmp_path)
    _, model = load_on_gpu(tmp_path, monkeypatch, HOMES["disk"])
    assert cuda.races == []
    monkeypatch.setattr(*left_out, lambda *args: None)
    with pretending():
        tokens(model, PROMPT.to("cuda:0"), 6)
    assert any(race in found for found in cuda.races)
