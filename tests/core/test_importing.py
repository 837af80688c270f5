import json
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import yaml

from kd_plugin import LocalTeacher, TeacherCache
from kd_plugin.cli.main import main
from kd_plugin.errors import ConfigError, DataError, LicenseRefusedError
from kd_plugin.importing import import_outputs
from kd_plugin.importing.axolotl import AxolotlOutputs
from kd_plugin.importing.distillkit import Compression, DistillKitOutputs
from tests.tiny import byte_tokenizer, save_tiny

FILES = Path(__file__).with_name("data") / "distillkit"  # written by DistillKit's own code: distillkit_files.py
FORMS = ["recommended", "budget", "published", "bins", "diffused"]


def settings_in(directory):
    return yaml.safe_load((directory / "compression_config.yaml").read_text())


def opened(name):
    return DistillKitOutputs(str(FILES / name), settings_in(FILES / name))


@pytest.mark.parametrize("form", FORMS)
def test_every_form_reads_as_distillkits_own_code_reads_it(form):
    expected, outputs = np.load(FILES / form / "expected.npz"), opened(form)
    read = [outputs.row(row) for row in range(len(outputs))]
    assert np.array_equal(np.concatenate([one.ids for one in read]), expected["ids"])
    found, sums = np.concatenate([one.logprobs for one in read]), np.exp(expected["logprobs"]).sum(axis=1)
    # The curve is a sum of products, whose order may differ from machine to machine
    kept = sums <= 1.01
    np.testing.assert_allclose(found[kept], expected["logprobs"][kept], rtol=1e-5, atol=1e-5)
    exact = settings_in(FILES / form)["exact_k"]
    assert np.array_equal(found[~kept][:, :exact], expected["logprobs"][~kept][:, :exact])
    assert np.isneginf(found[~kept][:, exact:]).all() and kept.mean() > 0.5


def test_a_position_is_for_the_next_token():
    """The teacher wrote the texts itself, so that its list holds nearly each next token; of neighbours few."""
    outputs = opened("recommended")
    shares = {}
    for offset in (0, 1, 2):
        hits = [
            token in listed.ids[at]
            for row in range(len(outputs))
            for listed, tokens in [(outputs.row(row), outputs.tokens(row))]
            for at in range(8, len(tokens) - 2)
            for token in [tokens[at + offset]]
        ]
        shares[offset] = np.mean(hits)
    assert shares[1] > 0.95 and max(shares[0], shares[2]) < 0.6, shares


def test_packed_rows_are_taken_apart_into_the_texts_that_they_were_made_of():
    plain, packed = opened("published"), opened("packed")
    assert len(datasets.load_dataset("parquet", data_files=str(FILES / "packed" / "*.parquet"))["train"]) < len(plain)
    whole = {tuple(plain.tokens(row)[:-1]): plain.row(row) for row in range(len(plain))}
    for row in range(len(packed)):
        tokens, listed = tuple(packed.tokens(row)), packed.row(row)
        (text,) = (text for text in whole if text[: len(tokens)] == tokens)  # packing cuts some off at their end
        assert len(listed.ids) == len(tokens) - 1
        assert np.array_equal(listed.ids, whole[text].ids[: len(tokens) - 1])
        assert np.array_equal(listed.logprobs, whole[text].logprobs[: len(tokens) - 1])


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return str(save_tiny(tmp_path_factory.mktemp("models") / "teacher", seed=5, tied=False, license="apache-2.0"))


