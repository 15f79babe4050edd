"""What is wrong with the nodes of a config, from what their probes told: pure functions, a sentence a problem."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import launcher
from launcher.doctor_nodes import Probes
from launcher.doctor_probe import source_digest
from trainer.config.schema import LaunchConfig

Json = dict[str, Any]


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


def gpu_problems(facts: Mapping[str, Json], wanted: int | None, on_cpu: bool) -> Iterator[str]:
    """Nodes without the GPUs that the config counts on, and GPUs that it would leave idle."""
    for name, fact in facts.items():
        there = len(fact.get("gpus") or ())
        if wanted and there < wanted:
            yield f"{name} has {there} GPU(s), cluster.gpus_per_node is {wanted}"
        if wanted is None and there and not on_cpu:
            yield f"{name} has {there} GPU(s): set cluster.gpus_per_node={there}, or 0 to train on CPUs"


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
    paths = [config.model.path, config.model.tokenizer]
    for source in (*config.data.train, *config.data.evaluation):
        paths += [getattr(source, key, None) for key in ("path", "source_path", "target_path")]
    return sorted({path for path in paths if path and os.path.isabs(path) and os.path.exists(path)})
