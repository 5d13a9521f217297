"""The web playground in a real browser, at a real server with the bundled pair.

The picture in the documentation is made by this file, too:

    python -m tests.server.test_playground docs/playground.png
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("playwright", reason="NOT TESTED: the playwright package is not installed")
pytest.importorskip("fastapi", reason="NOT TESTED: paceline[server] is not installed")

from playwright.sync_api import Browser, Page, Route, expect, sync_playwright

from tests.fixtures.server_process import serving

SEND = "button.send:visible"
ANSWER = ".turn .answer"
PROMPT = 'def read_config(path):\n    """Read'


def find_chromium() -> str | None:
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@contextmanager
def chromium() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=["--no-sandbox"])
        yield browser
        browser.close()


@dataclass
class Visit:
    """A page, and what it did that it should not have done."""

    page: Page
    base: str
    refusals: bool = False  # a browser reports answers such as 401 as errors; here they are meant to come
    strange: list[str] = field(default_factory=list)
    asked: list[dict[str, Any]] = field(default_factory=list)  # bodies of the requests for text

    def open(self, tab: str) -> Page:
        self.page.goto(f"{self.base}/#{tab}")
        expect(self.page.locator(SEND)).to_be_enabled()
        return self.page

    def __post_init__(self) -> None:
        self.page.set_default_timeout(30_000)
        self.page.on("console", lambda message: self._heard(message.type, message.text))
        self.page.on("pageerror", lambda error: self.strange.append(str(error)))
        self.page.on("request", lambda request: self._sent(request.url, request.post_data))

    def _heard(self, kind: str, text: str) -> None:
        if kind in ("error", "warning") and not (self.refusals and "Failed to load resource" in text):
            self.strange.append(text)

    def _sent(self, url: str, body: str | None) -> None:
        if not url.startswith((f"{self.base}/", "data:")):
            self.strange.append(url)
        if body:
            self.asked.append(json.loads(body))


def set_up(page: Page, **values: object) -> None:
    """Change settings as a user does."""
    page.get_by_role("button", name="Settings").click()
    for name, value in values.items():
        change = page.select_option if name == "draft_tokens" else page.fill
        change(f"#settings [name={name}]", str(value))
    page.get_by_role("button", name="Settings").click()


def ask(page: Page, text: str) -> None:
    page.fill("#chat-input", text)
    page.press("#chat-input", "Enter")


def answer_chats(page: Page, body: str) -> None:
    """Let the server answer every chat with this."""
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body=body, content_type="text/event-stream"))


def finished(page: Page) -> None:
    expect(page.locator(SEND)).to_be_enabled(timeout=60_000)


def compare(page: Page, prompt: str = PROMPT) -> None:
    page.fill("#compare-input", prompt)
    page.press("#compare-input", "Enter")
    expect(page.locator("#verdict strong")).to_be_visible(timeout=60_000)
    finished(page)


def figure(page: Page, lane: int) -> float:
    return float(page.locator(".lane").nth(lane).locator(".speed dd").inner_text().replace(",", ""))


def background(page: Page, selector: str = "body") -> str:
    return page.locator(selector).first.evaluate("node => getComputedStyle(node).backgroundColor")


def fits(page: Page) -> bool:
    return page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def stream(*choices: dict[str, Any], end: str = "data: [DONE]\n\n") -> str:
    """An answer as a server would send it."""
    return ": waiting\n\n" + "".join(f"data: {json.dumps({'choices': [c]})}\n\n" for c in choices) + end


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if find_chromium() is None:
        pytest.skip("NOT TESTED: no Chromium is installed, so the playground was not opened")
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with serving() as base:
        yield base


@pytest.fixture
def visit(browser: Browser, server: str) -> Iterator[Visit]:
    yield from visiting(browser, server)


def visiting(browser: Browser, base: str) -> Iterator[Visit]:
    context = browser.new_context(viewport={"width": 1280, "height": 860}, color_scheme="light")
    visit = Visit(context.new_page(), base)
    yield visit
    context.close()
    assert not visit.strange


# -- chat --------------------------------------------------------------------------------------------------------------


