"""Requests that schemathesis makes of the server's own OpenAPI document."""

import json
import time
from collections import Counter

import pytest
from fuzzing import ARGUMENTS, fuzz, statuses
from serving import Served

pytestmark = pytest.mark.cpu_only(reason="requests that end in the server, before any device")

SEED = 20260


@pytest.mark.timeout(900)
def test_no_request_is_too_odd() -> None:
    with Served(*ARGUMENTS) as served:
        descriptors = served.num_descriptors()
        reports = [fuzz(served, False, 20, SEED), fuzz(served, True, 40, SEED, "--phases", "fuzzing")]
        deadline = time.monotonic() + 30
        while json.loads(served.call("/load")[1])["server_load"] or served.num_descriptors() > descriptors:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        answered = served.call("/v1/completions", {"prompt": "abc", "max_tokens": 2})
    num_cases = sum(report["test_cases"]["generated"] for report in reports)
    found: Counter[int] = statuses(served)
    print(num_cases, "cases;", found)
    for report in reports:
        assert report["failures"] == report["errors"] == []
        assert report["complete"]
    assert num_cases >= 2000
    assert answered[0] == 200
    assert found[200] > 100
    assert {status for status in found if status >= 500} == set()
