"""Pictures of plans: what is drawn is the plan, in files of the kind that their names say, and is readable."""

import xml.etree.ElementTree as xml
from dataclasses import replace
from itertools import combinations, pairwise

import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from bigint8.errors import BigInt8Error
from bigint8.options import Workload
from bigint8.plan.cut import make_plan
from bigint8.plan.devices import CONTEXT_BYTES, SLACK_BYTES, Device, gpu_presets, preset_gpus
from bigint8.plan.pictures import BUBBLE, MEMORY, MOST_ROWS, STEPS, draw, fold, plan_figure
from bigint8.plan.predict import PlanTimes, predict
from bigint8.plan.spec import spec_of
from bigint8.plan.speed import UNKNOWN_CORE
from bigint8.plan.timeline import decode_round, prefill
from bigint8.sources.find import find_source
from bigint8.units import GIB

CORE = Device("cpu", "A CPU with a rather long name Processor, 2 cores", 6 * GIB, None, UNKNOWN_CORE)


def gpus(*kinds: tuple[str, int]) -> list[Device]:
    alike = [device for name, count in kinds for device in preset_gpus(name, count)]
    return [Device(f"cuda:{i}", gpu.model, gpu.usable_bytes, gpu.fast_16bit, gpu.speed) for i, gpu in enumerate(alike)]


def plan_of(model, devices, context=2048, sequences=1):
    return make_plan(spec_of(find_source(model, fetch=False)), devices, Workload(context, sequences))


PLANS = {
    "large": plan_of("opt-175b", gpus(("rtx-3090", 8))),
    "cpu": plan_of("tinyllama-1.1b", [CORE] * 2, sequences=2),
    "mixed": plan_of("llama-65b", gpus(("rtx-3060", 2), ("rtx-3090", 2), ("rtx-4090", 2)), sequences=4),
    "many": plan_of("opt-175b", gpus(("rtx-3060", 32), ("rtx-3090", 20), ("rtx-4090", 12)), sequences=64),
    "one": plan_of("tinyllama-1.1b", gpus(("rtx-3060", 1))),
    "left out": plan_of("tinyllama-1.1b", gpus(("rtx-4090", 2), ("rtx-3060", 12))),
}


@pytest.fixture(params=PLANS)
def plan(request):
    return PLANS[request.param]


def test_a_file_is_what_its_suffix_says(tmp_path):
    for name in ("plan.png", "plan.svg", "PLAN.PNG"):
        draw(PLANS["one"], tmp_path / name)
    for name in ("plan.png", "PLAN.PNG"):
        with Image.open(tmp_path / name) as image:
            assert image.format == "PNG" and image.width > 1000
    assert xml.parse(tmp_path / "plan.svg").getroot().tag.endswith("svg")


