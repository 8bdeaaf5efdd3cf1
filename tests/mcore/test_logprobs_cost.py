"""What log-probs cost: one chunk of logits at a time, nothing that the loss leaves out, and no
unembedding gradient beside Megatron's buffer, in which it must be right all the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from megatron_bupo.algorithm.bupo import FULL
from megatron_bupo.mcore import logprobs as module
from megatron_bupo.mcore.logprobs import chunked_logprobs
from tests.dense import dense_logprobs, dense_model, dense_update
from tests.mcore.actors import (
    another_trainer,
    full_gradients,
    random_batch,
    run_config,
    start_trainer,
    with_stale_logprobs,
)
from tests.mcore.test_logprobs import HIDDEN, dense_answers, random_problem, whole_vocabulary
from tests.ranks import run_ranks

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from megatron_bupo.types import TokenBatch


class Operations(TorchDispatchMode):
    """The operations while the mode is on, and the most bytes alive at once of what they made."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.peak = 0
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {
            leaf.untyped_storage()._cdata
            for leaf in tree_iter((args, kwargs))
            if isinstance(leaf, Tensor) and leaf.layout is torch.strided
        }
        out = func(*args, **(kwargs or {}))
        self.names.append(str(func))
        self._made = {k: made for k, made in self._made.items() if not made[0].expired()}
        for leaf in tree_iter(out):
            if isinstance(leaf, Tensor) and leaf.layout is torch.strided:
                storage = leaf.untyped_storage()
                if storage._cdata not in given:
                    self._made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, sum(size for _, size in self._made.values()))
        return out


