"""The models, each under the name of its architecture."""

from __future__ import annotations

from sglang.srt.models import llama, qwen2, qwen3, qwen3_moe

from .read_out import SwitchableReadOut


class LlamaForCausalLM(SwitchableReadOut, llama.LlamaForCausalLM):
    """Llama."""


class Qwen2ForCausalLM(SwitchableReadOut, qwen2.Qwen2ForCausalLM):
    """Qwen2 and Qwen2.5."""


class Qwen3ForCausalLM(SwitchableReadOut, qwen3.Qwen3ForCausalLM):
    """Qwen3."""


class Qwen3MoeForCausalLM(SwitchableReadOut, qwen3_moe.Qwen3MoeForCausalLM):
    """Qwen3 with experts."""


EntryClass = [LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM, Qwen3MoeForCausalLM]
