"""A rank of `dsft eval`: scores of a trained model, the same at any number of ranks and any batch size.

Started by `launcher.inference` through `trainer.agent`, as `trainer.worker` is.
"""

from __future__ import annotations

from trainer.config.schema import LaunchConfig
from trainer.inference import load_replica, read_request
from trainer.rundir import RunDirectory, write_json
from trainer.worker import end, main


def score(run: RunDirectory, attempt: int) -> None:
    """Rank 0 writes `scores.json`: {"scores": as in metrics.jsonl, "left_out": what became of other records}."""
    import torch.distributed as dist

    from trainer.collectives import TIMEOUT_SECONDS, make_gather, new_group
    from trainer.evaluation import evaluate, evaluation_streams

    request = read_request(run.path)
    config = LaunchConfig.model_validate(request["config"])
    dist.init_process_group("gloo")  # models are whole on every rank: what ranks exchange is small
    task, replica, objective = load_replica(config)
    sets = evaluation_streams(
        config,
        task,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        micro_batch_size=request["batch_size"],
        gather=make_gather(new_group(TIMEOUT_SECONDS)),
    )
    group = new_group(TIMEOUT_SECONDS)
    scores = evaluate(replica, task, objective, sets, group)  # type: ignore[arg-type]  # as an Engine
    counts = [stream.counts() for stream in sets.values()]
    if dist.get_rank() == 0:
        left_out = {name: total for name in counts[0] if (total := sum(count[name] for count in counts))}
        write_json(run.path / "scores.json", {"scores": scores, "left_out": left_out})
    dist.barrier(group)


if __name__ == "__main__":
    end(main(train=score))
