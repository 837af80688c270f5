"""Two ranks of data parallelism are one process with their rows together."""

import pytest
import torch

from kd_plugin.cache import Sampled, TopK
from kd_plugin.capturing import capture
from kd_plugin.teachers import LocalTeacher
from kd_plugin.text import capture_text
from tests.core.text_help import right, writer
from tests.core.text_worker import questions
from tests.equivalence.test_offline_packing import COMPLETIONS, TEXTS
from tests.hosts.runs import assert_same, launched
from tests.scripted_writer import Script, scripted_writer

VARIANTS = {
    "padded rows": ("tied", COMPLETIONS, TopK(16), ()),
    "partial": ("padded", COMPLETIONS, TopK(16), ("partial",)),
    "packed": ("softcapped", TEXTS, Sampled(20), ("packed",)),
    "streamed": ("biased", TEXTS, TopK(8), ("streamed",)),
}
NAMES = [*VARIANTS, "text"]  # and by cross-entropy on what a teacher wrote


@pytest.fixture(scope="module")
def results(tmp_path_factory, variant_dir, teacher_dir):
    """What the run of each variant left, by the number of ranks."""
    directory, teacher = tmp_path_factory.mktemp("ranks"), LocalTeacher(teacher_dir, dtype="float32")
    caches = {}
    for name, (_, rows, targets, _) in VARIANTS.items():
        caches[name] = capture(rows, teacher, directory / f"cache {name}", targets=targets, progress=False)
        caches[name].dataset()  # built once, before two processes ask for it
    with scripted_writer(Script(write=right)) as (url, _):
        written = capture_text(questions(12), writer(url), directory / "text", progress=False)
    found = {}
    for ranks in (1, 2):
        jobs = []
        for name, (variant, _, _, options) in VARIANTS.items():
            out = directory / f"{name} on {ranks}"
            out.mkdir()
            jobs.append((out, caches[name].path, variant_dir(variant), 2 // ranks, *options))
        (directory / f"text on {ranks}").mkdir()
        jobs.append((directory / f"text on {ranks}", written.path, variant_dir("untied"), 2 // ranks, "text"))
        launched("tests.hosts.offline_worker", ranks, *jobs)
        found |= {(name, ranks): torch.load(directory / f"{name} on {ranks}" / "result.pt") for name in NAMES}
    return found


@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_train_as_one_process(name, results):
    one, two = results[name, 1], results[name, 2]
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-4) and len(one["losses"]) == 4
    assert_same(two["weights"], one["weights"], 1e-4)
