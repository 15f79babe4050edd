"""Host files as DeepSpeed and Open MPI take them: a line `name slots=8` for each host, `#` begins a comment."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def with_hostfile(cluster: dict[str, Any]) -> dict[str, Any]:
    """The `cluster` section with `hostfile` replaced by the `hosts` in it and, from its slots, `processes_per_node`.

    A run's record therefore names its hosts, whatever becomes of the file. Raises ValueError.
    """
    name = cluster.get("hostfile")
    if not isinstance(name, str):
        return cluster
    if cluster.get("hosts"):
        raise ValueError("give one of `hosts` and `hostfile`")
    try:
        slots = parse_hostfile(Path(name).read_text(encoding="utf-8"), name)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"hostfile {name} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    result = {key: value for key, value in cluster.items() if key != "hostfile"} | {"hosts": list(slots)}
    given = [count for count in slots.values() if count is not None]
    wanted = result.get("processes_per_node")
    if wanted is None and given:
        if len(set(given)) > 1 or len(given) < len(slots):
            shown = ", ".join(f"{host} {'-' if count is None else count}" for host, count in slots.items())
            raise ValueError(
                f"hostfile {name}: hosts differ in their slots ({shown}), and every host runs the same number of "
                "ranks; give `processes_per_node`"
            )
        result["processes_per_node"] = given[0]
    elif isinstance(wanted, int) and given and wanted > min(given):
        raise ValueError(f"hostfile {name}: a host has {min(given)} slot(s), processes_per_node is {wanted}")
    return result


def parse_hostfile(text: str, name: str) -> dict[str, int | None]:
    """Host -> slots (None: not given), in the file's order. Raises ValueError naming the line."""
    found: dict[str, int | None] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        host, *options = words
        if host in found:
            raise ValueError(f"hostfile {name}, line {number}: {host} appears twice; give each host one line")
        found[host] = None
        for option in options:
            key, _, value = option.partition("=")
            if key != "slots" or not value.isdecimal() or int(value) == 0:
                raise ValueError(f"hostfile {name}, line {number}: found {option!r}; expected `{host} slots=8`")
            found[host] = int(value)
    if not found:
        raise ValueError(f"hostfile {name} names no host")
    return found
