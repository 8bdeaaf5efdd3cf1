"""How is the model doing while it trains? Always the same texts, and answers to the same prompts.

Every `probe.every` steps, before the step trains: the model that trains reads texts that stay the
same (mcore/probe_readings.py), and the engine, which has the same weights, answers their prompts
with the same noise. Neither leaves a trace in the run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from megatron_bupo import collective, stopping
from megatron_bupo.algorithm.bupo import FULL
from megatron_bupo.algorithm.repetition import repeated_fraction
from megatron_bupo.commands.score import GivenResponse
from megatron_bupo.config import expand
from megatron_bupo.config.probe_rules import max_response_tokens, watched_layer
from megatron_bupo.config.schema import Config
from megatron_bupo.data.packing import in_rounds
from megatron_bupo.durable import replace_text
from megatron_bupo.engines import noise_seed
from megatron_bupo.errors import InputError
from megatron_bupo.generate import Answers, lines_of, not_graded
from megatron_bupo.hf.architecture import DecoderSizes
from megatron_bupo.mcore.probe_readings import ProbeReader, ProbeReadings
from megatron_bupo.mcore.row_reader import tokens_at_once
from megatron_bupo.mcore.trainer import MegatronTrainer
from megatron_bupo.probe_texts import (
    FOLDER,
    SAMPLED,
    ProbeTexts,
    given_texts,
    sampled_texts,
)
from megatron_bupo.rollout.engine import RolloutEngine
from megatron_bupo.score import as_batch
from megatron_bupo.types import Prompt, RolloutGroup, Sampling, TokenBatch

NOISE = 3  # a stream of noise of its own, beside those of `engines` and of HICRA's placebo


class Probe:
    """What a run looks at. Every rank calls every method with equal arguments."""

    def __init__(
        self,
        config: Config,
        architecture: DecoderSizes,
        *,
        prompts: Sequence[Prompt],
        engine: RolloutEngine | None,
        say: Callable[[str], None],
    ) -> None:
        """`prompts` are asked where `probe.responses` names no texts, and their first answers
        become those; `engine` None: nobody answers.
        """
        self.config, self.architecture, self.engine = config, architecture, engine
        self.layer = watched_layer(config)
        self.run_dir = Path(expand(config.run_dir))
        self._say, self._prompts = say, prompts
        self._texts = given_texts(config, architecture)
        self._told = False

    def is_due(self, step: int) -> bool:
        """Does a probe come before `step`?"""
        return step % self.config.probe.every == 0

    def look(self, trainer: MegatronTrainer, step: int) -> dict[str, float]:
        """What there is to see before `step`. Collective."""
        if self._texts is None and step:  # the first probe of a run that goes on
            self._texts = sampled_texts(self.run_dir, self.architecture)
        answers = self._answers(self._prompts if self._texts is None else self._texts.prompts)
        if self._texts is None:
            self._texts = self._keep(answers, step)
        seen = self._read(trainer, self._texts.responses)
        return seen | (answer_measures(answers) if answers else {})

    def _answers(self, prompts: Sequence[Prompt]) -> list[RolloutGroup]:
        if self.engine is None:
            return []
        rollout = self.config.rollout
        sampling = Sampling(
            responses_per_prompt=1,
            max_response_tokens=max_response_tokens(self.config),
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            seed=noise_seed(self.config.seed, NOISE),
        )
        with stopping.allowed():
            answers = self.engine.generate(prompts, sampling)
            stopping.vote()
        return answers

    def _keep(self, answers: Sequence[RolloutGroup], step: int) -> ProbeTexts:
        """The `answers` as texts from now on."""
        if step:
            self._say(
                f"the run began without probes: their texts are what the model answers after {step}"
                " steps"
            )
        given = [(g.prompt.input_ids, g.rollouts[0].response_ids) for g in answers]
        if not any(response for _, response in given):
            where = f"model.path={self.config.model.path}"
            reason = f"the model answered nothing to the {len(given)} prompts of the probe"
            raise InputError(where, reason, "give texts as probe.responses")
        if collective.is_first():
            path = self.run_dir / FOLDER / SAMPLED
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = lines_of(Answers(FULL, answers, not_graded(answers)))
            replace_text(path, "".join(f"{line}\n" for line in lines))
        responses = (GivenResponse(p + r, len(p)) for p, r in given if r)
        return ProbeTexts(tuple(responses), tuple(self._prompts))

    def _read(
        self, trainer: MegatronTrainer, responses: Sequence[GivenResponse]
    ) -> dict[str, float]:
        whole = trainer.arch.layers == self.architecture.layers
        if not whole and not self._told:
            self._told = True
            self._say(
                "bupo.internal_layout's actor has no layers above the internal policy's: probes "
                "leave out what needs them until the full policy trains"
            )
        if self.layer is None:
            return full_measures(*_scores(trainer, responses)) if whole else {}
        if self.layer > trainer.arch.layers:
            return {}
        trainer.gather_parameters()
        reader = ProbeReader(trainer, self.layer)
        parts = [reader.read(batch) for batch in _batches(trainer, responses)]
        return layer_measures(self.layer, parts, whole=whole)


def _batches(trainer: MegatronTrainer, responses: Sequence[GivenResponse]) -> Iterator[TokenBatch]:
    lengths = [len(response.input_ids) for response in responses]
    for some in in_rounds(lengths, tokens_at_once(trainer.config)):
        yield as_batch(responses[some])


def _scores(trainer: MegatronTrainer, responses: Sequence[GivenResponse]) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies of the full policy at all response tokens, nats."""
    batches = list(_batches(trainer, responses))
    found = [trainer.logprobs(batch, FULL) for batch in batches]
    logprobs, entropies = (
        torch.cat([of[i][b.response_mask] for of, b in zip(found, batches, strict=True)])
        for i in (0, 1)
    )
    return logprobs, entropies


