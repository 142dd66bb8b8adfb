"""The page in a real browser: Chromium, driven by playwright."""

import json
import re
import shutil
from contextlib import contextmanager

import pytest
from helpers.demo_server import TINY, ScriptedEngine, running, tiny_engine

from alpaca.common.json_files import read_log
from alpaca.serving.moderation import Filter, FilterUnavailable, RuleFilter
from templates import format_prompt
from tokenizer import load_tokenizer

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
EVIL = "<script>document.title='evil'</script><img src=x onerror=\"document.title='evil'\"> &<b>"
FOCUS = "document.activeElement.id"
ANSWER, STATUS = ".turn:last-child .answer", ".turn:last-child .status"


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
    page.locator("#model:not(:empty)").wait_for()
    yield page
    context.close()
    assert complaints == []


def expect_text(page, pattern: str, place: str = STATUS) -> None:
    from playwright.sync_api import expect

    expect(page.locator(place)).to_have_text(re.compile(pattern))


def ask(page, question: str) -> None:
    """Ask with the keyboard, and wait for the end of the answer."""
    page.fill("#instruction", question)
    page.press("#instruction", "Control+Enter")
    page.locator(f"{ANSWER}[aria-busy=false]").wait_for(state="attached")


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
        page.fill("#instruction", "Say words.")
        page.fill("#input", "many")
        page.keyboard.press("Control+Enter")
        lengths = []
        for _ in range(3):
            page.wait_for_timeout(150)
            lengths.append(len(page.inner_text(ANSWER)))
        assert 0 < lengths[0] < lengths[1] < lengths[2]
        assert page.get_attribute(ANSWER, "aria-busy") == "true"
        page.click("#stop")
        expect_text(page, "Stopped")
        server.wait_until_idle(1)
        shown = page.text_content(ANSWER)
        assert 0 < len(shown) < 1500 and page.get_attribute(ANSWER, "aria-busy") == "false"
        page.context.grant_permissions(["clipboard-read", "clipboard-write"])
        page.click(".copy")
        expect_text(page, "Copied")
        page.click(".report")
        page.fill("#why", "dull")
        page.get_by_role("button", name="Send").click()
        expect_text(page, "Reported")
        page.click(".check")
        page.locator("#found").wait_for()
        assert page.text_content("#tokens") == shown
        assert page.get_attribute("#tab-check", "aria-selected") == "true"
        assert page.locator("#tokens :is(.is-plain, .is-green)").count() > 0
    (report,) = read_log(file)
    assert (report["instruction"], report["input"], report["why"]) == ("Say words.", "many", "dull")
    assert report["output"] == shown and report["temperature"] == 0 and report["earlier"] == "[]"


class NotingEngine(ScriptedEngine):
    """Notes the prompts; answers with their number, or with nothing where "?" ends a question."""

    def __init__(self, template: str):
        self.prompts: list[str] = []
        super().__init__(self.note)
        self.tokenizer = load_tokenizer(TINY, template=template)

    def note(self, prompt: str) -> str:
        self.prompts.append(prompt)
        return "" if "?" in prompt[-20:] else f"answer {len(self.prompts)}"


def test_page_sends_earlier_turns_that_have_answers(browser, tmp_path):
    file, engine = tmp_path / "reports.jsonl", NotingEngine("vicuna")
    with running(engine, "--reports", file) as server, opened(browser, server) as page:
        assert page.is_hidden("#input") and page.is_hidden("#alone")
        for question in ("first", "why?", "second"):
            ask(page, question)
        assert engine.prompts[2].endswith("USER: first ASSISTANT: answer 1USER: second ASSISTANT:")
        facts = r"tiny: 1 million parameters of 32 bits, [\d.]+ tokens/s in the last answer"
        assert re.fullmatch(facts, page.inner_text("#facts"))
        texts = [page.locator(part).all_inner_texts() for part in (".question", ".answer", "h2")]
        assert texts[0] == ["first", "why?", "second"] and texts[1] == ["answer 1", "", "answer 3"]
        assert texts[2][:3] == ["Question 1", "Question 2", "Question 3"]
        page.locator(".report").last.click()
        page.get_by_role("button", name="Send").click()
        expect_text(page, "Reported")
    (report,) = read_log(file)
    earlier = [message["content"] for message in json.loads(report["earlier"])]
    assert earlier == ["first", "answer 1"] and report["instruction"] == "second"


