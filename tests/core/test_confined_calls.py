"""The filter of system calls on both machines: its numbers against other people's tables, its decisions on each call.

The program for a machine that is not this one cannot run here, so its instructions are computed as the kernel does.
"""

import ctypes
import ctypes.util
import errno
import os
import re
import struct
from pathlib import Path

import pytest

from kd_plugin.verifying import confined
from kd_plugin.verifying.confined import SYSTEM_CALLS

PID = 4242
SOME_ARGUMENTS = ("openat", "clone", "fcntl", "prlimit64", "kill", "tgkill", "ioctl", "clone3")
LISTED = confined._ALLOWED | {name: getattr(confined, f"_{name.upper()}") for name in SOME_ARGUMENTS}
HARMFUL = (
    "socket", "connect", "sendto", "sendmsg", "bind", "listen", "accept", "socketpair", "execve", "execveat",
    "fork", "vfork", "unlink", "unlinkat", "rename", "renameat", "renameat2", "truncate", "ftruncate", "chmod",
    "fchmod", "fchmodat", "chown", "fchownat", "link", "linkat", "symlink", "symlinkat", "mkdir", "mkdirat",
    "rmdir", "mknod", "mknodat", "creat", "open", "utimensat", "fallocate", "copy_file_range", "sendfile",
    "splice", "open_by_handle_at", "openat2", "ptrace", "process_vm_readv", "process_vm_writev", "pidfd_open",
    "pidfd_getfd", "pidfd_send_signal", "rt_sigqueueinfo", "rt_tgsigqueueinfo", "tkill", "mount", "umount2",
    "pivot_root", "chroot", "unshare", "setns", "bpf", "seccomp", "prctl", "io_uring_setup", "io_uring_enter",
    "io_uring_register", "shmget", "shmat", "msgget", "semget", "memfd_create", "mq_open", "inotify_init1",
    "fanotify_init", "keyctl", "add_key", "request_key", "userfaultfd", "perf_event_open", "init_module",
    "finit_module", "kexec_load", "reboot", "setrlimit", "setuid", "setgid", "setresuid", "capset",
    "setpriority", "sched_setaffinity", "ioprio_set", "syslog", "swapon", "acct", "quotactl",
)  # fmt: skip
HEADERS = {"x86_64": "/usr/include/x86_64-linux-gnu/asm/unistd_64.h", "aarch64": "/usr/include/asm-generic/unistd.h"}


def by_libseccomp(machine):
    """Return what gives the number of a name, by libseccomp's own tables; negative where the machine has none."""
    found = ctypes.util.find_library("seccomp")
    if found is None:
        pytest.skip("no libseccomp on this machine")
    resolve = ctypes.CDLL(found).seccomp_syscall_resolve_name_arch
    return lambda name: resolve(ctypes.c_uint32(SYSTEM_CALLS[machine][0]), name.encode())


def by_headers(machine):
    """The same by the kernel's headers."""
    path = Path(HEADERS[machine])
    if not path.is_file():
        pytest.skip(f"no {path} on this machine")
    # 64-bit machines take those that are 64 bits wide on all of them under their common names
    numbers = dict(re.findall(r"^#define __NR(?:3264)?_(\w+) (\d+)$", path.read_text(), re.MULTILINE))
    numbers.setdefault("newfstatat", numbers.get("fstatat"))
    return lambda name: int(numbers.get(name) or -1)


@pytest.mark.parametrize("table", [by_libseccomp, by_headers])
@pytest.mark.parametrize("machine", SYSTEM_CALLS)
def test_numbers_are_those_of_other_tables(machine, table):
    number_of = table(machine)
    column = SYSTEM_CALLS[machine][1]
    differing = {
        name: (pair[column], number_of(name))
        for name, pair in LISTED.items()
        if pair[column] != number_of(name) and not (pair[column] == -1 and number_of(name) < 0)
    }
    assert not differing
    assert number_of("execve") > 0  # it can tell


def decision(machine, number, *arguments, architecture=None):
    """Compute the filter's program on one call; return 'allow', 'kill', or the error's number."""
    architecture = SYSTEM_CALLS[machine][0] if architecture is None else architecture
    data = struct.pack("<iIQ6Q", number, architecture, 0, *arguments, *[0] * (6 - len(arguments)))
    code = confined._filter(*SYSTEM_CALLS[machine], PID)
    at, word = 0, 0
    while True:
        kind, if_so, if_not, value = struct.unpack_from("HBBI", code, 8 * at)
        at += 1
        if kind == 0x20:
            (word,) = struct.unpack_from("<I", data, value)
        elif kind in (0x15, 0x45):
            at += if_so if (word == value if kind == 0x15 else word & value) else if_not
        else:
            assert kind == 0x06
            return {0x7FFF0000: "allow", 0x80000000: "kill"}.get(value) or value & 0xFFFF


@pytest.mark.parametrize("machine", SYSTEM_CALLS)
def test_all_but_what_is_listed_is_refused(machine):
    number_of, column = by_libseccomp(machine), SYSTEM_CALLS[machine][1]
    allowed = {number for number in range(1024) if decision(machine, number) == "allow"}
    plain = {pair[column] for pair in confined._ALLOWED.values() if pair[column] >= 0}
    assert allowed == plain | {LISTED[name][column] for name in ("openat", "fcntl", "prlimit64")}
    for name in HARMFUL:
        assert number_of(name) < 0 or decision(machine, number_of(name)) == errno.EPERM, name
    assert decision(machine, 0, architecture=0x40000003) == "kill"  # the calls of a 32-bit program have other numbers
    assert decision(machine, 0x40000000 | 1) == errno.EPERM  # and so have those of x32


@pytest.mark.parametrize("machine", SYSTEM_CALLS)
def test_some_are_allowed_by_their_arguments(machine):
    def decide(name, *arguments):
        return decision(machine, LISTED[name][SYSTEM_CALLS[machine][1]], *arguments)

    assert decide("openat", 0, 0, os.O_RDONLY | os.O_CLOEXEC) == "allow"
    for flags in (os.O_WRONLY, os.O_RDWR, os.O_CREAT, os.O_TRUNC, os.O_APPEND, 0o20000000):
        assert decide("openat", 0, 0, flags) == errno.EPERM
    thread = 0x003D0F00  # what the C library gives for a thread
    assert decide("clone", thread) == "allow" and decide("clone", 17) == errno.EPERM
    assert decide("clone3") == errno.ENOSYS and decide("ioctl", 0, 0x5401) == errno.ENOTTY
    assert decide("kill", PID, 9) == "allow" and decide("tgkill", PID, PID, 9) == "allow"
    assert {decide(name, other, 9) for name in ("kill", "tgkill") for other in (1, 0, (1 << 32) - 1)} == {errno.EPERM}
    assert decide("fcntl", 3, 1030) == "allow" and decide("fcntl", 3, 8) == errno.EPERM  # F_SETOWN
    assert decide("prlimit64", 0, 7, 0) == "allow" and decide("prlimit64", PID, 7, 0) == errno.EPERM
    assert decide("prlimit64", 0, 7, 1 << 32) == errno.EPERM  # a new limit, wherever it lies
