from __future__ import annotations

import json
import math
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_bupo.bed import chain_sums
from megatron_bupo.errors import InputError
from megatron_bupo.rollout.embedded import EmbeddedEngine
from megatron_bupo.types import Prompt, RolloutGroup, Sampling
from tests.ranks import run_ranks
from tests.tiny_models import LLAMA3_ROPE

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

END = chain_sums.TOKEN_IDS["$"]
SAMPLING = Sampling(responses_per_prompt=6, max_response_tokens=20, temperature=1.0, seed=11)
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {"family": "qwen2", "tied": True},
    "qwen3": {"family": "qwen3"},
    "qwen3_moe": {"family": "qwen3_moe"},
    "llama": {"family": "llama", "rope": LLAMA3_ROPE, "bias": True},
    "sliding window": {"family": "qwen2", "use_sliding_window": True, "sliding_window": 5}
    | {"max_window_layers": 2},
}


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory = tmp_path_factory.mktemp("tokenizer")
    chain_sums.save_tokenizer(directory)
    return AutoTokenizer.from_pretrained(directory)


@pytest.fixture
def engine(tiny_model_dir: Callable[..., Path], tokenizer: Any) -> EmbeddedEngine:
    return EmbeddedEngine(tiny_model_dir(vocab=16), tokenizer, batch_size=64)


def prompts_of(*texts: str) -> list[Prompt]:
    return [Prompt(i, tuple(chain_sums.encode(text)), "", text) for i, text in enumerate(texts)]


PROMPTS = prompts_of("1+2=", "7", "9+9+9+9+9=", "3+4=", "8+8+8=>1")


def responses(groups: Sequence[RolloutGroup]) -> list[tuple[int, ...]]:
    return [rollout.response_ids for group in groups for rollout in group.rollouts]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_and_entropies_equal_a_forward_pass_without_cache(
    tiny_model_dir: Callable[..., Path], tokenizer: Any, family: str, temperature: float
) -> None:
    model_dir = tiny_model_dir(vocab=16, **FAMILIES[family])
    engine = EmbeddedEngine(model_dir, tokenizer, batch_size=17)
    reference = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    sampling = Sampling(
        responses_per_prompt=6, max_response_tokens=20, temperature=temperature, seed=1
    )
    for group in engine.generate(PROMPTS, sampling):
        for rollout in group.rollouts:
            ids = torch.tensor([[*group.prompt.input_ids, *rollout.response_ids]])
            with torch.no_grad():
                logits = reference(ids, use_cache=False).logits[0, :-1].double() / temperature
            dense = logits.log_softmax(-1)[len(group.prompt.input_ids) - 1 :]
            picked = dense[range(len(rollout.response_ids)), list(rollout.response_ids)]
            entropy = -(dense.exp() * dense).sum(-1)
            assert (torch.tensor(rollout.rollout_logprobs) - picked).abs().max() < 1e-5
            assert (torch.tensor(rollout.entropies) - entropy).abs().max() < 1e-5


def test_responses_do_not_depend_on_the_batch(engine: EmbeddedEngine) -> None:
    together = responses(engine.generate(PROMPTS, SAMPLING))
    for batch_size in (1, 7):
        engine.batch_size = batch_size
        assert responses(engine.generate(PROMPTS, SAMPLING)) == together
    alone = [responses(engine.generate([prompt], SAMPLING)) for prompt in PROMPTS]
    assert [ids for group in alone for ids in group] == together


@pytest.mark.parametrize("world", [2, 4])
def test_responses_do_not_depend_on_the_number_of_ranks(engine: EmbeddedEngine, world: int) -> None:
    expected = engine.generate(PROMPTS, SAMPLING)
    for groups in run_ranks(world, engine.generate, PROMPTS, SAMPLING):
        assert [group.prompt for group in groups] == PROMPTS
        assert responses(groups) == responses(expected)


