"""The `slora` command: one function for each sub-command, beside the parser of its arguments."""

import argparse
import json
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from slora import __version__, _core, config
from slora.errors import AdapterError, LoadError, SloraError, UnknownAdapterError
from slora.options import DEFAULT_MAX_RANK, DTYPES, Options, refuse_adapter

EXAMPLES = """examples:
  slora demo                                              the embedded example, on whatever this machine has
  slora generate path/to/base "Once upon a time" --max-tokens 64
  slora generate path/to/base "hello" --adapters path/to/adapters --adapter formal
  slora adapters check path/to/adapter --base path/to/base
  slora serve path/to/base --adapter-dir path/to/adapters
  slora chat http://127.0.0.1:8000 --adapter formal
  slora bench serve http://127.0.0.1:8000 --rate 20       a load on a running server
  slora doctor                                            what is installed, and what would run
"""
MAX_NAMES_SHOWN = 20
DEVICE_HELP = "auto (default), cpu, cuda, cuda:N"
Parsers = Any
"""What argparse adds sub-commands to."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command: 0, 1 after an error, 2 for a wrong command line, 130 after ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="slora",
        description="One base LLM and thousands of LoRA adapters.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"slora {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in (add_demo, add_generate, add_adapters, add_serve, add_chat, add_bench, add_doctor):
        add(commands)
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments:
        parser.print_help()
        return 2
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        is_serve = options.run is run_serve
        options.parser.error(
            config.unrecognized(unknown) if is_serve else f"unrecognized arguments: {' '.join(unknown)}"
        )
    try:
        code: int = options.run(options)
        _flush()
        return code
    except SloraError as error:
        print(f"slora: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        return _report(error)
    except KeyboardInterrupt:
        return 130


def _flush() -> None:
    if sys.stdout is not None:  # closed: `>&-`
        sys.stdout.flush()


def _report(error: OSError) -> int:
    """Mostly of stdout: a full disk, or a reader that has enough, such as `head`."""
    if not isinstance(error, BrokenPipeError):
        print(f"slora: {error}", file=sys.stderr)
    try:
        _flush()
    except (OSError, ValueError):
        with suppress(OSError, ValueError):  # the interpreter's exit would write what is left once more
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1


@contextmanager
def ends_at_once() -> Iterator[None]:
    """Ctrl-C ends the process meanwhile: importing torch loses a KeyboardInterrupt now and then, or breaks by it."""
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler:  # ignored, as by a shell's `&`: it stays so
        yield
        return
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def add_command(
    commands: Parsers, name: str, run: Callable[[argparse.Namespace], int], help: str, examples: str = ""
) -> argparse.ArgumentParser:
    """A sub-command whose `--help` ends with examples."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=help,
        description=help[0].upper() + help[1:] + ".",
        epilog=f"examples:\n{examples}" if examples else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run, parser=parser)
    return parser


def add_demo(commands: Parsers) -> None:
    examples = "  slora demo\n  slora demo --device cpu\n"
    parser = add_command(commands, "demo", run_demo, "run the embedded example: ten adapters in one batch", examples)
    parser.add_argument("--device", default="auto", help=DEVICE_HELP)


def run_demo(options: argparse.Namespace) -> int:
    from slora import demo

    with ends_at_once():
        return demo.run(options.device)


def add_generate(commands: Parsers) -> None:
    examples = (
        '  slora generate path/to/base "Once upon a time" --max-tokens 64\n'
        '  slora generate path/to/base "abc" "def" --adapters path/to/adapters --adapter reverse --adapter upper\n'
        "  cat prompts.txt | slora generate path/to/base --json > answers.jsonl\n"
    )
    parser = add_command(commands, "generate", run_generate, "answer prompts", examples)
    parser.add_argument("model", type=Path, help="folder of the base model")
    parser.add_argument("prompts", nargs="*", help="prompts; without any, the lines of the standard input")
    parser.add_argument("--adapters", type=Path, metavar="DIR", help="folder whose sub-folders are adapters")
    parser.add_argument(
        "--adapter", action="append", metavar="NAME", help='one for all prompts, or one for each; "" is the base'
    )
    parser.add_argument("--chat", action="store_true", help="send each prompt as a user's message")
    parser.add_argument("--max-tokens", type=int, default=256, metavar="N", help="of one answer; default 256")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 (default): the likeliest token")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="1 (default): all tokens may be sampled")
    parser.add_argument("--seed", type=int, metavar="N", help="the same seed gives the same answers")
    parser.add_argument("--device", default="auto", help=DEVICE_HELP)
    parser.add_argument("--dtype", default="auto", help=f"one of {', '.join(DTYPES)}; default auto")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")


