"""One rank of a large world, alone: DeepSpeed really cuts and asks for collectives, which a fake backend answers.

Torch's fake process group returns from every collective at once. What comes back is not what other ranks hold, so the
numbers that are computed mean nothing; the sizes that are kept and sent are those of the real world.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(job["ranks"])}

    from tests.zero.counting import Sent

    sent = Sent()
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", rank=0, world_size=job["ranks"], store=FakeStore())
    import deepspeed
    import deepspeed.comm.torch

    # DeepSpeed 0.19.8 would compile an operation for ranks of one machine that share memory; there are none
    deepspeed.comm.torch.build_shm_op = lambda: None
    deepspeed.init_distributed("fake", auto_mpi_discovery=False)
    found: dict[str, Any] = {}
    for stage in job["stages"]:
        sent.total.clear()
        sent.steps.clear()
        found[stage] = train(stage, job["config"][stage], job["accumulation"], sent)
    Path(sys.argv[1]).with_name("found.json").write_text(json.dumps(found))


def train(stage: str, config: dict, accumulation: int, sent: Any) -> dict[str, Any]:
    import deepspeed

    from tests.zero.counting import COUNTED_STEP, Held

    model = Student()
    decayed = [p for p in model.parameters() if p.dim() > 1]
    kept = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": kept, "weight_decay": 0.0}]
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(groups, lr=1e-4), config=config)
    held = Held(engine, sent.end_step)
    for _ in range((COUNTED_STEP + 1) * accumulation):
        engine.backward(engine(torch.randint(0, 259, (1, 16))))
        engine.step()
    return {**held.found, "sent": sent.of_step(COUNTED_STEP + 1)}


class Student(torch.nn.Module):
    """A tiny Llama with the panel's fused loss against one teacher."""

    def __init__(self) -> None:
        super().__init__()
        from tests.tiny import tiny_llama

        self.llama = tiny_llama(**SHAPE)
        self.llama.train()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        from kd_plugin.divergence import Divergence, PanelGroup, TeacherTerm, fused_panel_divergence
        from kd_plugin.signals import HiddenSignal, OutputHead

        hidden = self.llama.model(input_ids=ids, use_cache=False).last_hidden_state[0]
        teacher = HiddenSignal(torch.randn(hidden.shape[0], 8), OutputHead(torch.randn(259, 8)))
        head = OutputHead.from_model(self.llama)
        group = PanelGroup(None, (TeacherTerm(teacher),))
        return fused_panel_divergence(hidden, head, [group], Divergence()).loss_sum


SHAPE = {"hidden": 64, "layers": 4, "tied": False}

if __name__ == "__main__":
    main()
