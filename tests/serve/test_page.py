"""The page, in a real browser: what a person does with it, and what goes wrong."""

from __future__ import annotations

import base64
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import Browser, Page, expect

from t2idist.sampling import sample
from t2idist.serve.gate import hash_of
from tests.helpers.browser import chromium
from tests.helpers.served import Client, serving
from tests.sampling.conftest import FIRST, SECOND, write_image

pytestmark = pytest.mark.whole
expect.set_options(timeout=20_000)  # on a busy machine
TOKEN = "correct-horse-battery"
SENTENCE = "a red face heart"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def attngan(served: dict[str, str]) -> Iterator[Client]:
    with serving(served["attngan"]) as client:
        yield client


@pytest.fixture
def page(browser: Browser, attngan: Client) -> Iterator[Page]:
    """The page of an AttnGAN, which must send no request elsewhere and raise no error."""
    yield from open_page(browser, attngan)


def open_page(browser: Browser, client: Client, **context: object) -> Iterator[Page]:
    opened = browser.new_context(**context)  # type: ignore[arg-type]
    page = opened.new_page()
    page.set_default_timeout(10_000)
    urls: list[str] = []
    errors: list[str] = []
    page.on("request", lambda request: urls.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(client.url)
    expect(page.locator("#about")).to_contain_text("px")
    yield page
    elsewhere = [url for url in urls if not url.startswith((f"{client.url}/", "data:", "blob:"))]
    assert not elsewhere and not errors
    opened.close()


def draw(page: Page, text: str = SENTENCE) -> None:
    page.fill("#text", text)
    page.press("#text", "Enter")
    expect(page.locator("figure")).to_have_count(4)


def shown_files(page: Page) -> list[bytes]:
    """Return the PNG files that the page offers to save, one for each picture."""
    links = page.locator("figure a[download]")
    return [
        base64.b64decode((links.nth(i).get_attribute("href") or "").partition(",")[2]) for i in range(links.count())
    ]


def test_the_pictures_are_the_bytes_of_the_command(page: Page, served: dict[str, str], tmp_path: Path) -> None:
    page.fill("#count", "3")
    page.fill("#seed", "7")
    page.fill("#text", FIRST)
    page.click("#draw")
    expect(page.locator("figure")).to_have_count(3)
    expect(page.locator("#said")).to_have_text("3 pictures drawn.")
    options = ["--text", FIRST, "--n", "3", "--seed", "7", "--scale", "all", "--attention", "--out", str(tmp_path)]
    assert sample.main(["--export", served["attngan"], *options]) == 0
    assert shown_files(page) == [file.read_bytes() for file in sorted(tmp_path.glob("0*_32px.png"))]
    small = page.locator("figure .scales img")
    expect(small).to_have_count(3)
    assert (
        base64.b64decode((small.first.get_attribute("src") or "").partition(",")[2])
        == min(tmp_path.glob("0*_16px.png")).read_bytes()
    )


def test_a_word_shows_its_attention_while_it_is_pointed_at(page: Page) -> None:
    draw(page)
    words = page.locator("#words .chip")
    assert words.all_text_contents() == SENTENCE.split()
    overlay = page.locator("figure canvas")
    assert not page.locator("canvas.shown").count()
    words.nth(1).hover()
    expect(page.locator("canvas.shown")).to_have_count(4)
    expect(page.locator("#said")).to_contain_text("Attention to “red”, at most ")
    expect(page.locator("figcaption").first).to_contain_text("peak")
    expect(overlay.first).to_have_js_property("width", 16)
    painted = overlay.first.evaluate("c => new Set(c.getContext('2d').getImageData(0, 0, c.width, c.height).data).size")
    assert painted > 4, "a map that differs between places"
    page.mouse.move(1, 1)
    expect(page.locator("canvas.shown")).to_have_count(0)
    words.nth(2).click()
    page.mouse.move(1, 1)
    page.locator("#text").focus()
    expect(page.locator("canvas.shown")).to_have_count(4)
    expect(words.nth(2)).to_have_attribute("aria-pressed", "true")
    assert page.input_value("#change-from") == "2"


def test_the_slider_changes_a_word(page: Page, attngan: Client) -> None:
    draw(page)
    before = shown_files(page)
    page.locator("#words .chip").nth(1).click()
    page.fill("#change-to", "blue, word1")
    page.press("#change-to", "Enter")
    slider = page.locator("#slider")
    expect(slider).to_be_focused()
    expect(page.locator("#slider-value")).to_have_text("a blue face heart")
    assert page.locator(".chip.changed").text_content() == "blue"
    expected = attngan.draw(text="a blue face heart", scale="all", attention=True)
    assert shown_files(page) == [files[-1] for files in expected.files]
    page.keyboard.press("Home")
    expect(page.locator("#slider-value")).to_have_text(SENTENCE)
    assert shown_files(page) == before
    page.keyboard.press("End")
    expect(slider).to_have_attribute("aria-valuetext", "a word1 face heart")
    page.fill("#change-to", "zeppelin")
    page.press("#change-to", "Enter")
    expect(page.locator("#error")).to_have_text("The model does not know “zeppelin”.")


def test_the_slider_goes_to_another_sentence(page: Page, attngan: Client) -> None:
    draw(page)
    page.fill("#way-to", SECOND)
    page.press("#way-to", "Enter")
    expect(page.locator("#slider")).to_have_attribute("max", "8")
    expected = attngan.draw(text=SENTENCE, to=SECOND, steps=9, scale="all").files
    assert shown_files(page) == [files[-1] for files in expected[:4]]
    for _ in range(4):
        page.keyboard.press("ArrowRight")
    expect(page.locator("#slider-value")).to_have_text("50 % of the way")
    assert shown_files(page) == [files[-1] for files in expected[16:20]]
    page.keyboard.press("End")
    expect(page.locator("#slider-value")).to_have_text(SECOND)


def test_unknown_words_and_empty_texts_are_answered_in_sentences(page: Page) -> None:
    page.press("#text", "Enter")
    expect(page.locator("#error")).to_have_text("Type a sentence first.")
    expect(page.locator("#text")).to_be_focused()
    expect(page.locator("#text")).to_have_attribute("aria-invalid", "true")
    page.fill("#text", "zeppelins")
    page.press("#text", "Enter")
    expect(page.locator("#error")).to_contain_text("no word of this sentence is in the vocabulary")
    draw(page, f"zeppelin {FIRST}")
    expect(page.locator("#error")).to_be_hidden()
    expect(page.locator("#note")).to_have_text("Word is not in the vocabulary and left out: 'zeppelin'.")
    page.fill("#count", "0")
    page.click("#draw")
    expect(page.locator("#error")).to_have_text("N 0: give at least 1 and at most 64.")
    page.click("#known summary")
    page.locator("#known-words .chip", has_text="blue").click()
    assert page.input_value("#text").endswith("heart blue")


def test_a_slow_answer_shows_that_and_can_be_stopped(page: Page, attngan: Client) -> None:
    assert attngan.drawer is not None
    queue = attngan.drawer.queue
    draw_batch, go = queue._draw, threading.Event()
    queue._draw = lambda rows: (go.wait(20), draw_batch(rows))[1]
    try:
        page.fill("#text", SENTENCE)
        page.press("#text", "Enter")
        expect(page.locator("#status-row")).to_be_visible()
        expect(page.locator("#clock")).to_have_text("Drawing … 1 s")
        page.click("#stop")
        expect(page.locator("#status-row")).to_be_hidden()
        page.press("#text", "Enter")
        expect(page.locator("#status-row")).to_be_visible()
        go.set()
        expect(page.locator("figure")).to_have_count(4)
        expect(page.locator("#status-row")).to_be_hidden()
    finally:
        go.set()
        queue._draw = draw_batch


def test_a_lost_server_is_named_and_found_again(page: Page) -> None:
    draw(page)
    page.context.set_offline(True)
    page.fill("#text", FIRST)
    page.press("#text", "Enter")
    expect(page.locator("#error")).to_contain_text("The server does not answer. Your words are kept")
    assert page.input_value("#text") == FIRST and page.locator("figure").count() == 4
    page.context.set_offline(False)
    expect(page.locator("#note")).to_have_text("The server is back.")
    expect(page.locator("#error")).to_be_hidden()
    draw(page, FIRST)


def test_everything_is_reached_by_keyboard(page: Page) -> None:
    """No mouse: the sentence, the pictures, a word, another word for it, the slider."""
    expect(page.locator("#text")).to_be_focused()
    page.keyboard.type(SENTENCE)
    page.keyboard.press("Enter")
    expect(page.locator("figure")).to_have_count(4)
    tab_to(page, "#words .chip:nth-child(2)")
    expect(page.locator("canvas.shown")).to_have_count(4)
    page.keyboard.press("Enter")
    tab_to(page, "#change-to")
    page.keyboard.type("blue")
    page.keyboard.press("Enter")
    expect(page.locator("#slider")).to_be_focused()
    expect(page.locator("#slider-value")).to_have_text("a blue face heart")
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#slider-value")).to_have_text(SENTENCE)
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll("input, select, textarea, button")].filter(e => e.offsetParent &&
             !(e.labels?.length || e.textContent.trim() || e.ariaLabel)).map(e => e.outerHTML)"""
    )
    assert unnamed == []


def tab_to(page: Page, selector: str) -> None:
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.locator(selector).evaluate("e => e === document.activeElement"):
            return
    raise AssertionError(f"{selector} is not reached by Tab")


def test_the_page_fits_a_phone_and_dark_colours(browser: Browser, attngan: Client) -> None:
    for page in open_page(
        browser, attngan, viewport={"width": 360, "height": 640}, color_scheme="dark", has_touch=True
    ):
        draw(page)
        page.fill("#way-to", SECOND)
        page.press("#way-to", "Enter")
        expect(page.locator("#scrub")).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        draw(page, f"{SENTENCE} {SENTENCE}")
        page.locator("#words .chip").first.tap()
        expect(page.locator("canvas.shown")).to_have_count(4)
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert background == "rgb(20, 22, 26)"
        for target in page.locator("#draw, #other-seed, #words .chip").all():
            box = target.bounding_box()
            assert box is not None and box["height"] >= 34


def test_a_token_is_asked_for_and_not_kept(browser: Browser, served: dict[str, str]) -> None:
    with serving(served["attngan"], host="0.0.0.0", token_sha256=hash_of(TOKEN)) as client:
        context = browser.new_context()
        page = context.new_page()
        page.goto(client.url)
        expect(page.locator("#token-dialog")).to_be_visible()
        page.keyboard.type("wrong")
        page.keyboard.press("Enter")
        expect(page.locator("#token-error")).to_have_text("This is not the token of this server.")
        expect(page.locator("#token-error")).to_be_visible()
        expect(page.locator("#token")).to_be_focused()
        page.keyboard.type(TOKEN)
        page.keyboard.press("Enter")
        expect(page.locator("#about")).to_contain_text("attngan")
        draw(page)
        kept = page.evaluate("[localStorage.length, sessionStorage.length, document.cookie]")
        assert kept == [0, 0, ""] and TOKEN not in page.url
        context.close()


def test_a_picture_is_uploaded_and_its_attributes_changed(
    browser: Browser, served: dict[str, str], tmp_path: Path
) -> None:
    image = write_image(tmp_path / "face.png", np.random.default_rng(0).integers(0, 255, (40, 40, 3)))
    (tmp_path / "text.png").write_text("no image")
    with serving(served["stargan"]) as client:
        for page in open_page(browser, client):
            page.set_input_files("#file", image)
            smiling, blond = (page.get_by_role("checkbox", name=name) for name in ("Smiling", "Blond Hair"))
            smiling.press("Space")
            expect(page.locator("figure")).to_have_count(2)
            body = Path(image).read_bytes()
            expected = client.ask("/translate?set=Smiling", body, Content_Type="image/png").json["png"]
            assert shown_files(page)[1] == base64.b64decode(expected)
            blond.click()
            expect(page.locator("figcaption").nth(1)).to_contain_text("+Smiling +Blond Hair")
            page.get_by_role("checkbox", name="Black Hair").click()
            expect(blond).to_have_attribute("aria-checked", "mixed")
            smiling.click()
            expect(smiling).to_have_attribute("aria-checked", "false")
            expect(page.locator("figcaption").nth(1)).to_contain_text("+Black Hair -Smiling")
            page.set_input_files("#file", str(tmp_path / "text.png"))
            expect(page.locator("#error")).to_contain_text("Image: does not decode")
