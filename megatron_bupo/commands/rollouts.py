"""`megatron-bupo rollouts show`: what a run has dumped, in the terminal or on a page."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean

import yaml
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_bupo.algorithm.planning_tokens import StrategicGrams, planning_mask
from megatron_bupo.config import expand
from megatron_bupo.data.gram_files import read_grams
from megatron_bupo.data.token_texts import decoder_of, pieces, token_texts
from megatron_bupo.errors import InputError
from megatron_bupo.record.rollout_files import (
    FOLDER,
    RecordedRollout,
    find_steps,
    grouped,
    read_rollouts,
)
from megatron_bupo.record.rollout_page import ReadableRollout, rollout_page

Decode = Callable[[Sequence[int]], str]

PIPED_WIDTH = 1000  # columns, where no terminal limits them: nothing is cut off
MORE, LESS = (110, 160, 255), (255, 150, 100)  # behind tokens of advantages above and below 0


def run(args: Namespace) -> None:
    """Show the steps that `args.step` names."""
    directory = Path(expand(args.directory))
    files = chosen_steps(find_steps(directory), args.step)
    steps = {step: of_prompt(read_rollouts(path), args.prompt) for step, path in files.items()}
    if not any(steps.values()):
        named = ", ".join(map(str, steps))
        raise InputError(f"--prompt {args.prompt}", f"is not among the prompts of step {named}")
    grams = None
    if args.strategic_grams is not None:
        grams = StrategicGrams(read_grams(Path(expand(args.strategic_grams))))
    readable = partial(read_aloud, grams=grams)
    if args.html is not None:
        decode = tokenizer_of(directory, args.tokenizer)
        page = rollout_page(
            run_dir_of(directory).resolve().name,
            {step: [readable(r, decode) for r in rollouts] for step, rollouts in steps.items()},
        )
        write_page(Path(expand(args.html)), page)
        return
    console = Console(highlight=False, soft_wrap=False)
    if not console.is_terminal:
        console.width = PIPED_WIDTH
    narrowed = args.prompt is not None or args.worst or args.best
    decode = tokenizer_of(directory, args.tokenizer) if narrowed else None
    for step, rollouts in steps.items():
        if not rollouts:
            continue
        picked = pick(rollouts, worst=args.worst, best=args.best)
        console.print(heading(step, rollouts), style="bold")
        console.print(table(picked[: args.limit]))
        if decode is not None:
            for rollout in picked[: args.limit]:
                console.print(Text.assemble(*story(readable(rollout, decode))), soft_wrap=True)
        if len(picked) > args.limit:
            console.print(f"... and {len(picked) - args.limit} more: --limit {len(picked)}\n")
    if decode is None:
        console.print("For the texts add --worst 3, --best 3 or --prompt N; for a page --html FILE")


def run_dir_of(directory: Path) -> Path:
    """The run's directory, where `directory` may be its folder of rollouts."""
    return directory.parent if directory.name == FOLDER else directory


def chosen_steps(files: dict[int, Path], named: str) -> dict[int, Path]:
    """The files of the steps that `--step` names: last, all, or numbers with commas between."""
    if named == "all":
        return files
    if named == "last":
        return {max(files): files[max(files)]}
    try:
        steps = [int(word) for word in named.split(",")]
    except ValueError:
        reason = "names no steps"
        raise InputError(f"--step {named}", reason, "write last, all, or e.g. 0,12") from None
    for step in steps:
        if step not in files:
            there = f"{len(files)} steps are there, {min(files)} to {max(files)}"
            raise InputError(f"--step {step}", f"was not dumped; {there}")
    return {step: files[step] for step in steps}


def of_prompt(rollouts: Sequence[RecordedRollout], prompt: int | None) -> list[RecordedRollout]:
    """Those to the prompt in row `prompt` of the data; None: all."""
    return [r for r in rollouts if prompt is None or r.prompt.index == prompt]


def pick(
    rollouts: Sequence[RecordedRollout], *, worst: int | None, best: int | None
) -> list[RecordedRollout]:
    """As many as asked of the lowest or highest rewards, those first; else all, in order."""
    if best:
        return sorted(rollouts, key=lambda r: -r.grade.reward)[:best]
    return sorted(rollouts, key=lambda r: r.grade.reward)[:worst] if worst else list(rollouts)


