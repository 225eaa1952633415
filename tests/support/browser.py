"""A headless Chromium of the tests' own, and the accessibility check of axe-core in it."""

import contextlib
import json
from pathlib import Path

import axe_core_python
from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service

_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=1280,1000"),
)
_AXE = Path(axe_core_python.__file__).parent / "axe.min.js"


@contextlib.contextmanager
def browser(profile, *flags):
    """A WebDriver whose profile is the new folder `profile`."""
    options = Options()
    options.binary_location = "/usr/bin/chromium"
    for flag in (*_FLAGS, f"--user-data-dir={profile}", *flags):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service("/usr/bin/chromedriver"))
    driver.set_page_load_timeout(60)
    driver.set_script_timeout(60)
    try:
        yield driver
    finally:
        driver.quit()


def console(driver):
    """What the page's console got since the last look, blocked content among it."""
    return [entry["message"] for entry in driver.get_log("browser")]


def prefer(driver, scheme):
    """`dark` or `light`, as the user's system would say."""
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def violations(driver):
    """What axe-core finds wrong, as `rule: element`; its script is given by the driver, which no policy of the page's forbids."""
    driver.execute_script(_AXE.read_text())
    found = driver.execute_async_script("axe.run(document).then(arguments[arguments.length - 1])")
    assert found["passes"], json.dumps(found)[:500]
    return [
        f"{one['id']}: {node['html']}: {node['failureSummary']}" for one in found["violations"] for node in one["nodes"]
    ]
