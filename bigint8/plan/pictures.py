"""Pictures of a plan: memory of every device, a decode round, a prompt's prefill and the load, all computed."""

import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import BigInt8Error
from ..units import GIB, readable
from .devices import CONTEXT_BYTES, SLACK_BYTES, Device
from .draft import Objective
from .labels import PARTS, devices_in_words, memory_parts, place, short_model
from .plan import Plan, Stage
from .predict import PlanTimes, Prediction, predict
from .timeline import Timeline, decode_round, prefill

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_ROWS = 16
"""With more stages than that, those that are alike share a row."""

MOST_CHUNKS = 8
"""Of a prompt whose prefill is drawn."""

WIDTH, GAP, RIGHT, ROW, HEAD, AXIS = 17.0, 1.1, 0.3, 0.32, 0.65, 0.65
"""Inches: of the picture, between its columns, at its right edge, of a row, above a panel and below one."""

FONT, NARROW = 9, 0.12
"""Points, and inches: in a bar that is narrower, a hatch would be noise."""

DARK, EDGE = "#1b2f5c", "#333333"

MEMORY = dict(
    zip(
        PARTS,
        ((DARK, ""), ("#d98a2b", "//"), ("#a9d8b8", ".."), ("#7a7a7a", "xx"), ("#ffffff", "")),
        strict=True,
    )
)
"""Colour and hatch of each part of a device's memory: of unlike lightness, so that they are told apart in grey."""

STEPS = ((DARK, ""), ("#a8c1ea", "//"))
"""Of steps: every other one."""

BUBBLE = ("#f4f4f4", "\\\\\\")

LOADS = {"disk": (DARK, ""), "bus": ("#d98a2b", "//")}

SUFFIXES = (".png", ".svg", ".html")


@dataclass(frozen=True)
class Row:
    """A row of the picture: a stage, and others that are alike and not drawn."""

    stage: Stage
    alike: int = 0


def draw(plan: Plan, file: Path, devices: Sequence[Device] | None = None, objective: Objective = "throughput") -> None:
    """A picture of a plan (.png, .svg), or a page in which a person changes it (.html).

    devices, objective: what the page starts from and plans for; by default the devices that the plan uses
    Raises BigInt8Error for another suffix, a file that cannot be written, and a plan of a model without a layout.
    """
    file = Path(file)
    if file.suffix.lower() not in SUFFIXES:
        raise BigInt8Error(f"{file}: a picture's name must end in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}")
    if file.suffix.lower() == ".html":
        from .page import write_page

        offered = devices if devices is not None else [stage.device for stage in plan.stages]
        write_page(plan.spec, offered, file, plan.workload, objective)
    else:
        draw_plan(plan, file)


def draw_plan(plan: Plan, file: Path) -> None:
    """A picture in a file, PNG or SVG by its suffix. Raises BigInt8Error if the file cannot be written."""
    import matplotlib

    drawn = io.BytesIO()
    kind = Path(file).suffix.lower().removeprefix(".")
    # an SVG's text stays text, and a dollar sign in a model's name is no formula
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "bigint8", "text.parse_math": False}):
        metadata = {"Date": None} if kind == "svg" else {"Software": "bigint8"}
        plan_figure(plan).savefig(drawn, format=kind, dpi=110, metadata=metadata)
    try:
        Path(file).write_bytes(drawn.getvalue())
    except OSError as error:
        raise BigInt8Error(f"{file}: the picture cannot be written: {error.strerror}; name another file") from None


