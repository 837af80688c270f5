"""Where users find :func:`~kd_plugin.launch.checkpoints.to_huggingface`, which itself needs no Lightning."""

from kd_plugin.launch.checkpoints import to_huggingface

__all__ = ["to_huggingface"]
