#!/usr/bin/env python3
"""Writes golden files: outputs, losses and gradients of tiny Hugging Face transformers models.

usage: scripts/golden/models.py [OUTPUT]        (default: trainer/tests/golden)

One safetensors file per model, with moerun's parameter names, so that the tests need no Python:
  weight/NAME, grad/NAME   every parameter and its gradient of the total loss
  after/NAME               the parameter after 3 steps of clip_grad_norm_(1.0) and AdamW, same batch
  input_ids, logits, loss, aux_loss, total_loss, grad_norm
  labels                   only in NAME-masked: -100 at some positions, and in all of sequence 1
trainer/tests/golden.rs repeats the shapes. Made with torch 2.11.0 and transformers 5.23.0.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import (
    GraniteMoeConfig,
    GraniteMoeForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
)

SHAPE = dict(
    vocab_size=96,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=64,
    output_router_logits=True,
    router_aux_loss_coef=0.01,
    tie_word_embeddings=False,
    use_cache=False,
)
MODELS = {
    "mixtral": (
        MixtralForCausalLM,
        MixtralConfig(
            **SHAPE,
            num_key_value_heads=2,
            intermediate_size=48,
            num_local_experts=4,
            num_experts_per_tok=2,
            rms_norm_eps=1e-5,
        ),
    ),
    "olmoe": (
        OlmoeForCausalLM,
        OlmoeConfig(
            **SHAPE,
            num_key_value_heads=4,
            intermediate_size=24,
            num_experts=8,
            num_experts_per_tok=3,
            norm_topk_prob=False,
            rms_norm_eps=1e-5,
            pad_token_id=0,
            eos_token_id=0,
        ),
    ),
    "granite": (
        GraniteMoeForCausalLM,
        GraniteMoeConfig(
            **{**SHAPE, "tie_word_embeddings": True},
            num_key_value_heads=2,
            intermediate_size=24,
            num_local_experts=6,
            num_experts_per_tok=2,
            rms_norm_eps=1e-5,
            embedding_multiplier=12.0,
            residual_multiplier=0.22,
            attention_multiplier=1 / 8,
            logits_scaling=2.0,
        ),
    ),
}
# Models that are also trained with labels of -100.
MASKED = ["mixtral"]
# Names in transformers -> names in moerun, within a layer. Stacked experts are split.
NAMES = {
    "input_layernorm.weight": "attention_norm",
    "post_attention_layernorm.weight": "feed_forward_norm",
    "self_attn.q_proj.weight": "attention.query",
    "self_attn.k_proj.weight": "attention.key",
    "self_attn.v_proj.weight": "attention.value",
    "self_attn.o_proj.weight": "attention.output",
    "self_attn.q_norm.weight": "attention.query_norm",
    "self_attn.k_norm.weight": "attention.key_norm",
    "mlp.gate.weight": "moe.gate",
    "block_sparse_moe.router.weight": "moe.gate",
}
STACKED = {
    "mlp.experts.gate_up_proj": "gate_up",
    "mlp.experts.down_proj": "down",
    "block_sparse_moe.experts.gate_up_proj": "gate_up",
    "block_sparse_moe.experts.down_proj": "down",
}
TOP = {
    "model.embed_tokens.weight": "embedding",
    "model.norm.weight": "norm",
    "lm_head.weight": "head",
}


def ours(name, tensor):
    """Returns moerun's (name, tensor) pairs for a parameter of transformers."""
    if name in TOP:
        return [(TOP[name], tensor)]
    _, _, layer, rest = name.split(".", 3)
    if rest in STACKED:
        return [
            (f"layers.{layer}.moe.experts.{e}.{STACKED[rest]}", part)
            for e, part in enumerate(tensor)
        ]
    return [(f"layers.{layer}.{NAMES[rest]}", tensor)]


def golden(model_class, config, masked):
    torch.manual_seed(0)
    config._attn_implementation = "eager"
    model = model_class(config).float()
    # Norms start as ones, which would hide a missing weight.
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        else:
            torch.nn.init.normal_(parameter, std=0.1)
    ids = torch.randint(0, config.vocab_size, (3, 16))
    out = {"input_ids": ids}
    labels = ids
    if masked:
        labels = ids.masked_fill(torch.rand(ids.shape) < 0.4, -100)
        labels[1] = -100
        out["labels"] = labels
    put = lambda kind, name, tensor: out.update(
        {f"{kind}/{n}": t.detach().clone().contiguous() for n, t in ours(name, tensor)}
    )
    for name, parameter in model.named_parameters():
        put("weight", name, parameter)
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
            {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
        ],
        lr=1e-2,
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    for step in range(3):
        optimizer.zero_grad()
        result = model(input_ids=ids, labels=labels)
        result.loss.backward()
        if step == 0:
            for name, parameter in model.named_parameters():
                put("grad", name, parameter.grad)
            out["logits"] = result.logits.detach().clone()
            out["aux_loss"] = result.aux_loss.detach().reshape(1)
            out["total_loss"] = result.loss.detach().reshape(1)
            out["loss"] = (
                (result.loss - config.router_aux_loss_coef * result.aux_loss).detach().reshape(1)
            )
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if step == 0:
            out["grad_norm"] = norm.reshape(1)
        optimizer.step()
    for name, parameter in model.named_parameters():
        put("after", name, parameter)
    return out


target = Path(
    sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[2] / "trainer/tests/golden"
)
target.mkdir(parents=True, exist_ok=True)
cases = [(name, *MODELS[name], False) for name in MODELS]
cases += [(f"{name}-masked", *MODELS[name], True) for name in MASKED]
for name, model_class, config, masked in cases:
    tensors = golden(model_class, config, masked)
    save_file(tensors, target / f"{name}.safetensors")
    print(
        f"{name}: {len(tensors)} tensors, loss {tensors['loss'].item():.6f}, "
        f"aux {tensors['aux_loss'].item():.6f}, "
        f"grad norm {tensors['grad_norm'].item():.6f}"
    )
