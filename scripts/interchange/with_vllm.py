"""Computes log-likelihoods with vLLM. Reads a request as JSON, and prints an answer as JSON.

main.py calls it with the interpreter of vLLM's own environment.
"""

import json
import os
import sys

# One process, and little memory for keys and values.
os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1")

from vllm import LLM, SamplingParams, __version__  # noqa: E402


def main():
    request = json.load(sys.stdin)
    model = LLM(request["folder"], dtype="float32", enforce_eager=True)
    tokenizer = model.get_tokenizer()

    def encode(text):
        return tokenizer.encode(text, add_special_tokens=False)

    pairs = request["pairs"]
    prompts = [{"prompt_token_ids": encode("".join(pair))} for pair in pairs]
    starts = [len(encode(context.rstrip())) for context, _ in pairs]
    sampling = SamplingParams(temperature=0, max_tokens=8, prompt_logprobs=0)
    outputs = model.generate(prompts, sampling)
    values = []
    for output, start in zip(outputs, starts, strict=True):
        rows = zip(output.prompt_token_ids[start:], output.prompt_logprobs[start:], strict=True)
        values.append(sum(row[token].logprob for token, row in rows))
    print(json.dumps({"version": __version__, "log_likelihoods": values}))


main()
