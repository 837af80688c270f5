"""Each optimizer step has the gradient of its batches as one batch, wherever an epoch, a limit or a stop cuts a window.

The learning rate is 0 and the student answers greedily, so that a step's gradient depends on its rows alone.
"""

import json
import logging
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader, IterableDataset

from kd_plugin.errors import ConfigError, DataError
from kd_plugin.lightning import KDDataModule, OfflineKD, OfflineKDModule, TeacherPanelCorrection, TeacherPanelModule
from kd_plugin.lightning.step import require_whole_windows, served, window_end
from tests.hosts.runs import assert_same
from tests.lightning.help import Plain, collate, loader, trainer

GREEDY = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
PROMPTS = [{"prompt": f"{'abcdefgh'[i % 8] * (1 + i % 5)} {i:02d}", "teacher_id": "ab"[i % 3 == 0]} for i in range(16)]


class Steps(pl.Callback):
    """The rows and the gradient of each optimizer step."""

    def __init__(self):
        self.rows, self.steps = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if "prompt" in batch:
            self.rows.append(list(batch["prompt"]))
        else:
            whole = zip(batch["input_ids"], batch["attention_mask"], strict=True)
            self.rows.append([tuple(ids[mask == 1].tolist()) for ids, mask in whole])

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        self.rows = self.rows[-1:]  # what was summed before is thrown away

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        gradient = {n: p.grad.clone() for n, p in pl_module.named_parameters() if p.grad is not None}
        self.steps.append(([row for batch in self.rows for row in batch], gradient))
        self.rows = []


class Offline:
    """Offline KD of an untied student."""

    def __init__(self, student, cache):
        self.student, self.cache = student, cache
        self.known = {tuple(row["input_ids"]): i for i, row in enumerate(cache.dataset())}

    def ready(self, **fields):
        return OfflineKDModule(self.student, cache=str(self.cache.path), learning_rate=0.0, **fields)

    def data(self, **fields):
        return KDDataModule(cache=str(self.cache.path), batch_size=2, **{"shuffle": False, **fields})

    def own(self, **fields):
        return Plain(self.student, lr=0.0), OfflineKD(self.cache, **fields)

    def loader(self, rows, batch_size):
        chosen = self.cache.dataset().select([self.known[row] for row in rows])
        return DataLoader(chosen, batch_size=batch_size, collate_fn=collate)


class Panel:
    """A routed panel over an untied student."""

    def __init__(self, student, teachers, directory):
        self.student, self.teachers = student, teachers
        self.prompts = directory / "prompts.jsonl"
        self.prompts.write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
        self.known = {row["prompt"]: i for i, row in enumerate(PROMPTS)}
        self.written = {"max_completion_length": 4, "generation_kwargs": GREEDY}

    def ready(self, **fields):
        given = {"teacher_models": self.teachers, "learning_rate": 0.0, **self.written, **fields}
        return TeacherPanelModule(self.student, **given)

    def data(self, **fields):
        return KDDataModule(prompts=str(self.prompts), batch_size=2, **{"shuffle": False, **fields})

    def own(self, **fields):
        return Plain(self.student, lr=0.0), TeacherPanelCorrection(self.teachers, **self.written, **fields)

    def loader(self, rows, batch_size):
        def columns(rows):
            return {name: [row[name] for row in rows] for name in ("prompt", "teacher_id")}

        chosen = [PROMPTS[self.known[row]] for row in rows]
        return DataLoader(chosen, batch_size=batch_size, collate_fn=columns)


