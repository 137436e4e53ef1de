"""Make docs/images/page.png and page_heat.png: the server's page after a stale fact was erased and a question asked, and before,
with the heat that shows who has read what is selected.

Knows: the page's elements, Debian's chromium, playwright. A server on the embedded model is started for it, and stopped.

    python docs/page_screenshot.py [--dark] [--width PIXELS] [FILE]
"""

from __future__ import annotations

import argparse
import shutil
import threading
import time
from pathlib import Path

import uvicorn
from playwright.sync_api import sync_playwright

import kveraser as kv
from kveraser.serving.app import AppOptions, create_app
from kveraser.serving.service import Service

PORT = 8765
PATIENCE = 300_000  # milliseconds


def main() -> None:
    """Serve, look, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", type=Path, default=Path(__file__).parent / "images" / "page.png")
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--width", type=int, default=1000)
    options = parser.parse_args()
    app = create_app(Service(*kv.load_backbone()), AppOptions("smollm2-135m-instruct"))
    server = uvicorn.Server(uvicorn.Config(app, port=PORT, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.1)
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            page = browser.new_page(
                viewport={"width": options.width, "height": 900}, color_scheme="dark" if options.dark else "light"
            )
            page.set_default_timeout(PATIENCE)
            page.goto(f"http://127.0.0.1:{PORT}")
            for _ in range(2):  # what is done for the first time takes longer
                page.click("#forget")
                page.locator("#context-section").wait_for(state="hidden")
                page.select_option("#example", label="stale fact")
                for button, words in (("#read", "Read."), ("#erase", "Erased"), ("#ask", "Answered.")):
                    page.click(button)
                    page.locator("#status", has_text=words).wait_for()
                    if button == "#read":  # the story's span is selected
                        page.locator("#readers", has_text="read most by").wait_for()
                        heat = options.file.with_stem(f"{options.file.stem}_heat")
                        page.locator("#context-section").screenshot(path=heat)
            page.evaluate("scrollTo(0, 0)")
            page.screenshot(path=options.file, full_page=True)
            browser.close()
    finally:
        server.should_exit = True
        thread.join()
    print(f"{options.file}: {options.file.stat().st_size} bytes")


if __name__ == "__main__":
    main()
