"""`megatron-bupo convert`: what is to be converted, looked at before anything is written."""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from megatron_bupo.commands import verify
from megatron_bupo.config import Config, expand, load_config
from megatron_bupo.config.checks import check, check_against_model
from megatron_bupo.config.layout import Layout, layers_of_stages
from megatron_bupo.convert_source import find_base, find_source, read_its_architecture
from megatron_bupo.errors import InputError
from megatron_bupo.hf.architecture import Architecture, read_architecture, read_json_object
from megatron_bupo.hf.tensors import (
    check_tensors,
    check_tied,
    expected_tensors,
    read_index,
)
from megatron_bupo.hf.writer import DTYPES
from megatron_bupo.resumable import check_free, existing_ancestor

LAYOUT = ("parallel.", "megatron.")
DTYPE_KEYS = ("torch_dtype", "dtype")
CASTS = ("float32", "bfloat16", "float16")


def run(args: Namespace) -> None:
    """Do `args.conversion`."""
    convert = {
        "hf-to-megatron": _hf_to_megatron,
        "megatron-to-hf": _megatron_to_hf,
        "verify": verify.run,
    }[args.conversion]
    try:
        convert(args)
    except OSError as error:  # e.g. a name that is too long, or a file that may not be read
        reason = f"cannot be read or written ({error.strerror or error})"
        raise InputError(str(error.filename or args.conversion), reason) from error


def _hf_to_megatron(args: Namespace) -> None:
    arch = read_architecture(args.hf)
    config, layout = read_layout(args.overrides, arch)
    index = read_index(args.hf)
    check_tensors(arch, index)
    check_tied(arch, index)
    stored = {name: index.tensors[name].dtype for name in expected_tensors(arch)}
    files = {name: index.tensors[name].file for name in stored}
    dtype = args.dtype or dtype_of_hf(index.model_dir / "config.json", stored, files)
    out = checked_out(args, index.model_dir)
    from megatron_bupo.convert import ToMegatron, to_megatron

    to_megatron(
        ToMegatron(
            arch=arch,
            index=index,
            out=out,
            layout=layout,
            stages=stages_of_layers(arch, layout, config),
            dtype=next(name for name, meant in DTYPES.items() if meant == dtype),
            named_dtype=args.dtype,
            overwrite=args.overwrite,
        )
    )


def _megatron_to_hf(args: Namespace) -> None:
    source = find_source(args.megatron, args.like)
    arch = read_its_architecture(source)
    from megatron_bupo.mcore.torch_dist_reader import TorchDist
    from megatron_bupo.mcore.torch_dist_units import absent_units, check_padding, locate

    checkpoint = TorchDist(source.path)
    sources = locate(checkpoint, arch)
    absent = absent_units(sources, arch)
    base = find_base(source, arch, arch.layers - len(absent)) if absent else None
    dtypes = {key: str(checkpoint.dtype(key)).removeprefix("torch.") for key in checkpoint.keys}
    for key, dtype in dtypes.items():
        if dtype not in DTYPES.values():
            reason = f"is stored in {dtype}, which cannot be trained"
            way_out = "use a checkpoint in float32 or bfloat16"
            raise InputError(f"{source.path}: {key}", reason, way_out)
    way_out = f"cast all of them with --dtype {'|'.join(CASTS)}"
    dtype = args.dtype or one_dtype(dtypes, dict.fromkeys(dtypes, source.path), way_out)
    out = checked_out(args, source.path)
    check_padding(checkpoint, sources, arch)
    from megatron_bupo.convert import ToHF, to_hf

    raw = read_json_object(source.like / "config.json")
    says = source.run is not None or any(raw.get(key) for key in DTYPE_KEYS)
    to_hf(
        ToHF(
            arch=arch,
            checkpoint=checkpoint,
            sources=sources,
            like=source.like,
            base=base,
            out=out,
            dtype=next(name for name, meant in DTYPES.items() if meant == dtype),
            named_dtype=dtype if args.dtype or says else None,
            shard_bytes=args.shard_bytes,
            overwrite=args.overwrite,
        )
    )


