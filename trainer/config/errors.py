"""Config errors in the user's words: dotted path, what was found, what is allowed, the nearest known key."""

from __future__ import annotations

import difflib
import json
import re
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin
from urllib.parse import parse_qsl, urlsplit

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from trainer.failures import UserError

Path = tuple[str | int, ...]

_SECRET = re.compile(r"token|secret|passw|credential|api_?key|access_?key|private|auth|signature|^sig$", re.IGNORECASE)


@dataclass(frozen=True)
class ConfigError:
    """One thing to change: the dotted ``path`` ("" for the file itself), the ``message`` and the ``file`` it is in."""

    path: str
    message: str
    file: str | None = None

    def __str__(self) -> str:
        where = f"{self.path} ({self.file})" if self.path and self.file else self.path or self.file or ""
        return f"{where}: {self.message}" if where else self.message


class ConfigErrors(UserError):
    """Every error of a config at once, in ``errors``."""

    def __init__(self, config: str, errors: Sequence[ConfigError]) -> None:
        self.errors = tuple(errors)
        if len(self.errors) == 1 and not self.errors[0].path:
            text = str(self.errors[0])
        else:
            count = "1 error" if len(self.errors) == 1 else f"{len(self.errors)} errors"
            text = "\n".join([f"{config}: {count}", *(f"  {error}" for error in self.errors)])
        super().__init__(text)


def dotted(path: Sequence[str | int]) -> str:
    """``("data", "train", 0)`` -> ``data.train.0``, as ``--set`` takes it."""
    return ".".join(str(part) for part in path)


def is_secret(path: Sequence[str | int]) -> bool:
    """Whether a value at this path must not be shown: environment variables, and names that look like secrets."""
    names = [part for part in path if isinstance(part, str)]
    return "environment" in names or any(is_secret_name(name) for name in names[-1:])


def is_secret_name(name: str) -> bool:
    """Whether a variable or key of this name is likely to hold a secret."""
    return _SECRET.search(name) is not None


def is_secret_url(text: str) -> bool:
    """Whether a text is a URL with a password in it, or with a query that signs or authorises."""
    if "://" not in text:
        return False
    try:
        url = urlsplit(text)
        return bool(url.password) or any(is_secret_name(name) for name, _ in parse_qsl(url.query))
    except ValueError:  # no URL: whoever opens it says why
        return False


def found(value: Any, path: Sequence[str | int] = ()) -> str:
    """How a JSON value is shown in an error."""
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    if value is None:
        return "null"
    kind = {bool: "boolean", int: "integer", float: "number", str: "string"}.get(type(value), type(value).__name__)
    if is_secret(path) or (isinstance(value, str) and is_secret_url(value)):
        return f"{'an' if kind == 'integer' else 'a'} {kind} (not shown)"
    text = json.dumps(value, ensure_ascii=False)
    return f"{text if len(text) <= 80 else text[:77] + '...'} ({kind})"


def expected(annotation: Any, metadata: Sequence[Any] = (), description: str | None = None) -> str:
    """What a field allows, from its type: `a positive integer or "auto"`."""
    origin = get_origin(annotation)
    if origin is Annotated:
        inner, *extra = get_args(annotation)
        flat = [item for part in extra for item in (part.metadata if isinstance(part, FieldInfo) else [part])]
        return expected(inner, [*metadata, *flat], description)
    if origin in (Union, types.UnionType):
        options = [item for item in get_args(annotation) if item is not type(None)]
        if len(options) == 1:
            return expected(options[0], metadata, description)
        return " or ".join(dict.fromkeys(expected(item) for item in options))
    if origin is Literal:
        return " or ".join(json.dumps(value) for value in get_args(annotation))
    if origin is tuple:
        items = get_args(annotation)
        if len(items) == 2 and items[1] is Ellipsis:
            return "a list" if items[0] is Any else f"a list, each {expected(items[0])}"
        return f"a list of {len(items)}, each {expected(items[0])}"
    if origin is dict:
        return "an object"
    if annotation is bool:
        return "true or false"
    if annotation is str:
        return description if any(getattr(item, "pattern", None) for item in metadata) and description else "a string"
    if annotation in (int, float):
        return _number("integer" if annotation is int else "number", metadata)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        keys = [name for name, field in annotation.model_fields.items() if field.is_required()]
        return f"an object with {', '.join(keys)}" if keys else "an object"
    return "any value" if annotation is Any else "another value"


def _number(kind: str, metadata: Sequence[Any]) -> str:
    bounds = {
        name: getattr(item, name) for item in metadata for name in ("gt", "ge", "lt", "le") if hasattr(item, name)
    }
    article = "an" if kind == "integer" else "a"
    if bounds == {"gt": 0}:
        return f"a positive {kind}"
    if bounds == {"ge": 0}:
        return f"{article} {kind} of at least 0"
    words = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}
    limits = " and ".join(f"{words[name]} {bounds[name]}" for name in ("gt", "ge", "lt", "le") if name in bounds)
    return f"{article} {kind} {limits}".rstrip()


