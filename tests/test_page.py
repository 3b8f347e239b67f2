"""The page of plans: what a browser shows for a choice is what the planner answers for it."""

import html
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from bigint8.errors import PlanError
from bigint8.options import Workload
from bigint8.plan.cut import make_plan
from bigint8.plan.devices import Device, preset_gpus
from bigint8.plan.grid import Grid
from bigint8.plan.labels import memory_parts
from bigint8.plan.page import page
from bigint8.plan.pictures import draw
from bigint8.plan.predict import predict
from bigint8.plan.spec import spec_of
from bigint8.plan.speed import UNKNOWN_CORE
from bigint8.plan.timeline import decode_round
from bigint8.sources.find import find_source

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

MOVES = [
    ("start", None, None),
    ("another GPU less", "kind-1", 0),
    ("a GPU more", "kind-2", 1),
    ("a shorter context", "context", 0),
    ("more sequences", "sequences", 2),
    ("a GPU alone", "other", "A100"),
    ("and back", "kind-0", 1),
    ("none at all", "kind-0,kind-1,kind-2", 0),
]
"""What a person does, one after the other: its name, which control, its new position or a part of the option's text."""

SCRIPT = """<script>
const seen = [], moves = %s;
function move(id, value) {
  const control = document.getElementById(id);
  const options = [...(control.options || [])];
  control.value = options.length ? options.find((option) => option.text.includes(value)).value : value;
  control.dispatchEvent(new Event(options.length ? "change" : "input", { bubbles: true }));
}
const shown = (id) => !document.getElementById(id).hidden;
for (const [name, ids, value] of moves) {
  if (ids) ids.split(",").forEach((id) => move(id, value));
  seen.push({
    name, bag: state.bag, context: state.context, sequences: state.sequences, plan: shown("plan"),
    error: shown("error") ? document.getElementById("error").textContent : null,
    status: document.getElementById("status").textContent,
    stages: [...document.querySelectorAll("#memory li")].map((row) => ({ ...row.dataset })),
    figures: [...document.querySelectorAll("#figures dd")].map((node) => ({ ...node.dataset })),
    timeline: [...document.querySelectorAll("#time li")].map((row) =>
      [...row.querySelectorAll(".odd, .even")].map((bar) => [bar.style.left, bar.style.width])),
    wide: document.documentElement.scrollWidth, window: window.innerWidth,
    labelled: [...document.querySelectorAll("input, select")].every((control) => control.labels.length === 1),
    focusable: [...document.querySelectorAll("input, select, summary")].every((control) => control.tabIndex >= 0),
  });
}
const found = document.createElement("pre");
found.id = "seen";
found.textContent = JSON.stringify(seen);
document.body.append(found);
</script></body>"""


def spec(name):
    return spec_of(find_source(name, fetch=False))


@pytest.fixture(scope="module")
def grid():
    """A model that one RTX 3060 does not hold, beside an RTX 3090."""
    [small], large = preset_gpus("rtx-3060", 1), preset_gpus("rtx-3090", 2)[1]
    return Grid(spec("llama-13b"), [small, large], Workload(context=2048, sequences=1))


@pytest.fixture(scope="module")
def text(grid):
    return page(grid)


def data_of(text):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])


FRAME = """<!DOCTYPE html><body><iframe srcdoc="%s" style="border: 0; width: %dpx; height: 900px"></iframe><script>
window.onload = () => document.body.append(document.querySelector("iframe").contentDocument.getElementById("seen"));
</script></body>"""
"""A browser's own window is never narrower than 500 pixels; a frame is."""


def seen_in_browser(text, folder: Path, width):
    file = folder / "page.html"
    watched = text.replace("</body>", SCRIPT % json.dumps(MOVES))
    file.write_text(FRAME % (html.escape(watched), width), encoding="utf-8")
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1700,1000",
        f"--user-data-dir={folder / 'profile'}", "--dump-dom", file.as_uri(),
    ]  # fmt: skip
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    found = re.search(r'<pre id="seen">(.*?)</pre>', shown, re.S)
    assert found, f"the page's script failed: {shown[-2000:]}"
    return json.loads(html.unescape(found[1]))


@pytest.fixture(scope="module")
def seen(text, tmp_path_factory):
    if BROWSER is None:
        pytest.skip("no browser here to look at the page with: install chromium")
    return {step["name"]: step for step in seen_in_browser(text, tmp_path_factory.mktemp("wide"), 1600)}


def answer(grid, step):
    """What the planner says to the point that a browser is at."""
    workload = Workload(step["context"], step["sequences"])
    return grid.plan(tuple(step["bag"]), workload)


def test_the_page_needs_no_network(text):
    assert not re.search(r"https?:|src=|@import|url\(|fetch\(|XMLHttpRequest|WebSocket", text)
    assert re.findall(r'<link [^>]*href="([^"]*)"', text) == ["data:,"]


def test_the_page_is_small_and_has_some_hundred_points(text):
    assert len(text.encode()) < 2_000_000
    assert 100 <= len(data_of(text)["points"]) <= 1000


def test_what_is_there_is_where_the_page_begins(grid, text):
    bag, context, sequences = data_of(text)["start"]
    assert grid.devices(tuple(bag)) == [*preset_gpus("rtx-3060", 1), preset_gpus("rtx-3090", 2)[1]]
    assert (context, sequences) == (2048, 1)


