"""How transformers reads the export of each golden folder, where that is not as it is."""

import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "golden"))
from released import BAILING  # noqa: E402

logging.disable_progress_bar()
logging.set_verbosity_error()


@dataclass
class Reading:
    """Changes to a folder. The default is none."""

    # One line for the report.
    note: str = ""
    # Returns config.json of the golden folder as moerun trains it.
    source_config: Callable | None = None
    # Returns config.json of the export as transformers reads it.
    config: Callable | None = None
    # Returns tensors of the export as transformers reads them, from tensors and config.json.
    tensors: Callable | None = None
    # Pattern of tensors that transformers does not use.
    unused: str | None = None


def with_keys(**keys):
    """Returns how config.json gets these keys."""
    return lambda config: {**config, **keys}


def same_rope(config):
    """Returns config.json of olmo3 with the same rotary embedding in all layers."""
    rope = config["rope_parameters"]
    plain = rope["sliding_attention"]
    return {**config, "rope_parameters": {kind: plain for kind in rope}}


def glm_config(config):
    """Returns config.json of glm4_moe from that of Ling 2."""
    return {
        **{key: value for key, value in config.items() if key != "auto_map"},
        "architectures": ["Glm4MoeForCausalLM"],
        "model_type": "glm4_moe",
        "attention_bias": False,
        "n_routed_experts": config["num_experts"],
        "n_shared_experts": config["num_shared_experts"],
    }


def glm_tensors(tensors, config):
    """Returns tensors of glm4_moe from those of Ling 2."""
    glm = {theirs: ours for ours, theirs in BAILING.items()}
    heads = [config["num_attention_heads"], *[config["num_key_value_heads"]] * 2]
    rows = [count * config["head_dim"] for count in heads]
    out = {}
    for name, tensor in tensors.items():
        prefix, found, _ = name.rpartition("attention.query_key_value")
        if found:
            for part, matrix in zip("qkv", tensor.split(rows), strict=True):
                out[f"{prefix}self_attn.{part}_proj.weight"] = matrix.contiguous()
        elif name == "model.word_embeddings.weight":
            out["model.embed_tokens.weight"] = tensor
        else:
            layer = re.match(r"model\.layers\.\d+\.", name)
            start = layer.end() if layer else 0
            out[name[:start] + glm.get(name[start:], name[start:])] = tensor
    return out


READINGS = {
    "bailing_moe_v2": Reading(
        "transformers has no class for it: read as glm4_moe, with its names",
        config=glm_config,
        tensors=glm_tensors,
    ),
    "deepseek_v3-mtp": Reading(
        "transformers has no layer for multi-token prediction, and does not use its tensors",
        unused=r"model\.layers\.2\.",
    ),
    "dots1": Reading(
        "transformers cannot read null, as released, for n_group and topk_group: read with 1",
        config=with_keys(n_group=1, topk_group=1),
    ),
    "kimi_k2": Reading(
        "transformers has no class for it: read as deepseek_v3",
        config=with_keys(model_type="deepseek_v3"),
    ),
    "olmo3": Reading(
        "moerun has one rotary embedding for all layers: trained with that of the sliding ones",
        source_config=same_rope,
    ),
}


def load(folder, reading, twin):
    """Returns model, tokenizer and loading report of a folder, or of its changed copy `twin`."""
    if reading.config or reading.tensors:
        shutil.copytree(folder, twin)
        folder = twin
        file = folder / "config.json"
        config = json.loads(file.read_text())
        if reading.config:
            file.write_text(json.dumps(reading.config(config)))
        if reading.tensors:
            weights = folder / "model.safetensors"
            tensors = reading.tensors(load_file(weights), config)
            save_file(tensors, weights, metadata={"format": "pt"})
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    return model.eval(), AutoTokenizer.from_pretrained(folder), report


def faults(report, unused):
    """Returns the entries of a loading report, but for tensors that transformers does not use."""
    found = []
    for kind, entries in report.items():
        for entry in entries:
            name = entry if isinstance(entry, str) else str(entry)
            if not (kind == "unexpected_keys" and unused and re.match(unused, name)):
                found.append(f"{kind}: {name}")
    return found
