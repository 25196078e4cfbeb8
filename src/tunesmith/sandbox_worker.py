"""The process that runs a stranger's Python: started by `sandbox.py`, never imported; the standard library alone.

What the program may touch is built from nothing: a user, mount, process, network and IPC namespace of its own, in which
the interpreter's folders stand read-only and one small folder in memory can be written. Four processes, each the
parent of the next: the outer one, which writes the user mapping; the builder, which makes the namespaces; the first
process inside, whose end takes all others with it; and the program's, which has given up every privilege.

One line of JSON comes out: {"passed": ..., "why": ...}, or {"broken": ...} where containment could not be set up.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import platform
import resource
import secrets
import signal
import struct
import sys
import types
from typing import Any, NoReturn

NOBODY = 65534
# Namespaces (sched.h), flags of mounts (sys/mount.h, linux/mount.h) and of prctl (sys/prctl.h).
NEWNS, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
NOSUID, NODEV, BIND, RECURSIVE, PRIVATE, DETACH = 2, 4, 4096, 16384, 1 << 18, 2
ATTR_READ_ONLY, ATTR_NOSUID, ATTR_NODEV, AT_RECURSIVE, AT_HERE = 1, 2, 4, 0x8000, -100
DIE_WITH_PARENT, SET_DUMPABLE, NO_NEW_PRIVILEGES, SET_SECCOMP, FILTER = 1, 4, 38, 22, 2
CAPABILITIES_3 = 0x20080522
DEVICES = ("null", "zero", "random", "urandom")
WHY_BYTES = 2000
# By machine: its audit number (linux/audit.h); pivot_root and mount_setattr; and what a program has no use for, which
# could hold memory that no limit counts (shmget, memfd_create), look at another process, or talk to more of the kernel.
MACHINES: dict[str, tuple[int, int, int, tuple[int, ...]]] = {
    "x86_64": (
        0xC000003E,
        155,
        442,
        (29, 101, 165, 246, 248, 249, 250, 272, 298, 308, 310, 311, 319, 321, 323, 425, 447),
    ),
    "aarch64": (
        0xC00000B7,
        41,
        442,
        (40, 97, 104, 117, 194, 217, 218, 219, 241, 268, 270, 271, 279, 280, 282, 425, 447),
    ),
}
X32 = 0x40000000  # calls of another numbering on x86-64
libc = ctypes.CDLL(None, use_errno=True)


def called(what: str, result: int) -> None:
    """OSError that names the call, where it failed."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def mount(source: str, target: str, kind: str | None, flags: int, options: str = "") -> None:
    found = libc.mount(source.encode(), target.encode(), kind and kind.encode(), flags, options.encode())
    called(f"mount {source} on {target}", found)


def seal(target: str, attributes: int, flags: int, number: int) -> None:
    """Sets attributes of a mount, with all mounts below it where `flags` says so."""
    wanted = struct.pack("QQQQ", attributes, 0, 0, 0)
    called(f"mount_setattr {target}", libc.syscall(number, AT_HERE, target.encode(), flags, wanted, len(wanted)))


def prctl(option: int, *values: Any) -> None:
    called(f"prctl {option}", libc.prctl(option, *values, *(0,) * (4 - len(values))))


def build(root: str, shown: list[str], scratch_bytes: int, numbers: tuple[int, int]) -> None:
    """Makes `root` the root of this mount namespace: `shown` folders and files read-only, and /scratch.

    The tree stands one folder below the real root and is entered by chroot, where the kernel grants no further user
    namespaces.
    """
    pivot_root, mount_setattr = numbers
    mount("none", "/", None, RECURSIVE | PRIVATE)
    mount("tmpfs", root, "tmpfs", NOSUID | NODEV, "size=1m,mode=755")
    tree = f"{root}/tree"
    os.makedirs(f"{tree}/dev")
    os.makedirs(f"{tree}/scratch")
    mount("tmpfs", f"{tree}/scratch", "tmpfs", NOSUID | NODEV, f"size={scratch_bytes},nr_inodes=4096,mode=1777")
    os.symlink("scratch", f"{tree}/tmp")  # first, because what is shown may lie in /tmp
    for path in [*shown, *(f"/dev/{name}" for name in DEVICES)]:
        target = tree + path
        os.makedirs(os.path.dirname(target), exist_ok=True)
        if os.path.islink(path):
            os.symlink(os.readlink(path), target)
            continue
        if os.path.isdir(path):
            os.makedirs(target, exist_ok=True)
        else:
            os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
        mount(path, target, None, BIND | RECURSIVE)
        device = path.startswith("/dev/")
        seal(target, ATTR_NOSUID | (0 if device else ATTR_READ_ONLY | ATTR_NODEV), AT_RECURSIVE, mount_setattr)
    seal(root, ATTR_READ_ONLY | ATTR_NOSUID | ATTR_NODEV, 0, mount_setattr)
    os.chdir(root)
    called("pivot_root", libc.syscall(pivot_root, b".", b"."))
    called("umount2", libc.umount2(b".", DETACH))
    os.chroot("/tree")
    os.chdir("/scratch")


