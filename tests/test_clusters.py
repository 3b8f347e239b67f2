"""What GPUs are said to do, and clusters as files: what is read from them, and what is refused, with line and key."""

from pathlib import Path

import pytest

from bigint8 import BigInt8Error
from bigint8.options import Workload
from bigint8.plan.clusters import cluster_names, load_cluster
from bigint8.plan.cut import make_plan
from bigint8.plan.devices import GpuPreset, gpu_presets, plain_torch_note, preset_gpus
from bigint8.plan.predict import predict
from bigint8.plan.speed import BUS_SHARE, MEMORY_SHARE
from bigint8.session import find_model
from bigint8.units import GIB

LINE, NO_LINE = r"\w+\.yaml, line {}: ", r"\w+\.yaml: "


@pytest.fixture(autouse=True)
def nothing_measured(monkeypatch, tmp_path_factory):
    """What a machine here has measured of its own devices must not stand in for the data sheets."""
    monkeypatch.setattr("bigint8.plan.speed.speeds_file", lambda: tmp_path_factory.mktemp("none") / "speeds.json")


@pytest.fixture
def load(tmp_path):
    """The cluster of a YAML text."""

    def from_text(text: str):
        file = tmp_path / "mine.yaml"
        file.write_text(text, encoding="utf-8")
        return load_cluster(file)

    return from_text


# --- GPUs --------------------------------------------------------------------------------------------------------


def test_the_gpus_that_people_plan_for_are_there():
    wanted = (
        "rtx-2080-ti rtx-3060 rtx-3070 rtx-3080 rtx-3080-ti rtx-3090 rtx-3090-ti rtx-4060-ti-16gb rtx-4070 rtx-4080 "
        "rtx-4070-ti-super rtx-4090 rtx-5070-ti rtx-5080 rtx-5090 a4000 a5000 a6000 rtx-6000-ada t4 l4 l40s a10 "
        "a100-40gb a100-80gb h100-80gb"
    )
    assert set(wanted.split()) <= gpu_presets().keys()


@pytest.mark.parametrize("name", gpu_presets())
def test_int8_counts_dense_operations_and_16_bit_those_that_add_up_in_float32(name):
    """GeForce adds up in float32 at half its rate, so int8 is four times that; on professional cards twice."""
    gpu = gpu_presets()[name]
    expected = 4 if "GeForce" in gpu.model else 2
    assert gpu.int8_tops / gpu.float16_tflops == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("name", gpu_presets())
def test_each_gpu_has_a_bus_that_there_is_and_names_its_sources(name):
    gpu = gpu_presets()[name]
    assert gpu.pcie_gb_per_s in (7.88, 15.75, 31.5, 63)
    assert "memory: " in gpu.source and "the rest: " in gpu.source
    assert "sparse" in gpu.source or "whitepaper" in gpu.source or "tensor" in gpu.source or "NVIDIA" in gpu.source


def test_two_presets_of_one_model_have_one_speed():
    """A GPU that NVML names is looked up by its model."""
    models = [gpu.model for gpu in gpu_presets().values()]
    assert len(set(models)) == len(models)


def test_memory_is_what_cuda_offers_not_what_the_box_says():
    sizes = {"rtx-3090": 24, "rtx-3060": 12, "t4": 16, "a100-80gb": 80, "rtx-5090": 32, "l40s": 48}
    for name, printed in sizes.items():
        assert 0.9 * printed < gpu_presets()[name].cuda_gib < printed


def test_turing_is_planned_in_plain_torch_and_said_to_be():
    old, new = preset_gpus("rtx-2080-ti", 2), preset_gpus("rtx-3090", 1)
    preset = gpu_presets()["rtx-2080-ti"]
    assert old[0].fast_16bit == "float16"
    assert old[0].speed.read_bytes_per_s == pytest.approx(MEMORY_SHARE * 1e9 * preset.bandwidth_gb_per_s / 5)
    assert old[0].speed.prompt_ops_per_s < old[0].speed.attention_ops_per_s * 3  # those of 16 bits, not of int8
    note = plain_torch_note([*old, *new])
    assert note is not None and note.count("RTX 2080 Ti") == 1 and "3090" not in note and "8.0" in note
    assert plain_torch_note(new) is None
    assert load_cluster("4x-rtx2080ti").note == plain_torch_note(old)


def test_a_preset_with_a_number_that_makes_no_sense_is_refused():
    good = gpu_presets()["l4"].model_dump()
    for field in ("cuda_gib", "bandwidth_gb_per_s", "int8_tops", "float16_tflops", "pcie_gb_per_s"):
        for wrong in (0, -1):
            with pytest.raises(ValueError, match=field):
                GpuPreset.model_validate({**good, field: wrong})
    with pytest.raises(ValueError, match="source"):
        GpuPreset.model_validate({**good, "source": ""})


