"""What the benchmarks share: data, tokenizer, model, processes, and how figures are written down."""

from __future__ import annotations

import json
import os
import platform
import random
import shlex
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from trainer.config.schema import LaunchConfig

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from launcher.environment import describe_environment  # noqa: E402
from launcher.facts import multiplies_bfloat16  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
SPECIAL = ("<s>", "</s>", "<pad>")
PROCESS_SECONDS = 1800.0

_NAMES = ("Anna", "Ben", "Carla", "David", "Emma", "Farid", "Grace", "Hugo", "Ines", "Jack", "Kim", "Leo")
_THINGS = ("apples", "books", "pencils", "cookies", "tickets", "marbles", "stamps", "flowers", "eggs", "coins")
_PLACES = ("at the market", "in the shop", "at the fair", "from a neighbour", "at school", "on the farm")


def math_records(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Word problems in two to five steps with worked answers: the shape and the lengths of GSM8K, made from a seed."""
    rng = random.Random(seed)
    records = []
    for _ in range(count):
        name, other = rng.sample(_NAMES, 2)
        thing = rng.choice(_THINGS)
        have = rng.randint(5, 60)
        question = [f"{name} has {have} {thing}."]
        answer = [f"{name} starts with {have} {thing}."]
        for _ in range(rng.randint(2, 5)):
            number = rng.randint(2, 12)
            kind = rng.choice(("buy", "give", "double"))
            if kind == "give" and number >= have:
                kind = "buy"
            if kind == "buy":
                question.append(f"Then {name} gets {number} more {thing} {rng.choice(_PLACES)}.")
                answer.append(
                    f"After that there are {have} + {number} = <<{have}+{number}={have + number}>>",
                )
                have += number
            elif kind == "give":
                question.append(f"{name} gives {number} of the {thing} to {other}, who is a good friend.")
                answer.append(
                    f"With {number} given away there are {have} - {number} = <<{have}-{number}={have - number}>>"
                )
                have -= number
            else:
                question.append(f"On the next day {name} has twice as many {thing} as the day before.")
                answer.append(f"Twice as many are 2 * {have} = <<2*{have}={2 * have}>>")
                have *= 2
            answer[-1] += f"{have} {thing}."
        question.append(f"How many {thing} does {name} have in the end?")
        records.append({"question": " ".join(question), "answer": "\n".join([*answer, f"#### {have}"])})
    return records


def write_data(folder: Path, records: int, vocabulary: int = 2000) -> dict[str, Path]:
    """A JSONL file of word problems, and a byte-level BPE tokenizer trained on it, as a Hugging Face folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    folder.mkdir(parents=True, exist_ok=True)
    made = math_records(records)
    data = folder / "train.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in made))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator((text for record in made[:1000] for text in record.values()), trainer)
    target = folder / "tokenizer"
    target.mkdir(exist_ok=True)
    tokenizer.save(str(target / "tokenizer.json"))
    bos, eos, pad = SPECIAL
    names = {"bos_token": bos, "eos_token": eos, "pad_token": pad}
    (target / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **names}))
    return {"data": data, "tokenizer": target}


def llama(hidden: int, layers: int, vocabulary: int) -> dict[str, Any]:
    """A Llama of this size, as a Hugging Face config with its `model_type`."""
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": hidden * 5 // 2,
        "num_hidden_layers": layers,
        "num_attention_heads": max(hidden // 64, 1),
        "vocab_size": vocabulary,
        "max_position_embeddings": 1024,
    }


def save_llama(folder: Path, sizes: Mapping[str, Any], dtype: str) -> None:
    """A Hugging Face folder with random weights, the same ones each time."""
    import torch
    import transformers

    config = transformers.AutoConfig.for_model(**sizes)
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).save_pretrained(folder)


def quick_dtype() -> str:
    """bfloat16, or float32 on CPUs that have no instructions for it."""
    return "bfloat16" if multiplies_bfloat16() else "float32"


