"""A process of several ranks ends without an abort, however late Gloo's threads are.

The moment between "the collective is over" and "its tensors are dropped" lasts microseconds. A library that is loaded
before all others makes it last as long as a test wants: Gloo's thread stays busy after it has told the waiters.
"""

import shutil
import subprocess
import sys

import pytest

pytestmark = pytest.mark.zero

LATE = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <time.h>

static void stay_busy(void) {
    char name[17] = {0};
    prctl(PR_GET_NAME, name);
    if (!strstr(name, "gloo")) return;
    long most = atol(getenv("BUSY_MS"));
    struct timespec start, now;
    clock_gettime(CLOCK_MONOTONIC, &start);
    do clock_gettime(CLOCK_MONOTONIC, &now);
    while ((now.tv_sec - start.tv_sec) * 1000 + (now.tv_nsec - start.tv_nsec) / 1000000 < most);
}

#define LATE(name) \
    int name(pthread_cond_t *waiters) { \
        static int (*real)(pthread_cond_t *); \
        if (!real) real = dlvsym(RTLD_NEXT, #name, "GLIBC_2.3.2"); \
        int result = real(waiters); \
        stay_busy(); \
        return result; \
    }
LATE(pthread_cond_broadcast)
LATE(pthread_cond_signal)
"""

RANK = """
import sys, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from kd_plugin.sharding import close_process_group
store, rank, ending = sys.argv[1], int(sys.argv[2]), sys.argv[3]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
model = DistributedDataParallel(torch.nn.Linear(4, 4))
values = torch.ones(1024)
work = dist.all_reduce(values, async_op=True)
work.wait()
del values, work
dist.destroy_process_group() if ending == "destroyed" else close_process_group()
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    compiler = shutil.which("cc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("needs Linux and a C compiler")
    directory = tmp_path_factory.mktemp("late")
    (directory / "late.c").write_text(LATE)
    command = [compiler, "-shared", "-fPIC", "-O1", "late.c", "-o", "late.so", "-ldl"]
    subprocess.run(command, cwd=directory, check=True)
    return directory / "late.so"


def aborts(library, directory, ending, monkeypatch):
    monkeypatch.setenv("LD_PRELOAD", str(library))
    found = []
    for milliseconds in (3, 5, 10, 20, 30, 60, 90, 120, 150, 200):  # a fast machine ends soon
        monkeypatch.setenv("BUSY_MS", str(milliseconds))
        store = directory / f"{ending}-{milliseconds}"
        ranks = [
            subprocess.Popen(
                [sys.executable, "-c", RANK, str(store), str(rank), ending], stderr=subprocess.PIPE, text=True
            )
            for rank in (0, 1)
        ]
        found += [said for rank in ranks if "active exception" in (said := rank.communicate(timeout=300)[1])]
        assert all(rank.returncode == 0 for rank in ranks) or found
        if found:
            break
    return found


def test_closing_waits_for_late_threads_where_destroying_the_group_alone_aborts(library, tmp_path, monkeypatch):
    assert aborts(library, tmp_path, "destroyed", monkeypatch), "the fault was not provoked, so nothing was shown"
    assert not aborts(library, tmp_path, "closed", monkeypatch)
