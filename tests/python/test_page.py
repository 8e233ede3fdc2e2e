"""The page at `/` in a real browser."""

import subprocess
import sys
from collections.abc import Iterator

import pytest
from browser import CHROMIUM, Browser
from conftest import ADAPTERS, BASE

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed; hint: apt-get install chromium"),
    pytest.mark.cpu_only(reason="the page, whatever answers it"),
]
KEY = "the-users-key"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    arguments = ["serve", str(BASE), "--adapter-dir", str(ADAPTERS), "--port", "0", "--api-key", KEY]
    command = [sys.executable, "-m", "slora", *arguments, "--device", "cpu"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    yield next(line for line in process.stdout if line.startswith("serving ")).split()[-1]
    process.terminate()
    assert process.wait(60) == 0


@pytest.fixture
def browser(url: str) -> Iterator[Browser]:
    with Browser() as browser:
        browser.open(url)
        yield browser
        # Without a key, or with a wrong one, asking is refused: the console says so, and that is all it may say.
        assert [problem for problem in browser.problems if "401" not in problem] == []
        assert [asked for asked in browser.requests if not asked.startswith((url, "data:"))] == []


def enter(browser: Browser, key: str = KEY) -> None:
    browser.wait("!document.getElementById('gate').hidden")
    browser.fill("key", key)
    browser.run("document.getElementById('key-form').requestSubmit()")


def test_it_asks_for_the_key_and_keeps_it_for_the_tab_only(browser: Browser) -> None:
    enter(browser, "wrong")
    browser.wait("document.getElementById('key-problem').textContent !== ''")
    assert browser.run("sessionStorage.length") == 0
    enter(browser)
    browser.wait("!document.getElementById('board').hidden")
    assert browser.run("sessionStorage.getItem('slora.key')") == KEY
    assert browser.run("localStorage.length + document.cookie.length") == 0
    assert KEY not in browser.run("document.documentElement.outerHTML")
    browser.click("forget")
    browser.wait("!document.getElementById('gate').hidden")
    assert browser.run("document.getElementById('board').hidden && sessionStorage.length === 0")


def test_an_answer_to_a_key_that_was_replaced_changes_nothing(browser: Browser) -> None:
    browser.run("""{
        const fetched = window.fetch;
        window.late = [];
        window.fetch = async (url, options) => {
            const answer = await fetched(url, options);
            const isWrong = options.headers.authorization === 'Bearer wrong';
            return isWrong ? new Promise((resolve) => window.late.push(() => resolve(answer))) : answer;
        };
    }""")
    enter(browser, "wrong")
    browser.wait("window.late.length > 0")
    enter(browser)
    browser.wait("!document.getElementById('board').hidden")
    browser.run("window.late.forEach((answer) => answer()), new Promise((resolve) => setTimeout(resolve, 100))")
    assert browser.run("sessionStorage.getItem('slora.key')") == KEY
    assert browser.run("document.getElementById('gate').hidden && !document.getElementById('board').hidden")


def test_an_adapter_is_tried_and_seen_on_the_device(browser: Browser) -> None:
    enter(browser)
    browser.wait("document.querySelector('[data-name=reverse]') !== null")
    browser.run("document.querySelector('[data-name=reverse]').click()")
    assert browser.run("document.getElementById('try-model').value") == "reverse"
    browser.fill("try-prompt", "banana")
    browser.click("try-send")
    browser.wait(
        "document.getElementById('try-stop').disabled && document.getElementById('try-answer').textContent !== ''"
    )
    assert browser.text("try-answer") == "ananab"
    assert "tokens" in browser.text("try-note")
    browser.wait("document.querySelector('.tier [data-name=reverse].resident') !== null")
    assert int(browser.run("document.getElementById('resident').value")) >= 1
    assert browser.run("document.querySelectorAll('.cells .of-idle_adapters').length") >= 1
    assert "idle adapters" in browser.run("document.getElementById('cells').getAttribute('aria-label')")
    browser.wait("document.getElementById('plot-line').getAttribute('d') !== null")
    browser.wait("Number(document.getElementById('rate').value) === 0")
    browser.fill("try-model", "nobody")
    browser.click("try-send")
    browser.wait("document.getElementById('try-note').classList.contains('problem')")
    assert "nobody" in browser.text("try-note")
    browser.problems = [problem for problem in browser.problems if "404" not in problem]


def test_a_long_answer_can_be_stopped(browser: Browser) -> None:
    enter(browser)
    browser.wait("!document.getElementById('board').hidden")
    browser.run("document.getElementById('try-kind').value = 'text'")
    browser.fill("try-tokens", "900")
    browser.fill("try-prompt", "a " * 20)
    # Without this the model ends by itself, or before it is stopped: the page has no fields for it.
    browser.run("""{
        const fetched = window.fetch;
        window.fetch = (url, options) => fetched(url, url.startsWith('v1/')
            ? {...options, body: JSON.stringify({...JSON.parse(options.body), ignore_eos: true, n: 16})} : options);
    }""")
    browser.click("try-send")
    browser.wait("document.getElementById('try-note').textContent.includes('tok/s')")
    browser.click("try-stop")
    browser.wait("document.getElementById('try-note').textContent.startsWith('stopped')")
    browser.wait("document.getElementById('running').value === '0'")


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_it_fits_every_width(browser: Browser, width: int) -> None:
    browser.resize(width, 800)
    enter(browser)
    browser.wait("document.querySelector('[data-name=reverse]') !== null")
    assert browser.run("document.documentElement.scrollWidth") <= width


def test_everything_that_can_be_used_has_a_name(browser: Browser) -> None:
    roles = {"textbox", "button", "combobox", "spinbutton", "searchbox", "image", "img"}
    enter(browser)
    browser.wait("document.querySelector('[data-name=reverse]') !== null")
    nodes = [node for node in browser.call("Accessibility.getFullAXTree")["nodes"] if not node["ignored"]]
    usable = [node for node in nodes if node.get("role", {}).get("value") in roles]
    assert len(usable) > 15
    assert [node for node in usable if not node.get("name", {}).get("value")] == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_ground(browser: Browser, scheme: str) -> None:
    browser.prefer(scheme)
    enter(browser)
    browser.wait("document.querySelector('[data-name=reverse]') !== null")
    pairs = {
        "--text": ["--card", "--ground"],
        "--soft": ["--card", "--ground"],
        "--bad": ["--card"],
        "--good": ["--card"],
    }
    for text, grounds in pairs.items():
        for ground in grounds:
            assert _contrast(_colour(browser, text), _colour(browser, ground)) >= (3 if text == "--good" else 4.5)


def _colour(browser: Browser, name: str) -> str:
    return str(browser.run(f"getComputedStyle(document.documentElement).getPropertyValue('{name}').trim()"))


def _contrast(one: str, other: str) -> float:
    """WCAG's ratio of two colours as `#rrggbb`."""

    def luminance(colour: str) -> float:
        shares = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [s / 12.92 if s <= 0.04045 else ((s + 0.055) / 1.055) ** 2.4 for s in shares]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)
