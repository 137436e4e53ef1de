"""`python -m kveraser.engines.vllm.server`: vLLM's own OpenAI-compatible server, with the eraser and the connector.

Knows: vLLM's command line. Does not import vLLM: it starts `vllm.entrypoints.openai.api_server` as it is.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from kveraser.engines.vllm.client.http import VLLMClient
from kveraser.eraser.adapter_files import CONFIG
from kveraser.eraser.config import FILE_NAME, EraserConfig
from kveraser.eraser.shipped import shipped_erasers
from kveraser.errors import EngineError, OptionError
from kveraser.files import cache_folder
from kveraser.model.backbone import DEFAULT_BACKBONE, converted, embedded_gguf
from kveraser.serving.exposure import check_exposure

_START_SECONDS = 1800.0


def transfer_config(
    store: str | Path, *, capacity_gb: float | None = None, eraser: str | Path | None = None
) -> dict[str, Any]:
    """The value of vLLM's `--kv-transfer-config` (or, in Python, the arguments of its `KVTransferConfig`)."""
    extra: dict[str, Any] = {"store": str(store)}
    if capacity_gb is not None:
        extra["capacity_gb"] = capacity_gb
    if eraser is not None:
        extra["eraser"] = str(eraser)
    return {
        "kv_connector": "EraserConnector",
        "kv_connector_module_path": "kveraser.engines.vllm.server.connector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "fail",
        "kv_connector_extra_config": extra,
    }


def server_arguments(
    model: str, eraser: str | Path, store: str | Path, *, capacity_gb: float | None = None, extra: Sequence[str] = ()
) -> list[str]:
    """Arguments of `python -m vllm.entrypoints.openai.api_server`.

    Args:
        model: hub id or folder; the embedded default by its name.
        eraser: PEFT folder with a `kveraser.json`.
        store: folder for edited contexts, shared by all processes of the engine.
        extra: further arguments of vLLM's own (`--tensor-parallel-size`, ...).

    Raises:
        OptionError: no such eraser.
        EraserMismatchError: one that does more than engines can.
    """
    config = Path(eraser) / CONFIG
    if not config.is_file():
        raise OptionError(f"{eraser} is no eraser's folder: there is no {config.name} in it")
    EraserConfig.read(Path(eraser) / FILE_NAME).check_plain(Path(eraser))
    rank = int(json.loads(config.read_text(encoding="utf-8"))["r"])
    name = DEFAULT_BACKBONE if model == DEFAULT_BACKBONE else model
    place = str(converted(embedded_gguf(), DEFAULT_BACKBONE)) if model == DEFAULT_BACKBONE else model
    transfer = transfer_config(store, capacity_gb=capacity_gb, eraser=eraser)
    # Two slots for one adapter: vLLM's CPU code gives tokens without an adapter the last slot's in a mixed batch, so that
    # slot has to stay empty (the connector insists on it).
    return [
        "--model", place, "--served-model-name", name,
        "--enable-lora", "--max-loras", "2", "--max-lora-rank", str(_allowed_rank(rank)), "--lora-modules", f"eraser={eraser}",
        "--enable-prompt-tokens-details",
        "--enable-scale-out",  # the proxy has chats rendered by the server itself
        "--kv-transfer-config", json.dumps(transfer),
        *extra,
    ]  # fmt: skip


def shipped_folder(model: str) -> Path:
    """The eraser that ships for a model's name.

    Raises:
        OptionError: none does.
    """
    known = shipped_erasers()
    if model not in known:
        raise OptionError(
            f"no eraser ships for {model!r} (there is one for {', '.join(known)}); give one with --eraser"
        )
    return known[model]


@contextmanager
def running_server(arguments: Sequence[str], *, log: Path, **environment: str) -> Iterator[str]:
    """Start a server on a free port of this machine, wait until it answers, and stop it in the end; gives its address.

    Raises:
        EngineError: it ended, or did not answer in half an hour; the log says why.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--port", str(port)]
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [*command, *arguments],
            stdout=stream,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
            start_new_session=True,  # vLLM has processes of its own: they are ended together
        )
    address = f"http://127.0.0.1:{port}"
    try:
        _wait(address, process, log)
        yield address
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(60)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _wait(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    client, deadline = VLLMClient(address, timeout=5), time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise EngineError(f"the server ended with code {process.returncode}; {log} says why")
        try:
            client.models()
            return
        except EngineError:
            time.sleep(1)
    raise EngineError(f"the server did not answer within {_START_SECONDS:.0f} seconds; see {log}")


def _allowed_rank(rank: int) -> int:
    """The smallest rank that vLLM accepts as a bound."""
    for bound in (1, 8, 16, 32, 64, 128, 256, 320, 512):
        if rank <= bound:
            return bound
    raise OptionError(f"vLLM serves adapters up to rank 512, the eraser has rank {rank}")


def _key_of(arguments: Sequence[str]) -> Iterator[str]:
    """The values of vLLM's `--api-key` among its arguments."""
    for number, argument in enumerate(arguments):
        name, _, value = argument.partition("=")
        if name.replace("_", "-") == "--api-key":
            following = "".join(arguments[number + 1 : number + 2])
            yield (value or ("" if following.startswith("--") else following)).strip()


def main(arguments: Sequence[str] | None = None) -> None:
    """Become vLLM's server."""
    parser = argparse.ArgumentParser(
        prog="python -m kveraser.engines.vllm.server",
        description="vLLM's OpenAI-compatible server with the eraser. Arguments not named here go to vLLM.",
    )
    parser.add_argument("--model", default=DEFAULT_BACKBONE, help="embedded default, hub id or folder")
    parser.add_argument("--eraser", help="PEFT folder with a kveraser.json; default the one that ships for the model")
    parser.add_argument("--store", default=str(cache_folder() / "vllm-store"), help="folder for edited contexts")
    parser.add_argument("--capacity-gb", type=float, help="how much it may take; the least recently used goes first")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; others than loopback need --api-key")
    known, rest = parser.parse_known_args(arguments)
    has_key = any(_key_of(rest)) or bool(os.environ.get("VLLM_API_KEY", "").strip())
    check_exposure(known.host, has_key, "give --api-key, or set VLLM_API_KEY")
    eraser = known.eraser or shipped_folder(known.model)
    said = server_arguments(
        known.model, eraser, known.store, capacity_gb=known.capacity_gb, extra=["--host", known.host, *rest]
    )
    os.execv(sys.executable, [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *said])


if __name__ == "__main__":
    main()
