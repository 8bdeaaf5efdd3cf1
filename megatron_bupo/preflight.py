"""Will this run start? Everything a user can get wrong, looked at before any process group exists.

In the order of cost: the settings among themselves, the model's config.json and headers, the
tokenizer, the data, the reward function, the checkpoint to resume from, Megatron-Core's own keys.
The first thing that is wrong is raised as an InputError. Nothing but the last looks at torch.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

from megatron_bupo.algorithm.bupo import FULL, PhaseSchedule, depth_of
from megatron_bupo.checkpoints import newest_checkpoint, read_run
from megatron_bupo.config import expand, flatten
from megatron_bupo.config.checks import check, check_against_model
from megatron_bupo.config.critic_rules import check_critic_against_model, refuse_critic_of_unknown
from megatron_bupo.config.layout import Layout
from megatron_bupo.config.schema import Config
from megatron_bupo.config.tracker_rules import check_installed
from megatron_bupo.errors import InputError
from megatron_bupo.guard import Watch, check_baseline
from megatron_bupo.hf.architecture import (
    Architecture,
    DecoderSizes,
    is_known,
    read_architecture,
)
from megatron_bupo.hf.tensors import check_tensors, check_tied, read_index

TOKENIZER_FILE = "tokenizer.json"
# What a run keeps for good; everything else may change when it is resumed, the layout too.
FOR_GOOD = ("parallel.distributed_optimizer", "model.dtype")
# Facts of a checkpoint directory that are none of the network's.
BESIDE_THE_WEIGHTS = {"max_positions", "eos_token_ids", "pad_token_id", "dtype"}


@dataclass(frozen=True)
class Preflight:
    """A run that can start: its settings, the model that they name, and who holds what."""

    config: Config
    architecture: DecoderSizes
    layout: Layout
    notes: tuple[str, ...] = ()  # what there is to say about the data
    critic: Architecture | None = None  # of PPO's critic, if there is one


def preflight(config: Config, world_size: int | None) -> Preflight:
    """Check everything; `world_size` ranks under torchrun, None where we start the ranks."""
    layout = check(config, world_size)
    check_installed(config)
    architecture = check_files(config)
    critic = check_critic(config)
    notes = check_data(config)
    check_resumption(config, architecture, critic)
    _check_debugging(config, architecture)
    if config.megatron:
        from megatron_bupo.mcore.native import check_native

        check_native(config.megatron)
    return Preflight(config, architecture, layout, notes, critic)


def check_files(config: Config) -> DecoderSizes:
    """The model, its tokenizer and the reward function exist and fit; without torch."""
    from megatron_bupo.probe_texts import given_texts
    from megatron_bupo.rewards.terms import check_terms

    architecture = check_model(config)
    if config.hicra.grams is not None:
        from megatron_bupo.data.gram_files import read_grams

        read_grams(Path(expand(config.hicra.grams)))
    if config.debug.replay is None:
        check_terms(config.reward, config.rollout.max_response_tokens)
    given_texts(config, architecture)
    return architecture


def check_data(config: Config) -> tuple[str, ...]:
    """Every row of the data can be asked and graded; and what there is to say about the data."""
    from megatron_bupo.data.prompts import check_rows

    if config.debug.replay is not None:
        return ()
    benchmarks = [benchmark.data for benchmark in config.evaluation.benchmarks]
    tokenizer = expand(config.model.tokenizer or config.model.path)
    return tuple(check_rows(config.data, benchmarks, tokenizer=tokenizer))


def check_model(config: Config, *, training: bool = True) -> DecoderSizes:
    """The checkpoint is whole, is what its config.json says, and fits settings and tokenizer.

    Scoring (not `training`) reads token ids and needs no tokenizer.
    """
    model_dir = expand(config.model.path)
    architecture = _read_architecture(config)
    check_against_model(config, architecture, training=training)
    index = read_index(model_dir)
    if isinstance(architecture, Architecture):
        check_tensors(architecture, index)
        check_tied(architecture, index)
    elif training:  # the bridge checks the tensors, as it pairs the names
        refuse_critic_of_unknown(config, architecture.family)
    if training:
        check_vocabulary(config, architecture)
    return architecture


def check_critic(config: Config) -> Architecture | None:
    """The checkpoint that PPO's critic begins with is whole, fits the layout, and means the same by
    a token id as the policy. Its size may be another.
    """
    if not config.has_critic:
        return None
    model_dir = expand(config.of_critic.model.path)
    try:
        critic = read_architecture(model_dir, value_head=True)
        check_critic_against_model(config, critic)
        check_tensors(critic, read_index(model_dir))
        if config.critic.path is not None:
            _check_critic_vocabulary(config, critic)
    except InputError as error:
        where, *rest = error.args
        named = config.critic.path is None or where.startswith("critic.")
        raise InputError(where if named else f"critic.path: {where}", *rest) from None
    return critic


def _check_critic_vocabulary(config: Config, critic: Architecture) -> None:
    where, way_out = f"critic.path={config.critic.path}", "name a model with the policy's tokenizer"
    policys = _vocabulary(config.model.tokenizer or config.model.path)
    own = policys
    if (Path(expand(config.critic.path or "")) / TOKENIZER_FILE).exists():
        own = _vocabulary(config.critic.path or "")
    for token, index in policys.items():
        if own.get(token) != index:
            reason = f"its tokenizer does not give {token!r} the id {index}, as the policy's does"
            raise InputError(where, reason, way_out)
        if index >= critic.vocab_size:
            reason = f"its vocabulary ends at {critic.vocab_size - 1}, but {token!r} is {index}"
            raise InputError(where, reason, way_out)


def _read_architecture(config: Config) -> DecoderSizes:
    """What config.json describes; where our table does not know it, in Megatron-Bridge's words."""
    model_dir = expand(config.model.path)
    if is_known(model_dir) or importlib.util.find_spec("megatron.bridge") is None:
        return read_architecture(model_dir)
    try:
        from megatron_bupo.mcore.bridge import read_sizes
    except ImportError as error:
        where, reason = f"model.path={config.model.path}", f"it does not import ({error})"
        raise InputError(
            where, f"needs Megatron-Bridge, but {reason}", "install what it asks for"
        ) from error
    return read_sizes(config)