def test_an_import_is_a_cache_like_any_other(teacher, tmp_path, capsys):
    arguments = ["cache", "import", str(FILES / "published"), str(tmp_path / "cache"), "--teacher", teacher]
    assert main(arguments) == 0
    assert "7 examples" in capsys.readouterr().out
    cache, outputs = TeacherCache(tmp_path / "cache"), opened("published")
    assert main(["cache", "verify", str(cache.path)]) == 0
    for row in range(len(outputs)):
        tokens, listed = list(outputs.tokens(row)), outputs.row(row)
        signal = cache.signal(torch.tensor(cache.find_index(tokens))[:-1])
        for at, (ids, logprobs) in enumerate(zip(listed.ids, listed.logprobs, strict=True)):
            held = {
                int(i): float(v) for i, v in zip(signal.ids[at], signal.logprobs[at], strict=True) if v > -torch.inf
            }
            said = {int(i): float(v) for i, v in zip(ids, logprobs, strict=True)}
            assert held.keys() <= said.keys()
            lost = sum(np.exp(value) for token, value in said.items() if token not in held)
            assert lost < 2e-3  # as much as there is above one
            assert held == pytest.approx({token: said[token] for token in held}, abs=0.02)  # float16
        mass = signal.logprobs.exp().sum(-1) + signal.tail_logmass.exp()
        assert torch.allclose(mass, torch.ones(len(tokens) - 1), atol=2e-3)
    record = json.loads((cache.path / "manifest.json").read_text())["lineage"]
    assert any("apache-2.0" in json.dumps(node) for node in record["nodes"])
    assert main(arguments) == 0  # goes on where it is; all of it is there


REFUSED = [
    ("legacy", "without their normalizer"),
    ("no_config", "compression_config.yaml"),
    ("other_bits", "They are not those of the capture"),
    ("too_many", "for each token after the first"),
    ("no_columns", "have no compressed_logprobs"),
    ("wrong_values", "no distribution"),
]