def test_the_same_plan_gives_the_same_svg(tmp_path):
    for name in ("a.svg", "b.svg"):
        draw(PLANS["one"], tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_the_text_of_an_svg_names_model_devices_work_and_units(tmp_path):
    draw(PLANS["mixed"], tmp_path / "plan.svg")
    words = " ".join("".join(node.itertext()) for node in xml.parse(tmp_path / "plan.svg").iter())
    for stage in PLANS["mixed"].stages:
        assert stage.device.name in words
    for word in ("llama-65b", "RTX 3060", "RTX 3090", "RTX 4090", "2,048 tokens", "4 sequences", "Computed", "bubble"):
        assert word in words, word
    for unit in ("memory [GiB]", "time [ms]", "[s]", "tokens/s"):
        assert unit in words, unit


@pytest.mark.parametrize("name", ["plan.pdf", "plan", "plan.svg.gz"])
def test_another_suffix_is_refused_with_those_there_are(tmp_path, name):
    with pytest.raises(BigInt8Error, match=rf"{name}.*\.png, \.svg or \.html"):
        draw(PLANS["one"], tmp_path / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", [".png", ".svg", ".html"])
def test_a_file_that_cannot_be_written_is_named(tmp_path, suffix):
    (tmp_path / f"folder{suffix}").mkdir()
    for file in (tmp_path / "missing" / f"plan{suffix}", tmp_path / f"folder{suffix}"):
        with pytest.raises(BigInt8Error, match=f"{file}: the (picture|page) cannot be written"):
            draw(PLANS["one"], file)


def bars_by_name(axes):
    """The bars of a panel, as they are drawn: of each label one for each row, as (left, width)."""
    return {
        bars.get_label(): [(bar.get_x(), bar.get_width()) for bar in bars]
        for bars in axes.containers
        if not bars.get_label().startswith("_")
    }


def test_the_bars_of_a_device_add_up_to_its_memory(plan):
    rows = fold(plan)
    bars = bars_by_name(plan_figure(plan).axes[0])
    assert list(bars) == list(MEMORY)
    for i, row in enumerate(rows):
        device = row.stage.device
        memory = device.usable_bytes + (CONTEXT_BYTES + SLACK_BYTES if device.kind == "cuda" else 0)
        assert sum(widths[i][1] for widths in bars.values()) * GIB == pytest.approx(memory, abs=1)
        assert bars["weights"][i][1] * GIB == pytest.approx(row.stage.weight_bytes)
        assert bars["keys and values"][i][1] * GIB == pytest.approx(row.stage.kv_bytes)
        ends = [left + width for left, width in (widths[i] for widths in bars.values())]
        starts = [widths[i][0] for widths in bars.values()]
        assert starts == pytest.approx([0, *ends[:-1]]), "one behind the other"


def test_what_a_preset_holds_is_drawn_whole():
    bars = bars_by_name(plan_figure(PLANS["large"]).axes[0])
    memory = gpu_presets()["rtx-3090"].cuda_gib
    assert sum(widths[0][1] for widths in bars.values()) == pytest.approx(memory, abs=1e-6)


def test_the_load_says_what_is_the_limit(plan):
    axes = plan_figure(plan).axes[1]
    times = PlanTimes(plan)
    widths = [bars[0].get_width() for bars in axes.containers]
    assert widths == pytest.approx([times.load_seconds(row.stage) for row in fold(plan)])
    words = [text.get_text() for text in axes.texts]
    assert len(words) == len(widths) and all(word.endswith(("s, disk-bound", "s, bus-bound")) for word in words)


def test_a_bar_of_a_timeline_is_as_wide_as_the_step_is_long(plan):
    times, rows = predict(plan), fold(plan)
    axes = plan_figure(plan).axes[2]
    dark_and_light = {to_rgb(colour) for colour, _ in STEPS}
    for i, row in enumerate(rows):
        bars = [bar for bars in axes.containers for bar in bars if round(bar.get_y() + bar.get_height() / 2) == i]
        steps = sum(bar.get_width() for bar in bars if bar.get_facecolor()[:3] in dark_and_light)
        waits = sum(bar.get_width() for bar in bars if bar.get_facecolor()[:3] == to_rgb(BUBBLE[0]))
        assert steps == pytest.approx(1e3 * times.groups * times.stages[row.stage.index].decode_seconds)
        assert steps + waits == pytest.approx(1e3 * times.token_seconds)


def test_parts_differ_in_lightness():
    for styles in (MEMORY.values(), [*STEPS, BUBBLE]):
        light = [sum(w * c for w, c in zip((0.299, 0.587, 0.114), to_rgb(colour), strict=True)) for colour, _ in styles]
        assert all(abs(a - b) > 0.08 for a, b in combinations(light, 2))


def test_parts_that_meet_differ_in_hatches_or_stand_at_the_ends_of_black_and_white():
    for styles in (MEMORY.values(), [*STEPS, BUBBLE]):
        hatches = [hatch for _, hatch in styles if hatch]
        assert len(set(hatches)) == len(hatches) >= len(list(styles)) - 2


def test_no_words_are_clipped_and_no_titles_or_legends_meet(plan):
    figure = plan_figure(plan)
    figure.canvas.draw()
    whole, boxes = figure.bbox, []
    for axes in figure.axes:
        left, right = axes.get_xlim()
        ticks = [tick.label1 for tick in axes.xaxis.get_major_ticks() if left <= tick.get_loc() <= right]
        rows = axes.get_yticklabels()
        head = [axes._left_title, axes.get_legend()]
        for several in (ticks, rows, axes.texts):
            extents = [text.get_window_extent() for text in several]
            assert not any(a.overlaps(b) for a, b in combinations(extents, 2))
        words = [each.get_window_extent() for each in (*ticks, *rows, *axes.texts, axes.xaxis.label)]
        assert all(box.x0 >= 0 and box.x1 <= whole.x1 and box.y0 >= 0 and box.y1 <= whole.y1 for box in words)
        boxes += [each.get_window_extent() for each in head]
    boxes += [text.get_window_extent() for text in figure.texts]
    assert all(box.x0 >= 0 and box.x1 <= whole.x1 for box in boxes)
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))


