"""Default threads on machines described by files: affinity, hyper-threads, kinds of cores, CPU quotas."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

import paceline
from paceline.backends.cpu.processors import cpu_quota, default_threads, processors

CPU = "sys/devices/system/cpu/cpu{}/"
EIGHT = frozenset(range(8))


def write(root: Path, files: Mapping[str, object]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{content}\n")
    return root


def per_cpu(name: str, values: list[object]) -> dict[str, object]:
    return {CPU.format(cpu) + name: value for cpu, value in enumerate(values)}


def siblings(*cores: str) -> dict[str, object]:
    """Topology of cores given as "0-1" (two hyper-threads) or "4"."""
    name = "topology/thread_siblings_list"
    return {
        CPU.format(cpu) + name: core
        for core in cores
        for cpu in range(int(core.split("-")[0]), int(core.split("-")[-1]) + 1)
    }


def version2(path: str, quotas: Mapping[str, str], top: str = "/") -> dict[str, object]:
    return {
        "proc/self/cgroup": f"0::{path}",
        "proc/self/mountinfo": "22 1 0:20 / /proc rw - proc proc rw\n"
        f"30 22 0:26 {top} /sys/fs/cgroup rw shared:4 - cgroup2 cgroup rw",
        **{f"sys/fs/cgroup/{group}/cpu.max": quota for group, quota in quotas.items()},
    }


def version1(path: str, quotas: Mapping[str, tuple[int, int]], top: str = "/") -> dict[str, object]:
    files: dict[str, object] = {
        "proc/self/cgroup": f"12:cpuset:/elsewhere\n4:cpu,cpuacct:{path}\n1:name=systemd:/init.scope\n0::/init.scope",
        "proc/self/mountinfo": f"33 32 0:28 {top} /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset\n"
        f"34 32 0:29 {top} /sys/fs/cgroup/cpu,cpuacct rw,nosuid - cgroup cgroup rw,cpu,cpuacct",
    }
    for group, (quota, period) in quotas.items():
        files[f"sys/fs/cgroup/cpu,cpuacct/{group}/cpu.cfs_quota_us"] = quota
        files[f"sys/fs/cgroup/cpu,cpuacct/{group}/cpu.cfs_period_us"] = period
    return files


def test_one_thread_per_physical_core_that_is_allowed(tmp_path: Path) -> None:
    write(tmp_path, siblings("0-1", "2-3", "4-5", "6-7"))
    assert default_threads(tmp_path, EIGHT) == 4
    assert default_threads(tmp_path, frozenset({0, 1})) == 1
    assert default_threads(tmp_path, frozenset({1, 2, 6})) == 3
    assert processors(tmp_path, frozenset({1, 2, 3})) == 3


def test_processors_whose_topology_is_unknown_count_as_cores(tmp_path: Path) -> None:
    assert default_threads(tmp_path, EIGHT) == processors(tmp_path, EIGHT) == 8


@pytest.mark.parametrize(
    ("quota", "period", "threads", "kept_busy"),
    [
        (50000, 100000, 1, 1),
        (100000, 100000, 1, 1),
        (150000, 100000, 1, 2),
        (400000, 100000, 4, 4),
        (30000, 10000, 3, 3),
    ],
)
def test_quotas_are_rounded_down_but_not_to_nothing(
    tmp_path: Path, quota: int, period: int, threads: int, kept_busy: int
) -> None:
    for name, files in (
        ("v2", version2("/", {".": f"{quota} {period}"})),
        ("v1", version1("/", {".": (quota, period)})),
    ):
        root = write(tmp_path / name, files)
        assert cpu_quota(root) == quota / period
        assert default_threads(root, EIGHT) == threads
        assert processors(root, EIGHT) == kept_busy


def test_no_quota(tmp_path: Path) -> None:
    assert cpu_quota(write(tmp_path / "v2", version2("/a", {"a": "max 100000"}))) == math.inf
    assert cpu_quota(write(tmp_path / "v1", version1("/a", {".": (-1, 100000), "a": (-1, 100000)}))) == math.inf
    assert cpu_quota(write(tmp_path / "damaged", version2("/", {".": "100000 0"}))) == math.inf
    assert cpu_quota(tmp_path / "no files") == math.inf


def test_a_quota_above_the_processors_changes_nothing(tmp_path: Path) -> None:
    assert default_threads(write(tmp_path, version2("/", {".": "1600000 100000"})), EIGHT) == 8


def test_the_tightest_of_nested_groups_counts(tmp_path: Path) -> None:
    two = {"a/b/c": "max 100000", "a/b": "500000 100000", "a": "200000 100000", "other": "100000 100000"}
    assert cpu_quota(write(tmp_path / "v2", version2("/a/b/c", two))) == 2
    one = {"a/b": (300000, 100000), "a": (-1, 100000), ".": (-1, 100000), "elsewhere": (100000, 100000)}
    assert cpu_quota(write(tmp_path / "v1", version1("/a/b", one))) == 3


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    ("path", "top"),
    [
        ("/", "/"),  # a namespace of its own
        ("/docker/1f", "/docker/1f"),  # the host's path, and a mount of the container's group
        ("/docker/1f", "/"),  # the host's path, where the mount does not show it
        ("/../1f", "/"),  # a process that was moved out of its namespace
    ],
)
def test_containers_see_their_own_group_at_the_top(tmp_path: Path, version: int, path: str, top: str) -> None:
    if version == 2:
        files = version2(path, {".": "250000 100000"}, top)
    else:
        files = version1(path, {".": (250000, 100000)}, top)
    assert default_threads(write(tmp_path, files), EIGHT) == 2


def test_efficiency_cores_of_intel_are_left_out(tmp_path: Path) -> None:
    cores = siblings("0-1", "2-3", "4", "5", "6", "7")
    write(tmp_path, {**cores, "sys/devices/cpu_core/cpus": "0-3", "sys/devices/cpu_atom/cpus": "4-7"})
    assert default_threads(tmp_path, EIGHT) == 2
    assert default_threads(tmp_path, frozenset({3, 4, 5})) == 1
    assert default_threads(tmp_path, frozenset({4, 5, 6})) == 3, "only efficiency cores are allowed"
    assert processors(tmp_path, EIGHT) == 8


def test_slow_cores_are_left_out(tmp_path: Path) -> None:
    write(tmp_path, per_cpu("cpu_capacity", [1024, 1024, 980, 980, 414, 414, 414, 414]))
    assert default_threads(tmp_path, EIGHT) == 4
    assert default_threads(tmp_path, frozenset({0, 4, 5, 6})) == 1
    assert default_threads(tmp_path, frozenset({4, 5, 6})) == 3


def test_clock_rates_tell_nothing(tmp_path: Path) -> None:
    write(tmp_path, per_cpu("cpufreq/cpuinfo_max_freq", [5100000] * 2 + [3300000] * 6))
    assert default_threads(tmp_path, EIGHT) == 8


def test_offline_processors_do_not_count(tmp_path: Path) -> None:
    """They have no topology or capacity, and the affinity mask lacks them."""
    write(tmp_path, siblings("0", "2-3") | {"sys/devices/cpu_core/cpus": "0,2-3"})
    assert default_threads(tmp_path, frozenset({0, 2, 3})) == 2


def test_performance_cores_of_apple(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "sysctl"
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for body, cores in (("[ $2 = hw.perflevel0.physicalcpu ] && echo 6", 6), ("[ $2 = hw.physicalcpu ] && echo 4", 4)):
        program.write_text(f"#!/bin/sh\n{body}\n")
        program.chmod(0o755)
        assert default_threads(tmp_path) == cores


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity masks")
def test_this_machine() -> None:
    before = os.sched_getaffinity(0)
    assert 1 <= default_threads() <= processors() <= len(before)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert default_threads() == processors() == 1
    finally:
        os.sched_setaffinity(0, before)


def test_no_more_threads_than_processors() -> None:
    told: list[str] = []
    engine = paceline.load("tiny-python", threads=255, draft_tokens=0, notify=told.append)
    assert engine.backend.threads == processors()
    assert any(f"threads: {processors()}" in line for line in told)