def test_every_point_in_the_page_is_the_answer_of_the_planner(grid, text):
    data = data_of(text)
    points = iter(data["points"])
    for bag in grid.bags:
        for workload in grid.workloads():
            point = next(points)
            if sum(bag) > 2 or workload.sequences != 4:
                continue  # a sample is enough
            try:
                plan = grid.plan(bag, workload)
            except PlanError as error:
                assert point == {"error": str(error)}
                continue
            stages = [data["stages"][stage] for stage, _ in point["stages"]]
            assert [stage[1] for stage in stages] == [s.last_block - s.first_block for s in plan.stages]
            assert [stage[2:7] for stage in stages] == [list(memory_parts(stage).values()) for stage in plan.stages]
            assert [data["names"][name] for _, name in point["stages"]] == [s.device.name for s in plan.stages]
            assert point["figures"][0] == pytest.approx(predict(plan).tokens_per_s, rel=1e-5)
    assert next(points, None) is None


def test_devices_that_are_added_have_names_of_their_own(grid):
    for bag in grid.bags:
        names = [device.name for device in grid.devices(bag)]
        assert len(set(names)) == len(names) == sum(bag)


def test_processes_that_share_a_cpu_are_offered_together(tmp_path):
    cores = [Device("cpu", "a CPU", 2**33, None, UNKNOWN_CORE)] * 2
    grid = Grid(spec("tinyllama-1.1b"), cores, Workload(context=512))
    assert grid.bags[0] == grid.start_bag() and grid.devices(grid.start_bag()) == cores
    assert {sum(bag) for bag in grid.bags if bag[0]} == {2}


def test_a_plan_is_drawn_as_a_page_that_begins_with_it(tmp_path):
    devices = preset_gpus("rtx-3060", 2)
    plan = make_plan(spec("opt-125m"), devices, Workload(256, 3))
    draw(plan, tmp_path / "plan.html", devices)
    bag, *work = data_of((tmp_path / "plan.html").read_text())["start"]
    assert bag[0] == 2 and sum(bag) == 2 and work == [256, 3]


def test_a_name_with_markup_stays_a_name(grid):
    named = Grid(replace(spec("opt-125m"), name="</script><b>{{data}}"), preset_gpus("rtx-3060", 1), Workload(64))
    text = page(named)
    assert "</script><b>" not in text and data_of(text)["model"] == "</script><b>{{data}}"


# --- in a browser ---


@pytest.mark.parametrize("name", [name for name, _, _ in MOVES[:-1]])
def test_the_browser_shows_the_planners_answer_after_each_move(grid, seen, name):
    step = seen[name]
    try:
        plan = answer(grid, step)
    except PlanError as error:
        assert step["error"] == str(error) and not step["plan"]
        return
    assert step["plan"] and step["error"] is None
    shown = [(row["device"], int(row["first"]), int(row["last"])) for row in step["stages"]]
    assert shown == [(stage.device.name, stage.first_block, stage.last_block) for stage in plan.stages]
    sizes = [[int(size) for size in row["bytes"].split(",")] for row in step["stages"]]
    assert sizes == [list(memory_parts(stage).values()) for stage in plan.stages]
    times = predict(plan)
    for figure in step["figures"]:
        if figure["figure"] != "weight_bytes":
            assert float(figure["value"]) == pytest.approx(getattr(times, figure["figure"]), rel=1e-5)


def test_moves_lead_to_other_plans(seen):
    bags = [tuple(seen[name]["bag"]) for name in ("start", "another GPU less", "a GPU more", "a GPU alone", "and back")]
    assert len(set(bags)) >= 4
    assert seen["another GPU less"]["error"] and "does not fit" in seen["another GPU less"]["error"]
    figures = [json.dumps(seen[name]["figures"]) for name in ("start", "a shorter context", "more sequences")]
    assert len(set(figures)) == 3
    assert seen["a GPU alone"]["bag"][:3] == [0, 0, 0] and sum(seen["a GPU alone"]["bag"]) >= 1
    assert "A100" in seen["a GPU alone"]["status"] and "computed" in seen["a GPU alone"]["status"]


def test_no_device_is_said_so(seen):
    assert not seen["none at all"]["plan"] and seen["none at all"]["error"] == "No device is chosen."


def test_the_steps_in_the_browser_are_as_long_as_the_model_says(grid, seen):
    step = seen["more sequences"]
    timeline = decode_round(predict(answer(grid, step)))
    for stage, bars in enumerate(step["timeline"]):
        drawn = sorted((float(left[:-1]), float(width[:-1])) for left, width in bars)
        told = [
            (100 * s.start_seconds / timeline.seconds, 100 * s.seconds / timeline.seconds) for s in timeline.of(stage)
        ]
        assert sum(drawn, ()) == pytest.approx(sum((pair for pair in told if pair[1] > 0.01), ()), abs=0.02)


def test_controls_have_labels_and_take_the_keyboard(seen):
    assert all(step["labelled"] and step["focusable"] for step in seen.values())


def test_nothing_is_wider_than_a_window_of_400_or_1600_pixels(text, seen, tmp_path):
    narrow = seen_in_browser(text, tmp_path, 400)
    assert {step["window"] for step in narrow} == {400} and {step["window"] for step in seen.values()} == {1600}
    for step in [*seen.values(), *narrow]:
        assert step["wide"] <= step["window"], step["name"]
