"""The trace page in a real browser: filters, tokens, a phone's width, and no request to anywhere."""

import json
import shutil
from pathlib import Path

import pytest

from kd_plugin.cli.main import main
from kd_plugin.errors import DataError
from kd_plugin.monitor.traces import append_rollouts, page, read_rollouts

HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"


def rollout(step=1, domain="math", teachers=("algebra",), prompt="2 + 2 = ?", tokens=("4", ".", "<end>"), pull=-1.0):
    scored = list(range(len(tokens)))
    said = {
        "weight": [1.0 / len(teachers)] * len(tokens),
        "divergence": [0.01, 1.5, 3.0][: len(tokens)],
        "logprob": [-0.5 + pull] * len(tokens),
        "top": [[["4", 0.9], ["5", 0.05]]] * len(tokens),
    }
    return {
        "step": step,
        "row": 0,
        "prompt": prompt,
        "domain": domain,
        "truncated": False,
        "tokens": list(tokens),
        "scored": scored,
        "student": [-0.5] * len(tokens),
        "correction": said["divergence"],
        "teachers": dict.fromkeys(teachers, said),
    }


ROWS = [
    rollout(),
    rollout(step=2, domain="code", teachers=("python",), prompt="print?", pull=+1.0),
    rollout(step=2, domain=None, teachers=("algebra", "python"), prompt=HOSTILE, tokens=(HOSTILE, "\n", "x")),
]


@pytest.fixture
def run(tmp_path):
    """A run's output_dir with rollouts."""
    for row in ROWS:
        append_rollouts(tmp_path / "out" / "rollouts" / f"step-{row['step']:08d}-rank-0.jsonl", [row])
    return tmp_path / "out"


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium on this machine")
    flags = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    flags += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    with playwright.sync_playwright() as session:
        opened = session.chromium.launch(executable_path=chromium, headless=True, args=flags)
        yield opened
        opened.close()


@pytest.fixture
def opened(run, tmp_path, browser):
    """The page on a phone, with every request but its own file refused and noted."""
    path = tmp_path / "trace.html"
    assert main(["trace", str(run), "-o", str(path)]) == 0
    context = browser.new_context(viewport={"width": 390, "height": 844}, offline=True)
    tab = context.new_page()
    tab.asked, tab.errors = [], []
    tab.on("request", lambda request: tab.asked.append(request.url))
    tab.on("pageerror", lambda error: tab.errors.append(str(error)))
    tab.goto(path.as_uri())
    yield tab
    assert tab.asked == [path.as_uri()] and tab.errors == []
    context.close()


def test_filters_by_domain_teacher_and_step(opened):
    def seen():
        return opened.locator("article").count()

    assert seen() == 3
    opened.select_option("#domain", "math")
    assert seen() == 1 and "2 + 2" in opened.inner_text("article .prompt")
    opened.select_option("#domain", label="all (3)")
    opened.select_option("#teacher", "python")
    assert seen() == 2
    opened.select_option("#step", "1")
    assert seen() == 0 and "No rollout fits" in opened.inner_text("main")
    opened.select_option("#step", "2")
    opened.select_option("#domain", label="none named")
    assert seen() == 1 and "1 of 3" in opened.inner_text("#count")


def test_a_token_is_coloured_by_its_correction_and_says_what_teachers_would_have_written(opened):
    tokens = opened.locator("article").nth(0).locator("button.token")
    shades = [tokens.nth(i).evaluate("e => e.style.background") for i in range(3)]
    assert shades[0] == "" and "--down" in shades[1] and "0.750" in shades[2]
    wanted_more = opened.locator("article").nth(1).locator("button.token").nth(2)
    assert "--up" in wanted_more.evaluate("e => e.style.background")
    tokens.nth(1).click()
    said = opened.inner_text("article .said")
    assert "algebra" in said and "1.500 nats" in said and "90%" in said and "student" in said
    tokens.nth(1).click()
    assert opened.locator(".said").count() == 0


def test_it_fits_a_phone(opened):
    assert opened.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    height = opened.locator("#domain").bounding_box()["height"]
    assert height >= 32  # a finger can hit it


def test_it_finds_and_orders(opened):
    assert opened.inner_text(".hint").startswith("Tap a token")
    opened.fill("#find", "PRINT")
    assert opened.locator("article").count() == 1 and "print?" in opened.inner_text("article .prompt")
    opened.fill("#find", "")
    opened.select_option("#order", "disagreement")
    about = opened.locator("article .about").nth(0).inner_text()
    assert "teachers apart by 0.000 nats" in about or "corrected by" in about
    opened.select_option("#order", "divergence")
    sizes = [float(text.split("corrected by ")[1].split()[0]) for text in opened.locator(".about").all_inner_texts()]
    assert len(sizes) == 3 and sizes == sorted(sizes, reverse=True) and sizes[0] == 1.503


def test_what_all_prompts_begin_with_is_shown_once(tmp_path, browser):
    system = "You are a careful assistant.\nAnswer briefly.\n"
    (tmp_path / "t.html").write_text(page([rollout(prompt=system + "Q: a"), rollout(prompt=system + "Q: b")], "t"))
    tab = browser.new_page()
    tab.goto((tmp_path / "t.html").as_uri())
    assert tab.inner_text("#shared summary").startswith("All prompts begin alike")
    assert tab.locator(".prompt").all_text_contents() == [system, "\u2026 Q: a", "\u2026 Q: b"]
    tab.close()


def test_text_from_strangers_stays_text(opened):
    assert opened.title().startswith("out")
    assert opened.locator("img").count() == 0 and opened.locator("script").count() == 2
    assert HOSTILE in opened.locator("article").nth(2).inner_text()


def test_the_page_is_one_file_that_names_no_other():
    text = page(ROWS, HOSTILE)
    assert "://" not in text and HOSTILE not in text and "</script><script>" not in text
    data = text.split('id="data">')[1].split("</script>")[0]
    assert json.loads(data) == {"title": HOSTILE, "rollouts": ROWS}


def test_the_latest_rollouts_are_kept_and_the_rest_counted(run, tmp_path, capsys):
    assert main(["trace", str(run / "rollouts"), "-o", str(tmp_path / "page.html"), "--limit", "2"]) == 0
    assert "2 rollouts; 1 earlier ones left out" in capsys.readouterr().out
    assert "2 + 2" not in (tmp_path / "page.html").read_text()


def test_what_is_no_rollout_is_named(tmp_path, capsys):
    assert main(["trace", str(tmp_path), "-o", str(tmp_path / "page.html")]) == 2
    assert "save_rollouts" in capsys.readouterr().err
    broken = tmp_path / "x.jsonl"
    broken.write_text(json.dumps(ROWS[0]) + "\n{}\n")
    with pytest.raises(DataError, match=r"x\.jsonl, line 2"):
        read_rollouts(broken)
    broken.write_text("[" * 100_000)
    with pytest.raises(DataError, match="line 1"):
        read_rollouts(broken)
    broken.write_text(json.dumps(ROWS[0]) + "\n")
    assert main(["trace", str(broken), "-o", str(tmp_path / "no" / "page.html")]) == 2
    assert "--output" in capsys.readouterr().err
    assert not Path(tmp_path / "no").exists()