def test_more_ranks_than_responses_leave_some_idle(engine: EmbeddedEngine) -> None:
    one = Sampling(responses_per_prompt=1, max_response_tokens=5, temperature=1.0, seed=0)
    expected = responses(engine.generate(PROMPTS[:1], one))
    assert [responses(g) for g in run_ranks(3, engine.generate, PROMPTS[:1], one)] == [expected] * 3


def test_groups_stand_in_the_order_of_the_prompts_and_repeats_draw_the_same(
    engine: EmbeddedEngine,
) -> None:
    short, _, long, *_ = PROMPTS
    groups = engine.generate([long, short, long], SAMPLING)
    assert [group.prompt for group in groups] == [long, short, long]
    assert responses(groups[:1]) == responses(groups[2:]) != responses(groups[1:2])


def test_the_seed_decides_what_is_drawn(engine: EmbeddedEngine) -> None:
    other = Sampling(responses_per_prompt=6, max_response_tokens=20, temperature=1.0, seed=12)
    first = responses(engine.generate(PROMPTS, SAMPLING))
    assert responses(engine.generate(PROMPTS, SAMPLING)) == first
    assert responses(engine.generate(PROMPTS, other)) != first


def test_first_tokens_are_as_frequent_as_the_model_says(engine: EmbeddedEngine) -> None:
    draws, vocab = 4000, 16
    sampling = Sampling(responses_per_prompt=draws, max_response_tokens=1, temperature=2.0, seed=0)
    [group] = engine.generate(PROMPTS[:1], sampling)
    counts = torch.tensor([r.response_ids[0] for r in group.rollouts]).bincount(minlength=vocab)
    with torch.no_grad():
        logits = engine.model(torch.tensor([PROMPTS[0].input_ids])).logits[0, -1]
    expected = draws * (logits / 2).softmax(-1)
    chi_square = ((counts - expected) ** 2 / expected).sum()
    false_alarm = torch.special.gammaincc(torch.tensor((vocab - 1) / 2), chi_square / 2)
    assert false_alarm > 1e-6


def test_top_p_draws_from_the_nucleus_and_reports_the_whole_distribution(
    engine: EmbeddedEngine,
) -> None:
    narrow = Sampling(
        responses_per_prompt=200, max_response_tokens=1, temperature=1.0, seed=0, top_p=0.5
    )
    [group] = engine.generate(PROMPTS[:1], narrow)
    with torch.no_grad():
        logprobs = engine.model(torch.tensor([PROMPTS[0].input_ids])).logits[0, -1].log_softmax(-1)
    ordered, tokens = logprobs.exp().sort(descending=True)
    nucleus = tokens[: int((ordered.cumsum(0) < 0.5).sum()) + 1].tolist()
    assert {rollout.response_ids[0] for rollout in group.rollouts} == set(nucleus)
    for rollout in group.rollouts:
        assert math.isclose(
            rollout.rollout_logprobs[0], logprobs[rollout.response_ids[0]].item(), abs_tol=1e-5
        )


def test_a_response_stops_at_the_end_token_or_runs_to_the_limit(engine: EmbeddedEngine) -> None:
    groups = engine.generate(PROMPTS, SAMPLING)
    reasons = set()
    for rollout in (rollout for group in groups for rollout in group.rollouts):
        *body, last = rollout.response_ids
        reasons.add(rollout.finish_reason)
        assert END not in body
        if rollout.finish_reason == "stop":
            assert last == END
        else:
            assert last != END
            assert len(rollout.response_ids) == SAMPLING.max_response_tokens
        assert rollout.text == "".join(
            chain_sums.CHARACTERS[token] for token in rollout.response_ids if token < END
        )
    assert reasons == {"stop", "length"}


