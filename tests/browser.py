"""A real browser without a window, for tests of what a page does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest


class Browser:
    """Chromium, and what it says of a page: errors, requests, sizes."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, page: Path | str, *, width: int = 1280, dark: bool = False) -> None:
        """Load a file (or an address) in a window so wide; what was noted before is forgotten."""
        self.command("Emulation.setDeviceMetricsOverride", width=width, height=900,
                     deviceScaleFactor=1, mobile=width < 600)  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        # Nothing moves while it is looked at.
        still = {"name": "prefers-reduced-motion", "value": "reduce"}
        self.command("Emulation.setEmulatedMedia", media="", features=[scheme, still])
        self.errors()
        self.requests()
        self.driver.get(page.resolve().as_uri() if isinstance(page, Path) else page)

    def print_media(self) -> None:
        """Lay the page out as for a printer."""
        self.command("Emulation.setEmulatedMedia", media="print", features=[])

    def command(self, name: str, **arguments: Any) -> Any:
        return self.driver.execute_cdp_cmd(name, arguments)

    def run(self, script: str, *arguments: Any) -> Any:
        """What a script returns: ``return document.title``."""
        return self.driver.execute_script(script, *arguments)

    def one(self, selector: str) -> Any:
        """The only element that a selector names."""
        found = self.all(selector)
        assert len(found) == 1, f"{len(found)} elements {selector}"
        return found[0]

    def all(self, selector: str) -> list[Any]:
        return self.driver.find_elements("css selector", selector)

    def until(self, script: str, *, seconds: float = 60) -> Any:
        """Wait until a script returns something true, and return that."""
        from selenium.webdriver.support.ui import WebDriverWait

        return WebDriverWait(self.driver, seconds, 0.05).until(lambda _: self.run(script))

    def errors(self) -> list[str]:
        """Errors and warnings on the console since the page was opened."""
        return [
            entry["message"]
            for entry in self.driver.get_log("browser")
            if entry["level"] in ("SEVERE", "WARNING")
        ]

    def requests(self) -> list[str]:
        """Addresses asked for since the page was opened, the page itself among them.

        What the tab that a browser starts with still asks for does not count.
        """
        said = [json.loads(entry["message"])["message"] for entry in self._log()]
        sent = [one["params"] for one in said if one["method"] == "Network.requestWillBeSent"]
        own = ("chrome://", "chrome-untrusted://")
        return [one["request"]["url"] for one in sent if not one["documentURL"].startswith(own)]

    def _log(self) -> list[dict[str, Any]]:
        return self.driver.get_log("performance")


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if reason := why_not():
        pytest.skip(reason)
    with started(tmp_path_factory.mktemp("browser")) as browser:
        yield browser


def why_not() -> str | None:
    """What is missing on this machine, if anything is."""
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        return "no chromium and chromedriver (Debian: chromium, chromium-driver)"
    return None if find_spec("selenium") else "selenium is not installed"


@contextmanager
def started(folder: Path) -> Iterator[Browser]:
    """A browser of its own, which keeps its profile and what it downloads in a folder."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu",
                     f"--user-data-dir={folder}"):  # fmt: skip
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    downloads = {"download.default_directory": str(folder), "download.prompt_for_download": False}
    options.add_experimental_option("prefs", downloads)
    driver = webdriver.Chrome(options, Service(str(shutil.which("chromedriver"))))
    try:
        yield Browser(driver)
    finally:
        driver.quit()