def test_page_asks_again_in_place_of_a_question_and_those_after_it(browser):
    engine = NotingEngine("vicuna")
    with running(engine) as server, opened(browser, server) as page:
        for question in ("first", "second", "third"):
            ask(page, question)
        page.locator(".edit").nth(1).click()
        assert page.input_value("#instruction") == "second"
        page.keyboard.press("Escape")
        assert page.locator(".turn").count() == 3 and page.input_value("#instruction") == ""
        page.locator(".edit").nth(1).click()
        assert page.evaluate(FOCUS) == "instruction"
        ask(page, "other")
        assert page.locator(".question").all_inner_texts() == ["first", "other"]
        assert "second" not in engine.prompts[-1] and "first" in engine.prompts[-1]
        page.click("#clear")
        ask(page, "last")
        assert page.locator(".turn").count() == 1 and "first" not in engine.prompts[-1]


def test_page_keeps_what_a_refused_question_would_have_replaced(browser):
    page = browser.new_page()  # the refusal appears in its console
    with running(NotingEngine("vicuna")) as server:
        page.goto(server.url)
        page.locator("#model:not(:empty)").wait_for()
        for question in ("first", "second", "third"):
            ask(page, question)
        page.locator(".edit").nth(1).click()
        server.app.filter = DownAfter(0)
        page.fill("#instruction", "other")
        page.click("#send")
        expect_text(page, "filter cannot be reached", "#status")
        assert page.locator(".question").all_inner_texts() == ["first", "second", "third"]
        assert page.input_value("#instruction") == "other"
        assert page.locator(".replaced h2").inner_text() == "Question 2"
        server.app.filter = Filter()
        ask(page, "again")
        assert page.locator(".question").all_inner_texts() == ["first", "again"]
    page.close()


def test_page_lets_the_reader_go_on_while_a_replacing_question_waits(browser):
    engine = NotingEngine("vicuna")
    with running(engine) as server, opened(browser, server) as page:
        questions = page.locator(".question")

        def ask_slowly_in_place_of_the_second() -> None:
            engine.pace = 0.0
            for question in ("first", "second", "third"):
                ask(page, question)
            page.locator(".edit").nth(1).click()
            page.fill("#instruction", "other")
            engine.pace = 0.5
            page.click("#send")
            expect_text(page, "Answering")

        ask_slowly_in_place_of_the_second()
        page.locator(".edit").first.click()
        page.click("#stop")
        expect_text(page, "Stopped")
        assert questions.all_inner_texts() == ["first", "second", "third", "other"]
        assert page.locator(".turn h2").last.inner_text() == "Question 4"
        assert page.input_value("#instruction") == "first"
        assert page.locator(".replaced .question").inner_text() == "first"
        page.click("#clear")
        server.wait_until_idle(1)
        ask_slowly_in_place_of_the_second()
        page.click("#clear")
        page.locator("#send").wait_for()
        assert questions.count() == 0 and page.input_value("#instruction") == ""
        assert page.is_hidden("#cancel") and page.inner_text("#status") == ""


def test_page_is_there_within_200_ms(browser):
    loaded = "performance.getEntriesByType('navigation')[0].loadEventEnd"
    with running(tiny_engine()) as server, opened(browser, server) as page:
        times = []
        for _ in range(3):  # the fastest: others may be slowed by what else runs
            page.reload()
            page.locator("#model:not(:empty)").wait_for()
            times.append(page.evaluate(f"Math.max({loaded}, performance.now())"))
        assert min(times) < 200


def test_page_sends_an_instruction_alone_in_alpacas_template(browser, tmp_path):
    engine, file = NotingEngine("alpaca"), tmp_path / "examples.json"
    records = [{"instruction": f"Do {i}", "input": "this" * (i == 2)} for i in range(5)]
    file.write_text(json.dumps(records))
    with running(engine, "--examples", file) as server, opened(browser, server) as page:
        assert page.is_visible("#alone")
        assert page.locator("#examples button").all_inner_texts() == ["Do 0", "Do 1", "Do 2 [this]"]
        ask(page, "first")
        page.locator("#examples button").last.click()
        page.keyboard.press("Control+Enter")
        expect_text(page, "answer 2", ANSWER)
        assert engine.prompts[1] == format_prompt("Do 2", "this")
        assert page.locator(".turn").count() == 2


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
        assert page.get_attribute(ANSWER, "aria-busy") == "true"
        page.focus("#stop")
        page.keyboard.press("Escape")
        expect_text(page, "Stopped")
        assert page.evaluate(FOCUS) == "send"
        page.click(".report")
        page.fill("#why", "dull")
        page.keyboard.press("Control+Enter")
        expect_text(page, "Reported")
    (report,) = read_log(file)
    assert report["why"] == "dull"


