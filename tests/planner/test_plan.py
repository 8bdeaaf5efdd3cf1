"""The planner's counts against published sizes and dumber counting, and what `plan` answers."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path

import pytest

from megatron_bupo.cli import main
from megatron_bupo.config.layout import Layout, layers_of_stages
from megatron_bupo.hf.architecture import Architecture, read_architecture
from megatron_bupo.hf.tensors import expected_tensors
from megatron_bupo.planner.activations import in_flight
from megatron_bupo.planner.counts import Stage, all_parameters, stage_parameters
from megatron_bupo.planner.hardware import TABLE
from megatron_bupo.planner.known_models import MODELS, sizes_of

ROOT = Path(__file__).parents[2]
PUBLISHED = {  # parameters, as the models' cards and safetensors headers have them
    "Qwen3-4B": 4_022_468_096,
    "Qwen3-8B": 8_190_735_360,
    "Qwen3-14B": 14_768_307_200,
    "Qwen3-32B": 32_762_123_264,
    "Qwen3-30B-A3B": 30_532_122_624,
    "Qwen2.5-72B": 72_706_203_648,
    "Llama-3.1-8B": 8_030_261_248,
    "Llama-3.3-70B": 70_553_706_496,
    "OctoThinker-3B": 3_212_749_824,
    "OctoThinker-8B": 8_030_261_248,
}


def stages_of(arch: Architecture, layout: Layout) -> list[Stage]:
    dealt = layers_of_stages(arch.layers, layout, {})
    return [Stage(i, tuple(c), i == 0, i == len(dealt) - 1) for i, c in enumerate(dealt)]


@pytest.mark.parametrize("model", sorted(MODELS.iterdir()), ids=lambda path: path.name)
def test_parameters_are_those_of_the_tensors_of_a_checkpoint(model: Path):
    arch = read_architecture(model)
    assert all_parameters(arch) == sum(map(prod, expected_tensors(arch).values()))
    assert all_parameters(arch) == PUBLISHED.get(model.name, all_parameters(arch))


@pytest.mark.parametrize("name", ["models/Qwen3-8B-Base", "x/Meta-Llama-3.1-8B-Instruct"])
def test_a_name_tells_the_model_and_says_so(name: str):
    arch, source = sizes_of(name, "model.path")
    known = "Qwen3-8B" if "Qwen" in name else "Llama-3.1-8B"
    assert all_parameters(arch) == PUBLISHED[known]
    assert f"those of {known}" in source


@pytest.mark.parametrize("model", ["Qwen3-4B", "Llama-3.3-70B", "Qwen3-30B-A3B"])
def test_ranks_hold_the_whole_model_together(model: str):
    arch = read_architecture(MODELS / model)
    ep = 4 if arch.experts else 1
    layout = Layout(tp=4, pp=2, vpp=2, dp=4, world=32, ep=ep, etp=1 if arch.experts else None)
    held = [stage_parameters(arch, stage, layout) for stage in stages_of(arch, layout)]
    norms = arch.layers * (2 * arch.hidden_size + 2 * arch.head_dim * arch.qk_norm)
    routers = arch.layers * arch.experts.number * arch.hidden_size if arch.experts else 0
    copied = norms + routers + arch.hidden_size  # on every tensor-parallel rank
    experts = sum(h.experts for h in held) * ep
    tied = arch.vocab_size * arch.hidden_size * arch.tied  # again on the last stage
    together = 4 * (sum(h.dense for h in held) - copied) + copied + experts - tied
    assert together == all_parameters(arch)


@pytest.mark.parametrize(("pp", "vpp", "count"), [(4, 1, 8), (4, 1, 2), (2, 1, 5), (4, 2, 8)])
def test_a_stage_holds_what_1f1b_has_begun(pp: int, vpp: int, count: int):
    layout = Layout(pp, pp, vpp, 1, pp)
    for number in range(pp):
        stage = Stage(number, (), number == 0, number == pp - 1)
        # Megatron's warm-up passes, then forward and backward in turn: begun chunks of the model
        warm_up = pp - number - 1 if vpp == 1 else 2 * (pp - number - 1) + (vpp - 1) * pp
        begun = most = min(warm_up, count * vpp)
        for _ in range(count * vpp - begun):
            begun += 1
            most = max(most, begun)
            begun -= 1
        assert in_flight(stage, layout, count) * vpp == most


def test_a_recipe_that_cannot_fit_is_refused_with_a_change_that_makes_it_fit(
    capsys: pytest.CaptureFixture[str],
):
    recipe = str(ROOT / "conf" / "bupo_qwen3_8b.yaml")
    too_much = "sglang.mem_fraction_static=0.8"
    assert main(["plan", recipe, too_much, "--propose", "0"]) == 2
    said = capsys.readouterr().err
    assert "does not fit" in said
    change = said.strip().rpartition("; set ")[2]
    assert change.startswith("sglang.mem_fraction_static=0.")
    assert main(["plan", recipe, too_much, change, "--propose", "0"]) == 0


@pytest.mark.parametrize(
    ("sizes", "change"),
    [
        ("{tp: 2, pp: 2, dp: 8}", "parallel.pp=8 parallel.dp=2"),  # of three settings: dp follows
        (
            "{tp: 1, pp: 1, dp: 32, sp: false}",
            "trainer.max_tokens_per_microbatch=5120 parallel.pp=16 parallel.dp=2",
        ),
    ],
)
def test_a_layout_that_does_not_fit_is_told_one_of_as_many_gpus(
    sizes: str, change: str, capsys: pytest.CaptureFixture[str]
):
    command = ["plan", str(ROOT / "conf" / "bupo_llama3_3_70b.yaml"), "--propose", "0"]
    assert main([*command, f"parallel={sizes}"]) == 2
    assert capsys.readouterr().err.strip().rpartition("; set ")[2] == change
    assert main([*command, f"parallel={sizes}", *change.split()]) == 0


def test_a_model_too_large_for_any_setting_is_told_how_many_gpus_would_do(
    capsys: pytest.CaptureFixture[str],
):
    recipe = str(ROOT / "conf" / "bupo_llama3_3_70b.yaml")
    few = ["parallel={tp: 4, pp: 1, dp: 1}", "bupo.internal_steps=0", "bupo.internal_layout=null"]
    assert main(["plan", recipe, *few, "servers.count=1", "--propose", "0"]) == 2
    assert "GPUs and set parallel." in capsys.readouterr().err


def test_json_has_all_that_the_tables_show(capsys: pytest.CaptureFixture[str]):
    assert main(["plan", str(ROOT / "conf" / "bupo_qwen3_4b.yaml"), "--json", "-"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["fits"]
    assert [phase["name"] for phase in plan["phases"]] == ["internal layer 6", "full policy"]
    internal, full = plan["phases"]
    assert internal["time"]["train_s"] < full["time"]["train_s"] / 3
    [stage] = full["stages"]
    assert stage["weights"] == 2 * stage["parameters"]
    assert plan["peak_bytes"] < plan["memory_bytes"]
    times = [proposal["step_s"] for proposal in plan["proposals"]]
    assert times == sorted(times)


@pytest.mark.parametrize(
    ("was", "now", "said"),
    [
        ("matmul: 0.85", "matmul: 60", "efficiency.matmul=60"),
        ("matmul: 0.80", "matmul: 1.2", "H100.matmul=1.2: must be a share of 1"),
        ("gpus: 8", "gpus: none", "node.gpus=none"),
        ("  link: 0.7", "  links: 0.7", "link, links"),
        ("gpus:\n", "gpu:\n", "knows no GPU"),
    ],
)
def test_a_table_of_hardware_that_is_wrong_is_refused(
    was: str, now: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    table = tmp_path / "hardware.yaml"
    assert was in TABLE.read_text()
    table.write_text(TABLE.read_text().replace(was, now, 1))
    recipe = str(ROOT / "conf" / "bupo_qwen3_4b.yaml")
    assert main(["plan", recipe, "--hardware", str(table)]) == 2
    assert said in capsys.readouterr().err