def read_layout(overrides: Sequence[str], arch: Architecture) -> tuple[Config, Layout]:
    """The settings of a layout, and the layout, which `arch` fits. Ranks that share experts are
    data-parallel, and as many of them as that needs are taken.
    """
    for override in overrides:
        if not override.startswith(LAYOUT):
            reason = "says nothing of how the checkpoint is cut"
            way_out = "give parallel.*, and megatron.* where stages differ in size"
            raise InputError(f"{override} (command line)", reason, way_out)
    config = load_config(None, ["model.path=none", *overrides])
    parallel = config.parallel
    if min(parallel.tp, parallel.cp, parallel.ep, parallel.etp or 1) >= 1 and parallel.dp is None:
        ranks = parallel.tp * parallel.cp
        dp = math.lcm(ranks, parallel.ep * (parallel.etp or parallel.tp)) // ranks
        parallel = replace(parallel, dp=dp)
    # How activations are cut says nothing of the weights, but some layouts are refused without.
    config = replace(config, parallel=replace(parallel, sp=parallel.sp or parallel.tp > 1))
    layout = check(config, None, training=False)
    check_against_model(config, arch, training=False)
    if config.megatron:
        from megatron_bupo.mcore.native import check_native

        check_native(config.megatron)
    return config, layout


def stages_of_layers(arch: Architecture, layout: Layout, config: Config) -> dict[int, int]:
    """Layer, counted from 1 -> its pipeline stage."""
    stages = layers_of_stages(arch.layers, layout, config.megatron)
    held = [(layer, i) for i, chunks in enumerate(stages) for chunk in chunks for layer in chunk]
    return dict(sorted(held))


def dtype_of_hf(config: Path, stored: Mapping[str, str], files: Mapping[str, Path]) -> str:
    """The one dtype in which all tensors are stored, which is what config.json says.

    Args:
        config: config.json.
        stored: HF name -> dtype, as safetensors names it.
        files: HF name -> where it is.
    """
    raw = read_json_object(config)
    named = {key: raw[key] for key in DTYPE_KEYS if raw.get(key) is not None}
    way_out = f"cast all of them with --dtype {'|'.join(CASTS)}"
    for key, value in named.items():
        meant = str(value).removeprefix("torch.")
        for name, dtype in stored.items():
            if DTYPES[dtype] != meant:
                reason = f"is stored in {DTYPES[dtype]}, but config.json says {key}={value}"
                raise InputError(f"{files[name]}: {name}", reason, f"{way_out}, or correct it")
    return one_dtype({name: DTYPES[dtype] for name, dtype in stored.items()}, files, way_out)


def one_dtype(stored: Mapping[str, str], files: Mapping[str, Path], way_out: str) -> str:
    """The dtype that all of `stored`, name -> dtype, have."""
    first = next(iter(stored))
    for name, dtype in stored.items():
        if dtype != stored[first]:
            reason = f"is stored in {dtype}, but {first} in {stored[first]}"
            raise InputError(f"{files[name]}: {name}", reason, way_out)
    return stored[first]


def checked_out(args: Namespace, source: Path) -> Path:
    """`--out`, which can be made and is apart from `source`."""
    out, where = Path(expand(args.out)), f"--out {args.out}"
    if not out.name or out.name == "..":
        raise InputError(where, "has no name", "give the directory to make")
    if not existing_ancestor(out).is_dir():
        raise InputError(where, f"{existing_ancestor(out)} is not a directory", "choose another")
    ours, theirs = out.resolve(), source.resolve()
    if ours.is_relative_to(theirs) or theirs.is_relative_to(ours):
        raise InputError(where, f"and {source} are one inside the other", "choose another one")
    check_free(out, overwrite=args.overwrite)
    return out
