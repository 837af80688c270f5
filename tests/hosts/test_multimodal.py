"""Checkpoints of models that see images, on text: as teacher, in a capture, as student of every trainer."""

import pytest
import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import AutoConfig
from trl import DistillationConfig, DistillationTrainer

from kd_plugin.cache import TopK
from kd_plugin.capturing import capture
from kd_plugin.lightning import KDDataModule, OfflineKDModule, TeacherPanelModule
from kd_plugin.models import language_model_class
from kd_plugin.teachers import LocalTeacher
from kd_plugin.trl import OfflineKDConfig, OfflineKDTrainer, TeacherPanelConfig, TeacherPanelTrainer
from tests.hosts.runs import assert_same, losses, prompts, settings, weights
from tests.lightning.help import trainer
from tests.multimodal import FAMILIES, save_multimodal, tiny_multimodal
from tests.tiny import byte_tokenizer, tiny_llama

TOKENIZER = byte_tokenizer()  # text alone: TRL would look for a processor
ROWS = [{"prompt": f"q{i}", "completion": f" answer {'y' * (i % 5)}."} for i in range(8)]


@pytest.fixture(scope="session", params=sorted(FAMILIES))
def sees(request, tmp_path_factory):
    return save_multimodal(tmp_path_factory.mktemp("sees") / request.param, request.param, seed=4)


@pytest.fixture(scope="session")
def cache(sees, tmp_path_factory):
    teacher = LocalTeacher(sees, dtype="float32")
    directory = tmp_path_factory.mktemp("cache") / "c"
    return str(capture(Dataset.from_list(ROWS), teacher, directory, targets=TopK(16), progress=False).path)


def test_the_teachers_signal_is_the_models_distribution(sees):
    teacher = LocalTeacher(sees, dtype="float32")
    ids = torch.randint(3, 250, (2, 7), generator=torch.Generator().manual_seed(0))
    signal = teacher.score(ids, torch.ones_like(ids), torch.arange(14))
    with torch.no_grad():
        expected = teacher.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    torch.testing.assert_close(signal.head.logits(signal.hidden), expected.flatten(0, 1))


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_the_panel_trains_as_trls_trainer(role, sees, tmp_path, student_dir, teacher_dir):
    student, teacher = (student_dir, sees) if role == "teacher" else (sees, teacher_dir)
    found = []
    for cls, config in ((TeacherPanelTrainer, TeacherPanelConfig), (DistillationTrainer, DistillationConfig)):
        args = config(**settings(tmp_path / cls.__name__, max_steps=2, max_completion_length=6, top_k=1))
        made = cls(model=student, teacher_model=teacher, args=args, train_dataset=prompts(), processing_class=TOKENIZER)
        made.train()
        found.append((losses(made), weights(made)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-4)
    assert_same(found[0][1], found[1][1])


def test_offline(sees, cache, tmp_path, student_dir):
    for number, student in enumerate((student_dir, sees)):
        made = OfflineKDTrainer(
            student,
            OfflineKDConfig(**settings(tmp_path / str(number), max_steps=2)),
            teacher_cache=cache,
            processing_class=TOKENIZER,
        )
        made.train()
        assert len(losses(made)) == 2


def test_lightning(sees, cache, tmp_path, teacher_dir):
    offline = OfflineKDModule(sees, cache=cache, learning_rate=1e-3)
    host = trainer(tmp_path / "a", max_steps=1)
    host.fit(offline, datamodule=KDDataModule(cache=cache, batch_size=4))
    assert host.global_step == 1
    panel = TeacherPanelModule(sees, teacher_models={"t": teacher_dir}, max_completion_length=5)
    host = trainer(tmp_path / "b", max_steps=1)
    host.fit(panel, DataLoader([{"prompt": "a"}, {"prompt": "bc"}], batch_size=2, collate_fn=_columns))
    assert host.global_step == 1


def _columns(rows):
    return {"prompt": [row["prompt"] for row in rows]}


def test_which_class_loads_a_checkpoint(tmp_path, student_dir):
    assert language_model_class(AutoConfig.from_pretrained(student_dir)).__name__ == "LlamaForCausalLM"
    config = tiny_llama().config
    config.architectures = ["LlamaForSequenceClassification"]  # gives no next tokens: the automatic class decides
    assert language_model_class(config).__name__ == "AutoModelForCausalLM"
    sees = tiny_multimodal("mistral3").config
    sees.architectures = None
    assert language_model_class(sees).__name__ == "AutoModelForImageTextToText"
    remote = tiny_llama().config
    remote.architectures, remote.auto_map = ["Own"], {"AutoModelForImageTextToText": "own.Own"}
    assert language_model_class(remote, trust_remote_code=True).__name__ == "AutoModelForImageTextToText"
    assert language_model_class(remote).__name__ == "AutoModelForCausalLM"
