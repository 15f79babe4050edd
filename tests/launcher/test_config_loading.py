"""Loading: files, `extends`, profiles, `--set`, paths, and errors that say what to change."""

import copy
import json

import pytest
from config_samples import complete, runnable, write

from trainer.config.errors import ELSEWHERE, known_paths
from trainer.config.loading import ConfigErrors, config_hash, load_config, redacted
from trainer.config.schema import LaunchConfig


def errors_of(path, *overrides):
    with pytest.raises(ConfigErrors) as caught:
        load_config(path, overrides)
    assert caught.value.exit_code == 2
    return {error.path: error for error in caught.value.errors}


def changed(**values):
    """The complete config with dotted keys (`__` for a dot) changed; None removes."""
    config = copy.deepcopy(complete())
    for dotted, value in values.items():
        *parents, key = dotted.split("__")
        node = config
        for parent in parents:
            node = node[parent]
        node[key] = value
    return config


def test_the_whole_config_loads_with_absolute_paths(tmp_path):
    config = load_config(runnable(tmp_path))
    assert config.output_dir == str(tmp_path / "runs")
    assert config.model.tokenizer == str(tmp_path / "data/test_model.model")
    assert config.data.train[0].path == str(tmp_path / "data/test.json")
    assert config.data.evaluation[0].path == str(tmp_path / "data/test.json")
    assert config.training.optimizer.betas == (0.9, 0.95)


def test_a_resolved_config_loads_to_itself(tmp_path):
    config = load_config(runnable(tmp_path))
    again = load_config(write(tmp_path / "elsewhere/config.json", config.model_dump(mode="json")))
    assert again == config


def test_byte_order_mark_and_schema_key(tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps({"$schema": "dsft.json", **complete()}).encode())
    assert load_config(path).name == "gsm8k-sft"


def test_strings_that_utf8_cannot_hold_are_refused(tmp_path):
    folder = tmp_path / "runs\udcff"
    errors = errors_of(runnable(tmp_path), f"output_dir={folder}", "data.train.0.path=half\ud800.jsonl")
    assert errors["output_dir"].message.startswith(f"{str(folder)!a} is not UTF-8 text")
    assert "half\\ud800.jsonl' is not UTF-8 text" in errors["data.train.0.path"].message


def test_every_error_at_once(tmp_path):
    config = changed(
        name="a b",
        modle={},
        task={"type": "causal"},
        training__global_batch_size="32",
        training__optimizer__betas=[0.9, 1.0],
        training__optimizer__learning_rate=-1,
        training__schedule__type="cosin",
        deepspeed__zero_stage=4,
        cluster__gpus=8,
        resilience__hang_timeout_seconds="never",
    )
    config["data"]["train"][0]["pth"] = config["data"]["train"][0].pop("path")
    errors = {path: error.message for path, error in errors_of(write(tmp_path / "c.json", config)).items()}
    task = errors.pop("task.type")
    assert task.startswith('found "causal" (string); expected "causal-lm"')
    assert '"text-classification"' in task
    assert task.endswith('(did you mean "causal-lm"?)')
    assert errors == {
        "name": 'found "a b" (string); expected 1 to 100 letters, digits, ".", "_" or "-", '
        "beginning with a letter or digit",
        "modle": "unknown key; did you mean `model`?",
        "training.global_batch_size": 'found "32" (string); expected a positive integer',
        "training.optimizer.betas.1": "found 1.0 (number); expected a number at least 0 and below 1",
        "training.optimizer.learning_rate": "found -1 (integer); expected a positive number",
        "training.schedule.type": 'found "cosin" (string); expected "constant" or "linear" or "cosine" '
        '(did you mean "cosine"?)',
        "deepspeed.zero_stage": 'found 4 (integer); expected 1 or 2 or 3 or "auto"',
        "cluster.gpus": "unknown key; did you mean `cluster.gpus_per_node`?",
        "resilience.hang_timeout_seconds": 'found "never" (string); expected a number at least 5 or "auto"',
        "data.train.0.path": "missing; expected a string",
        "data.train.0.pth": "unknown key; did you mean `data.train.0.path`?",
    }


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("training.micro_batch_size", 0, 'expected a positive integer or "auto"'),
        *(("name", name, "expected 1 to 100 letters") for name in ("../up", "$(id)", "", "a/b", ".hidden", "x" * 200)),
        ("training.micro_batch_size", 1.5, 'expected a positive integer or "auto"'),
        ("training.max_grad_norm", "1", "expected a number of at least 0"),
        ("task.generation", {"length_penalty": "1"}, "expected a number"),
        ("data.packing", "yes", "expected true or false"),
        ("data.train", [], "expected at least 1"),
        ("data.train", {}, "expected a list, each an object with path"),
        ("task", "causal-lm", 'expected {"type": "causal-lm"}'),
        ("training.optimizer", "adamw", 'expected {"type": "adamw"}'),
        ("model.gradient_checkpointing", "true", 'expected true or false or "auto" or "selective" or an object'),
        ("model", None, "expected an object"),
        ("training.optimizer.betas", [], "missing"),
        ("training.optimizer.betas", 0.9, "expected a list of 2"),
        ("model.freeze", "model", "expected a list, each a string"),
        ("cluster.backend", "slrm", 'did you mean "slurm"?'),
        ("task.type", [], "found a list of 0"),
        ("training.max_steps", True, "expected a positive integer"),
    ],
)
def test_wrong_values_name_what_is_allowed(tmp_path, key, value, text):
    errors = errors_of(write(tmp_path / "c.json", changed(**{key.replace(".", "__"): value})))
    assert any(path.startswith(key) and text in error.message for path, error in errors.items()), errors


