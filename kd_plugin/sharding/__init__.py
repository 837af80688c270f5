"""Models whose weights are sharded over ranks: gathering parameters, offloading, teachers that are never trained.

gathering.py is what every rank does together; inference.py shards a teacher; generation.py is the student that
generates while its weights are sharded.
"""
