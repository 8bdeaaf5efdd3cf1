"""The actor on a GPU against transformers on the CPU. Skipped where there is no CUDA device."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]

LAYERS, VOCAB = 4, 67
# bfloat16 has 8 bits of mantissa; log-probs of a few nats through 4 layers agree to about 0.1
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.2}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("layer", [None, 1, 3])
def test_log_probs_on_the_gpu_equal_the_dense_model(tiny_model_dir, tmp_path, dtype, layer):
    model_dir = tiny_model_dir(family="qwen3", layers=LAYERS, vocab=VOCAB)
    ids = torch.randint(0, VOCAB, (3, 24), generator=torch.Generator().manual_seed(0))
    rows, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    lines = [json.dumps({"input_ids": row, "prompt_length": 5}) for row in ids.tolist()]
    rows.write_text("\n".join(lines))
    policy = "full" if layer is None else f"layer={layer}"
    command = [sys.executable, "-m", "megatron_bupo", "score", "--model", str(model_dir)]
    command += ["--data", str(rows), "--policy", policy, "--out", str(out)]
    subprocess.run([*command, f"model.dtype={dtype}"], check=True, timeout=300)

    model = AutoModelForCausalLM.from_pretrained(model_dir)
    with torch.no_grad():
        states = model(ids, output_hidden_states=True)
        logits = states.logits if layer is None else model.lm_head(states.hidden_states[layer])
    expected = logits.log_softmax(-1)[:, 4:-1].gather(-1, ids[:, 5:, None]).squeeze(-1)
    scored = [json.loads(line)["logprobs"] for line in out.read_text().splitlines()]
    assert (torch.tensor(scored) - expected).abs().max() < TOLERANCE[dtype]
