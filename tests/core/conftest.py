import pytest


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    """Keep the tests off the network: names such as org/model may exist there one day."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
