"""Paths over HTTP stay beneath the adapter roots: spelt in every way, linked, raced."""

import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
from conftest import ADAPTERS, BASE
from serving import ADMIN, Served

pytestmark = pytest.mark.cpu_only(reason="paths end in the server, before any device")

NOT_ALLOWED = (400, "path_not_allowed", None)
NOT_FOUND = (400, "adapter_invalid", "not_found")
IO = (400, "adapter_invalid", "io")
TOO_LARGE = (413, "body_too_large", None)
GOOD = (200, None, None)
Outcome = tuple[int, str | None, str | None]
"""Status, code, reason."""


@dataclass(frozen=True)
class World:
    """`root` is a root; a good adapter lies in `root/good` and another in `outside/good`."""

    root: Path
    outside: Path
    served: Served

    def ask(self, method: str, route: str, body: Any) -> tuple[Outcome, str]:
        """What came of it, and the whole answer."""
        headers = {"content-type": "application/json", "authorization": f"Bearer {ADMIN}"}
        connection = HTTPConnection(self.served.url.removeprefix("http://"), timeout=60)
        connection.request(method, route, body if isinstance(body, bytes) else json.dumps(body), headers)
        answer = connection.getresponse()
        text = answer.read().decode()
        connection.close()
        error = json.loads(text)["error"] if answer.status >= 400 else {}
        return (answer.status, error.get("code"), error.get("reason")), text

    def validate(self, path: str) -> tuple[Outcome, str]:
        return self.ask("POST", "/v1/adapters/validate", {"path": path})


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    top = tmp_path_factory.mktemp("paths").resolve()
    root, outside = top / "root", top / "outside"
    shutil.copytree(ADAPTERS / "upper", root / "good")
    shutil.copytree(ADAPTERS / "reverse", outside / "good")
    (outside / "secret").write_text("the secret")
    fill(root, outside)
    with Served(str(BASE), "--adapter-root", str(root), "--admin-key", ADMIN) as served:
        yield World(root, outside, served)


def fill(root: Path, outside: Path) -> None:
    """Links, hard links and special files of every kind."""
    shutil.copytree(root / "good", root / "deep" / "er" / "good")
    (root.parent / "root-beside").symlink_to(outside)
    for name, target in LINKS.items():
        (root / name).symlink_to(target.format(root=root, outside=outside))
    for name, target in {"in": root / "good", "out": outside / "good", "absent": outside / "absent"}.items():
        folder = root / f"weights-{name}"
        folder.mkdir()
        shutil.copy(root / "good" / "adapter_config.json", folder)
        (folder / "adapter_model.safetensors").symlink_to(target / "adapter_model.safetensors")
    (root / "config-out").mkdir()
    (root / "config-out" / "adapter_config.json").symlink_to(outside / "secret")
    (root / "nested-out").mkdir()
    (root / "nested-out" / "inner").symlink_to(outside / "good")
    (root / "file").write_text("no adapter")
    (root / "empty").mkdir()
    (root / "hard").mkdir()
    for file in (outside / "good").iterdir():
        os.link(file, root / "hard" / file.name)
    os.mkfifo(root / "fifo")
    shutil.copytree(root / "good", root / "fifo-config")
    (root / "fifo-config" / "adapter_config.json").unlink()
    os.mkfifo(root / "fifo-config" / "adapter_config.json")
    (root / "fifo-weights").mkdir()
    shutil.copy(root / "good" / "adapter_config.json", root / "fifo-weights")
    os.mkfifo(root / "fifo-weights" / "adapter_model.safetensors")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(root / "socket"))
    (root / "%2e%2e").mkdir()
    shutil.copytree(root / "good", root / "file:")
    shutil.copytree(root / "good", root / "..good")
    shutil.copytree(root / "good", root / "spaced name é 🙂")


