"""Requests made from the server's own OpenAPI document, good and bad: none may end in a 500.

`PACELINE_FUZZ_CASES=10000 pytest tests/server/test_server_fuzz.py` tries that many.
"""

from __future__ import annotations

import os
from collections import Counter

import hypothesis
import requests
import schemathesis
from hypothesis import HealthCheck

from tests.fixtures.serving import scripted_engine, serving

CASES = int(os.environ.get("PACELINE_FUZZ_CASES", "500"))
PATHS, GENERATED = 9, 6  # the others take no input


def test_no_request_ends_in_a_500() -> None:
    engine = scripted_engine("Hello there, <|tool_call>call:f{a:1}<tool_call|>", slots=4, context=256, truth=0.5)
    statuses: Counter[tuple[str, int]] = Counter()
    with serving(engine) as server, requests.Session() as client:
        schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
        for operation in schema.get_all_operations():
            api = operation.ok()

            @hypothesis.settings(
                max_examples=-(-CASES // GENERATED),
                deadline=None,
                database=None,
                derandomize=CASES < 1000,
                suppress_health_check=list(HealthCheck),
            )
            @hypothesis.given(
                case=api.as_strategy(generation_mode=schemathesis.GenerationMode.NEGATIVE) | api.as_strategy()
            )
            def ask(case: schemathesis.Case) -> None:
                if isinstance(case.body, dict) and case.body.get("model"):
                    case.body["model"] = "test-model"  # else nearly all would end at the unknown model
                answer = case.call(session=client)
                statuses[case.path, answer.status_code] += 1
                assert answer.status_code < 500, answer.text
                assert answer.status_code < 400 or answer.json()["error"]["message"]

            ask()
    assert not engine.scheduler.busy
    assert len({path for path, _ in statuses}) >= PATHS
    assert {200, 400} <= {status for (path, status) in statuses if path == "/v1/chat/completions"}
    print(sum(statuses.values()), "requests:", dict(statuses))
