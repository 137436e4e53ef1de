"""The page in a real browser: select, erase, ask, compare, undo, repair; by mouse and keyboard, on a phone, in the dark."""

from __future__ import annotations

import json
import os
import shutil

import pytest
from serving_helpers import REAL, running, tiny_service

from kveraser.demo.stories import stories
from kveraser.evaluation import leaks
from kveraser.serving.service import Service

playwright_api = pytest.importorskip(
    "playwright.sync_api", reason="playwright is missing; pip install -r requirements.txt"
)
expect = playwright_api.expect

CHROMIUM = os.environ.get("KVERASER_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.model,
    pytest.mark.skipif(not CHROMIUM, reason="there is no chromium; install Debian's package or set KVERASER_CHROMIUM"),
]
DOCUMENT = "the code of the door is 1234 🎈, it is blue. no, the code is 99. the car is fast and the door is blue. "
CHAT = [{"role": "user", "content": "what is the code?"}, {"role": "tool", "content": "the code is 1234"}]
SECONDS = 180_000  # milliseconds that something may take where the machine is busy


@pytest.fixture(scope="module")
def browser():
    with playwright_api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def tiny_url():
    with running(tiny_service(cache_budget=1 << 24)) as url:
        yield url


@pytest.fixture(scope="module")
def real_url(smollm):
    with running(Service(*smollm), name=REAL) as url:
        yield url


@pytest.fixture
def open_page(browser):
    """Opens a server's page. At the end: nothing but the server was asked, and nothing was complained about."""
    contexts, asked, complaints = [], [], []

    def go(url, **options):
        options.setdefault("viewport", {"width": 1100, "height": 1200})
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.set_default_timeout(SECONDS)
        page.on("request", lambda request: asked.append((request.url, url)))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.goto(url)
        expect(page.locator("body")).to_have_attribute("aria-busy", "false", timeout=SECONDS)
        return page

    yield go
    for context in contexts:
        context.close()
    assert asked
    assert [found for found, url in asked if not found.startswith((f"{url}/", "data:"))] == []
    assert [text for text in complaints if "401" not in text] == []  # the browser notes a refused key


def said(page, words):
    expect(page.locator("#status")).to_contain_text(words, timeout=SECONDS)


def read(page, text, kind="text"):
    page.select_option("#kind", kind)
    page.fill("#source", text)
    page.click("#read")
    said(page, "Read.")


def drag_over(page, text):
    """Select a text as a mouse does: press at its beginning, move, release at its end."""
    box = page.evaluate(
        """(text) => {
            const root = document.getElementById("context");
            const walker = document.createTreeWalker(root, NodeFilter.SHOW_TEXT);
            for (let node = walker.nextNode(); node; node = walker.nextNode()) {
                const at = node.data.indexOf(text);
                if (at < 0) continue;
                root.scrollIntoView({ block: "center" });
                const range = document.createRange();
                range.setStart(node, at);
                range.setEnd(node, at + text.length);
                const boxes = range.getClientRects();
                const [first, last] = [boxes[0], boxes[boxes.length - 1]];
                return [first.left, first.top + first.height / 2, last.right, last.top + last.height / 2];
            }
        }""",
        text,
    )
    page.mouse.move(box[0] + 0.5, box[1])
    page.mouse.down()
    page.mouse.move((box[0] + box[2]) / 2, box[3])
    page.mouse.move(box[2] - 0.5, box[3])
    page.mouse.up()
    assert page.evaluate("getSelection().toString()").strip() == text.strip()


def marked_texts(page, name):
    """The texts that a highlight marks."""
    return page.evaluate("(name) => [...(CSS.highlights.get(name) ?? [])].map(String)", name)


def card(page, version):
    return page.locator(f"#answers .{version}")


