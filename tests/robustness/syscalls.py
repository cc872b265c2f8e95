"""Failing system calls, a disk that fills up, kills between any two calls, and a power cut after any of them.

Each verb's calls are counted in an undisturbed run; then each of them fails, in turn, in each way. The recorder replays
what a disk may hold after a power cut: of the calls so far only what was synced is certain.

    python -m tests.robustness.syscalls --what fail --only insert
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePath

from kvllm.store import files
from tests.robustness import ptrace
from tests.robustness.harness import (
    CORRUPT,
    FINISHED,
    FULL,
    REFUSED,
    VERBS,
    Results,
    Stage,
    campaign,
    conclude,
    forked,
    make_repeatable,
    mine,
    reaped,
    spread,
    stages,
)

KILL_EVERY = 3  # the random kills and the failpoints are more
ROOMS = 12  # of a page each, from none
ERRORS = {"EIO": errno.EIO, "ENOSPC": errno.ENOSPC, "EINTR": errno.EINTR}


# -------------------------------------------------------------------- each call fails


def recorded(stage: Stage, case: Path) -> list[ptrace.Call]:
    """Run the verb undisturbed and return its calls."""
    calls: list[ptrace.Call] = []
    stage.template.lay_out(case)
    code = ptrace.trace(lambda: stage.verb.act(case), root=case, answer=calls.append, with_data=True)
    assert code == FINISHED, (stage.verb.name, code)
    shutil.rmtree(case)
    return calls


def failing_calls(results: Results, stages_: list[Stage], work: Path, size: float) -> None:
    """Let the N-th call fail, for every N; ENOSPC stays from then on, as a full disk does."""
    case = work / "case"
    for stage in stages_:
        calls = recorded(stage, case)
        results.counts["verbs"] += 1
        results.counts["calls"] += len(calls)
        for name, number in ERRORS.items():
            for call in spread(calls, size, least=2):
                fail(results, stage, case, call.number, name, number)
        for call in spread(calls[::KILL_EVERY], size):
            kill(results, stage, case, call)


def fail(results: Results, stage: Stage, case: Path, nth: int, name: str, number: int) -> None:
    failed: dict[str, int] = {}
    retried: list[str] = []
    first: list[str] = []

    def answer(call: ptrace.Call) -> object:
        if call.kind in ("write", "truncate"):
            failed.pop(call.path, None)
        elif call.kind in ("rename", "unlink", "mkdir", "rmdir") or call.creates:
            failed.pop(os.path.dirname(call.path), None)  # a folder's next sync is for this change
        if call.kind == "fsync" and call.path in failed:
            retried.append(call.path)
        takes_room = call.kind in ("write", "mkdir", "fallocate") or (call.kind == "open" and call.creates)
        if call.number == nth or (name == "ENOSPC" and call.number > nth and takes_room):
            if not first:
                first.append(f"{call.kind} of {PurePath(call.path).name}")
            if call.kind == "fsync" and name != "EINTR":
                failed[call.path] = nth
            return -number
        return None

    stage.template.lay_out(case)
    read, write = os.pipe()
    code = ptrace.trace(lambda: stage.verb.act(case), root=case, answer=answer, said=write)
    os.close(write)
    said = os.read(read, 1 << 16).decode(errors="replace")
    os.close(read)
    results.counts[f"failed with {name}"] += 1
    where = f"{stage.verb.name}, call {nth} ({''.join(first)}), {name}"
    if code not in (FINISHED, FULL, REFUSED, CORRUPT):
        results.check(f"ended with {code}: {said[-700:]}", where)
    if retried:
        results.check(f"a failed fsync of {retried[0]} was tried again", where)
    verdict = conclude(stage, case)
    place = verdict.place
    results.check(verdict.wrong, f"{where} -> {code} {said}")
    if code == FINISHED and place == "before" and stage.before != stage.after:
        results.check("it was acknowledged and did not happen", where)
    if code != FINISHED and place == "after" and stage.before != stage.after and "nothing was changed" in said:
        results.check("it happened, and was said to have changed nothing", f"{where}: {said}")
    if code == CORRUPT and not stage.verb.repairs:
        results.check(f"the store was called damaged: {said}", where)
    results.check(verdict.afterwards, where)
    shutil.rmtree(case)


def kill(results: Results, stage: Stage, case: Path, at: ptrace.Call) -> None:
    """Kill before the call, and then kill whoever recovers before its own third call."""
    stage.template.lay_out(case)
    where = f"{stage.verb.name}, killed before call {at.number} ({at.kind} of {PurePath(at.path).name})"
    code = ptrace.trace(
        lambda: stage.verb.act(case), root=case, answer=lambda c: ptrace.KILL if c.number == at.number else None
    )
    results.counts["killed between two calls"] += 1
    if code != -9:
        results.check(f"it was not killed but ended with {code}", where)
    ptrace.trace(
        lambda: stage.verb.seen(case), root=case, answer=lambda c: ptrace.KILL if c.number == at.number % 12 else None
    )
    verdict = conclude(stage, case)
    results.check(verdict.wrong, where)
    results.check(verdict.afterwards, where)
    shutil.rmtree(case)


# -------------------------------------------------------------------- a power cut


@dataclass
class _Inode:
    """A file's bytes: what is certain, and what was done since."""

    synced: bytes = b""
    since: list[tuple[int, bytes] | int] = field(default_factory=list)  # (offset, data), or a new length

    def content(self, changes: int | None = None) -> bytes:
        data = bytearray(self.synced)
        for change in self.since[: len(self.since) if changes is None else changes]:
            if isinstance(change, int):
                data = data[:change] + bytes(max(0, change - len(data)))
            else:
                offset, new = change
                data[len(data) :] = bytes(max(0, offset - len(data)))
                data[offset : offset + len(new)] = new
        return bytes(data)


