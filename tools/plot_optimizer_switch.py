"""How large are the first updates after a phase switch, for each `bupo.optimizer_at_switch`?

    python tools/plot_optimizer_switch.py --json switch.json --png examples/optimizer_at_switch.png

The demo's run with the paper's four updates a step: one internal phase, then the full policy from
the same checkpoint once for each choice, under the same seeds. Told of each update after the switch
is the root mean square of what it moved, in learning rates, of the layers that begin and of those
that trained before.

On paper: after T updates of others, moments of zero and a first gradient g give, for any g,

    common_step             (1 - b1) / (1 - b1^(T+1)) * sqrt((1 - b2^(T+1)) / (1 - b2))
    per_layer_step, reset   1             the same at T = 0
    warmup                  1 / bupo.switch_warmup_steps
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from megatron_bupo.bed.prepare import make_bed
from megatron_bupo.build import build
from megatron_bupo.config import Config, load_config
from megatron_bupo.launch.local import run_ranks
from megatron_bupo.preflight import preflight
from megatron_bupo.record.metrics import read_metrics
from megatron_bupo.run import Run
from megatron_bupo.train import train_step
from tools import options

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DEMO = Path(__file__).parents[1] / "conf" / "demo.yaml"
COLORS = {
    "per_layer_step": "#0b6e4f",
    "common_step": "#c8553d",
    "reset": "#1f4e9c",
    "warmup": "#8a6d1a",
}
CHOICES = tuple(COLORS)
PAPER_T = 120  # 30 internal steps of 4 updates, as with Qwen3-4B


def main(argv: Sequence[str] | None = None) -> None:
    """Run the choices from one checkpoint, and tell what came out."""
    args = parse(argv)
    make_bed(args.bed)
    with tempfile.TemporaryDirectory() as folder:
        begun = Path(folder, "internal")
        in_a_process(begin, config_of(CHOICES[0], begun, args))
        runs = {}
        for choice in CHOICES:
            run_dir = Path(folder, choice)
            shutil.copytree(begun, run_dir)
            config = config_of(choice, run_dir, args)
            in_a_process(go_on, config, run_dir / "sizes.json")
            sizes = json.loads((run_dir / "sizes.json").read_text())
            after = read_metrics(run_dir)[args.internal_steps :]
            runs[choice] = result(choice, config, sizes, after)
    Console().print(as_table(runs))
    if args.json:
        args.json.write_text(json.dumps(runs, indent=2) + "\n")
    if args.png:
        draw(runs, args.png)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = options.parser(__doc__, json="write the numbers here")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw them here")
    parser.add_argument(
        "--internal-steps", type=int, default=30, help="before the switch; default: %(default)s"
    )
    parser.add_argument("--steps", type=int, default=10, help="after it; default: %(default)s")
    options.add_bed(parser)
    options.add_overrides(parser)
    return parser.parse_intermixed_args(argv)


def config_of(choice: str, run_dir: Path, args: argparse.Namespace) -> Config:
    """The demo on one rank, with a checkpoint at the switch."""
    steps = args.internal_steps + args.steps
    schedule = (
        f"steps={steps}",
        f"evaluation.every={steps}",
        f"bupo.internal_steps={args.internal_steps}",
        f"bupo.optimizer_at_switch={choice}",
        "algorithm.minibatches=4",
    )
    paths = (f"model.path={args.bed}/model", f"data.train={args.bed}/train.jsonl", "prepare=null")
    own = (f"data.eval={args.bed}/eval.jsonl", f"run_dir={run_dir}")
    layout = ("parallel.pp=1", "trainer.microbatch_size=32")
    return load_config(str(DEMO), [*schedule, *paths, *own, *layout, *args.overrides])


def in_a_process(function: Callable[..., None], config: Config, *args: object) -> None:
    """`function(run, *args)` in a process of its own: the next must fork from a clean one."""
    ready = preflight(config, None)

    def work(ready: Any) -> None:
        torch.set_num_threads(1)
        with redirect_stdout(io.StringIO()), build(ready) as run:
            function(run, *args)

    process = multiprocessing.get_context("fork").Process(target=run_ranks, args=(work, 1, ready))
    process.start()
    process.join()
    if process.exitcode != 0:
        raise RuntimeError(f"the run with {config.bupo.optimizer_at_switch} failed")


def begin(run: Run) -> None:
    """The internal phase, and a checkpoint of its end."""
    for step in range(run.config.bupo.internal_steps):
        train_step(run, step, run.policy_for(step))
    run.save(run.config.bupo.internal_steps)


def go_on(run: Run, out: Path) -> None:
    """The full policy's steps; how far each of their updates moved what, in learning rates, to
    `out`.
    """
    trainer, lr = run.trainer, run.config.optimizer.lr
    trained = trainer.trained(run.schedule.policy_at(0))
    parameters: dict[str, list[torch.Tensor]] = {"begin": [], "trained": []}
    for parameter, unit in trainer.weights.unit_of.items():
        parameters["trained" if unit in trained else "begin"].append(parameter.detach())
    sizes: dict[str, list[float]] = {what: [] for what in parameters}
    update = trainer.update

    def watched(*args: Any, **kwargs: Any) -> Any:
        before = {what: [p.clone() for p in held] for what, held in parameters.items()}
        report = update(*args, **kwargs)
        for what, held in parameters.items():
            moved = [(p - b).flatten() for p, b in zip(held, before[what], strict=True)]
            sizes[what].append(float(torch.cat(moved).square().mean().sqrt()) / lr)
        return report

    trainer.update = watched  # type: ignore[method-assign]
    for step in range(run.first_step, run.config.steps):
        train_step(run, step, run.policy_for(step))
    out.write_text(json.dumps(sizes))


def first_update(choice: str, config: Config, updates_before: int) -> float:
    """The size, in learning rates, of the first update of a layer that begins: see above."""
    beta1, beta2 = config.optimizer.betas
    if choice == "common_step":
        return common_step_size(updates_before, 1, beta1, beta2)
    return 1 / config.bupo.switch_warmup_steps if choice == "warmup" else 1.0


def common_step_size(updates_before: int, k: int, beta1: float, beta2: float) -> float:
    """The `k`-th update of a layer that begins at common_step's age, were all gradients equal."""
    t = updates_before + k
    mean = (1 - beta1**k) / (1 - beta1**t)
    return mean * ((1 - beta2**t) / (1 - beta2**k)) ** 0.5


