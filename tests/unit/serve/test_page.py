"""The page in a real browser. Chromium comes from the system: the test looks for it on the path."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import replace

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

import tiny_server
from lorakit.serve.auth import Keys
from lorakit.serve.service import Service

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        pytest.skip("no chromium on the path; on Debian: apt-get install chromium")
    with sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield made
        made.close()


@pytest.fixture
def page(browser: Browser, url: str) -> Iterator[Page]:
    """The page, open; at the end nothing was complained about or fetched from elsewhere."""
    made = browser.new_page()
    complaints: list[str] = []
    made.on("pageerror", lambda error: complaints.append(str(error)))
    made.on("request", lambda r: None if r.url.startswith(url) else complaints.append(r.url))
    made.goto(url)
    expect(made.locator("#adapters li")).to_have_count(4)
    yield made
    made.close()
    assert complaints == []


def row(page: Page, name: str):
    return page.locator("#adapters li", has=page.get_by_text(name, exact=True))


def card(page: Page, name: str):
    return page.locator(".answer", has=page.get_by_role("heading", name=name, exact=True))


def choose(page: Page, *names: str) -> None:
    page.get_by_role("button", name="clear").click()
    for name in names:
        row(page, name).get_by_role("checkbox").check()


def test_the_adapters_are_listed_and_filtered(page: Page) -> None:
    expect(page.locator("#base")).to_have_text("tiny")
    expect(row(page, "sql").locator(".badge")).to_have_text("r = 4")
    page.get_by_role("searchbox").fill("SQ")
    expect(page.locator("#adapters li")).to_have_count(1)
    page.get_by_role("searchbox").fill("")
    page.get_by_role("button", name="clear").click()
    expect(page.get_by_role("button", name="Send")).to_be_disabled()


def test_one_prompt_goes_to_several_adapters(page: Page, url: str) -> None:
    choose(page, "tiny", "sql", "chat")
    page.locator("#max-tokens").fill("12")
    page.locator("#prompt").fill("How many?")
    page.locator("#prompt").press("Control+Enter")
    for name in ("tiny", "sql", "chat"):
        body = {"model": name, "max_tokens": 12, "temperature": 0}
        body["messages"] = [{"role": "user", "content": "How many?"}]
        asked = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=30).json()
        (choice,) = asked["choices"]
        answer = card(page, name)
        ending = {"stop": "finished", "length": "cut at the limit"}[choice["finish_reason"]]
        expect(answer.locator(".state")).to_have_text(ending, timeout=20_000)
        assert answer.locator(".text").text_content() == choice["message"]["content"]
        num_tokens = str(asked["usage"]["completion_tokens"])
        expect(answer.locator("[data-fact=tokens]")).to_have_text(num_tokens)
        for fact in ("first", "rate", "probability"):
            assert any(c.isdigit() for c in answer.locator(f"[data-fact={fact}]").inner_text())
        bands = answer.locator(".text span")
        assert bands.count() >= 1
        assert "%" in (bands.first.get_attribute("title") or "")
    # A tiny random model is never sure: some token is coloured, until colours are off.
    coloured = card(page, "sql").locator(".text .p0, .text .p1, .text .p2").first
    shade = "getComputedStyle(element).backgroundColor"
    assert coloured.evaluate(f"element => {shade}") != "rgba(0, 0, 0, 0)"
    page.get_by_label("colour each token").uncheck()
    assert coloured.evaluate(f"element => {shade}") == "rgba(0, 0, 0, 0)"


def test_a_system_turn_of_one_s_own(page: Page, url: str) -> None:
    choose(page, "chat")
    page.locator("#max-tokens").fill("12")
    page.get_by_label("system turn").fill("Be brief.")
    page.locator("#prompt").fill("How many?")
    page.get_by_role("button", name="Send").click()
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How many?"}]
    body = {"model": "chat", "messages": turns, "max_tokens": 12, "temperature": 0}
    asked = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=30).json()
    expect(page.locator("#stop")).to_be_hidden(timeout=20_000)
    text = card(page, "chat").locator(".text").text_content()
    assert text == asked["choices"][0]["message"]["content"]
    page.locator("#mode").select_option("plain text")
    expect(page.get_by_label("system turn")).to_be_hidden()


def test_plain_text_and_a_refusal(page: Page) -> None:
    choose(page, "sql", "broken")
    page.locator("#mode").select_option("plain text")
    page.locator("#max-tokens").fill("5")
    page.locator("#prompt").fill("ab")
    page.get_by_role("button", name="Send").click()
    expect(card(page, "broken").locator(".state")).to_have_text("failed", timeout=20_000)
    expect(card(page, "broken").locator(".text")).to_contain_text("truncated")
    ended = re.compile("finished|cut at the limit")
    expect(card(page, "sql").locator(".state")).to_have_text(ended, timeout=20_000)


def test_a_passport(page: Page) -> None:
    row(page, "sql").get_by_role("button").click()
    dialog = page.get_by_role("dialog")
    expect(dialog.get_by_role("heading", name="sql")).to_be_visible()
    expect(dialog).to_contain_text("all-linear")
    expect(dialog).to_contain_text("0.25")
    page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()


def test_live_numbers(page: Page) -> None:
    choose(page, "sql")
    page.locator("#prompt").fill("How many?")
    page.locator("#max-tokens").fill("100")
    page.get_by_role("button", name="Send").click()
    expect(page.locator("#rate")).not_to_have_text("0.0", timeout=20_000)
    assert page.locator("#spark polyline").get_attribute("points")


def test_stop(page: Page, service: Service) -> None:
    choose(page, "tiny", "sql", "chat")
    page.locator("#prompt").fill("How many?")
    page.locator("#max-tokens").fill("100")
    # The button is there for as long as answers come: press it the moment it appears.
    page.evaluate(
        """new MutationObserver((_, seen) => {
             const stop = document.getElementById("stop");
             if (!stop.hidden) { stop.click(); seen.disconnect(); }
           }).observe(document.getElementById("stop"), {attributes: true})"""
    )
    page.get_by_role("button", name="Send").click()
    expect(page.locator(".answer .state").first).to_have_text("stopped", timeout=20_000)
    expect(page.locator("#stop")).to_be_hidden()


def test_a_key_is_asked_for_and_used(browser: Browser, service: Service) -> None:
    options = replace(service.options, keys=Keys(api="s3cret"))
    closed = Service(service.engine, service.prompts, options=options)
    with tiny_server.serving(closed) as url:
        page = browser.new_page()
        page.goto(url)
        page.get_by_label("API key").fill("s3cret")
        page.get_by_role("button", name="Use it").click()
        expect(page.locator("#adapters li")).to_have_count(4)
        expect(page.locator("#key-form")).to_be_hidden()
        page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_light_and_dark(browser: Browser, url: str, scheme: str) -> None:
    page = browser.new_page(color_scheme="dark" if scheme == "dark" else "light")
    page.goto(url)
    ink, ground = page.evaluate(
        "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
    )
    assert (brightness(ink) > brightness(ground)) == (scheme == "dark")
    assert abs(brightness(ink) - brightness(ground)) > 128
    width = page.evaluate("document.documentElement.scrollWidth - innerWidth")
    page.set_viewport_size({"width": 360, "height": 700})
    narrow = page.evaluate("document.documentElement.scrollWidth - innerWidth")
    assert max(width, narrow) <= 0
    page.close()


def brightness(colour: str) -> float:
    channels = [float(part) for part in colour.strip("rgba()").split(",")[:3]]
    return sum(channels) / 3