def plan_figure(plan: Plan) -> "Figure":
    """The figure: memory and load above, a decode round and a prompt's prefill below; a row for each stage."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    times = predict(plan)
    rows = fold(plan)
    prompt = min(plan.workload.context, MOST_CHUNKS * plan.workload.chunk)
    notes = _notes(plan, len(rows) < len(plan.stages), prompt)
    labels = [_label(plan, row) for row in rows]
    left = 0.5 + 0.54 * FONT / 72 * max(len(label) for label in labels)
    column = (WIDTH - left - GAP - RIGHT) / 2
    panel, foot = max(1.0, ROW * len(rows) + 0.2), 0.25 + 0.19 * len(notes)
    height = 0.85 + 2 * (HEAD + panel + AXIS) + foot
    figure = Figure(figsize=(WIDTH, height), facecolor="white")
    FigureCanvasAgg(figure)
    upper, lower, right = foot + HEAD + panel + 2 * AXIS, foot + AXIS, left + column + GAP

    def panel_at(x: float, y: float) -> "Axes":
        return figure.add_axes((x / WIDTH, y / height, column / WIDTH, panel / height))

    _draw_memory(panel_at(left, upper), rows)
    _draw_load(panel_at(right, upper), rows, PlanTimes(plan))
    _draw_decode(panel_at(left, lower), rows, times)
    _draw_prefill(panel_at(right, lower), rows, plan, prompt)
    for axes in figure.axes[::2]:
        axes.set_yticks(range(len(rows)), labels, fontsize=FONT)
    for axes in figure.axes[1::2]:
        axes.set_yticks(range(len(rows)), [f"stage {row.stage.index}" for row in rows], fontsize=FONT)
    figure.text(0.2 / WIDTH, 1 - 0.2 / height, _title(plan, times), va="top", fontsize=13, linespacing=1.4)
    figure.text(0.2 / WIDTH, 0.12 / height, "\n".join(notes), va="bottom", fontsize=FONT, linespacing=1.45)
    return figure


# --- rows and words ---


def fold(plan: Plan) -> list[Row]:
    """A row for each stage; if those are many, one for all that have the same device, bytes and number of blocks."""
    if len(plan.stages) <= MOST_ROWS:
        return [Row(stage) for stage in plan.stages]
    alike: dict[object, list[Stage]] = {}
    for stage in plan.stages:
        device, blocks = stage.device, stage.last_block - stage.first_block
        sizes = (stage.weight_bytes, stage.kv_bytes, stage.workspace_bytes)
        ends = stage.index in (0, len(plan.stages) - 1) and stage.index  # these have more to do than blocks
        alike.setdefault((device.model, device.usable_bytes, device.box, blocks, sizes, ends), []).append(stage)
    return [Row(stages[0], len(stages) - 1) for stages in alike.values()]


def _label(plan: Plan, row: Row) -> str:
    stage = row.stage
    name = place(plan, stage)
    if row.alike:
        blocks = stage.last_block - stage.first_block
        held = f"{blocks} block{'s' * (blocks != 1)}"
        return f"stage {stage.index} and {row.alike} alike · {name} · {short_model(stage.device)} · {held}"
    held = f"blocks {stage.first_block}–{stage.last_block - 1}"
    if stage.last_block - stage.first_block == 1:
        held = f"block {stage.first_block}"
    return f"stage {stage.index} · {name} · {short_model(stage.device)} · {held}"


def _title(plan: Plan, times: Prediction) -> str:
    sequences = plan.workload.sequences
    return (
        f"{plan.spec.name} in int8 on {devices_in_words([stage.device for stage in plan.stages])}: "
        "memory, time and load of its plan\n"
        f"context {plan.workload.context:,} tokens, {sequences} sequence{'s' * (sequences > 1)} at once. "
        f"Computed, not measured: {times.tokens_per_s:.3g} tokens/s, {1e3 * times.token_seconds:.3g} ms between two "
        f"tokens of a sequence, loaded in {times.load_seconds:.3g} s"
    )


def _notes(plan: Plan, folded: bool, prompt: int) -> list[str]:
    """What stands below: at most three lines of each note."""
    sources = dict.fromkeys(f"{short_model(s.device)}: {s.device.speed.source}" for s in plan.stages)
    lines = [f"All figures are computed from the plan and these speeds. {'; '.join(sources)}."]
    if any(stage.device.kind == "cuda" for stage in plan.stages):
        held = f"{readable(CONTEXT_BYTES)} for the CUDA context, {readable(SLACK_BYTES)} for what torch cannot hand out"
        lines.append(f"Reserved on a GPU: {held}.")
    if folded:
        lines.append("A row with stages that are alike shows the first of them.")
    if prompt < plan.workload.context:
        lines.append(f"The prefill that is drawn is of {prompt:,} tokens, not of the whole context.")
    lines += [f"Note: {note}" for note in plan.notes]
    return [part for line in lines for part in textwrap.wrap(line, 200, max_lines=3, placeholder=" …")]


# --- panels ---


def _draw_memory(axes: "Axes", rows: list[Row]) -> None:
    held = [memory_parts(row.stage) for row in rows]
    _set_scale(axes, rows, max(sum(parts.values()) for parts in held) / GIB, "memory [GiB]", room=1.45)
    left = [0.0] * len(rows)
    for name, (colour, hatch) in MEMORY.items():
        widths = [parts[name] / GIB for parts in held]
        axes.barh(
            range(len(rows)), widths, left=left, height=0.7, color=colour, edgecolor=EDGE, hatch=hatch, label=name
        )
        for i, width in enumerate(widths):
            _write_in(axes, left[i], width, i, f"{width:.2f}", colour == DARK)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for i, parts in enumerate(held):
        total = sum(parts.values()) / GIB
        _write_after(axes, total, i, f"{total - parts['free'] / GIB:.2f} of {total:.2f} GiB")
    _head(axes, "(a) Memory of each device, computed", MEMORY)


def _draw_load(axes: "Axes", rows: list[Row], times: PlanTimes) -> None:
    limits = [times.load_limits(row.stage) for row in rows]
    _set_scale(axes, rows, max(max(limit.values()) for limit in limits), "time since the start of the load [s]", 1.5)
    for i, limit in enumerate(limits):
        bound = max(limit, key=lambda name: limit[name])
        colour, hatch = LOADS[bound]
        axes.barh([i], [limit[bound]], height=0.7, color=colour, edgecolor=EDGE, hatch=hatch)
        _write_after(axes, limit[bound], i, f"{limit[bound]:.3g} s, {bound}-bound")
    legend = {f"limited by the {bound}": style for bound, style in LOADS.items()}
    _head(axes, "(b) Load: all stages at once, computed", legend)


def _draw_decode(axes: "Axes", rows: list[Row], times: Prediction) -> None:
    steps = f"{times.groups} step{'s' * (times.groups > 1)}"
    each = f"{times.rows} sequence{'s' * (times.rows > 1)}"
    _draw_timeline(axes, rows, decode_round(times))
    legend = {"step of an odd group": STEPS[0], "of an even group": STEPS[1], "bubble (stage waits)": BUBBLE}
    _head(axes, f"(c) Decode round: {steps} of {each} under way, computed", legend)


def _draw_prefill(axes: "Axes", rows: list[Row], plan: Plan, prompt: int) -> None:
    timeline = prefill(plan, prompt)
    _draw_timeline(axes, rows, timeline)
    legend = {"odd chunk of the prompt": STEPS[0], "even chunk": STEPS[1], "bubble (stage waits)": BUBBLE}
    chunks = f"{timeline.steps} chunk{'s' * (timeline.steps > 1)}"
    _head(axes, f"(d) Prefill of {prompt:,} tokens in {chunks}, computed", legend)


def _draw_timeline(axes: "Axes", rows: list[Row], timeline: Timeline) -> None:
    _set_scale(axes, rows, 1e3 * timeline.seconds, "time [ms]", room=0.85)
    for i, row in enumerate(rows):
        stage = row.stage.index
        bubbles = [(1e3 * start, 1e3 * seconds) for start, seconds in timeline.bubbles(stage)]
        _draw_bars(axes, i, bubbles, BUBBLE)
        for left, width in bubbles:
            _write_in(axes, left, width, i, "bubble", False)
        for parity, style in enumerate(STEPS):
            slots = [slot for slot in timeline.of(stage) if slot.step % 2 == parity]
            bars = [(1e3 * slot.start_seconds, 1e3 * slot.seconds) for slot in slots]
            _draw_bars(axes, i, bars, style)
            for slot, (left, width) in zip(slots, bars, strict=True):
                _write_in(axes, left, width, i, str(slot.step + 1), parity == 0)
        _write_after(axes, 1e3 * timeline.seconds, i, f"busy {100 * timeline.busy_share(stage):.1f} %")


def _draw_bars(axes: "Axes", row: int, bars: list[tuple[float, float]], style: tuple[str, str]) -> None:
    """Bars of one row, as left ends and widths; narrow ones without a hatch."""
    narrow = NARROW * axes.get_xlim()[1] / _inches(axes)
    for hatch, some in (
        (style[1], [bar for bar in bars if bar[1] >= narrow]),
        ("", [bar for bar in bars if bar[1] < narrow]),
    ):
        if some:
            lefts, widths = zip(*some, strict=True)
            edge = "#999999" if style is BUBBLE else EDGE
            axes.barh([row] * len(some), widths, left=lefts, height=0.7, color=style[0], edgecolor=edge, hatch=hatch)


# --- axes and words in them ---


def _inches(axes: "Axes") -> float:
    return float(axes.get_position().width * WIDTH)


def _set_scale(axes: "Axes", rows: list[Row], most: float, label: str, room: float) -> None:
    """`most` is the end of the longest bar, `room` the inches for words behind it."""
    axes.set_xlim(0, most * _inches(axes) / (_inches(axes) - room))
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel(label, fontsize=FONT)
    axes.tick_params(labelsize=FONT)
    axes.xaxis.set_major_formatter("{x:,g}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)


def _head(axes: "Axes", title: str, legend: dict[str, tuple[str, str]]) -> None:
    """A panel's title, and below it what its colours and hatches mean."""
    from matplotlib.patches import Patch

    axes.set_title(title, loc="left", fontsize=FONT + 1.5, pad=22, fontweight="bold")
    patches = [
        Patch(facecolor=colour, edgecolor=EDGE, hatch=hatch, label=name) for name, (colour, hatch) in legend.items()
    ]
    axes.legend(
        handles=patches, loc="lower left", bbox_to_anchor=(-0.005, 1.0), ncols=len(patches), frameon=False,
        fontsize=FONT - 0.5, handlelength=2.0, handleheight=1.0, columnspacing=1.2, borderaxespad=0.3,
    )  # fmt: skip


def _write_in(axes: "Axes", left: float, width: float, row: int, text: str, on_dark: bool) -> None:
    """Write in a bar, if there is room."""
    inches = _inches(axes) * width / axes.get_xlim()[1]
    if inches < (0.62 * len(text) + 0.5) * FONT / 72:
        return
    box = None if on_dark else {"facecolor": "white", "edgecolor": "none", "pad": 0.8}
    axes.text(
        left + width / 2, row, text, ha="center", va="center", fontsize=FONT - 1, bbox=box,
        color="white" if on_dark else "black",
    )  # fmt: skip


def _write_after(axes: "Axes", at: float, row: int, text: str) -> None:
    axes.annotate(text, (at, row), (4, 0), textcoords="offset points", va="center", fontsize=FONT - 0.5)
