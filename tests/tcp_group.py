"""A group that broadcasts tensors through a TCP store, in the place of NCCL, which needs GPUs."""

from datetime import timedelta

import torch


class TcpGroup:
    """What ``PyNcclCommunicator`` is to vLLM's weight transfer: member 0 sends, the others receive in its order.

    Args:
        address: of member 0.
        port: on it.
        rank: of this member.
        members: how many there are; the store opens when all are.
    """

    def __init__(self, address, port, rank, members):
        self._store = torch.distributed.TCPStore(address, port, members, rank == 0, timedelta(seconds=60))
        self._rank, self._number = rank, 0

    def broadcast(self, tensor, src, stream=None):
        """Send or receive as many bytes as the tensor has, from its first: NCCL asks for no more."""
        assert tensor.is_contiguous() and src == 0
        key, self._number = f"tensor {self._number}", self._number + 1
        there = tensor.reshape(-1).view(torch.uint8)
        if self._rank == src:
            # Of a copy: a storage that NumPy has seen cannot be freed, as FSDP2 frees what it gathered
            self._store.set(key, there.clone().numpy().tobytes())
            return
        sent = torch.frombuffer(bytearray(self._store.get(key)), dtype=torch.uint8)
        assert len(sent) == len(there), f"{key}: {len(sent)} bytes were sent, and {len(there)} are expected"
        there.copy_(sent)
