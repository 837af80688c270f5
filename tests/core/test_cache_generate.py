"""The teacher writes: what, in which order, by which random numbers, and what is kept of it."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
import yaml

from kd_plugin import LocalTeacher
from kd_plugin.cache import Generation, Sampled, TeacherCache, TopK
from kd_plugin.cache import store as store_module
from kd_plugin.cache.targets import Generation as Settings
from kd_plugin.capturing import capture
from kd_plugin.capturing.generating import Request, generate_locally
from kd_plugin.capturing.tokenization import Tokenization
from kd_plugin.cli.main import main
from kd_plugin.errors import ConfigError, DataError, NonFiniteError
from kd_plugin.verifying import make_verifier
from tests.core.cache_help import files_of, live_logprobs, prompt_rows, shards_of
from tests.tiny import byte_tokenizer, tiny_llama

WRITE = Generation(n=3, max_new_tokens=12, keep_unfinished=True)


@pytest.fixture(scope="module")
def teacher(teacher_dir):
    return LocalTeacher(teacher_dir, dtype="float32")


def prompts(count):
    return [{"prompt": row["prompt"], "domain": row["domain"], "answer": i} for i, row in enumerate(prompt_rows(count))]


def options(**changed):
    return {"targets": TopK(6), "generate": WRITE, "shard_rows": 4, "batch_tokens": 256, "progress": False, **changed}


def test_targets_are_those_of_what_was_written(teacher, tmp_path):
    cache = capture(prompts(6), teacher, tmp_path, **options())
    assert len(cache) == 18 and cache.manifest.dropped == {}
    rows = cache.dataset()
    for number, row in enumerate(rows):
        prompt = teacher.tokenizer(prompts(6)[number // 3]["prompt"])["input_ids"]
        assert row["input_ids"][: len(prompt)] == prompt  # in the order of the rows
        written = len(row["input_ids"]) - len(prompt)
        assert row["completion_mask"] == [0] * len(prompt) + [1] * written and 1 <= written <= 12
        index = torch.tensor(row["teacher_index"])
        live = live_logprobs(teacher, row["input_ids"])[: len(index)][index >= 0].float()
        signal = cache.signal(index[index >= 0])
        torch.testing.assert_close(signal.logprobs, live.gather(1, signal.ids), atol=5e-3, rtol=1e-3)
    stored = cache.manifest.settings
    assert stored.generation == WRITE and stored.passed == ("text", "domain")
    assert cache.manifest.version == 2  # which says to an older reader that it cannot read this


@pytest.mark.parametrize("generate", [WRITE, None], ids=["generate", "score"])
def test_an_offloaded_teacher_is_on_its_device_for_the_whole_capture(
    generate, teacher, teacher_dir, tmp_path, monkeypatch
):
    offloaded = LocalTeacher(teacher_dir, dtype="float32", device="cpu", placement="offload")
    moved = []
    monkeypatch.setattr(type(offloaded.model), "to", lambda model, device: moved.append(device) or model)
    rows = prompts(6) if generate else prompt_rows(6)
    capture(rows, offloaded, tmp_path / "offloaded", **options(generate=generate))
    assert moved == ["cpu"]
    monkeypatch.undo()
    capture(rows, teacher, tmp_path / "resident", **options(generate=generate))
    assert shards_of(tmp_path / "offloaded") == shards_of(tmp_path / "resident")


def test_the_text_and_the_domain_are_stored_beside(teacher, tmp_path):
    import pyarrow.parquet as pq

    capture(prompts(4), teacher, tmp_path, **options())
    table = pq.read_table(tmp_path / "data" / "00000.parquet").to_pydict()
    assert table["domain"] == [row["domain"] for row in prompts(4) for _ in range(3)]
    for text, ids, mask in zip(table["text"], table["input_ids"], table["completion_mask"], strict=True):
        written = [i for i, m in zip(ids, mask, strict=True) if m]
        assert text == teacher.tokenizer.decode(written, skip_special_tokens=True)


def test_samples_follow_the_teachers_distribution():
    """Frequencies of 4,000 first tokens against the softmax, at a temperature, with top-p and top-k."""
    teacher = LocalTeacher(tiny_llama(seed=1, layers=1, hidden=16), tokenizer=byte_tokenizer(), device="cpu")
    prompt = np.array([40, 41, 42], np.int32)
    requests = [Request.of(prompt, 0, j, 1) for j in range(4000)]
    logits = live_logprobs(teacher, prompt.tolist())[-1]
    for settings, expected in (
        (Settings(n=4000, max_new_tokens=1), logits.softmax(0)),
        (Settings(n=4000, max_new_tokens=1, temperature=0.5), (logits / 0.5).softmax(0)),
        (Settings(n=4000, max_new_tokens=1, top_k=3), _only(logits, logits.topk(3).indices)),
        (Settings(n=4000, max_new_tokens=1, top_p=0.5), _only(logits, _nucleus(logits, 0.5))),
    ):
        written = generate_locally(teacher, requests, settings, seed=0)
        counts = torch.zeros(259, dtype=torch.float64)
        for token, count in Counter(int(c.ids[0]) for c in written).items():
            counts[token] = count
        likely = expected > 5 / 4000
        error = (counts - 4000 * expected)[likely] / (4000 * expected * (1 - expected)).sqrt()[likely].clamp(min=1e-9)
        assert error.abs().max() < 4.5  # standard deviations, over some tens of tokens
        assert counts[expected == 0].sum() == 0


def _only(logits, kept):
    mask = torch.full_like(logits, -torch.inf)
    mask[kept] = logits[kept]
    return mask.softmax(0)


def _nucleus(logits, p):
    probabilities, order = logits.softmax(0).sort(descending=True)
    return order[probabilities.cumsum(0) - probabilities < p]


def test_a_greedy_completion_is_that_of_transformers(teacher):
    prompt = np.array(teacher.tokenizer("Say red: ")["input_ids"], np.int32)
    (written,) = generate_locally(
        teacher, [Request.of(prompt, 0, 0, 20)], Settings(temperature=0, max_new_tokens=20), 0
    )
    theirs = teacher.model.generate(
        torch.tensor(prompt)[None].long(), max_new_tokens=20, do_sample=False, eos_token_id=2, pad_token_id=0
    )
    assert written.ids.tolist() == theirs[0, len(prompt) :].tolist()


def test_padded_rows_of_the_head_are_never_written():
    teacher = LocalTeacher(tiny_llama(vocab_size=400, scale=0.1), tokenizer=byte_tokenizer())
    requests = [Request.of(np.array([5, 6], np.int32), 0, j, 8) for j in range(100)]
    written = generate_locally(teacher, requests, Settings(n=100, max_new_tokens=8), 0)
    assert max(int(c.ids.max()) for c in written) < 259


def test_an_end_token_ends_and_is_kept():
    model = tiny_llama(seed=1)
    teacher = LocalTeacher(model, tokenizer=byte_tokenizer())
    requests = [Request.of(np.array([5 + j, 6], np.int32), j, 0, 200) for j in range(20)]
    written = generate_locally(teacher, requests, Settings(max_new_tokens=200, temperature=3.0), 0)
    ended = [c for c in written if c.finished]
    assert ended and all(c.ids[-1] == 2 and 2 not in c.ids[:-1] for c in ended)
    assert all(2 not in c.ids and len(c.ids) == 200 for c in written if not c.finished)


def test_a_completion_depends_on_its_row_and_seed_and_not_on_who_wrote_it(teacher, tmp_path):
    one = capture(prompts(8), teacher, tmp_path / "a", **options())
    assert shards_of(tmp_path / "a") == shards_of(capture(prompts(8), teacher, tmp_path / "b", **options()).path)
    seeded = capture(prompts(8), teacher, tmp_path / "c", **options(seed=1))
    assert one.dataset()["input_ids"] != seeded.dataset()["input_ids"]
    # Other companions in the batch and another unit size: the same tokens but for rounding
    apart = capture(prompts(8), teacher, tmp_path / "d", **options(batch_tokens=32, shard_rows=3))
    assert one.dataset()["input_ids"] == apart.dataset()["input_ids"]
    # The same prompt twice is written anew
    twice = capture([prompts(1)[0]] * 2, teacher, tmp_path / "e", **options())
    assert len({tuple(ids) for ids in twice.dataset()["input_ids"]}) == 6


def test_an_interrupted_capture_goes_on_to_the_same_bytes(teacher, tmp_path, monkeypatch):
    capture(prompts(11), teacher, tmp_path / "whole", **options(filter="tests.core.cache_filters:short"))
    commit, done = store_module.Store.commit, []

    def interrupted(self, index, *args, **kwargs):
        if len(done) == 1:
            raise KeyboardInterrupt
        done.append(index)
        commit(self, index, *args, **kwargs)

    monkeypatch.setattr(store_module.Store, "commit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        capture(prompts(11), teacher, tmp_path / "c", **options(filter="tests.core.cache_filters:short"))
    monkeypatch.undo()
    cache = capture(prompts(11), teacher, tmp_path / "c", **options(filter="tests.core.cache_filters:short"))
    assert shards_of(tmp_path / "c") == shards_of(tmp_path / "whole")
    units = {name: data for name, data in files_of(tmp_path / "c").items() if name.startswith("units/")}
    assert len(units) == 3 and sum(cache.manifest.dropped.values()) + len(cache) == 33


def test_what_is_dropped_is_counted_by_reason(teacher, tmp_path, capsys):
    kept = capture(prompts(9), teacher, tmp_path / "k", **options())
    decode = teacher.tokenizer.decode
    texts = [
        decode(
            [i for i, m in zip(row["input_ids"], row["completion_mask"], strict=True) if m], skip_special_tokens=True
        )
        for row in kept.dataset()
    ]
    long = sum(len(text) > 12 for text in texts)
    cache = capture(prompts(9), teacher, tmp_path / "f", **options(filter="tests.core.cache_filters:short"))
    assert cache.manifest.dropped == ({"too long for us": long} if long else {})
    assert len(cache) == 27 - long
    odd = capture(prompts(9), teacher, tmp_path / "o", **options(filter="tests.core.cache_filters:odd_rows"))
    assert odd.manifest.dropped == {"filtered": 15} and len(odd) == 12
    assert odd.manifest.settings.filter == "tests.core.cache_filters:odd_rows"
    finished = capture(prompts(9), teacher, tmp_path / "u", **options(generate=Generation(n=3, max_new_tokens=40)))
    assert finished.manifest.dropped["unfinished"] + len(finished) == 27
    assert all(row["input_ids"][-1] == 2 for row in finished.dataset())
    assert main(["cache", "info", str(tmp_path / "o")]) == 0
    said = capsys.readouterr().out
    assert "12 (15 dropped: 15 filtered)" in said and "filter      tests.core.cache_filters:odd_rows" in said
    assert "n 3, max_new_tokens 12" in said
    cache.verify()


def test_counts_survive_a_merge_and_an_append(teacher, tmp_path):
    from kd_plugin.cache.merge import merge

    chosen = options(filter="tests.core.cache_filters:odd_rows")
    first = capture(prompts(6), teacher, tmp_path / "a", **chosen)
    capture(prompts(9)[6:], teacher, tmp_path / "b", **chosen)
    merged = merge([tmp_path / "a", tmp_path / "b"], tmp_path / "m")
    assert first.manifest.dropped == {"filtered": 9} and merged.manifest.dropped == {"filtered": 15}
    appended = capture(prompts(9)[6:], teacher, tmp_path / "a", append=True, **chosen)
    assert appended.manifest.dropped == {"filtered": 15} and len(appended) == len(merged) == 12
    assert appended.dataset()["input_ids"] == merged.dataset()["input_ids"]


def test_a_filter_judges_given_completions_too(teacher, tmp_path):
    rows = [{"prompt": "2+2=", "completion": c, "answer": "4"} for c in (" 4", "5", "4")]
    cache = capture(rows, teacher, tmp_path, filter="exact_match", targets=TopK(3), progress=False)
    assert len(cache) == 2 and cache.manifest.dropped == {"wrong answer": 1}
    chat = [
        {"messages": [{"role": "user", "content": "2+2"}, {"role": "assistant", "content": c}], "answer": "4"}
        for c in ("4", "5")
    ]
    assert len(capture(chat, teacher, tmp_path / "m", filter="exact_match", targets=TopK(3), progress=False)) == 1


@pytest.mark.parametrize(
    ("completion", "reference", "verdict"),
    [
        ("So the answer is \\boxed{1/2}.", "0.5", None),
        ("First 3, then 4, in all 7.", "7", None),
        ("The result is 8.", "7", "wrong answer"),
        ("I do not know.", "7", "no answer"),
        ("It is 7.", "no numbers here", "reference is no mathematics"),
    ],
)
def test_math_verify_compares_as_mathematics(completion, reference, verdict):
    pytest.importorskip("math_verify")
    found = make_verifier("math_verify")
    assert found.why_not(completion, {"answer": reference}, "row 0") == verdict


def test_filters_that_cannot_be_are_refused(teacher, tmp_path):
    for given, message in (
        ("exact_mach", "Did you mean 'exact_match'"),
        ("tests.core.cache_filters:nothing", "cannot be imported"),
        ("no_such_module_at_all:f", "cannot be imported.*PYTHONPATH"),
        ("tests.core.cache_filters:NOT_A_FUNCTION", "is a int; expected a function"),
    ):
        with pytest.raises(ConfigError, match=message):
            capture(prompts(2), teacher, tmp_path / "c", **options(filter=given))
    with pytest.raises(DataError, match=r"column 'solution' with the reference answer is missing.*answer_column"):
        capture(prompts(2), teacher, tmp_path / "c", **options(filter="exact_match", answer_column="solution"))
    assert not (tmp_path / "c").exists()
    with pytest.raises(DataError, match=r"broken failed at row \d: KeyError"):
        capture(prompts(2), teacher, tmp_path / "c", **options(filter="tests.core.cache_filters:broken"))
    with pytest.raises(DataError, match=r"confused returned 7 at row \d"):
        capture(prompts(2), teacher, tmp_path / "d", **options(filter="tests.core.cache_filters:confused"))


def test_a_dataset_of_which_nothing_is_left_is_one_clear_error(teacher, tmp_path, caplog, capsys):
    def never(completion, row):
        return False

    with pytest.raises(DataError, match=r"Nothing is left of 5 rows: every completion was dropped \(15 filtered\)"):
        capture(prompts(5), teacher, tmp_path / "c", **options(filter=never))
    assert "Rows 0 to 3: nothing was kept (12 filtered)" in caplog.text  # long before the end
    assert main(["cache", "info", str(tmp_path / "c")]) == 0
    said = capsys.readouterr().out
    assert "0 (15 dropped: 15 filtered)" in said and "bytes a position" not in said
    with pytest.raises(ConfigError, match=r"filter: .*never' against None"):
        capture(prompts(5), teacher, tmp_path / "c", **options())


def test_other_ways_of_writing_in_one_directory_are_refused(teacher, tmp_path):
    capture(prompts(2), teacher, tmp_path, **options())
    for changed, named in (
        ({"generate": Generation(n=2, max_new_tokens=12, keep_unfinished=True)}, "generation: .*'n': 3.*'n': 2"),
        ({"filter": "exact_match"}, r"filter: None against 'exact_match\(answer\)'"),
    ):
        with pytest.raises(ConfigError, match=named):
            capture(prompts(2), teacher, tmp_path, **options(**changed))


def test_max_length_holds_for_prompt_and_completion(teacher, tmp_path):
    rows = [{"prompt": "x" * 10}, {"prompt": "y" * 18}, {"prompt": "z" * 20}, {"prompt": "z" * 30}]
    cache = capture(rows, teacher, tmp_path, **options(max_length=20))
    assert cache.manifest.dropped == {"prompt too long": 6}
    assert {len(ids) for ids in cache.dataset()["input_ids"]} <= set(range(11, 21))
    assert len(cache) == 6


def test_prompts_of_every_form(tokenizer):
    tokenization = Tokenization(tokenizer, 259)
    user, answer = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}
    opened = tokenizer.apply_chat_template([user], add_generation_prompt=True, return_dict=True)["input_ids"]
    begun = tokenizer.apply_chat_template([user, answer], continue_final_message=True, return_dict=True)["input_ids"]
    for row, expected in (
        ({"prompt": "Hi"}, tokenizer("Hi")["input_ids"]),
        ({"prompt": "Hi", "completion": "Ho"}, tokenizer("Hi")["input_ids"]),
        ({"text": "Hi"}, tokenizer("Hi")["input_ids"]),
        ({"prompt": [user]}, opened),
        ({"prompt": [user], "completion": [answer]}, opened),
        ({"prompt": [user, answer]}, begun),
        ({"messages": [user]}, opened),
        ({"messages": [user, answer]}, opened),
        ({"conversations": [{"from": "user", "value": "Hi"}]}, opened),
        ({"input_ids": [7, 8, 9]}, [7, 8, 9]),
        ({"input_ids": [7, 8, 9], "completion_mask": [0, 0, 1]}, [7, 8]),
    ):
        assert tokenization.prompt(row).tolist() == list(expected)
    with pytest.raises(DataError, match=r"row 3 has the columns \['x'\]"):
        tokenization.prompt({"x": 1}, "row 3")


@pytest.mark.parametrize(
    "changed",
    [{"n": 0}, {"n": True}, {"max_new_tokens": 0}, {"temperature": -1}, {"top_p": 0}, {"top_p": 1.1}, {"top_k": -1}],
)
def test_impossible_ways_of_writing_are_refused(changed):
    (name,) = changed
    with pytest.raises(ConfigError, match=name):
        Generation(**changed)


def test_several_likeliest_completions_are_refused():
    with pytest.raises(ConfigError, match="the likeliest completion is one"):
        Generation(n=2, temperature=0)


def test_a_teacher_of_nans_stores_nothing(tmp_path, tokenizer):
    model = tiny_llama()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    teacher = LocalTeacher(model, tokenizer=tokenizer, license="apache-2.0")
    with pytest.raises(NonFiniteError, match="while it generates"):
        capture(prompts(2), teacher, tmp_path / "c", **options())
    assert not shards_of(tmp_path / "c")


def test_sampled_targets_of_written_completions(teacher, tmp_path):
    cache = capture(prompts(3), teacher, tmp_path, **options(targets=Sampled(20)))
    signal = cache.signal(torch.arange(cache.tokens))
    assert bool((signal.draws.sum(1) == 20).all())


def test_generation_from_yaml(teacher_dir, teacher, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in prompts(5)))
    settings = {
        "dataset": str(tmp_path / "rows.jsonl"),
        "teacher": teacher_dir,
        "dtype": "float32",
        "output_dir": str(tmp_path / "c"),
        "mode": "generate",
        "completions": 2,
        "max_new_tokens": 9,
        "sampling_temperature": 0.7,
        "sampling_top_p": 0.9,
        "sampling_top_k": 50,
        "keep_unfinished": True,
        "filter": "tests.core.cache_filters:odd_rows",
        "k": 5,
    }
    config = tmp_path / "c.yaml"
    config.write_text(yaml.safe_dump(settings))
    assert main(["capture", "--config", str(config), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "5 examples (5 dropped: 5 filtered)" in said and "extrapolated" in said and not (tmp_path / "c").exists()
    assert main(["capture", "--config", str(config)]) == 0
    assert "4 examples (6 dropped: 6 filtered)" in capsys.readouterr().out
    called = capture(
        prompts(5),
        teacher,
        tmp_path / "d",
        targets=TopK(5),
        generate=Generation(n=2, max_new_tokens=9, temperature=0.7, top_p=0.9, top_k=50, keep_unfinished=True),
        filter="tests.core.cache_filters:odd_rows",
        progress=False,
    )
    assert TeacherCache(tmp_path / "c").manifest.settings == called.manifest.settings
    assert shards_of(tmp_path / "c") == shards_of(tmp_path / "d")
    for changed, message in (
        ({"mode": "write"}, "mode: 'write' is unknown"),
        ({"mode": "score"}, "completions is set, and mode is score"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
    ):
        config.write_text(yaml.safe_dump({**settings, **changed}))
        assert main(["capture", "--config", str(config)]) != 0
        assert message in capsys.readouterr().err
