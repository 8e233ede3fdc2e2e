"""`slora bench serve` against a server as its users start it."""

import json
import os
import pty
import signal
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest
from serving import ADMIN, EXAMPLE, Served

from slora.cli import main

pytestmark = pytest.mark.cpu_only(reason="the load, whatever answers it")


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with Served(*EXAMPLE) as served:
        yield served


def bench(served: Served, *arguments: str) -> int:
    return main(["bench", "serve", served.url, "--api-key", ADMIN, "--input-len", "2:6", *arguments])


def test_a_load_is_reported_written_and_plotted(
    served: Served, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    report_path, plot_path = tmp_path / "load.json", tmp_path / "load.svg"
    files = ["--json", str(report_path), "--plot", str(plot_path)]
    assert bench(served, "--requests", "20", "--connections", "4", "--output-len", "5", *files) == 0
    printed = capsys.readouterr()
    assert "20 sent, 20 completed" in printed.out
    assert "time to first token" in printed.out
    assert "between tokens" in printed.out
    assert printed.err == "", "no progress bar without a terminal"
    report = json.loads(report_path.read_text())
    assert (report["completed"], report["statuses"]) == (20, {"200": 20})
    assert report["time_to_first_token"]["count"] == 20
    assert report["tokens_per_s"] == pytest.approx(100 / report["elapsed_s"])
    assert len(report["config"]["models"]) == 10, "every adapter, without the base"
    assert ADMIN not in report_path.read_text()
    text = "".join(ElementTree.parse(plot_path).getroot().itertext())
    assert "20 of 20 requests completed" in text or "<path" in plot_path.read_text()


def test_adapters_and_clients_come_and_go(served: Served, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    before = served.call("/v1/models")[1]
    path = tmp_path / "load.json"
    rates = ["--rate", "60", "--cv", "2", "--churn", "10", "--cancel", "0.3", "--admin-key", ADMIN]
    names = ["--adapters", "upper,reverse", "--popularity", "zipf"]
    assert bench(served, *rates, *names, "--duration", "3", "--output-len", "3:9", "--json", str(path)) == 0
    report = json.loads(path.read_text())
    assert report["churn"]["registered"] > 3, report["churn"]
    assert report["churn"]["unloaded"] == report["churn"]["registered"]
    assert report["left"] > 5
    assert report["completed"] + report["left"] == report["sent"]
    assert report["config"]["arrivals"] == {"kind": "gamma", "rate": 60.0, "cv": 2.0}
    assert "registered" in capsys.readouterr().out
    assert served.call("/v1/models")[1] == before, "no copy stays"


def test_whole_answers_have_no_times_of_tokens(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(served, "--requests", "4", "--no-stream", "--adapters", "base", "--seed", "3") == 0
    printed = capsys.readouterr().out
    assert "whole answer" in printed
    assert "time to first token" not in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--adapters", "nobody"], "the server has no model 'nobody'; hint: it has base, "),
        (["--churn", "1"], "needs an admin's key"),
        (["--cv", "2"], "--cv is for --rate"),
        (["--alpha", "2"], "--alpha is for --popularity"),
        (["--rate", "0"], "rate is 0, it must be 0.001 to 1000000"),
        (["--cancel", "2"], "cancel is 2, it must be 0 to 1"),
        (["--input-len", "9:3"], "input_tokens is 9:3"),
        (["--plot", "load.jam"], "the ending must be one of"),
        (["--plot", "/nowhere/load.svg"], "there is no such folder"),
        (["--json", "/nowhere/load.json"], "there is no such folder"),
        (["--json", "/"], "--json '/': is a folder; hint: name a file in it"),
    ],
)
def test_a_mistake_is_said_before_anything_is_sent(
    served: Served, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert bench(served, "--duration", "1", *arguments) == 1
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.out == ""


@pytest.mark.parametrize("arguments", [["--rate", "nan"], ["--seed", "-1"], ["--output-len", "-1:4"]])
def test_what_is_no_number_is_no_argument(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["bench", "serve", "http://127.0.0.1:1", f"{arguments[0]}={arguments[1]}"])
    assert end.value.code == 2
    assert f"argument {arguments[0]}: invalid" in capsys.readouterr().err


def test_a_plot_without_its_library_is_refused_with_a_hint(
    served: Served, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert bench(served, "--plot", "load.svg") == 1
    assert "--plot needs matplotlib; hint: pip install 'slora[plot]'" in capsys.readouterr().err


def test_no_server_and_no_key_are_said(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "serve", "http://127.0.0.1:9"]) == 1
    assert "hint: start one with `slora serve MODEL`" in capsys.readouterr().err
    assert main(["bench", "serve", served.url]) == 1
    assert "hint: give the key with --api-key" in capsys.readouterr().err
    assert main(["bench", "serve", "127.0.0.1:9"]) == 1
    assert "must be http://HOST:PORT" in capsys.readouterr().err


def test_a_terminal_sees_progress_and_ctrl_c_ends_with_what_was_measured(served: Served) -> None:
    reader, writer = pty.openpty()
    termios.tcsetwinsize(writer, (24, 100))
    command = [sys.executable, "-m", "slora", "bench", "serve", served.url, "--api-key", ADMIN, "--duration", "20"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=writer)
    os.close(writer)
    seen = b""
    while b" sent, " not in seen:
        seen += os.read(reader, 4096)
    process.send_signal(signal.SIGINT)
    printed = process.communicate(timeout=60)[0]
    os.close(reader)
    assert process.returncode == 130
    assert b"unfinished" in printed
    assert b"requests per second" in printed