def test_a_stale_fact_is_selected_erased_asked_about_undone_and_repaired(real_url, open_page):
    story = stories()[0]
    page = open_page(real_url)
    expect(page.locator("#model")).to_have_text(REAL)
    page.select_option("#example", label=story.name)
    expect(page.locator("#question")).to_have_value(story.question)
    page.click("#read")
    said(page, "Read.")
    assert page.locator("#context").text_content() == story.prefix + story.span + story.suffix
    drag_over(page, story.span.strip())
    expect(page.locator("#readers")).to_contain_text("read most by", timeout=SECONDS)
    heat = marked_texts(page, "heat-4")
    assert heat
    assert all(story.suffix.startswith(text) or text in story.suffix for text in heat)
    page.click("#erase")
    said(page, "Erased")
    again = "".join(marked_texts(page, "recomputed"))
    assert 0 < len(again) < len(story.suffix)
    assert again[:8] == story.suffix[:8]  # right behind the span
    entry = page.locator("#erases li").text_content()
    assert "recomputed" in entry and "of the attention to it left" in entry and "neutral eraser" in entry
    assert page.locator("#context del").text_content().strip() == story.span.strip()
    expect(page.locator("#exactness")).to_have_text("approximate")
    removed = int(page.locator("#erases li").text_content().split(": ")[1].split()[0])
    marked = page.locator("#ledger .erased")
    assert int(marked.get_attribute("width")) == removed
    total = int(page.locator("#ledger").get_attribute("viewBox").split()[2])
    share = marked.bounding_box()["width"] / page.locator("#ledger").bounding_box()["width"]
    assert share == pytest.approx(removed / total, abs=0.01)

    page.click("#ask")
    said(page, "Answered.")
    answers = {
        version: card(page, version).locator(".said").text_content() for version in ("before", "now", "recomputed")
    }
    assert leaks(answers["before"], story.erased)
    for version in ("now", "recomputed"):
        assert not leaks(answers[version], story.erased)
        assert story.gold in answers[version]
    badges = {version: card(page, version).locator(".badge").text_content() for version in answers}
    assert badges == {"before": "exact", "now": "approximate", "recomputed": "exact"}
    assert "kveraser: " in card(page, "now").locator(".facts").text_content()
    for version in answers:
        assert " ms" in card(page, version).locator(".facts").text_content()
    plot = page.locator("#plot")
    assert "Distance to recomputation" in plot.locator("caption").text_content()
    assert plot.locator("tbody tr").count() >= 4
    assert plot.locator("tbody tr").first.locator("td.now").text_content().endswith(" %")

    page.click("#erases button")
    said(page, "every state is as it was")
    assert marked_texts(page, "recomputed") == []
    expect(page.locator("#context del")).to_have_count(0)
    expect(page.locator("#exactness")).to_have_text("exact")
    drag_over(page, story.span.strip())
    page.click("#erase")
    said(page, "Erased")
    page.evaluate("""() => {
        window.seen = [];
        const bar = document.getElementById("progress");
        new MutationObserver(() => window.seen.push(bar.hidden ? -1 : bar.value)).observe(bar, { attributes: true });
    }""")
    page.click("#repair")
    said(page, "tokens were recomputed")
    seen = page.evaluate("window.seen")
    assert max(seen) == 1
    assert seen[0] == 0
    assert seen[-1] == -1
    expect(page.locator("#exactness")).to_have_text("exact")
    expect(page.locator("#repair")).to_be_disabled()


def test_everything_can_be_done_with_the_keyboard(tiny_url, open_page):
    page = open_page(tiny_url)
    page.focus("#source")
    page.keyboard.insert_text(DOCUMENT)
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    said(page, "Read.")
    assert page.evaluate("document.activeElement.id") == "context"
    page.keyboard.press("Control+Home")
    for _ in range(9):
        page.keyboard.press("Shift+ArrowRight")
    assert page.evaluate("getSelection().toString()") == DOCUMENT[:9]
    page.keyboard.type("x")  # it cannot be written over
    page.keyboard.press("Backspace")
    said(page, "Erased")
    assert page.locator("#context").text_content() == DOCUMENT
    assert page.locator("#context del").text_content().startswith(DOCUMENT[:9])
    page.locator("#erases button").focus()
    page.keyboard.press("Enter")
    said(page, "Undone")
    page.focus("#question")
    page.keyboard.insert_text("the code?")
    page.keyboard.press("Enter")
    said(page, "Answered.")
    assert page.locator("#answers article").count() == 1  # nothing is erased
    reached = set()
    page.evaluate("document.activeElement.blur()")
    for _ in range(25):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id"))
    assert {
        "example",
        "kind",
        "source",
        "read",
        "forget",
        "context",
        "method",
        "purge",
        "new",
        "question",
        "ask",
        "keep",
    } <= reached


def test_a_selection_behind_a_character_of_two_units_is_the_selected_text(tiny_url, open_page):
    page = open_page(tiny_url)
    read(page, DOCUMENT)
    drag_over(page, "no, the code is 99.")
    page.click("#erase")
    said(page, "Erased")
    assert page.locator("#context del").text_content().strip() == "no, the code is 99."
    drag_over(page, "1234 🎈")
    page.select_option("#method", "delete-and-shift")
    page.check("#purge")
    page.click("#erase")
    said(page, "for good")
    assert "1234" not in page.locator("#context").text_content()
    assert page.locator("#ledger .erased").count() == 2
    page.reload()  # the session is still there
    expect(page.locator("#ledger .erased")).to_have_count(2, timeout=SECONDS)
    page.click("#forget")
    expect(page.locator("#context-section")).to_be_hidden(timeout=SECONDS)


