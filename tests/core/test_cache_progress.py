"""Progress without a terminal: one line a minute, and one at the end."""

from kd_plugin.capturing import work


class Clock:
    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now


def test_one_line_a_minute_without_a_terminal(monkeypatch, capsys):
    clock = Clock()
    monkeypatch.setattr(work, "time", clock)
    with work.Progress(total=1000, done=100, shown=True, title="capture") as bar:
        for _ in range(600):  # ten minutes, an update a second
            clock.now += 1.0
            bar.advance(1, 50)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 11  # ten minutes and the end
    assert lines[0] == "capture: 160/1000 rows, 50 tokens/s, 14 min 0 s left"
    assert lines[-1] == "capture: 700/1000 rows, 50 tokens/s, 5 min 0 s left"
    assert "\r" not in "".join(lines)


def test_hours_are_hours_and_parts_of_rows_add_up(monkeypatch, capsys):
    clock = Clock()
    monkeypatch.setattr(work, "time", clock)
    with work.Progress(total=1000, done=0, shown=True, title="capture") as bar:
        for _ in range(4):  # four completions of one prompt
            clock.now += 15.0
            bar.advance(0.25, 1000)
    assert capsys.readouterr().err.splitlines()[0] == "capture: 1/1000 rows, 67 tokens/s, 16 h 39 min left"


def test_nothing_is_said_when_nothing_is_to_be(monkeypatch, capsys):
    with work.Progress(total=10, done=0, shown=False, title="capture") as bar:
        bar.advance(10, 10)
    with work.Progress(total=10, done=10, shown=True, title="capture"):
        pass
    assert capsys.readouterr().err == ""
