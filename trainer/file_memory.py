"""Tensors that lie in files on a node's disk: `deepspeed.offload_optimizer` and `offload_parameters` "nvme".

DeepSpeed is set up as for host memory. What it would keep there is mapped from files instead: ordinary tensors, whose
pages the system writes to disk and reads again as it needs the memory. The files have no name: they are gone with the
process, however it ends. They get all their blocks at once: a disk that is full says so at the start, and not by a
SIGBUS in the middle of a step.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from trainer import local_disk
from trainer.failures import StorageError, UserError, node_name
from trainer.health import UnfitNodeError

_SMALL = 8 << 20  # bytes of tensors that share a file: a process may map some 65,000
_ALIGNMENT = 64  # bytes, as torch's own allocator


class FileMemory:
    """Where one rank keeps tensors in files.

    Args:
        folder: on the disk of this node.
        optimizer: masters, moments and the average are kept there.
        parameters: this rank's share of the weights is.
    """

    def __init__(self, folder: str | Path, optimizer: bool = True, parameters: bool = False) -> None:
        self.folder, self.optimizer, self.parameters = Path(folder), optimizer, parameters
        self.bytes = 0  # of all files so far
        self._chunk, self._used = np.empty(0, dtype=np.uint8), 0

    @classmethod
    def planned(
        cls, plan: Mapping[str, Any], ranks: int, gather: Callable[[np.ndarray], list[np.ndarray]]
    ) -> FileMemory | None:
        """As plan.json has it, in a folder that has been looked at on every node.

        Args:
            ranks: of this node.
            gather: all-gather of int64 arrays, so that no rank takes of the space before all have looked.

        Raises:
            UserError: the folder does not serve, on any node.
            UnfitNodeError: on this one, but on others.
            ConnectionError: on another one.
        """
        if not plan.get("nvme"):
            return None
        folder, holds = Path(plan["nvme"]["path"]), plan["nvme"]["holds"]
        problem = local_disk.problem(folder, ranks, plan["memory"]["nvme"] if plan["memory"] else 0)
        found = [bool(flag) for (flag,) in gather(np.array([problem is not None]))]
        if problem:
            kind = UserError if all(found) else UnfitNodeError
            raise kind(f"deepspeed.nvme_path: {node_name()}: {problem}")
        if any(found):  # whose ranks say why
            raise ConnectionError(f"deepspeed.nvme_path: {folder} does not serve on another node")
        if doubt := local_disk.doubt(folder):
            print(f"deepspeed.nvme_path: {node_name()}: {doubt}", flush=True)
        return cls(folder, "optimizer" in holds, "parameters" in holds)

    def zeros(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """Zeros, [numel], in a file that they keep.

        Raises:
            StorageError: the disk is full, by now: another start looks at it first.
            UserError: no such file can be had otherwise.
        """
        size = numel * dtype.itemsize
        if not size:
            return torch.empty(0, dtype=dtype)
        if size > _SMALL:
            return torch.frombuffer(self._map(size), dtype=dtype, count=numel)
        if self._used + size > len(self._chunk):
            self._chunk, self._used = self._map(local_disk.CHUNK), 0
        start = self._used
        self._used += -(-size // _ALIGNMENT) * _ALIGNMENT
        return torch.frombuffer(self._chunk, dtype=dtype, count=numel, offset=start)  # it holds on to its file

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of a tensor in host memory, in a file."""
        tensor = tensor.detach()
        return self.zeros(tensor.numel(), tensor.dtype).view(tensor.shape).copy_(tensor)

    def _map(self, size: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        try:
            with tempfile.TemporaryFile(dir=self.folder) as file:
                os.posix_fallocate(file.fileno(), 0, size)
                # unlike mmap.mmap, it keeps no descriptor, of which a process may often have but 1024
                path = f"/proc/self/fd/{file.fileno()}"
                mapped = torch.from_file(path, shared=True, size=size, dtype=torch.uint8).numpy()
        except (OSError, RuntimeError) as error:  # torch's is the latter
            free = shutil.disk_usage(self.folder).free
            kind = StorageError if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) else UserError
            raise kind(
                f"deepspeed.nvme_path: {node_name()}: a rank needs {size / 1e9:.3g} GB in {self.folder} beside the "
                f"{self.bytes / 1e9:.3g} GB it has there, and {free / 1e9:.3g} GB are free: "
                f"{getattr(error, 'strerror', error)}"
            ) from error
        self.bytes += size
        return mapped

    @contextmanager
    def serving(self, partitioned: Any, zero3: Any) -> Iterator[None]:
        """Inside, what DeepSpeed makes is made in files from the first: at no time is it whole in host memory.

        Args:
            partitioned: DeepSpeed's ``zero.Init``.
            zero3: its optimizer of stage 3.
        """
        cut, lay_out = partitioned._partition_param, zero3._create_fp32_partitions

        def cut_into_file(init: Any, parameter: Any, *arguments: Any, **options: Any) -> None:
            is_new = parameter.ds_tensor is None
            cut(init, parameter, *arguments, **options)
            if is_new and not parameter.ds_persist:  # small ones stay whole, on the device
                parameter.ds_tensor.data = self.copy(parameter.ds_tensor)

        def flat_weights(zero: Any) -> None:
            for group in zero.trainable_param_groups:
                numel = sum(parameter.partition_numel() for parameter in group["params"])
                zero.param_groups_fp16_flat_cpu_memory.append(self.zeros(numel, zero.dtype))

        def flat_masters(zero: Any) -> None:
            zero.fp32_partitioned_groups_flat = _Moving(self)
            lay_out(zero)

        with ExitStack() as stack:
            if self.parameters:
                stack.enter_context(patch.object(partitioned, "_partition_param", cut_into_file))
                stack.enter_context(patch.object(zero3, "_create_param_groups_fp16_flat_cpu_memory", flat_weights))
            if self.optimizer:
                stack.enter_context(patch.object(zero3, "_create_fp32_partitions", flat_masters))
                # makes a copy of the gradients: `share_gradients` does without
                stack.enter_context(patch.object(zero3, "initialize_optimizer_states", lambda zero: None))
            yield


class _Moving(list[torch.Tensor]):
    """A list that moves what is appended into files."""

    def __init__(self, memory: FileMemory) -> None:
        super().__init__()
        self._memory = memory

    def append(self, tensor: torch.Tensor) -> None:
        super().append(self._memory.copy(tensor))


def share_gradients(zero: Any) -> None:
    """Have the masters' gradients be those that DeepSpeed adds up, in host memory, instead of a copy of them."""
    start = 0
    for flat in zero.fp32_partitioned_groups_flat:
        flat.grad = zero.grad_partitions_flat_buffer.narrow(0, start, flat.numel())
        start += flat.numel()
