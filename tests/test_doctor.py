"""The self-test on this machine's CPU: what it prints, and that it notices a kernel that is wrong."""

import json

import pytest
import torch
from bigint8_kernels import cpu, cpu_weights, dispatch
from bigint8_kernels.ops import GpuOperations
from commands import assert_refused

from bigint8 import doctor, examine, examine_steps


@pytest.fixture
def examined(run, monkeypatch, tmp_path):
    """The command on this CPU and a small layer: how it ended, and its findings."""
    monkeypatch.setattr(examine, "LAYERS", {"small": (130, 70)})
    monkeypatch.setattr(examine, "COPY_BYTES", 2**23)
    monkeypatch.setattr(examine, "measurements", lambda device: iter([("memory, torch.sum", lambda: "9 GB/s")]))

    def command():
        file = tmp_path / "findings.json"
        ended = run(doctor, "--device", "cpu", "--folder", tmp_path, "--json", file)
        return *ended, json.loads(file.read_text())["findings"]

    return command


def test_on_a_healthy_machine_every_kernel_is_good_and_it_exits_with_0(examined):
    code, out, error, findings = examined()
    assert (code, error) == (0, "")
    assert "Every kernel computes what it should." in out
    assert {finding["verdict"] for finding in findings} == {"good", "measured"}
    named = " ".join(finding["what"] for finding in findings)
    for kernel in (
        "quantize_rows",
        "copy_values",
        "int8_linear, 16bit",
        "int8_linear, int8",
        "float_linear",
        "read past",
    ):
        assert kernel in named
    assert not any("not measured" in finding["result"] for finding in findings)


def wrong_product(monkeypatch):
    right = cpu.linear_16bit
    monkeypatch.setattr(cpu, "linear_16bit", lambda *tensors: right(*tensors) * 1.01)


def wrong_rounding(monkeypatch):
    right = cpu_weights.quantize_rows

    def quantize_rows(source, out, scale):
        finite = right(source, out, scale)
        out[0, 0] += 1
        return finite

    monkeypatch.setattr(cpu_weights, "quantize_rows", quantize_rows)


def blind_to_nan(monkeypatch):
    right = cpu_weights.quantize_rows
    monkeypatch.setattr(cpu_weights, "quantize_rows", lambda *tensors: right(*tensors) or True)


def crashing(monkeypatch):
    def float_linear(*tensors):
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(examine, "float_linear", float_linear)


@pytest.mark.parametrize(
    ("damage", "kernel", "said"),
    [
        (wrong_product, "int8_linear, 16bit, float32", "off by"),
        (wrong_rounding, "quantize_rows, float16", "differs from the reference"),
        (blind_to_nan, "quantize_rows, bfloat16", "NaN"),
        (crashing, "float_linear", "illegal memory access"),
    ],
)
def test_a_kernel_that_is_wrong_is_named_and_it_exits_with_1(examined, monkeypatch, damage, kernel, said):
    damage(monkeypatch)
    code, out, error, findings = examined()
    assert code == 1
    lines = [line for line in error.splitlines() if line.startswith("wrong: ")]
    assert any(kernel in line and said in line for line in lines)
    assert "WRONG" in out and "Every kernel" not in out
    assert [f["what"] for f in findings if f["verdict"] == "WRONG"] == [line.split(": ")[2] for line in lines]


def test_a_peer_that_fails_is_no_fault_of_ours():
    def fails():
        raise OSError("no such library")

    finding = examine._measured("cpu", "a peer", fails)
    assert finding.verdict == "measured" and "not measured" in finding.result and "no such library" in finding.result


def test_without_a_gpu_it_says_so_and_cuda_is_an_error(run):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert_refused(run(doctor, "--device", "cuda"), "no CUDA GPU was found")
    assert dispatch.backend_of(torch.device("cpu")) == "cpu"


def test_a_step_on_a_gpu_is_held_against_plain_torch(monkeypatch):
    """Its kernels are interpreted here."""
    monkeypatch.setattr(examine_steps, "operations", GpuOperations)
    assert examine_steps.check_step(torch.device("cpu")) is None
    monkeypatch.setattr(GpuOperations, "activate", lambda self, x, activation, gated: x[:, : x.shape[1] // 2])
    assert "tokens: off by" in (examine_steps.check_step(torch.device("cpu")) or "")


def test_without_a_gpu_it_says_what_was_not_measured(examined):
    *_, findings = examined()
    (missing,) = [finding for finding in findings if finding["device"] == "cuda"]
    assert "graphs" in missing["what"] and missing["result"] == "unmeasured: there is no GPU here"
