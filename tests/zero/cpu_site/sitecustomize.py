"""Python imports this at its start: a rank of the shipped commands then uses gloo, on machines without GPUs."""

import os

if "RANK" in os.environ and os.environ.get("GLOO_FROM_THE_START") == "wanted":
    os.environ["GLOO_FROM_THE_START"] = "done"  # not again in what this rank starts

    from accelerate import PartialState

    PartialState(backend="gloo")
