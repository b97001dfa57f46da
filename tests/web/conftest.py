"""A browser, the stub server, and a page that is watched: a console error, a broken policy or a request to another
origin fails the test that caused it. Without Playwright or Chromium every test here is skipped, and says why."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from stub import Script, Stub

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def missing() -> str | None:
    """What the tests lack, in words."""
    try:
        import playwright.sync_api  # noqa: F401
    except ImportError:
        return "playwright is not installed: pip install playwright"
    return None if CHROMIUM else "no chromium in PATH: apt install chromium"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if (reason := missing()) is None:
        return
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def stub() -> Iterator[Stub]:
    with Stub() as server:
        yield server


@pytest.fixture
def script(stub: Stub) -> Script:
    """What the server says, new for each test."""
    return stub.restart()


class Watch:
    """What a page did that it must not do."""

    def __init__(self, page: Any, origin: str) -> None:
        self.problems: list[str] = []
        self.allows_refusals = False  # Chromium itself writes a line for every 4xx, 5xx and broken connection
        page.on("console", lambda message: self._console(message.type, message.text))
        page.on("pageerror", lambda error: self.problems.append(f"error: {error}"))
        page.on("request", lambda request: self._request(request.url, origin))

    def _console(self, kind: str, text: str) -> None:
        is_refusal = text.startswith("Failed to load resource")
        if kind in ("error", "warning") and not (is_refusal and self.allows_refusals):
            self.problems.append(f"console: {text}")

    def _request(self, url: str, origin: str) -> None:
        if not url.startswith((origin + "/", "data:")):
            self.problems.append(f"request to {url}")


@pytest.fixture
def open_page(browser: Any, stub: Stub, script: Script) -> Iterator[Any]:
    """open_page(width=..., color_scheme=..., path=...) -> page, with the model's name shown. page.watch: a Watch."""
    contexts: list[Any] = []
    watches: list[Watch] = []

    def open_(path: str = "/", width: int = 1280, height: int = 800, **options: Any) -> Any:
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        context.set_default_timeout(10_000)
        contexts.append(context)
        page = context.new_page()
        page.watch = Watch(page, stub.url)
        watches.append(page.watch)
        page.goto(stub.url + path)
        page.wait_for_selector("#model[data-state=ready]")
        return page

    yield open_
    for context in contexts:
        context.close()
    assert [problem for watch in watches for problem in watch.problems] == []
