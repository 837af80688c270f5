"""The ``kd-plugin`` command: ``main`` dispatches, every other module is one command with ``main(argv) -> int``."""
