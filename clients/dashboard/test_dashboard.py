"""The dashboard as somebody at a browser meets it."""

import json
import re
import threading

import pytest
from openai import APIError, OpenAI
from playwright.sync_api import expect

from cluster import NAME

# Distinct colours of a canvas, 0 where nothing was drawn.
COLOURS = """canvas => {
  const { data } = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height), seen = new Set();
  for (let i = 0; i < data.length; i += 4) if (data[i + 3] > 200) seen.add(data[i] << 16 | data[i + 1] << 8 | data[i + 2]);
  return seen.size;
}"""
# Contrast by WCAG 2 of an element's text with what lies behind it.
CONTRAST = """element => {
  const rgb = (c) => c.match(/[0-9.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((v) => v / 255).map((v) => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  let behind = element;
  while (rgb(getComputedStyle(behind).backgroundColor)[3] === 0) behind = behind.parentElement;
  const [a, b] = [light(rgb(getComputedStyle(element).color)), light(rgb(getComputedStyle(behind).backgroundColor))].sort((x, y) => y - x);
  return (a + .05) / (b + .05);
}"""
BACKGROUND = "() => getComputedStyle(document.body).backgroundColor"
FITS = "() => document.scrollingElement.scrollWidth <= innerWidth"


@pytest.fixture
def load(cluster):
    """Two clients that ask for one long answer after the other while a test looks."""
    ended = threading.Event()

    def client() -> None:
        with OpenAI(base_url=cluster.url + "/v1", api_key=cluster.key) as openai:
            while not ended.is_set():
                for _ in openai.completions.create(model=NAME, prompt="Once upon a time", max_tokens=200, stream=True):
                    if ended.is_set():
                        break

    clients = [threading.Thread(target=client) for _ in range(2)]
    for thread in clients:
        thread.start()
    yield
    ended.set()
    for thread in clients:
        thread.join()


def test_a_key_is_asked_for_and_a_wrong_one_is_named(open_page, cluster):
    visit = open_page(key=None)
    expect(visit.page.locator("#login")).to_be_visible()
    visit.give("mlr-wrong")
    expect(visit.page.locator("#login-error")).not_to_be_empty()
    expect(visit.page.locator("#login")).to_be_visible()
    visit.give(cluster.key)
    expect(visit.page.locator("#state")).to_have_text("serving")
    expect(visit.page.locator("#model")).to_have_text(NAME)
    # The tab keeps it; nothing else does.
    assert cluster.key not in visit.page.content()
    visit.page.reload()
    expect(visit.page.locator("#state")).to_have_text("serving")
    assert visit.page.evaluate("() => JSON.stringify(localStorage)").find(cluster.key) == -1


def test_what_the_pipeline_does_is_seen_while_it_does_it(open_page, load):
    visit = open_page()
    page = visit.page
    expect(page.locator(".stage")).to_have_count(2)
    assert "layers 0–" in page.locator(".stage").first.inner_text()
    assert re.search(r"–29.*head", page.locator(".stage").last.inner_text())
    # From one second to the next: a number that moves, two stages that work, micro-batches in colours.
    page.wait_for_function("() => Number(document.querySelector('.tile b').textContent.replace(',', '')) > 0")
    page.wait_for_function("() => [...document.querySelectorAll('.meter')].every((m) => Number(m.ariaValueNow) > 0)")
    expect(page.locator("#timeline-text")).to_contain_text(re.compile(r"^\d+ micro-batches.*stage 0 \d+ %, stage 1 \d+ %"))
    assert int(visit.tile("requests running")) >= 1
    for canvas, colours in [("#timeline", 6), ("#curve-tokenss", 2)]:
        page.wait_for_function(f"([canvas, n]) => ({COLOURS})(document.querySelector(canvas)) >= n", arg=[canvas, colours])
    # What a micro-batch was, under the pointer.
    box = page.locator("#timeline").bounding_box()
    page.keyboard.press("p")
    expect(page.locator("#pause")).to_have_attribute("aria-pressed", "true")
    at = page.evaluate("() => { const b = state.boxes.at(-1); return [(b.from + b.to) / 2, b.row * 30 + 15]; }")
    page.mouse.move(box["x"] + at[0], box["y"] + at[1])
    expect(page.locator("#tip")).to_contain_text(re.compile(r"micro-batch \d+: \d+ rows?, \d+ positions?"))
    held = page.locator("#tiles").inner_text()
    page.wait_for_timeout(2500)
    assert page.locator("#tiles").inner_text() == held, "a paused picture stands still"
    page.keyboard.press("p")
    page.wait_for_function("held => document.getElementById('tiles').innerText !== held", arg=held)
    visit.picture("light")
    assert not visit.errors


def test_the_plan_and_what_happened_are_told(open_page):
    visit = open_page()
    expect(visit.page.locator("#plan")).to_contain_text("stage")
    expect(visit.page.locator("#help")).not_to_be_empty()
    kinds = visit.page.locator("#events b").all_inner_texts()
    assert kinds.count("joined") == 2 and "ready" in kinds


