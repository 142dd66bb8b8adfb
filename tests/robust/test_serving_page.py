"""The page in a real browser: Chromium, driven by playwright."""

import re
import shutil
from contextlib import contextmanager

import pytest
from helpers.demo_server import ScriptedEngine, running, tiny_engine

from alpaca.common.json_files import read_log
from alpaca.serving.moderation import Filter, FilterUnavailable, RuleFilter

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
EVIL = "<script>document.title='evil'</script><img src=x onerror=\"document.title='evil'\"> &<b>"
FOCUS = "document.activeElement.id"


@pytest.fixture(scope="module")
def browser():
    if not CHROMIUM:
        pytest.skip("no Chromium is installed (apt install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        one = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield one
        one.close()


@contextmanager
def opened(browser, server, **options):
    """The page; at the end it must not have complained or loaded anything from elsewhere."""
    context = browser.new_context(**options)
    page, complaints = context.new_page(), []

    def note_request(request) -> None:
        if server.url not in request.url and not request.url.startswith("data:"):
            complaints.append(request.url)

    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda message: complaints.append(message.text))
    page.on("request", note_request)
    page.goto(server.url)
    page.locator("#examples button").first.wait_for()
    yield page
    context.close()
    assert complaints == []


def expect_text(page, pattern: str, place: str = "#status") -> None:
    from playwright.sync_api import expect

    expect(page.locator(place)).to_have_text(re.compile(pattern))


def slow_engine() -> ScriptedEngine:
    return ScriptedEngine("word " * 400, pace=0.01)


def test_page_streams_stops_copies_reports_and_checks(browser, tmp_path):
    file = tmp_path / "reports.jsonl"
    flags = ("--reports", file, "--notice", "For research only.")
    with running(slow_engine(), *flags) as server, opened(browser, server) as page:
        assert page.input_value("#instruction") == "" and page.title() == "Ask tiny"
        assert page.inner_text("#notice") == "For research only."
        footer = "Nothing is filtered. Every answer is watermarked."
        assert page.inner_text("footer p:last-child") == footer
        page.locator("#examples button").first.click()
        assert page.input_value("#instruction")
        page.fill("#instruction", "Say words.")
        page.fill("#input", "many")
        page.keyboard.press("Control+Enter")
        lengths = []
        for _ in range(3):
            page.wait_for_timeout(150)
            lengths.append(len(page.inner_text("#answer")))
        assert 0 < lengths[0] < lengths[1] < lengths[2]
        assert page.get_attribute("#answer", "aria-busy") == "true"
        page.click("#stop")
        expect_text(page, "Stopped")
        server.wait_until_idle(1)
        shown = page.text_content("#answer")
        assert 0 < len(shown) < 1500 and page.get_attribute("#answer", "aria-busy") == "false"
        page.context.grant_permissions(["clipboard-read", "clipboard-write"])
        page.click("#copy")
        expect_text(page, "Copied")
        page.click("#flag")
        page.fill("#why", "dull")
        page.get_by_role("button", name="Send").click()
        expect_text(page, "Reported")
        page.click("#check-answer")
        page.locator("#found").wait_for()
        assert page.text_content("#tokens") == shown
        assert page.get_attribute("#tab-check", "aria-selected") == "true"
        assert page.locator("#tokens .is-plain").count() > 0
    (report,) = read_log(file)
    assert (report["instruction"], report["input"], report["why"]) == ("Say words.", "many", "dull")
    assert report["output"] == shown and report["temperature"] == 0.7


def test_page_detects_a_watermark_by_keyboard_alone(browser):
    with running(tiny_engine()) as server, opened(browser, server) as page:
        fields = {"instruction": "Write words.", "temperature": 1.3, "max_tokens": 60, "n": 8}
        answers = [server.answer(**fields, seed=seed) for seed in (3, 23)]
        words = [choice["text"] for answer in answers for choice in answer["choices"]]
        page.keyboard.press("Tab")
        page.keyboard.press("ArrowRight")
        page.keyboard.press("Tab")
        page.keyboard.insert_text("\n".join(words))
        page.keyboard.press("Control+Enter")
        page.locator("#found").wait_for()
        assert page.inner_text("#verdict").startswith("Watermarked")
        green = page.locator("#tokens .is-green").count()
        spoken = page.locator("#tokens [role=img][aria-label$=', green']")  # for screen readers
        assert spoken.count() == green > 60


