"""Many requests through a service whose clients leave and whose workers die: benchmarks/service.py, small."""

from serving import save_model
from test_benchmarks import bench  # noqa: F401  (a fixture)


def test_whoever_stays_gets_the_tokens_of_a_quiet_run_though_clients_leave_and_workers_die(bench, tmp_path):  # noqa: F811
    service = bench("service")
    folder = save_model(tmp_path / "model", ends=False)
    _, leave = service.soak_requests(60)
    assert 0 < 60 - leave.count(None) < 10
    done = service.soak_service(str(folder), 60, 16)
    assert not [name for name in done.failed if name.startswith("request")], done.failed
    assert set(done.rounds) == {"driver", "workers"}
