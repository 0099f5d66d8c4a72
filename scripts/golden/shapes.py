"""Sizes and drawn values that golden folders share."""

import torch
from folders import CHOICE_BIAS

SMALL = dict(
    vocab_size=48,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
    # torch's embedding gives a padding token no gradient.
    pad_token_id=None,
    bos_token_id=0,
    eos_token_id=0,
)


def rope(theta, **more):
    """Returns parameters of rotary embedding in the spelling of transformers 5."""
    return {"rope_type": "default", "rope_theta": theta, **more}


def state(module):
    """Returns parameters and buffers by name."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def near_seven(module):
    """Sets choice biases as GLM has them. Rounded to bf16, all of them would be 7.

    Routers are weak, so that these biases decide.
    """
    for name, tensor in state(module).items():
        if name.endswith(CHOICE_BIAS):
            tensor.copy_(7 + 1e-3 * torch.arange(tensor.numel()).reshape(tensor.shape))
        elif name.endswith("mlp.gate.weight"):
            tensor.mul_(0.1)


def draw_choice_biases(module, std=0.1):
    """Draws choice biases."""
    for name, bias in state(module).items():
        if name.endswith(CHOICE_BIAS):
            torch.nn.init.normal_(bias, std=std)
