"""The chat page: nothing from elsewhere, nothing that could become markup; and that it runs, if there is a browser."""

import base64
import hashlib
import re
import shutil

import pytest
from serving import serving, small

from gptlab.serve.api import PAGE

TEXT = PAGE.read_text()
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def test_the_page_is_one_file_that_asks_nobody_else():
    assert not re.search(r"https?:|//[a-z]|@import|url\(", TEXT.replace("// ", ""))
    assert not re.search(r"<(script|style|img|iframe|link|object|embed)\b[^>]*(src|href)=\"(?!data:,)", TEXT)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval|Function\(|\bon\w+=|style=", TEXT)


def test_the_policy_lets_the_page_s_own_script_and_style_run_and_no_other():
    with serving() as served:
        status, headers, content = served.ask("GET", "/")
    assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert content.decode() == TEXT
    policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert policy["frame-ancestors"] == policy["form-action"] == policy["base-uri"] == "'none'"
    for tag in ("script", "style"):
        (own,) = re.findall(rf"<{tag}>(.*?)</{tag}>", content.decode(), re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(own.encode()).digest()).decode()
        assert policy[f"{tag}-src"] == f"'sha256-{digest}'"
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    if BROWSER is None:
        pytest.skip("no chromium here")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser):
    """A fresh page, and what goes wrong in it."""
    context = browser.new_context(color_scheme="dark")
    page = context.new_page()
    page.problems = []
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.on("console", lambda message: page.problems.append(message.text) if message.type == "error" else None)
    page.asked = []
    page.on("request", lambda request: page.asked.append(request.url))
    yield page
    context.close()


def settle(page, turns: int = 2) -> None:
    """Wait until the last of so many turns is over."""
    page.locator(f"article >> nth={turns - 1}").wait_for(state="attached")
    page.locator("#log[aria-busy=false]").wait_for(state="attached")


@pytest.mark.slow
def test_a_conversation_in_a_browser(page):
    loaded = small(knows_turns=True, block_size=256)
    with serving(loaded) as served:
        page.goto(f"http://127.0.0.1:{served.port}/")
        page.get_by_text("chat model").wait_for()
        page.get_by_role("button", name="Settings").click()
        page.get_by_label("Temperature").fill("0")
        page.get_by_label("Tokens of an answer").fill("20")
        page.get_by_label("System:").fill("be kind")
        page.get_by_role("button", name="Close").click()
        text = "<img src=x onerror=alert(1)><script>alert(2)</script>"
        page.get_by_label("Your text").fill(text)
        page.keyboard.press("Enter")
        settle(page)
        shown = page.locator("article p").all_inner_texts()
        turns = [{"role": "system", "content": "be kind"}, {"role": "user", "content": text}]
        asked = {"messages": turns, "max_tokens": 20, "temperature": 0}
        answer = served.post("/v1/chat/completions", asked)[1]["choices"][0]["message"]["content"]
        assert shown[0] == text  # as text, and nothing else
        assert page.locator("article p").nth(1).text_content() == answer
        assert page.locator("img, article script").count() == 0
        assert "20 tokens in" in page.locator("#status").inner_text()
        page.get_by_label("Your text").fill("more")
        page.keyboard.press("Enter")
        settle(page, turns=4)
        page.reload()  # settings are kept, the conversation is not
        page.get_by_text("chat model").wait_for()
        assert page.locator("#temperature").input_value() == "0"
        assert page.locator("article").count() == 0
    assert page.problems == []
    assert all(url.startswith(f"http://127.0.0.1:{served.port}/") or url == "data:," for url in page.asked)


@pytest.mark.slow
def test_a_base_model_continues_and_can_be_stopped(page):
    with serving(parallel=1) as served:
        page.goto(f"http://127.0.0.1:{served.port}/")
        page.get_by_text("base model").wait_for()
        page.locator("#temperature").evaluate("e => { e.value = '0'; }")
        page.locator("#max-tokens").evaluate("e => { e.value = '15'; }")
        page.get_by_label("Your text").fill("once")
        page.keyboard.press("Enter")
        settle(page)
        first = page.locator("article.assistant p").text_content()
        assert first == served.service.loaded.generate("once", 15, temperature=0)
        served.slow_down(0.05)
        page.locator("#max-tokens").evaluate("e => { e.value = '4000'; }")
        page.get_by_label("Your text").fill(" upon")
        page.keyboard.press("Enter")
        page.locator("article.assistant p").nth(1).filter(has_text=re.compile(".{4}")).wait_for()
        page.keyboard.press("Escape")
        settle(page, turns=4)
        assert page.locator("#status").inner_text() == "Stopped."
        served.until_idle()
        assert served.service.metrics.counts["gptlab_cancelled_total"] == 1
        assert page.locator("article p").nth(3).inner_text()  # what had come stays
        page.get_by_role("button", name="New").click()
        assert page.locator("article").count() == 0
    assert page.problems == []


@pytest.mark.slow
def test_a_key_is_asked_for_and_an_error_is_said(page):
    with serving(key="sesame", parallel=1, queue=0) as served:
        page.goto(f"http://127.0.0.1:{served.port}/")
        page.get_by_text("asks for a key").wait_for()
        page.get_by_label("Key of the server").fill("sesame")
        page.keyboard.press("Tab")
        page.get_by_role("button", name="Close").click()
        page.get_by_text("base model").wait_for()
        served.service.admission.here = 1  # as if all places were taken
        page.get_by_label("Your text").fill("once")
        page.keyboard.press("Enter")
        page.get_by_text("busy").wait_for()
        assert page.get_by_label("Your text").input_value() == "once"
        assert page.locator("article").count() == 0
        served.service.admission.here = 0
        page.get_by_role("button", name="Continue").click()
        settle(page)
        assert page.locator("article").count() == 2


@pytest.mark.slow
def test_dark_light_and_the_keyboard(page):
    colour = "getComputedStyle(document.body).backgroundColor"
    with serving() as served:
        page.goto(f"http://127.0.0.1:{served.port}/")
        page.get_by_text("base model").wait_for()
        dark = page.evaluate(colour)
        page.emulate_media(color_scheme="light")
        light = page.evaluate(colour)
        assert dark != light
        page.get_by_role("button", name="Settings").focus()
        page.keyboard.press("Enter")
        page.get_by_label("Colours").select_option("dark")
        assert page.evaluate(colour) == dark
        page.keyboard.press("Escape")
        assert page.evaluate("document.activeElement.id") == "input"
        names = []
        for _ in range(5):
            page.keyboard.press("Tab")
            names.append(page.evaluate("document.activeElement.id"))
        assert {"send", "new", "open-settings", "log"} <= set(names)
    assert page.problems == []
