"""Chromium without a window, for tests of pages; skipped with a clear word where something is missing."""

import contextlib
import shutil
from collections.abc import Iterator
from typing import Any

import pytest


@contextlib.contextmanager
def chromium(width: int = 1280, height: int = 900, *, dark: bool = False, touch: bool = False) -> Iterator[Any]:
    """A driver of Chromium that has no network and keeps what the console says.

    Args:
        width: of the page, in CSS pixels.
        height: of the page, in CSS pixels.
        dark: what the page is told of the user's colour scheme.
        touch: whether it is a phone.
    """
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed (pip install selenium)")
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if browser is None or driver is None:
        pytest.skip("needs Chromium and its driver (apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for word in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--hide-scrollbars"):
        options.add_argument(word)
    options.add_argument("--host-resolver-rules=MAP * ~NOTFOUND")  # no network
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    page = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": touch}
        page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        if touch:
            page.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": True})
        yield page
    finally:
        page.quit()


def complaints(page: Any) -> list[str]:
    """What the console has said since it was last asked, but for chatter."""
    return [entry["message"] for entry in page.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]


def wait_for(page: Any, script: str, *, seconds: float = 20) -> Any:
    """Wait until a script returns something true, and return it."""
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(page, seconds, poll_frequency=0.05).until(lambda _: page.execute_script(f"return {script}"))
