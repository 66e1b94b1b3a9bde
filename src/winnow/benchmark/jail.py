"""Runs generated programs in isolated processes, as a script that imports only the standard library.

The script reads one JSON request from standard input and writes one JSON list of results. Each program runs in a fork that
permanently gives up these resources before it reads a line of the program:

- files: Landlock allows it only to read Python's own files and to write its own scratch folder;
- the network, signals, new processes and every other system call that is not on the list below: a seccomp filter refuses them;
- memory, processor time, file size and open files beyond its resource limits;
- the environment, and all open files but one pipe.

Landlock and seccomp need neither privileges nor user namespaces, so they work for root, for other users, and in containers
(Linux 5.13 or later). The kernel's Documentation/userspace-api/landlock.rst and seccomp_filter.rst describe both interfaces.

A program passes when control comes back after its last line: only then does the fork send the random token that its parent
expects. So a program that exits early or prints text does not pass. The script does not defend against a program that searches
this interpreter's memory for the token, or whose objects claim to equal anything: tests and program share a process.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import resource
import select
import selectors
import shutil
import signal
import struct
import sys
import tempfile
import time
from typing import Any, NoReturn

# System calls that a single-process Python program needs, with their numbers on (x86-64, aarch64). All others are refused: fork,
# exec, kill, sockets, ptrace, mounts, io_uring, setting limits, and chmod and other path operations that Landlock does not cover.
COMMON = {
    "read": (0, 63), "write": (1, 64), "close": (3, 57), "fstat": (5, 80), "lseek": (8, 62), "mmap": (9, 222),
    "mprotect": (10, 226), "munmap": (11, 215), "brk": (12, 214), "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139), "ioctl": (16, 29), "pread64": (17, 67), "pwrite64": (18, 68), "readv": (19, 65),
    "writev": (20, 66), "sched_yield": (24, 124), "mremap": (25, 216), "madvise": (28, 233), "dup": (32, 23),
    "nanosleep": (35, 101), "getitimer": (36, 102), "setitimer": (38, 103), "getpid": (39, 172), "exit": (60, 93),
    "uname": (63, 160), "fcntl": (72, 25), "fsync": (74, 82), "ftruncate": (77, 46), "getcwd": (79, 17), "chdir": (80, 49),
    "umask": (95, 166), "gettimeofday": (96, 169), "getrlimit": (97, 163), "getrusage": (98, 165), "sysinfo": (99, 179),
    "times": (100, 153), "getuid": (102, 174), "getgid": (104, 176), "geteuid": (107, 175), "getegid": (108, 177),
    "getppid": (110, 173), "sigaltstack": (131, 132), "gettid": (186, 178), "futex": (202, 98),
    "sched_getaffinity": (204, 123), "getdents64": (217, 61), "set_tid_address": (218, 96), "clock_gettime": (228, 113),
    "clock_getres": (229, 114), "clock_nanosleep": (230, 115), "exit_group": (231, 94), "openat": (257, 56),
    "mkdirat": (258, 34), "newfstatat": (262, 79), "unlinkat": (263, 35), "renameat": (264, 38), "readlinkat": (267, 78),
    "faccessat": (269, 48), "pselect6": (270, 72), "ppoll": (271, 73), "set_robust_list": (273, 99), "dup3": (292, 24),
    "pipe2": (293, 59), "renameat2": (316, 276), "getrandom": (318, 278), "membarrier": (324, 283), "statx": (332, 291),
    "rseq": (334, 293), "faccessat2": (439, 439),
}  # fmt: skip
X86_ONLY = (2, 4, 6, 7, 21, 22, 23, 33, 37, 78, 82, 83, 84, 87, 89, 158, 201)  # older calls: open, stat, ... time
CLONE, PRLIMIT64 = (56, 220), (302, 261)
CLONE3, CLONE_THREAD = 435, 0x10000
ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column in COMMON, kernel's audit number
ALLOW, ERRNO, KILL = 0x7FFF0000, 0x00050000, 0x80000000
LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06  # opcodes of classic BPF
EPERM, ENOSYS = 1, 38
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 22, 38
LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446  # same numbers on both architectures
READ_FILE, READ_DIR, WRITE_FILE, TRUNCATE = 1 << 2, 1 << 3, 1 << 1, 1 << 14
RIGHTS_BY_ABI = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 4: (1 << 15) - 1, 5: (1 << 16) - 1}
REPORT_BYTES = 4096
PIPE = 3  # the file descriptor on which a fork reports
FILE_BYTES, OPEN_FILES = 1 << 20, 64
libc = ctypes.CDLL(None, use_errno=True)


def syscall_filter() -> bytes:
    """Returns the seccomp program: it allows the listed calls, and `clone` for threads; all others fail with EPERM."""
    column, audit = ARCHITECTURES[platform.machine()]
    code = [(LOAD, 0, 0, 4), (EQUAL, 1, 0, audit), (RETURN, 0, 0, KILL), (LOAD, 0, 0, 0)]
    if column == 0:  # refuse the x32 numbers of x86-64, which reach the same calls
        code += [(AT_LEAST, 0, 1, 0x40000000), (RETURN, 0, 0, ERRNO | EPERM)]
    code += [(EQUAL, 0, 1, CLONE3), (RETURN, 0, 0, ERRNO | ENOSYS)]  # its flags are in memory; libc falls back to clone
    code += [(EQUAL, 0, 4, CLONE[column]), (LOAD, 0, 0, 16), (ANY_BIT, 0, 1, CLONE_THREAD)]
    code += [(RETURN, 0, 0, ALLOW), (RETURN, 0, 0, ERRNO | EPERM)]
    code += [(EQUAL, 0, 6, PRLIMIT64[column]), (LOAD, 0, 0, 32), (EQUAL, 0, 3, 0), (LOAD, 0, 0, 36), (EQUAL, 0, 1, 0)]
    code += [(RETURN, 0, 0, ALLOW), (RETURN, 0, 0, ERRNO | EPERM)]  # allowed only to read limits
    for number in sorted({pair[column] for pair in COMMON.values()} | set(X86_ONLY if column == 0 else ())):
        code += [(EQUAL, 0, 1, number), (RETURN, 0, 0, ALLOW)]
    code.append((RETURN, 0, 0, ERRNO | EPERM))
    return b"".join(struct.pack("HBBI", *instruction) for instruction in code)


def _check(result: int, operation: str) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{operation}: {os.strerror(ctypes.get_errno())}")
    return result


def restrict_files(readable: list[str], scratch: str) -> None:
    """Restricts file access with Landlock: `readable` can only be read, `scratch` can be read and written, nothing else opens."""
    abi = _check(libc.syscall(LANDLOCK_CREATE, None, 0, 1), "Landlock")
    handled = RIGHTS_BY_ABI[min(abi, max(RIGHTS_BY_ABI))]
    ruleset = _check(libc.syscall(LANDLOCK_CREATE, ctypes.byref(ctypes.c_uint64(handled)), 8, 0), "Landlock rules")
    rules = dict.fromkeys(readable, READ_FILE | READ_DIR) | {"/dev/null": READ_FILE | WRITE_FILE | TRUNCATE}
    for path, rights in (rules | {scratch: handled & ~1}).items():  # without the right to execute
        if not os.path.exists(path):  # noqa: PTH110 (no pathlib here: it is slow to import)
            continue
        if not os.path.isdir(path):  # noqa: PTH112
            rights &= READ_FILE | WRITE_FILE | TRUNCATE
        parent = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = ctypes.create_string_buffer(struct.pack("=Qi", rights & handled, parent), 12)
        _check(libc.syscall(LANDLOCK_ADD, ruleset, 1, rule, 0), f"Landlock rule for {path}")
        os.close(parent)
    _check(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    _check(libc.syscall(LANDLOCK_RESTRICT, ruleset, 0), "Landlock")
    os.close(ruleset)


def restrict_calls(program: bytes) -> None:
    """Restricts the process to the system calls of the seccomp program."""
    buffer = ctypes.create_string_buffer(program, len(program))
    header = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(program) // 8, ctypes.addressof(buffer)))
    _check(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    _check(libc.prctl(PR_SET_SECCOMP, 2, header, 0, 0), "seccomp")


def isolate(request: dict[str, Any], scratch: str) -> None:
    """Gives up all resources that the module docstring lists; only the pipe stays open."""
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    null = os.open("/dev/null", os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    os.closerange(PIPE + 1, max(256, null + 1))
    os.chdir(scratch)
    os.environ.clear()
    os.environ["TMPDIR"] = tempfile.tempdir = scratch
    seconds = max(1, round(request["seconds"]))
    limits = {
        resource.RLIMIT_AS: (request["memory_bytes"],) * 2, resource.RLIMIT_CPU: (seconds, seconds + 1),
        resource.RLIMIT_FSIZE: (FILE_BYTES,) * 2, resource.RLIMIT_NOFILE: (OPEN_FILES,) * 2, resource.RLIMIT_CORE: (0, 0),
    }  # fmt: skip
    for limit, values in limits.items():
        resource.setrlimit(limit, values)
    restrict_files(request["readable"], scratch)
    restrict_calls(request["filter"])


def run_program(program: str, token: bytes, request: dict[str, Any], scratch: str, report_fd: int) -> NoReturn:
    """Isolates this fork, runs the program, and reports the outcome through the pipe."""
    report = token
    try:
        os.dup2(report_fd, PIPE)
        try:
            isolate(request, scratch)
        except BaseException as error:
            os.write(PIPE, json.dumps({"outcome": "unisolated", "message": str(error)}).encode())
            os._exit(1)  # no line of the program has run
        try:
            exec(compile(program, "<program>", "exec"), {"__name__": "program"})  # noqa: S102
        except MemoryError:
            report = b'{"outcome": "memory", "message": "MemoryError"}'  # a constant, since memory may be exhausted
        except BaseException as error:
            report = describe(error)
        os.write(PIPE, report[:REPORT_BYTES])
    finally:
        os._exit(0)  # never return into the parent's code


def describe(error: BaseException) -> bytes:
    """Returns the outcome of an exception as JSON: `forbidden` for a refused operation, else `failed`."""
    outcome = "forbidden" if isinstance(error, PermissionError) else "failed"
    try:
        message = f"{type(error).__name__}: {error}"[:300]
    except BaseException:  # the program's __str__ may do anything
        message = "an exception without a description"
    return json.dumps({"outcome": outcome, "message": message}).encode()[:REPORT_BYTES]


def verdict(
    data: bytes, token: bytes, status: int, cpu_seconds: float, late: bool, request: dict[str, Any]
) -> tuple[str, str]:
    """Returns the outcome of a program that has ended, and the reason."""
    if data == token and not late:
        return "passed", ""
    signalled = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    if late or signalled == signal.SIGXCPU or cpu_seconds >= request["seconds"]:
        return "timeout", f"longer than {request['seconds']:g} s"
    try:
        report = json.loads(data)
        if report["outcome"] in ("failed", "memory", "forbidden", "unisolated"):
            return report["outcome"], str(report["message"])[:300]
    except (ValueError, TypeError, KeyError):
        pass
    if signalled == signal.SIGKILL and not data:
        return "memory", "killed by the system"
    return "failed", f"ended by signal {signalled}" if signalled else "exited before its end"


def start(program: str, request: dict[str, Any], root: str) -> dict[str, Any]:
    """Forks a process that runs one program, and returns its record."""
    token, scratch = os.urandom(16).hex().encode(), tempfile.mkdtemp(dir=root)
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        run_program(program, token, request, scratch, writing)
    os.close(writing)
    return {
        "pid": pid, "reading": reading, "token": token, "scratch": scratch, "data": b"",
        "deadline": time.monotonic() + 4 * request["seconds"],  # wall clock: other processes share the cores
    }  # fmt: skip


def has_ended(pid: int, seconds: float = 1.0) -> bool:
    """Returns whether a child ends within `seconds`; a child closes its pipe a moment before its end."""
    process = os.pidfd_open(pid)
    try:
        return bool(select.select([process], [], [], seconds)[0])
    finally:
        os.close(process)


def serve(request: dict[str, Any], root: str) -> list[tuple[str, str]]:
    """Runs all programs, at most `workers` at once, and returns their results in order."""
    waiting = list(enumerate(request["programs"]))[::-1]
    results: list[tuple[str, str]] = [("failed", "")] * len(waiting)
    running: dict[int, dict[str, Any]] = {}
    poll = selectors.DefaultSelector()
    while waiting or running:
        while waiting and len(running) < request["workers"]:
            index, program = waiting.pop()
            child = start(program, request, root)
            running[index] = child
            poll.register(child["reading"], selectors.EVENT_READ, index)
        timeout = min(child["deadline"] for child in running.values()) - time.monotonic()
        ready = {key.data for key, _ in poll.select(max(0.0, timeout))}
        for index, child in list(running.items()):
            late = time.monotonic() > child["deadline"]
            if index in ready and not late:
                chunk = os.read(child["reading"], REPORT_BYTES)
                child["data"] += chunk
                if chunk and len(child["data"]) <= REPORT_BYTES:
                    continue
            elif not late:
                continue
            closed = not late and not has_ended(child["pid"])  # it closed its pipe and runs on: it cannot pass
            os.kill(child["pid"], signal.SIGKILL)
            _, status, usage = os.wait4(child["pid"], 0)
            status = 0 if closed else status  # do not report the SIGKILL above as one of the system
            cpu = usage.ru_utime + usage.ru_stime
            results[index] = verdict(child["data"], child["token"], status, cpu, late, request)
            poll.unregister(child["reading"])
            os.close(child["reading"])
            shutil.rmtree(child["scratch"], ignore_errors=True)
            del running[index]
    return results


def main() -> None:
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    request = json.load(sys.stdin)
    request["filter"] = syscall_filter()
    sys.path += request["packages"]
    for module in (
        "bisect",
        "collections",
        "copy",
        "datetime",
        "functools",
        "heapq",
        "itertools",
        "math",
        "random",
        "re",
        "typing",
    ):
        __import__(module)  # imported once here instead of in each fork
    root = tempfile.mkdtemp(prefix="winnow-sandbox-")
    try:
        results = serve(request, root)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
