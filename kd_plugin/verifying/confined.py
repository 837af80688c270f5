"""The script of the process in which a program of a model runs: limits first, then a filter of system calls, then it.

It needs the standard library alone, and stays readable by itself: nothing that runs after :func:`confine` can undo it.
The filter lists what is allowed and refuses everything else with EPERM, so that a new system call is refused too.
Numbers are those of Linux's tables (x86_64: arch/x86/entry/syscalls/syscall_64.tbl; aarch64: asm-generic/unistd.h).
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import platform
import resource
import struct
import sys

CANNOT_CONFINE, OUT_OF_MEMORY = 97, 98  # exit codes
# What a computation needs that has its files open for reading already, or opens more of them; (x86_64, aarch64)
_ALLOWED: dict[str, tuple[int | None, int]] = {
    "read": (0, 63), "write": (1, 64), "close": (3, 57), "stat": (4, -1), "fstat": (5, 80), "lstat": (6, -1),
    "poll": (7, -1), "lseek": (8, 62), "mmap": (9, 222), "mprotect": (10, 226), "munmap": (11, 215), "brk": (12, 214),
    "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "pread64": (17, 67),
    "readv": (19, 65), "writev": (20, 66), "access": (21, -1), "pipe": (22, -1), "select": (23, -1),
    "sched_yield": (24, 124), "mremap": (25, 216), "madvise": (28, 233), "dup": (32, 23), "dup2": (33, -1),
    "nanosleep": (35, 101), "getitimer": (36, 102), "alarm": (37, -1), "setitimer": (38, 103), "getpid": (39, 172),
    "exit": (60, 93), "uname": (63, 160), "getcwd": (79, 17), "readlink": (89, -1), "gettimeofday": (96, 169),
    "getrusage": (98, 165), "sysinfo": (99, 179), "times": (100, 153), "getuid": (102, 174), "getgid": (104, 176),
    "geteuid": (107, 175), "getegid": (108, 177), "getppid": (110, 173), "sigaltstack": (131, 132),
    "statfs": (137, 43), "fstatfs": (138, 44), "arch_prctl": (158, -1), "gettid": (186, 178), "time": (201, -1),
    "futex": (202, 98), "sched_getaffinity": (204, 123), "getdents64": (217, 61), "set_tid_address": (218, 96),
    "restart_syscall": (219, 128), "fadvise64": (221, 223), "clock_gettime": (228, 113), "clock_getres": (229, 114),
    "clock_nanosleep": (230, 115), "exit_group": (231, 94), "epoll_wait": (232, -1), "epoll_ctl": (233, 21),
    "newfstatat": (262, 79), "readlinkat": (267, 78), "faccessat": (269, 48), "pselect6": (270, 72),
    "ppoll": (271, 73), "set_robust_list": (273, 99), "epoll_pwait": (281, 22), "eventfd2": (290, 19),
    "epoll_create1": (291, 20), "dup3": (292, 24), "pipe2": (293, 59), "getrandom": (318, 278), "statx": (332, 291),
    "rseq": (334, 293), "close_range": (436, 436), "faccessat2": (439, 439),
}  # fmt: skip
# Allowed with some arguments only
_OPENAT, _CLONE, _FCNTL, _PRLIMIT64 = (257, 56), (56, 220), (72, 25), (302, 261)
_KILL, _TGKILL, _IOCTL, _CLONE3 = (62, 129), (234, 131), (16, 29), (435, 435)
# Machine -> its number in seccomp's data, and which number of each pair is its own
SYSTEM_CALLS = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND | 0o20000000  # O_TMPFILE
_CLONE_THREAD = 0x00010000
_HARMLESS_FCNTL = (0, 1, 2, 3, 1030)  # duplicate, and read or set flags of the descriptor: no owner, no signals
_LOAD, _EQUAL, _ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06  # BPF: load a word, jump if equal, jump if bits, return
_ALLOW, _KILL_PROCESS, _ERROR = 0x7FFF0000, 0x80000000, 0x00050000
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data
_SET_NO_NEW_PRIVILEGES, _SET_SECCOMP, _SET_DEATH_SIGNAL = 38, 22, 1  # prctl
_NO_TERMINAL, _NO_SUCH_CALL = errno.ENOTTY, errno.ENOSYS


def confine(seconds: int, memory: int, output: int) -> None:
    """Bound this process for good: processor seconds, bytes of address space, bytes of its output, system calls.

    Raises:
        OSError: the kernel refuses.
    """
    for kind, limit in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, output),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (limit, limit))
    libc = ctypes.CDLL(None, use_errno=True)
    code = _filter(*SYSTEM_CALLS[platform.machine()], os.getpid())
    buffer = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(buffer))
    for option, value, pointer in (
        (_SET_DEATH_SIGNAL, 9, None),  # whoever started this is gone: so is this
        (_SET_NO_NEW_PRIVILEGES, 1, None),
        (_SET_SECCOMP, 2, program),
    ):
        if libc.prctl(option, ctypes.c_ulong(value), pointer, None, None):
            raise OSError(ctypes.get_errno(), "prctl")


def _filter(architecture: int, column: int, pid: int) -> bytes:
    """Return the BPF program that decides on each system call, 8 bytes an instruction."""
    refuse, allow = _return(_ERROR | errno.EPERM), _return(_ALLOW)
    code = _word(_ARCHITECTURE) + _jump(_EQUAL, architecture, 1, 0) + _return(_KILL_PROCESS) + _word(_NUMBER)
    for pair in _ALLOWED.values():
        number = pair[column]
        if number is not None and number >= 0:
            code += _jump(_EQUAL, number, 0, 1) + allow
    for pair, body in (
        (_OPENAT, _argument(2) + _jump(_ANY_BIT, _WRITES, 1, 0) + allow + refuse),
        (_CLONE, _argument(0) + _jump(_ANY_BIT, _CLONE_THREAD, 0, 1) + allow + refuse),
        (_FCNTL, _argument(1) + _one_of(_HARMLESS_FCNTL) + refuse),
        (
            _PRLIMIT64,
            _argument(0) + _zero() + _argument(2) + _zero() + _argument(2, high=True) + _zero() + _return(_ALLOW),
        ),
        (_KILL, _argument(0) + _one_of((pid,)) + refuse),
        (_TGKILL, _argument(0) + _one_of((pid,)) + refuse),
        (_IOCTL, _return(_ERROR | _NO_TERMINAL)),
        (_CLONE3, _return(_ERROR | _NO_SUCH_CALL)),  # the C library then calls clone, whose flags can be read
    ):
        code += _jump(_EQUAL, pair[column], 0, len(body) // 8) + body
    return code + refuse


def _word(offset: int) -> bytes:
    return struct.pack("HBBI", _LOAD, 0, 0, offset)


def _argument(index: int, high: bool = False) -> bytes:
    return _word(_ARGUMENTS + 8 * index + 4 * high)


def _jump(kind: int, value: int, if_so: int, if_not: int) -> bytes:
    return struct.pack("HBBI", kind, if_so, if_not, value)


def _return(value: int) -> bytes:
    return struct.pack("HBBI", _RETURN, 0, 0, value)


def _one_of(values: tuple[int, ...]) -> bytes:
    return b"".join(_jump(_EQUAL, value, 0, 1) + _return(_ALLOW) for value in values)


def _zero() -> bytes:
    return _jump(_EQUAL, 0, 1, 0) + _return(_ERROR | errno.EPERM)


def _run(job: dict, out: int) -> int:  # type: ignore[type-arg]
    """Run the program, then its statements; return the exit code."""
    names = {"__name__": "__main__", "__builtins__": __builtins__}
    sys.argv = ["program.py"]
    try:
        exec(compile(job["program"], "program.py", "exec"), names)
    except MemoryError:
        return OUT_OF_MEMORY
    except SystemExit as end:
        if "statements" in job or end.code not in (None, 0):
            return 1
    if "statements" not in job:
        sys.stdout.flush()
        return 0
    marks = ""
    for statement in job["statements"]:
        try:
            exec(compile(statement, "test.py", "exec"), names)
            marks += "+"
        except MemoryError:
            return OUT_OF_MEMORY
        except BaseException:
            marks += "-"
    os.write(out, (job["word"] + marks).encode())
    return 0


def _main() -> None:
    descriptor = int(sys.argv[1])
    with open(descriptor, "rb") as file:
        job = json.loads(file.read())
    out = 1
    if "statements" in job:  # what the program prints goes where nobody looks
        out = os.dup(1)
        os.dup2(2, 1)
    try:
        confine(job.pop("seconds"), job.pop("memory"), job.pop("output"))
    except OSError:
        os._exit(CANNOT_CONFINE)
    code = 1
    try:
        code = _run(job, out)
    finally:
        os._exit(code)  # neither exit handlers nor threads of the program go on


if __name__ == "__main__":
    _main()