@pytest.fixture(scope="module")
def methods(tmp_path_factory, untied_student_dir, cache, teacher_dir, other_teacher_dir):
    teachers = {"a": teacher_dir, "b": other_teacher_dir}
    return {
        "offline": Offline(untied_student_dir, cache),
        "panel": Panel(untied_student_dir, teachers, tmp_path_factory.mktemp("prompts")),
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return the gradient of some rows in one batch."""
    found = {}

    def of(method, rows, **fields):
        key = (type(method), tuple(rows), *fields.items())
        if key not in found:
            (module, kd), seen = method.own(**fields), Steps()
            host = trainer(tmp_path_factory.mktemp("whole"), [kd, seen], max_steps=1)
            host.fit(module, method.loader(rows, len(rows)))
            found[key] = seen.steps[0][1]
        return found[key]

    return of


def assert_whole(method, whole, steps, sizes, **fields):
    assert [len(rows) for rows, _ in steps] == sizes
    for rows, gradient in steps:
        assert_same(gradient, whole(method, rows, **fields), 1e-5)


class Stop(pl.Callback):
    """Asks for a stop behind some batch."""

    def __init__(self, after):
        self.after, self.seen = after, 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen += 1
        trainer.should_stop = self.seen == self.after


CASES = {
    "a limit": ({"limit_train_batches": 3, "max_epochs": 2}, {}, [4, 2, 4, 2]),
    "a limit, cross-entropy": ({"limit_train_batches": 3, "max_epochs": 2}, {"ce_weight": 0.3}, [4, 2, 4, 2]),
    "a share": ({"limit_train_batches": 0.4, "max_epochs": 2}, {}, [4, 2, 4, 2]),
    "overfitting": ({"overfit_batches": 3, "max_epochs": 2}, {}, [4, 2, 4, 2]),
    "its own end": ({"accumulate_grad_batches": 3, "max_epochs": 1}, {}, [6, 6, 4]),
    "steps": ({"max_steps": 3, "accumulate_grad_batches": 3, "limit_train_batches": 4}, {}, [6, 2, 6]),
    "new loaders": (
        {"limit_train_batches": 3, "max_epochs": 2, "reload_dataloaders_every_n_epochs": 1}, {}, [4, 2, 4, 2],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ["offline", "panel"])
@pytest.mark.parametrize("case", CASES)
def test_an_epoch_ends_inside_a_window(case, name, tmp_path, methods, whole):
    options, fields, sizes = CASES[case]
    seen, options = Steps(), {"accumulate_grad_batches": 2, "max_steps": -1, **options}
    trainer(tmp_path, [seen], **options).fit(methods[name].ready(**fields), datamodule=methods[name].data())
    assert_whole(methods[name], whole, seen.steps, sizes, **fields)


@pytest.mark.parametrize("name", ["offline", "panel"])
def test_validation_inside_a_window(name, tmp_path, methods, whole):
    seen = Steps()
    limits = {"limit_train_batches": 3, "max_steps": 2, "val_check_interval": 1}
    host = trainer(tmp_path, [seen], accumulate_grad_batches=2, **limits)
    host.fit(methods[name].ready(), datamodule=methods[name].data(validation_rows=4))
    assert "val/divergence" in host.callback_metrics
    assert_whole(methods[name], whole, seen.steps, [4, 2])


@pytest.mark.parametrize("name", ["offline", "panel"])
def test_windows_that_grow(name, tmp_path, methods, whole):
    seen = Steps()
    growing = GradientAccumulationScheduler({0: 1, 1: 3})
    host = trainer(tmp_path, [growing, seen], limit_train_batches=4, max_epochs=2, max_steps=-1)
    host.fit(methods[name].ready(), datamodule=methods[name].data())
    assert_whole(methods[name], whole, seen.steps, [2, 2, 2, 2, 6, 2])


@pytest.mark.parametrize("name", ["offline", "panel"])
def test_a_second_fit_after_a_stop_inside_a_window(name, tmp_path, methods, whole):
    """The same trainer, module, callback and data, shuffled: what was made ahead for the first fit is not used."""
    seen, method = Steps(), methods[name]
    module, data = method.ready(), method.data(shuffle=True)
    host = trainer(tmp_path, [seen, Stop(3)], accumulate_grad_batches=2, max_epochs=1, max_steps=-1)
    host.fit(module, datamodule=data)
    assert len(seen.steps) == 1
    host.fit_loop.max_epochs, host.should_stop = 2, False
    host.fit(module, datamodule=data)
    assert_whole(method, whole, seen.steps, [4] * 5)


@pytest.mark.parametrize("name", ["offline", "panel"])
def test_a_module_that_ends_an_epoch_inside_a_window(name, tmp_path, methods, whole):
    seen, module = Steps(), methods[name].ready()
    module.on_train_batch_start = lambda batch, batch_idx: -1 if batch_idx == 3 else None
    host = trainer(tmp_path, [seen], accumulate_grad_batches=2, max_epochs=2, max_steps=-1)
    host.fit(module, datamodule=methods[name].data(shuffle=True))
    for rows, gradient in seen.steps:
        assert_same(gradient, whole(methods[name], rows), 1e-5)
    assert len(seen.steps) == 2


@pytest.mark.parametrize("name", ["offline", "panel"])
def test_a_run_resumes_at_the_end_of_a_limited_epoch_and_inside_one(name, tmp_path, methods, whole):
    def fit(steps, callbacks=(), **options):
        seen = Steps()
        host = trainer(
            tmp_path, [seen, *callbacks], max_steps=steps, limit_train_batches=5, accumulate_grad_batches=2,
            enable_checkpointing=bool(callbacks),
        )  # fmt: skip
        host.fit(methods[name].ready(), datamodule=methods[name].data(shuffle=True), **options)
        return seen.steps

    undisturbed = fit(5, [ModelCheckpoint(tmp_path, every_n_train_steps=1, filename="{step}", save_top_k=-1)])
    assert_whole(methods[name], whole, undisturbed, [4, 4, 2, 4, 4])
    for done in (3, 4):
        resumed = fit(5, ckpt_path=tmp_path / f"step={done}.ckpt", weights_only=False)
        assert [rows for rows, _ in resumed] == [rows for rows, _ in undisturbed[done:]]
        assert_whole(methods[name], whole, resumed, [4] * (5 - done))


class Stream(IterableDataset):
    """Rows without a length."""

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


@pytest.mark.parametrize("name", ["offline", "panel"])
@pytest.mark.parametrize("streamed", [False, True], ids=["a plain loader", "a stream"])
def test_loaders_that_do_not_look_ahead(streamed, name, tmp_path, methods, whole):
    """Each batch counts alike in its window, whose last is shorter: the mean of what its batches give alone."""
    method, seen = methods[name], Steps()
    module, kd = method.own()
    rows = list(method.known)[:6]
    given = method.loader(rows, 2)
    if streamed:
        given = DataLoader(Stream(list(given.dataset)), batch_size=2, collate_fn=given.collate_fn)
    limit = {"limit_train_batches": 3} if streamed else {}
    host = trainer(tmp_path, [kd, seen], accumulate_grad_batches=2, max_epochs=2, max_steps=-1, **limit)
    host.fit(module, given)
    assert [len(rows) for rows, _ in seen.steps] == [4, 2, 4, 2]
    for rows, gradient in seen.steps:
        alone = [whole(method, rows[i : i + 2]) for i in range(0, len(rows), 2)]
        mean = {name: sum(one[name] for one in alone) / len(alone) for name in alone[0]}
        assert_same(gradient, mean, 1e-5)


@pytest.mark.parametrize("name", ["offline", "panel"])
def test_several_loaders_are_refused(name, tmp_path, methods):
    method = methods[name]
    module, kd = method.own()
    given = method.loader(list(method.known)[:4], 2)
    with pytest.raises(DataError, match=r"The batch has no '(input_ids|prompt)'; it has 'x', 'y'"):
        trainer(tmp_path, [kd]).fit(module, CombinedLoader({"x": given, "y": given}))


def test_one_loader_in_a_combined_one(tmp_path, methods, cache):
    module, kd = methods["offline"].own()
    trainer(tmp_path, [kd], max_steps=1).fit(module, CombinedLoader(loader(cache)))
    assert len(module.losses) == 1


def test_the_warm_up_counts_the_batches_that_run(tmp_path, methods, cache):
    """Two epochs of three batches: the second step has one batch, whose targets alone it is divided by."""
    gradients = {}
    for accumulate, rows in ((2, 2), (1, 4)):
        seen = Steps()
        limit = 3 if accumulate == 2 else 2
        fields = {"warmup_cache": str(cache.path), "warmup_cache_steps": 4}
        options = {"accumulate_grad_batches": accumulate, "limit_train_batches": limit, "max_epochs": 2}
        host = trainer(tmp_path, [seen], max_steps=-1, **options)
        data = KDDataModule(prompts=str(methods["panel"].prompts), batch_size=rows, shuffle=False)
        host.fit(methods["panel"].ready(**fields), datamodule=data)
        gradients[accumulate] = [gradient for _, gradient in seen.steps]
    assert_same(gradients[2][0], gradients[1][0], 1e-5)
    # The longest two of the step's four rows: with both batches in the divisor it would be about half as large
    sizes = [torch.sqrt(sum((g.double() ** 2).sum() for g in gradient.values())) for gradient in gradients[2]]
    assert sizes[1] > 0.7 * sizes[0]


class TestDeepSpeed:
    """It counts batches over epochs; no window of ours may."""

    @pytest.fixture
    def host(self):
        from tests.lightning.ranks import strategy

        return SimpleNamespace(
            accumulate_grad_batches=2, strategy=strategy("zero2"), world_size=1, global_rank=0, overfit_batches=0,
            num_training_batches=5,
        )  # fmt: skip

    @pytest.fixture
    def data(self, host, methods):
        data = methods["offline"].data()
        data.setup("fit")
        data.rows = data.rows.select(range(10))
        data.trainer = host
        return data

    def test_an_epoch_has_whole_windows(self, host, data, caplog):
        assert [served(host, n) for n in (1, 2, 5)] == [1, 2, 4] and window_end(host, 4) == 6
        with caplog.at_level(logging.WARNING):
            assert len(data.train_dataloader()) == len(list(data.train_dataloader())) == 4
        assert "The last 1 of an epoch's 5 batches on each rank are left out" in caplog.text

    def test_a_limit_that_cuts_a_window_is_refused(self, host, data):
        host.train_dataloader, host.num_training_batches = data.train_dataloader(), 3
        with pytest.raises(ConfigError, match=r"has 3 batches a rank .* is 2: under .* Set limit_train_batches: 2\."):
            require_whole_windows(host)
        for fits in (4, float("inf")):
            host.num_training_batches = fits
            require_whole_windows(host)

    def test_models_that_are_loaded_after_a_run_are_whole(self, host, methods):
        """transformers is told of ZeRO-3 while the trainer runs, and no longer."""
        from transformers.integrations import is_deepspeed_zero3_enabled

        from tests.lightning.ranks import strategy

        host.strategy = strategy("zero3")
        module, kd = methods["offline"].own()
        kd.setup(host, module, "validate")
        assert is_deepspeed_zero3_enabled()
        kd.teardown(host, module, "validate")
        assert not is_deepspeed_zero3_enabled()
