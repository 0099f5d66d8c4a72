"""Writes a tiny tokenizer next to a model.

Files of a tokenizer are copied verbatim when a model is exported. So one of them is what
transformers 4 wrote and 5 only reads, and the template has a line break at its end.
"""

import json

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = """{%- for message in messages %}
<|im_start|>{{ message.role }} {{ message.content }}<|im_end|>
{%- endfor %}
{%- if add_generation_prompt %}
<|im_start|>assistant
{%- endif %}
"""


def write_tokenizer(folder):
    """Writes a tokenizer of letters, digits and a few pairs of letters: 48 tokens."""
    characters = "abcdefghijklmnopqrstuvwxyz0123456789.\u2581"
    merges = [tuple(pair) for pair in ("th", "he", "in", "er", "an", "re", "on")]
    tokens = [*SPECIAL, *characters, *("".join(pair) for pair in merges)]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="never")
    tokenizer.decoder = decoders.Metaspace(replacement="\u2581", prepend_scheme="never")
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=SPECIAL[0],
        additional_special_tokens=SPECIAL[1:],
        model_max_length=64,
    )
    wrapped.chat_template = TEMPLATE
    wrapped.save_pretrained(folder)
    old = {"additional_special_tokens": SPECIAL[1:], "eos_token": SPECIAL[0]}
    (folder / "special_tokens_map.json").write_text(json.dumps(old, indent=2))
