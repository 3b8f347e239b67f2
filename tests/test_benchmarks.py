"""The benchmarks run from end to end and print a figure for every side; how large it is, is not asked here."""

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import typer
from tiny import save_tiny
from typer.testing import CliRunner

from bigint8.compare_plans import compare

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def load(name: str):
        for module in ("rounds", name):
            sys.modules.pop(module, None)
        return importlib.import_module(name)

    return load


def run(module, *arguments: str) -> str:
    app = typer.Typer()
    app.command()(module.main)
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def run_sides_here(module, monkeypatch) -> None:
    """Each side runs in this process, as its own would run it: torch is imported once."""

    def run_child(script: str, arguments: list[str]) -> dict[str, float]:
        assert script == module.__file__
        return json.loads(run(module, *arguments).strip().splitlines()[-1])

    monkeypatch.setattr(module, "run_child", run_child)


def test_medians_and_ratios_are_of_the_rounds(bench):
    rounds = bench("rounds")
    cost = rounds.Comparison("t", "seconds")
    for ours, theirs in ((1.0, 3.0), (2.0, 4.0), (4.0, 4.0)):
        cost.add("ours", {"seconds": ours})
        cost.add("theirs", {"seconds": theirs})
    assert cost.medians() == {"ours": {"seconds": 2.0}, "theirs": {"seconds": 4.0}}
    assert cost.ratios("ours") == {"theirs": 2.0}
    speed = rounds.Comparison("t", "tokens/s", lower=False)
    speed.add("ours", {"tokens/s": 30.0})
    speed.add("theirs", {"tokens/s": 10.0})
    assert speed.ratios("ours") == {"theirs": 3.0}


def test_sides_take_turns_and_one_that_fails_is_told_of(bench):
    rounds = bench("rounds")
    order = []

    def side(name):
        def work():
            order.append(name)
            if name == "b":
                raise RuntimeError("first line\nno such instruction")
            return {"seconds": 1.0}

        return work

    comparison = rounds.Comparison("t", "seconds")
    rounds.interleave(comparison, {name: side(name) for name in "abc"}, 2)
    assert order == ["a", "b", "c", "a", "c"]
    assert comparison.failed == {"b": "RuntimeError: no such instruction"}


def test_a_side_in_a_process_of_its_own_gives_its_last_line_or_the_last_of_its_errors(bench, tmp_path):
    rounds = bench("rounds")
    script = tmp_path / "side.py"
    script.write_text("import sys\nprint('noise')\nprint('{\"seconds\": ' + sys.argv[1] + '}')\n")
    assert rounds.run_child(str(script), ["1.5"]) == {"seconds": 1.5}
    script.write_text("raise OSError('no such disk')\n")
    with pytest.raises(RuntimeError, match=r"^OSError: no such disk$"):
        rounds.run_child(str(script), [])


@pytest.mark.skipif(sys.platform != "linux", reason="reads peaks from /proc")
def test_load_measures_every_side(bench, monkeypatch, tmp_path):
    from bigint8.session import quantize

    save_tiny("llama", False, tmp_path / "model")
    quantize(tmp_path / "model", tmp_path / "int8", progress=False)
    options = ["--rounds", "1", "--cache", "cold", "--without", "bitsandbytes", "--json", str(tmp_path / "j")]
    load = bench("load")
    run_sides_here(load, monkeypatch)
    run(load, str(tmp_path / "model"), "--int8", str(tmp_path / "int8"), *options)
    result = json.loads((tmp_path / "j").read_text())
    (comparison,) = result["comparisons"]
    assert comparison["title"] == "load model, cold page cache" and not comparison["failed"]
    assert set(comparison["medians"]) == {"bigint8", "bigint8 from int8", "raw read", "first touch"}
    assert all(figures["seconds"] > 0 for figures in comparison["medians"].values())
    assert result["machine"]["versions"]["torch"]


def test_matmul_measures_every_side_that_is_installed(bench, tmp_path, monkeypatch):
    pytest.importorskip("bitsandbytes")
    matmul = bench("matmul")
    monkeypatch.setattr(matmul, "SHAPES", {"small": ((64, 96),)})
    monkeypatch.setattr(matmul, "DISTINCT_BYTES", 0)
    monkeypatch.setattr(matmul, "SIDE_SECONDS", 0.0)
    options = ["--model", "small", "--rows", "1", "--rows", "20", "--outliers", "0.05", "--rounds", "2"]
    run(matmul, *options, "--json", str(tmp_path / "j"))
    for comparison in json.loads((tmp_path / "j").read_text())["comparisons"]:
        sides = {"bigint8", "bigint8 int8 activations", "float32", "bfloat16", "bitsandbytes"}
        assert sides <= set(comparison["medians"]) and set(comparison["failed"]) <= {"torchao"}
        assert len(comparison["rounds"]["bigint8"]) == 2


def test_generate_measures_prefill_and_decode(bench, monkeypatch, tmp_path):
    generate = bench("generate")
    run_sides_here(generate, monkeypatch)
    save_tiny("llama", False, tmp_path / "model")
    options = ["--checkpoint", str(tmp_path / "model"), "--prompt", "16", "--tokens", "12", "--rounds", "1"]
    without = [word for side in ("bitsandbytes", "llama.cpp Q8_0", "bfloat16") for word in ("--without", side)]
    output = run(generate, "tiny", *options, "--batch", "2", *without, "--json", str(tmp_path / "j"))
    decode, prefill = json.loads((tmp_path / "j").read_text())["comparisons"]
    assert not decode["failed"]
    assert (
        set(decode["medians"])
        == set(prefill["medians"])
        == {"bigint8", "bigint8 forward", "bigint8 int8_head", "float32"}
    )
    assert "batch 2" in output and decode["ratios"]["float32"] > 0


def test_a_start_is_timed_by_what_the_program_says(bench):
    start = bench("start")
    says = "import time as t; t.sleep(0.2); print('loaded; sizes', flush=True); t.sleep(0.1); print('[3 tokens in')"
    seconds = start.timed([sys.executable, "-c", says])
    assert 0.2 < seconds["to loaded"] < seconds["to the last token"] < seconds["to its end"]
    assert seconds["tokens"] == pytest.approx(seconds["to the last token"] - seconds["to loaded"])
    with pytest.raises(RuntimeError, match="no such model"):
        start.timed([sys.executable, "-c", "import sys; sys.exit('no such model')"])


def test_plans_are_compared_in_a_table_and_a_worse_one_of_ours_ends_with_an_error(bench, tmp_path, monkeypatch):
    plans = bench("plans")
    monkeypatch.setattr(plans, "MACHINES", ({"rtx-3060": 1}, {"rtx-3060": 1, "rtx-4090": 1}))
    written = run(plans, "--model", "phi-2", "--all", "--markdown", str(tmp_path / "table.md"))
    assert "2 cases" in written and "WORSE" not in written
    assert (tmp_path / "table.md").read_text().count("| phi-2 |") == 2
    monkeypatch.setattr(plans, "compare", lambda *case: replace(compare(*case), ours=None))
    app = typer.Typer()
    app.command()(plans.main)
    assert CliRunner().invoke(app, ["--model", "phi-2", "--all"]).exit_code == 1