def check_resumption(
    config: Config, architecture: DecoderSizes, critic: Architecture | None = None
) -> None:
    """The checkpoint that the run would go on from is of this model and this kind of optimizer,
    the actor that goes on has a place for all that it trained, and a critic can go on too.
    """
    newest = newest_checkpoint(Path(expand(config.run_dir)))
    if newest is None:
        return
    step, path = newest
    before = read_run(path)
    for key in FOR_GOOD:
        was, now = before["config"][key], flatten(config)[key]
        if was != now:
            was, now = (v if isinstance(v, str) else json.dumps(v) for v in (was, now))
            reason = f"{path} holds the state of an optimizer with {key}={was}, which does not fit"
            raise InputError(f"{key}={now}", reason, f"set {key}={was}, or choose another run_dir")
    models = [("model.path", config.model.path, before["architecture"], architecture)]
    if critic is not None:
        key = "model.path" if config.critic.path is None else "critic.path"
        its = before.get("critic_architecture")
        if its is None:
            raise InputError(
                "algorithm.advantage=gae",
                f"{path} holds no critic, and one that has learned nothing would judge its policy",
                "choose another run_dir; `megatron-bupo convert` makes a model.path of it",
            )
        models.append((key, config.of_critic.model.path, its, critic))
    for key, folder, then, sizes in models:
        for name, was, now in other_than_before(then, sizes):
            raise InputError(
                f"{key}={folder}",
                f"is a model with {name}={now}, but {path} is of one with {name}={was}",
                "name the model that the run began with, or choose another run_dir",
            )
    watch, resting = Watch.of(path), config.resting_steps
    phases = PhaseSchedule.of(config.bupo.phases(), resting_steps=resting).until(watch.left_before)
    policy = phases.policy_at(step)
    if step and policy != FULL:
        check_baseline(config.bupo.guard, watch, path)
    if config.bupo.internal_layout is not None and (
        depth_of(policy, architecture.layers) < before["trained_layers"]
    ):
        raise InputError(
            "bupo.internal_layout",
            f"{path} has trained {before['trained_layers']} layers, and the run would go on with "
            f"an actor of the {policy} alone",
            "set bupo.internal_layout=null, or choose another run_dir",
        )


