"""One of two nodes that write one checkpoint, for ``test_lineage_sharing.py``: it notes what it hashes."""

import functools
import os
import sys
import time

from kd_plugin.sharding import close_process_group


def main(student: str, output: str) -> None:
    from accelerate import PartialState

    PartialState(cpu=True, backend="gloo")

    from datasets import Dataset
    from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments

    from kd_plugin.lineage import hashing, proof
    from kd_plugin.trl import LicenseLineageCallback

    hashed = []
    sha256_file = hashing.sha256_file

    def slowly(path):
        hashed.append(path.name)
        time.sleep(0.3)  # as large files take their time
        return sha256_file(path)

    proof.sha256_file = slowly
    proof.LARGE = 0
    original = PreTrainedModel.save_pretrained
    PreTrainedModel.save_pretrained = functools.wraps(original)(
        lambda self, place, **kwargs: original(self, place, **{**kwargs, "max_shard_size": "8KB"})
    )
    model = AutoModelForCausalLM.from_pretrained(student)
    rows = [{"input_ids": [1, 2, 3, 4], "labels": [1, 2, 3, 4]} for _ in range(8)]
    arguments = TrainingArguments(
        output, max_steps=2, save_strategy="steps", save_steps=1, per_device_train_batch_size=1, use_cpu=True,
        bf16=False, report_to="none", disable_tqdm=True,
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=Dataset.from_list(rows), callbacks=[LicenseLineageCallback()]).train()
    with open(f"{output}/hashed-{os.environ['RANK']}.txt", "w") as file:
        file.write("\n".join(hashed))


if __name__ == "__main__":
    main(*sys.argv[1:])
    close_process_group()
