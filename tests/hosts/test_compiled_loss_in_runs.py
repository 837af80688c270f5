"""Whole runs over a loss that Inductor really compiled, on the CPU, against the same runs step by step."""

import pytest

from kd_plugin.divergence.compiled import first_use, tiles
from kd_plugin.trl import TeacherPanelConfig, TeacherPanelTrainer
from tests.hosts.runs import assert_same, losses, prompts, settings, weights
from tests.tiny import save_tiny


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    base = tmp_path_factory.mktemp("compiled")
    return {
        name: save_tiny(base / name, variant=variant, seed=seed)
        for seed, (name, variant) in enumerate(
            {"padded": "padded", "untied": "untied", "a": "untied", "b": "padded"}.items()
        )
    }


def run(models, directory, student, **options):
    """Two epochs over ten rows, three a micro-batch, so that the last one has one row."""
    given = {"max_steps": -1, "num_train_epochs": 2, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}
    trainer = TeacherPanelTrainer(
        model=models[student],
        teacher_models={name: models[name] for name in "ab"},
        args=TeacherPanelConfig(**settings(directory, max_completion_length=7, **given, **options)),
        train_dataset=prompts(count=10),
    )
    trainer.train()
    return losses(trainer), weights(trainer)


@pytest.mark.parametrize(
    ("student", "divergence", "combine"),
    [("padded", "reverse_kl", "weighted_kl"), ("untied", "jsd", "mixture"), ("padded", "forward_kl", "confidence")],
)
def test_two_runs_in_one_process_are_those_step_by_step(models, student, divergence, combine, tmp_path, monkeypatch):
    """Float32 sums in another order: losses to 1e-4 of themselves, weights to 1e-4 of their norm."""
    options = {"divergence": divergence, "beta": 0.5, "combine": combine}
    monkeypatch.setenv("KD_PLUGIN_COMPILE", "0")
    plain, trained = run(models, tmp_path / "plain", student, **options)
    monkeypatch.setenv("KD_PLUGIN_COMPILE", "1")
    monkeypatch.setattr(first_use, "_found", first_use._Found({}))
    monkeypatch.setattr(tiles, "_ready", {})
    counts = []
    for turn in ("first", "second"):
        found, own = run(models, tmp_path / turn, student, **options)
        assert found == pytest.approx(plain, rel=1e-4, abs=1e-6)
        assert_same(own, trained)
        counts.append(len(tiles._ready))
    assert first_use._found.agreed and all(first_use._found.agreed.values())
    assert counts[0] == counts[1] > 0  # the second trainer compiles nothing
