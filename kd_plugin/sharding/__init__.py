"""Models whose weights are sharded over ranks: gathering parameters, offloading, teachers that are never trained.

gathering.py is what every rank does together; running.py is a teacher that is sharded and a student that generates
while its weights are.
"""