def test_every_control_has_a_name_and_the_tab_key_reaches_it(browser):
    with running(ScriptedEngine("fine")) as server, opened(browser, server) as page:
        ask(page, "a")
        page.locator("summary").last.click()
        page.click("h1")
        controls = page.locator(":is(button, textarea, input, summary):visible").count()
        reached = set()
        for _ in range(controls - 1):  # an arrow key reaches the other tab
            page.keyboard.press("Tab")
            reached.add(page.evaluate("document.activeElement.outerHTML"))
            assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        assert len(reached) == controls - 1
        for control in page.aria_snapshot().splitlines():
            if found := re.match(r"\s*- (button|textbox|slider|tab|heading)\b(.*)", control):
                assert found[2].startswith(' "'), control


def test_page_shows_where_help_is_after_self_harm(browser):
    engine = ScriptedEngine("I want to die")
    with running(engine, filter=RuleFilter()) as server, opened(browser, server) as page:
        ask(page, "Say it.")
        expect_text(page, "findahelpline.com")
        assert "die" not in page.text_content(ANSWER)
        assert page.get_attribute(ANSWER, "aria-live") == "polite"


def test_page_shows_html_as_text(browser, tmp_path):
    file = tmp_path / "examples.json"
    file.write_text(json.dumps([{"instruction": EVIL, "input": EVIL[:20]}]))
    flags = ("--examples", file, "--notice", EVIL)
    with running(ScriptedEngine(EVIL), *flags) as server, opened(browser, server) as page:
        assert page.text_content("#examples button") == f"{EVIL} [{EVIL[:20]}]"
        assert page.text_content("#notice") == EVIL
        assert page.locator(":is(#notice, #examples button) *").count() == 0
        ask(page, EVIL)
        assert page.text_content(ANSWER) == page.text_content(".question") == EVIL
        assert page.locator(":is(.question, .answer) *").count() == 0
        page.click(".check")
        page.locator("#found").wait_for()
        assert page.text_content("#tokens") == EVIL
        assert page.locator("#tokens :not(span)").count() == 0 and page.title() == "Ask tiny"


def test_page_fits_a_phone_and_both_color_schemes(browser):
    backgrounds, width = set(), "document.documentElement.scrollWidth"
    with running(ScriptedEngine("x" * 400)) as server:
        for scheme in ("light", "dark"):
            options = {"viewport": {"width": 320, "height": 640}, "color_scheme": scheme}
            with opened(browser, server, **options) as page:
                ask(page, "y" * 400)
                page.locator("summary").last.click()
                background = "getComputedStyle(document.body).backgroundColor"
                backgrounds.add(page.evaluate(background))
                for control in page.locator("button:visible, textarea:visible").all():
                    assert control.bounding_box()["height"] >= 35
                assert page.evaluate(width) == 320
                page.click(".check")
                page.locator("#found").wait_for()
                assert page.evaluate(width) == 320
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

    for good in (0, 1):  # at the prompt, at the answer
        with running(ScriptedEngine("swordfish"), filter=DownAfter(good)) as server:
            page.goto(server.url)
            ask(page, "a")
            expect_text(page, "filter cannot be reached")
            assert page.text_content(ANSWER) == "" and page.is_hidden(".copy")
    with running(slow_engine()) as server:
        page.goto(server.url)
        page.fill("#instruction", "a")
        page.click("#send")
        expect_text(page, "word word", ANSWER)
        for connection in list(server.http.connections):
            server.loop.call_soon_threadsafe(connection.task.cancel)
        expect_text(page, "connection was lost")
    ask(page, "a")
    expect_text(page, "server cannot be reached")
    page.close()
