"""Reads a config: files, `extends`, cluster profiles and `--set`, made into a `LaunchConfig` or every error at once."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from trainer.config.errors import ConfigError, ConfigErrors, dotted, found, is_secret, translate
from trainer.config.schema import LaunchConfig

__all__ = ["ConfigError", "ConfigErrors", "config_hash", "load_config", "redacted"]

Keys = tuple[str | int, ...]

# A shorter way to write a setting that everybody uses.
_ALIASES: dict[Keys, Keys] = {("training", "learning_rate"): ("training", "optimizer", "learning_rate")}
_LOCAL_SUFFIXES = (".model", ".json")
_IMAGE_SUFFIXES = (".sif", ".sqsh", ".sqfs", ".squashfs", ".img")


def load_config(path: Path, overrides: Sequence[str] = ()) -> LaunchConfig:
    """Read a config and its base files, apply ``--set`` overrides (``a.b.c=value``), and check all of it.

    The result is complete: defaults are filled in and local paths are absolute, each taken relative to the file it
    was written in (overrides: to the config file).

    Raises:
        ConfigErrors: with every error of the config in ``errors``.
    """
    path = Path(os.path.abspath(path))
    loader = _Loader(path)
    loader.read(path, ())
    if "backend" in loader.data and not loader.data.keys() & {"task", "model", "data", "training"}:
        told = f'{path.name} is the profile of a cluster: name it in a config, "cluster": "{path.name}"'
        raise ConfigErrors(path.name, [ConfigError("", told)])
    loader.override(overrides)
    loader.data.setdefault("output_dir", str(path.parent / "runs"))
    return loader.checked()


def change_config(data: dict[str, Any], overrides: Sequence[str], name: str) -> LaunchConfig:
    """A config given as JSON, with ``--set`` overrides; ``name`` stands for it in messages. Raises ConfigErrors."""
    loader = _Loader(Path(os.path.abspath(name)))
    loader.data = data
    loader.override(overrides)
    return loader.checked()


def config_hash(config: LaunchConfig) -> str:
    """A digest of what decides the result of training: the task, model, data and training sections (64 hex digits)."""
    parts = config.model_dump(mode="json", include={"task", "model", "data", "training"})
    return hashlib.sha256(json.dumps(parts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


_KINDS = {"cluster": "backend", "task": "type"}  # sections of several kinds: the key that names it

REDACTED = "***"  # in place of a secret


def redacted(config: LaunchConfig) -> dict[str, Any]:
    """The config as JSON, with REDACTED for the values of environment variables that look like secrets."""
    data: dict[str, Any] = config.model_dump(mode="json")
    environment = data["cluster"].get("environment", {})
    data["cluster"]["environment"] = {
        name: REDACTED if is_secret((name,)) else value for name, value in environment.items()
    }
    return data


class _Loader:
    """Merges files and overrides; remembers where each value came from, so that errors can say so."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data: dict[str, Any] = {}
        self.errors: list[ConfigError] = []
        self.incomplete = False
        self._origins: dict[Keys, tuple[str, Keys]] = {}  # path -> (where it was written, as which path)

    def checked(self) -> LaunchConfig:
        """What has been read, or every error in it."""
        for keys, value in _not_text(self.data, ()):
            self.add(keys, f"{value!a} is not UTF-8 text; if it is a path, rename what has such a name")
        try:
            config = LaunchConfig.model_validate(self.data)
        except ValidationError as error:
            for keys, message, missing in translate(error, LaunchConfig):
                # Without one of its files a config misses much: only what is there can be judged.
                if not (missing and self.incomplete):
                    self.add(keys, message)
            raise ConfigErrors(self.path.name, self.errors) from None
        if self.errors:
            raise ConfigErrors(self.path.name, self.errors)
        return config

    def add(self, keys: Keys, message: str, origin: str | None = None) -> None:
        if origin is None:
            origin, keys = self._origin(keys)
        self.errors.append(
            ConfigError(dotted(keys), message, None if origin == str(self.path) else self._short(origin))
        )

    def read(self, path: Path, chain: tuple[Path, ...]) -> None:
        """Merge a file, after the one it extends."""
        layer = self._parse(path, "extends" if chain else "")
        if layer is None:
            self.incomplete = True
            return
        layer.pop("$schema", None)  # for editors
        base = layer.pop("extends", None)
        if isinstance(base, str):
            base_path = Path(_absolute(base, path.parent))
            if base_path == path or base_path in chain:
                cycle = " -> ".join(item.name for item in (*chain, path, base_path))
                self.add(("extends",), f"goes in a circle: {cycle}", str(path))
            else:
                self.read(base_path, (*chain, path))
        elif base is not None:
            self.add(("extends",), f"found {found(base)}; expected the path of one config file", str(path))
        self._merge_layer(layer, str(path), path.parent)

    def override(self, overrides: Sequence[str]) -> None:
        """Apply ``a.b.c=value`` items, in order."""
        for item in overrides:
            name, equals, text = item.partition("=")
            first, *others = name.strip().split(".")
            keys: Keys = (first, *(int(part) if part.isdecimal() else part for part in others))
            if not equals or "" in keys:
                shown = item if not equals else f"{name}=..."  # the value may be a secret
                self.errors.append(ConfigError("", f"--set {shown}: expected key=value, as in training.max_steps=100"))
                continue
            try:
                value = _loads(text)
            except ValueError:
                value = text
            problem = self._set(_ALIASES.get(keys, keys), value, keys)
            if problem:
                self.add(keys, problem, "--set")

    def _set(self, keys: Keys, value: Any, written: Keys) -> str | None:
        """Set one value, creating objects on the way; returns what is wrong with the path, if something is."""
        if keys[0] == "extends":
            return "only a file can extend another: write it into the config"
        if keys == ("cluster",) and isinstance(value, str):
            self._merge_layer({"cluster": value}, "--set", self.path.parent)
            return None
        node: Any = self.data
        for depth, key in enumerate(keys):
            if isinstance(node, list) and not (isinstance(key, int) and key < len(node)):
                return f"{dotted(keys[:depth])} has {len(node)} items, counted from 0; there is no {key}"
            if not isinstance(node, dict | list):
                return f"{dotted(keys[:depth])} is {found(node, keys[:depth])}; nothing can be set in it"
            step: Any = key if isinstance(node, list) else str(key)
            if depth == len(keys) - 1:
                node[step] = _absolute_at(keys, value, self.path.parent)
            elif isinstance(node, dict) and node.get(step) is None:
                node[step] = {}
                self._origins[keys[: depth + 1]] = ("--set", keys[: depth + 1])
            node = node[step]
        self._origins = {path: origin for path, origin in self._origins.items() if path[: len(keys)] != keys}
        self._origins[keys] = ("--set", written)
        return None

    def _merge_layer(self, layer: dict[str, Any], origin: str, folder: Path) -> None:
        renamed: dict[Keys, Keys] = {}
        for alias, full in _ALIASES.items():
            section = layer.get(str(alias[0]))
            if not isinstance(section, dict) or alias[1] not in section:
                continue
            value, optimizer = section.pop(alias[1]), section.setdefault(full[1], {})
            if isinstance(optimizer, dict):  # else it is refused itself
                if full[2] in optimizer:
                    self.add(alias, f"is also given as {dotted(full)}; keep one of them", origin)
                optimizer[full[2]] = value
                renamed[full] = alias
        if isinstance(layer.get("cluster"), str):
            profile = Path(_absolute(layer["cluster"], folder))
            self.data.pop("cluster", None)  # a profile stands for the whole section
            cluster = self._parse(profile, "cluster")
            del layer["cluster"]
            if cluster is None:
                self.incomplete = True
            else:
                _make_absolute({"cluster": cluster}, profile.parent)
                self._merge({"cluster": cluster}, self.data, str(profile), {}, ())
        _make_absolute(layer, folder)
        for name, kind in _KINDS.items():  # keys of one kind mean nothing to another
            kinds = [of.get(name, {}).get(kind) for of in (layer, self.data) if isinstance(of.get(name, {}), dict)]
            if None not in kinds and len(set(kinds)) > 1:
                del self.data[name]
                self._origins = {path: origin for path, origin in self._origins.items() if path[0] != name}
        self._merge(layer, self.data, origin, renamed, ())

    def _merge(
        self,
        layer: dict[str, Any],
        into: dict[str, Any],
        origin: str,
        renamed: dict[Keys, Keys],
        at: Keys,
    ) -> None:
        """Deep merge: objects are merged key by key, everything else (lists too) is replaced."""
        for key, value in layer.items():
            here = (*at, key)
            if isinstance(value, dict):
                if not isinstance(into.get(key), dict):
                    into[key] = {}
                    self._origins[here] = (origin, here)
                self._merge(value, into[key], origin, renamed, here)
            else:
                into[key] = value
                self._origins[here] = (origin, renamed.get(here, here))

    def _origin(self, keys: Keys) -> tuple[str, Keys]:
        for length in range(len(keys), 0, -1):
            if keys[:length] in self._origins:
                origin, written = self._origins[keys[:length]]
                return origin, (*written, *keys[length:])
        return str(self.path), keys

    def _parse(self, path: Path, named_by: str) -> dict[str, Any] | None:
        """A file's JSON object, or None after noting why there is none. ``named_by``: the key that names the file."""
        try:
            value = _loads(path.read_bytes().decode("utf-8-sig"))
        except FileNotFoundError:
            message = "no such file"
            if named_by == "cluster":
                message += '; expected the path of a profile, or an object: {"backend": "slurm", ...}'
        except OSError as error:
            message = f"cannot be read: {error.strerror}"
        except UnicodeDecodeError as error:
            message = f"is not UTF-8 text: byte {error.start}"
        except json.JSONDecodeError as error:
            message = f"is not valid JSON: line {error.lineno}, column {error.colno}: {error.msg}"
        except (ValueError, RecursionError) as error:
            message = f"is not valid JSON: {error}"
        else:
            if isinstance(value, dict):
                return value
            message = f"found {found(value)}; expected an object: {{...}}"
        self.errors.append(ConfigError(named_by, message, self._short(str(path))))
        return None

    def _short(self, origin: str) -> str:
        if origin == "--set":
            return origin
        relative = os.path.relpath(origin, self.path.parent)
        return relative if not relative.startswith("../..") else origin


