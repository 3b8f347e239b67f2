"""Sides of a comparison, run in turn, and what is said of them: medians, ratios, the machine, the versions."""

import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
from rich import box
from rich.console import Console
from rich.table import Table

PACKAGES = ("bigint8", "torch", "transformers", "bitsandbytes", "torchao", "llama-cpp-python", "numba")

Figures = dict[str, float]


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    from bigint8.plan.devices import cpu_device

    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    flags = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []
    told = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16")
    return {
        "cpu": cpu_device().model,
        "instructions": [flag for flag in told if flag in flags],
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "versions": versions,
    }


@dataclass
class Comparison:
    """Figures of several sides over several rounds. `lower` says whether the main figure, the first, is a cost."""

    title: str
    main: str
    lower: bool = True
    rounds: dict[str, list[Figures]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def add(self, side: str, figures: Figures | None, reason: str = "") -> None:
        if figures is None:
            self.failed[side] = reason
        else:
            self.rounds.setdefault(side, []).append(figures)

    def medians(self) -> dict[str, Figures]:
        return {
            side: {key: statistics.median(figures[key] for figures in rounds) for key in rounds[0]}
            for side, rounds in self.rounds.items()
        }

    def ratios(self, ours: str) -> dict[str, float]:
        """How many times better our main figure is than each other side's: medians of the rounds' own ratios."""
        mine = [figures[self.main] for figures in self.rounds.get(ours, [])]
        result = {}
        for side, rounds in self.rounds.items():
            theirs = [figures[self.main] for figures in rounds]
            pairs = [(t / m if self.lower else m / t) for m, t in zip(mine, theirs, strict=False) if m and t]
            if side != ours and pairs:
                result[side] = statistics.median(pairs)
        return result

    def print(self, console: Console, ours: str, digits: Mapping[str, int] | None = None) -> None:
        medians, ratios = self.medians(), self.ratios(ours)
        rounds = max((len(r) for r in self.rounds.values()), default=0)
        table = Table(title=f"{self.title}; medians of {rounds}", title_justify="left", box=box.SIMPLE_HEAD)
        table.add_column("side")
        for key in next(iter(medians.values()), {}):
            table.add_column(key, justify="right")
        table.add_column(f"{ours} is better by", justify="right")
        for side, figures in medians.items():
            shown = [f"{value:.{(digits or {}).get(key, 2)}f}" for key, value in figures.items()]
            table.add_row(side, *shown, f"{ratios[side]:.2f} x" if side in ratios else "")
        console.print(table)
        for side, reason in self.failed.items():
            console.print(f"{side}: not measured: {reason}", soft_wrap=True)

    def to_dict(self, ours: str) -> dict[str, Any]:
        return {
            "title": self.title,
            "main": self.main,
            "medians": self.medians(),
            "ratios": self.ratios(ours),
            "rounds": self.rounds,
            "failed": self.failed,
        }


def interleave(comparison: Comparison, sides: Mapping[str, Callable[[], Figures]], rounds: int) -> None:
    """Run each side once a round. A side that fails is told of and left out from then on."""
    for _ in range(rounds):
        for side, run in sides.items():
            if side in comparison.failed:
                continue
            try:
                comparison.add(side, run())
            except Exception as error:
                reason = str(error).strip().splitlines()
                comparison.add(side, None, f"{type(error).__name__}: {reason[-1] if reason else ''}")


def run_child(script: str, arguments: Sequence[str], timeout: float = 3600) -> Figures:
    """Run one side in a process of its own, which prints its figures as its last line, in JSON."""
    command = [sys.executable, script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=dict(os.environ))
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1])
    figures: Figures = json.loads(lines[-1])
    return figures


def write_json(file: Path | None, comparisons: Sequence[Comparison], ours: str) -> None:
    if file is not None:
        plain = {"machine": machine(), "comparisons": [comparison.to_dict(ours) for comparison in comparisons]}
        file.write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")


def print_machine(console: Console) -> None:
    about = machine()
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items() if number)
    console.print(
        f"{about['cpu']} ({' '.join(about['instructions'])}), {about['memory_gb']} GB; {about['system']}; {versions}",
        soft_wrap=True,
    )
