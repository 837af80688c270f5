"""Screenshots of pages that commands write, at 1200 and 380 pixels, light and dark: ``screenshots.py OUT PAGE ...``.

OUT/NAME.png shows the wide light page beside the narrow dark one, for the docs; the other files are to be looked at. An
error on the console, or a request to anywhere, fails. A directory, such as the site of `make docs`, is served here, and
all of its pages are taken. Needs playwright and pillow, and a Chromium: the machine's, or playwright's own.
"""

import shutil
import sys
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

from PIL import Image
from playwright.sync_api import sync_playwright

WIDE, NARROW, HEIGHT, BETWEEN = 1200, 380, 800, 16


class Quiet(SimpleHTTPRequestHandler):
    """Serves files and prints nothing."""

    def log_message(self, *said):
        """Print no request."""


@contextmanager
def served(directory):
    """Serve a directory on this machine, and give its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(directory)))
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def shoot(browser, url, place, width, scheme, own=("file:", "data:")):
    """Write a screenshot, and return what the page should not have done."""
    tab = browser.new_page(viewport={"width": width, "height": HEIGHT}, color_scheme=scheme)
    wrong = []
    tab.on("console", lambda said: wrong.append(said.text) if said.type in ("error", "warning") else None)
    tab.on("pageerror", lambda error: wrong.append(str(error)))
    tab.on("request", lambda asked: None if asked.url.startswith(own) else wrong.append(asked.url))
    tab.goto(url, timeout=120_000)
    tab.wait_for_timeout(200)
    if tab.evaluate("document.documentElement.scrollWidth") > width:
        wrong.append(f"wider than {width} pixels")
    tab.screenshot(path=str(place))
    tab.close()
    return wrong


def shots(browser, url, out, name, own=("file:", "data:")):
    """Shoot a page four times; return how often something was wrong."""
    found, bad = {}, 0
    for width in (WIDE, NARROW):
        for scheme in ("light", "dark"):
            place = out / f"{name}-{width}-{scheme}.png"
            found[width, scheme] = place
            wrong = shoot(browser, url, place, width, scheme, own)
            bad += bool(wrong)
            print(place, *wrong, flush=True)
    both = Image.new("RGB", (WIDE + BETWEEN + NARROW, HEIGHT), "#808080")
    both.paste(Image.open(found[WIDE, "light"]), (0, 0))
    both.paste(Image.open(found[NARROW, "dark"]), (WIDE + BETWEEN, 0))
    both.quantize(256).save(out / f"{name}.png", optimize=True)
    return bad


def main(out, pages):
    """Shoot every page; return the number of times that something was wrong."""
    out.mkdir(parents=True, exist_ok=True)
    bad = 0
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for page in pages:
            if not page.is_dir():
                bad += shots(browser, page.resolve().as_uri(), out, page.stem)
                continue
            with served(page) as address:
                for one in sorted(page.rglob("*.html")):
                    path = one.relative_to(page)
                    bad += shots(
                        browser, f"{address}/{path}", out, "-".join(path.with_suffix("").parts), (address, "data:")
                    )
        browser.close()
    return bad


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), [Path(page) for page in sys.argv[2:]]))
