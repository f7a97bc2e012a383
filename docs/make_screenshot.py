"""Make docs/demo.png: the web demo answering two questions about a sample photo.

`python docs/make_screenshot.py` needs Chromium and playwright; an argument names another model than the default.
"""

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

from mm_gpt.inference.assistant import load
from mm_gpt.serving.gradio_demo import SAMPLES, build, serve

PORT = 7861
PHOTO = "cat.jpg"
QUESTIONS = ["What animal is in the picture?", "What colour is the cat?"]


def main(model: str) -> None:
    demo = build(load(model))
    serve(demo, port=PORT, block=False)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--headless", "--disable-gpu"]
        )
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.goto(f"http://127.0.0.1:{PORT}")
        page.wait_for_selector("#box textarea")
        page.set_input_files("#box input[type=file]", str(SAMPLES / PHOTO))
        page.wait_for_selector("#box .thumbnail-item")
        for number, question in enumerate(QUESTIONS):
            page.fill("#box textarea", question)
            page.click("#box .submit-button")
            page.locator("#chat [data-testid=bot] .message-content").nth(number).wait_for()
            page.wait_for_selector("#box .submit-button", timeout=120_000)  # it comes back when the answer is complete
        page.mouse.move(5, 5)
        page.wait_for_timeout(1000)  # scrolling and fading end
        page.screenshot(path=Path(__file__).with_name("demo.png"))
        browser.close()
    demo.close()


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "default")