def test_chat_streams_text_that_shows_its_drafts(visit: Visit) -> None:
    page = visit.open("chat")
    set_up(page, temperature=0, max_tokens=400)
    page.evaluate(
        f"""() => {{
            window.lengths = new Set();
            new MutationObserver(() => lengths.add(document.querySelector("{ANSWER}")?.textContent.length))
                .observe(document.getElementById("log"), {{ childList: true, subtree: true }});
        }}"""
    )
    page.fill("#chat-input", "def fibonacci(n):")
    page.click(SEND)
    finished(page)
    assert len(page.evaluate("[...lengths]")) > 2
    drafts = page.locator(f"{ANSWER} [data-depth]")
    assert drafts.count() > 20
    assert re.fullmatch(r"draft \d+", drafts.first.get_attribute("title") or "")
    assert background(page, f"{ANSWER} [data-depth]") != background(page, ANSWER)
    figures = page.locator("#chat-meter dd").all_inner_texts()
    assert figures[2] == "400"
    assert float(figures[1]) > 1
    assert page.locator("#chat-meter svg path[data-depth='1']").get_attribute("d")
    assert page.locator("#chat-meter .depths li").count() >= 1
    page.uncheck("#colour")
    assert background(page, f"{ANSWER} [data-depth]") == background(page, ANSWER)


def test_a_chat_goes_on_and_starts_anew(visit: Visit) -> None:
    page = visit.open("chat")
    set_up(page, max_tokens=20, system="Write Python.")
    for text in ("def one():", "def two():"):
        ask(page, text)
        finished(page)
        assert page.input_value("#chat-input") == ""
    roles = [message["role"] for message in visit.asked[-1]["messages"]]
    assert roles == ["system", "user", "assistant", "user"]
    assert visit.asked[-1]["messages"][2]["content"] == page.locator(ANSWER).first.text_content()
    page.get_by_role("button", name="New chat").click()
    assert page.locator(".turn").count() == 0
    expect(page.locator("#chat .examples button").first).to_be_visible()
    page.locator("#chat .examples button").first.click()
    finished(page)
    assert [message["role"] for message in visit.asked[-1]["messages"]] == ["system", "user"]


def test_new_chat_cancels_the_running_answer(visit: Visit) -> None:
    page = visit.open("chat")
    set_up(page, temperature=0, max_tokens=4000, draft_tokens=0)
    ask(page, "def fibonacci(n):")
    expect(page.locator(ANSWER)).to_have_text(re.compile(r"[\s\S]{100}"))
    page.get_by_role("button", name="New chat").click()
    finished(page)
    assert page.locator(".turn").count() == 0
    set_up(page, max_tokens=5)
    ask(page, "def one():")
    finished(page)
    assert [message["content"] for message in visit.asked[-1]["messages"]] == ["def one():"]


@pytest.mark.parametrize("way", ["key", "button"])
def test_a_long_answer_is_stopped(visit: Visit, way: str) -> None:
    page = visit.open("chat")
    set_up(page, temperature=0, max_tokens=4000, draft_tokens=0)
    ask(page, "def fibonacci(n):")
    expect(page.locator(ANSWER)).to_have_text(re.compile(r"[\s\S]{100}"))
    if way == "key":
        page.keyboard.press("Escape")
    else:
        page.click("button.stop:visible")
    finished(page)
    expect(page.locator("#chat .status")).to_have_text("Stopped.")
    assert "stopped" in page.locator(".turn.model .small").inner_text()
    assert int(page.locator("#chat-meter dd").nth(2).inner_text().replace(",", "")) < 4000


def test_reasoning_is_separate_and_text_is_escaped(visit: Visit) -> None:
    deltas = [["\ufdd0", 0], ["thought", 1], ["\nHm <b>", 2], ["\ufdd1", 0], ["<img src=x onerror=alert(1)>", 1]]
    round_ = {"drafted": 3, "accepted": 3, "deltas": deltas}
    delta = {"reasoning_content": "Hm <b>", "content": "<img src=x onerror=alert(1)>"}
    body = stream({"delta": delta, "round": round_}, {"delta": {}, "finish_reason": "stop"})
    answer_chats(visit.page, body)

    def thinking(route: Route) -> None:
        models = route.fetch().json()
        models["data"][0]["paceline"]["thinks"] = True
        route.fulfill(json=models)

    visit.page.route("**/v1/models", thinking)
    page = visit.open("chat")
    page.get_by_role("button", name="Settings").click()
    page.check("#settings [name=thinking]")
    ask(page, "Well?")
    finished(page)
    assert visit.asked[-1]["chat_template_kwargs"] == {"enable_thinking": True}
    assert page.locator(ANSWER).text_content() == delta["content"]
    assert page.locator(".thought .text").text_content() == "Hm <b>"
    assert not page.locator(".thought .text").is_visible()
    page.click(".thought summary")
    assert page.locator(".thought .text").is_visible()
    assert page.locator("#log img").count() == 0


