"""Models whose weights are sharded over ranks: gathering parameters, offloading, teachers that are never trained."""
