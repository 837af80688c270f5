"""One rank of an evaluation of a student's own tasks; leaves what was measured."""

import json
from pathlib import Path

from tests.hosts.runs import work
from tests.hosts.test_eval_tasks import offline


def main(directory: str, student: str, cache: str) -> None:
    tasks = json.loads(Path(directory, "tasks.json").read_text())
    trainer = offline(Path(directory) / "run", student, cache, eval_tasks=tasks, eval_tasks_batch_size=4)
    found = trainer.evaluate()
    if trainer.accelerator.is_main_process:
        Path(directory, "report.json").write_text(json.dumps(found))


if __name__ == "__main__":
    work(main)