# --- clusters that ship ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", cluster_names())
def test_every_cluster_that_ships_is_read_and_can_be_planned_for(name):
    cluster = load_cluster(name)
    assert [device.name for device in cluster.devices] == [f"cuda:{i}" for i in range(len(cluster.devices))]
    assert {device.box for device in cluster.devices} == set(cluster.boxes)
    assert len({box.name for box in cluster.boxes}) == len(cluster.boxes)
    assert all(box.host_bytes > 0 for box in cluster.boxes)
    plan = make_plan(find_model("opt-125m").spec, list(cluster.devices)[:12], Workload())
    assert predict(plan).tokens_per_s > 0


def test_the_clusters_of_the_docs_are_there():
    wanted = (
        "8x-rtx3090 4x-rtx4090-2-boxes mixed-3060-3090-4090 4x-a6000 8x-rtx3060 2x-rtx3090 1x-rtx4090 8x-a100-80gb "
        "4x-rtx3090-nvlink"
    )
    assert set(wanted.split()) <= set(cluster_names())


def test_a_cluster_of_unlike_boxes_has_their_devices_in_the_order_of_the_file():
    cluster = load_cluster("mixed-3060-3090-4090")
    found = [(device.name, device.model.removeprefix("NVIDIA GeForce "), device.box.name) for device in cluster.devices]
    assert found == [
        ("cuda:0", "RTX 4090", "new"),
        ("cuda:1", "RTX 3090", "middle"),
        ("cuda:2", "RTX 3090", "middle"),
        ("cuda:3", "RTX 3060", "old"),
    ]


# --- what a file says --------------------------------------------------------------------------------------------


def test_the_least_one_writes_is_a_name_and_its_gpus(load):
    for text in ("boxes: {desk: rtx-3090}", "boxes: {desk: [rtx-3090]}", "boxes: {desk: {gpus: rtx-3090}}"):
        (device,) = load(text).devices
        assert (device.name, device.box.name) == ("cuda:0", "desk")
        assert device.speed == gpu_presets()["rtx-3090"].speed
    assert len(load("boxes: {desk: 8 x rtx-3090}").devices) == len(load("boxes: {desk: 8x rtx-3090}").devices) == 8
    assert [d.model[-4:] for d in load("boxes: {desk: [rtx-3090, 2x a6000]}").devices] == ["3090", "6000", "6000"]


def test_boxes_that_are_alike_are_counted_and_numbered(load):
    cluster = load("ethernet_gbit_per_s: 10\nboxes:\n  desk: {count: 3, gpus: 2 x rtx-4090}\n")
    assert [box.name for box in cluster.boxes] == ["desk-1", "desk-2", "desk-3"]
    assert [device.box.name for device in cluster.devices] == [
        "desk-1",
        "desk-1",
        "desk-2",
        "desk-2",
        "desk-3",
        "desk-3",
    ]


def test_a_link_is_as_slow_as_the_slower_of_card_and_slot(load):
    text = """
    boxes:
      desk:
        gpus:
          - rtx-3090
          - {preset: rtx-3090, pcie: 3.0 x4}
          - {preset: rtx-3090, pcie: 5.0 x16}
          - {preset: rtx-4060-ti-16gb, pcie: 4.0 x16}
    """
    rates = [device.speed.bus_bytes_per_s / BUS_SHARE / 1e9 for device in load(text).devices]
    assert rates == pytest.approx([31.5, 3.94, 31.5, 15.75], rel=0.001)


def test_network_disk_memory_and_nvlink_are_those_of_the_box(load):
    text = """
    ethernet_gbit_per_s: 1
    boxes:
      one: {gpus: 2 x a6000, nvlink: true, memory_gib: 128, disk_gb_per_s: 7}
      two: {gpus: rtx-3060, ethernet_gbit_per_s: 10, ethernet_latency_us: 20}
    """
    one, two = load(text).boxes
    assert one.network_bytes_per_s == pytest.approx(117.7e6, rel=0.001)
    assert two.network_bytes_per_s == pytest.approx(1177e6, rel=0.001)
    assert (one.network_seconds, two.network_seconds) == pytest.approx((50e-6, 10e-6))
    assert (one.nvlink_bytes_per_s, two.nvlink_bytes_per_s) == (56.25e9, 0)
    assert (one.disk_bytes_per_s, two.disk_bytes_per_s) == (7e9, 3e9)
    assert (one.host_bytes, two.host_bytes) == (126 * GIB, 0)


