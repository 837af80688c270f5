"""What a fake vLLM server does with weights that are sent to it, tensor by tensor, as vLLM 0.32 takes them."""

import queue

import torch


class Inbox:
    """What is sent to one server, by a group in this process."""

    def __init__(self):
        self._sent = queue.Queue()

    def put(self, tensor):
        self._sent.put(tensor.clone())

    def close(self):
        self._sent.put(None)

    def broadcast(self, tensor, src):
        sent = self._sent.get(timeout=20)
        if sent is None:
            raise RuntimeError("the group was closed")
        assert sent.shape == tensor.shape and sent.dtype == tensor.dtype and src == 0
        tensor.copy_(sent)


@torch.no_grad()
def _receive(model, body, behaviour):
    """Take the weights that are sent, in the order in which they are described, as ``/update_weights`` does."""
    told, parameters = body["update_info"], dict(model.named_parameters(remove_duplicate=False))
    assert behaviour.updating, "no update was started"
    for name, dtype, shape in zip(told["names"], told["dtype_names"], told["shapes"], strict=True):
        if behaviour.received == behaviour.breaks_at:
            raise RuntimeError("the worker died")
        tensor = torch.empty(shape, dtype=getattr(torch, dtype))
        behaviour.transfer.broadcast(tensor, src=0)
        behaviour.received += 1
        if behaviour.forgets is None or not behaviour.forgets(name):
            parameters[name].data.copy_(tensor)


def _open(model, body, behaviour):
    told = body["init_info"]
    assert set(told) <= {"master_address", "master_port", "rank_offset", "world_size", "packed"}, "unknown to vLLM 0.32"
    if behaviour.joins is not None:
        behaviour.transfer = behaviour.joins(**told)


def _start(model, body, behaviour):
    assert not behaviour.updating
    behaviour.updating = True


def _finish(model, body, behaviour):
    assert behaviour.updating
    behaviour.updating = False


TRANSFERS = {
    "/init_weight_transfer_engine": _open,
    "/start_weight_update": _start,
    "/update_weights": _receive,
    "/finish_weight_update": _finish,
}