def test_a_token_tells_its_alternatives(open_page):
    visit = open_page()
    visit.ask("What is the capital of France?")
    footer = visit.answered()
    assert re.match(r"\d+ tokens · first after [\d.]+ m?s · [\d.]+ tokens/s · (stop|length)", footer), footer
    tokens = visit.page.locator(".turn.assistant .token")
    # By temperature 0 what was chosen is what was most likely.
    chosen = tokens.filter(has_text=re.compile(r"\w")).first
    chosen.hover()
    tip = visit.page.locator("#tip")
    expect(tip).to_contain_text(re.compile(rf"“{re.escape(chosen.text_content())}” [\d.]+ %"))
    assert json.loads(tip.locator("td").first.inner_text()) == chosen.text_content()
    shares = [float(s.split()[0]) for s in tip.locator("td:last-child").all_inner_texts()]
    assert len(shares) == 5 and shares == sorted(shares, reverse=True) and 0 < sum(shares) <= 100.5
    # By keyboard as well.
    visit.page.mouse.move(1, 1)
    expect(tip).to_be_hidden()
    tokens.first.focus()
    expect(tip).to_be_visible()
    # It is a conversation, until another begins.
    visit.ask("And of Italy?")
    visit.answered()
    expect(visit.page.locator(".turn")).to_have_count(4)
    visit.page.click("#clear")
    expect(visit.page.locator(".turn")).to_have_count(0)
    assert not visit.errors


def test_an_answer_is_stopped_by_escape_and_the_cluster_hears_of_it(open_page):
    visit = open_page()
    visit.ask("Tell me a very long story.", tokens=1500)
    expect(visit.page.locator(".turn.assistant .token").nth(3)).to_be_visible()
    visit.page.keyboard.press("Escape")
    assert visit.answered().endswith("stopped")
    expect(visit.page.locator("#send")).to_be_enabled()
    visit.page.wait_for_function("() => state.last.status.running === 0")
    assert not visit.errors


def test_requests_say_what_they_wait_for_and_can_be_ended(open_page, cluster):
    visit = open_page()
    page = visit.page
    expect(page.locator("#requests-text")).to_have_text("None runs or waits.")
    with OpenAI(base_url=cluster.url + "/v1", api_key=cluster.key) as openai:
        named = {"x-request-id": "a-story"}
        story = openai.completions.create(model=NAME, prompt="Once", max_tokens=1500, stream=True, extra_headers=named, extra_body={"ignore_eos": True})
        next(iter(story))
        row = page.locator("#requests tr[data-id=a-story]")
        expect(row).to_contain_text("computing token")
        row.focus()
        page.keyboard.press("Enter")
        expect(page.locator("#requests .spent")).to_contain_text(re.compile(r"[\d.]+ m?s"))
        expect(row).to_be_focused()
        row.get_by_role("button").click()
        with pytest.raises(APIError, match="cancelled"):
            list(story)
    expect(page.locator("#requests-text")).to_have_text("None runs or waits.")
    assert not visit.errors


def test_a_key_that_may_only_generate_sees_no_requests_of_others(open_page, cluster):
    visit = open_page(key=cluster.new_key("generate"))
    expect(visit.page.locator("#requests-text")).to_contain_text("may not see the requests of others")
    visit.ask("Say hello.", tokens=8)
    visit.answered()
    expect(visit.page.locator("#state")).to_have_text("serving")


def test_what_the_coordinator_refuses_is_told(open_page):
    visit = open_page()
    visit.ask("word " * 4000)
    expect(visit.page.locator(".turn.assistant .error")).to_contain_text("at most 2047 are possible")
    expect(visit.page.locator("#send")).to_be_enabled()


@pytest.mark.parametrize("system", ["light", "dark"])
def test_light_and_dark_by_system_and_by_choice(open_page, system):
    visit = open_page(color_scheme=system)
    page = visit.page
    colours = {page.evaluate(BACKGROUND)}
    visit.ask("Say hello.", tokens=8)
    visit.answered()
    for _ in range(2):
        for place in ["#model", "#state", ".tile b", ".tile span", "#advice", "#plan", "#events span", ".turn.user", ".turn footer", "#send", "#stop"]:
            if page.locator(place).first.is_enabled():
                assert page.locator(place).first.evaluate(CONTRAST) >= 4.5, f"{place} is hard to read"
        visit.picture(f"{system}-{len(colours)}")
        page.click("#theme")
        colours.add(page.evaluate(BACKGROUND))
    assert len(colours) == 2
    # The choice is kept.
    page.click("#theme")
    chosen = page.evaluate(BACKGROUND)
    page.reload()
    assert page.evaluate(BACKGROUND) == chosen


@pytest.mark.parametrize("width", [320, 390, 768])
def test_narrow_screens_scroll_one_way(open_page, width):
    visit = open_page(viewport={"width": width, "height": 800})
    visit.ask("Name three colours. " + "W" * 200)
    visit.answered()
    assert visit.page.evaluate(FITS)
    assert all(0 < box["width"] <= width for box in [visit.page.locator(p).bounding_box() for p in ["#tiles", "#timeline", "#plan", "#prompt"]])
    visit.picture(f"narrow-{width}")


def test_nothing_comes_from_elsewhere_and_nothing_said_becomes_code(open_page):
    visit = open_page()
    visit.ask("<img src=x onerror=alert(1)><script>alert(2)</script>", tokens=8)
    visit.answered()
    expect(visit.page.locator(".turn.user")).to_contain_text("<script>alert(2)</script>")
    assert visit.page.locator("#chat img, #chat script").count() == 0
    assert not visit.strangers and not visit.errors


def test_a_coordinator_that_dies_is_missed_and_found_again(open_page, cluster):
    visit = open_page()
    cluster.kill()
    expect(visit.page.locator("#state")).to_contain_text("no answer")
    assert visit.page.locator(".stage").count() == 2, "what was known last stays"
    cluster.start()
    expect(visit.page.locator("#state")).to_have_text("serving")
    expect(visit.page.locator("#events")).to_contain_text("joined")
    visit.ask("Say hello.", tokens=8)
    assert "stop" in visit.answered() or "length" in visit.answered()