def test_keys_in_the_wrong_section_are_pointed_to_the_right_one(tmp_path):
    errors = errors_of(write(tmp_path / "c.json", changed(sequence_length=5)))
    assert errors["sequence_length"].message == "unknown key; did you mean `data.sequence_length`?"


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("training.weight_decay", "training.optimizer.weight_decay"),  # not the ema_decay beside it
        ("training.warmup_steps", "training.schedule.warmup_steps"),
        ("per_device_train_batch_size", "training.micro_batch_size"),
        ("training.save_steps", "checkpoint.interval_steps"),
        ("model.adapter.r", "model.adapter.rank"),
    ],
)
def test_keys_as_other_trainers_call_them(tmp_path, key, meant):
    adapter = {"type": "lora"}
    config = changed(model__adapter=adapter) if "adapter" in key else changed()
    errors = errors_of(write(tmp_path / "c.json", config), f"{key}=1")
    assert errors[key].message == f"unknown key; did you mean `{meant}`?"


def test_the_names_of_other_trainers_lead_to_keys_that_exist():
    known = {".".join(path) for path in known_paths(LaunchConfig)}
    assert set(ELSEWHERE) <= known


def test_keys_of_another_backend_are_said_to_be_that(tmp_path):
    cluster = {"backend": "ssh", "hosts": ["n1"], "nodes": 2, "time": "10"}
    errors = errors_of(write(tmp_path / "c.json", changed(cluster=cluster)))
    assert "belongs to another kind of `cluster`" in errors["cluster.nodes"].message
    assert "belongs to another kind of `cluster`" in errors["cluster.time"].message


def test_contradictions(tmp_path):
    config = changed(training__epochs=2.0, model__path="gpt2")
    errors = errors_of(write(tmp_path / "c.json", config))
    assert "exactly one of `max_steps` and `epochs`" in errors["training"].message
    assert "exactly one of `path`" in errors["model"].message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"name": "a",\n "task": {,}}', "line 2, column 11"),
        ('{"name": "a",\n "name": "b"}', 'the key "name" appears twice'),
        ('{"name": NaN}', "NaN is not a JSON number"),
        ('{"model": {"config": {"rope_theta": 1e999}}}', "1e999 is larger than any number"),
        ("[1]", "found a list of 1; expected an object"),
        ("", "line 1, column 1"),
    ],
)
def test_broken_json(tmp_path, text, message):
    error = errors_of(write(tmp_path / "c.json", text))[""]
    assert error.file == "c.json"
    assert message in error.message


def test_not_utf8_and_no_such_file(tmp_path):
    (tmp_path / "c.json").write_bytes(b'{"name": "\xff"}')
    assert "not UTF-8" in errors_of(tmp_path / "c.json")[""].message
    assert errors_of(tmp_path / "nowhere.json")[""].message == "no such file"
    assert "cannot be read" in errors_of(tmp_path)[""].message


def test_extends_merges_objects_and_replaces_lists(tmp_path):
    write(tmp_path / "base/base.json", complete())
    child = {
        "extends": "base/base.json",
        "name": "child",
        "training": {"optimizer": {"betas": [0.8, 0.9]}},
        "data": {"train": [{"path": "own.jsonl"}]},
    }
    config = load_config(write(tmp_path / "c.json", child))
    assert (config.name, config.training.optimizer.betas, config.training.optimizer.weight_decay) == (
        "child",
        (0.8, 0.9),
        0.1,
    )
    assert [source.path for source in config.data.train] == [str(tmp_path / "own.jsonl")]
    # each path is relative to the file it is written in
    assert config.data.evaluation[0].path == str(tmp_path / "base/data/test.json")
    assert config.output_dir == str(tmp_path / "base/runs")