# -- pydantic's errors -------------------------------------------------------------------------------------------------


def translate(error: ValidationError, schema: type[BaseModel]) -> Iterator[tuple[Path, str, bool]]:
    """(path, message, whether it says that something is missing) for each thing to change, in the file's order."""
    seen: set[Path] = set()
    for item in error.errors(include_url=False):
        path, annotation, metadata, field, owner = _locate(schema, item["loc"])
        kind = item["type"]
        if kind == "extra_forbidden":
            message = f"unknown key{suggestion(path, owner, schema)}"
        elif kind == "missing":
            message = f"missing; expected {expected(annotation, metadata, field and field.description)}"
        elif kind in ("value_error", "assertion_error"):
            message = str(item["ctx"]["error"])
        elif kind in ("union_tag_not_found", "union_tag_invalid"):
            key = str(item["ctx"]["discriminator"]).strip("'")
            path = (*path, key)
            tags = item["ctx"].get("expected_tags") or ", ".join(f"'{tag}'" for tag in _tags(annotation, key))
            allowed = " or ".join(json.dumps(tag.strip(" '")) for tag in tags.split(","))
            value = item["input"].get(key) if isinstance(item["input"], dict) else None
            was = "missing" if kind == "union_tag_not_found" else f"found {found(value, path)}"
            message = f"{was}; expected {allowed}{_closest(value, tags)}"
        elif kind == "too_short" and len(item["input"]) >= item["ctx"]["min_length"]:
            continue  # pydantic counts only the valid items; those that are not have their own errors
        elif kind in ("too_short", "too_long"):
            limit = item["ctx"].get("min_length", item["ctx"].get("max_length"))
            message = (
                f"found {found(item['input'], path)}; expected at {'least' if kind == 'too_short' else 'most'} {limit}"
            )
        else:
            allowed = expected(annotation, metadata, field and field.description)
            allowed = _spelt_out(item["input"], annotation) or allowed + _closest(item["input"], allowed)
            message = f"found {found(item['input'], path)}; expected {allowed}"
        if path not in seen or kind == "value_error":
            seen.add(path)
            yield path, message, kind in ("missing", "union_tag_not_found", "value_error")


def _closest(value: Any, allowed: str) -> str:
    if not isinstance(value, str):
        return ""
    close = difflib.get_close_matches(value, re.findall(r"[\"']([^\"']{2,})[\"']", allowed), 1)
    return f" (did you mean {json.dumps(close[0])}?)" if close else ""


def _spelt_out(value: Any, annotation: Any) -> str | None:
    """Of a text where an object is expected that has it as one of its choices: `{"type": "adamw"}`."""
    for option in _options(annotation):
        if isinstance(value, str) and isinstance(option, type) and issubclass(option, BaseModel):
            for name, field in option.model_fields.items():
                if value in _literals(field):
                    return json.dumps({name: value})
    return None


def _tags(annotation: Any, key: str) -> list[str]:
    members = [item for item in _options(annotation) if isinstance(item, type) and issubclass(item, BaseModel)]
    return [tag for member in members for tag in get_args(member.model_fields[key].annotation)]


def _options(annotation: Any) -> list[Any]:
    """The members of a union, or the annotation itself; Annotated is peeled off."""
    while get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if get_origin(annotation) in (Union, types.UnionType):
        return [option for item in get_args(annotation) if item is not type(None) for option in _options(item)]
    return [annotation]


def _locate(
    schema: type[BaseModel], location: Sequence[str | int]
) -> tuple[Path, Any, Sequence[Any], FieldInfo | None, type[BaseModel]]:
    """Follow pydantic's location through the types, leaving out the parts that name union members."""
    path: list[str | int] = []
    current: Any = schema
    metadata: Sequence[Any] = ()
    field: FieldInfo | None = None
    owner = schema
    for part in location:
        options = _options(current)
        models = [item for item in options if isinstance(item, type) and issubclass(item, BaseModel)]
        tagged = [
            model
            for model in models
            if len(models) > 1 and any(part in _literals(f) for f in model.model_fields.values())
        ]
        if tagged:
            current = tagged[0]
        elif models and len(options) > len(models) and part not in models[0].model_fields:
            current = next((model for model in models if model.__name__ == part), current)
        elif models:
            owner = models[0]
            path.append(part)
            field = owner.model_fields.get(str(part))
            current, metadata = (field.annotation, field.metadata) if field else (Any, ())
        elif any(get_origin(item) in (tuple, list) for item in options) and isinstance(part, int):
            items = get_args(next(item for item in options if get_origin(item) in (tuple, list)))
            path.append(part)
            current, metadata, field = items[0] if items[-1] is Ellipsis else items[part], (), None
        elif any(get_origin(item) is dict for item in options):
            path.append(part)
            current, metadata, field = get_args(options[0])[1], (), None
    return tuple(path), current, metadata, field, owner


