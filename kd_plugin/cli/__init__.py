"""The ``kd-plugin`` command: main.py dispatches to the functions of the other files and reads their settings."""
