"""The ``kd-plugin`` command: main.py dispatches to the functions of the other files, config.py reads their settings."""
