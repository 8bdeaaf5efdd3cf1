"""A reward of your own: any function of a response and its reference answer.

    megatron-bupo train --config conf/demo.yaml run_dir=runs/shown_work \
        reward.function=examples/custom_reward.py:shown_work

`reward.function` names a function by file, as here, or by module (`my_package.rewards:shown_work`);
`reward.options.partly=0.2` gives it an argument. As a term beside others, the first of which says
what is right:

    reward:
      terms:
        - {function: examples/custom_reward.py:shown_work}
        - {function: overlong, weight: 0.5, options: {cache_tokens: 8}}

A parameter called `row`, `prompt`, `response_ids` or `finish_reason` is filled in as well. If the
function raises or hangs, that rollout gets 0 and the run a counted warning.
"""

from __future__ import annotations


def shown_work(response: str, answer: str, prompt: str, *, partly: float = 0.5) -> float:
    """1 for the right answer with each sum on the way to it, `partly` without them, 0 for a wrong
    one.

    On the demo's bed: `4+9+3+6=` -> `>13>16>22#22`.
    """
    trace, mark, given = response.rpartition("#")
    if not mark or given != answer:
        return 0.0
    numbers = [int(number) for number in prompt.rstrip("=").split("+")]
    sums = [sum(numbers[:count]) for count in range(2, len(numbers) + 1)]
    return 1.0 if trace == "".join(f">{total}" for total in sums) else partly
