"""Whether the Hugging Face hub can be reached: asked before its library tries for a minute, for each file anew."""

from __future__ import annotations

import os
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from trainer.config.schema import LaunchConfig

_CONNECT_SECONDS = 4.0  # TCP repeats a lost packet after 1 and 3 s
_QUICK_SECONDS = 1.0  # a refusal that comes sooner may be a moment's
_ADDRESSES = 16
_PORTS = {"http": 80, "https": 443}
_FILES = ("config.json", "tokenizer_config.json", "tokenizer.json", "preprocessor_config.json")


def offline_if_unreachable(config: LaunchConfig) -> str | None:
    """Where there is no way to the hub, have its library take what `config` names from its cache, in this process and
    those it starts; what to tell the user if a model is not there. HF_HUB_OFFLINE, set to anything, prevents it.
    """
    named = {f"model.{key}": getattr(config.model, key) for key in ("path", "tokenizer", "processor")}
    names = {key: name for key, name in named.items() if name and not os.path.isabs(name)}
    data = any(source.path.startswith("hf://") for source in (*config.data.train, *config.data.evaluation))
    if not (names or data) or "HF_HUB_OFFLINE" in os.environ or (why := _unreachable()) is None:
        return None
    from huggingface_hub import constants, try_to_load_from_cache

    for key, name in names.items():
        if not any(isinstance(try_to_load_from_cache(name, file), str) for file in _FILES):
            return (
                f"{key}: {name} is not in this machine's Hugging Face cache, and the hub cannot be reached ({why}). "
                f"`hf download {name}`, or `dsft stage` for all that a config names, fetches it where there is a "
                "network; HTTPS_PROXY names a proxy, HF_ENDPOINT a mirror; HF_HUB_OFFLINE=0 leaves it to the library"
            )
    constants.HF_HUB_OFFLINE = True  # the variable alone would come too late
    os.environ["HF_HUB_OFFLINE"] = "1"
    print(f"the Hugging Face hub cannot be reached ({why}): its cache has to do", file=sys.stderr, flush=True)
    return None


def _unreachable() -> str | None:
    """Why no connection to the hub, or to the proxy on the way, can be made; None where one can."""
    hub = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    proxies = {} if proxy_bypass(hub.hostname or "") else getproxies()
    proxy = proxies.get(hub.scheme) or proxies.get("all")
    target = hub if proxy is None else urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    port = target.port or _PORTS.get(target.scheme, 1080)
    begin = time.monotonic()
    why = _connect(target.hostname or "", port)
    if why is not None and time.monotonic() - begin < _QUICK_SECONDS:
        time.sleep(_QUICK_SECONDS)
        why = _connect(target.hostname or "", port)
    return None if why is None else f"{target.hostname}:{port}: {why}"


def _connect(host: str, port: int) -> str | None:
    """None as soon as one address of the host accepts a connection, else why none does."""
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[:_ADDRESSES]
    except OSError as error:
        return str(error.strerror)

    def attempt(address: tuple[Any, ...]) -> str | None:
        try:
            socket.create_connection(address[:2], _CONNECT_SECONDS).close()
        except OSError as error:
            return error.strerror or str(error)
        return None

    pool = ThreadPoolExecutor(_ADDRESSES)
    why: str | None = "it has no address"
    for done in as_completed([pool.submit(attempt, address) for *_, address in addresses]):
        if (why := done.result()) is None:
            break
    pool.shutdown(wait=False)
    return why