@pytest.mark.parametrize(("what", "reason"), REFUSED)
def test_what_cannot_be_read_faithfully_is_refused_with_the_reason(what, reason, teacher, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(FILES / "recommended", source)
    rows = datasets.Dataset.from_parquet(str(source / "data_0.parquet"))
    settings = settings_in(source)
    if what == "legacy":
        rows = rows.rename_columns({"compressed_logprobs": "exact_values", "bytepacked_indices": "packed_indices"})
        rows = rows.add_column("coeffs", [[[0.0]]] * len(rows))
    elif what == "no_config":
        (source / "compression_config.yaml").unlink()
    elif what == "other_bits":
        settings |= {"d": 70_000}
    elif what == "too_many":
        rows = rows.map(lambda row: {"input_ids": row["input_ids"][:-1]})
    elif what == "no_columns":
        rows = rows.remove_columns("compressed_logprobs")
    elif what == "wrong_values":  # as many bytes, and another meaning
        rows = datasets.Dataset.from_parquet(str(FILES / "published" / "data_0.parquet"))
        settings = settings_in(FILES / "published") | {"delta_encoding": False}
    rows.to_parquet(str(source / "data_0.parquet"))
    if what != "no_config":
        (source / "compression_config.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises((ConfigError, DataError), match=reason):
        import_outputs(source, tmp_path / "cache", teacher=teacher, progress=False)


def test_the_older_compression_is_refused_by_its_settings():
    older = {"teacher": {"legacy_logit_compression": {"k": 8, "exact_k": 2, "polynomial_degree": 3, "vocab_size": 259}}}
    with pytest.raises(ConfigError, match="not their normalizer"):
        Compression.of(older)
    assert (
        Compression.of({"teacher": {"logprob_compressor": settings_in(FILES / "bins")}}) == opened("bins").compression
    )


def test_the_gate_comes_first(tmp_path):
    unknown = str(save_tiny(tmp_path / "unknown", seed=5, tied=False, license=None))
    with pytest.raises(LicenseRefusedError):
        import_outputs(FILES / "published", tmp_path / "cache", teacher=unknown, progress=False)
    assert not (tmp_path / "cache" / "manifest.json").exists()
    with pytest.raises(ConfigError, match="teacher is not set"):
        import_outputs(FILES / "published", tmp_path / "cache")


# Axolotl: rows of a conversation with vLLM's log-probabilities of the answer's tokens and of its end


def conversations(teacher, form, k=20):
    """Rows as a pipeline writes them: the answer is the teacher's own, and ChatML prints a line break after its end."""
    torch.manual_seed(0)
    tokenizer, model = byte_tokenizer(), LocalTeacher(teacher, dtype="float32")
    model.model.lm_head.weight.data *= 8
    rows = []
    for number in range(6):
        prompt = [{"role": "user", "content": f"Say {number}."}]
        ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=True)[
            "input_ids"
        ]
        start, logprobs = len(ids), []
        for step in range(24):
            distribution = model.model(torch.tensor([ids])).logits[0, -1].float().log_softmax(-1)
            printable = torch.full_like(distribution, -torch.inf)
            printable[tokenizer.convert_tokens_to_ids(list("abcdefghijklmnop"))] = 0
            token = (
                int(torch.multinomial((distribution + printable).softmax(-1), 1))
                if step < 23
                else tokenizer.eos_token_id
            )
            values, listed = distribution.topk(k)
            if token not in listed:  # vLLM lists the token that was drawn beside the likeliest
                listed, values = torch.cat([listed, torch.tensor([token])]), torch.cat([values, distribution[[token]]])
            logprobs.append((listed.tolist(), values.tolist()))
            ids.append(token)
        answer = tokenizer.decode(ids[start:-1])
        row = {"messages": [*prompt, {"role": "assistant", "content": answer}], "ids": ids}
        if form == "mappings":
            row["logprobs"] = [
                [{"token": f"token_id:{i}", "logprob": v} for i, v in zip(*one, strict=True)] for one in logprobs
            ]
        else:
            row |= {"logprobs": [v for _, v in logprobs], "target_token_ids": [i for i, _ in logprobs]}
        rows.append(row)
    return rows


def written(rows, path):
    path.write_text("".join(json.dumps({k: v for k, v in row.items() if k != "ids"}) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("form", ["mappings", "numbers"])
def test_axolotls_rows_are_placed_by_what_they_hold(form, teacher, tmp_path):
    rows = conversations(teacher, form)
    outputs = AxolotlOutputs(written(rows, tmp_path / "rows.jsonl"), byte_tokenizer())
    assert outputs.ending == 1  # the line break, by which Axolotl's own alignment is off
    for number, row in enumerate(rows):
        assert list(outputs.tokens(number)) == row["ids"]
        listed, held = outputs.row(number), outputs.scored(number)
        assert held == range(len(row["ids"]) - 25, len(row["ids"]) - 1)
        assert all(row["ids"][at + 1] in ids for at, ids in zip(held, listed.ids, strict=True))
        assert (np.diff(listed.logprobs) <= 0).all()
    cache = import_outputs(
        tmp_path / "rows.jsonl", tmp_path / "cache", format="axolotl", teacher=teacher, progress=False
    )
    assert len(cache) == 6 and cache.tokens == 6 * 24


def test_axolotls_rows_that_fit_nowhere_are_refused(teacher, tmp_path):
    rows = conversations(teacher, "mappings")
    for row in rows:
        row["logprobs"] = row["logprobs"][:3] + row["logprobs"][-1:0:-1]
    with pytest.raises(DataError, match="cannot be known"):
        AxolotlOutputs(written(rows, tmp_path / "rows.jsonl"), byte_tokenizer())


def test_what_axolotl_prepared_is_refused_since_the_tail_is_lost(teacher, tmp_path):
    path = tmp_path / "prepared.jsonl"
    row = {
        "input_ids": [1, 2],
        "labels": [-100, 2],
        "target_logprobs": [[0.0]],
        "target_token_ids": [[2]],
        "target_mask": [[1]],
    }
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match="is lost"):
        import_outputs(path, tmp_path / "cache", format="axolotl", teacher=teacher, progress=False)


def test_a_student_trains_on_an_import(teacher, student_dir, tmp_path):
    import_outputs(FILES / "published", tmp_path / "cache", teacher=teacher, progress=False)
    from kd_plugin.trl import OfflineKDConfig, OfflineKDTrainer

    args = OfflineKDConfig(str(tmp_path / "out"), max_steps=2, use_cpu=True, report_to="none", save_strategy="no")
    trainer = OfflineKDTrainer(str(student_dir), args, teacher_cache=str(tmp_path / "cache"))
    assert trainer.train().training_loss > 0
