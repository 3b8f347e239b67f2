"""A plan with the times that the time model gives it, as tables for people."""

from rich.console import Console

from ..plan.plan import Plan
from ..plan.predict import Prediction, predict
from .tables import new_table, print_plan


def print_plan_with_times(console: Console, plan: Plan) -> Prediction:
    """The plan, then what each stage takes and what the pipeline makes of it; returns what was predicted."""
    print_plan(console, plan)
    times = predict(plan)
    table = new_table(f"computed times: {_rows(times)} in a step, each with {times.context} tokens before it")
    for column in ("stage", "decode ms", "hop ms", f"prompt of {times.prompt} ms", "load s"):
        table.add_column(column, justify="right")
    for index, stage in enumerate(times.stages):
        table.add_row(
            str(index),
            f"{1e3 * stage.decode_seconds:.2f}",
            f"{1e3 * stage.hop_seconds:.2f}",
            f"{1e3 * stage.prefill_seconds:.1f}",
            f"{stage.load_seconds:.1f}",
        )
    console.print(table)
    console.print(
        f"{times.tokens_per_s:.1f} tokens/s with {plan.workload.sequences} at once; a sequence's next token after "
        f"{1e3 * times.token_seconds:.1f} ms, the first one of a prompt of {times.prompt} after "
        f"{times.prompt_seconds:.2f} s; loaded in {times.load_seconds:.0f} s. Computed, not measured.",
        soft_wrap=True,
    )
    for source in dict.fromkeys(stage.device.speed.source for stage in plan.stages):
        console.print(f"Speed of the devices: {source}.", soft_wrap=True)
    return times


def _rows(times: Prediction) -> str:
    return f"{times.rows} sequence{'s' * (times.rows > 1)}"
