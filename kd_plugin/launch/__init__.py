"""Around a launch: its configuration files, the checks before it starts, and one model out of its checkpoints.

configs.py writes what launchers read; preflight.py is what every trainer checks and doctor.py what ``kd-plugin doctor``
checks on all ranks; checkpoints.py joins what the ranks saved.
"""
