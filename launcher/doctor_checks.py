"""What is wrong with the nodes of a config, from what their probes told: pure functions, a sentence a problem."""

from __future__ import annotations

import os
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping

import launcher
from launcher.console import gib
from launcher.doctor_nodes import Probes
from launcher.doctor_probe import source_digest
from trainer.config.schema import LaunchConfig
from trainer.probe_plan import slow_links
from trainer.rundir import Json

_IDLE_BYTES = 1 << 30
_IDLE_PERCENT = 10
_CLOCK_SECONDS = 1.0
_LEAST_FREE = 1 << 30
_SLOW_DISK = 3.0


def essential_problems(found: Probes, facts: Mapping[str, Json], folder: str, nonce: str) -> Iterator[str]:
    """Nodes that are away, listed twice, without this dsft, or without the shared storage."""
    for name, why in found.absent.items():
        yield f"{name} does not answer: {why}"
    identities: dict[str, str] = {}
    for name, probe in found.nodes.items():
        other = identities.setdefault(probe.hello["identity"] or name, name)
        if other != name:
            yield f"{name} and {other} are the same machine: name it once"
    for name, fact in facts.items():
        if "error" in fact:
            yield f"{name}: {fact['error']}"
            continue
        if (fact["dsft"], fact["source"]) != (launcher.__version__, source_digest()):
            yield (
                f"{name} has another dsft: {fact['dsft']} ({fact['source']}) in {fact['root']}, here it is "
                f"{launcher.__version__} ({source_digest()}); install the same, or set cluster.python"
            )
        if fact["sees"] != nonce:
            yield f"{name} does not see {folder}: the run directory has to lie on storage that all hosts share"
        elif fact["writes"] is not None:
            yield f"{name} cannot write in {folder}: {fact['writes']}"
        for path in fact["missing"]:
            yield f"{name} has no {path}: it has to lie on storage that all hosts share"


def gpu_problems(facts: Mapping[str, Json], wanted: int | None, on_cpu: bool, idle: bool = False) -> Iterator[str]:
    """Nodes without the GPUs that the config counts on, GPUs that it would not use, and (`idle`) those in use."""
    for name, fact in facts.items():
        gpus = fact.get("gpus") or ()
        if wanted and len(gpus) < wanted:
            yield f"{name} has {len(gpus)} GPU(s), cluster.gpus_per_node is {wanted}"
        if wanted is None and gpus and not on_cpu:
            yield f"{name} has {len(gpus)} GPU(s): set cluster.gpus_per_node={len(gpus)}, or 0 to train on CPUs"
        for index, gpu in enumerate(gpus if idle and wanted != 0 else ()):
            if gpu["used"] > _IDLE_BYTES or gpu["busy"] > _IDLE_PERCENT:
                yield f"GPU {index} of {name} is in use: {gib(gpu['used'])} of its memory, {gpu['busy']} % of the time"


def clock_problems(offsets: Mapping[str, float]) -> Iterator[str]:
    """Nodes whose clocks are off from the middle of all, by more than a log's reader would forgive."""
    middle = statistics.median(offsets.values()) if offsets else 0.0
    for name, offset in offsets.items():
        if abs(offset - middle) > _CLOCK_SECONDS:
            yield f"the clock of {name} is {abs(offset - middle):.1f} s {'ahead' if offset > middle else 'behind'}"


def disk_problems(disks: Mapping[str, Json]) -> Iterator[str]:
    """Nodes to which the storage is full, fails, or is much slower than to the others."""
    for name, disk in disks.items():
        if "error" in disk:
            yield f"{name} cannot use the shared storage: {disk['error']}"
        elif disk["free"] < _LEAST_FREE:
            yield f"{name} sees {gib(disk['free'])} of free disk"
    measured = {name: disk for name, disk in disks.items() if "error" not in disk}
    for way in ("write", "read"):
        usual = statistics.median([disk[way] for disk in measured.values()]) if measured else 0.0
        for name, disk in measured.items():
            if disk[way] * _SLOW_DISK < usual:
                yield f"{name} {way}s the shared storage at {gib(disk[way])}/s, others at {gib(usual)}/s"


def reach_problems(reach: Mapping[str, Json]) -> Iterator[str]:
    """Ports that are closed between nodes: a node that nobody reaches is named once."""
    failed = {(name, peer): why for name, answer in reach.items() for peer, why in answer.get("failed", {}).items()}
    for name in reach:
        if "error" in reach[name]:
            yield f"{name}: {reach[name]['error']}"
        others = [peer for peer in reach if peer != name]
        if len(others) > 1 and all((peer, name) in failed for peer in others):
            yield f"no node can open a TCP connection to {name}: {failed[(others[0], name)]}; is there a firewall?"
            failed = {link: why for link, why in failed.items() if link[1] != name}
    for (name, peer), why in failed.items():
        yield f"{name} cannot open a TCP connection to {peer}: {why}; is there a firewall?"


def network_problems(pairs: Mapping[tuple[str, str], float]) -> Iterator[str]:
    """Slow nodes (all that they send, or receive, is slow), then slow links between other nodes."""
    slow = slow_links(pairs)
    if not slow:
        return
    usual = gib(statistics.median(speed for link, speed in pairs.items() if link not in slow))
    explained: set[tuple[str, str]] = set()
    for index, verb in ((0, "sends"), (1, "receives")):
        for name in sorted({node for link in pairs for node in link}):
            links = [link for link in pairs if link[index] == name]
            if len(links) > 1 and all(link in slow for link in links):
                explained |= set(links)
                speed = statistics.median(pairs[link] for link in links)
                yield f"{name} is slow: it {verb} {gib(speed)}/s, where other nodes reach {usual}/s"
    for source, target in slow:
        if (source, target) not in explained:
            yield f"the link from {source} to {target} is slow: {gib(pairs[(source, target)])}/s, others {usual}/s"


def version_problems(facts: Mapping[str, Json]) -> Iterator[str]:
    """Packages whose versions are not the same everywhere; the nodes that differ from most are named."""
    versions = {
        name: {"python": fact["python"], **fact["packages"]} for name, fact in facts.items() if "packages" in fact
    }
    for package in next(iter(versions.values()), {}):
        counted = Counter(version[package] for version in versions.values())
        usual = counted.most_common(1)[0][0]
        for name, version in versions.items():
            if version[package] != usual:
                yield f"{name} has {package} {version[package] or '-'}, most nodes have {usual or '-'}"
            elif usual is None and package != "deepspeed":
                yield f"{name} has no {package}"


def needed_paths(config: LaunchConfig) -> list[str]:
    """Local files and folders of the config that ranks read."""
    paths = [config.model.path, config.model.tokenizer, config.model.processor]
    for source in (*config.data.train, *config.data.evaluation):
        paths += [getattr(source, key, None) for key in ("path", "source_path", "target_path")]
    return sorted({path for path in paths if path and os.path.isabs(path) and os.path.exists(path)})
