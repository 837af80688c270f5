"""The trainer sees the rows in TRL's order, epoch for epoch, without a list of all of them."""

import tracemalloc

import pytest
import torch
from accelerate.data_loader import SeedableRandomSampler, prepare_data_loader
from datasets import Dataset
from torch.utils.data import DataLoader
from trl import SFTConfig, SFTTrainer

from kd_plugin.cache import TopK
from kd_plugin.capturing import capture
from kd_plugin.teachers import LocalTeacher
from kd_plugin.trainers.upstream import LeanRandomSampler, shuffle_leanly
from kd_plugin.trl import OfflineKDConfig, OfflineKDTrainer
from tests.hosts.runs import settings
from tests.tiny import byte_tokenizer

ROWS = Dataset.from_dict({"text": [f"row {i} of the text" for i in range(10)]})


def epochs(trainer, count: int = 3) -> list:
    loader, seen = trainer.get_train_dataloader(), []
    for epoch in range(count):
        loader.set_epoch(epoch)
        seen += [batch["input_ids"].tolist() for batch in loader]
    return seen


@pytest.mark.parametrize("options", [{}, {"data_seed": 5}, {"train_sampling_strategy": "group_by_length"}], ids=str)
def test_the_order_is_that_of_sft(options, tmp_path, student_dir, teacher_dir):
    cache = capture(ROWS, LocalTeacher(teacher_dir), tmp_path / "cache", targets=TopK(2), progress=False)
    arguments = settings(tmp_path, **options)
    common = {"model": student_dir, "train_dataset": ROWS, "processing_class": byte_tokenizer()}
    ours = OfflineKDTrainer(args=OfflineKDConfig(**arguments), teacher_cache=cache, **common)
    theirs = SFTTrainer(args=SFTConfig(**arguments), **common)
    torch.manual_seed(1)
    mine = epochs(ours)
    torch.manual_seed(1)
    assert mine == epochs(theirs)
    assert mine[:3] != mine[3:6]
    lean = isinstance(ours.get_train_dataloader().batch_sampler.sampler, LeanRandomSampler)
    assert lean == ("train_sampling_strategy" not in options)


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_get_the_batches_that_they_had(rank):
    def batches(change) -> list:
        loader = DataLoader(list(range(9001)), batch_size=7, shuffle=True)
        loader = prepare_data_loader(
            loader, num_processes=2, process_index=rank, use_seedable_sampler=True, data_seed=3, put_on_device=False
        )
        return [batch.tolist() for _ in range(2) for batch in change(loader)]

    assert batches(shuffle_leanly) == batches(lambda loader: loader)


def test_an_epoch_takes_no_list_of_all_rows():
    def peak(kind) -> int:
        tracemalloc.start()
        assert sum(1 for _ in kind(range(100_000), data_seed=1)) == 100_000
        highest = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return highest

    assert peak(SeedableRandomSampler) > 3_000_000
    assert peak(LeanRandomSampler) < 500_000  # tensors are not traced: 400,000 more


@pytest.mark.parametrize("completion_only", [True, False])
def test_labels_are_those_that_sft_builds(completion_only, tmp_path, student_dir, teacher_dir):
    rows = [{"prompt": f"{'why ' * (i % 3)}?", "completion": f" because of {i}"} for i in range(7)]
    cache = capture(rows, LocalTeacher(teacher_dir), tmp_path / "cache", targets=TopK(2), progress=False)
    own = cache.dataset()
    common = {"model": student_dir, "train_dataset": own, "processing_class": byte_tokenizer()}
    arguments = settings(tmp_path, completion_only_loss=completion_only)
    config = OfflineKDConfig(**arguments, allow_partial=not completion_only)  # prompts have no target here
    ours = OfflineKDTrainer(args=config, teacher_cache=cache, **common).train_dataset
    theirs = SFTTrainer(args=SFTConfig(**arguments), **common).train_dataset
    assert ours["labels"][:] == theirs["labels"][:]
    assert (-100 in ours["labels"][0]) == completion_only
    assert sorted(ours.column_names) == sorted(theirs.column_names)
    assert ours["teacher_index"][:] == own["teacher_index"][:]