def give_up(limits: dict[str, Any], machine: tuple[int, int, int, tuple[int, ...]]) -> None:
    """The program's process becomes nobody, without capabilities, within its limits, without the calls of `machine`."""
    if os.getuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    called("capset", libc.capset(struct.pack("Ii", CAPABILITIES_3, 0), bytes(24)))
    prctl(NO_NEW_PRIVILEGES, 1)
    for name, most in limits["rlimits"].items():
        resource.setrlimit(getattr(resource, name), (most, most))
    audit, _, _, denied = machine
    # Berkeley packet filter: of another machine, kill; a denied call fails with EPERM; all others are allowed.
    checks = [(0x20, 0, 0, 4), (0x15, 1, 0, audit), (0x06, 0, 0, 0x80000000), (0x20, 0, 0, 0)]
    checks += [(0x35, 0, 1, X32), (0x06, 0, 0, 0x80000000)]
    for number in denied:
        checks += [(0x15, 0, 1, number), (0x06, 0, 0, 0x00050001)]
    checks.append((0x06, 0, 0, 0x7FFF0000))
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *check) for check in checks))
    program = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(checks), ctypes.addressof(code)))
    prctl(SET_SECCOMP, FILTER, ctypes.byref(program))


def run(text: str) -> str:
    """Runs the program as `__main__`; "" where it came to its end, else what ended it."""
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    try:
        exec(compile(text, "program", "exec"), module.__dict__)
    except BaseException as error:
        with contextlib.suppress(BaseException):
            return f"{type(error).__name__}: {error}".strip(": ")[:WHY_BYTES]
        return type(error).__name__
    return ""


def program(asked: dict[str, Any], machine: tuple[int, int, int, tuple[int, ...]], sink: int) -> NoReturn:
    """The last process: privileges away, then the program. Only its end writes the word that `inside` waits for."""
    own, told = os.getpid(), b"broken"
    try:
        give_up(asked, machine)
        null = os.open("/dev/null", os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(null, stream)
        word = asked.pop("word").encode()
        told = b"failed"
        why = run(asked.pop("program"))
        told = word if not why else b"failed" + why.encode("utf-8", "replace")
    except BaseException as error:
        told += str(error).encode("utf-8", "replace")
    if os.getpid() == own:  # a child that the program forked comes here too
        os.write(sink, told[:WHY_BYTES])
    os._exit(0)


def inside(asked: dict[str, Any], machine: tuple[int, int, int, tuple[int, ...]]) -> dict[str, Any]:
    """The first process of the namespaces: what became of the program."""
    prctl(DIE_WITH_PARENT, signal.SIGKILL)
    prctl(SET_DUMPABLE, 0)
    asked["word"] = word = secrets.token_hex(16)
    source, sink = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(source)
        os.closerange(3, sink)
        os.closerange(sink + 1, 256)
        program(asked, machine, sink)
    os.close(sink)
    told = os.read(source, WHY_BYTES)
    _, status = os.waitpid(child, 0)
    if told == word.encode():
        return {"passed": True, "why": ""}
    if told.startswith(b"broken"):
        return {"broken": told[6:].decode("utf-8", "replace")}
    code = os.waitstatus_to_exitcode(status)
    if not told.startswith(b"failed"):
        return {"passed": False, "why": f"the process ended with {code}"}
    return {"passed": False, "why": told[6:].decode("utf-8", "replace")}


def builder(asked: dict[str, Any], told: int, mapped: int) -> dict[str, Any]:
    """In namespaces of its own: builds the root and starts the first process inside."""
    if platform.machine() not in MACHINES:
        return {"broken": f"no list of system calls for {platform.machine()}"}
    machine = MACHINES[platform.machine()]
    called("unshare", libc.unshare(NEWUSER | NEWNS | NEWPID | NEWNET | NEWIPC | NEWUTS))
    prctl(DIE_WITH_PARENT, signal.SIGKILL)  # new privileges would have ended what was set before
    os.write(told, b".")
    if os.read(mapped, 1) != b".":
        return {"broken": "the user mapping was refused"}
    build(asked["root"], asked["shown"], asked["scratch_bytes"], machine[1:3])
    return in_child(lambda: inside(asked, machine))


def in_child(work: Any) -> dict[str, Any]:
    """What `work` returns in a child process; an OSError there is what is broken."""
    source, sink = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            found = work()
        except (OSError, ValueError, MemoryError) as error:
            found = {"broken": error.strerror if isinstance(error, OSError) else str(error)}
        os.write(sink, json.dumps(found).encode())
        os._exit(0)
    os.close(sink)
    with open(source, "rb") as answer:
        told = answer.read()
    os.waitpid(child, 0)
    return json.loads(told) if told else {"passed": False, "why": "the process ended early"}


def map_users(child: int) -> None:
    """In the namespace of `child`: nobody is this user; or, where this is root, root is root and nobody is nobody."""
    uid, gid = os.geteuid(), os.getegid()
    both = f"0 0 1\n{NOBODY} {NOBODY} 1"
    if uid != 0:
        write(f"/proc/{child}/setgroups", "deny")
    write(f"/proc/{child}/uid_map", both if uid == 0 else f"{NOBODY} {uid} 1")
    write(f"/proc/{child}/gid_map", both if uid == 0 else f"{NOBODY} {gid} 1")


def write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def main() -> None:
    prctl(DIE_WITH_PARENT, signal.SIGKILL)
    asked = json.load(sys.stdin)
    sys.path[:] = asked["path"]
    (told, tell), (mapped, maps) = os.pipe(), os.pipe()
    source, sink = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(told)
        os.close(maps)
        try:
            found = builder(asked, tell, mapped)
        except OSError as error:
            found = {"broken": str(error.strerror)}
        os.write(sink, json.dumps(found).encode())
        os._exit(0)
    for end in (tell, mapped, sink):
        os.close(end)
    if os.read(told, 1) == b".":
        with contextlib.suppress(OSError):  # the builder says what is broken
            map_users(child)
            os.write(maps, b".")
    os.close(maps)
    with open(source, "rb") as answer:
        sys.stdout.write(answer.read().decode())
    os.waitpid(child, 0)


if __name__ == "__main__":
    main()
