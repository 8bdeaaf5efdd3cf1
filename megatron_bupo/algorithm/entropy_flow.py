"""Where does a model explore, integrate and converge? The entropies of its internal policies.

Every layer l adds twice to the residual stream (arXiv 2512.19673, Eq 4; LN: its own norms)::

    h_{l-1} -> h_{l-1} + A^l -> h_{l-1} + A^l + F^l = h_l
    A^l = attention(LN(h_{l-1}))        F^l = FFN(LN(h_{l-1} + A^l))

and each of these vectors is a policy once it is read out through the unembedding E (Eq 5 and 6)::

    internal layer policy  softmax(E h_l)        full policy  softmax(E norm(h_L))
    attention policy       softmax(E A^l)        FFN policy   softmax(E F^l)

With H(x) the entropy of softmax(E x) (Eq 7), a module changes entropy by what it puts out against
what it took in, which is *normed* (Eq 8, 11-13; h_0 is the embedding)::

    dH_layer = H(h_l) - H(h_{l-1})
    dH_attn  = H(A^l) - H(LN(h_{l-1}))
    dH_ffn   = H(F^l) - H(LN(h_{l-1} + A^l))

Appendix B.5 asks where modules point: cos(A^l, h_{l-1}) and cos(F^l, h_{l-1} + A^l); 0: something
new, below 0: against the stream, above 0: along with it.

That is the raw read-out. The normed one puts the final norm between a vector and E: the last
layer's is the full policy then, and without it is not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class PolicyReadings:
    """An internal layer policy pi_l of every layer beside the full policy pi, at response tokens:
    fp32 `[layers, tokens]`, of the distributions that the tokens were drawn from.
    """

    entropy: Tensor  # nats
    kl_to_full: Tensor  # KL(pi_l || pi), nats
    kl_from_full: Tensor  # KL(pi || pi_l), nats
    top1_agreement: Tensor  # 1 where pi's most probable token is pi_l's too, else 0


@dataclass(frozen=True, kw_only=True)
class Readings:
    """All that is read at response tokens, fp32; entropies are in nats."""

    embedding_entropy: Tensor  # [tokens], H(h_0)
    full_entropy: Tensor  # [tokens]
    full_logprob: Tensor  # [tokens], nats, of the response tokens under the full policy
    # all [layers, tokens]:
    layer: PolicyReadings
    attention_entropy: Tensor  # H(A^l)
    attention_input_entropy: Tensor  # H(LN(h_{l-1}))
    ffn_entropy: Tensor  # H(F^l)
    ffn_input_entropy: Tensor  # H(LN(h_{l-1} + A^l))
    attention_cosine: Tensor  # cos(A^l, h_{l-1})
    ffn_cosine: Tensor  # cos(F^l, h_{l-1} + A^l)
    # The layer policies through the final norm; None: `layer` is that already
    normed_layer: PolicyReadings | None

    def of_layers(self) -> dict[str, Tensor]:
        """What there is to say of each layer, `[layers, tokens]` by its name with its unit."""
        before = torch.cat((self.embedding_entropy.unsqueeze(0), self.layer.entropy[:-1]))
        return {
            **_named("", self.layer),
            "attention_entropy_nats": self.attention_entropy,
            "attention_input_entropy_nats": self.attention_input_entropy,
            "ffn_entropy_nats": self.ffn_entropy,
            "ffn_input_entropy_nats": self.ffn_input_entropy,
            "layer_entropy_change_nats": self.layer.entropy - before,
            "attention_entropy_change_nats": self.attention_entropy - self.attention_input_entropy,
            "ffn_entropy_change_nats": self.ffn_entropy - self.ffn_input_entropy,
            "attention_cosine": self.attention_cosine,
            "ffn_cosine": self.ffn_cosine,
            **(_named("normed_", self.normed_layer) if self.normed_layer is not None else {}),
        }

    def of_model(self) -> dict[str, Tensor]:
        """What there is to say of the whole model, `[tokens]` by its name with its unit."""
        return {
            "embedding_entropy_nats": self.embedding_entropy,
            "full_entropy_nats": self.full_entropy,
            "full_logprob_nats": self.full_logprob,
        }


def _named(prefix: str, policy: PolicyReadings) -> dict[str, Tensor]:
    return {
        f"{prefix}entropy_nats": policy.entropy,
        f"{prefix}kl_to_full_nats": policy.kl_to_full,
        f"{prefix}kl_from_full_nats": policy.kl_from_full,
        f"{prefix}top1_agreement": policy.top1_agreement,
    }
