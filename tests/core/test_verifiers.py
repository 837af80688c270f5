"""Verifiers: what each accepts, the one form of YAML, and programs that try to break out."""

import os
import signal
import time
from pathlib import Path

import pytest

from kd_plugin.errors import ConfigError, DataError
from kd_plugin.verifying import Limits, Verdict, make_verifier, run_checks, run_program
from kd_plugin.verifying.programs import extracted_program, read_checks


@pytest.mark.parametrize(
    ("given", "response", "row", "expected"),
    [
        ("exact", " 42\n", {"answer": "42"}, Verdict(True, 1.0)),
        ("exact", "it is 42", {"answer": "42"}, Verdict(False, 0.0, "wrong answer")),
        ("contains", "it is 42", {"answer": 42}, Verdict(True, 1.0)),
        ({"kind": "contains", "column": "gold"}, "it is 41", {"gold": "42"}, Verdict(False, 0.0, "wrong answer")),
        ({"kind": "regex", "pattern": r"Answer: (\d+)", "column": "answer"}, "Answer: 1 Answer: 42", {"answer": 42},
         Verdict(True, 1.0)),
        ({"kind": "regex", "pattern": r"Answer: (\d+)", "column": "answer"}, "Answer: 1", {"answer": 42},
         Verdict(False, 0.0, "wrong answer")),
        ({"kind": "regex", "pattern": r"Answer: (\d+)", "column": "answer"}, "42", {"answer": 42},
         Verdict(False, 0.0, "no answer")),
        ({"kind": "regex", "pattern": "^OK"}, "OK then", {}, Verdict(True, 1.0)),
        ("tests.core.cache_filters:short", "x" * 13, {}, Verdict(False, 0.0, "too long for us")),
        ({"kind": "function", "path": "tests.core.cache_filters:half", "threshold": 0.5}, "", {}, Verdict(True, 0.5)),
        ("tests.core.cache_filters:half", "", {}, Verdict(False, 0.5, "filtered")),
        (["contains", {"kind": "regex", "pattern": "^OK"}], "OK 42", {"answer": 42}, Verdict(True, 1.0)),
        (["contains", {"kind": "regex", "pattern": "^OK"}], "42", {"answer": 42}, Verdict(False, 0.0, "no answer")),
    ],
)  # fmt: skip
def test_each_kind_by_its_form_in_yaml(given, response, row, expected):
    assert make_verifier(given).verify(response, row) == expected


def test_mathematics_is_compared_by_meaning():
    pytest.importorskip("math_verify")
    for given in ("math_verify", {"kind": "math_verify", "column": "gold"}):
        row = {"answer": "\\frac{1}{2}", "gold": "0.5"}
        assert make_verifier(given).verify("so \\boxed{2/4}", row).passed
        assert make_verifier(given).verify("so \\boxed{2/5}", row) == Verdict(False, 0.0, "wrong answer")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("exakt", "Did you mean 'exact'"),
        ({"kind": "exakt"}, "kind is 'exakt'.*Did you mean 'exact'"),
        ({"kind": "regex"}, "regex needs pattern"),
        ({"kind": "regex", "pattern": "("}, "no regular expression"),
        ({"kind": "regex", "pattern": "x", "column": "answer"}, "has no group"),
        ({"kind": "tests", "second": 3}, "unknown key 'second'. Did you mean 'seconds'"),
        ({"kind": "tests", "seconds": 0}, "seconds=0"),
        ({"kind": "tests", "memory_mb": 1}, "memory_mb=1"),
        ("no_such_module_at_all:f", "cannot be imported.*PYTHONPATH"),
    ],
)
def test_what_cannot_be_is_refused_at_once(given, message):
    with pytest.raises(ConfigError, match=message):
        make_verifier(given)


FACTORIAL = "Here:\n```python\ndef f(n):\n    return 1 if n < 2 else n * f(n - 1)\n```\nDone."
STATEMENTS = ["assert f(3) == 6", "assert f(0) == 1", "assert f(5) == 120"]