def environment(scratch: Path) -> dict[str, str]:
    """For every process measured: CPU, one thread a rank, this checkout's packages, caches of its own."""
    # no index or registry from an earlier run helps, and none is left in the user's home
    folders = {"XDG_CACHE_HOME": str(scratch / "cache"), "XDG_STATE_HOME": str(scratch / "state")}
    return {
        **os.environ,
        **folders,
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def dsft_command() -> list[str]:
    """The installed `dsft`, else the module it runs."""
    script = Path(sys.executable).parent / "dsft"
    return [str(script)] if script.exists() else [sys.executable, "-m", "launcher"]


def plan_run(folder: Path, config: LaunchConfig) -> Path:
    """Make ``folder`` the run directory of a first attempt, with config and plan, as `dsft launch` does; returns it."""
    from launcher.facts import gather_facts
    from launcher.plan import make_plan
    from trainer.rundir import RunDirectory, write_json

    run = RunDirectory(folder)
    run.attempt_dir(1).mkdir(parents=True)
    write_json(run.config_path, config.model_dump(mode="json"))
    write_json(run.plan_path, make_plan(config, gather_facts(config)).to_json())
    return run.path


def hf_arguments(deepspeed: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """TrainingArguments with which HF's Trainer trains as dsft does, by the DeepSpeed JSON that dsft has planned."""
    asked = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    settings = {**deepspeed, **dict.fromkeys(asked, "auto")}
    settings.pop("managed_gradient_accumulation", None)
    return {
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "optim": "adamw_torch_fused",
        "bf16": True,
        "use_cpu": True,
        "deepspeed": settings,
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        **more,
    }


def torchrun_command(ranks: int) -> list[str]:
    """torchrun as a person types it, on a free port."""
    script = Path(sys.executable).parent / "torchrun"
    command = [str(script)] if script.exists() else [sys.executable, "-m", "torch.distributed.run"]
    return [*command, "--standalone", f"--nproc-per-node={ranks}"]


def timed(command: Sequence[str], variables: Mapping[str, str], folder: Path) -> dict[str, float]:
    """Run to the end; {"wall", "cpu"} in seconds, cpu with all children waited for. Raises where it fails."""
    start = time.monotonic()
    with open(folder / "output.txt", "wb") as output:
        process = subprocess.Popen(command, env=dict(variables), cwd=folder, stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed:\n{(folder / 'output.txt').read_text()[-4000:]}")
    return {"wall": time.monotonic() - start, "cpu": usage.ru_utime + usage.ru_stime}


def run_ranks(ranks: int, arguments: Sequence[str], variables: Mapping[str, str], folder: Path) -> str:
    """Run a script under torchrun; its output. Raises where it fails."""
    result = subprocess.run(
        [*torchrun_command(ranks), *arguments],
        env=dict(variables),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=PROCESS_SECONDS,
    )
    if result.returncode != 0:
        raise SystemExit(f"torchrun {' '.join(arguments)} failed:\n{(result.stdout + result.stderr)[-4000:]}")
    return result.stdout


def told_by(command: Sequence[str], variables: Mapping[str, str]) -> Any:
    """The JSON of a program's last line. Raises where it fails."""
    done = subprocess.run(command, env=dict(variables), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def launch(config: Mapping[str, Any], folder: Path) -> Path:
    """`dsft launch` of a config, to its end; the run's directory. ``folder`` is for its file. Raises where it fails."""
    path = folder / f"{config['name']}.json"
    path.write_text(json.dumps(config))
    command = [*dsft_command(), "launch", str(path)]
    done = subprocess.run(command, env=environment(folder), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stdout[-2000:] + done.stderr[-2000:])
    return Path(config["output_dir"], config["name"])


def status(key: str) -> int:
    """A size of this process in bytes, from /proc/self/status."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key + ":"))
    return int(line.split()[1]) * 1024


class Peak:
    """Samples a size of this process in a thread while the context is open; `bytes` is the highest seen.

    RssAnon: memory that the system cannot take back.
    """

    def __init__(self, key: str = "RssAnon") -> None:
        self._key, self._stop = key, threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Peak:
        self.bytes = status(self._key)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._stop.wait(0.002):
            self.bytes = max(self.bytes, status(self._key))

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.bytes = max(self.bytes, status(self._key))


def end_rank() -> NoReturn:
    """End a rank's process when its results are out: gloo's destructors abort now and then."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def median_ratio(first: Sequence[float], second: Sequence[float]) -> float:
    """Median of the ratios of pairs measured side by side: slow phases of a shared machine hit both of a pair."""
    return statistics.median(a / b for a, b in zip(first, second, strict=True))


def command_line(script: str) -> str:
    """This command as others would type it: of files named by their whole paths, the names."""
    words = (Path(word).name if word.startswith("/") else word for word in sys.argv[1:])
    return shlex.join(["python", f"benchmarks/{script}.py", *words])


def machine() -> dict[str, Any]:
    """Where and when, with the load at that time: figures from a busy machine are to be read as such."""
    model = next(
        (line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    described = describe_environment(ROOT, None)
    return {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load_average": [round(value, 1) for value in os.getloadavg()],
        "platform": described["platform"],
        "python": described["python"],
        "packages": {name: version for name, version in described["packages"].items() if version},
        "git_commit": described["git_commit"],
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def write_result(
    folder: Path, name: str, value: dict[str, Any], rows: Sequence[Sequence[str]], whole: bool = True
) -> None:
    """Write NAME.json and NAME.md (a table whose first row is its head), and print the table if it is ``whole``."""
    folder.mkdir(parents=True, exist_ok=True)
    where = machine()
    (folder / f"{name}.json").write_text(json.dumps({"benchmark": name, "machine": where, **value}, indent=1) + "\n")
    versions = ", ".join(f"{package} {version}" for package, version in where["packages"].items())
    head, *body = rows
    lines = [
        f"# {name}",
        "",
        f"Command: `{value['command']}`",
        f"Date: {where['date']}; commit {where['git_commit']}",
        f"Machine: {where['cpu']}, {where['cores']} cores, {where['memory_gib']} GiB; "
        f"load average at the end {'/'.join(map(str, where['load_average']))}",
        f"Versions: Python {where['python']}, {versions}",
        f"Formula: {value['formula']}",
    ]
    table = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *body)]
    text = "  \n".join(lines[2:])
    page = "\n".join([*lines[:2], text, "", *table, ""])
    (folder / f"{name}.md").write_text(page)
    if whole:
        print(page)
