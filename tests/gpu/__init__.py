"""What only a GPU can show, in one command and one file of results: `make gpu`, see docs/performance.md."""