LINKS = {
    "link-in": "{root}/good",
    "link-in-relative": "good",
    "link-chain": "link-in",
    "link-out": "{outside}/good",
    "link-out-relative": "../outside/good",
    "link-out-chain": "link-out",
    "link-out-folder": "{outside}",
    "link-up": "..",
    "link-slash": "/",
    "link-etc": "/etc",
    "link-passwd": "/etc/passwd",
    "link-zero": "/dev/zero",
    "link-proc": "/proc/self/cwd",
    "link-loop": "link-loop",
    "link-dangling": "{root}/absent",
    "link-dangling-out": "{outside}/absent",
    "link-long-way": "{root}/../root/good",
}
# fmt: off
ELSEWHERE = [
    "{outside}", "{outside}/good", "{outside}/secret", "{outside}/absent", "{top}", "{top}/root-beside/good",
    "{top}/root-absent", "{root}-beside", "/", "/etc", "/etc/passwd", "/etc/absent", "/tmp", "/sys", "/absent",
    "/dev", "/dev/null", "/dev/zero", "/dev/fd/0", "/dev/stdin", "/proc/self", "/proc/self/cwd",
    "/proc/self/root{outside}/good", "/proc/self/environ", "/proc/self/fd/1", "/proc/1/root", "{root}/link-out",
    "{root}/link-out-folder/good", "{root}/link-up/outside/good",
]
"""Places that no spelling may reach."""
SPELLINGS = [
    "{path}", "{path}/", "{path}//", "{path}/.", "/{path}", "//{path}", "/.{path}", "{root}/..{path}",
    "{root}/./..{path}", "{path}/../{name}", "{root}/../../../../../../../../../..{path}",
    "{root}/good/../../../../../../../../..{path}", "{root}/absent/../../../../../../../../..{path}",
    "{root}/link-slash{path}", "{root}/link-slash/.{path}",
]
NO_PATHS = [
    "", ".", "..", "./", "../", "~", "~/x", "-", "*", "good", "./good", "../root/good", "root/good", "\\", "C:\\x",
    "C:/x", "\\\\host\\share", "\\\\?\\C:\\x", "\\\\.\\pipe\\x", " /etc", "\t/etc", "\n/etc", "\x00/etc", "$HOME",
    "${{HOME}}", "`id`", "%2fetc", "%252fetc", "%c0%afetc", "\uff0fetc", "\u2215etc", "\u2044etc", "\u202e/etc",
]
SCHEMES = [
    "file:", "file://", "file://localhost", "FILE://", "http://localhost", "https://x", "s3:/", "hf:/", "data:,",
]
TRICKS = [
    ".. ", " ..", "...", "....", "..%2f", "%2e%2e", "%2E%2E", "%252e%252e", "..%00", "..;", "..\\", "\\..",
    "..\u200b", "\uff0e\uff0e", "\u2024\u2024", "\u2025", "\u2026", "\xb7\xb7", ".\u0307.", "..\u0301", "\u202e..",
    "\ufeff..", "..\t", "..\n", "..\r", "\x7f..", "..\x85", "%c0%ae%c0%ae", "%u002e%u002e", "&period;&period;",
    "0x2e0x2e", "NUL", "con", "aux", "${{PWD}}", "$(id)", "`id`", "~root", "*", "?", "[a]", "{{a,b}}", "|id", ";id",
    "&", "'", '"', "<!--", "%s%n", "-rf", "--",
]
"""Names that are no `..`, whatever they look like: plain names of what is not there."""
# fmt: on


def cases(root: Path, outside: Path) -> Iterator[tuple[str, Outcome]]:
    """A path, and what must come of it."""
    places = {"root": root, "outside": outside, "top": root.parent}
    for place in ELSEWHERE:
        path = place.format(**places)
        for spelling in SPELLINGS:
            yield spelling.format(path=path, name=Path(path).name, **places), NOT_ALLOWED
    for path in NO_PATHS:
        yield path.format(), NOT_ALLOWED
    for scheme in SCHEMES:
        for path in (root / "good", outside / "good", "/etc"):
            yield f"{scheme}{path}", NOT_ALLOWED
    for trick in TRICKS:
        name = trick.format()
        inside, deeper = f"{root}/{name}", f"{root}/{name}/{name}/outside/good"
        yield inside, MADE.get(name, NOT_FOUND)
        yield deeper, NOT_FOUND
    for path, outcome in HERE.items():
        yield f"{root}/{path}", outcome
        if outcome in (GOOD, NOT_ALLOWED):
            yield f"{root}/{path}/", outcome
            yield f"{root}//{path}", outcome
            yield f"/{root}/./{path}", outcome
    for length, outcome in [(255, NOT_FOUND), (256, IO), (4096, IO), (60_000, IO), (70_000, TOO_LARGE)]:
        yield f"{root}/{'a' * length}", outcome
    for repeats, outcome in [(100, GOOD), (1000, GOOD), (5000, GOOD)]:
        yield f"{root}/{'./' * repeats}good", outcome
    yield f"{root}/{'a/' * 5000}", IO
    yield f"{root}/{'good/../' * 3000}good", NOT_ALLOWED
    for place in ("good\u0000", "\u0000good", "good/\u0000", "good\u0000/../../outside/good", "a\u0000b"):
        yield f"{root}/{place}", NOT_ALLOWED if ".." in place else IO