def test_every_end_token_of_the_generation_config_stops(
    tiny_model_dir: Callable[..., Path], tokenizer: Any, tmp_path: Path
) -> None:
    model_dir = shutil.copytree(tiny_model_dir(vocab=16), tmp_path / "model")
    (model_dir / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 5]}))
    engine = EmbeddedEngine(model_dir, tokenizer, batch_size=64)
    groups = engine.generate(PROMPTS, SAMPLING)
    stops = {r.response_ids[-1] for g in groups for r in g.rollouts if r.finish_reason == "stop"}
    assert stops == {3, 5, END}
    assert not any({3, 5, END} & {*ids[:-1]} for ids in responses(groups))


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_loaded_weights_are_what_is_sampled_from_and_carry_their_version(
    tiny_model_dir: Callable[..., Path], tokenizer: Any, family: str
) -> None:
    engine = EmbeddedEngine(tiny_model_dir(vocab=16, family=family), tokenizer, batch_size=64)
    before = engine.generate(PROMPTS, SAMPLING)
    other_dir = tiny_model_dir(vocab=16, family=family, seed=5)
    weights = load_file(other_dir / "model.safetensors")
    engine.load_weights(weights.items(), version=7)
    after = engine.generate(PROMPTS, SAMPLING)
    fresh = EmbeddedEngine(other_dir, tokenizer, batch_size=64).generate(PROMPTS, SAMPLING)
    assert responses(after) == responses(fresh) != responses(before)
    assert {r.policy_version for g in before for r in g.rollouts} == {0}
    assert {r.policy_version for g in after for r in g.rollouts} == {7}


def test_what_is_not_in_the_stream_stays_as_it_is(engine: EmbeddedEngine) -> None:
    name = "model.layers.2.mlp.down_proj.weight"
    before = {key: value.clone() for key, value in engine.model.state_dict().items()}
    engine.load_weights([(name, before[name] + 1)], version=1)
    changed = [
        key for key, value in engine.model.state_dict().items() if (value != before[key]).any()
    ]
    assert changed == [name]


def test_tied_weights_are_known_by_either_name(
    tiny_model_dir: Callable[..., Path], tokenizer: Any
) -> None:
    engine = EmbeddedEngine(tiny_model_dir(vocab=16, tied=True), tokenizer, batch_size=8)
    for value, name in enumerate(("lm_head.weight", "model.embed_tokens.weight")):
        engine.load_weights([(name, torch.full((16, 32), float(value)))], version=1)
        assert (engine.model.get_input_embeddings().weight == value).all()
        assert (engine.model.get_output_embeddings().weight == value).all()


def test_unknown_or_misshapen_weights_are_refused(engine: EmbeddedEngine) -> None:
    with pytest.raises(KeyError, match=r"model\.layers\.9\.mlp\.up_proj\.weight"):
        engine.load_weights([("model.layers.9.mlp.up_proj.weight", torch.zeros(1))], version=1)
    with pytest.raises(ValueError, match=r"model\.norm\.weight is \[1\], the model's \[32\]"):
        engine.load_weights([("model.norm.weight", torch.zeros(1))], version=1)
    assert engine.version == 0


@pytest.mark.parametrize(
    ("input_ids", "message"),
    [
        ((), "a prompt of 0 tokens"),
        ((1,) * 237, "a prompt of 237 tokens"),
        ((1, 16), "token id 16"),
        ((-1, 1), "token id -1"),
    ],
)
def test_a_prompt_that_the_model_cannot_read_is_refused_by_its_row(
    engine: EmbeddedEngine, input_ids: tuple[int, ...], message: str
) -> None:
    with pytest.raises(InputError, match=f"data row 42: {message}"):
        engine.generate([*PROMPTS, Prompt(42, input_ids, "", "")], SAMPLING)


def test_a_prompt_may_fill_the_context(engine: EmbeddedEngine) -> None:
    full = Prompt(0, (1,) * 236, "", "")
    [group] = engine.generate([full], SAMPLING)
    assert len(group.rollouts) == SAMPLING.responses_per_prompt
