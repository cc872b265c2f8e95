"""A child whose system calls are seen, and answered if need be, before the kernel does them: ctypes and ptrace.

A seccomp filter in the child stops it only at the calls that change or sync files; the parent then reads what is asked
and lets it happen, answers with an error instead, or kills. Python and SQLite are both seen, since both ask the kernel.
Linux on x86-64 only.

    trace(lambda: act(), root=folder, answer=lambda call: -errno.EIO if call.number == 7 else None)
"""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.robustness.harness import forked

KILL = object()
_CALLS = {
    1: "write", 18: "write", 20: "write", 40: "write", 326: "write", 2: "open", 257: "open", 85: "open",
    74: "fsync", 75: "fsync", 77: "truncate", 82: "rename", 264: "rename", 316: "rename", 87: "unlink", 263: "unlink",
    84: "rmdir", 83: "mkdir", 258: "mkdir", 285: "fallocate",
}  # fmt: skip
_TRACEME, _CONT, _GETREGS, _SETREGS, _SETOPTIONS = 0, 7, 12, 13, 0x4200
_O_TRACESECCOMP, _O_EXITKILL, _EVENT_SECCOMP = 0x80, 0x100000, 7
_O_DIRECTORY, _O_CREAT, _O_ACCMODE = 0o200000, 0o100, 3
_AT_REMOVEDIR, _AT_FDCWD = 0x200, -100
# user_regs_struct of sys/user.h
_NAMES = (
    "r15 r14 r13 r12 rbp rbx r11 r10 r9 r8 rax rcx rdx rsi rdi orig_rax rip cs eflags rsp ss "
    "fs_base gs_base ds es fs gs"
)
_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
_libc.ptrace.restype = ctypes.c_long


class _Registers(ctypes.Structure):
    _fields_ = [(name, ctypes.c_ulonglong) for name in _NAMES.split()]


@dataclass
class Call:
    """One system call on the root or a file below it, about to happen.

    Attributes:
        kind: write, open, fsync, truncate, rename, unlink, rmdir, mkdir, fallocate.
        path: What it is done to.
        number: The how-manieth it is.
        to: The new name of a rename.
        data: What a write will write; None where that was not asked for, or is not known (sendfile and its like).
        offset: Of a write or truncate; None at the file's own position.
        fd: The file descriptor, of calls that take one.
        creates: Whether an open may create the file; `reads` whether it only reads.
    """

    kind: str
    path: str
    number: int
    to: str = ""
    data: bytes | None = None
    offset: int | None = None
    fd: int = -1
    creates: bool = False
    reads: bool = False


def supported() -> bool:
    """Say whether children can be traced here."""
    if sys.platform != "linux" or platform.machine() != "x86_64" or struct.calcsize("P") != 8:
        return False
    try:
        return trace(lambda: None, root=Path("/nonexistent"), answer=lambda call: None) == 0
    except OSError:
        return False


def trace(
    act: Callable[[], object],
    *,
    root: Path,
    answer: Callable[[Call], object],
    said: int | None = None,
    with_data: bool = False,
) -> int:
    """Run `act` in a traced child, and return its exit code, or minus the signal that ended it.

    Args:
        act: What the child does.
        root: Calls on other files are none of our business.
        answer: Asked before each call: None lets it happen, a negative number is returned instead of doing it, KILL
            kills.
        said: See `forked`.
        with_data: Read what each write will write.
    """
    pid = forked(act, before=_become_traced, said=said)
    try:
        _wait(pid)
        _ptrace(_SETOPTIONS, pid, _O_TRACESECCOMP | _O_EXITKILL)
        memory = os.open(f"/proc/{pid}/mem", os.O_RDONLY)
        try:
            return _follow(_Child(pid, memory, with_data), str(root), answer)
        finally:
            os.close(memory)
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise


@dataclass(frozen=True)
class _Child:
    pid: int
    memory: int  # a descriptor; opened once, for it is read at most stops
    with_data: bool


def _follow(child: _Child, root: str, answer: Callable[[Call], object]) -> int:
    pid = child.pid
    registers = _Registers()
    number = 0
    deliver = 0
    while True:
        _ptrace(_CONT, pid, deliver)
        deliver = 0
        status = _wait(pid)
        if os.WIFEXITED(status) or os.WIFSIGNALED(status):
            return os.waitstatus_to_exitcode(status)
        if status >> 8 != signal.SIGTRAP | (_EVENT_SECCOMP << 8):
            deliver = os.WSTOPSIG(status)
            continue
        _ptrace(_GETREGS, pid, ctypes.addressof(registers))
        call = _call(child, registers, root, number)
        if call is None:
            continue
        number += 1
        said = answer(call)
        if said is KILL:
            os.kill(pid, signal.SIGKILL)
            return os.waitstatus_to_exitcode(_wait(pid))
        elif isinstance(said, int):
            registers.orig_rax = (1 << 64) - 1  # no such call: the kernel skips it and returns rax
            registers.rax = said % (1 << 64)
            _ptrace(_SETREGS, pid, ctypes.addressof(registers))


