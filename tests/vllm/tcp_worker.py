"""Loaded into a vLLM worker by ``--worker-extension-cls``: its weight transfer joins a TCP group in NCCL's place.

All else is vLLM's own: the routes, what they parse, the order of calls, and how what comes is loaded.
"""

import torch
import vllm.distributed.weight_transfer.nccl_engine as nccl_engine

from tests.tcp_group import TcpGroup


def _join(info, parallel):
    rank = info.rank_offset + parallel.data_parallel_index * parallel.world_size + parallel.rank
    return TcpGroup(info.master_address, info.master_port, rank, info.world_size)


nccl_engine.worker_init_process_group = _join
torch.cuda.current_stream = lambda *_: None


class Worker:
    """Adds nothing to a worker."""