def test_a_section_of_another_kind_takes_the_place_of_the_one_extended(tmp_path):
    slurm = {"backend": "slurm", "nodes": 4, "time": "1:00:00"}
    write(tmp_path / "base.json", {**complete(), "cluster": slurm})
    more = write(tmp_path / "more.json", {"extends": "base.json", "cluster": {"nodes": 2}})
    assert (load_config(more).cluster.nodes, load_config(more).cluster.time) == (2, "1:00:00")
    ssh = write(tmp_path / "ssh.json", {"extends": "base.json", "cluster": {"backend": "ssh", "hosts": ["n1"]}})
    assert load_config(ssh, ["cluster.gpus_per_node=0"]).cluster.hosts == ("n1",)
    lacking = write(tmp_path / "lacking.json", {"extends": "base.json", "cluster": {"backend": "ssh"}})
    assert list(errors_of(lacking)) == ["cluster.hosts"]


def test_extends_in_a_circle_or_broken(tmp_path):
    write(tmp_path / "a.json", {"extends": "b.json"})
    write(tmp_path / "b.json", {"extends": "a.json"})
    assert "a.json -> b.json -> a.json" in errors_of(tmp_path / "a.json")["extends"].message
    # what a missing base would have brought is not called missing; what is wrong here still is
    write(tmp_path / "c.json", {"extends": "nowhere.json", "trainin": {}})
    errors = errors_of(tmp_path / "c.json")
    assert set(errors) == {"extends", "trainin"}
    assert errors["extends"].file == "nowhere.json"
    assert (
        'or an object: {"backend"' in errors_of(write(tmp_path / "d.json", changed(cluster="slurm")))["cluster"].message
    )


def test_an_error_in_a_base_or_profile_names_its_file(tmp_path):
    write(tmp_path / "base.json", changed(deepspeed__zero_stage=7))
    write(tmp_path / "site/gpu.json", {"backend": "local", "nods": 2})
    errors = errors_of(write(tmp_path / "c.json", {"extends": "base.json", "cluster": "site/gpu.json"}))
    assert errors["deepspeed.zero_stage"].file == "base.json"
    assert errors["cluster.nods"].file == "site/gpu.json"
    assert "nodes" in errors["cluster.nods"].message


def test_a_profile_alone_is_no_config(tmp_path):
    with pytest.raises(ConfigErrors) as caught:
        load_config(write(tmp_path / "gpu.json", {"backend": "local", "nodes": 2}))
    assert str(caught.value) == 'gpu.json is the profile of a cluster: name it in a config, "cluster": "gpu.json"'


def test_a_profile_replaces_the_cluster_and_set_refines_it(tmp_path):
    write(tmp_path / "site.json", {"backend": "local", "gpus_per_node": 4})
    write(tmp_path / "base.json", complete())
    path = write(tmp_path / "c.json", {"extends": "base.json", "cluster": "site.json"})
    cluster = load_config(path, ["cluster.environment.NCCL_DEBUG=INFO"]).cluster
    assert (cluster.gpus_per_node, cluster.processes_per_node) == (4, None)
    assert cluster.environment == {"NCCL_DEBUG": "INFO"}
    assert load_config(runnable(tmp_path), ["cluster=site.json"]).cluster.gpus_per_node == 4


def test_set(tmp_path):
    path = runnable(tmp_path)
    config = load_config(
        path,
        [
            "training.learning_rate=1e-5",
            "training.max_steps=null",
            "training.epochs=2",
            "name=other",
            "data.train.0.path=more.jsonl",
            "data.train.0.columns.prompt=q",
            'model.freeze=["lm_head"]',
        ],
    )
    assert config.training.optimizer.learning_rate == 1e-5
    assert (config.training.max_steps, config.training.epochs, config.name) == (None, 2.0, "other")
    assert config.data.train[0].path == str(tmp_path / "more.jsonl")
    assert config.data.train[0].columns == {"prompt": "q", "completion": "answer"}
    assert config.model.freeze == ("lm_head",)