def _call(child: _Child, registers: _Registers, root: str, number: int) -> Call | None:
    pid = child.pid
    nr, kind = registers.orig_rax, _CALLS.get(registers.orig_rax)
    if kind is None:
        return None
    a, b, c, d = registers.rdi, registers.rsi, registers.rdx, registers.r10
    if kind in ("write", "fsync", "truncate", "fallocate"):
        fd = ctypes.c_int(a).value
        path = _of_fd(pid, fd)
        if not _below(path, root):
            return None
        call = Call(kind, path, number, fd=fd)
        if nr in (1, 18):
            call.data = os.pread(child.memory, c, b) if child.with_data else None
            call.offset = d if nr == 18 else None
        elif nr == 77:
            call.offset = b
        return call
    at = {257: (a, b), 264: (a, b), 316: (a, b), 263: (a, b), 258: (a, b)}.get(nr, (_AT_FDCWD, a))
    path = _path(child, ctypes.c_int(at[0]).value, at[1])
    if not _below(path, root):
        return None
    call = Call(kind, path, number)
    if kind == "rename":
        call.to = _path(child, _AT_FDCWD, b) if nr == 82 else _path(child, ctypes.c_int(c).value, d)
    elif kind == "open":
        flags = c if nr == 257 else b
        call.creates, call.reads = bool(flags & _O_CREAT), flags & _O_ACCMODE == 0
    elif nr == 263 and c & _AT_REMOVEDIR:
        call.kind = "rmdir"
    return call


def _below(path: str, root: str) -> bool:
    return path == root or path.startswith(root + "/")


def _path(child: _Child, fd: int, address: int) -> str:
    said = os.fsdecode(_text(child.memory, address))
    if said.startswith("/"):
        return said
    start = os.readlink(f"/proc/{child.pid}/cwd") if fd == _AT_FDCWD else _of_fd(child.pid, fd)
    return f"{start}/{said}"


def _of_fd(pid: int, fd: int) -> str:
    try:
        return os.readlink(f"/proc/{pid}/fd/{fd}").removesuffix(" (deleted)")
    except OSError:
        return ""


def _text(memory: int, address: int) -> bytes:
    """Read a text of the child's memory up to its NUL, and no further than the page that holds it."""
    found = b""
    while b"\0" not in found and len(found) < 4096:
        found += os.pread(memory, 4096 - (address + len(found)) % 4096, address + len(found))
    return found.partition(b"\0")[0]


def _become_traced() -> None:
    """In the child: ask to be traced, stop until the parent is ready, and let the calls of interest stop it."""
    _ptrace(_TRACEME, 0, 0)
    os.kill(os.getpid(), signal.SIGSTOP)
    numbers = sorted(_CALLS)
    # Classic BPF: load the call's number; equal to one of ours: trace; else allow.
    program = [struct.pack("HBBI", 0x20, 0, 0, 0)]
    for place, number in enumerate(numbers):
        program.append(struct.pack("HBBI", 0x15, len(numbers) - place, 0, number))
    program.append(struct.pack("HBBI", 0x06, 0, 0, 0x7FFF0000))
    program.append(struct.pack("HBBI", 0x06, 0, 0, 0x7FF00000))
    code = ctypes.create_string_buffer(b"".join(program))
    head = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program), ctypes.addressof(code)))
    unsigned = ctypes.c_ulong
    if _libc.prctl(38, unsigned(1), unsigned(0), unsigned(0), unsigned(0)):
        raise OSError(ctypes.get_errno(), "PR_SET_NO_NEW_PRIVS")
    if _libc.prctl(22, unsigned(2), ctypes.byref(head), unsigned(0), unsigned(0)):
        raise OSError(ctypes.get_errno(), "PR_SET_SECCOMP")


def _wait(pid: int) -> int:
    return os.waitpid(pid, 0)[1]


def _ptrace(request: int, pid: int, data: int) -> None:
    if _libc.ptrace(request, pid, None, data) == -1:
        raise OSError(ctypes.get_errno(), f"ptrace request {request}")
