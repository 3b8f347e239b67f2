"""A box that is cut off from the network: nobody is told, and nothing comes. Its worker starts again on another one."""

import json
import sys

import pytest
from serving import until
from tiny import tiny_model

two_machines = pytest.importorskip("machines").two_machines

PROGRAM = """
import json, sys
import ray
from bigint8 import Int8Config
from bigint8.options import Cluster, Workload
from bigint8.plan.cut import make_plan
from bigint8.run.engine import Engine
from bigint8.run.pipeline import Pipeline
from bigint8.run.settings import Settings
from bigint8.session import find_model

folder, address = sys.argv[1:]

def answers(engine, fault=lambda: None):
    completions = [engine.submit(prompt, Settings(1000)) for prompt in ([5, 17, 99], [3, 42, 7, 8])]
    for count, _ in enumerate(completions[0], 1):
        if count == 10:
            fault()
    return [completion.result(200).tokens for completion in completions]

def cut():
    print("cut", flush=True)

with Pipeline(2, Cluster("cpu", address)) as pipeline:
    spec = find_model(folder, Int8Config(dtype="float32", activations="16bit")).spec
    plan = make_plan(spec, pipeline.devices(), Workload(context=1100, sequences=2))
    pipeline.load(plan, progress=False)
    with Engine.of(plan, pipeline) as engine:
        expected, before = answers(engine), [info.host for info in pipeline.infos]
        same = answers(engine, cut) == expected
        after = [info.host for info in pipeline.infos]
        print(json.dumps({"same": same, "before": before, "after": after, "restarts": engine.stats().restarts}))
"""


def workers(machine) -> int:
    listed = machine.run("ps", "ax", "-o", "args").stdout
    return sum(line.startswith("ray::Worker") for line in listed.splitlines())


def test_a_box_that_is_cut_off_loses_its_worker_to_another_one_and_no_token_changes(tmp_path):
    folder = tmp_path / "model"
    tiny_model("llama", False, max_position_embeddings=2048).save_pretrained(folder)
    with two_machines(tmp_path / "cache") as machines:
        machines.start_ray(cpus=2)
        driver = machines.first.start(sys.executable, "-c", PROGRAM, folder, machines.address)
        assert driver.stdout.readline() == "cut\n", driver.communicate()
        assert workers(machines.second) == 1
        machines.cut()
        out, error = driver.communicate(timeout=200)
        assert driver.returncode == 0, error
        found = json.loads(out.splitlines()[-1])
        assert found["same"] and found["restarts"] == 1
        assert sorted(found["before"]) == ["box-a", "box-b"] and found["after"] == ["box-a", "box-a"]
        machines.mend()
        until(lambda: workers(machines.second) == 0, 120)