def test_unit_tests_give_the_share_that_passes():
    verifier = make_verifier({"kind": "tests", "column": "tests"})
    assert verifier.verify(FACTORIAL, {"tests": STATEMENTS}) == Verdict(True, 1.0)
    assert verifier.verify(FACTORIAL, {"tests": "\n".join(STATEMENTS)}) == Verdict(True, 1.0)
    found = verifier.verify(FACTORIAL, {"tests": [*STATEMENTS, "assert f(2) == 3"]})
    assert found == Verdict(False, 0.75, "wrong answer")
    half = make_verifier({"kind": "tests", "threshold": 0.7})
    assert half.verify(FACTORIAL, {"tests": [*STATEMENTS, "assert f(2) == 3"]}) == Verdict(True, 0.75)


@pytest.mark.parametrize(
    "tests",
    [
        {"inputs": ["2 3\n", "1 1"], "outputs": ["5\n", "2"]},
        [{"input": "2 3", "output": "5"}, {"input": "1 1", "output": "2\n"}],
        '{"inputs": ["2 3", "1 1"], "outputs": ["5", "2"]}',
    ],
)
def test_whole_programs_are_compared_by_their_output(tests):
    verifier = make_verifier("tests")
    right = "a, b = map(int, input().split())\nprint(a + b)\nimport sys; sys.exit(0)"
    assert verifier.verify(right, {"tests": tests}) == Verdict(True, 1.0)
    assert verifier.verify("print(5)", {"tests": tests}) == Verdict(False, 0.5, "wrong answer")
    assert verifier.verify("print(", {"tests": tests}) == Verdict(False, 0.0, "crashed")


def test_a_row_without_tests_is_an_error():
    for tests in ("", [], {"inputs": ["1"], "outputs": []}, {"inputs": ["1"], "outputs": ["1"], "fn_name": "f"}, 3):
        with pytest.raises(DataError, match="holds no tests"):
            make_verifier("tests").verify("x", {"tests": tests})
    with pytest.raises(DataError, match="column 'tests'"):
        make_verifier("tests").verify("x", {})


def test_the_last_fenced_block_is_the_program():
    assert extracted_program("```python\na\n```\nno:\n```py\nb\nc\n```") == "b\nc"
    assert extracted_program("print(1)") == "print(1)"
    assert len(read_checks('["assert 1", "assert 2"]', "t")) == 2


