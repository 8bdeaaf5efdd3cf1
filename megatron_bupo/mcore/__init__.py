"""Tokens -> log-probs -> optimizer steps, on Megatron-Core. The only package that imports
`megatron`.
"""

import warnings

# Said on every import, by every rank; `RMSNorm` and `CausalAttention` in spec.py take the missing
# parts. The last three: by Megatron-Core to itself, of calls it makes.
for _message in (
    "Transformer Engine and Apex",
    "Apex is not installed",
    "full scope is deprecated",
    "`load_state_dict` is deprecated",
    "Please use DTensor",
    "`torch.distributed.",
):
    warnings.filterwarnings("ignore", message=_message)