def run_generate(options: argparse.Namespace) -> int:
    import slora

    known = Options(adapters=options.adapters).adapter_paths()
    names = [name or None for name in options.adapter or [""]]
    if unknown := [name for name in names if name and name not in known]:
        there = ", ".join(list(known)[:MAX_NAMES_SHOWN]) or "none; --adapters is their folder"
        raise UnknownAdapterError(f'no adapter is named "{unknown[0]}"; hint: there are {there}')
    prompts = options.prompts or [line.rstrip("\n") for line in sys.stdin]
    sampling = {name: getattr(options, name) for name in ("max_tokens", "temperature", "top_p", "seed")}
    with ends_at_once():
        llm = slora.LLM(options.model, adapters=known, device=options.device, dtype=options.dtype)
    with llm:
        inputs = [[{"role": "user", "content": prompt}] for prompt in prompts] if options.chat else prompts
        answer: Any = llm.chat if options.chat else llm.generate
        results = answer(inputs, adapter=names[0] if len(names) == 1 else names, **sampling)
    for prompt, result in zip(prompts, results, strict=True):
        if options.json:
            fields = {"prompt": prompt, "adapter": result.adapter, "text": result.text}
            print(json.dumps(fields | {"finish_reason": result.finish_reason}, ensure_ascii=False))
        else:
            print(result.text)
    return 0


def add_adapters(commands: Parsers) -> None:
    adapters = add_command(commands, "adapters", lambda _: 2, "check adapters, list them")
    actions = adapters.add_subparsers(title="actions", metavar="ACTION", required=True)
    examples = "  slora adapters check path/to/adapter --base path/to/base\n"
    check = add_command(actions, "check", run_check, "account for every tensor of an adapter, or say why not", examples)
    check.add_argument("path", type=Path, help="folder of the adapter")
    check.add_argument("--base", type=Path, metavar="DIR", required=True, help="folder of the base model")
    check.add_argument("--json", action="store_true", help="the whole accounting, tensor by tensor")
    examples = "  slora adapters ls path/to/adapters --base path/to/base\n"
    ls = add_command(actions, "ls", run_ls, "list the adapters of a folder, and which of them can be served", examples)
    ls.add_argument("path", type=Path, help="folder whose sub-folders are adapters")
    ls.add_argument("--base", type=Path, metavar="DIR", required=True, help="folder of the base model")


def run_check(options: argparse.Namespace) -> int:
    from slora.base import open_base

    base = open_base(options.base)
    try:
        report = _core.check_adapter(str(options.path), base)
    except AdapterError as error:
        refusal = json.dumps({"path": str(options.path), "error": str(error)}, ensure_ascii=False)
        print(refusal if options.json else f"{options.path}: refused: {error}")
        return 1
    if options.json:
        print(report)
    else:
        print_report(json.loads(report))
    return 0


def print_report(report: dict[str, Any]) -> None:
    """An adapter's accounting as a table."""
    print(f"{report['folder']}: can be served")
    print(f"{'module':10}  layers  rank        scale")
    for module in report["modules"]:
        ranks = _range(module["min_rank"], module["max_rank"])
        scales = _range(module["min_scale"], module["max_scale"])
        print(f"{module['module']:10}  {module['num_layers']:6}  {ranks:10}  {scales}")
    print(
        f"{report['num_mapped']} tensors mapped, {report['num_ignored']} ignored; "
        f"{report['num_parameters']} parameters in {'+'.join(report['dtypes'])}; "
        f"{report['image_bytes']} bytes in {report['num_pages']} pages"
    )
    for warning in report["warnings"]:
        print(f"warning: {warning['message']}")
    _print_rank_note(report["max_rank"])


