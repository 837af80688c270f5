"""Pages that commands write, and pages of the site, in a real browser: no error, no request, nothing beyond the window.

`docs/images/screenshots.py` does the looking, at 1200 and at 380 pixels, light and dark; here on a page of each kind.
"""

import importlib.util
import shutil
from pathlib import Path

import pytest

from kd_plugin.evaluation import evaluate
from kd_plugin.evaluation.page import write_page
from kd_plugin.lineage.picture import graph_html
from kd_plugin.monitor.report import page as charts_page
from kd_plugin.monitor.report import read_logs, report, section, table_section
from kd_plugin.monitor.traces import page as trace_page
from tests.core.test_evaluation import knows, tasks, writer
from tests.core.test_lineage_picture import chain
from tests.core.test_report import HISTORY, run
from tests.core.test_trace_page import ROWS
from tests.scripted_writer import Script, scripted_writer

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def screenshots():
    pytest.importorskip("playwright.sync_api")
    pytest.importorskip("PIL")
    if shutil.which("chromium") is None:
        pytest.skip("no Chromium on this machine")
    spec = importlib.util.spec_from_file_location("screenshots", ROOT / "docs" / "images" / "screenshots.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def of_a_run(place):
    return report(read_logs(run(place, HISTORY)), "out")


def of_a_pilot(place):
    accuracy = {"offline": [(1e12, 0.1), (2e12, 0.4)], "panel": [(1e12, 0.2), (2e12, 0.6)]}
    bars = {name: [(y - 0.1, y + 0.1) for _, y in points] for name, points in accuracy.items()}
    drawn = section("Accuracy against cost", "flops", accuracy, over="flops", bars=bars, levels={"panel": 0.5})
    rows = [["method", "accuracy, 95%", "learning rate"], ["a long name of a method" * 4, "0.6 [0.5, 0.7]", "1e-05"]]
    return charts_page("pilot", "Which method.", [drawn, table_section("Methods", rows)])


def of_an_evaluation(place):
    rows = place / "sums.jsonl"
    rows.write_text("".join(f'{{"prompt": "{i} + {i} = ?", "answer": "{2 * i}"}}\n' for i in range(4)))
    with scripted_writer(Script(write=knows(2))) as (url, _):
        return write_page(evaluate(writer(url), tasks(str(rows)), place / "eval", progress=False)).read_text()


KINDS = {
    "trace": lambda place: trace_page(ROWS, "out"),
    "lineage": lambda place: graph_html(chain(9), "student"),
    "report": of_a_run,
    "pilot": of_a_pilot,
    "evaluate": of_an_evaluation,
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_that_a_command_writes(kind, screenshots, tmp_path):
    place = tmp_path / f"{kind}.html"
    place.write_text(KINDS[kind](tmp_path), encoding="utf-8")
    assert screenshots.main(tmp_path / "shots", [place]) == 0
    assert len(list((tmp_path / "shots").glob("*.png"))) == 5


FAULTS = (
    "<script>throw Error('x')</script>",
    "<img src='https://example.com/x.png'>",
    "<div style='width:9999px'>wide</div>",
)


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_is_seen(fault, screenshots, tmp_path):
    place = tmp_path / "page.html"
    place.write_text(f"<!doctype html><html lang=en><meta charset=utf-8><p>{fault}</p></html>", encoding="utf-8")
    assert screenshots.main(tmp_path / "shots", [place]) == 4  # at both widths, light and dark


def test_pages_of_the_site(screenshots, tmp_path):
    built = ROOT / "site"
    if not (built / "index.html").is_file():
        pytest.skip("`make docs` builds the site")
    few = tmp_path / "site"
    shutil.copytree(built, few, ignore=lambda place, names: [n for n in names if n.endswith(".html")])
    for name in ("index.html", "results.html", "reference.html"):
        shutil.copy(built / name, few / name)
    assert screenshots.main(tmp_path / "shots", [few]) == 0
