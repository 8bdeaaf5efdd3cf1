"""A strict stand-in for SGLang 0.5.23's server: real answers of a tiny model, and its hard rules.

It exists so that a client's mistake fails a test without SGLang installed. Where the real server
answers 400, this one does, in the same words; where the real one dies, this one dies; what it does
not know it refuses. Its arithmetic is its own (model.py), so that it is a second opinion.

Where it differs from the real one, on purpose: `/health` answers within a tenth of a second, not
after one; one process; no streaming, stop strings, grammars, penalties, LoRA (501); and one who
generates while memory is released kills it, as on a GPU (on CPU the real one releases nothing).
"""

from __future__ import annotations

from sglang.faults import FAULTS

__version__ = FAULTS.version
