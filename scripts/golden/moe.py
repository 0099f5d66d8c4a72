#!/usr/bin/env python3
"""Writes golden files of single MoE layers of Hugging Face transformers.

usage: scripts/golden/moe.py [OUTPUT]        (default: trainer/tests/golden/moe)

One safetensors file per family, with moerun's parameter names:
  weight/NAME, grad/NAME   every parameter and its gradient of sum(output * probe)
  bias                     the bias that selects experts and is not trained, if there is one
  input, probe, output     [B, S, D]
  grad_input               the gradient of the input
  experts                  the chosen experts of each token, in ascending order
bf16-router has the router of deepseek_v3 alone, in bf16:
  weight, input, probe, logits, routing_weights, experts, grad_weight, grad_input
trainer/src/model/moe_block/golden.rs repeats the shapes. Made with torch 2.11.0 and transformers
5.23.0.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import (
    DeepseekV2Config,
    DeepseekV3Config,
    GptOssConfig,
    Mistral4Config,
    Qwen2MoeConfig,
)
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP
from transformers.models.mistral4.modeling_mistral4 import Mistral4MoE
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

HIDDEN = 24
FFN = 12
# The smallest distance between two scores of a token, over the larger one.
TIE = 1e-6

DEEPSEEK = dict(
    num_attention_heads=4,
    hidden_size=HIDDEN,
    moe_intermediate_size=FFN,
    n_routed_experts=12,
    num_experts_per_tok=3,
    n_group=4,
    topk_group=2,
    routed_scaling_factor=2.5,
)
LAYERS = {
    "qwen2": (
        Qwen2MoeSparseMoeBlock,
        Qwen2MoeConfig(
            hidden_size=HIDDEN,
            moe_intermediate_size=FFN,
            shared_expert_intermediate_size=20,
            num_experts=6,
            num_experts_per_tok=2,
            num_attention_heads=4,
            norm_topk_prob=False,
        ),
    ),
    "deepseek_v2": (
        DeepseekV2Moe,
        DeepseekV2Config(**DEEPSEEK, n_shared_experts=2, topk_method="group_limited_greedy"),
    ),
    "deepseek_v3": (DeepseekV3MoE, DeepseekV3Config(**DEEPSEEK, n_shared_experts=1)),
    "mistral4": (Mistral4MoE, Mistral4Config(**DEEPSEEK, n_shared_experts=1)),
    "gpt_oss": (
        GptOssMLP,
        # The widths are equal, so that a missing transposition shows in the values alone.
        GptOssConfig(
            hidden_size=HIDDEN,
            intermediate_size=HIDDEN,
            num_local_experts=6,
            num_experts_per_tok=3,
            num_attention_heads=4,
        ),
    ),
}


def halves(matrix):
    """Returns the rows of gate, then those of up, of rows that alternate."""
    return torch.cat([matrix[0::2], matrix[1::2]])


def ours(name, parameters):
    """Returns moerun's names and tensors for the tensor `name` of `parameters`."""
    tensor = parameters[name]
    stacks = {
        "experts.gate_up_proj": ("gate_up", lambda x: x),
        "experts.down_proj": ("down", lambda x: x),
        "experts.gate_up_proj_bias": ("gate_up_bias", halves),
        "experts.down_proj_bias": ("down_bias", lambda x: x),
    }
    if "experts.gate_up_proj_bias" in parameters:
        # gpt_oss stores matrices [in, out].
        stacks["experts.gate_up_proj"] = ("gate_up", lambda x: halves(x.T))
        stacks["experts.down_proj"] = ("down", lambda x: x.T)
    if name in stacks:
        part, convert = stacks[name]
        return {f"moe.experts.{e}.{part}": convert(x) for e, x in enumerate(tensor)}
    is_qwen = "shared_expert.gate_proj.weight" in parameters
    shared = "shared_expert." if is_qwen else "shared_experts."
    if name == f"{shared}gate_proj.weight":
        return {"moe.shared.gate_up": torch.cat([tensor, parameters[f"{shared}up_proj.weight"]])}
    single = {
        "gate.weight": "moe.gate",
        "router.weight": "moe.gate",
        "router.bias": "moe.gate_bias",
        "shared_expert_gate.weight": "moe.shared_gate",
        f"{shared}down_proj.weight": "moe.shared.down",
    }
    return {} if name == f"{shared}up_proj.weight" else {single[name]: tensor}