# -- compare -----------------------------------------------------------------------------------------------------------


def test_compare_shows_two_speeds_and_one_text(visit: Visit) -> None:
    page = visit.open("compare")
    set_up(page, max_tokens=300, temperature=0.7, seed=7)
    compare(page)
    plain, mtp = (page.locator(".lane .answer").nth(lane) for lane in (0, 1))
    assert len(plain.text_content() or "") > 300
    assert plain.text_content() == mtp.text_content()
    assert "Same text, byte for byte" in page.locator("#verdict .same").inner_text()
    assert plain.locator("[data-depth]").count() == 0
    assert mtp.locator("[data-depth]").count() > 20
    speeds = [figure(page, lane) for lane in (0, 1)]
    assert min(speeds) > 0
    won = ["winner" in (track.get_attribute("class") or "") for track in page.locator(".track").all()]
    assert won == [speed == max(speeds) for speed in speeds]
    ratio = re.search(r"([\d.]+). as fast", page.locator("#verdict strong").inner_text())
    assert ratio is not None
    assert float(ratio[1]) == pytest.approx(speeds[1] / speeds[0], abs=0.02)
    first, second = visit.asked[-2:]
    assert (first.pop("draft_tokens"), second.pop("draft_tokens")) == (0, "auto")
    assert first == second
    assert first["seed"] == 7


def test_compare_as_a_chat(visit: Visit) -> None:
    page = visit.open("compare")
    set_up(page, max_tokens=40)
    page.select_option("#kind", "chat")
    compare(page, "def one():")
    first, second = visit.asked[-2:]
    assert second["messages"] == [{"role": "user", "content": "def one():"}]
    assert first["seed"] == second["seed"]  # none was set: one is drawn for both
    expect(page.locator("#verdict .same")).to_be_visible()


def test_compare_tells_when_texts_differ(visit: Visit) -> None:
    def answer(route: Route) -> None:
        word = "one" if json.loads(route.request.post_data or "")["draft_tokens"] == 0 else "on"
        round_ = {"drafted": 0, "accepted": 0, "deltas": [[word, 0]]}
        route.fulfill(body=stream({"text": word, "round": round_}), content_type="text/event-stream")

    page = visit.open("compare")
    page.route("**/v1/completions", answer)
    compare(page)
    assert "differ" in page.locator("#verdict .differs").inner_text()


# -- the page ----------------------------------------------------------------------------------------------------------


def test_theme_is_switched_and_stays(visit: Visit) -> None:
    page = visit.open("chat")
    light = background(page)
    page.click("#theme")
    dark = background(page)
    assert dark != light
    page.reload()
    assert background(page) == dark
    page.click("#theme")
    assert background(page) == light
    page.emulate_media(color_scheme="dark")  # what was chosen goes before what the system prefers
    assert background(page) == light


def test_theme_follows_the_system(visit: Visit) -> None:
    page = visit.open("chat")
    light = background(page)
    page.emulate_media(color_scheme="dark")
    assert background(page) != light
    expect(page.locator("#theme")).to_have_text("Light")


def test_settings_stay_and_go(visit: Visit) -> None:
    page = visit.open("chat")
    own = page.input_value("#settings [name=temperature]")
    set_up(page, temperature=0.25, seed=11)
    page.reload()
    expect(page.locator(SEND)).to_be_enabled()
    assert page.input_value("#settings [name=temperature]") == "0.25"
    assert page.input_value("#settings [name=seed]") == "11"
    page.click("#settings-toggle")
    page.click("#reset")
    assert page.input_value("#settings [name=temperature]") == own
    assert page.input_value("#settings [name=seed]") == ""


def test_a_phone_never_scrolls_sideways(visit: Visit) -> None:
    visit.page.set_viewport_size({"width": 360, "height": 740})
    page = visit.open("chat")
    assert fits(page)
    page.click("#settings-toggle")
    page.fill("#settings [name=max_tokens]", "200")
    assert fits(page)
    page.click("#settings-toggle")
    ask(page, "x" * 300)
    finished(page)
    assert fits(page)
    page.click("#tab-compare")
    assert fits(page)
    compare(page)
    assert fits(page)