def full_measures(logprobs: Tensor, entropies: Tensor) -> dict[str, float]:
    """Of the full policy at response tokens, nats."""
    return {
        "probe/perplexity": float((-logprobs.double().mean()).exp()),
        "probe/full_entropy_nats": _mean(entropies),
    }


def layer_measures(layer: int, parts: Sequence[ProbeReadings], *, whole: bool) -> dict[str, float]:
    """Of internal layer `layer`, and (`whole`) of the full policy and the layers between, at the
    response tokens of all `parts`.
    """
    r = {name: torch.cat([vars(p)[name] for p in parts], dim=-1) for name in vars(parts[0])}
    seen = {
        "probe/layer": float(layer),
        "probe/internal_entropy_nats": _mean(r["entropy"]),
        "probe/layer_entropy_change_nats": _mean(r["entropy"] - r["entropy_before"]),
    }
    if not whole:
        return seen
    seen |= full_measures(r["full_logprob"], r["full_entropy"])
    seen["probe/kl_internal_to_full_nats"] = _mean(r["kl_to_full"])
    seen["probe/kl_full_to_internal_nats"] = _mean(r["kl_from_full"])
    for i, (cosine, kl) in enumerate(zip(r["cosine"], r["kl_to_later"], strict=True)):
        seen[f"probe/cosine_to_layer_{layer + 1 + i:02}"] = _mean(cosine)
        seen[f"probe/kl_to_layer_{layer + 1 + i:02}_nats"] = _mean(kl)
    return seen


def answer_measures(answers: Sequence[RolloutGroup]) -> dict[str, float]:
    """Of fresh answers, one to a prompt."""
    rollouts = [group.rollouts[0] for group in answers]
    return {
        "probe/response_tokens_mean": fmean(len(r.response_ids) for r in rollouts),
        "probe/truncated_fraction": fmean(r.finish_reason != "stop" for r in rollouts),
        "probe/repetition_fraction": fmean(repeated_fraction(r.response_ids) for r in rollouts),
    }


def _mean(values: Tensor) -> float:
    return float(values.double().mean())
