"""Headless Chromium for tests of pages: `make test-browser` has what it needs (the extra `browser`, and a Chromium on
the PATH or as CHROMIUM=path)."""

import contextlib
import os
import shutil

import pytest

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
MARKS = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: install one, or give CHROMIUM=path"),
]
PHONE = {"width": 390, "height": 844}
SCREEN = {"width": 1200, "height": 900}


@contextlib.contextmanager
def launched():
    """A browser. Skips without the package playwright."""
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install 'alma[browser]'")
    with playwright.sync_playwright() as started:
        # a container's root has no namespaces for Chromium's sandbox; the pages are this project's own
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()
