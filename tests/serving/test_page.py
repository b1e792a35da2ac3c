"""The page at / in a real browser: send, stream, move the slider, see the text change."""

import dataclasses
import http.client
import os
import runpy
import shutil
from pathlib import Path

import pytest

from tests.serving.conftest import running

pytest.importorskip("starlette", reason="the extra `serve` is not installed")

_CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"


def test_the_page_asks_nobody_else_and_runs_no_other_script(client):
    for path, kind in [
        ("/", "text/html"),
        ("/page.js", "text/javascript"),
        ("/page.css", "text/css"),
    ]:
        connection = http.client.HTTPConnection("127.0.0.1", client.port)
        connection.request("GET", path)
        response = connection.getresponse()
        text = response.read().decode()
        connection.close()
        assert response.status == 200
        assert response.headers["content-type"].startswith(kind)
        assert "script-src 'self'" in response.headers["content-security-policy"]
        assert "://" not in text
        assert "innerHTML" not in text


def require_browser(path):
    """Skip where there is no browser: as for want of an extra, which CI requires."""
    if not Path(path).exists():
        pytest.skip("the extra `browser` is not installed: Debian's package chromium is missing")


def test_want_of_the_browser_fails_where_its_extra_is_required(tmp_path, monkeypatch, project_root):
    with pytest.raises(pytest.skip.Exception) as skipped:
        require_browser(tmp_path / "chromium")
    reason = ("test_page.py", 1, str(skipped.value))
    for required, outcome in [("", "skipped"), ("serve,browser", "failed")]:
        monkeypatch.setenv("IVL_REQUIRED_EXTRAS", required)
        refuse_skip = runpy.run_path(str(project_root / "conftest.py"))["_refuse_skip"]
        report = pytest.TestReport("page", ("", 0, ""), {}, "skipped", reason, "setup")
        assert refuse_skip(report).outcome == outcome


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="the extra `browser` is not installed"
    )
    require_browser(_CHROMIUM)
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=_CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def ask(page, question):
    page.fill("#question", question)
    page.press("#question", "Enter")
    settled(page)


def settled(page):
    """Wait until no answer is being written."""
    page.locator(".text").first.wait_for()
    page.locator(".text[aria-busy=true]").first.wait_for(state="detached")


def answers(page):
    return [text.inner_text() for text in page.locator(".text").all()]


@pytest.mark.parametrize("scheme", ["light", pytest.param("dark", marks=pytest.mark.slow)])
def test_two_answers_stream_and_the_slider_changes_one_of_them(client, browser, scheme):
    sizes = {"light": {"width": 1100, "height": 900}, "dark": {"width": 390, "height": 844}}
    page = browser.new_page(color_scheme=scheme, viewport=sizes[scheme])
    page.set_default_timeout(120_000)  # the first answer compiles
    problems = []
    page.on("console", lambda message: message.type == "error" and problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(f"http://127.0.0.1:{client.port}/")
    page.wait_for_selector("#strength-mine")
    page.locator("summary").click()
    # What the server says: the longest context, a quarter of the shortest, the strengths.
    shown = page.locator("#max-tokens")
    assert (shown.get_attribute("max"), shown.input_value()) == ("512", "40")
    assert page.locator("#strength-mine").input_value() == "0.3"
    page.fill("#max-tokens", "16")
    ask(page, "Once upon a time")
    alone, with_value = answers(page)
    _, whole = client.chat("stories", temperature=0, max_tokens=16)
    assert alone.strip() == whole["choices"][0]["message"]["content"].strip()
    strengths = {"mine": 0.3, "other": 0}
    _, whole = client.chat("stories+mine", temperature=0, max_tokens=16, strengths=strengths)
    assert with_value.strip() == whole["choices"][0]["message"]["content"].strip()
    assert with_value != alone
    # A screen reader tells the answers apart, and hears that they have ended.
    for title in ("stories alone", "with mine 0.3, other 0"):
        assert page.get_by_role("group", name=title, exact=True).count() == 1
        assert f"{title}: answer complete" in page.locator("#status").inner_text()
    # Only the value's column has colours: under the base alone nothing has changed.
    colours = "cell => cell.querySelectorAll('[style]').length"
    cells = page.locator(".text").all()
    assert cells[0].evaluate(colours) == 0
    assert cells[1].evaluate(colours) > 0
    # The slider from the keyboard: to the left end, a strength of −2.
    page.locator("#strength-mine").press("Home")
    page.locator("h3", has_text="mine -2").wait_for()
    settled(page)
    assert answers(page)[0] == alone
    assert answers(page)[1] != with_value
    cells[1].press("ArrowRight")
    assert "under the base alone" in page.locator("#token").inner_text()
    assert page.locator("#token tbody tr").count() == 5
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    if folder := os.environ.get("IVL_SCREENSHOTS"):
        page.screenshot(path=f"{folder}/{scheme}.png", full_page=True)
    # The first value network at 0: the second's template, stop ids and context are those in use.
    for name, strength in [("mine", "0"), ("other", "1")]:
        page.locator(f"#strength-{name}").fill(strength)
    page.locator("h3", has_text="mine 0, other 1").wait_for()
    settled(page)
    strengths = {"mine": 0, "other": 1}
    texts = []
    for model in ("stories+other", "stories+mine"):
        _, whole = client.chat(model, temperature=0, max_tokens=16, strengths=strengths)
        texts.append(whole["choices"][0]["message"]["content"].strip())
    assert texts[0] != texts[1]
    assert answers(page)[1].strip() == texts[0]
    page.locator("#strength-other").fill("0")  # its context is too small for a second question
    page.locator("#strength-mine").fill("1")
    settled(page)
    ask(page, "And then?")
    assert len(answers(page)) == 4
    # What was pointed at is in sight, also on a low screen.
    page.set_viewport_size({"width": sizes[scheme]["width"], "height": 450})
    page.locator(".token").first.hover()
    assert page.locator("#token p").bounding_box()["y"] < 450
    page.locator("#question").blur()
    page.locator("#question").focus()
    box = page.locator("#question").bounding_box()
    assert box["y"] + box["height"] <= page.locator(".shown").bounding_box()["y"]
    assert problems == []
    # An answer that failed does not fail those after it.
    ask(page, "Once upon a time " * 300)
    errors = page.locator(".error")
    assert errors.count() == 2
    assert "or start a new conversation" in errors.first.inner_text()
    ask(page, "And then?")
    assert (len(answers(page)), errors.count()) == (8, 2)
    page.click("#reset")
    assert answers(page) == []
    assert page.locator("#status").inner_text() == "stories, and with mine, other"
    page.close()


def test_the_page_shows_where_to_enter_the_servers_key(serve_config, browser):
    with running(dataclasses.replace(serve_config, api_key="secret")) as client:
        page = browser.new_page()
        page.goto(f"http://127.0.0.1:{client.port}/")
        status, key = page.locator("#status"), page.locator("#api-key")
        status.get_by_text("the server asks for an API key").wait_for(timeout=10_000)
        assert key.is_visible()
        assert key.evaluate("key => key === document.activeElement")
        for given, said in [("wrong", "this is not the server's API key"), ("secret", "stories, ")]:
            key.fill(given)
            key.press("Tab")
            status.get_by_text(said).wait_for(timeout=10_000)
        page.close()