def _print_rank_note(rank: int) -> None:
    if rank > DEFAULT_MAX_RANK:
        print(f"note: on CUDA the engine needs max_rank = {rank}; the default is {DEFAULT_MAX_RANK}")


def _range(least: float, most: float) -> str:
    return f"{least:g}" if least == most else f"{least:g} to {most:g}"


def run_ls(options: argparse.Namespace) -> int:
    from slora.base import open_base

    base, is_good, rank = open_base(options.base), True, 0
    paths = Options(adapters=options.path).adapter_paths()
    if not paths:
        raise LoadError(f"{options.path}: no adapters; hint: a folder whose sub-folders are adapters")
    print(f"{'name':24}  rank        megabytes  modules")
    for name, path in paths.items():
        try:
            report = json.loads(_core.check_adapter(str(path), base))
        except AdapterError as error:
            is_good = False
            print(f"{name:24}  refused: {error}")
            continue
        rank = max(rank, report["max_rank"])
        modules = ", ".join(module["module"].removesuffix("_proj") for module in report["modules"])
        ranks = _range(report["min_rank"], report["max_rank"])
        print(f"{name:24}  {ranks:10}  {report['image_bytes'] / 1e6:9.2f}  {modules}")
    _print_rank_note(rank)
    return 0 if is_good else 1


def add_serve(commands: Parsers) -> None:
    parser = commands.add_parser(
        "serve",
        usage="slora serve MODEL [--config FILE] [--SETTING VALUE …]",
        help="serve the OpenAI API over HTTP",
        description=config.DESCRIPTION,
        epilog=config.EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=run_serve, parser=parser)
    config.add_flags(parser)


def run_serve(options: argparse.Namespace) -> int:
    from slora.serve import serve

    settings = config.Config(vars(options), os.environ)
    for warning in config.doubtful_variables(os.environ):
        print(f"slora: warning: {warning}", file=sys.stderr)
    if options.show_config:
        print(settings)
        return 0
    if folder := settings["adapter_dir"]:
        refuse_adapter("adapter_dir", Path(folder))
    engine = Options(**settings.fields("engine"))
    return serve(settings["model"], engine, settings.server(), settings["drain_timeout"])


def add_chat(commands: Parsers) -> None:
    examples = (
        "  slora chat http://127.0.0.1:8000 --adapter formal\n"
        "  slora chat path/to/base --adapters path/to/adapters      serves the model for as long as the chat lasts\n"
        '  echo "hello" | slora chat http://127.0.0.1:8000 --adapter upper\n\n'
        "in the chat:\n"
    )
    from slora.chat import HELP

    parser = add_command(commands, "chat", run_chat, "talk to a model and its adapters", examples + HELP)
    parser.add_argument("server", metavar="URL|MODEL", help="a running server, or the folder of a base model")
    parser.add_argument("--api-key", default=os.environ.get("SLORA_API_KEY"), metavar="KEY", help="also SLORA_API_KEY")
    parser.add_argument(
        "--adapters", type=Path, metavar="DIR", help="with MODEL: folder whose sub-folders are adapters"
    )
    parser.add_argument("--adapter", metavar="NAME", help="who answers at first; default: the base")
    parser.add_argument("--system", default="", metavar="TEXT", help="the system message")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="of one reply; default: what the context has left")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 (default): the likeliest token")


def run_chat(options: argparse.Namespace) -> int:
    from slora.chat import chat

    sampling = {"temperature": options.temperature, "max_tokens": options.max_tokens}
    return chat(options.server, options.adapters, options.api_key, options.adapter, sampling, options.system)


BENCH_EXAMPLES = """  slora bench serve http://127.0.0.1:8000                     as fast as 64 connections go
  slora bench serve URL --rate 20 --duration 60               20 independent users a second
  slora bench serve URL --rate 20 --cv 4 --popularity power --alpha 0.3    bursts, and few adapters get most
  slora bench serve URL --rate 20 --adapters sql,med --input-len 64:512 --output-len 8:128
  slora bench serve URL --rate 20 --cancel 0.1 --churn 2 --admin-key $ADMIN    clients and adapters come and go
  slora bench serve URL --rate 20 --json load.json --plot load.svg

Goodput counts the answers within --slo-ttft and --slo-itl: raise --rate until it no longer follows.
The load takes a core; for figures of a machine's own, run it on another one.
"""