def draw(family, layer):
    """Draws all parameters and buffers."""
    # gpt_oss: many gates and ups are beyond the limit of 7.
    std = {"gpt_oss": 2.0}.get(family, 0.3)
    for name, parameter in layer.named_parameters():
        # mistral4: close scores, so that the best expert is in a group that is left out.
        gate = {"mistral4": 0.02}.get(family, 0.3)
        scale = gate if "gate.weight" in name or "router" in name else std
        torch.nn.init.normal_(parameter, std=scale)
    for name, buffer in layer.named_buffers():
        assert name.endswith("e_score_correction_bias")
        # Far from zero, so that a bias that enters the weights shows.
        order = torch.randperm(len(buffer)).float()
        buffer.copy_(7 + 0.05 * order)


def check_selection(family, layer, x):
    """Asserts that selections are clear, and that groups decide some of them."""
    router = layer.router if family == "gpt_oss" else layer.gate
    logits, _, experts = router(x)
    scores = logits.sigmoid() if family == "deepseek_v3" else logits.softmax(-1)
    if family == "deepseek_v3":
        scores = scores + router.e_score_correction_bias
    ordered = scores.sort(-1).values
    assert (1 - ordered[:, :-1] / ordered[:, 1:]).min() > TIE
    if hasattr(router, "num_group"):
        plain = scores.topk(router.top_k).indices.sort(-1).values
        assert (plain != experts.sort(-1).values).any(), "groups change no selection"
        best = scores.argmax(-1)
        left_out = ~(experts == best[:, None]).any(-1)
        # A group with the best expert is always chosen by its best expert.
        assert left_out.any() == (family != "deepseek_v2"), "groups leave out no best expert"
    if family == "deepseek_v3":
        plain = logits.sigmoid().topk(router.top_k).indices.sort(-1).values
        assert (plain != experts.sort(-1).values).any(), "the bias changes no selection"
    return experts.sort(-1).values


def golden(family, layer_class, config):
    torch.manual_seed(0)
    config._experts_implementation = "eager"
    layer = layer_class(config).float()
    with torch.no_grad():
        draw(family, layer)
    x = torch.randn(2, 12, HIDDEN, requires_grad=True)
    probe = torch.randn(2, 12, HIDDEN)
    out = {"input": x, "probe": probe}
    out["experts"] = check_selection(family, layer, x.detach().reshape(-1, HIDDEN))
    result = layer(x)
    output = result[0] if isinstance(result, tuple) else result
    (output * probe).sum().backward()
    out["output"] = output
    out["grad_input"] = x.grad
    weights = dict(layer.named_parameters())
    grads = {name: parameter.grad for name, parameter in weights.items()}
    for kind, parameters in [("weight", weights), ("grad", grads)]:
        for name in parameters:
            for our_name, tensor in ours(name, parameters).items():
                out[f"{kind}/{our_name}"] = tensor
    for _, buffer in layer.named_buffers():
        out["bias"] = buffer
    return out


def bf16_router():
    torch.manual_seed(1)
    layer = DeepseekV3MoE(LAYERS["deepseek_v3"][1])
    with torch.no_grad():
        draw("deepseek_v3", layer)
    router = layer.gate.bfloat16()
    router.e_score_correction_bias = torch.zeros(12)
    x = torch.randn(40, HIDDEN).bfloat16().requires_grad_()
    logits, weights, experts = router(x)
    probe = torch.randn(40, 3)
    # Each routing weight with the probe of its rank.
    order = weights.argsort(-1, descending=True)
    weights = weights.gather(1, order)
    (weights * probe).sum().backward()
    return {
        "weight": router.weight,
        "input": x,
        "probe": probe,
        "logits": logits,
        "routing_weights": weights,
        "experts": experts.gather(1, order),
        "grad_weight": router.weight.grad,
        "grad_input": x.grad,
    }


target = Path(
    sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[2] / "trainer/tests/golden/moe"
)
target.mkdir(parents=True, exist_ok=True)
files = {family: golden(family, *LAYERS[family]) for family in LAYERS}
files["bf16-router"] = bf16_router()
for name, tensors in files.items():
    tensors = {key: tensor.detach().clone().contiguous() for key, tensor in tensors.items()}
    save_file(tensors, target / f"{name}.safetensors")
    print(f"{name}: {len(tensors)} tensors")