MADE: dict[str, Outcome] = {"%2e%2e": (400, "adapter_invalid", "missing_config")}
HERE: dict[str, Outcome] = {
    "good": GOOD,
    "deep/er/good": GOOD,
    "deep/er": GOOD,
    "..good": GOOD,
    "spaced name é 🙂": GOOD,
    "file:": GOOD,
    "weights-in": GOOD,
    "hard": GOOD,
    "link-in": GOOD,
    "link-in-relative": GOOD,
    "link-chain": GOOD,
    "link-long-way": GOOD,
    "weights-out": NOT_ALLOWED,
    "config-out": NOT_ALLOWED,
    "nested-out": NOT_ALLOWED,
    "link-loop": NOT_ALLOWED,
    "link-dangling": NOT_ALLOWED,
    "link-dangling-out": NOT_ALLOWED,
    "good/absent": NOT_FOUND,
    "GOOD": NOT_FOUND,
    "gOOD": NOT_FOUND,
    "good ": NOT_FOUND,
    "absent": NOT_FOUND,
    "absent/absent": NOT_FOUND,
    "file/absent": NOT_FOUND,
    "spaced name e\u0301 🙂": NOT_FOUND,
    "weights-absent": (400, "adapter_invalid", "missing_weights"),
    "": NOT_ALLOWED,
    "empty": (400, "adapter_invalid", "missing_config"),
    "file": (400, "adapter_invalid", "not_a_folder"),
    "good/adapter_config.json": (400, "adapter_invalid", "not_a_folder"),
    "good/adapter_model.safetensors": (400, "adapter_invalid", "not_a_folder"),
    "fifo": (400, "adapter_invalid", "not_a_folder"),
    "socket": (400, "adapter_invalid", "not_a_folder"),
    "fifo-config": (400, "adapter_invalid", "not_a_regular_file"),
    "fifo-weights": (400, "adapter_invalid", "not_a_regular_file"),
}
HERE = dict.fromkeys(LINKS, NOT_ALLOWED) | HERE


def test_every_spelling_of_a_path_comes_to_what_it_must(world: World) -> None:
    found = list(cases(world.root, world.outside))
    assert len(found) >= 500
    wrong, refusals = [], set()
    for path, outcome in found:
        got, text = world.validate(path)
        if got != outcome:
            wrong.append((path[:120], got, outcome))
        if outcome == NOT_ALLOWED:
            refusals.add(text)
    print(len(found), "paths")
    assert not wrong
    assert len(refusals) == 1, "a refusal tells whether something is there"


ROUTES: dict[str, Callable[[object], tuple[str, str, object]]] = {
    "load": lambda path: ("POST", "/v1/load_lora_adapter", {"lora_name": "new", "lora_path": path}),
    "replace": lambda path: (
        "POST",
        "/v1/load_lora_adapter",
        {"lora_name": "n", "lora_path": path, "load_inplace": True},
    ),
    "put": lambda path: ("PUT", "/v1/adapters/new", {"path": path}),
    "validate": lambda path: ("POST", "/v1/adapters/validate", {"path": path}),
}


@pytest.mark.parametrize("route", ROUTES)
def test_every_route_that_takes_a_path_confines_it(world: World, route: str) -> None:
    for name, outcome in HERE.items():
        if outcome != GOOD:
            assert world.ask(*ROUTES[route](f"{world.root}/{name}"))[0] == outcome, name
    for place in ("/etc", f"{world.root}/../outside/good", f"file://{world.root}/good", "good", "", str(world.outside)):
        assert world.ask(*ROUTES[route](place))[0] == NOT_ALLOWED, place
    for other in (None, 7, ["/etc"], {"path": "/etc"}, True):
        got, _ = world.ask(*ROUTES[route](other))
        # PUT without a path changes an adapter that must be there.
        assert got[0] == (404 if other is None and route == "put" else 400), other
    assert json.loads(world.ask("GET", "/v1/adapters", None)[1])["data"] == []


