"""`slora bench serve`: a load on a running server, and what came of it."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm  # type: ignore[import-untyped]

from slora import _core
from slora.errors import ConfigError, RequestError
from slora.remote import Remote

POLL_S = 0.2
MAX_DURATION_S = 1e7
UNKNOWN_VOCABULARY = (100, 1000)
"""Ids that every vocabulary has."""


def choose_models(remote: Remote, adapters: str) -> list[dict[str, str | None]]:
    """What requests ask for: `auto` (every adapter, or the base if there is none) or names, separated by commas."""
    found = {model["id"]: model for model in remote.models()}
    if adapters == "auto":
        names = [name for name, model in found.items() if model.get("parent")] or list(found)[:1]
    else:
        names = [name for name in adapters.split(",") if name]
    if unknown := [name for name in names if name not in found]:
        raise ConfigError(f"the server has no model {unknown[0]!r}; hint: it has {', '.join(list(found)[:20])}")
    return [{"name": name, "path": found[name].get("root") if found[name].get("parent") else None} for name in names]


def token_ids(remote: Remote) -> dict[str, int]:
    """Ids of random prompts: the middle half of the vocabulary, because special tokens lie at its ends."""
    try:
        size = remote.get("/tokenizer_info")["vocab_size"]
        least, most = size // 4, size * 3 // 4
    except (RequestError, KeyError, TypeError):
        least, most = UNKNOWN_VOCABULARY
    return {"min": least, "max": most}


def run_load(config: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """The report of a load, and whether it ran to its end: ctrl-C stops it."""
    load = _core.Load(json.dumps(config))
    limit = config["num_requests"]
    unit = (
        {"unit": " requests"} if limit else {"unit": " s", "bar_format": "{l_bar}{bar}| {n:.0f}/{total:.0f} s{postfix}"}
    )
    is_whole = True
    with tqdm(total=limit or config["duration_s"], disable=not sys.stderr.isatty(), leave=False, **unit) as bar:
        try:
            while not load.wait(POLL_S):
                elapsed_s, sent, ended = load.progress()
                bar.set_postfix_str(f"{sent} sent, {sent - ended} running", refresh=False)
                bar.n = ended if limit else min(elapsed_s, config["duration_s"])
                bar.refresh()
        except KeyboardInterrupt:
            load.stop()
            is_whole = False
    report: dict[str, Any] = json.loads(load.finish())
    return report, is_whole


def run(options: argparse.Namespace) -> int:
    """Run a load as the command line says."""
    remote = Remote(options.url, options.api_key)
    alpha = {"zipf": 1.0, "power": 0.3}.get(options.popularity)
    if options.alpha is not None and alpha is None:
        raise ConfigError("--alpha is for --popularity zipf or power")
    if options.cv is not None and options.rate is None:
        raise ConfigError("--cv is for --rate")
    shape = {"alpha": alpha if options.alpha is None else options.alpha} if alpha else {}
    if options.rate is None:
        arrivals = {"kind": "closed", "connections": options.connections}
    elif options.cv in (None, 1.0):
        arrivals = {"kind": "poisson", "rate": options.rate}
    else:
        arrivals = {"kind": "gamma", "rate": options.rate, "cv": options.cv}
    duration_s = options.duration if options.duration is not None else (MAX_DURATION_S if options.requests else 10.0)
    config = {
        "url": remote.url,
        "api_key": options.api_key,
        "admin_key": options.admin_key,
        "models": choose_models(remote, options.adapters),
        "popularity": {"kind": options.popularity, **shape},
        "arrivals": arrivals,
        "duration_s": duration_s,
        "num_requests": options.requests,
        "input_tokens": options.input_len,
        "output_tokens": options.output_len,
        "token_ids": options.token_ids or token_ids(remote),
        "stream": not options.no_stream,
        "cancel": options.cancel,
        "churn_per_s": options.churn,
        "timeout_s": options.timeout,
        "slo_ttft_s": options.slo_ttft,
        "slo_itl_s": options.slo_itl,
        "seed": options.seed,
    }
    return bench(config, options.json, options.plot)


def bench(config: dict[str, Any], json_path: Path | None, plot_path: Path | None) -> int:
    """Run a load and show its report: 0, 1 if no request was answered whole, 130 after ctrl-C."""
    for flag, path in (("--json", json_path), ("--plot", plot_path)):
        if path:
            _check_writable(flag, path)
    if plot_path:
        from slora.bench_plot import check, plot

        check(plot_path)
    report, is_whole = run_load(config)
    print(table(report))
    if json_path:
        json_path.write_text(json.dumps(report, indent=2) + "\n")
    if plot_path:
        plot(report, plot_path)
    if not is_whole:
        return 130
    return 0 if report["completed"] or report["left"] else 1


def _check_writable(flag: str, path: Path) -> None:
    """Before the load runs: it may take long."""
    folder = path.absolute().parent
    if not folder.is_dir():
        raise ConfigError(f"{flag} {str(path)!r}: there is no such folder")
    if path.is_dir():
        raise ConfigError(f"{flag} {str(path)!r}: is a folder; hint: name a file in it")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise ConfigError(f"{flag} {str(path)!r}: cannot be written")


def table(report: dict[str, Any]) -> str:
    """The figures that people compare."""
    lines = [f"{name:28}{value}" for name, value in _counts(report)]
    lines += ["", f"{'milliseconds':28}{'mean':>10}{'p50':>10}{'p90':>10}{'p99':>10}{'max':>10}"]
    times = [
        ("time to first token", "time_to_first_token"),
        ("between tokens", "inter_token"),
        ("whole answer", "end_to_end"),
        ("refusal", "refusals"),
    ]
    for name, key in times:
        if report[key]["count"]:
            lines.append(f"{name:28}" + "".join(f"{report[key][f'{at}_ms']:10.2f}" for at in _COLUMNS))
    if report["first_error"]:
        lines += ["", f"first error: {report['first_error']}"]
    return "\n".join(lines)


_COLUMNS = ("mean", "p50", "p90", "p99", "max")


def _counts(report: dict[str, Any]) -> Sequence[tuple[str, str]]:
    config, churn = report["config"], report["churn"]
    objectives = f"first token within {config['slo_ttft_s']:g} s, {config['slo_itl_s']:g} s between tokens"
    refused = sum(count for status, count in report["statuses"].items() if int(status) >= 400)
    ends = {"left": report["left"], "refused": refused, "broken": report["broken"], "unfinished": report["unfinished"]}
    rows = [
        ("requests", f"{report['sent']} sent, {report['completed']} completed"),
        ("", ", ".join(f"{count} {name}" for name, count in ends.items() if count)),
        ("seconds", f"{report['elapsed_s']:.2f}"),
        ("requests per second", f"{report['requests_per_s']:.2f}"),
        ("output tokens per second", f"{report['tokens_per_s']:.2f}"),
        ("goodput per second", f"{report['goodput_per_s']:.2f} ({objectives})"),
    ]
    if churn:
        failed = f", {churn['failed']} failed: {churn['first_error']}" if churn["failed"] else ""
        took = f"{churn['registering']['p50_ms']:.1f} ms each"
        rows.append(("adapters", f"{churn['registered']} registered ({took}), {churn['unloaded']} unloaded{failed}"))
    return [row for row in rows if row[1]]