# Each must leave the world as it is, and be no pass. {port}, {file} and {pid} are of this test's own process.
HOSTILE = {
    "network": "import socket; socket.create_connection(('127.0.0.1', {port}))",
    "raw socket call": "import ctypes; s = ctypes.CDLL(None).socket(2, 1, 0); assert s >= 0",
    "child by fork": "import os; os.fork()",
    "child by subprocess": "import subprocess; subprocess.run(['/bin/true'])",
    "fork bomb": "import os\nwhile True: os.fork()",
    "child by vfork in C": "import ctypes; assert ctypes.CDLL(None).vfork() >= 0",
    "exec": "import os; os.execv('/bin/true', ['true'])",
    "overwrite": "open({file!r}, 'w').write('gone')",
    "append in place": "import os; os.write(os.open({file!r}, os.O_RDWR), b'gone')",
    "delete": "import os; os.unlink({file!r})",
    "rename": "import os; os.rename({file!r}, {file!r} + '2')",
    "truncate": "import os; os.truncate({file!r}, 0)",
    "change mode": "import os; os.chmod({file!r}, 0)",
    "new file": "open({file!r} + '.new', 'x')",
    "new directory": "import os; os.mkdir({file!r} + '.d')",
    "signal to its starter": "import os; os.kill({pid}, 10)",
    "signal to all": "import os; os.kill(-1, 9)",
    "signal by descriptor": "import os, signal; signal.pidfd_send_signal(os.pidfd_open({pid}), 10)",
    "signal by owner of a pipe": (
        "import fcntl, os\nr, w = os.pipe()\nfcntl.fcntl(r, 8, {pid})\nfcntl.fcntl(r, 10, 10)\n"
        "fcntl.fcntl(r, fcntl.F_SETFL, os.O_ASYNC)\nos.write(w, b'x')"
    ),
    "limits of its starter": "import resource; resource.prlimit({pid}, resource.RLIMIT_NOFILE, (3, 3))",
    "raise its own limits": "import resource; resource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40))",
    "trace its starter": "import ctypes; assert ctypes.CDLL(None).ptrace(16, {pid}, 0, 0) == 0",
    "memory of its starter": "open('/proc/{pid}/mem', 'r+b')",
    "priority of others": "import os; os.setpriority(os.PRIO_PROCESS, {pid}, 19)",
    "mount": "import ctypes; assert ctypes.CDLL(None).mount(b'x', b'/', b'tmpfs', 0, 0) == 0",
    "namespace": "import ctypes; assert ctypes.CDLL(None).unshare(0x10000000) == 0",
    "io_uring": "import ctypes; assert ctypes.CDLL(None).syscall(425, 8, ctypes.create_string_buffer(200)) >= 0",
    "shared memory": "import ctypes; assert ctypes.CDLL(None).shmget(7, 4096, 0o1600) >= 0",
    "memory": "x = bytearray(4 << 30)",
    "time": "while True: pass",
    "sleep": "import time; time.sleep(60)",
    "deep recursion": "def f(): return f()\nf()",
    "endless output": "while True: print('x' * 4096)",
    "threads without end": "import threading as t, time\nwhile True: t.Thread(target=time.sleep, args=(60,)).start()",
    "end as if all were well": "import os; os._exit(0)",
    "exit as if all were well": "import sys; sys.exit(0)",
    "print marks": "print('+' * 3); import os; os._exit(0)",
    "marks into every descriptor": (
        "import os\nfor d in range(64):\n    try: os.write(d, b'+++')\n    except OSError: pass\nos._exit(0)"
    ),
    "kill itself": "import os; os.kill(os.getpid(), 9)",
    "forbidden stack": "import ctypes; ctypes.string_at(0)",
}  # fmt: skip


@pytest.fixture
def world(tmp_path):
    """A file, a listening socket and this process, which no program may touch."""
    import socket

    file = tmp_path / "kept.txt"
    file.write_text("kept")
    signals = []
    before = signal.signal(signal.SIGUSR1, lambda *_: signals.append(1))
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.05)
        yield {"file": str(file), "port": server.getsockname()[1], "pid": os.getpid()}
        with pytest.raises(TimeoutError):
            server.accept()
    signal.signal(signal.SIGUSR1, before)
    assert not signals
    assert file.read_text() == "kept" and [p.name for p in tmp_path.iterdir()] == ["kept.txt"]
    assert file.stat().st_mode & 0o600 == 0o600


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_program_does_no_harm_and_passes_nothing(name, world):
    program = HOSTILE[name].format(**world)
    began = time.monotonic()
    outcome = run_checks(program, read_checks(["assert True"] * 3, "t"), Limits(seconds=1.5, memory_mb=512))
    assert outcome.passed == 0 and outcome.reason in ("crashed", "timeout", "memory"), outcome
    assert time.monotonic() - began < 6
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    assert not [c for c in children if "confined" in Path(f"/proc/{c}/cmdline").read_text()]


def test_an_ordinary_computation_is_not_in_its_way():
    program = (
        "import collections, heapq, itertools, math, random, re, sys, threading, fractions, decimal, datetime\n"
        "import numpy as np\n"
        "t = threading.Thread(target=print, args=('from a thread',)); t.start(); t.join()\n"
        "print(np.linalg.norm(np.ones((3, 4)) @ np.ones((4, 5))), math.comb(50, 25), open('/proc/self/stat').read(1))\n"
        "print(sum(int(line) for line in sys.stdin))\n"
    )
    ran = run_program(program, "1\n2\n3\n", Limits(seconds=20, memory_mb=2048))
    assert ran.ended == "done", ran
    assert ran.output.splitlines()[0] == "from a thread" and ran.output.splitlines()[-1] == "6"


def test_secrets_of_this_process_are_not_in_its_environment(monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret")
    assert "secret" not in run_program("import os; print(dict(os.environ))").output
