"""A browser for all tests; a page that knows what went wrong in it, for each."""

import os
import pathlib
import shutil
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Page, expect, sync_playwright

from cluster import PATIENCE

expect.set_options(timeout=1000 * PATIENCE)


@pytest.fixture(scope="session")
def browser():
    names = [os.environ.get("CHROMIUM"), "chromium", "chromium-browser", "google-chrome"]
    program = next((shutil.which(name) for name in names if name and shutil.which(name)), None)
    with sync_playwright() as playwright:
        # Containers that run as root have no sandbox to give.
        launched = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"] if os.geteuid() == 0 else [])
        yield launched
        launched.close()


class Visit:
    """A page and what happened in it: errors of its script, and requests that left its origin."""

    def __init__(self, page: Page, url: str) -> None:
        self.page, self.errors, self.strangers = page, [], []
        own = urlsplit(url).netloc
        page.on("pageerror", lambda e: self.errors.append(e.message))
        page.on("console", lambda m: self.errors.append(m.text) if m.type == "error" else None)
        page.on("request", lambda r: None if urlsplit(r.url).netloc == own or r.url.startswith("data:") else self.strangers.append(r.url))
        page.set_default_timeout(1000 * PATIENCE)
        page.goto(url)

    def give(self, key: str) -> None:
        self.page.fill("#login-key", key)
        self.page.press("#login-key", "Enter")

    def tile(self, name: str) -> str:
        """The number in the tile of that name."""
        return self.page.locator(".tile", has=self.page.get_by_text(name, exact=True)).locator("b").inner_text()

    def ask(self, text: str, tokens: int = 24) -> None:
        self.page.fill("#tokens", str(tokens))
        self.page.fill("#temperature", "0")
        self.page.fill("#prompt", text)
        self.page.press("#prompt", "Enter")

    def answered(self) -> str:
        """Waits for the end of the last answer; its footer."""
        footer = self.page.locator(".turn.assistant").last.locator("footer")
        expect(footer).to_be_visible()
        return footer.inner_text()

    def picture(self, name: str) -> None:
        """The whole page as PNG, where `MILLRACE_SCREENSHOTS` names a folder."""
        if folder := os.environ.get("MILLRACE_SCREENSHOTS"):
            pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
            self.page.screenshot(path=f"{folder}/{name}.png", full_page=True)


@pytest.fixture
def open_page(browser, cluster):
    """Opens the dashboard as a browser with these options would, with the key unless told otherwise."""
    contexts = []

    def opened(key: str | None = "", **options) -> Visit:
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        contexts.append(context)
        visit = Visit(context.new_page(), cluster.url + "/")
        if key is not None:
            visit.give(key or cluster.key)
            expect(visit.page.locator("#state")).to_have_text("serving")
        return visit

    yield opened
    for context in contexts:
        context.close()
