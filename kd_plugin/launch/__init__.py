"""Around a launch: its configuration files, the checks before it starts, and one model out of its checkpoints.

configs.py writes what launchers read, jobs/ what starts engines, servers and trainers on a cluster. servers.py asks the
servers of a run what it needs; preflight.py is what every trainer checks and doctor.py what ``kd-plugin doctor`` checks
on all ranks; checkpoints.py joins what the ranks saved.
"""
