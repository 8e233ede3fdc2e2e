"""schemathesis against a server, from the server's own OpenAPI document."""

import json
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from conftest import ADAPTERS, NAMES
from serving import ADMIN, EXAMPLE, Served

ARGUMENTS = (*EXAMPLE, "--max-context", "48", "--max-n", "3", "--adapter-poll", "1")
"""Of a server whose answers are short."""
LEFT_OUT = ["positive_data_acceptance"]
"""A schema cannot say everything: which templates know a role, which fields go together, which paths are let in."""
LEFT_OUT_NARROWED = [*LEFT_OUT, "negative_data_rejection"]
"""What the narrowed document excludes may be accepted by the server."""
TIMEOUT_S = 60
EVENT = r'^(\{"id":"(chat)?cmpl-.*\}|\[DONE\])$'
"""An event's data. An error in a stream is none: nothing here may break one."""
Document = dict[str, Any]


def document_of(served: Served) -> Document:
    """The server's document. What it says of an event's data, schemathesis would ask of the event with its fields."""
    document: Document = json.loads(served.call("/openapi.json")[1])
    event = {"type": "object", "required": ["data"], "properties": {"data": {"type": "string", "pattern": EVENT}}}
    for operations in document["paths"].values():
        for operation in operations.values():
            content = operation["responses"].get("200", {}).get("content", {})
            if "text/event-stream" in content:
                content["text/event-stream"] = {"schema": event}
    return document


def narrowed(document: Document) -> Document:
    """With names and paths of adapters that are there, so that random requests come further than to a 404."""
    paths = [str(ADAPTERS.resolve() / name) for name in NAMES]
    fields: dict[str, list[Any]] = {"stream": [True, False], "model": ["base", *NAMES, "base:upper"]}
    fields |= {"lora_name": [*NAMES, "new"], "lora_path": paths, "path": paths}
    found: Document = json.loads(json.dumps(document))
    for operations in found["paths"].values():
        for operation in operations.values():
            for parameter in operation.get("parameters", []):
                parameter["schema"] = {"enum": [*NAMES, "new", "base"]}
            for content in operation.get("requestBody", {}).get("content", {}).values():
                properties = content["schema"].get("properties", {})
                properties |= {name: {"enum": fields[name]} for name in fields.keys() & properties.keys()}
    return found


def fuzz(served: Served, is_narrowed: bool, max_examples: int, seed: int, *options: str) -> Document:
    """Its report: cases by phase and outcome, and every failure."""
    document = document_of(served)
    left_out = LEFT_OUT_NARROWED if is_narrowed else LEFT_OUT
    with tempfile.TemporaryDirectory() as folder:
        schema, report = Path(folder) / "openapi.json", Path(folder) / "report.json"
        schema.write_text(json.dumps(narrowed(document) if is_narrowed else document))
        command = [sys.executable, "-m", "schemathesis.cli", "run", str(schema), "--url", served.url]
        command += [
            "--header",
            f"Authorization: Bearer {ADMIN}",
            "--phases",
            "coverage,fuzzing",
            "--continue-on-failure",
        ]
        command += ["--max-examples", str(max_examples), "--seed", str(seed), "--exclude-checks", ",".join(left_out)]
        command += [
            "--request-timeout",
            str(TIMEOUT_S),
            "--report",
            "json",
            "--report-json-path",
            str(report),
            *options,
        ]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        assert report.exists(), done.stdout + done.stderr
        found: Document = json.loads(report.read_text())
    if found["failures"] or found["errors"]:
        print(done.stdout)
    return found


def statuses(served: Served) -> Counter[int]:
    """Of every request that the server logged."""
    lines = [json.loads(line) for line in served.log if line.startswith("{")]
    return Counter(line["status"] for line in lines if "status" in line)
