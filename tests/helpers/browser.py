"""A headless Chromium of this machine, driven by Playwright."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator

from playwright.sync_api import Browser, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
VARIABLE = "CHROMIUM"


def find_chromium() -> str:
    """Return the path of the browser. Raises AssertionError that says how to install one."""
    names = [os.environ[VARIABLE]] if os.environ.get(VARIABLE) else NAMES
    found = next((path for name in names if (path := shutil.which(name))), None)
    looked_for = ", ".join(names)
    assert found is not None, f"no Chromium ({looked_for}): apt-get install chromium, or set {VARIABLE} to the program"
    return found


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """Run the browser."""
    # root, as in a container, cannot use Chromium's sandbox; the page under test is our own
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=arguments)
        try:
            yield browser
        finally:
            browser.close()
