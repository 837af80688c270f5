"""One gloo rank that scores with teachers cut by FSDP2, and whole; writes how far apart they are."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy

from kd_plugin import LocalTeacher
from kd_plugin.sharding import gathered_heads, shard_with_fsdp2, through

# Pinning asks for a GPU
POLICIES = {"on the device": OffloadPolicy(), "in host memory": CPUOffloadPolicy(pin_memory=False)}


def main() -> None:
    """Read the teachers' directories from the command line; the last argument is where reports go."""
    *directories, out = sys.argv[1:]
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(rank)  # each rank scores rows of its own
    ids = torch.randint(0, 200, (2, 6))
    positions = torch.tensor([0, 3, 8])
    report = {}
    for directory in directories:
        for name, policy in POLICIES.items():
            whole, cut = (LocalTeacher(directory, dtype="float32", name="a") for _ in range(2))
            shard_with_fsdp2(cut.model, reshard_after_forward=True, offload_policy=policy)
            cut.attach(through(cut.model, cut.model))
            with gathered_heads([whole.head, cut.head]) as heads, torch.no_grad():
                signals = [t.score(ids, torch.ones_like(ids), positions) for t in (whole, cut)]
                logits = [s.hidden @ head.weight.T for s, head in zip(signals, heads, strict=True)]
            held = sum(p.to_local().numel() for p in cut.model.parameters())
            report[f"{Path(directory).name} {name}"] = {
                "apart": (logits[0] - logits[1]).abs().max().item(),
                "largest": logits[0].abs().max().item(),
                "held": held / sum(p.numel() for p in whole.model.parameters()),
                "sharded": cut.is_sharded,
            }
    Path(out, f"rank{rank}.json").write_text(json.dumps(report))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
