"""Another day, for chat templates that print it."""

import datetime


def set_today(monkeypatch, day: str) -> None:
    """Let transformers' templates and ours take ``day`` (ISO 8601) for now."""

    class Frozen(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls.fromisoformat(day)

    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Frozen)
    monkeypatch.setattr("kd_plugin.cache.templates.datetime", Frozen)
