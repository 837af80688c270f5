"""The code of the quickstart runs as typed, with tiny models in the place of the names."""

import re
from pathlib import Path

import pytest

from kd_plugin.cli.main import main
from kd_plugin.cli.training import parse
from kd_plugin.panel.block import panel_from
from kd_plugin.panel.checks import require_defined_panel
from kd_plugin.panel.sampling import require_sampling
from kd_plugin.trl import OfflineKDConfig, TeacherPanelConfig
from tests.tiny import save_tiny

CHECKOUT = Path(__file__).parents[2]
QUICKSTART = CHECKOUT / "docs" / "quickstart.md"
PAGES = sorted([*CHECKOUT.glob("*.md"), *CHECKOUT.glob("docs/**/*.md"), *CHECKOUT.glob("integrations/**/*.md")])


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", QUICKSTART.read_text(encoding="utf-8"), re.DOTALL)


def test_the_quickstart_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("TEACHER", "MATH_TEACHER", "STUDENT")):
        # Untied: a random tied teacher predicts its own input, which is what a cache shifted by one looks like
        save_tiny(tmp_path / name, seed=seed, tied=False, scale=1.0)
    scope = {}
    code = blocks("python")
    assert len(code) == 3
    for block in code:
        block = block.replace("output_dir=", "use_cpu=True, report_to='none', output_dir=")
        exec(compile(block, str(QUICKSTART), "exec"), scope)
    commands = [line.split() for block in blocks("bash") for line in block.splitlines() if "lineage" in line]
    assert len(commands) == 2
    for _, *arguments in commands:
        assert main(arguments) == 0


def test_the_quickstarts_declarations_are_accepted(tmp_path):
    from kd_plugin.lineage import RunLineage, Source

    (declarations,) = blocks("yaml")
    (tmp_path / "lineage.yaml").write_text(declarations)
    student = Source("student", ref=save_tiny(tmp_path / "student"))
    math = Source("math", ref=save_tiny(tmp_path / "math", license=None))
    run = RunLineage(method="x", student=student, teachers=[math], config=tmp_path / "lineage.yaml")
    run.require_trainable()


def test_the_settings_of_each_paper_are_taken(tmp_path, teacher_dir, other_teacher_dir):
    page = (CHECKOUT / "docs" / "papers.md").read_text(encoding="utf-8")
    found = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    assert len(found) == 7
    for text in found:
        (tmp_path / "run.yaml").write_text(text.replace("TEACHER", teacher_dir).replace("OTHER", other_teacher_dir))
        command = (
            ("offline", OfflineKDConfig) if re.search("teacher_(cache|text):", text) else ("panel", TeacherPanelConfig)
        )
        _, config, _ = parse(*command, f"--config {tmp_path / 'run.yaml'} --use_cpu --model_name_or_path x".split())
        if command[0] == "panel":
            panel = panel_from(None, None, config)
            require_defined_panel(panel, panel.divergence or config.resolved_divergence(), config.temperature)
            require_sampling(panel, config)


def anchors(page):
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_link_within_the_project_leads_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in link or link.startswith("mailto:"):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


def test_every_page_is_in_the_index():
    index = (CHECKOUT / "docs" / "index.md").read_text(encoding="utf-8")
    docs = CHECKOUT / "docs"
    pages = {str(page.relative_to(docs)) for page in docs.glob("**/*.md")} - {"index.md"}
    assert [page for page in sorted(pages) if f"({page})" not in index] == []
