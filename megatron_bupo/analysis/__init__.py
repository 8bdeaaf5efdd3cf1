"""Internal policies under the lens: what was read of every layer, over responses. No Megatron, no
ranks.
"""
