"""Screenshots of pages that commands write, at 1200 and 380 pixels, light and dark: ``screenshots.py OUT PAGE ...``.

OUT/NAME.png shows the wide light page beside the narrow dark one, for the docs; the other files are to be looked at. An
error on the console, or a request to anywhere, fails. Needs playwright and pillow, and a Chromium: the machine's, or
playwright's own.
"""

import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

WIDE, NARROW, HEIGHT, BETWEEN = 1200, 380, 800, 16


def shoot(browser, page, place, width, scheme):
    """Write a screenshot, and return what the page should not have done."""
    tab = browser.new_page(viewport={"width": width, "height": HEIGHT}, color_scheme=scheme)
    wrong = []
    tab.on("console", lambda said: wrong.append(said.text) if said.type in ("error", "warning") else None)
    tab.on("pageerror", lambda error: wrong.append(str(error)))
    tab.on("request", lambda asked: None if asked.url.startswith(("file:", "data:")) else wrong.append(asked.url))
    tab.goto(page.resolve().as_uri())
    tab.wait_for_timeout(200)
    if tab.evaluate("document.documentElement.scrollWidth") > width:
        wrong.append(f"wider than {width} pixels")
    tab.screenshot(path=str(place))
    tab.close()
    return wrong


def main(out, pages):
    """Shoot every page; return the number of those on which something was wrong."""
    out.mkdir(parents=True, exist_ok=True)
    bad = 0
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for page in pages:
            found = {}
            for width in (WIDE, NARROW):
                for scheme in ("light", "dark"):
                    place = out / f"{page.stem}-{width}-{scheme}.png"
                    found[width, scheme] = place
                    wrong = shoot(browser, page, place, width, scheme)
                    bad += bool(wrong)
                    print(place, *wrong)
            both = Image.new("RGB", (WIDE + BETWEEN + NARROW, HEIGHT), "#808080")
            both.paste(Image.open(found[WIDE, "light"]), (0, 0))
            both.paste(Image.open(found[NARROW, "dark"]), (WIDE + BETWEEN, 0))
            both.quantize(256).save(out / f"{page.stem}.png", optimize=True)
        browser.close()
    return bad


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), [Path(page) for page in sys.argv[2:]]))
