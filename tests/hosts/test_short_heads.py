"""A head with fewer rows than the tokenizer has tokens, as Gemma-3-1B's: student, teacher, capture, cache, server."""

import pytest
import torch
from datasets import Dataset
from torch.utils.data import DataLoader

from kd_plugin.cache import Sampled, TeacherCache, TopK
from kd_plugin.capturing import capture
from kd_plugin.divergence import Divergence
from kd_plugin.divergence.reference import divergence_from_logits
from kd_plugin.errors import DataError, VocabularyError
from kd_plugin.lightning import KDDataModule, OfflineKDModule, TeacherPanelModule
from kd_plugin.panel import TeacherPanel
from kd_plugin.panel.checks import require_one_vocabulary
from kd_plugin.signals import SparseSignal
from kd_plugin.teachers import LocalTeacher, ServerTeacher
from kd_plugin.trl import OfflineKDConfig, OfflineKDTrainer, TeacherPanelConfig, TeacherPanelTrainer
from kd_plugin.vocab import Vocabulary
from tests.fake_vllm import fake_vllm
from tests.hosts.runs import losses, prompts, settings
from tests.lightning.help import trainer
from tests.tiny import save_tiny

ROWS = [{"prompt": f"q{i}", "completion": f" answer {'y' * (i % 5)}."} for i in range(8)]
LAST = 258  # the tokenizer's last token, which a head of 258 rows has no row for


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Students and teachers with all rows, one too few, and padded ones."""
    base = tmp_path_factory.mktemp("short")
    variants = {"whole": "untied", "short": "wide_tokenizer", "padded": "padded"}
    return {
        (role, kind): save_tiny(base / f"{role}-{kind}", variant=variant, seed=seed)
        for seed, role in enumerate(("student", "teacher"))
        for kind, variant in variants.items()
    }


@pytest.fixture(scope="module")
def last(tokenizer):
    """A letter whose second byte is the last token."""
    assert LAST in tokenizer("í")["input_ids"]
    return "í"


PAIRS = [("short", "whole"), ("whole", "short"), ("short", "short"), ("short", "padded"), ("padded", "short")]


def panel_trainer(directory, student, teacher, rows=None, **options):
    return TeacherPanelTrainer(
        model=student,
        teacher_models={"t": teacher},
        args=TeacherPanelConfig(**settings(directory, **{"max_steps": 1, "max_completion_length": 8, **options})),
        train_dataset=prompts() if rows is None else Dataset.from_list(rows),
    )


class TestPanel:
    @pytest.mark.parametrize(("student", "teacher"), PAIRS)
    def test_the_loss_is_that_of_the_tokens_with_a_row_on_both_sides(self, student, teacher, models, tmp_path):
        made = panel_trainer(tmp_path, models["student", student], models["teacher", teacher], divergence="forward_kl")
        assert made._vocabulary.size == LAST and made._vocabulary.is_cut
        made.model.train()
        batch = made._generate_and_score_completions([dict(row) for row in made.train_dataset.select(range(4))])
        assert batch["completion_ids"].max() < LAST
        ids, mask = (torch.cat([batch[f"prompt_{k}"], batch[f"completion_{k}"]], dim=1) for k in ("ids", "mask"))
        start, scored = batch["prompt_ids"].shape[1], batch["completion_mask"].bool()
        with torch.no_grad():
            q, p = (
                model(input_ids=ids, attention_mask=mask).logits[:, start - 1 : -1, :LAST][scored]
                for model in (made.model, made.panel.teachers["t"].model)
            )
            found, _, count = made._compute_loss(made.model, {"batch": batch["scored"].micro_batches([4])[0]}, None)
        expected = divergence_from_logits(q, p, Divergence("forward_kl"), 1.0).mean()
        assert count == scored.sum()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize(
        "options", [{"estimator": "sampled"}, {"estimator": "topk_tail"}, {"rollouts": "interleaved"}]
    )
    @pytest.mark.parametrize(("student", "teacher"), [("short", "whole"), ("padded", "short"), ("padded", "padded")])
    def test_every_way_of_estimating(self, options, student, teacher, models, tmp_path):
        made = panel_trainer(
            tmp_path, models["student", student], models["teacher", teacher], divergence="reverse_kl", **options
        )
        made.train()
        assert len(losses(made)) == 1

    def test_a_prompt_with_such_a_token_is_named_before_anything_is_generated(self, models, tmp_path, last):
        made = panel_trainer(
            tmp_path, models["student", "short"], models["teacher", "whole"], [{"prompt": "a" + last}] * 4
        )
        with pytest.raises(
            DataError, match=r"The prompt of row 0 holds token 258 .*258 rows, fewer than its tokenizer"
        ):
            made.train()

    def test_a_server_of_such_a_model(self, models, tokenizer, tmp_path):
        local = LocalTeacher(models["teacher", "short"], dtype="float32")
        with fake_vllm(local.model, tokenizer) as (url, _):
            for top_k in (5, "all"):
                server = ServerTeacher(
                    url, tokenizer=tokenizer, top_k=top_k, repo=models["teacher", "short"], license="apache-2.0"
                )
                made = panel_trainer(
                    tmp_path / str(top_k), models["student", "whole"], server, estimator="topk_tail",
                    divergence="reverse_kl",
                )  # fmt: skip
                made.train()
                assert len(losses(made)) == 1

    def test_lightning(self, models, tmp_path, last):
        for student, teacher in (("short", "whole"), ("padded", "short")):
            module = TeacherPanelModule(
                models["student", student], teacher_models={"t": models["teacher", teacher]}, max_completion_length=8
            )
            host = trainer(tmp_path / student, max_steps=1)
            host.fit(module, DataLoader([{"prompt": "a"}, {"prompt": "bc"}], batch_size=2, collate_fn=_columns))
            assert host.global_step == 1
        module = TeacherPanelModule(
            models["student", "short"], teacher_models={"t": models["teacher", "whole"]}, max_completion_length=8
        )
        with pytest.raises(DataError, match=r"The prompt of row 0 holds token 258"):
            trainer(tmp_path / "bad", max_steps=1).fit(
                module, DataLoader([{"prompt": last}], batch_size=1, collate_fn=_columns)
            )

    def test_who_cuts(self, models, tokenizer, caplog):
        whole = Vocabulary.from_tokenizer(tokenizer)
        panel = TeacherPanel(
            {"a": LocalTeacher(models["teacher", "whole"]), "b": LocalTeacher(models["teacher", "short"])}
        )
        assert require_one_vocabulary(panel, whole).size == LAST
        assert "has 258 rows, fewer than the tokenizer has tokens" in caplog.text


@pytest.fixture(scope="module")
def caches(models, tmp_path_factory):
    base = tmp_path_factory.mktemp("caches")
    return {
        (kind, name): str(
            capture(
                Dataset.from_list(ROWS), LocalTeacher(models["teacher", kind], dtype="float32"), base / f"{kind}{name}",
                targets=targets, progress=False,
            ).path
        )
        for kind in ("whole", "short")
        for name, targets in (("top_k", TopK(259)), ("sampled", Sampled(20)))
    }  # fmt: skip


class TestOffline:
    @pytest.mark.parametrize("targets", ["top_k", "sampled"])
    @pytest.mark.parametrize(("student", "teacher"), [("short", "whole"), ("whole", "short"), ("padded", "short")])
    def test_both_hosts(self, student, teacher, targets, models, caches, tmp_path):
        path = caches[teacher, targets]
        args = OfflineKDConfig(**settings(tmp_path, max_steps=1, ce_weight=0.1))
        made = OfflineKDTrainer(models["student", student], args, teacher_cache=path)
        made.train()
        assert len(losses(made)) == 1
        host = trainer(tmp_path, max_steps=1)
        module = OfflineKDModule(models["student", student], cache=path)
        host.fit(module, datamodule=KDDataModule(cache=path, batch_size=4))
        assert host.global_step == 1

    def test_a_capture_takes_the_rows_of_its_head(self, caches):
        cache = TeacherCache(caches["short", "top_k"])
        assert cache.manifest.vocab_size == LAST

    def test_a_capture_refuses_the_row_with_such_a_token_and_no_other(self, models, tmp_path, last):
        teacher = LocalTeacher(models["teacher", "short"], dtype="float32")
        with pytest.raises(VocabularyError, match=r"row 0 has token ids from 2 to 258; .*a head with fewer rows"):
            rows = [{"prompt": "a", "completion": "b" + last}, *ROWS]
            capture(Dataset.from_list(rows), teacher, tmp_path / "c", targets=TopK(4), progress=False)

    def test_a_row_with_such_a_token_is_named_at_construction(self, models, tmp_path, last):
        teacher = LocalTeacher(models["teacher", "whole"], dtype="float32")
        rows = Dataset.from_list([*ROWS, {"prompt": "a", "completion": "b" + last}])
        path = str(capture(rows, teacher, tmp_path / "c", targets=TopK(4), progress=False).path)
        args = OfflineKDConfig(**settings(tmp_path / "run", max_steps=1))
        with pytest.raises(DataError, match="In the train dataset, row 8 holds token 258"):
            OfflineKDTrainer(models["student", "short"], args, teacher_cache=path)


def test_what_is_cut_off_a_list_is_scaled_into_the_rest():
    logp = torch.tensor([[0.5, 0.2, 0.2, 0.1]]).log()
    signal = SparseSignal(torch.tensor([[7, 258, 3]]), logp[:, :3], logp[:, 3], None, logp[:, 0])
    cut = signal.within(LAST)
    torch.testing.assert_close(cut.logprobs.exp(), torch.tensor([[0.625, 0.0, 0.25]]))
    torch.testing.assert_close(cut.tail_logmass.exp(), torch.tensor([0.125]))
    torch.testing.assert_close(cut.sampled_token_logprobs.exp(), torch.tensor([0.625]))
    drawn = SparseSignal(torch.tensor([[7, 258]]), logp[:, :2], logp[:, 3], torch.tensor([[3, 1]])).within(LAST)
    assert drawn.draws.tolist() == [[3, 0]] and drawn.logprobs[0, 1] == -torch.inf


def _columns(rows):
    return {"prompt": [row["prompt"] for row in rows]}
