"""The knobs of HICRA's credit to planning tokens, as a part of `schema.py`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class HicraConfig:
    """More weight on the tokens that plan; see algorithm/hicra.py. With `grams` every step logs
    what planning tokens are like (`hicra/...`), also those that give them no more weight.
    """

    grams: str | None = None  # file of strategic grams: YAML, or text with one a line
    # Which tokens count as planning. grams | placebo: as many per response, at random places |
    # entropy: those of the highest entropies of the full policy; needs no grams
    mask: str = "grams"
    # Of a step's response tokens: how many have a high entropy, to mask entropy and to the measures
    entropy_share: float = 0.3
    alpha: float = 0.2  # 0: no more weight, the grams are only watched
    form: str = "paper"  # paper: A + alpha |A| | amplify: A (1 + alpha), failures too
    from_step: int = 0  # first step with it, counted from 0
    # full: in the full-policy phase | internal: in the internal phases | both. Internal policies
    # are easily trained too hard, and nobody has published how they take to HICRA
    phases: str = "full"

    @property
    def enabled(self) -> bool:
        """Do any tokens count as planning?"""
        return self.grams is not None or self.mask == "entropy"

    def is_on(self, step: int, *, internal: bool) -> bool:
        """Is there more weight in `step`, which trains an internal policy or the full one?"""
        phase = "internal" if internal else "full"
        on = self.enabled and self.alpha > 0
        return on and step >= self.from_step and self.phases in {phase, "both"}
