#!/usr/bin/env python3
"""Writes golden readings: what the configuration classes of transformers make of config.json.

usage: scripts/golden/config_defaults.py       (writes trainer/tests/golden/config_defaults.json)

For each family, `base` is the complete configuration of its golden folder. Each case takes keys
away (`without`) or sets them (`with`), and `means` has the keys of the complete configuration that
the class then has, where it differs from `base`. Each key is left out once and is null once, unless
the class refuses that. SPECIAL has more cases; moerun refuses those that are `refused`.
Made with transformers 5.23.0.
"""

import copy
import json
from pathlib import Path

from transformers import CONFIG_MAPPING

GOLDEN = Path(__file__).parents[2] / "trainer/tests/golden"

# Keys that moerun does not read, or that say nothing about the model.
OTHER_KEYS = set(
    "_name_or_path architectures attention_dropout bos_token_id chunk_size_feed_forward dtype"
    " eod_token_id eos_token_id id2label initializer_range is_encoder_decoder label2id model_type"
    " output_attentions output_hidden_states output_router_logits pad_token_id pretraining_tp"
    " problem_type return_dict router_aux_loss_coef router_jitter_noise sep_token_id"
    " torch_dtype transformers_version use_cache auto_map num_nextn_predict_layers"
    " num_mtp_layers qk_head_dim moe_norm_min mlp_bias".split()
)

FAMILIES = (
    "afmoe deepseek_v2 deepseek_v3 dots1 ernie4_5_moe flex_olmo glm4_moe glm4_moe_lite gpt_oss"
    " granitemoe granitemoeshared hunyuan_v1_moe llama minimax_m2 mixtral olmo2 olmo3 olmoe"
    " qwen2_moe qwen3 qwen3_moe".split()
)

# Folders of models that moerun can compute, where these have another name.
FOLDERS = {"olmo3": "olmo3-same"}

YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 8}
WINDOW = ("layer_types", "sliding_window")


def case(name, refused=False, without=(), **keys):
    return {"name": name, "refused": refused, "without": list(without), "with": keys}


SPECIAL = {
    "qwen2_moe": [
        case(
            "every second of the first layers slides",
            without=WINDOW,
            use_sliding_window=True,
            max_window_layers=2,
        ),
    ],
    "qwen3": [
        case(
            "the last layers slide",
            without=WINDOW,
            use_sliding_window=True,
            max_window_layers=1,
        ),
        case(
            "no window without a size",
            without=["layer_types"],
            use_sliding_window=True,
            sliding_window=None,
            max_window_layers=1,
        ),
    ],
    "qwen3_moe": [
        case("the window of the class", without=["sliding_window"], use_sliding_window=True),
        case("a part of a head", True, ["rope_parameters"], partial_rotary_factor=0.5),
    ],
    "dots1": [
        case("the last layers slide", without=["layer_types"], max_window_layers=1),
    ],
    "olmo3": [
        case("as released", True, ["rope_parameters"], rope_theta=5e5, rope_scaling=YARN),
        case("theta of full layers", True, ["rope_parameters"], rope_theta=1e4),
        case("the theta of the class", False, ["rope_parameters"], rope_theta=5e5),
        case("flat", True, rope_parameters={"rope_type": "default", "rope_theta": 1e4}),
    ],
    "llama": [
        case(
            "a part of a head",
            True,
            rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.5},
        ),
    ],
    "mixtral": [
        case(
            "alpha is that of another family",
            True,
            rope_parameters={"rope_type": "dynamic", "factor": 2.0, "alpha": 100.0},
        ),
        case(
            "the length outside counts",
            rope_parameters={**YARN, "original_max_position_embeddings": 16},
            original_max_position_embeddings=8,
        ),
    ],
    "hunyuan_v1_moe": [
        case(
            "no alpha",
            rope_parameters={"rope_type": "dynamic", "factor": 2.0, "alpha": 0.0},
        ),
    ],
    "minimax_m2": [
        case("a width", without=["rope_parameters"], rotary_dim=4),
        case(
            "a part before a width",
            without=["rope_parameters"],
            rotary_dim=4,
            partial_rotary_factor=0.5,
        ),
        case(
            "a part among the parameters before a width",
            rotary_dim=4,
            rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.5},
        ),
    ],
    "gpt_oss": [
        case("theta alone", without=["rope_parameters"], rope_theta=1e4),
    ],
    "glm4_moe": [
        case("no shared expert", True, n_shared_experts=0),
    ],
    "glm4_moe_lite": [
        case("dense layers by another key", True, ["mlp_layer_types"], first_k_dense_replace=0),
    ],
}


def complete(family, keys):
    """Returns all keys of a class that is made from some, or None if it refuses them."""
    try:
        config = CONFIG_MAPPING[family](**copy.deepcopy(keys))
    except Exception:
        return None
    found = json.loads(json.dumps(config.to_dict()))
    return {key: value for key, value in found.items() if key not in OTHER_KEYS}


def cases(family, base):
    yield from SPECIAL.get(family, [])
    for key in base:
        yield case(f"without {key}", None, [key])
        yield case(f"{key} is null", None, **{key: None})


def readings(family):
    path = GOLDEN / "families" / FOLDERS.get(family, family) / "model/config.json"
    config = json.loads(path.read_text())
    base = complete(family, config)
    found = []
    for case in cases(family, base):
        keys = {key: value for key, value in base.items() if key not in case["without"]}
        full = complete(family, {**keys, **case["with"]})
        if full is None:
            assert case["refused"] is None, (family, case)
            continue
        means = {key: value for key, value in full.items() if base.get(key, "absent") != value}
        # The class has no such key of its own.
        means |= {key: None for key in base if key not in full}
        found.append({**case, "means": means})
    return {"base": base, "cases": found}


def main():
    lines = []
    for family in FAMILIES:
        reading = readings(family)
        cases = ",\n".join(f"    {json.dumps(case)}" for case in reading["cases"])
        base = json.dumps(reading["base"])
        lines.append(f'{json.dumps(family)}: {{"base": {base},\n  "cases": [\n{cases}]}}')
    text = "{" + ",\n".join(lines) + "}\n"
    (GOLDEN / "config_defaults.json").write_text(text)


main()
