"""A run's logs as one page: every logged value is on it, from either host, and it asks nobody."""

import json
import re
from xml.etree import ElementTree

import pytest

from kd_plugin.cli.main import main
from kd_plugin.errors import ConfigError
from kd_plugin.monitor.report import read_logs, report

HISTORY = [
    {"step": 1, "loss": 2.0, "divergence/math": 0.5, "completions/mean_length": 20.0, "alarm": 0, "epoch": 0.1},
    {"step": 2, "loss": "1.5", "divergence/math": 0.25, "rollouts/repetition": 0.1, "divergence/code": 1.0},
    {"step": 2, "eval_loss": 1.25, "eval_runtime": 3.0, "grad_norm": float("nan")},
]


def run(tmp_path, *histories):
    for number, history in enumerate(histories, 1):
        (tmp_path / f"checkpoint-{number}").mkdir(parents=True)
        (tmp_path / f"checkpoint-{number}" / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    return tmp_path


def test_logs_of_the_latest_checkpoint(tmp_path):
    logs = read_logs(run(tmp_path, HISTORY[:1], HISTORY))
    assert logs["loss"] == [(1, 2.0), (2, 1.5)] and logs["divergence/code"] == [(2, 1.0)]
    assert "epoch" not in logs and "eval_runtime" not in logs


def test_logs_of_lightning(tmp_path):
    (tmp_path / "version_0").mkdir()
    (tmp_path / "version_0" / "metrics.csv").write_text("epoch,kd_loss,step\n0,1.5,0\n0,,1\n0,1.0,2\n")
    assert read_logs(tmp_path) == {"kd_loss": [(0, 1.5), (2, 1.0)]}


def test_every_value_is_on_the_page_and_nothing_is_asked_for(tmp_path, capsys):
    place = run(tmp_path / "out", HISTORY)
    assert main(["report", str(place), "-o", str(tmp_path / "r.html")]) == 0
    assert "8 logged values" in capsys.readouterr().out
    text = (tmp_path / "r.html").read_text()
    for said in ("loss <b>1.5</b>", "eval_loss <b>1.25</b>", "divergence/code <b>1</b>", "Response length", "Guards"):
        assert said in text
    assert "<script" not in text and not re.search(r"(src|href)=", text)
    for chart in re.findall(r"<svg.*?</svg>", text, re.S):
        ElementTree.fromstring(chart)


def test_a_value_that_is_not_finite_is_said_and_not_drawn(tmp_path):
    nan, after = float("nan"), [{"step": 3, "loss": float("inf")}, {"step": 4, "loss": float("nan")}]
    logs = read_logs(run(tmp_path, [*HISTORY, *after]))
    assert logs["loss"][2] == (3, float("inf"))
    text = report(logs, "run")
    assert "loss <b>nan</b> (2 not finite, first at 3)" in text and "grad_norm <b>nan</b> (1 not finite" in text
    assert not re.search(r'(points|cy|d|y)="[^"]*(nan|inf)', text)
    assert "Gradient norm" in report({"grad_norm": [(1, nan)]}, "run")


def test_lines_stay_within_their_chart():
    logs = {"loss": [(k, (-1.7) ** k) for k in range(9)], "x": [(3, 7.0)], "same": [(0, 2.0), (5, 2.0)]}
    text = report(logs, "<b>")
    assert "<b></title>" not in text
    spots = [spot.split(",") for line in re.findall(r'points="([^"]*)"', text) for spot in line.split()]
    assert len(spots) == 11 and all(62 <= float(x) <= 550 and 10 <= float(y) <= 200 for x, y in spots)


@pytest.mark.parametrize("content", [None, "{", '{"log_history": 3}', "[]"])
def test_what_is_no_log_is_refused(content, tmp_path):
    if content is not None:
        (tmp_path / "trainer_state.json").write_text(content)
    with pytest.raises(ConfigError, match=r"holds no logs|cannot be read"):
        read_logs(tmp_path)
