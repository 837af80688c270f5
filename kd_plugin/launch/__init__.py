"""Around a launch: its configuration files, the checks before it starts, and one model out of its checkpoints."""
