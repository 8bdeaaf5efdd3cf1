"""`bupo.target_layer=auto`: before step 0, ask the model where its exploration ends.

The analysis is that of `megatron-bupo analyze`, under the run's own layout, of responses to
`bupo.auto_prompts` training prompts. It stays in `run_dir/analysis`, and a run that resumes reads
the layer there; everything after this sees a number.
"""

from __future__ import annotations

import gc
import json
import os
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from megatron_bupo.analysis.results import RESULTS
from megatron_bupo.checkpoints import newest_checkpoint
from megatron_bupo.config import Config, expand
from megatron_bupo.config.schema import AUTO
from megatron_bupo.errors import InputError
from megatron_bupo.launch.local import is_first_rank, under_torchrun
from megatron_bupo.preflight import check_model, preflight

FOLDER = "analysis"
WHERE = f"bupo.target_layer={AUTO}"
LENS_RESPONSES = 3


def is_open(config: Config) -> bool:
    """Is the layer of an internal phase still to be chosen?"""
    return config.bupo.target_layer == AUTO and config.bupo.internal_steps > 0


def chosen_before(config: Config) -> Config | None:
    """`config` with the layer that an analysis in its run_dir recommends; None: there is none."""
    path = _folder(config) / RESULTS
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["recommendation"]
        layer = None if found is None else int(found["target_layer"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = f"cannot be read ({type(error).__name__}: {error})"
        raise InputError(f"{WHERE}: {path}", reason, "restore it, or choose the layer") from None
    if layer is None:
        reason = "a model of one layer has no internal policy"
        raise InputError(WHERE, reason, "set bupo.internal_steps=0 for GRPO")
    return _at(config, layer)


def choose(config: Config) -> Config:
    """`config` with a layer: that of an earlier analysis, else of one made now.

    Ranks that torchrun has started are also those of the analysis. They go by what the first one
    finds: a network's file system need not show all of them the same.
    """
    if under_torchrun():
        from megatron_bupo.mcore import parallel  # seconds, for torch

        parallel.join_process_group()
    chosen = _as_the_first(_chosen_earlier, config)
    if chosen is None:
        _analyze(config)
        chosen = _as_the_first(chosen_before, config)
    assert chosen is not None, "an analysis that has ended has written its results"
    return chosen


def _as_the_first(find: Callable[[Config], Config | None], config: Config) -> Config | None:
    """What `find(config)` comes to on the first rank."""
    from megatron_bupo import collective

    [found] = collective.gather([find(config)] if is_first_rank() else [])
    return found


def _chosen_earlier(config: Config) -> Config | None:
    """As `chosen_before`, if it is of this model. A run that resumes has its own weights, and is
    asked about those elsewhere.
    """
    chosen, path = chosen_before(config), _folder(config) / RESULTS
    resumes = newest_checkpoint(Path(expand(config.run_dir))) is not None
    if chosen is None:
        if resumes:
            reason = f"{config.run_dir} holds a checkpoint and no analysis that its layer was"
            way_out = "set the layer that the run began with"
            raise InputError(WHERE, f"{reason} chosen by", way_out)
        return None
    if not resumes:
        from megatron_bupo.commands.analyze import files_of

        was = json.loads(path.read_text(encoding="utf-8")).get("settings", {})
        for name, now in files_of(Path(expand(config.model.path))).items():
            if was.get(name) != now:
                reason = f"{path} is of another model: {name} have changed"
                raise InputError(WHERE, reason, "choose another run_dir, or give the layer")
    print(f"{WHERE}: layer {chosen.bupo.target_layer}, by {path}")
    return chosen


def _analyze(config: Config) -> None:
    from megatron_bupo.commands.analyze import analysis_of, carry_out

    layers = check_model(replace(config, bupo=replace(config.bupo, target_layer=None))).layers
    if layers > 1:  # what else is wrong is said now, and not after the analysis
        world_size = int(os.environ["WORLD_SIZE"]) if under_torchrun() else None
        preflight(_at(config, layers - 1), world_size)
    args = Namespace(
        data=None,
        responses=None,
        prompts=config.bupo.auto_prompts,
        read_out="raw",
        per_token=False,
        lens_responses=LENS_RESPONSES,
        out=str(_folder(config)),
    )
    carry_out(analysis_of(args, config), stay=under_torchrun())
    gc.collect()  # the model that was read: its hooks hold each other, and the next one comes


def _at(config: Config, layer: int) -> Config:
    return replace(config, bupo=replace(config.bupo, target_layer=layer))


def _folder(config: Config) -> Path:
    return Path(expand(config.run_dir)) / FOLDER
