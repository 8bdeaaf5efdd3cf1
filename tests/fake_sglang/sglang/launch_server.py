"""`python -m sglang.launch_server --model-path DIR --port N [native options]`."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sglang.api import Api, Server
from sglang.model import Model
from sglang.scheduler import Scheduler
from sglang.weights import WeightUpdates

DEFAULTS: dict[str, Any] = {
    "host": "127.0.0.1",
    "port": 30000,
    "api_key": None,
    "tp_size": 1,
    "dtype": "auto",
    "device": "cpu",
    "context_length": None,
    "skip_tokenizer_init": False,
    "enable_deterministic_inference": False,
    "json_model_override_args": "{}",
    "random_seed": None,
    "tokenizer_path": None,
    "weight_version": "default",
}


def arguments_of(words: list[str]) -> dict[str, Any]:
    """`--some-option value` and `--some-flag`, under the names of SGLang's fields; unlike the real
    one it takes any.
    """
    found = dict(DEFAULTS)
    name = ""
    for word in words:
        if word.startswith("--"):
            name, _, value = word[2:].replace("-", "_").partition("=")
            found[name] = word.partition("=")[2] if value else True
        elif name and found[name] is True:
            found[name] = word
        elif name:
            before = found[name]
            found[name] = [*(before if isinstance(before, list) else [before]), word]
        else:
            raise SystemExit(f"launch_server.py: error: unrecognized arguments: {word}")
    for number in ("port", "tp_size", "context_length", "random_seed"):
        if found[number] is not None:
            found[number] = int(found[number])
    if "model_path" not in found:
        raise SystemExit(
            "launch_server.py: error: the following arguments are required: --model-path"
        )
    return found


def end_tokens(directory: Path, tokenizer: Any, readable: Path) -> frozenset[int]:
    """Ids that end a response, from the configs and the tokenizer."""
    ids: set[int] = set()
    for file in ("config.json", "generation_config.json"):
        if (directory / file).exists():
            found = json.loads((directory / file).read_text()).get("eos_token_id")
            ids |= {found} if isinstance(found, int) else set(found or ())
    if tokenizer is not None:
        settings = json.loads((readable / "tokenizer_config.json").read_text())
        token = settings.get("eos_token")
        end = tokenizer.token_to_id(token["content"] if isinstance(token, dict) else token or "")
        ids |= set() if end is None else {end}
    return frozenset(ids)


def decoder(tokenizer: Any) -> Callable[[list[int], bool], str] | None:
    """`(ids, skip_special_tokens)` to text."""
    if tokenizer is None:
        return None
    return lambda ids, skip: tokenizer.decode(ids, skip_special_tokens=skip)


def main() -> None:
    """Serve until killed."""
    torch.set_num_threads(1)
    arguments = arguments_of(sys.argv[1:])
    directory = Path(arguments["model_path"])
    tokenizer, readable = None, Path(arguments["tokenizer_path"] or directory)
    if not arguments["skip_tokenizer_init"]:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(readable / "tokenizer.json"))
    override = arguments["json_model_override_args"]
    model = Model(directory, dtype=arguments["dtype"], override=override)
    seed = arguments["random_seed"]
    scheduler = Scheduler(
        model,
        version=arguments["weight_version"],
        eos=end_tokens(directory, tokenizer, readable),
        context=arguments["context_length"] or model.config["max_position_embeddings"],
        deterministic=bool(arguments["enable_deterministic_inference"]),
        seed=int.from_bytes(os.urandom(4)) if seed is None else seed,
    )
    updates = WeightUpdates(scheduler, model_path=str(directory), tp_size=arguments["tp_size"])
    api = Api(scheduler, updates, arguments, decoder(tokenizer))
    server = Server((arguments["host"], arguments["port"]), api)
    print("The server is fired up and ready to roll!", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