def _with_buffer(weight: Tensor) -> Any:
    """A parameter with a gradient buffer, as Megatron's DDP has it."""
    parameter: Any = torch.nn.Parameter(weight.clone())
    parameter.main_grad = torch.zeros_like(weight, dtype=torch.float32)
    return parameter


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("entropy", [False, True])
def test_no_more_than_a_chunk_of_logits_lives_at_a_time(
    entropy: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    """In both passes, with all that they need beside it."""
    rows, vocab, chunk = 60, 2000, 10
    hidden, weight, targets, *_ = random_problem(rows, vocab, dtype)
    monkeypatch.setattr(module, "_PIECE", vocab)  # as small beside a chunk as it is at full size

    def passes(compute: Any) -> int:
        states, unembedding = hidden.clone().requires_grad_(), _with_buffer(weight)
        with Operations() as seen:
            logprobs, entropies = compute(states, unembedding, targets)
            (logprobs.sum() + (entropies.sum() if entropy else 0.0)).backward()
        return seen.peak

    logits = 4 * vocab * chunk
    assert passes(lambda h, w, y: dense_answers(h, w, y, 1.0)) > 2 * logits * rows / chunk
    peak = passes(
        lambda h, w, y: chunked_logprobs(
            h, w, y, shard=whole_vocabulary(vocab), chunk_tokens=chunk, with_entropy=entropy
        )
    )
    assert logits < peak < 1.5 * logits


def _backward_operations(
    *, entropy: bool = False, pulled: bool = False, frozen: bool = False
) -> list[str]:
    """Of a loss of log-probs, and of entropies if they are `pulled` too, in 3 chunks."""
    hidden, weight, targets, pull, _ = random_problem(7, 5)
    unembedding = _with_buffer(weight).requires_grad_(not frozen)
    logprobs, entropies = chunked_logprobs(
        hidden.requires_grad_(),
        unembedding,
        targets,
        shard=whole_vocabulary(5),
        chunk_tokens=3,
        with_entropy=entropy,
    )
    loss = (logprobs + entropies if pulled else logprobs) @ pull
    with Operations() as seen:
        loss.backward()
    assert unembedding.main_grad.any() == (not frozen)
    return [name for name in seen.names if not name.startswith("aten.add.")]  # the loss's own


def test_what_the_loss_or_a_frozen_weight_leaves_out_is_not_computed():
    learning, frozen = _backward_operations(), _backward_operations(frozen=True)
    assert _backward_operations(entropy=True) == learning
    assert len(_backward_operations(entropy=True, pulled=True)) > len(learning) + 3
    products = [names.count("aten.addmm_.default") for names in (learning, frozen)]
    assert products == [3 * 3, 2 * 3]  # logits again, hidden states, and the weight


def test_gradients_of_a_bfloat16_weight_add_up_in_fp32_over_chunks_and_microbatches():
    """As products of bfloat16 numbers whose sum is rounded nowhere; in bfloat16, as autograd would
    have it, every micro-batch is.
    """
    _, weight, *_ = random_problem(1, 40, torch.bfloat16)
    parameter, plain = _with_buffer(weight), torch.zeros(40, HIDDEN, dtype=torch.bfloat16)
    exact = torch.zeros(40, HIDDEN, dtype=torch.float64)
    for _ in range(16):
        hidden, _, targets, pull, _ = random_problem(16, 40, torch.bfloat16)
        logprobs, _ = chunked_logprobs(
            hidden, parameter, targets, shard=whole_vocabulary(40), chunk_tokens=3
        )
        (logprobs @ pull).backward()
        p = torch.softmax(hidden.float() @ weight.float().t(), dim=1)
        of_logits = pull[:, None] * (torch.nn.functional.one_hot(targets, 40) - p)
        of_logits = of_logits.bfloat16().double()
        exact += of_logits.t() @ hidden.double()
        plain += (of_logits.t() @ hidden.double()).bfloat16()

    def error(gradient: Tensor) -> float:
        return float((gradient.double() - exact).norm() / exact.norm())

    assert error(parameter.main_grad) < 3e-4  # a rounding of `of_logits` may go the other way
    assert error(plain) > 1e-3
    assert parameter.grad._nnz() == 0  # what Megatron's hook adds to that


def test_a_buffer_in_bfloat16_is_left_to_megatron():
    hidden, weight, targets, pull, _ = random_problem(7, 5, torch.bfloat16)
    parameter = _with_buffer(weight)
    parameter.main_grad = parameter.main_grad.bfloat16()
    for unembedding in (parameter, weight.requires_grad_()):
        logprobs, _ = chunked_logprobs(hidden, unembedding, targets, shard=whole_vocabulary(5))
        (logprobs @ pull).backward()
    assert not parameter.main_grad.any()
    assert weight.grad is not None
    torch.testing.assert_close(parameter.grad, weight.grad, atol=0, rtol=0)


def _ends_of_the_model(
    model_dir: Path, batch: TokenBatch, layout: dict[str, Any], megatron: dict[str, Any]
) -> list[dict[str, Tensor]]:
    """Embedding and unembedding gradients of an update in fp32, and of one in bfloat16."""
    start, found = start_trainer, []
    for dtype in ("float32", "bfloat16"):
        config = run_config(model={"dtype": dtype}, parallel=layout, megatron=megatron)
        trainer = start(model_dir, config)
        trainer.update(batch, FULL, lr=0.0)
        found.append(_ends(full_gradients(trainer)))
        start = another_trainer
    return found


def _ends(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: g for name, g in gradients.items() if "embed_tokens" in name or "lm_head" in name}


OVERLAPPED = {"overlap_grad_reduce": True}


@pytest.mark.parametrize(
    ("tied", "layout", "megatron"),
    [
        (True, {"tp": 2}, {}),
        (False, {"tp": 2}, {}),
        (True, {"dp": 2}, OVERLAPPED),
        (False, {"dp": 2}, OVERLAPPED),
    ],
    ids=str,
)
def test_embedding_and_unembedding_each_give_their_gradient_once(
    tied: bool,
    layout: dict[str, Any],
    megatron: dict[str, Any],
    tiny_model_dir: Callable[..., Path],
):
    """Into one buffer where they are tied. What bfloat16 costs is held to transformers' own in
    `test_parity`; here it must be too little to hide that one of the two is lost or comes twice.
    """
    model_dir = tiny_model_dir(family="qwen3", vocab=67, scale=0.12, tied=tied)
    model, batch = dense_model(model_dir), random_batch()
    batch = with_stale_logprobs(batch, dense_logprobs(model, batch, FULL)[0].detach())
    exact = _ends(dense_update(model, batch, FULL).grads)
    assert len(exact) == (1 if tied else 2)
    for ours, rounded in run_ranks(2, _ends_of_the_model, model_dir, batch, layout, megatron):
        for name, gradient in exact.items():
            torch.testing.assert_close(ours[name], gradient, atol=1e-6, rtol=0)
            assert (rounded[name] - gradient).norm() < 0.1 * gradient.norm()
