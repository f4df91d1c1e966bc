"""A headless browser, and what it must not find in a page."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from selenium import webdriver

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = (
    "headless=new",
    "no-sandbox",
    "disable-gpu",
    "disable-quic",
    "no-first-run",
    "disable-background-networking",
    "disable-component-update",
    "disable-sync",
)

MISSING = BROWSER is None or DRIVER is None
REASON = "needs chromium and chromedriver"

# Where tests guard a branch, one that did not run must not pass for one that did.
needs_browser = pytest.mark.skipif(MISSING and not os.environ.get("CI"), reason=REASON)


@contextmanager
def opened(page: Path, profile: Path) -> Iterator[webdriver.Chrome]:
    """The page in a browser with an empty profile."""
    if MISSING:
        pytest.fail(REASON)
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in (*FLAGS, f"user-data-dir={profile}"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER)) as browser:
        browser.get(page.as_uri())
        yield browser


def require_sound(browser: webdriver.Chrome, page: Path) -> int:
    """Every picture is there, no script or resource failed, nothing was fetched; returns the number of pictures."""
    widths = browser.execute_script("return Array.from(document.images, image => image.naturalWidth)")
    assert all(width > 0 for width in widths)
    assert browser.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    requests = [event["params"] for event in events if event["method"] == "Network.requestWillBeSent"]
    # The browser's own start page makes requests too.
    ours = {request["request"]["url"] for request in requests if request["documentURL"] == page.as_uri()}
    assert {url for url in ours if not url.startswith("data:")} == {page.as_uri()}
    return len(widths)