def result(
    choice: str, config: Config, sizes: dict[str, Any], after: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """All that is told of one choice."""
    before = config.bupo.internal_steps * config.algorithm.minibatches
    return {
        "updates_before": before,
        "begin_size": sizes["begin"],
        "trained_size": sizes["trained"],
        "predicted_first_size": first_update(choice, config, before),
        "kl_to_old_max_nats": max(r["update/kl_to_old_nats"] for r in after),
        "reward_mean": sum(r["rollout/reward_mean"] for r in after) / len(after),
        "entropy_full_nats": after[-1]["entropy/full_nats"],
        "accuracy": after[-1]["eval/accuracy_mean"],
    }


def as_table(runs: dict[str, dict[str, Any]]) -> Table:
    """A row per choice."""
    title = "updates after the switch, in learning rates"
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in (
        *("choice", "first", "on paper", "largest", "others'"),
        *("KL", "reward", "accuracy"),
    ):
        table.add_column(heading, justify="right")
    for choice, run in runs.items():
        sizes = run["begin_size"]
        numbers = (sizes[0], run["predicted_first_size"], max(sizes[:10]), run["trained_size"][0])
        table.add_row(
            choice,
            *(f"{number:.3f}" for number in numbers),
            f"{run['kl_to_old_max_nats']:.1e}",
            f"{run['reward_mean']:.3f}",
            f"{run['accuracy']:.3f}",
        )
    return table


def draw(runs: dict[str, dict[str, Any]], path: Path) -> None:
    """Layers that begin, layers that trained before, and common_step on paper."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4.6), layout="constrained", dpi=130)
    FigureCanvasAgg(figure)
    begin_axes, trained_axes, paper = figure.subplots(1, 3)
    before = next(iter(runs.values()))["updates_before"]
    for axes, what in ((begin_axes, "begin_size"), (trained_axes, "trained_size")):
        for choice, run in runs.items():
            sizes = run[what]
            axes.plot(range(1, len(sizes) + 1), sizes, color=COLORS[choice], label=choice)
        axes.set_xlabel("update after the switch")
        axes.set_ylabel("RMS update / learning rate")
    for choice, run in runs.items():
        begin_axes.plot(1, run["predicted_first_size"], "x", color=COLORS[choice], ms=9, mew=2)
    begin_axes.set_title("layers that begin to train at the switch\n(x: first update on paper)")
    trained_axes.set_title(f"layers that trained before it ({before} updates)")
    begin_axes.legend(frameon=False)
    draw_paper(paper)
    for axes in (begin_axes, trained_axes, paper):
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e6e8eb", linewidth=0.8)
        axes.set_axisbelow(True)
    figure.suptitle(finding(runs), fontsize=12, weight="bold")
    figure.savefig(path)


def draw_paper(axes: Axes) -> None:
    """The first and the largest of the first 30 updates at common_step's age, steady gradients."""
    ages = sorted({round(10 ** (x / 20)) for x in range(81)})
    for beta2, style in ((0.999, "-"), (0.95, "--")):
        steps = {age: [common_step_size(age, k, 0.9, beta2) for k in range(1, 31)] for age in ages}
        first = [sizes[0] for sizes in steps.values()]
        largest = [max(sizes) for sizes in steps.values()]
        axes.plot(ages, first, style, color="#c8553d", label=f"first update, beta2 {beta2}")
        axes.plot(ages, largest, style, color="#7d8590", label=f"largest of 30, beta2 {beta2}")
    axes.axhline(1, color="#0b6e4f", label="per_layer_step, reset")
    axes.axvline(PAPER_T, color="#b4bcc6", linestyle=":")
    axes.text(PAPER_T * 0.85, 3.0, "the paper's\n30 x 4 updates", ha="right", color="#7d8590")
    axes.set_xscale("log")
    axes.set_xlabel("updates before the switch")
    axes.set_ylabel("update / learning rate")
    axes.set_title("common_step on paper, gradients all equal")
    axes.legend(frameon=False, fontsize=9)


def finding(runs: dict[str, dict[str, Any]]) -> str:
    """What the figure shows, in one line."""

    def path(choice: str, what: str) -> float:
        return sum(runs[choice][what][:10])

    begin = path("common_step", "begin_size") / path("per_layer_step", "begin_size")
    trained = path("reset", "trained_size") / path("per_layer_step", "trained_size")
    return (
        f"Over ten updates common_step moves the layers that begin {begin:.1f} times as far as "
        f"counters of their own,\nreset the layers that trained before {trained:.1f} times; "
        "per_layer_step does neither"
    )


if __name__ == "__main__":
    main()