def add_bench(commands: Parsers) -> None:
    bench = add_command(commands, "bench", lambda _: 2, "measure a running server")
    actions = bench.add_subparsers(title="actions", metavar="ACTION", required=True)
    parser = add_command(actions, "serve", run_bench_serve, "put a load on a running server", BENCH_EXAMPLES)
    parser.add_argument("url", metavar="URL", help="the server, http://HOST:PORT")
    parser.add_argument("--api-key", default=os.environ.get("SLORA_API_KEY"), metavar="KEY", help="also SLORA_API_KEY")
    parser.add_argument(
        "--admin-key",
        default=os.environ.get("SLORA_ADMIN_KEY"),
        metavar="KEY",
        help="also SLORA_ADMIN_KEY; for --churn",
    )
    when = parser.add_argument_group("when requests are sent")
    when.add_argument("--rate", type=number, metavar="R", help="requests a second, whatever the server does")
    when.add_argument(
        "--cv", type=number, metavar="CV", help="with --rate: variation of the gaps; 1 (default): Poisson"
    )
    when.add_argument(
        "--connections",
        type=count,
        default=64,
        metavar="N",
        help="without --rate: each sends its next request when the last is answered; default 64",
    )
    when.add_argument("--duration", type=number, metavar="S", help="default 10, or until --requests are sent")
    when.add_argument("--requests", type=count, metavar="N", help="requests in all")
    what = parser.add_argument_group("what they ask")
    what.add_argument(
        "--adapters", default="auto", metavar="NAMES", help="a,b,c: most popular first; auto: all there are"
    )
    what.add_argument(
        "--popularity", choices=("uniform", "zipf", "power"), default="uniform", help="of the adapters; default uniform"
    )
    what.add_argument("--alpha", type=number, metavar="A", help="zipf: k-th name 1/k^A, default 1; power: default 0.3")
    what.add_argument("--input-len", type=span, default="64", metavar="N[:M]", help="tokens of a prompt; default 64")
    what.add_argument("--output-len", type=span, default="32", metavar="N[:M]", help="tokens of an answer; default 32")
    what.add_argument("--token-ids", type=span, metavar="N:M", help="ids of prompts; default: half of the vocabulary")
    what.add_argument("--no-stream", action="store_true", help="whole answers, without times of tokens")
    what.add_argument("--cancel", type=number, default=0.0, metavar="SHARE", help="of clients that leave early")
    what.add_argument(
        "--churn", type=number, default=0.0, metavar="R", help="adapters replaced by fresh copies a second"
    )
    what.add_argument("--seed", type=count, default=0, metavar="N", help="of prompts and arrivals; default 0")
    good = parser.add_argument_group("what is good, and where it goes")
    good.add_argument("--slo-ttft", type=number, default=6.0, metavar="S", help="to the first token; default 6")
    good.add_argument(
        "--slo-itl", type=number, default=0.2, metavar="S", help="between tokens, on average; default 0.2"
    )
    good.add_argument("--timeout", type=number, default=600.0, metavar="S", help="of an answer; default 600")
    good.add_argument("--json", type=Path, metavar="FILE", help="all figures")
    good.add_argument("--plot", type=Path, metavar="FILE", help="tokens' times as .svg, .png or .pdf; needs matplotlib")


def span(text: str) -> dict[str, int]:
    """`N` or `N:M`."""
    least, _, most = text.partition(":")
    return {"min": count(least), "max": count(most or least)}


def count(text: str) -> int:
    """0 or more."""
    if (value := int(text)) < 0:
        raise ValueError
    return value


def number(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError
    return value


def run_bench_serve(options: argparse.Namespace) -> int:
    from slora import bench

    return bench.run(options)


def add_doctor(commands: Parsers) -> None:
    add_command(commands, "doctor", run_doctor, "say what is installed, and what would run")


def run_doctor(options: argparse.Namespace) -> int:
    from slora import doctor

    with ends_at_once():
        return doctor.run()