def _not_text(value: Any, at: Keys) -> Iterator[tuple[Keys, str]]:
    """Strings, and their places, that no file in UTF-8 can hold: Python has surrogates for what it could not decode."""
    if isinstance(value, str):
        if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
            yield at, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _not_text(item, (*at, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _not_text(item, (*at, index))


def _loads(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant, parse_float=_finite)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {json.dumps(twice)} appears twice in one object; keep one")
    return result


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    if math.isinf(value := float(text)):
        raise ValueError(f"{text} is larger than any number can be")
    return value


# -- paths -------------------------------------------------------------------------------------------------------------


def _absolute(value: str, folder: Path) -> str:
    if "://" in value:
        return value
    return os.path.abspath(os.path.join(folder, os.path.expanduser(value)))


def is_image_file(image: str) -> bool:
    """Whether a container image is a file or folder, not the name of one that the runtime finds elsewhere."""
    return "://" not in image and (image.startswith((".", "~", "/")) or image.endswith(_IMAGE_SUFFIXES))


def _absolute_or_hub_id(value: str, folder: Path) -> str:
    """A model or tokenizer: a local path where it exists or can be nothing else, otherwise a hub id, left as it is."""
    path = _absolute(value, folder)
    local = value.startswith((".", "~", "/")) or value.count("/") > 1 or value.endswith(_LOCAL_SUFFIXES)
    return path if local or os.path.exists(path) else value


def _make_absolute(layer: dict[str, Any], folder: Path) -> None:
    """Make the local paths of one file absolute, in place. Values of a wrong type are left for the schema to refuse."""
    if isinstance(layer.get("output_dir"), str):
        layer["output_dir"] = _absolute(layer["output_dir"], folder)
    model = layer.get("model")
    if isinstance(model, dict):
        for key in ("path", "tokenizer", "processor"):
            if isinstance(model.get(key), str):
                model[key] = _absolute_or_hub_id(model[key], folder)
    cluster = layer.get("cluster")
    if isinstance(cluster, dict) and isinstance(cluster.get("hostfile"), str):
        cluster["hostfile"] = _absolute(cluster["hostfile"], folder)
    container = cluster.get("container") if isinstance(cluster, dict) else None
    if isinstance(container, dict) and isinstance(image := container.get("image"), str) and is_image_file(image):
        container["image"] = _absolute(image, folder)
    data = layer.get("data")
    if isinstance(data, dict) and isinstance(data.get("prepared"), str):
        data["prepared"] = _absolute(data["prepared"], folder)
    for source in _sources(data):
        for key in ("path", "source_path", "target_path"):
            if isinstance(source.get(key), str):
                source[key] = _absolute(source[key], folder)


def _absolute_at(keys: Keys, value: Any, folder: Path) -> Any:
    """A value with the paths in it made absolute, as they would be at this place of a file."""
    layer: Any = value
    for key in reversed(keys):
        layer = [layer] if isinstance(key, int) else {key: layer}
    _make_absolute(layer, folder)
    for key in keys:
        layer = layer[0 if isinstance(key, int) else key]
    return layer


def _sources(data: Any) -> Iterator[dict[str, Any]]:
    for split in ("train", "evaluation"):
        items = data.get(split) if isinstance(data, dict) else None
        yield from (item for item in items if isinstance(item, dict)) if isinstance(items, list) else ()
