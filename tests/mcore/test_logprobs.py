"""Chunked, sharded log-probs against torch's log_softmax over the whole vocabulary at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from megatron_bupo.mcore import logprobs as module
from megatron_bupo.mcore.logprobs import VocabShard, chunked_logprobs
from tests.ranks import run_ranks

HIDDEN = 12


def random_problem(rows: int, vocab: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Hidden states, unembedding, targets, and what flows back into log-probs and entropies."""
    hidden, weight = torch.randn(rows, HIDDEN), 0.5 * torch.randn(vocab, HIDDEN)
    targets = torch.randint(0, vocab, (rows,))
    targets[:2] = torch.tensor([0, vocab - 1])[:rows]
    pulls = torch.randn(2, rows)
    return hidden.to(dtype), weight.to(dtype), targets, *pulls


def dense_answers(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> Any:
    log_p = torch.log_softmax((hidden @ weight.t()).float() / temperature, dim=-1)
    return log_p.gather(1, targets[:, None]).squeeze(1), -(log_p.exp() * log_p).sum(1)


def _backward(problem: tuple[Tensor, ...], compute: Any) -> list[Tensor]:
    """Log-probs, entropies, and the gradients of hidden and weight where both flow back."""
    hidden, weight, targets, pull, entropy_pull = problem
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    logprobs, entropies = compute(hidden, weight, targets)
    (logprobs @ pull + entropies @ entropy_pull).backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return [logprobs.detach(), entropies.detach(), hidden.grad, weight.grad]


def whole_vocabulary(vocab: int) -> VocabShard:
    return VocabShard(first=0, valid=vocab, group=None)


@pytest.mark.parametrize("chunk", [1, 3, 7, 1024])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(("rows", "vocab"), [(1, 2), (7, 5), (10, 33)])
def test_values_and_gradients_equal_log_softmax(
    rows: int, vocab: int, temperature: float, chunk: int
):
    problem = random_problem(rows, vocab)

    def chunked(hidden: Tensor, weight: Tensor, targets: Tensor) -> Any:
        return chunked_logprobs(
            hidden,
            weight,
            targets,
            shard=whole_vocabulary(vocab),
            temperature=temperature,
            chunk_tokens=chunk,
            with_entropy=True,
        )

    expected = _backward(problem, lambda h, w, y: dense_answers(h, w, y, temperature))
    for ours, dense in zip(_backward(problem, chunked), expected, strict=True):
        torch.testing.assert_close(ours, dense, atol=3e-6, rtol=0)


def test_without_entropy_the_logprobs_are_the_same_and_entropies_zero():
    hidden, weight, targets, *_ = random_problem(7, 5)
    hidden.requires_grad_()
    logprobs, entropies = chunked_logprobs(
        hidden, weight, targets, shard=whole_vocabulary(5), chunk_tokens=3
    )
    torch.testing.assert_close(logprobs, dense_answers(hidden, weight, targets, 1.0)[0])
    assert not entropies.any()
    assert not entropies.requires_grad


def test_logits_of_hundreds_of_nats_neither_overflow_nor_vanish():
    hidden, weight, targets, *pulls = random_problem(6, 9)
    problem = (hidden * 300, weight, targets, *pulls)
    ours = _backward(
        problem,
        lambda h, w, y: chunked_logprobs(
            h, w, y, shard=whole_vocabulary(9), chunk_tokens=4, with_entropy=True
        ),
    )
    dense = _backward(problem, lambda h, w, y: dense_answers(h, w, y, 1.0))
    assert dense[0].min() < -300
    torch.testing.assert_close(ours[0], dense[0], atol=0, rtol=1e-5)
    torch.testing.assert_close(ours[1], dense[1], atol=1e-3, rtol=1e-5)
    assert all(grad.isfinite().all() for grad in ours[2:])


def test_no_rows_give_no_values_and_gradients_of_zero():
    hidden = torch.randn(0, HIDDEN, requires_grad=True)
    weight = torch.randn(5, HIDDEN, requires_grad=True)
    logprobs, entropies = chunked_logprobs(
        hidden, weight, torch.empty(0, dtype=torch.long), shard=whole_vocabulary(5)
    )
    assert logprobs.shape == entropies.shape == (0,)
    logprobs.sum().backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    assert not weight.grad.any()


def _sharded(problem: tuple[Tensor, ...], vocab: int, temperature: float) -> list[Tensor]:
    """On each rank: its shard of a vocabulary padded to a multiple of the ranks."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    columns = -(-vocab // ranks)
    first = rank * columns
    shard = VocabShard(first, max(0, min(columns, vocab - first)), dist.group.WORLD)
    padding = torch.full((columns * ranks - vocab, HIDDEN), 7.0)  # must not be looked at
    hidden, weight, *rest = problem
    mine = torch.cat((weight, padding))[first : first + columns]

    def chunked(hidden: Tensor, weight: Tensor, targets: Tensor) -> Any:
        return chunked_logprobs(
            hidden,
            weight,
            targets,
            shard=shard,
            temperature=temperature,
            chunk_tokens=3,
            with_entropy=True,
        )

    logprobs, entropies, grad_hidden, grad_weight = _backward((hidden, mine, *rest), chunked)
    dist.all_reduce(grad_hidden)  # what the backward of copy_to_tensor_model_parallel_region does
    return [logprobs, entropies, grad_hidden, grad_weight]


@pytest.mark.parametrize(("ranks", "vocab"), [(2, 10), (2, 11), (3, 10), (3, 4)], ids=str)
def test_a_sharded_padded_vocabulary_equals_the_whole_one(ranks: int, vocab: int):
    """At 3 ranks and 4 ids the last rank holds nothing but padding."""
    problem = random_problem(7, vocab)
    expected = _backward(problem, lambda h, w, y: dense_answers(h, w, y, 0.8))
    answers = run_ranks(ranks, _sharded, problem, vocab, 0.8)
    for answer in answers:
        for ours, dense in zip(answer[:3], expected[:3], strict=True):
            torch.testing.assert_close(ours, dense, atol=3e-6, rtol=0)
    grad_weight = torch.cat([answer[3] for answer in answers])
    torch.testing.assert_close(grad_weight[:vocab], expected[3], atol=3e-6, rtol=0)
    assert not grad_weight[vocab:].any()


def test_bfloat16_is_as_close_to_fp32_as_bfloat16_logits_are():
    """The unembedding multiplies in bfloat16; everything after it is fp32."""
    problem = random_problem(20, 40, torch.bfloat16)
    exact = tuple(x.float() if x.is_floating_point() else x for x in problem)
    expected = _backward(exact, lambda h, w, y: dense_answers(h, w, y, 1.0))
    plain = _backward(problem, lambda h, w, y: dense_answers(h, w, y, 1.0))
    ours = _backward(
        problem,
        lambda h, w, y: chunked_logprobs(
            h, w, y, shard=whole_vocabulary(40), chunk_tokens=6, with_entropy=True
        ),
    )
    assert [x.dtype for x in ours] == [torch.float32] * 2 + [torch.bfloat16] * 2
    for mine, theirs, reference in zip(ours, plain, expected, strict=True):
        error = (mine.float() - reference).abs().mean()
        assert 0 < error <= 1.5 * (theirs.float() - reference).abs().mean()


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation gives while the mode is on."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_iter(out) if isinstance(leaf, Tensor)]
        self.numel = max([self.numel, *sizes])
        return out


def test_the_logits_of_all_rows_never_exist():
    rows, vocab, chunk = 60, 50, 4
    problem = random_problem(rows, vocab)
    with LargestTensor() as dense:
        _backward(problem, lambda h, w, y: dense_answers(h, w, y, 1.0))
    assert dense.numel == rows * vocab  # the mode sees the forward and the backward pass
    with LargestTensor() as chunked:
        _backward(
            problem,
            lambda h, w, y: chunked_logprobs(
                h, w, y, shard=whole_vocabulary(vocab), chunk_tokens=chunk, with_entropy=True
            ),
        )
    assert chunked.numel == max(rows, vocab) * HIDDEN  # the inputs themselves
    assert chunked.numel < rows * vocab / 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_copied_beside_the_logits_may_be_copied_in_pieces(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    """Rows one by one for entropies, the vocabulary in slabs of 5 columns for bfloat16."""
    problem = random_problem(7, 33, dtype)

    def answers() -> list[Tensor]:
        return _backward(
            problem,
            lambda h, w, y: chunked_logprobs(
                h, w, y, shard=whole_vocabulary(33), chunk_tokens=4, with_entropy=True
            ),
        )

    at_once = answers()
    monkeypatch.setattr(module, "_PIECE", 64)
    for piecewise, expected in zip(answers(), at_once, strict=True):
        torch.testing.assert_close(piecewise, expected)
