"""How many threads to run: processors by affinity mask, kinds of cores, and the CPU quotas of control groups.

Files are read below `root`, so that tests can describe other machines.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

ROOT = Path("/")
FAST = 0.8  # of the fastest core's capacity: less is an efficiency core; equal cores differ by less (favoured cores)


def processors(root: Path = ROOT, allowed: frozenset[int] | None = None) -> int:
    """Processors that this process can keep busy, hyper-threads counted; a part of one by its quota counts as one."""
    return math.ceil(min(len(allowed or _affinity()), cpu_quota(root)))


def default_threads(root: Path = ROOT, allowed: frozenset[int] | None = None) -> int:
    """One thread per physical performance core that this process may run on, but no more than its CPU quota.

    Hyper-threads share the units that the kernels saturate. Efficiency cores are left out: work on rows is divided
    equally and barriers wait for the last worker, so that slow cores delay fast ones. A quota is rounded down: with
    more threads than it, all of them are stopped for the rest of each period.
    """
    cores = _apple_cores() if sys.platform == "darwin" else _fast_cores(root, allowed or _affinity())
    return max(1, int(min(cores, cpu_quota(root))))


def cpu_quota(root: Path = ROOT) -> float:
    """Processors' worth of time that control groups allow, the least of all groups around this process; or infinity."""
    return min((_quota(group) for group in _groups(root)), default=math.inf)


def _affinity() -> frozenset[int]:
    """Numbers of the processors that this process may run on."""
    return frozenset(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1))


def _fast_cores(root: Path, allowed: frozenset[int]) -> int:
    """Physical cores among the fast ones of these processors."""
    folder = root / "sys/devices/system/cpu"
    siblings = {
        "".join(_lines(folder / f"cpu{cpu}/topology/thread_siblings_list")) or str(cpu) for cpu in _fast(root, allowed)
    }
    return len(siblings)


def _fast(root: Path, allowed: frozenset[int]) -> frozenset[int]:
    """Those of the processors that are not of an efficiency core: all, if nothing tells them apart.

    Clock rates tell nothing: AMD's compact cores have a lower one, and are worth using.
    """
    intel = frozenset(cpu for line in _lines(root / "sys/devices/cpu_core/cpus") for cpu in _cpu_list(line))
    if intel & allowed:
        return intel & allowed
    capacity = {cpu: _number(root / f"sys/devices/system/cpu/cpu{cpu}/cpu_capacity") for cpu in allowed}
    if min(capacity.values()) > 0:
        return frozenset(cpu for cpu, value in capacity.items() if value >= FAST * max(capacity.values()))
    return allowed


def _apple_cores() -> int:
    for name in ("hw.perflevel0.physicalcpu", "hw.physicalcpu"):  # the second: Macs with one kind of cores
        try:
            return int(subprocess.run(["sysctl", "-n", name], capture_output=True, check=True).stdout)
        except (OSError, ValueError, subprocess.CalledProcessError):
            continue
    return os.cpu_count() or 1


def _groups(root: Path) -> Iterator[Path]:
    """Folders of this process's control groups for CPU time, each followed by those of the groups around it.

    Both versions may be mounted. In a container the mount may begin at the container's group ("/docker/...") while the
    process's path counts from the host's topmost group, or both count from the container's own.
    """
    paths: dict[str, PurePosixPath] = {}
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, group = line.split(":", 2)
        paths |= dict.fromkeys(controllers.split(","), PurePosixPath(group))  # version 2 names no controllers
    for line in _lines(root / "proc/self/mountinfo"):
        where, _, what = line.partition(" - ")
        top, mount = where.split()[3:5]
        kind, *_, options = what.split()
        controller = {"cgroup": "cpu", "cgroup2": ""}.get(kind)
        if controller is None or controller not in ("", *options.split(",")) or controller not in paths:
            continue
        path = paths[controller]
        inner = path.relative_to(top) if path.is_relative_to(top) and ".." not in path.parts else PurePosixPath()
        for folder in (inner, *inner.parents):
            yield root / mount.lstrip("/") / folder


def _quota(group: Path) -> float:
    """A group's own limit, in processors; see cgroups(7), `cpu.max` and `cpu.cfs_quota_us`."""
    fields = " ".join(_lines(group / "cpu.max")).split() or [
        word for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us") for word in _lines(group / name)
    ]
    try:
        quota, period = map(int, fields)
    except ValueError:  # "max", or no such files
        return math.inf
    return quota / period if quota > 0 and period > 0 else math.inf


def _cpu_list(text: str) -> Iterator[int]:
    """The numbers of a list such as "0-3,8"."""
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        yield from range(int(first), int(last or first) + 1)


def _number(path: Path) -> int:
    """What a file holds, or 0."""
    text = "".join(_lines(path))
    return int(text) if text.isdigit() else 0


def _lines(path: Path) -> list[str]:
    """A file's lines, none if it cannot be read."""
    try:
        return path.read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return []