def test_wrong_set(tmp_path):
    path = runnable(tmp_path)
    wrong = (
        "training.max_steps",
        "data.train.3.path=x",
        "name.x=1",
        "training.optimzer.eps=1",
        "0=1",
        "extends=a.json",
    )
    errors = errors_of(path, *wrong)
    assert "expected key=value" in errors[""].message
    assert "has 1 items" in errors["data.train.3.path"].message
    assert "nothing can be set in it" in errors["name.x"].message
    assert "unknown key" in errors["0"].message
    assert "write it into the config" in errors["extends"].message
    assert "did you mean `training.optimizer`" in errors["training.optimzer"].message
    assert {error.file for error in errors.values() if error.path} == {"--set"}


def test_learning_rate_has_a_short_name(tmp_path):
    config = changed()
    config["training"]["learning_rate"] = config["training"]["optimizer"].pop("learning_rate")
    assert load_config(write(tmp_path / "c.json", config)).training.optimizer.learning_rate == 5e-4
    config["training"]["learning_rate"] = "fast"
    assert "found" in errors_of(write(tmp_path / "c.json", config))["training.learning_rate"].message
    config["training"]["learning_rate"] = config["training"]["optimizer"]["learning_rate"] = 1
    assert "keep one" in errors_of(write(tmp_path / "c.json", config))["training.learning_rate"].message


def test_hub_ids_stay_and_local_paths_do_not(tmp_path):
    config = changed(model__config=None, model__tokenizer=None, model__path="meta-llama/Llama-3.1-8B")
    path = write(tmp_path / "c.json", config)
    assert load_config(path).model.path == "meta-llama/Llama-3.1-8B"
    (tmp_path / "meta-llama/Llama-3.1-8B").mkdir(parents=True)
    assert load_config(path).model.path == str(tmp_path / "meta-llama/Llama-3.1-8B")
    assert load_config(path, ["model.path=./own"]).model.path == str(tmp_path / "own")
    assert load_config(path, ["model.path=a/b/c"]).model.path == str(tmp_path / "a/b/c")


def test_secrets_are_not_echoed(tmp_path):
    secret = "hf_verysecret"
    config = changed(hf_token=secret, cluster__environment=[secret], wandb_api_key=secret)
    with pytest.raises(ConfigErrors) as caught:
        load_config(
            write(tmp_path / "c.json", config), [f"cluster.environment.HF_TOKEN.x={secret}", f"=HF_TOKEN={secret}"]
        )
    assert secret not in str(caught.value)
    config = changed(cluster__environment={"HF_TOKEN": secret, "NCCL_DEBUG": "INFO"})
    shown = redacted(load_config(write(tmp_path / "c.json", config)))
    assert shown["cluster"]["environment"] == {"HF_TOKEN": "***", "NCCL_DEBUG": "INFO"}


@pytest.mark.parametrize(
    "url",
    [
        "https://user:verysecret@site.example/a.jsonl",
        "s3://key:verysecret@bucket/a.jsonl",
        "https://site.example/a.jsonl?X-Amz-Credential=a&X-Amz-Signature=verysecret",
        "https://site.example/a.jsonl?sv=2024&sig=verysecret",
    ],
)
def test_urls_with_secrets_are_refused_and_not_echoed(tmp_path, url):
    config = changed()
    config["data"]["train"][0]["path"] = url
    with pytest.raises(ConfigErrors, match="holds a secret") as caught:
        load_config(write(tmp_path / "c.json", config))
    assert "verysecret" not in str(caught.value)
    config["data"]["train"][0]["path"] = "sftp://user@site.example/a.jsonl?part=1"
    assert load_config(write(tmp_path / "c.json", config)).data.train[0].path.startswith("sftp://user@")


def test_the_hash_changes_with_what_decides_the_result(tmp_path):
    path = runnable(tmp_path)
    before = config_hash(load_config(path))
    assert config_hash(load_config(path, ["cluster.processes_per_node=1", "logging.interval_steps=5"])) == before
    assert config_hash(load_config(path, ["training.learning_rate=0.1"])) != before
    assert config_hash(load_config(path, ["data.seed=1"])) != before


def test_the_defaults_hold_for_the_smallest_config(tmp_path):
    small = {
        "name": "small",
        "task": {"type": "causal-lm"},
        "model": {"path": "org/model"},
        "data": {"train": [{"path": "a.jsonl"}], "sequence_length": 8},
        "training": {"global_batch_size": 1, "max_steps": 1},
    }
    config = load_config(write(tmp_path / "c.json", small))
    assert isinstance(config, LaunchConfig)
    assert config.output_dir == str(tmp_path / "runs")
