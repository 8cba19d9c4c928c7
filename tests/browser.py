"""A browser: Debian's chromium without a screen, driven by selenium, with nothing downloaded."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any, Self

from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement

from tests.processes import wait_until

_CHROMIUM, _DRIVER = "/usr/bin/chromium", "/usr/bin/chromedriver"
_PATIENCE = 30.0
_SWITCHES = (
    "--headless=new",
    # The tests run as root.
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--no-first-run",
)
_BLOCKED = 2


class Browser:
    """A browser with one tab; with `scripts` unset, scripts are forbidden by its settings."""

    def __init__(self, *, scripts: bool = True) -> None:
        options = ChromeOptions()
        options.binary_location = _CHROMIUM
        for switch in _SWITCHES:
            options.add_argument(switch)
        if not scripts:
            options.add_experimental_option(
                "prefs", {"profile.managed_default_content_settings.javascript": _BLOCKED}
            )
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        # By the path of its driver: without one, selenium would download it.
        self.driver = Chrome(options=options, service=Service(_DRIVER))
        self.resize(1200, 900)

    def __enter__(self) -> Self:
        """Return the browser, which has started."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End it."""
        self.driver.quit()

    def resize(self, width: int, height: int) -> None:
        """Set the size of what is shown, in pixels; unlike a window, it may be as narrow as a phone."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    def prefer(self, scheme: str) -> None:
        """Let pages be `light` or `dark`."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def open(self, url: str) -> None:
        """Open a page, and wait until it is loaded."""
        self.driver.get(url)

    def evaluate(self, expression: str) -> Any:
        """Return the value of an expression; the driver can do that also where the page's own scripts are off."""
        return self.driver.execute_script(f"return {expression}")

    def find(self, selector: str) -> list[WebElement]:
        """Return all elements that match a CSS selector."""
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def text(self, selector: str) -> str:
        """Return what can be read of the first such element; empty if there is none."""
        # In one step: the page may replace the element between two.
        return str(self.evaluate(f"document.querySelector({selector!r})?.innerText ?? ''"))

    def texts(self, selector: str) -> list[str]:
        """Return what can be read of each such element."""
        found = self.evaluate(f"Array.from(document.querySelectorAll({selector!r}), one => one.innerText)")
        return [str(text) for text in found]

    def wait_for(self, selector: str, text: str, timeout: float = _PATIENCE) -> None:
        """Return when the first such element has this text in it."""
        wait_until(lambda: text in self.text(selector), timeout, f"{text!r} in {selector}")

    @property
    def overflow(self) -> int:
        """By how many pixels the page is wider than what is shown."""
        return int(self.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth"))

    @property
    def complaints(self) -> list[str]:
        """What the page's console says since the last time: errors of scripts, violations of the policy."""
        return [str(entry["message"]) for entry in self.driver.get_log("browser")]

    def picture(self, path: Path) -> None:
        """Write what is shown as a PNG."""
        assert self.driver.save_screenshot(str(path))