@pytest.mark.parametrize(
    "written", [rb'"\ud800"', rb'"\udfff/x"', b'"\xff\xfe"', b'"/etc\x00"', b'"/etc', b'"\\x2fetc"', b"/etc"]
)
def test_paths_that_are_no_json_texts_are_refused(world: World, written: bytes) -> None:
    got, _ = world.ask("POST", "/v1/adapters/validate", b'{"path": ' + written + b"}")
    assert got[:2] in [(400, "invalid_json"), (400, "invalid_type")]


@pytest.mark.parametrize(
    "name", ["..", ".", "", "/", "../x", "a/b", "a\\b", "a b", "a\u0000", "é", "a" * 129, "a:b", "base"]
)
def test_names_are_no_paths(world: World, name: str) -> None:
    body = {"lora_name": name, "lora_path": str(world.root / "good")}
    got, _ = world.ask("POST", "/v1/load_lora_adapter", body)
    if name in ("..", "."):  # Made of the letters of names, and never joined to a path.
        assert got == GOOD
        assert world.ask("POST", "/v1/unload_lora_adapter", {"lora_name": name})[0] == GOOD
    else:
        assert got[0] == 400


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read_is_refused(world: World) -> None:
    closed = world.root / "closed"
    shutil.copytree(world.root / "good", closed)
    closed.chmod(0)
    try:
        assert world.validate(str(closed))[0] == IO
    finally:
        closed.chmod(0o700)


def swap_link(world: World, at: Path) -> Iterator[None]:
    """A link to an adapter inside becomes one to an adapter outside."""
    other = at.with_name("next")
    while True:
        for target in (world.root / "good", world.outside / "good"):
            other.symlink_to(target)
            other.rename(at)
            yield


def swap_folder(world: World, at: Path) -> Iterator[None]:
    """A folder becomes a link to one outside."""
    kept, link = at.with_name("kept"), at.with_name("link")
    shutil.copytree(world.root / "good", kept)
    link.symlink_to(world.outside / "good")
    while True:
        kept.rename(at)
        yield
        at.rename(kept)
        link.rename(at)
        yield
        at.rename(link)


def swap_weights(world: World, at: Path) -> Iterator[None]:
    """The weights of a folder become a link to others outside."""
    shutil.copytree(world.root / "good", at)
    weights = at / "adapter_model.safetensors"
    # Beside the folder: a link out of it that nothing reads is refused, too.
    kept, link = at.with_name("kept"), at.with_name("link")
    weights.rename(kept)
    link.symlink_to(world.outside / "good" / weights.name)
    while True:
        kept.rename(weights)
        yield
        weights.rename(kept)
        link.rename(weights)
        yield
        weights.rename(link)


@pytest.mark.parametrize("swap", [swap_link, swap_folder, swap_weights])
def test_a_race_of_renames_never_shows_what_lies_outside(world: World, tmp_path: Path, swap: Any) -> None:
    at = world.root / "races" / swap.__name__ / "raced"
    at.parent.mkdir(parents=True)
    is_over = threading.Event()
    swaps = swap(world, at)
    next(swaps)  # what it copies is whole before anybody looks

    def race() -> None:
        for _ in swaps:
            if is_over.is_set():
                return

    swapping = threading.Thread(target=race)
    swapping.start()
    inside = json.loads(world.validate(str(world.root / "good"))[1])["tensors"]
    counts: dict[Outcome, int] = {}
    start = time.monotonic()
    try:
        while (passed := time.monotonic() - start) < 1 or min(counts.get(GOOD, 0), counts.get(NOT_ALLOWED, 0)) < 10:
            assert passed < 60, counts
            got, text = world.validate(str(at))
            counts[got] = counts.get(got, 0) + 1
            if got == GOOD:
                assert json.loads(text)["tensors"] == inside
            else:
                reasons = ("not_found", "missing_config", "missing_weights", "io")
                assert got in [NOT_ALLOWED, *((400, "adapter_invalid", reason) for reason in reasons)]
    finally:
        is_over.set()
        swapping.join()
        shutil.rmtree(at.parent)
    print(counts)


def test_no_descriptor_is_left(world: World) -> None:
    before = world.served.num_descriptors()
    for name in HERE:
        for route in ("validate", "replace"):
            world.ask(*ROUTES[route](f"{world.root}/{name}"))
    assert world.ask("DELETE", "/v1/adapters/n", None)[0][0] == 204
    deadline = time.monotonic() + 30
    while world.served.num_descriptors() > before:
        assert time.monotonic() < deadline
        time.sleep(0.05)
