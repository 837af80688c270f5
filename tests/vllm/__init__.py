"""Tests against a real vLLM server; `make test-vllm` makes its environment and runs them."""