def test_page_keeps_the_focus_and_the_answer(browser, tmp_path):
    file = tmp_path / "reports.jsonl"
    with running(slow_engine(), "--reports", file) as server, opened(browser, server) as page:
        page.fill("#instruction", "Say words.")
        page.focus("#send")
        page.keyboard.press("Enter")
        page.wait_for_timeout(100)
        assert page.evaluate(FOCUS) == "stop"
        page.click("#tab-check")
        page.keyboard.press("Escape")  # has no meaning on the other tab
        for key, tab in (("Home", "tab-ask"), ("End", "tab-check"), ("Home", "tab-ask")):
            page.keyboard.press(key)
            assert page.evaluate(FOCUS) == tab
        assert page.get_attribute("#answer", "aria-busy") == "true"
        page.focus("#stop")
        page.keyboard.press("Escape")
        expect_text(page, "Stopped")
        assert page.evaluate(FOCUS) == "send"
        page.click("#flag")
        page.fill("#why", "dull")
        page.keyboard.press("Control+Enter")
        expect_text(page, "Reported")
    (report,) = read_log(file)
    assert report["why"] == "dull"


def test_page_shows_where_help_is_after_self_harm(browser):
    engine = ScriptedEngine("I want to die")
    with running(engine, filter=RuleFilter()) as server, opened(browser, server) as page:
        page.fill("#instruction", "Say it.")
        page.click("#send")
        expect_text(page, "findahelpline.com")
        assert "die" not in page.text_content("#answer")
        assert page.get_attribute("#answer", "aria-live") == "polite"


def test_page_shows_html_as_text(browser):
    with running(ScriptedEngine(EVIL)) as server, opened(browser, server) as page:
        page.fill("#instruction", EVIL)
        page.click("#send")
        expect_text(page, "Done")
        assert page.text_content("#answer") == EVIL
        assert page.locator("#answer *").count() == 0
        page.click("#check-answer")
        page.locator("#found").wait_for()
        assert page.text_content("#tokens") == EVIL
        assert page.locator("#tokens :not(span)").count() == 0 and page.title() == "Ask tiny"


def test_page_fits_a_phone_and_both_color_schemes(browser):
    backgrounds = set()
    with running(ScriptedEngine("fine")) as server:
        for scheme in ("light", "dark"):
            options = {"viewport": {"width": 360, "height": 740}, "color_scheme": scheme}
            with opened(browser, server, **options) as page:
                page.click("summary")
                assert page.evaluate("document.documentElement.scrollWidth") == 360
                background = "getComputedStyle(document.body).backgroundColor"
                backgrounds.add(page.evaluate(background))
                for control in page.locator("button:visible, textarea:visible").all():
                    assert control.bounding_box()["height"] >= 35
    assert len(backgrounds) == 2


class DownAfter(Filter):
    def __init__(self, good: int):
        self.good = good

    async def check(self, text: str) -> str:
        self.good -= 1
        if self.good < 0:
            raise FilterUnavailable
        return ""


def test_page_explains_what_went_wrong(browser):
    page = browser.new_page()  # errors appear in its console too

    def ask() -> None:
        page.goto(server.url)
        page.fill("#instruction", "a")
        page.click("#send")

    for good in (0, 1):  # at the prompt, at the answer
        with running(ScriptedEngine("swordfish"), filter=DownAfter(good)) as server:
            ask()
            expect_text(page, "filter cannot be reached")
            assert page.text_content("#answer") == ""
    with running(slow_engine()) as server:
        ask()
        expect_text(page, "word word", "#answer")
        for connection in list(server.http.connections):
            server.loop.call_soon_threadsafe(connection.task.cancel)
        expect_text(page, "connection was lost")
    page.click("#send")
    expect_text(page, "server cannot be reached")
    page.close()
