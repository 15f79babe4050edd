"""Kernels of causal attention over packed samples: `python benchmarks/attention_kernels.py`, on one GPU.

Each implementation runs forward and backward on the same row of tokens, 16 heads of 128 with 8 for keys and values, in
bf16, for three kinds of rows: documents (samples of one length, which torch's own takes to SDPA, on Hopper cuDNN's),
mixed (128 to 4,096 tokens), short (80 to 207). All go through what transformers calls for `model.attention`, but for
flex attention, whose block mask is made before the clock starts. What cannot run says why. `--small` runs on a CPU and
says nothing of speed.

TFLOP/s: 14 * head size * heads * sum of squared lengths / 2 / seconds, a forward and two and a half of a backward pass
(Dao 2023, section 4.1). The error is the largest difference from fp32, in output and gradients, over the largest value.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RESULTS, command_line, write_result
from torch.nn import functional

from trainer.attention import CallingLayer, attention_function, sample_bounds, varlen_attention

HEADS, KEY_HEADS, SIZE = 16, 8, 128
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def lengths_of(kind: str, tokens: int, longest: int, seed: int = 0) -> list[int]:
    """Samples that fill ``tokens`` together."""
    low, high = {"documents": (longest, longest), "mixed": (longest // 32, longest), "short": (80, 207)}[kind]
    random, left, lengths = np.random.default_rng(seed), tokens, []
    while left:
        lengths.append(min(int(random.integers(low, high + 1)), left))
        left -= lengths[-1]
    return lengths


def one_by_one(lengths: list[int]) -> Attend:
    """Each sample by itself: what all others have to give."""

    def attend(*tensors: torch.Tensor) -> torch.Tensor:
        pieces = zip(*(tensor.split(lengths, dim=2) for tensor in tensors), strict=True)
        done = [functional.scaled_dot_product_attention(*p, is_causal=True, enable_gqa=True) for p in pieces]
        return torch.cat(done, dim=2).transpose(1, 2)

    return attend


def varlen(positions: np.ndarray, device: torch.device) -> Attend:
    told = sample_bounds(positions, device)
    return lambda *tensors: varlen_attention(torch.nn.Identity(), *tensors, None, **told)[0]


def flash(version: int) -> Callable[..., Attend]:
    """As transformers calls it."""

    def made(positions: np.ndarray, device: torch.device) -> Attend:
        if device.type == "cpu":
            raise RuntimeError("it is for GPUs")
        name, told = f"flash_attention_{version}", sample_bounds(positions, device)
        attend, layer = attention_function(name), CallingLayer(name)
        return lambda *tensors: attend(layer, *tensors, None, **told)[0]

    return made


def flex(positions: np.ndarray, device: torch.device) -> Attend:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    sample = torch.from_numpy(np.cumsum(positions[0] == 0)).to(device)

    def seen(_batch: Any, _head: Any, query: Any, key: Any) -> Any:
        return (sample[query] == sample[key]) & (key <= query)

    size = positions.shape[1]
    mask = create_block_mask(seen, None, None, size, size, device=device)
    compiled = torch.compile(flex_attention)
    return lambda q, k, v: compiled(q, k, v, block_mask=mask, enable_gqa=True).transpose(1, 2)


def plain(positions: np.ndarray, device: torch.device) -> Attend:
    """One mask over the whole row."""
    sample = torch.from_numpy(np.cumsum(positions[0] == 0)).to(device)
    mask = (sample[:, None] == sample).tril()
    return lambda q, k, v: functional.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True).transpose(1, 2)


KERNELS: dict[str, Callable[..., Attend]] = {
    "varlen, torch's FlashAttention 2": varlen,
    "varlen, FlashAttention 3": flash(3),
    "varlen, FlashAttention 4": flash(4),
    "flex attention": flex,
    "SDPA, one mask": plain,
}


def pass_through(attend: Attend, tensors: list[torch.Tensor], weight: torch.Tensor) -> list[torch.Tensor]:
    """(output, gradients of queries, keys and values)."""
    output = attend(*tensors)
    return [output, *torch.autograd.grad(output, tensors, weight)]


def measure(name: str, kind: str, options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    lengths = lengths_of(kind, options.tokens, options.sequence_length)
    positions = np.concatenate([np.arange(length) for length in lengths])[None]
    generator = torch.Generator().manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    shapes = [(1, options.tokens, heads, SIZE) for heads in (HEADS, KEY_HEADS, KEY_HEADS, HEADS)]
    *inputs, weight = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    tensors = [tensor.transpose(1, 2).requires_grad_() for tensor in inputs]  # as they come from a layer
    wait = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    began = time.perf_counter()
    try:
        attend = KERNELS[name](positions, device)
        found = pass_through(attend, tensors, weight)
        wait()
        first = time.perf_counter() - began
        seconds = []
        for _ in range(options.repeats):
            began = time.perf_counter()
            pass_through(attend, tensors, weight)
            wait()
            seconds.append(time.perf_counter() - began)
    except Exception as error:
        return {"problem": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
    exact = [tensor.detach().float().requires_grad_() for tensor in tensors]
    right = pass_through(one_by_one(lengths), exact, weight.float())
    pairs = zip(found, right, strict=True)
    error = max(float((a.detach().float() - b.detach()).abs().max() / b.detach().abs().max()) for a, b in pairs)
    flops = 14 * SIZE * HEADS * sum(length**2 for length in lengths) / 2
    middle = statistics.median(seconds)
    return {"seconds": middle, "tflops": flops / middle / 1e12, "first_seconds": first, "error": error}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--sequence-length", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--kernels", nargs="+", choices=list(KERNELS), default=list(KERNELS), metavar="NAME")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    device = torch.device("cpu" if options.small else "cuda")
    if options.small:
        options.tokens, options.sequence_length, options.repeats = 512, 256, 1
    rows = [["kernel", "row", "forward and backward", "TFLOP/s", "first call", "error"]]
    found: dict[str, dict[str, Any]] = {}
    for kind in ("documents", "mixed", "short"):
        for name in options.kernels:
            result = found[f"{name}; {kind}"] = measure(name, kind, options, device)
            if "problem" in result:
                rows.append([name, kind, result["problem"].replace("|", "/"), *["-"] * 3])
                continue
            cells = [f"{result['seconds'] * 1e3:.2f} ms", f"{result['tflops']:.0f}"]
            rows.append([name, kind, *cells, f"{result['first_seconds']:.1f} s", f"{result['error']:.1e}"])
            print(rows[-1], flush=True)
    value = {
        "command": command_line("attention_kernels"),
        "formula": "14 * head size * heads * sum of squared lengths / 2 / seconds",
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "kernels": found,
    }
    write_result(options.output, "attention_kernels", value, rows)


if __name__ == "__main__":
    main()
