"""The `slora` command."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoint import widen
from conftest import ADAPTERS, BASE, NAMES
from device import flags

from slora import demo
from slora.cli import ends_at_once, main

no_engine = pytest.mark.cpu_only(reason="no engine")


def test_the_demo_prints_answers_and_scores_and_succeeds(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", *flags("device")]) == 0
    output = capsys.readouterr().out
    assert "banana          reverse   ananab" in output
    for name in NAMES:
        assert f"{name:10}  1.000  0.000" in output


def test_the_demo_fails_when_a_score_is_wrong(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cases, max_tokens = demo.read_cases(demo.example_dir())
    wrong = [demo.Case(case.adapter, case.prompt, case.prompt) for case in cases if case.adapter == "sort"]
    monkeypatch.setattr(demo, "read_cases", lambda _: (wrong, max_tokens))
    assert main(["demo", *flags("device")]) == 1
    assert "sort        0.000  1.000  wrong" in capsys.readouterr().out


def test_generate_answers_prompts(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", str(BASE), "abc", "def", "--adapters", str(ADAPTERS), *flags("device", "dtype")]
    assert main([*arguments, "--adapter", "reverse"]) == 0
    assert capsys.readouterr().out == "cba\nfed\n"
    assert main([*arguments, "--adapter", "upper", "--adapter", "", "--json"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["adapter"], line["text"]) for line in found] == [("upper", "ABC"), (None, "def")]
    assert main([*arguments, "--chat", "--adapter", "upper"]) == 0
    assert capsys.readouterr().out == "ABC\nDEF\n"


def test_errors_are_one_line_and_exit_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "/nowhere", "abc", "--adapters", str(ADAPTERS), "--adapter", "nobody"]) == 1
    error = capsys.readouterr().err
    assert 'slora: UnknownAdapterError: no adapter is named "nobody"; hint: there are count, piglatin, ' in error
    assert main(["generate", "/nowhere", "abc"]) == 1
    assert "LoadError" in capsys.readouterr().err
    assert main(["adapters", "ls", str(BASE), "--base", str(BASE)]) == 1
    assert "no adapters; hint" in capsys.readouterr().err


@no_engine
def test_arguments_that_nothing_takes_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["generate", str(BASE), "abc", "--top-q", "1"])
    assert end.value.code == 2
    assert "unrecognized arguments: --top-q" in capsys.readouterr().err


@no_engine
def test_adapters_check_accounts_for_every_tensor(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["adapters", "check", str(ADAPTERS / "piglatin"), "--base", str(BASE)]
    assert main(arguments) == 0
    output = capsys.readouterr().out
    assert "v_proj           4  20          1.5" in output
    assert "56 tensors mapped, 0 ignored" in output
    assert main([*arguments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert len(report["tensors"]) == 56


@no_engine
def test_adapters_check_says_what_large_ranks_need(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    widen(ADAPTERS / "count", tmp_path / "wide", 16)
    assert main(["adapters", "check", str(tmp_path / "wide"), "--base", str(BASE)]) == 0
    note = "needs max_rank = 384; the default is 256"
    assert note in capsys.readouterr().out
    assert main(["adapters", "ls", str(tmp_path), "--base", str(BASE)]) == 0
    assert note in capsys.readouterr().out.splitlines()[-1]


@no_engine
def test_adapters_check_says_why_not(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = json.loads((ADAPTERS / "upper" / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    (tmp_path / "adapter_model.safetensors").symlink_to(ADAPTERS / "upper" / "adapter_model.safetensors")
    arguments = ["adapters", "check", str(tmp_path), "--base", str(BASE)]
    assert main(arguments) == 1
    assert "refused" in (output := capsys.readouterr().out)
    assert "use_dora" in output
    assert main([*arguments, "--json"]) == 1
    assert "use_dora" in json.loads(capsys.readouterr().out)["error"]


@no_engine
def test_adapters_ls_lists_a_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["adapters", "ls", str(ADAPTERS), "--base", str(BASE)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == NAMES, "and no note"


@no_engine
def test_doctor_says_what_would_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    assert "torch" in (output := capsys.readouterr().out)
    assert "device cpu" in output


@no_engine
@pytest.mark.parametrize(
    "command", [[], ["demo"], ["generate"], ["adapters"], ["adapters", "check"], ["serve"], ["doctor"]]
)
def test_help_teaches(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([*command, "--help"])
    assert end.value.code == 0
    assert "usage: slora" in capsys.readouterr().out


@no_engine
def test_without_a_command_it_says_which_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "slora adapters check" in capsys.readouterr().out


@no_engine
@pytest.mark.parametrize(
    ("reader", "error"), [("| true", ""), ("> /dev/full", "slora: [Errno 28] No space left on device")]
)
def test_output_that_nobody_takes_is_one_line_at_most(reader: str, error: str) -> None:
    command = f"{sys.executable} -m slora adapters ls {ADAPTERS} --base {BASE} {reader}; exit ${{PIPESTATUS[0]}}"
    process = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (process.returncode, process.stderr.strip()) == (1, error)


@no_engine
@pytest.mark.parametrize(("output", "found"), [("", "a table\n"), (">&-", "")])
def test_what_was_printed_before_another_file_fails_is_there(output: str, found: str) -> None:
    code = (
        "import sys\n"
        "from slora import cli\n"
        "def run(_):\n"
        "    print('a table')\n"
        "    raise OSError(28, 'No space left on device')\n"
        "cli.run_doctor = run\n"
        "sys.exit(cli.main(['doctor']))\n"
    )
    command = ["bash", "-c", f'PYTHONUNBUFFERED= "$0" -c "$1" {output}', sys.executable, code]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    error = "slora: [Errno 28] No space left on device\n"
    assert (process.returncode, process.stdout, process.stderr) == (1, found, error)


@no_engine
def test_without_a_standard_output_it_works() -> None:
    command = f"{sys.executable} -m slora adapters ls {ADAPTERS} --base {BASE} >&-"
    process = subprocess.run(["bash", "-c", command], stderr=subprocess.PIPE, text=True, check=False)
    assert (process.returncode, process.stderr) == (0, "")


@no_engine
def test_ctrl_c_that_is_ignored_stays_so_while_it_loads() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with ends_at_once():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@no_engine
def test_ctrl_c_ends_the_process_at_once_while_it_loads() -> None:
    code = (
        "import os, signal, time\n"
        "from slora.cli import ends_at_once\n"
        "with ends_at_once():\n"
        "    try:\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "        time.sleep(10)\n"
        "    except KeyboardInterrupt:\n"
        "        pass\n"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (process.returncode, process.stderr) == (130, "")


@no_engine
def test_python_m_slora_is_the_command() -> None:
    process = subprocess.run([sys.executable, "-m", "slora", "--version"], capture_output=True, text=True, check=True)
    assert process.stdout.startswith("slora ")
    wrong = subprocess.run([sys.executable, "-m", "slora", "fly"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2