def _literals(field: FieldInfo) -> tuple[Any, ...]:
    return get_args(field.annotation) if get_origin(field.annotation) is Literal else ()


# -- nearest keys ------------------------------------------------------------------------------------------------------


def known_paths(schema: type[BaseModel], prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every key of the schema, as a path (list items are left out of the path)."""
    for name, field in schema.model_fields.items():
        yield (*prefix, name)
        for option in _options(field.annotation):
            inner = (
                [item for item in get_args(option) if item is not Ellipsis] if get_origin(option) is tuple else [option]
            )
            for item in (choice for part in inner for choice in _options(part)):
                if isinstance(item, type) and issubclass(item, BaseModel):
                    yield from known_paths(item, (*prefix, name))


# What other trainers call a setting
ELSEWHERE = {
    "model.path": "model_name_or_path model_name base_model pretrained_model_name_or_path",
    "model.tokenizer": "tokenizer_name tokenizer_name_or_path",
    "model.dtype": "bf16 fp16 torch_dtype mixed_precision precision",
    "model.attention": "attn_implementation use_flash_attention_2 flash_attn",
    "model.adapter.type": "use_lora use_peft load_in_4bit load_in_8bit quantization quantization_config",
    "model.adapter.rank": "r lora_r lora_rank",
    "model.adapter.alpha": "lora_alpha",
    "model.adapter.dropout": "lora_dropout",
    "model.adapter.targets": "target_modules lora_target_modules lora_target",
    "data.train": "train_file train_data train_dataset dataset dataset_name datasets",
    "data.evaluation": "validation_file eval_dataset test_file val_file",
    "data.sequence_length": "max_seq_length max_seq_len max_length seq_length block_size cutoff_len",
    "data.workers": "dataloader_num_workers num_workers",
    "training.global_batch_size": "gradient_accumulation_steps train_batch_size batch_size",
    "training.micro_batch_size": "per_device_train_batch_size per_device_eval_batch_size micro_batch",
    "training.epochs": "num_train_epochs num_epochs n_epochs",
    "training.optimizer.learning_rate": "lr",
    "training.optimizer.type": "optim",
    "training.optimizer.betas": "adam_beta1 adam_beta2",
    "training.optimizer.eps": "adam_epsilon epsilon",
    "training.schedule.type": "lr_scheduler_type lr_scheduler scheduler",
    "training.schedule.warmup_steps": "warmup warmup_ratio num_warmup_steps",
    "training.max_grad_norm": "gradient_clipping clip_grad_norm grad_clip",
    "deepspeed.zero_stage": "zero_optimization stage",
    "checkpoint.interval_steps": "save_steps save_strategy",
    "checkpoint.keep_last": "save_total_limit",
    "evaluation.interval_steps": "eval_steps eval_strategy evaluation_strategy",
    "evaluation.metric": "metric_for_best_model",
    "evaluation.larger_is_better": "greater_is_better",
    "evaluation.patience": "early_stopping_patience",
    "export.checkpoint": "load_best_model_at_end",
    "logging.interval_steps": "logging_steps",
    "cluster.nodes": "num_nodes nnodes num_machines",
    "cluster.gpus_per_node": "num_gpus n_gpus n_gpu",
    "cluster.processes_per_node": "nproc_per_node num_processes",
}


def suggestion(path: Path, owner: type[BaseModel], schema: type[BaseModel]) -> str:
    """What was probably meant by an unknown key."""
    key = str(path[-1])
    siblings = [*owner.model_fields, *(["extends"] if owner is schema else [])]
    everywhere = list(known_paths(schema))
    if path in everywhere:  # of a union: a base file's cluster of another backend
        return f", for it belongs to another kind of `{dotted(path[:-1])}`; remove it"
    meant = next((known for known, names in ELSEWHERE.items() if key in names.split()), None)
    if meant is None:  # the key itself in another section, below this one first
        same = sorted(
            (item for item in everywhere if item[-1] == key), key=lambda item: item[: len(path) - 1] != path[:-1]
        )
        meant = dotted(same[0]) if same else None
    if meant is not None:
        return f"; did you mean `{meant}`?"
    close = difflib.get_close_matches(key.lower(), siblings, 1, 0.6)
    close = close or [name for name in siblings if len(key) > 2 and (key.lower() in name or name in key.lower())]
    if close:
        return f"; did you mean `{dotted((*path[:-1], close[0]))}`?"
    names = difflib.get_close_matches(key.lower(), {item[-1] for item in everywhere}, 1, 0.8)
    if names:
        return f"; did you mean `{dotted(next(item for item in everywhere if item[-1] == names[0]))}`?"
    return f"; known here: {', '.join(siblings)}"