def test_deep_drafts_fit_on_a_phone(visit: Visit) -> None:
    visit.page.set_viewport_size({"width": 360, "height": 740})
    deltas = [[f"word{depth} ", depth] for depth in range(16)]
    rounds = [
        {"drafted": 0, "accepted": 0, "deltas": [["begun ", 0]]},
        {"drafted": 15, "accepted": 15, "deltas": deltas},
    ]
    body = stream(*({"delta": {"content": "words"}, "round": round_} for round_ in rounds))
    answer_chats(visit.page, body)
    page = visit.open("chat")
    ask(page, "Go")
    finished(page)
    expect(page.locator("#chat-meter .depths li")).to_have_count(8)
    assert fits(page)


def test_the_keyboard_is_enough(visit: Visit) -> None:
    page = visit.open("chat")
    set_up(page, max_tokens=30)

    def tab_to(selector: str) -> None:
        for _ in range(30):
            page.keyboard.press("Tab")
            if page.evaluate("selector => document.activeElement.matches(selector)", selector):
                outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
                assert outline == "solid"
                return
        pytest.fail(f"the Tab key does not lead to {selector}")

    tab_to("#chat-input")
    page.keyboard.type("def one():")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("    return")
    assert page.input_value("#chat-input") == "def one():\n    return"
    page.keyboard.press("Enter")
    finished(page)
    assert visit.asked[-1]["messages"][-1]["content"] == "def one():\n    return"
    tab_to("[role=tab]")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#compare")).to_be_visible()
    tab_to("#compare .examples button")
    page.keyboard.press("Enter")
    expect(page.locator("#verdict strong")).to_be_visible()
    unnamed = "node => !node.labels.length && !node.getAttribute('aria-label')"
    assert page.evaluate(f"[...document.querySelectorAll('input, select, textarea')].filter({unnamed}).length") == 0


# -- errors ------------------------------------------------------------------------------------------------------------


def test_a_refusal_is_one_line_and_loses_nothing(visit: Visit) -> None:
    page, visit.refusals = visit.open("chat"), True
    text = "x = 1; " * 5000
    ask(page, text)
    finished(page)
    assert "context" in page.locator("#chat .error").inner_text()
    assert page.locator(".turn").count() == 0
    assert page.input_value("#chat-input") == text


def test_an_answer_that_breaks_keeps_what_came(visit: Visit) -> None:
    page = visit.open("chat")
    round_ = {"drafted": 0, "accepted": 0, "deltas": [["begun", 0]]}
    error = f"data: {json.dumps({'error': {'message': 'the engine is tired'}})}\n\n"
    body = stream({"delta": {"content": "begun"}, "round": round_}, end=error)
    answer_chats(page, body)
    ask(page, "Go")
    expect(page.locator("#chat .error")).to_have_text("the engine is tired")
    assert page.locator(ANSWER).text_content() == "begun"


def test_a_key_is_asked_for(browser: Browser) -> None:
    with serving("--api-key", "secret") as base:
        visits = visiting(browser, base)
        visit = next(visits)
        page, visit.refusals = visit.page, True
        page.goto(f"{base}/#chat")
        page.fill("#key", "wrong")
        page.press("#key", "Enter")
        expect(page.locator("#key-form .error")).to_contain_text("API key")
        page.fill("#key", "secret")
        page.press("#key", "Enter")
        expect(page.locator(SEND)).to_be_enabled()
        expect(page.locator("#key-form")).to_be_hidden()
        set_up(page, max_tokens=20)
        ask(page, "def one():")
        finished(page)
        assert page.locator(ANSWER).text_content()
        assert "secret" in page.evaluate("JSON.stringify(sessionStorage)")
        assert "secret" not in page.evaluate("JSON.stringify(localStorage)")
        with pytest.raises(StopIteration):
            next(visits)


# -- the picture -------------------------------------------------------------------------------------------------------


def take_picture(path: Path) -> None:
    """A finished comparison, for the documentation."""
    with serving() as base, chromium() as browser:
        page = browser.new_page(viewport={"width": 1280, "height": 860}, color_scheme="light")
        visit = Visit(page, base)
        visit.open("compare")
        set_up(page, temperature=0.7, seed=7)
        for _ in range(2):  # once more when all is warm
            compare(page)
        page.evaluate("document.activeElement.blur()")
        page.mouse.move(1, 1)
        page.screenshot(path=path)
        assert not visit.strange


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        os.environ["PACELINE_CACHE"] = folder
        take_picture(Path(sys.argv[1]))