def tokenizer_of(directory: Path, named: str | None) -> Decode:
    """What decodes the ids of the run in `directory`: special tokens too, for all are shown."""
    where = f"--tokenizer {named}"
    if named is None:
        file = run_dir_of(directory) / "config.yaml"
        where = str(file)
        try:
            model = yaml.safe_load(file.read_text(encoding="utf-8"))["model"]
            named = str(model["tokenizer"] or model["path"])
        except (OSError, KeyError, TypeError, yaml.YAMLError):
            reason = "does not say which tokenizer the run had"
            raise InputError(where, reason, "give --tokenizer DIR") from None
    try:
        return decoder_of(Path(expand(named)))
    except Exception as error:  # the tokenizers library raises bare Exceptions
        reason = f"{named} has no tokenizer.json that can be read ({error})"
        raise InputError(where, reason, "give --tokenizer DIR") from None


def read_aloud(
    rollout: RecordedRollout, decode: Decode, *, grams: StrategicGrams | None
) -> ReadableRollout:
    """`rollout` with its tokens as text, and which of them plan."""
    text, spans = token_texts(rollout.response_ids, decode)
    planning = None if grams is None else tuple(planning_mask(text, spans, grams))
    return ReadableRollout(rollout, pieces(text, spans), planning)


def write_page(path: Path, page: str) -> None:
    """Write `page` to `path`, and say so."""
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise InputError(f"--html {path}", str(error.strerror), "choose another file") from None
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, to be opened in a browser")


def heading(step: int, rollouts: Sequence[RecordedRollout]) -> str:
    """What there is of `step`, in one line."""
    policy = rollouts[0].policy
    trained = "nothing trained" if policy is None else f"policy trained: {policy}"
    rewards = fmean(r.grade.reward for r in rollouts)
    tokens = fmean(len(r.response_ids) for r in rollouts)
    return (
        f"step {step}  {trained}  {len(rollouts)} rollouts of {len(grouped(rollouts))} prompts  "
        f"reward {rewards:.3f}  response {tokens:.0f} tok"
    )


def table(rollouts: Sequence[RecordedRollout]) -> Table:
    """A row for each; columns that say nothing are left out."""
    columns: list[tuple[str, Callable[[RecordedRollout], str]]] = [
        ("prompt", lambda r: str(r.prompt.index)),
        ("no.", lambda r: str(r.response)),
        ("reward", lambda r: f"{r.grade.reward:.4g}"),
        ("advantage", lambda r: f"{fmean(r.advantages):+.3f}" if r.advantages else ""),
        ("tokens", lambda r: str(len(r.response_ids))),
        ("finish", lambda r: r.finish_reason),
        ("versions", lambda r: " ".join(str(v.version) for v in r.versions)),
        ("server", lambda r: (r.server or "").rpartition("/")[2]),
        ("tries", lambda r: str(r.attempts) if r.attempts > 1 else ""),
        ("warning", lambda r: r.grade.warning or ""),
    ]
    shown = Table(box=None, pad_edge=False, header_style="dim")
    kept = [(name, of) for name, of in columns if any(of(r) for r in rollouts)]
    for name, _ in kept:
        words = name in {"finish", "server", "warning"}
        narrows = name in {"server", "warning"}
        shown.add_column(
            name, justify="left" if words else "right", no_wrap=not narrows, overflow="fold"
        )
    for rollout in rollouts:
        shown.add_row(*(Text(of(rollout)) for _, of in kept))
    return shown


def story(readable: ReadableRollout) -> Iterator[tuple[str, str]]:
    """Prompt and response as text with styles: behind a token its advantage, under it a line if it
    plans.
    """
    rollout = readable.rollout
    place = f"prompt {rollout.prompt.index}, response {rollout.response}"
    yield f"\n{place}: reward {rollout.grade.reward:.4g}, answer {rollout.prompt.answer}\n", "bold"
    yield f"{rollout.prompt.text}\n", "dim"
    advantages = rollout.advantages or (0.0,) * len(readable.pieces)
    strongest = max(map(abs, advantages), default=0.0) or 1.0
    planning = readable.planning or (False,) * len(readable.pieces)
    for piece, advantage, plans in zip(readable.pieces, advantages, planning, strict=True):
        yield piece, _style(advantage / max(strongest, 1.0), plans=plans)
    yield "\n", ""


def _style(strength: float, *, plans: bool) -> str:
    """`strength` from -1 to 1."""
    line = "underline " if plans else ""
    if not strength:
        return line
    hue = MORE if strength > 0 else LESS
    red, green, blue = (round(245 + abs(strength) * (c - 245)) for c in hue)
    return f"{line}black on rgb({red},{green},{blue})"