def test_a_selection_is_replaced_asked_about_undone_and_repaired(tiny_url, open_page):
    page = open_page(tiny_url)
    read(page, DOCUMENT)
    drag_over(page, "no, the code is 99.")
    expect(page.locator("#replace")).to_be_disabled()
    page.fill("#new", "so the code is 77 now.")
    page.keyboard.press("Enter")
    said(page, "Replaced")
    assert page.locator("#context ins").text_content().strip() == "so the code is 77 now."
    assert page.locator("#context del").text_content().strip() == "no, the code is 99."
    assert page.locator("#context").text_content().index("77") < page.locator("#context").text_content().index("99")
    entry = page.locator("#erases li").text_content()
    assert "replaced by" in entry
    assert page.locator("#ledger .new").count() == 1
    assert "new in their place" in page.locator("#ledger-caption").text_content()
    expect(page.locator("#exactness")).to_have_text("approximate")
    page.fill("#question", "the code?")
    page.click("#ask")
    said(page, "Answered.")
    assert page.locator("#answers article").count() == 3
    drag_over(page, "77")
    page.fill("#new", "88")
    page.click("#replace")
    said(page, "Replaced")
    assert "88" in "".join(page.locator("#context ins").all_text_contents())
    page.locator("#erases button").last.click()
    said(page, "Undone")
    page.locator("#erases button").first.click()
    said(page, "Undone")
    assert page.locator("#context").text_content() == DOCUMENT
    expect(page.locator("#context ins")).to_have_count(0)


def test_a_chat_can_be_read_and_gone_on_with(tiny_url, open_page):
    page = open_page(tiny_url)
    page.select_option("#kind", "chat")
    page.fill("#source", '{"role": "user"}')
    page.click("#read")
    expect(page.locator("#error")).to_contain_text("list of", timeout=SECONDS)
    read(page, json.dumps(CHAT), "chat")
    assert page.locator("#ledger .message").count() == 2
    page.fill("#question", "and the color?")
    page.check("#keep")
    page.click("#ask")
    said(page, "Answered.")
    assert "and the color?" in page.locator("#context").text_content()
    assert page.locator("#ledger .message").count() in (3, 4)  # an answer without text is no message
    page.select_option("#kind", "chat")
    page.fill("#source", "{")
    page.click("#read")
    expect(page.locator("#error")).to_contain_text("no JSON", timeout=SECONDS)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_in_light_and_dark(tiny_url, open_page, scheme):
    page = open_page(
        tiny_url, viewport={"width": 320, "height": 640}, color_scheme=scheme, has_touch=True, is_mobile=True
    )

    def fits():
        assert page.evaluate("document.documentElement.scrollWidth") <= 320

    fits()
    read(page, DOCUMENT + "w" * 200)
    fits()
    page.locator("#context").focus()
    page.keyboard.press("Control+A")
    page.keyboard.press("Delete")
    said(page, "Erased")
    page.fill("#question", "the code?")
    page.click("#ask")
    said(page, "Answered.")
    assert page.locator("#answers article").count() == 3
    fits()
    back, ink = page.evaluate(
        "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
    )
    bright = [sum(int(part) for part in color[4:-1].split(",")) for color in (back, ink)]
    assert bright[0] > bright[1] + 400 if scheme == "light" else bright[1] > bright[0] + 400


def test_a_key_is_asked_for_and_kept_in_the_tab_alone(open_page):
    with running(tiny_service(cache_budget=1 << 22), "alpha") as url:
        page = open_page(url)
        expect(page.locator("#error")).to_contain_text("a valid API key is needed", timeout=SECONDS)
        page.fill("#key", "wrong")
        page.keyboard.press("Enter")
        expect(page.locator("#key-form")).to_be_visible()
        page.fill("#key", "alpha")
        page.keyboard.press("Enter")
        expect(page.locator("#key-form")).to_be_hidden(timeout=SECONDS)
        read(page, DOCUMENT)
        assert page.evaluate("sessionStorage.getItem('kveraser.key')") == "alpha"
        assert page.evaluate("localStorage.length") == 0
        assert page.context.cookies() == []


def test_an_answer_can_be_stopped(tiny_url, open_page):
    page = open_page(tiny_url)
    read(page, DOCUMENT)
    page.route("**/compare", lambda route: None)  # it never comes
    page.fill("#question", "the code?")
    page.click("#ask")
    expect(page.locator("#ask")).to_be_disabled()
    page.click("#stop")
    expect(page.locator("#ask")).to_be_enabled(timeout=SECONDS)
    expect(page.locator("#error")).to_have_text("")