class Disk:
    """What a disk may hold: names by folder, in order, and files' bytes; both certain only once synced.

    Names become certain when their own folder is synced; until then, as many of the changes as there is time for, in
    their order. Of a file's changes since its last sync, none, the first half, or all may be there.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.names: dict[str, _Inode | None] = {}  # a folder is None
        for path in sorted(root.rglob("*")):
            self.names[str(path)] = None if path.is_dir() else _Inode(path.read_bytes())
        self.certain = dict(self.names)
        self.pending: list[tuple[str, str, str, _Inode | None]] = []
        self.positions: dict[tuple[str, int], int] = {}

    def do(self, call: ptrace.Call) -> bool:
        """Take note of a call; say whether it can make a difference after a power cut."""
        path = call.path
        if call.kind == "open":
            self.positions[path, call.fd] = 0
            if call.creates and path not in self.names:
                self._name("make", path, "", _Inode())
                return True
            return False
        if call.kind == "mkdir":
            self._name("make", path, "", None)
        elif call.kind in ("unlink", "rmdir") and path in self.names:
            self._name("drop", path, "", None)
        elif call.kind == "rename":
            self._name("move", path, call.to, None)
        elif call.kind == "fsync":
            inode = self.names.get(path)
            if inode is not None:
                inode.synced, inode.since = inode.content(), []
            else:
                self._sync_folder(path)
        elif call.kind in ("write", "truncate"):
            inode = self.names.get(path)
            if inode is None:
                return False
            if call.kind == "truncate":
                inode.since.append(call.offset or 0)
            else:
                assert call.data is not None, "a copy within the kernel is not recorded"
                offset = len(inode.content()) if call.offset is None else call.offset
                inode.since.append((offset, call.data))
        return True

    def _name(self, what: str, path: str, to: str, inode: _Inode | None) -> None:
        self.pending.append((what, path, to, inode))
        _rename(self.names, what, path, to, inode)

    def _sync_folder(self, folder: str) -> None:
        """What was done to this folder's names is certain now; what was done in other folders is not."""
        left: list[tuple[str, str, str, _Inode | None]] = []
        waiting = self.pending
        while waiting:
            (what, path, to, inode), *waiting = waiting
            if folder not in (_up(path), _up(to)):
                left.append((what, path, to, inode))
                continue
            _rename(self.certain, what, path, to, inode)
            if what == "move":  # what is not certain yet in a folder that moved will be in its new place
                left = [(w, _moved(p, path, to), _moved(t, path, to), i) for w, p, t, i in left]
        self.pending = left

    def states(self) -> Iterator[dict[str, bytes | None]]:
        """Yield every state that a power cut now may leave."""
        seen = set()
        for until in range(len(self.pending) + 1):
            names = dict(self.certain)
            for change in self.pending[:until]:
                _rename(names, *change)
            for pick in ("none", "half", "all"):
                state: dict[str, bytes | None] = {}
                for path, inode in names.items():
                    if inode is None:
                        state[path] = None
                    else:
                        n = {"none": 0, "half": (len(inode.since) + 1) // 2, "all": len(inode.since)}[pick]
                        state[path] = inode.content(n)
                key = hash(tuple(sorted((path, data) for path, data in state.items() if data is not None)))
                key = hash((key, tuple(sorted(path for path, data in state.items() if data is None))))
                if key not in seen:
                    seen.add(key)
                    yield state


def _moved(path: str, source: str, target: str) -> str:
    return target + path[len(source) :] if path.startswith(source + "/") else path


def _up(path: str) -> str:
    return os.path.dirname(path)


def _rename(names: dict[str, _Inode | None], what: str, path: str, to: str, inode: _Inode | None) -> None:
    if what == "make":
        names[path] = inode
    elif what == "drop":
        names.pop(path, None)
    else:
        for name in [n for n in names if n == path or n.startswith(path + "/")]:
            names[to + name[len(path) :]] = names.pop(name)


def power_cuts(results: Results, stages_: list[Stage], work: Path, size: float, *, at_end_only: bool = False) -> None:
    """After every call of every verb: is each state that the disk may be in the one before, or the one after?"""
    case = work / "case"
    for stage in stages_:
        if stage.verb.repairs:
            continue
        calls = recorded(stage, case)
        stage.template.lay_out(case)
        disk = Disk(case)
        shutil.rmtree(case)
        looked_at = {call.number for call in spread(calls, size, least=4)}
        for call in calls:
            if disk.do(call) and call.number in looked_at and not at_end_only:
                lay_out(results, stage, case, disk, f"{stage.verb.name}, after call {call.number}", end=False)
        lay_out(results, stage, case, disk, f"{stage.verb.name}, after its end", end=True)


def lay_out(results: Results, stage: Stage, case: Path, disk: Disk, where: str, *, end: bool) -> None:
    for state in disk.states():
        results.counts["states after a power cut"] += 1
        key = f"{hash(frozenset(state.items()))} {end}"
        if key in stage.known:
            continue
        case.mkdir()
        for path, data in sorted(state.items()):
            if not Path(path).parent.is_dir():
                continue  # its folder's own name did not make it
            if data is None:
                Path(path).mkdir(exist_ok=True)
            else:
                Path(path).write_bytes(data)
        verdict = stage.known[key] = conclude(stage, case)
        results.counts["different ones"] += 1
        results.check(verdict.wrong, where)
        if end and verdict.place == "before" and stage.before != stage.after:
            results.check("it was acknowledged and a power cut undid it", where)
        results.check(verdict.afterwards, where)
        shutil.rmtree(case)


def seeded(results: Results, stages_: list[Stage], work: Path) -> None:
    """Prove that a missing sync is seen: leave them out, one after the other, and count the failures."""
    real = files.fsync_fd, files.fsync_folder
    for name in ("fsync_fd", "fsync_folder"):
        setattr(files, name, lambda *_: None)
        without = Results()
        for stage in stages_:
            stage.known.clear()
        power_cuts(without, stages_, work, 1.0, at_end_only=True)
        files.fsync_fd, files.fsync_folder = real
        results.counts[f"found without {name}"] += without.counts["failures"]


# -------------------------------------------------------------------- a small disk


def small_disks(results: Results, stages_: list[Stage], work: Path, size: float) -> None:
    """Fill a tiny file system to the last few bytes, run the verb, make room, and run it again."""
    mount = work / "disk"
    mount.mkdir()
    if not mounted(mount):
        results.counts["no file system could be mounted"] += 1
        return
    for number in spread(range(ROOMS * len(stages_)), size, least=len(stages_)):
        stage = stages_[number % len(stages_)]
        case = mount / "case"
        stage.template.lay_out(case)
        left = 4096 * (number // len(stages_))
        ballast = mount / "ballast"
        fill(ballast, shutil.disk_usage(mount).free - left)
        read, write = os.pipe()
        code = reaped(forked(partial(stage.verb.act, case), said=write))
        os.close(write)
        said = os.read(read, 1 << 16).decode(errors="replace")
        os.close(read)
        where = f"{stage.verb.name} with {left} bytes left"
        results.counts["full disks"] += 1
        results.counts["full disks that refused"] += code == FULL
        results.counts["commands that ended with exit code 10"] += code == FULL and stage.verb.name.startswith("kvllm")
        if code not in (FINISHED, FULL):
            results.check(f"ended with {code} instead of {FULL}: {said[-700:]}", where)
        ballast.unlink()
        verdict = conclude(stage, case)
        place = verdict.place
        results.check(verdict.wrong, where)
        if code == FULL and place == "after" and stage.before != stage.after:
            results.check(f"it happened, and was said to have failed: {said}", where)
        results.check(verdict.afterwards, where)
        shutil.rmtree(case)


def fill(path: Path, size: int) -> None:
    with open(path, "wb") as handle:
        try:
            handle.write(b"\1" * max(0, size))
        except OSError:
            pass


def mounted(mount: Path) -> bool:
    """Mount a tmpfs of 2 MB in a mount namespace of this process's own; say whether that is permitted."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(0x00020000) and libc.unshare(0x10000000 | 0x00020000):  # CLONE_NEWNS, else with CLONE_NEWUSER
        return False
    private = 1 << 18 | 1 << 14  # MS_PRIVATE | MS_REC: nobody else sees the mount
    if libc.mount(None, b"/", None, ctypes.c_ulong(private), None):
        return False
    return not libc.mount(b"none", os.fsencode(mount), b"tmpfs", ctypes.c_ulong(0), b"size=2m")


def run(results: Results, given: argparse.Namespace, work: Path) -> None:
    verbs = [verb for verb in VERBS if given.only in (None, verb.name)]
    if not ptrace.supported():
        results.counts["not supported here"] += 1
        return
    make_repeatable()
    parts = given.what.split(",") if given.what else ["fail", "power", "seeded", "disk"]
    if "disk" in parts and given.part == 0:
        from tests.robustness.commands import commands

        small_disks(results, stages(work / "disks", [*verbs, *commands()]), work, given.size)
    if "fail" in parts or "power" in parts:
        staged = stages(work / "staged", mine(given, verbs))
        if "fail" in parts:
            failing_calls(results, staged, work, given.size)
        if "power" in parts:
            power_cuts(results, staged, work, given.size)
    if "seeded" in parts and given.part == 0:
        seeded(results, stages(work / "insert", [verb for verb in VERBS if verb.name == "insert"]), work)


if __name__ == "__main__":
    campaign(run)
