"""``kd-plugin doctor --launch`` on two ranks, and the comparison that names the odd one."""

import subprocess
import sys

from kd_plugin.cli.main import main
from kd_plugin.zero.launch_check import disagreements
from tests.zero.ranks import CHECKOUT, environment, free_port


def doctor(*arguments):
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port())]
    command = [*launch, "-m", "kd_plugin", "doctor", "--launch", *arguments]
    return subprocess.run(command, env=environment(), cwd=CHECKOUT, capture_output=True, text=True, timeout=200)


def test_a_good_launch_is_good(tmp_path, teacher_dir):
    done = doctor("--output_dir", str(tmp_path / "out"), "--teachers", f"[{teacher_dir}]")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 ranks: good" in done.stdout
    assert list((tmp_path / "out").iterdir()) == []


def test_what_a_rank_lacks_is_named_with_the_rank(tmp_path):
    done = doctor("--output_dir", str(tmp_path), "--servers", "[http://127.0.0.1:9]", "--disk_gib", "1e9")
    assert done.returncode != 0
    for rank in (0, 1):
        assert f"rank {rank} on" in done.stderr
    assert "the server http://127.0.0.1:9 does not answer" in done.stderr
    assert "1e+09 are needed" in done.stderr


def test_the_rank_that_differs_is_named():
    said = {"rank 0": {"torch": "2.13"}, "rank 1": {"torch": "2.12"}, "rank 2": {"torch": "2.13"}}
    assert disagreements(said) == ["rank 1: torch is 2.12; most ranks have 2.13"]
    assert disagreements({"rank 0": {"a": "1"}, "rank 1": {"a": "1"}}) == []


def test_outside_a_launcher_it_says_how_to_run_it(capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert main(["doctor", "--launch"]) == 1
    assert "torchrun" in capsys.readouterr().err
    assert main(["doctor"]) == 1
