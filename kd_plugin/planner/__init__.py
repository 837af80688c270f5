"""What a run needs, before it is started: memory, time and cost, from the shape of its models.

settings.py is what to plan, run.py the run and its machines, and whether training would take each teacher;
architectures.py has the models' shapes, and memory.py, time.py and cost.py the arithmetic.
"""
