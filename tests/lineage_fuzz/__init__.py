"""Fuzzing of every file that lineage reads from strangers and users; `make fuzz SECONDS=600` runs it for long."""
