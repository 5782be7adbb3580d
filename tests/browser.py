"""Debian's Chromium without a window, for tests of pages."""

import contextlib
import shutil

import pytest

CHROMIUM = shutil.which("chromium")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs a browser: apt-get install chromium")


@contextlib.contextmanager
def open_browser():
    """A Chromium; each test opens a page of its own in it."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])  # root has none
        try:
            yield browser
        finally:
            browser.close()
