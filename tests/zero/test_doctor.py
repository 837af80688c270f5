"""``kd-plugin doctor --launch`` on two ranks, and the comparison that names the odd one."""

import json
import shutil
import subprocess
import sys

import pytest

from kd_plugin.cli.main import main
from kd_plugin.errors import ConfigError
from kd_plugin.launch.doctor import LaunchSettings, disagreements, with_plan
from tests.zero.cluster import ADDRESSES
from tests.zero.ranks import CHECKOUT, environment, free_port


@pytest.fixture(autouse=True)
def own_ops(monkeypatch, tmp_path):
    """Have a directory of ops that no other test builds in: doctor speaks of a lock that a killed one left there."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "ops"))


def doctor(*arguments):
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port())]
    command = [*launch, "-m", "kd_plugin", "doctor", "--launch", *arguments]
    return subprocess.run(command, env=environment(), cwd=CHECKOUT, capture_output=True, text=True, timeout=600)


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
    assert main(["doctor", "--launch"]) == 2
    assert "torchrun" in capsys.readouterr().err
    assert main(["doctor", "--teachers", "[math]"]) == 2
    assert "add --launch" in capsys.readouterr().err


def test_alone_it_checks_this_machine(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert main(["doctor"]) == 0
    assert capsys.readouterr().out == "this machine: good\n"
    (tmp_path / "cpu_adam").mkdir()
    (tmp_path / "cpu_adam" / "lock").touch()
    assert main(["doctor", "--disk_gib", "1e9"]) == 1
    said = capsys.readouterr()
    assert said.out == "this machine: 2 problems\n"
    assert f"delete {tmp_path / 'cpu_adam' / 'lock'}" in said.err and "1e+09 are needed" in said.err


def test_a_node_with_a_directory_a_teacher_and_a_cache_of_its_own_is_named(tmp_path, teacher_dir):
    """Two agents whose relative paths lead to different places, as on nodes without a shared disk."""
    agents, port = [], str(free_port())
    for rank in range(2):
        node = tmp_path / f"node{rank}"
        shutil.copytree(teacher_dir, node / "teacher")
        (node / "cache").mkdir()
        (node / "out" / "run").mkdir(parents=True)
        (node / "cache" / "manifest.json").write_text(f"{{}}{rank * ' '}")
        launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1"]
        launch += ["--node_rank", str(rank), "--master_addr", "127.0.0.1", "--master_port", port]
        command = [*launch, "-m", "kd_plugin", "doctor", "--launch", "--output_dir", "out/run"]
        command += ["--teachers", "[teacher]", "--caches", "[cache]"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        agents.append((command, node, pipes))
    config = tmp_path / "node1" / "teacher" / "config.json"
    config.write_text(config.read_text() + " ")
    running = [subprocess.Popen(c, env=environment(), cwd=node, **pipes) for c, node, pipes in agents]
    output, errors = running[0].communicate(timeout=600)
    running[1].communicate(timeout=600)
    assert [process.returncode for process in running] == [1, 1]
    said = [line for line in errors.splitlines() if line.startswith("rank ")]
    assert "3 problems" in output and len(said) == 3 and all(line.startswith("rank 1 on ") for line in said), errors
    for what in ("teacher teacher is", "cache cache is", "output_dir out/run is not the directory that rank 0 sees"):
        assert any(what in line for line in said)
    assert list((tmp_path / "node0" / "out" / "run").iterdir()) == []


@pytest.mark.zero
@pytest.mark.parametrize(
    ("mount", "problem"),
    [
        (None, None),
        ("mount -t tmpfs none {}", "is not the directory that rank 0 sees; it must be shared"),
        ("mount --bind {0} {0} && mount -o remount,ro,bind {0}", "cannot be written to: Read-only file system"),
    ],
    ids=["good", "another disk", "read-only"],
)
def test_on_two_nodes_the_one_whose_directory_differs_is_named(mount, problem, nodes, tmp_path):
    """Each node is a network namespace; what the second mounts at the shared path, it alone sees."""
    out = tmp_path / "out"
    out.mkdir()
    running = []
    for rank, (name, end) in enumerate(nodes):
        launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1"]
        launch += ["--node_rank", str(rank), "--master_addr", ADDRESSES[0], "--master_port", "29511"]
        command = [*launch, "-m", "kd_plugin", "doctor", "--launch", "--output_dir", str(out)]
        inside = ["ip", "netns", "exec", name]
        if mount and rank == 1:
            inside += ["sh", "-c", f'{mount.format(out)} && exec "$@"', "node"]
            tried = subprocess.run([*inside, "true"], capture_output=True, text=True)
            if tried.returncode:
                pytest.skip(f"mounting is not permitted here: {tried.stderr.strip()}")
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        where = environment(GLOO_SOCKET_IFNAME=end)
        running.append(subprocess.Popen([*inside, *command], env=where, cwd=CHECKOUT, **pipes))
    try:
        output, errors = running[0].communicate(timeout=600)
        other = running[1].communicate(timeout=600)[1]
    finally:
        for process in running:
            process.kill()
    said = [line for line in errors.splitlines() if line.startswith("rank ")]
    assert [process.returncode != 0 for process in running] == [problem is not None] * 2, errors + other
    if problem is None:
        assert "2 ranks: good" in output and not said
    else:
        assert "2 ranks: 1 problem\n" in output and len(said) == 1, errors
        assert said[0].startswith("rank 1 on ") and said[0].endswith(problem)
    assert list(out.iterdir()) == []


def test_a_plan_says_what_must_be_free(tmp_path, capsys):
    asked = ["plan", "--student", "Qwen/Qwen2.5-0.5B", "--method", "offline", "--json"]
    assert main(asked) == 0
    text = capsys.readouterr().out
    (tmp_path / "plan.json").write_text(text)
    plan = json.loads(text)
    best = next(option for option in plan["options"] if option["name"] == plan["recommended"])
    settings = with_plan(LaunchSettings(plan=str(tmp_path / "plan.json"), disk_gib=1.0))
    assert settings.memory_gib == best["memory"]["peak"] / 1024**3 > 0
    assert settings.disk_gib == 1.0
    (tmp_path / "plan.json").write_text(json.dumps({**plan, "recommended": None}))
    with pytest.raises(ConfigError, match="is no plan that fits"):
        with_plan(LaunchSettings(plan=str(tmp_path / "plan.json")))
