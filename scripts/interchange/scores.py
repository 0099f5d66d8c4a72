"""Log-likelihoods as transformers computes them, and the texts to compare."""

from dataclasses import dataclass

import torch

GOLDEN_TEXTS = [
    ("", "the rain"),
    ("one two three ", "here"),
    ("on", " the other 42."),
    ("near the rain. ", "an art in one"),
    ("then the other three are near the rain. one two", " three 3 42 are on"),
]
SMOKE_TEXTS = [
    ("", "import torch"),
    ("def forward(self, x", "):\n        return x"),
    ("for index in range(", "len(values)):"),
    ("class Linear(torch.nn.Module):\n    def __init__(self", ", size):"),
    ("# Copyright (c) Facebook, Inc. and its ", "affiliates."),
]
# Contexts after which the log-probability of each token is compared.
GOLDEN_CONTEXTS = ["here 42.", "one two three are near the rain in 3."]
SMOKE_CONTEXTS = ["def forward(self, x)"]
# Number of tokens of the vocabulary to compare after each context, about.
MOST_TOKENS = 128
NEW_TOKENS = 8


def encode(tokenizer, text):
    """Returns the tokens of a text."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def log_probabilities(model, ids):
    """Returns log-probabilities of the token after each of `ids`."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)


def score(model, tokenizer, context, continuation):
    """Returns (log-likelihood, is greedy, number of tokens) of a continuation.

    Spaces at the end of the context belong to the continuation. It follows the token that begins or
    ends a text if there is no context.
    """
    before = encode(tokenizer, context.rstrip())
    whole = encode(tokenizer, context + continuation)
    if not before:
        start = tokenizer.bos_token_id
        before = [tokenizer.eos_token_id if start is None else start]
        whole = [*before, *whole]
    targets = torch.tensor(whole[len(before) :])
    rows = log_probabilities(model, whole[:-1])[len(before) - 1 :]
    value = rows.gather(1, targets[:, None]).sum().item()
    return value, bool((rows.argmax(-1) == targets).all()), len(targets)


def is_text(tokenizer, context, text, tokens):
    """Returns true if a text after this context has these tokens."""
    return encode(tokenizer, context + text) == [*encode(tokenizer, context), *tokens]


@dataclass
class Probe:
    """One token after a context, and its log-probability."""

    context: str
    text: str
    value: float


def probes(model, tokenizer, contexts):
    """Returns probes of tokens across the vocabulary, but for those that no text has there.

    Log-probabilities of all tokens are logits but for a constant.
    """
    found = []
    step = max(1, len(tokenizer) // MOST_TOKENS)
    for context in contexts:
        row = log_probabilities(model, encode(tokenizer, context))[-1]
        for token in range(0, len(tokenizer), step):
            text = tokenizer.decode([token])
            if is_text(tokenizer, context, text, [token]):
                found.append(Probe(context, text, row[token].item()))
    return found


def generated(model, tokenizer, prompt):
    """Returns the likeliest tokens after a prompt, as transformers generates them."""
    ids = torch.tensor([encode(tokenizer, prompt)])
    options = dict(max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0]
    assert out[: ids.shape[1]].equal(ids[0]) and len(out) > ids.shape[1], "nothing was generated"
    return out[ids.shape[1] :].tolist()
