"""Every setting of offline KD reaches the loss; a packed run resumes bit for bit in mid-epoch."""

import pytest
import torch

from kd_plugin import trl as ours
from kd_plugin.cache import TeacherCache, TopK
from kd_plugin.capturing import capture
from kd_plugin.divergence import Divergence
from kd_plugin.divergence.sparse import fused_sparse_divergence
from kd_plugin.signals import OutputHead
from kd_plugin.teachers import LocalTeacher
from kd_plugin.trl import OfflineKDConfig, OfflineKDTrainer
from tests.equivalence.test_offline_packing import COMPLETIONS, TEXTS, step
from tests.hosts.runs import settings, weights
from tests.tiny import byte_tokenizer


@pytest.fixture(scope="module")
def cache(tmp_path_factory, teacher_dir):
    directory = tmp_path_factory.mktemp("cache") / "cache"
    return capture(COMPLETIONS, LocalTeacher(teacher_dir, dtype="float32"), directory, targets=TopK(6), progress=False)


def by_hand(cache: TeacherCache, model, **options) -> float:
    """The mean loss of the cache's rows, one at a time and without the trainer."""
    total = 0.0
    for row in cache.dataset():
        index, ids = torch.tensor(row["teacher_index"]), torch.tensor(row["input_ids"])
        at = (index >= 0).nonzero()[:, 0]
        with torch.no_grad():
            hidden = model.base_model(ids[None]).last_hidden_state[0, at]
            found = fused_sparse_divergence(
                hidden, OutputHead.from_model(model), cache.signal(index[at]), labels=ids[at + 1], **options
            )
        total += float(found.loss_sum)
    return total / cache.tokens


@pytest.mark.parametrize(
    ("config", "options"),
    [
        ({"tail": "keep"}, {"tail": "keep"}),
        ({"tail": "renormalise"}, {"tail": "renormalise"}),
        ({"kd_weight": 0.3, "ce_weight": 0.6}, {"kd_weight": 0.3, "ce_weight": 0.6}),
        ({"divergence": "reverse_kl"}, {"divergence": Divergence("reverse_kl")}),
        ({"divergence": "jsd", "jsd_beta": 0.2}, {"divergence": Divergence("jsd", beta=0.2)}),
    ],
    ids=str,
)
def test_settings_reach_the_loss(config, options, cache, tmp_path, student_dir):
    loss, _, trainer = step(tmp_path, cache, student_dir, COMPLETIONS, **config)
    arguments = {"divergence": Divergence("forward_kl"), **options}
    model = trainer.model.eval()
    assert loss == pytest.approx(by_hand(cache, model, **arguments), rel=1e-4)
    assert loss != pytest.approx(by_hand(cache, model, divergence=Divergence("forward_kl")), rel=1e-3)


def test_a_packed_run_resumes_bit_for_bit(tmp_path, student_dir, teacher_dir):
    packed = capture(TEXTS, LocalTeacher(teacher_dir), tmp_path / "cache", targets=TopK(8), progress=False)

    def trainer(directory):
        return OfflineKDTrainer(
            model=student_dir,
            args=OfflineKDConfig(
                **settings(
                    directory, packing=True, max_length=40, per_device_train_batch_size=1, max_steps=5,
                    save_strategy="steps", save_steps=3, gradient_accumulation_steps=2,
                )
            ),
            train_dataset=TEXTS,
            teacher_cache=packed,
            processing_class=byte_tokenizer(),
        )  # fmt: skip

    whole, resumed = trainer(tmp_path / "a"), trainer(tmp_path / "b")
    whole.train()
    trainer(tmp_path / "b").train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-3"))
    assert all(torch.equal(a, weights(whole)[name]) for name, a in weights(resumed).items())


@pytest.mark.parametrize("config", [one for name in ("OfflineKDConfig", "TeacherPanelConfig")
                                    if (one := vars(ours).get(name))])  # fmt: skip
def test_bf16_is_left_out_with_one_line_where_nothing_computes_in_it(config, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("kd_plugin.trl.config.is_torch_bf16_gpu_available", lambda: False)
    assert config(output_dir=str(tmp_path)).bf16 is False
    assert len([line for line in caplog.records if "in float32" in line.getMessage()]) == 1
