"""TRL's own trainer tests, run on TRL's classes and on ours: ``make test-peers TRL=path``; see CONTRIBUTING.md."""
