"""What a run needs, before it is started: memory, time and cost, from the shape of its models.

run.py is the run and its machines, architectures.py the models' shapes; memory.py, time.py and cost.py are the
arithmetic; pairs.py says whether training would take a teacher beside the student.
"""