def test_many_stages_share_rows_with_those_that_are_alike():
    rows = fold(PLANS["many"])
    assert len(PLANS["many"].stages) == 64 and len(rows) <= MOST_ROWS
    assert sum(1 + row.alike for row in rows) == 64
    labels = [text.get_text() for text in plan_figure(PLANS["many"]).axes[0].get_yticklabels()]
    assert any("alike" in label for label in labels)


def test_few_stages_have_a_row_each():
    assert [row.stage for row in fold(PLANS["large"])] == list(PLANS["large"].stages)


def test_a_dollar_sign_in_a_name_is_no_formula(tmp_path):
    plan = replace(PLANS["one"], spec=replace(PLANS["one"].spec, name="$\\model$"))
    draw(plan, tmp_path / "plan.svg")
    assert "$\\model$" in (tmp_path / "plan.svg").read_text()


# --- timelines ---


def test_no_stage_runs_two_steps_at_once(plan):
    for timeline in (decode_round(predict(plan)), prefill(plan, plan.workload.context)):
        for stage in plan.stages:
            slots = timeline.of(stage.index)
            assert all(a.end_seconds <= b.start_seconds + 1e-9 for a, b in pairwise(slots))
            assert slots[0].start_seconds >= 0 and slots[-1].end_seconds <= timeline.seconds * (1 + 1e-9)


def test_a_decode_round_is_as_long_as_a_pipeline_takes_that_starts_each_step_as_soon_as_it_can(plan):
    times = predict(plan)
    free, back = [0.0] * len(times.stages), [0.0] * times.groups
    first = []
    for _ in range(200):
        for group in range(times.groups):
            at = back[group]
            for i, stage in enumerate(times.stages):
                at = free[i] = max(at, free[i]) + stage.decode_seconds
                at += stage.hop_seconds
            back[group] = at
        first.append(back[0])
    simulated = (first[-1] - first[99]) / 100
    assert decode_round(times).seconds == pytest.approx(simulated)


def test_the_chunks_of_a_prompt_go_through_the_stages_in_order(plan):
    timeline, times = prefill(plan, 2000), PlanTimes(plan)
    assert timeline.steps == 4
    for chunk in range(4):
        step = times.prompt(512 if chunk < 3 else 2000 - 3 * 512, chunk * 512)
        slots = [slot for slot in timeline.slots if slot.step == chunk]
        assert [slot.seconds for slot in slots] == pytest.approx(step.stages)
        for before, after, hop in zip(slots[:-1], slots[1:], step.hops, strict=False):
            assert after.start_seconds >= before.end_seconds + hop - 1e-9
    assert prefill(plan, 512).seconds == pytest.approx(times.prompt_seconds(512))


def test_bubbles_and_steps_fill_the_time(plan):
    timeline = prefill(plan, plan.workload.context)
    for stage in plan.stages:
        waits = sum(seconds for _, seconds in timeline.bubbles(stage.index))
        assert waits / timeline.seconds + timeline.busy_share(stage.index) == pytest.approx(1)
