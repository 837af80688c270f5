"""Around a launch: its configuration files, the checks before it starts, and one model out of its checkpoints.

configs.py writes what launchers read. parts.py says what a run with engines and servers is made of, and jobs.py writes
it for Slurm (slurm.py) and Kubernetes (kubernetes.py). servers.py asks the servers of a run what it needs; preflight.py
is what every trainer checks and doctor.py what ``kd-plugin doctor`` checks on all ranks; checkpoints.py joins what the
ranks saved.
"""