def other_than_before(
    before: Mapping[str, Any], architecture: DecoderSizes
) -> Iterator[tuple[str, Any, Any]]:
    """`(fact, was, is now)` of the network's facts that a checkpoint has otherwise. What it does
    not say is not looked at: a bridge knows fewer facts than our table.
    """
    for name, now in json.loads(json.dumps(asdict(architecture))).items():
        was = before.get(name, now)
        if was != now and name not in BESIDE_THE_WEIGHTS:
            yield name, was, now


def _check_debugging(config: Config, architecture: DecoderSizes) -> None:
    """What is to be replayed can be; a run without training is not that of a training run."""
    newest = newest_checkpoint(Path(expand(config.run_dir)))
    if config.debug.replay is not None:
        from megatron_bupo.replay import check_replay

        first_step = newest[0] if newest else 0
        check_replay(config, first_step=first_step, vocab_size=architecture.vocab_size)
    if config.debug.rollout_only and newest:
        raise InputError(
            f"run_dir={config.run_dir}",
            f"holds a training run ({newest[1]}), and debug.rollout_only=true would not go on "
            "with it",
            "choose another run_dir",
        )


def check_vocabulary(config: Config, architecture: DecoderSizes) -> None:
    """Every token id has a row in the embedding. Rows without a token are common, and fine."""
    named = config.model.tokenizer
    where = f"model.path={config.model.path}" if named is None else f"model.tokenizer={named}"
    folder = named or config.model.path
    if not (Path(expand(folder)) / TOKENIZER_FILE).exists():
        raise InputError(
            where,
            f"the directory has no {TOKENIZER_FILE}",
            "set model.tokenizer to a directory that has one; AutoTokenizer.from_pretrained(...)."
            "save_pretrained(DIR) writes it",
        )
    vocabulary = _vocabulary(folder)
    token = max(vocabulary, key=vocabulary.__getitem__, default="")
    if vocabulary.get(token, 0) >= architecture.vocab_size:
        raise InputError(
            where,
            f"its tokenizer has the token {token!r} with id {vocabulary[token]}, but the model's "
            f"vocabulary ends at {architecture.vocab_size - 1}",
            "set model.tokenizer to the tokenizer of this model",
        )


def _vocabulary(folder: str) -> dict[str, int]:
    """The id of every token that the tokenizer in `folder` knows."""
    from tokenizers import Tokenizer

    file = Path(expand(folder)) / TOKENIZER_FILE
    try:
        json.loads(file.read_bytes())
        return Tokenizer.from_file(str(file)).get_vocab(with_added_tokens=True)
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise InputError(str(file), f"cannot be read ({error})", "restore it") from None


def prepare(config: Config) -> None:
    """Call `config.prepare`, which makes what the run needs and is missing."""
    if config.prepare is not None:
        _prepare_function(config.prepare)(config)


def _prepare_function(name: str) -> Callable[[Config], Any]:
    where = f"prepare={name}"
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        raise InputError(where, "is not an import path", "write package.module:function")
    try:
        function = attrgetter(attribute)(importlib.import_module(module))
    except Exception as error:  # a module may raise anything while it is imported
        reason = f"does not import ({type(error).__name__}: {error})"
        raise InputError(where, reason, "write package.module:function") from error
    if not callable(function):
        raise InputError(where, "is not a function", "write package.module:function")
    return function
