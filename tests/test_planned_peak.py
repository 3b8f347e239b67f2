"""What a plan says that running takes is what it takes: memory for rows to the byte, and a process's peak."""

import pytest
from test_planned_bytes import SETTINGS, devices
from tiny import SIZES, save_tiny

from bigint8 import Workload
from bigint8.model.fused_stage import FusedStage
from bigint8.plan import memory
from bigint8.plan.cut import make_plan
from bigint8.run.running import RunningStage
from bigint8.session import find_model


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", sorted(SIZES))
def test_a_stage_keeps_as_much_memory_for_rows_as_planned(kind, tied, tmp_path):
    save_tiny(kind, tied, tmp_path)
    for name, count, work in (("as it is", 1, Workload(64, 3, 32)), ("head", 2, Workload(32, 70))):
        found = find_model(tmp_path, SETTINGS[name])
        plan = make_plan(found.spec, devices(count), work)
        kept = memory.cpu_row_bytes(plan.spec.known_layout, work)
        for stage in plan.stages:
            running = RunningStage(plan, stage.index, "cpu", lambda done, total: None)._stage
            assert isinstance(running, FusedStage)
            is_first, is_last = stage.index == 0, stage.index == count - 1
            has_head = is_first if tied else is_last
            ends = kept["before"] * is_first + kept["after"] * is_last + kept["head"] * has_head
            assert running.row_bytes == kept["blocks"] + ends, (name, stage.index)
