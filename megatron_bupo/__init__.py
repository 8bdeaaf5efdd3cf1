"""Bottom-up Policy Optimization on Megatron-Core and SGLang (arXiv 2512.19673)."""

__version__ = "0.1.0"