def test_a_slower_network_makes_a_slower_plan(load):
    def seconds(gbit: float) -> float:
        text = f"ethernet_gbit_per_s: {gbit}\nboxes: {{one: {{count: 2, gpus: rtx-3060}}}}"
        plan = make_plan(find_model("llama-13b").spec, list(load(text).devices), Workload())
        assert len({stage.device.box for stage in plan.stages}) == 2
        return predict(plan).token_seconds

    assert seconds(0.1) > seconds(1) > seconds(100)


# --- what is refused ---------------------------------------------------------------------------------------------

REFUSED = {
    "an unknown GPU": ("boxes:\n  desk:\n    gpus: rtx-309\n", 3, "boxes.desk.gpus.0.preset 'rtx-309': .*rtx-3090"),
    "an unknown GPU in a list": ("boxes:\n  desk:\n    gpus:\n    - a10\n    - b10\n", 5, "no such GPU preset; .*a10"),
    "an unknown GPU in short": ("boxes:\n  a: rtx-3090\n  b: 2 x rtx\n", 3, "no such GPU preset"),
    "a key with a typo": ("boxes:\n  a:\n    gpu: a10\n", 3, "boxes.a.gpu: no such key; did you mean gpus.*memory_gib"),
    "a typo in a GPU": ("boxes:\n  a:\n    gpus:\n    - preset: a10\n      cout: 2\n", 5, "did you mean count"),
    "a typo at the top": ("etherne_gbit_per_s: 1\nboxes: {a: a10}\n", 1, "did you mean ethernet_gbit_per_s"),
    "a key that means nothing": ("boxes: {a: a10}\ncolour: red\n", 2, "colour: no such key; there are boxes"),
    "no GPUs at all": ("boxes:\n  a: {memory_gib: 64}\n", 2, "boxes.a.gpus is missing"),
    "an empty list of GPUs": ("boxes:\n  a:\n    gpus: []\n", 3, "boxes.a.gpus .*at least 1"),
    "a box with nothing": ("boxes:\n  a:\n", 2, "boxes.a None: write keys and values here, of gpus"),
    "no boxes": ("boxes: {}\n", 1, "boxes .*at least 1"),
    "boxes left out": ("ethernet_gbit_per_s: 10\n", 1, "boxes is missing"),
    "zero GPUs": ("boxes:\n  a: 0 x a10\n", 2, r"boxes\.a\.gpus\.0\.count 0: should be greater than or equal to 1"),
    "negative GPUs": ("boxes:\n  a: -2 x a10\n", 2, "count -2: should be greater than or equal to 1"),
    "too many GPUs": ("boxes:\n  a: 99999 x a10\n", 2, "count 99999: should be less than or equal to 1024"),
    "zero boxes": ("boxes:\n  a:\n    gpus: a10\n    count: 0\n", 4, "count 0: should be greater"),
    "half a box": ("boxes:\n  a:\n    gpus: a10\n    count: 1.5\n", 4, "count 1.5: "),
    "no memory": ("boxes:\n  a:\n    gpus: a10\n    memory_gib: 0\n", 4, "memory_gib 0: should be greater than 0"),
    "negative memory": ("boxes:\n  a:\n    gpus: a10\n    memory_gib: -64\n", 4, "memory_gib -64: should be greater"),
    "memory in words": ("boxes:\n  a:\n    gpus: a10\n    memory_gib: 64GB\n", 4, "memory_gib '64GB': .*valid number"),
    "endless memory": ("boxes:\n  a:\n    gpus: a10\n    memory_gib: .inf\n", 4, "memory_gib inf: .*finite"),
    "a negative disk": ("boxes:\n  a:\n    gpus: a10\n    disk_gb_per_s: -1\n", 4, "disk_gb_per_s -1: should be"),
    "a network of nothing": ("ethernet_gbit_per_s: 0\nboxes: {a: a10}\n", 1, "ethernet_gbit_per_s 0: should be"),
    "no latency": ("ethernet_latency_us: 0\nboxes: {a: a10}\n", 1, "ethernet_latency_us 0: should be greater"),
    "a bus in words": ("boxes:\n  a:\n    gpus:\n      preset: a10\n      pcie: fast\n", 5, "pcie 'fast': .*3.0 x4"),
    "a bus without lanes": ("boxes:\n  a:\n    gpus:\n      preset: a10\n      pcie: 3.0\n", 5, "pcie 3.0: .*lanes"),
    "lanes there are not": ("boxes:\n  a:\n    gpus:\n      preset: a10\n      pcie: 3.0 x3\n", 5, "pcie '3.0 x3'"),
    "a bridge that does not fit": ("boxes:\n  a:\n    gpus: rtx-4090\n    nvlink: true\n", 4, "rtx-4090 has no NVLink"),
    "boxes without a link": ("boxes:\n  a: a10\n  b: a10\n", None, "box a has no link .*ethernet_gbit_per_s"),
    "one box without a link": (
        "boxes:\n  a: {gpus: a10, ethernet_gbit_per_s: 1}\n  b: a10\n", None, "box b has no link to the other boxes"
    ),
    "alike boxes without a link": ("boxes:\n  a: {gpus: a10, count: 2}\n", None, "box a has no link"),
    "two boxes of one name": ("boxes:\n  a: a10\n  b: a10\n  a: l4\n", 4, "a stands here again, after line 2; rename"),
    "two boxes of one number": (
        "ethernet_gbit_per_s: 1\nboxes:\n  a: {gpus: a10, count: 2}\n  a-2: a10\n", None, "called a-2: a and a-2"
    ),
    "a key twice": ("boxes:\n  a:\n    gpus: a10\n    gpus: l4\n", 4, "gpus stands here again, after line 3"),
    "a name that YAML takes for a truth": ("boxes:\n  no: a10\n", 2, "the name no .* quotes"),
    "a name that is a number": ("boxes:\n  1: a10\n", 2, "the name 1 .* quotes"),
    "a list": ("- a10\n- a10\n", None, "write keys and values here, of boxes"),
    "no YAML": ("boxes:\n  a: [a10\n  b: a10\n", 3, "this is no YAML"),
    "tabs": ("boxes:\n\ta: a10\n", 2, "this is no YAML"),
    "code": ("boxes: {a: a10}\nx: !!python/object:os.system {}\n", 2, "this is no YAML"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_wrong_with_a_file_is_told_with_line_and_key(load, case):
    text, line, told = REFUSED[case]
    with pytest.raises(BigInt8Error, match=(LINE.format(line) if line else NO_LINE) + rf".*{told}"):
        load(text)


@pytest.mark.parametrize("text", ["", "# only a comment\n", "---\n"])
def test_an_empty_file_is_told_what_it_needs(load, text):
    with pytest.raises(BigInt8Error, match=r"mine\.yaml: the file is empty; it needs boxes"):
        load(text)


def test_several_mistakes_are_counted_and_the_first_is_told(load):
    with pytest.raises(BigInt8Error, match=r"line 2: boxes.a.gpu: no such key.* \(and 2 more\)"):
        load("boxes:\n  a: {gpu: a10}\n  b: x1\n")


@pytest.mark.parametrize("text", ["a: &x [*x]\n", "[" * 5000, "\x00", "boxes: {a: &x {gpus: *x}}"])
def test_a_file_that_was_made_to_confuse_is_refused(load, text):
    with pytest.raises(BigInt8Error, match=r"mine\.yaml"):
        load(text)


def test_an_anchor_may_say_what_boxes_share(load):
    text = """
    ethernet_gbit_per_s: 10
    boxes:
      one: &like {gpus: 2 x rtx-3090, memory_gib: 64}
      two: *like
      three: {<<: *like, memory_gib: 128}
    """
    boxes = load(text).boxes
    assert [(box.name, box.host_bytes // GIB) for box in boxes] == [("one", 62), ("two", 62), ("three", 126)]


def test_a_cluster_that_is_not_there_offers_the_nearest():
    with pytest.raises(
        BigInt8Error, match=r"cluster=8x-rtx309: no such cluster and no such file; did you mean .*8x-rtx3090"
    ):
        load_cluster("8x-rtx309")


def test_a_file_that_is_not_there_or_no_file_is_told(tmp_path):
    with pytest.raises(BigInt8Error, match=r"mine\.yaml: No such file"):
        load_cluster(tmp_path / "mine.yaml")
    with pytest.raises(BigInt8Error, match="this is a folder"):
        load_cluster(tmp_path)
    (tmp_path / "weights.yaml").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(BigInt8Error, match=r"weights\.yaml: this is no text"):
        load_cluster(tmp_path / "weights.yaml")
    with (tmp_path / "large.yaml").open("wb") as file:
        file.truncate(2**32)
    with pytest.raises(BigInt8Error, match=r"large\.yaml: .* too many"):
        load_cluster(tmp_path / "large.yaml")


def test_a_name_in_capitals_and_a_file_without_an_ending_are_found(tmp_path, monkeypatch):
    assert load_cluster("8X-RTX3090").name == "8x-rtx3090"
    monkeypatch.chdir(tmp_path)
    Path("mine").write_text("boxes: {desk: a10}")
    assert load_cluster("mine").devices[0].model == "NVIDIA A10"
