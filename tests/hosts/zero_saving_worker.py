"""One of two ranks that train under ZeRO-3 and save, for ``test_lineage_zero.py``."""

import os
import sys

from kd_plugin.sharding import close_process_group


def main(student: str, output: str, gather: str) -> None:
    os.environ |= {"DS_ACCELERATOR": "cpu", "ACCELERATE_USE_DEEPSPEED": "true"}
    from accelerate import PartialState

    PartialState(backend="gloo")  # before TRL looks at the world

    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from kd_plugin.lineage import RunLineage
    from kd_plugin.trl import LicenseLineageCallback

    written = []
    write = RunLineage.write

    def counting(self, directory, **kwargs):
        written.append(str(directory))
        write(self, directory, **kwargs)

    RunLineage.write = counting
    zero = {
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": False,
            "stage3_param_persistence_threshold": 0,
            "stage3_gather_16bit_weights_on_model_save": gather == "consolidated",
        },
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": False},
        "train_micro_batch_size_per_gpu": "auto",
        "train_batch_size": "auto",
        "gradient_accumulation_steps": "auto",
    }
    callback = LicenseLineageCallback(lineage={"run": {"id": "zero-run", "date": "2026-01-02"}})
    trainer = SFTTrainer(
        model=student,
        args=SFTConfig(
            output_dir=output,
            deepspeed=zero,
            accelerator_config={"use_configured_state": True},
            bf16=False,
            max_steps=2,
            save_steps=2,
            save_strategy="steps",
            per_device_train_batch_size=2,
            gradient_checkpointing=False,
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list([{"prompt": "a?", "completion": f" b{i}"} for i in range(8)]),
        callbacks=[callback],
    )
    callback.attach(trainer)
    trainer.train()
    trainer.save_model(f"{output}/final")
    with open(f"{output}/rank-{os.environ['RANK']}.txt", "w") as file:
        file.write("\n".join(written))


if __name__ == "__main__":
    main(*sys.argv[1:])
    close_process_group()
