"""Whatever the service's own description allows, and what it does not, is answered without an error of the server."""

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from serving import NAME, loaded, save_model, serving

from bigint8.options import Workload

EXAMPLES = 40
"""Requests to each path that takes a body; what takes none has a quarter."""

SMALL = Workload(context=48, sequences=4, chunk=32)
"""No answer is long."""


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    folder = save_model(tmp_path_factory.mktemp("model") / "model")
    with loaded(folder, SMALL) as pipeline, serving(pipeline) as service:
        yield service


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_nothing_is_an_error_of_the_server(service, mode):
    schema = schemathesis.openapi.from_url(f"{service.url}/openapi.json")
    paths, statuses = set(), set()
    for found in schema.get_all_operations():
        operation = found.ok()
        if mode is GenerationMode.NEGATIVE and not operation.body:
            continue

        @settings(
            max_examples=EXAMPLES if operation.body else EXAMPLES // 4, deadline=None, derandomize=True, database=None,
            suppress_health_check=list(HealthCheck), phases=[Phase.generate],
        )  # fmt: skip
        @given(operation.as_strategy(generation_mode=mode))
        def ask(case):
            if isinstance(case.body, dict) and "model" in case.body and mode is GenerationMode.POSITIVE:
                case.body["model"] = NAME  # or all of them would be refused for their name
            response = case.call()
            case.validate_response(response, checks=[not_a_server_error])
            statuses.add(response.status_code)

        ask()
        paths.add(operation.path)
    assert {"/v1/completions", "/v1/chat/completions"} <= paths
    assert {200, 400} <= statuses if mode is GenerationMode.POSITIVE else 400 in statuses
    assert service.client.get("/health").status_code == 200 and service.idle()
    assert service.complete(max_tokens=3, temperature=0).json()["usage"]["completion_tokens"] == 3
