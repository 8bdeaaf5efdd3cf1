"""`megatron-bupo train`: check everything, then start the ranks; or say what would start."""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from itertools import islice
from pathlib import Path

from megatron_bupo.auto_layer import choose, chosen_before, is_open
from megatron_bupo.checkpoints import whole_checkpoints
from megatron_bupo.config import Config, expand, load_config, to_yaml
from megatron_bupo.config.checks import check
from megatron_bupo.config.internal_layout_rules import internal_config
from megatron_bupo.config.layout import Layout, layers_of_stages, parallel_sizes
from megatron_bupo.config.schema import AUTO
from megatron_bupo.errors import RunStopped
from megatron_bupo.launch.local import (
    RankFailed,
    Terminated,
    is_first_rank,
    run_ranks,
    under_torchrun,
)
from megatron_bupo.launch.lock import hold
from megatron_bupo.preflight import (
    check_critic,
    check_data,
    check_files,
    check_model,
    preflight,
    prepare,
)

GROUPS_SHOWN = 4
AUTO_NOTE = "bupo.target_layer=auto: an analysis of {} responses chooses it before step 0"


def run(args: Namespace) -> None:
    """Train, or with `--dry-run` print the resolved config and the layout."""
    config = load_config(args.config, args.overrides)
    world_size = int(os.environ["WORLD_SIZE"]) if under_torchrun() else None
    layout = check(config, world_size)
    if args.dry_run:
        if is_open(config):
            config = chosen_before(config) or config
        print(dry_run(config, layout), end="")
        return
    prepare(config)
    if is_open(config):
        config = choose(config)
    ready = preflight(config, world_size)
    if config.debug.rollout_only:
        from megatron_bupo.rollout_only import rollout_only as train
    else:
        from megatron_bupo.train import train

    run_dir = Path(expand(config.run_dir))
    with hold(run_dir) if is_first_rank() else nullcontext():
        try:
            run_ranks(train, layout.world, ready)
        except (KeyboardInterrupt, Terminated, RankFailed, RunStopped) as error:
            error.add_note(way_on(run_dir))
            if sys.stdout.isatty():
                print()  # the cursor is still in the panel of a rank that is no more
            raise


def way_on(run_dir: Path) -> str:
    """What the same command would do after this one has been stopped."""
    whole = whole_checkpoints(run_dir)
    if whole:
        return f"stopped; the same command goes on at step {whole[-1][0]}"
    return "stopped before the first checkpoint; the same command starts anew"


def dry_run(config: Config, layout: Layout) -> str:
    """The resolved config and the layout; the whole is YAML again, the layout in comments.

    A run that prepares its own model and data is described before they exist.
    """
    notes = [AUTO_NOTE.format(config.bupo.auto_prompts)] if is_open(config) else []
    if config.prepare is None:
        layers = check_files(config).layers
        check_critic(config)
        notes += check_data(config)
    elif Path(expand(config.model.path)).is_dir():
        layers = check_model(config).layers
        check_critic(config)
    else:
        layers = None
        made = f"prepare={config.prepare} makes it"
        notes += [f"model.path={config.model.path} does not exist yet: {made}"]
    lines = [*notes, *describe(config, layout, layers)]
    return to_yaml(config) + "".join(f"# {line}\n" for line in lines)


def describe(config: Config, layout: Layout, layers: int | None) -> Iterator[str]:
    """Who holds what and what is trained when, a line each. `layers` None: not known yet."""
    yield from _layout(config, layout, layers, key="parallel")
    if config.bupo.internal_layout is not None:
        internal = internal_config(config)
        own = parallel_sizes(internal, layout.world)
        for layer in dict.fromkeys(layer for layer, _ in config.bupo.phases()):
            yield f"internal layer {layer} under a layout of its own, without the layers above:"
            yield from _layout(internal, own, layer, key="bupo.internal_layout")
    yield from _phases(config)


def _layout(config: Config, layout: Layout, layers: int | None, *, key: str) -> Iterator[str]:
    """The ranks of `layout`, whose sizes stand under `key`, and what of `layers` each holds."""
    cp = f"x {key}.cp {layout.cp} " if layout.cp > 1 else ""
    yield (
        f"{layout.world} ranks = {key}.tp {layout.tp} x {key}.pp {layout.pp} "
        f"{cp}x {key}.dp {layout.dp}"
    )
    if layers is not None:
        for stage, chunks in enumerate(layers_of_stages(layers, layout, config.megatron)):
            yield _stage(config, layout, stage, chunks)
    yield f"tensor-parallel groups: {_groups(layout.tensor_groups())}"
    if layout.cp > 1:
        yield f"context-parallel groups: {_groups(layout.context_groups())}"
    yield f"data-parallel groups: {_groups(layout.data_groups())}"
    if layout.ep > 1:
        yield f"expert-parallel groups: {_groups(layout.expert_groups())}"


def _stage(config: Config, layout: Layout, stage: int, chunks: Sequence[range]) -> str:
    parts = [
        *(["embedding"] if stage == 0 else []),
        _numbered("layer", *chunks),
        *(["unembedding"] if stage == layout.pp - 1 else []),
        *(
            f"target layer {layer}"
            for layer in sorted({layer for layer, _ in config.bupo.phases()})
            if any(layer in chunk for chunk in chunks)
        ),
    ]
    ranks = layout.stage_ranks(stage)
    return f"stage {stage}, {_numbered('rank', ranks)}: {', '.join(parts)}"


def _phases(config: Config) -> Iterator[str]:
    first = config.resting_steps
    if first:
        yield f"{_numbered('step', range(first))}: critic alone"
    read_out = ", read out through the final norm" if config.bupo.read_out_norm else ""
    read_out += ", under bupo.internal_layout" if config.bupo.internal_layout is not None else ""
    read_out += ", unless the guard ends it before" if config.bupo.guard.enabled else ""
    unknown = [(AUTO, config.bupo.internal_steps)] if is_open(config) else []
    for layer, steps in config.bupo.phases() or unknown:
        last = min(first + steps, config.steps) - 1
        if last >= first:
            yield f"{_numbered('step', range(first, last + 1))}: internal layer {layer}{read_out}"
        first += steps
    if first < config.steps:
        under = ", under parallel" if first and config.bupo.internal_layout is not None else ""
        yield f"{_numbered('step', range(first, config.steps))}: full policy{under}"


def _numbered(what: str, *spans: range) -> str:
    """E.g. `layer 3`, `layers 1-2 and 5-6`."""
    plural = "s" if sum(map(len, spans)) > 1 else ""
    shown = (f"{s[0]}-{s[-1]}" if len(s) > 1 else str(s[0]) for s in spans)
    return f"{what}{plural} {' and '.join(shown)}"


def _groups(groups: Sequence[Sequence[int]]) -> str:
    shown = " ".join(str(list(group)) for group in islice(groups, GROUPS_SHOWN))
    return shown if len(groups) <= GROUPS_SHOWN else f"{shown} ... ({len(groups)} groups)"
