"""`dsft schema`: the JSON Schema of a config, for completion and checks in editors."""

from __future__ import annotations

import argparse
import json
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """It has none."""


def run(arguments: argparse.Namespace) -> int:
    """Print the schema."""
    print(json.dumps(json_schema(), indent=2))
    return 0


def json_schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of a config file: what the typed schema allows, and what loading adds to it."""
    from trainer.config.schema import LaunchConfig

    schema = LaunchConfig.model_json_schema()
    properties = schema["properties"]
    cluster = {key: properties["cluster"].pop(key) for key in list(properties["cluster"]) if key != "default"}
    properties["cluster"]["anyOf"] = [cluster, {"type": "string", "description": "Path of a cluster profile (JSON)"}]
    properties["extends"] = {"type": "string", "description": "Path of a config that this one builds on"}
    properties["$schema"] = {"type": "string", "description": "This schema, for editors"}
    training = schema["$defs"]["TrainingConfig"]["properties"]
    rate = schema["$defs"]["OptimizerConfig"]["properties"]["learning_rate"]
    training["learning_rate"] = {**rate, "description": "Short for optimizer.learning_rate"}
    # a file that extends another may leave required keys to it; dsft checks the result
    required = schema.pop("required")
    schema["anyOf"] = [{"required": ["extends"]}, {"required": required}]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "dsft config"}
