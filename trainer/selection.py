"""Which parameters a config means: by name, by pattern, by layer. Pure functions of names, for planning and training.

A layer range `layers:FIRST-LAST` (from 0, both included; `layers:3`, `layers:12-` and `layers:-3` also) means the
repeated blocks of the model, of encoder and decoder alike, whatever their family calls them.
"""

from __future__ import annotations

import fnmatch
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from trainer.config.trained import AdapterConfig
from trainer.failures import UserError

_NUMBERED = re.compile(r"^(.*?)\.(\d+)\.")
_RANGE = re.compile(r"^layers:(\d+)?(-)?(\d+)?$")


def layers_of(names: Iterable[str]) -> dict[str, int]:
    """Name -> index of its layer, from 0, for every name that lies in one of the model's repeated blocks.

    The blocks are the most frequent ``prefix.NUMBER.`` and those of the same kind (``encoder.block``,
    ``decoder.block``), so that a head made of numbered modules does not count.
    """
    found = {name: match for name in names if (match := _NUMBERED.match(name))}
    if not found:
        return {}
    prefixes = Counter(match[1] for match in found.values())
    kind = max(prefixes, key=lambda prefix: prefixes[prefix]).rpartition(".")[2]
    return {name: int(match[2]) for name, match in found.items() if match[1].rpartition(".")[2] == kind}


def depths(names: Sequence[str]) -> tuple[dict[str, int], int]:
    """Name -> depth from 0 (embeddings) over 1 ... L (layers) to L + 1 (head, last norm); and L + 1.

    ``names`` in the model's order: what comes before the first layer is an embedding.
    """
    layers = layers_of(names)
    top = max(layers.values(), default=-1) + 2
    first = next((index for index, name in enumerate(names) if name in layers), len(names))
    found = {}
    for index, name in enumerate(names):
        embedding = index < first or "embed" in name.lower()
        found[name] = layers[name] + 1 if name in layers else 0 if embedding else top
    return found, top


def matching(names: Sequence[str], pattern: str, layers: dict[str, int] | None = None) -> list[str]:
    """Names that a pattern means: a module's name, a parameter's name, an fnmatch pattern, or a range of layers.

    Raises:
        UserError: a range that is not one.
    """
    if pattern.startswith("layers:"):
        match = _RANGE.match(pattern)
        first, dash, last = match.groups() if match else (None, None, None)
        if first is None and last is None:
            raise UserError(f"{pattern!r} is no range of layers; write layers:0-11, layers:3, layers:12- or layers:-3")
        low = int(first or 0)
        high = int(last) if last is not None else (1 << 30 if dash else low)
        layers = layers_of(names) if layers is None else layers
        return [name for name in names if low <= layers.get(name, -1) <= high]
    return [
        name
        for name in names
        if name == pattern or name.startswith(pattern + ".") or _fits(name, (pattern, f"{pattern}.*"))
    ]


def _fits(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def select(names: Sequence[str], patterns: Iterable[str], key: str, strict: bool = True) -> set[str]:
    """Names that any of the patterns means.

    Args:
        key: of the config, for errors.
        strict: a pattern that means nothing is an error.

    Raises:
        UserError: see ``strict``; or a range of layers that is not one.
    """
    chosen: set[str] = set()
    layers = layers_of(names)
    for pattern in patterns:
        try:
            found = matching(names, pattern, layers)
        except UserError as error:
            raise UserError(f"{key}: {error}") from None
        if strict and not found:
            some, count = ", ".join(list(names)[:4]), 1 + max(layers.values(), default=-1)
            raise UserError(
                f"{key}: {pattern!r} matches no parameter of the model (it has {some}, ...; {count} layers)"
            )
        chosen.update(found)
    return chosen


def trained_names(
    names: Sequence[str], freeze: Iterable[str], train_only: Iterable[str], strict: bool = True
) -> set[str]:
    """Names of what is trained, by `model.freeze` and `model.train_only`. Raises UserError if nothing is left."""
    train_only = tuple(train_only)
    trained = select(names, train_only, "model.train_only", strict) if train_only else set(names)
    trained -= select(names, freeze, "model.freeze", strict)
    if strict and not trained:
        raise UserError("model.freeze: it freezes every parameter, nothing is left to train")
    return trained


def check_trained(names: set[str], trained: Collection[str], key: str) -> None:
    """Raise UserError where a rule of ``key`` is for ``names`` of which none is ever trained."""
    if names.isdisjoint(trained):
        raise UserError(
            f"{key}: of what it matches nothing is trained, by model.freeze, train_only or adapter; what is unfrozen "
            "later is not to be frozen there"
        )


def adapter_targets(modules: Sequence[str], targets: str | Sequence[str]) -> list[str]:
    """The linear ``modules`` that `model.adapter.targets` means. Raises UserError where a target means none."""
    layers = layers_of(f"{module}." for module in modules)
    inside = {name.removesuffix("."): index for name, index in layers.items()}
    if isinstance(targets, str):
        if not inside:
            raise UserError('model.adapter.targets: "auto" finds no linear layer in numbered blocks; name the modules')
        return [module for module in modules if module in inside]
    chosen: set[str] = set()
    for target in targets:
        if target.startswith("layers:"):
            found = matching(modules, target, inside)
        else:
            found = [m for m in modules if m == target or m.endswith("." + target) or _fits(m, (target,))]
        if not found:
            kinds = sorted({module.rpartition(".")[2] for module in modules})
            raise UserError(
                f"model.adapter.targets: {target!r} is no linear layer of the model (it has {', '.join(kinds)})"
            )
        chosen.update(found)
    return [module for module in modules if module in chosen]


def adapter_shapes(
    shapes: Mapping[str, tuple[int, ...]], adapter: AdapterConfig
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, shape) of the parameters that an adapter adds to a model of these; a matrix may lie either way round."""
    linear = [
        name.removesuffix(".weight")
        for name, shape in shapes.items()
        if name.endswith(".weight") and len(shape) == 2 and not re.search(r"(^|[._])(embed|wte|wpe|emb)", name)
    ]
    for module in adapter_targets(linear, adapter.targets):
        rows, columns = shapes[f"{module}.weight"]
        yield f"{module}.lora_A.weight", (adapter.rank, columns)
        yield f"{module}.lora_B.weight", (rows, adapter.rank)
        if adapter.use_dora:
            yield f"{module}.lora_magnitude_vector.weight", (rows,)
