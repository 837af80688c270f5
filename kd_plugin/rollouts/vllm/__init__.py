"""vLLM generates for the student, on servers or in this process, with the weights of the present step.

engine.py is the engine: settings.py declares how it is reached, jobs.py says what is generated, pool.py asks servers
and in_process.py vLLM in this process; weights.py takes the student's weights there through files and transfer.py by
NCCL, and parity.py sees whether they arrived. ahead.py has the responses of later steps generated meanwhile.
"""
