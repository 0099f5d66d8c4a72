"""Runs moerun: trains models, exports them, and computes log-likelihoods."""

import json
import random
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

PROJECT = Path(__file__).resolve().parents[2]
FOLDERS = PROJECT / "trainer/tests/golden/families"
TOKENIZER = FOLDERS / "qwen3_moe/model"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
STEPS = 2
FINE_TUNE = """\
run: {{dir: {run}, timeout_s: 120}}
model: {{from: {source}}}
data: {{train: [{{path: data/golden/train}}], sequence_length: 64}}
train: {{steps: {steps}, global_batch: 4, micro_batch: 4, dtype: fp32}}
schedule: {{cosine: {{lr: 1e-2, warmup_steps: 0}}}}
"""
# The training of scripts/smoke, in seconds instead of minutes.
SHORT = {
    "train.steps": 20,
    "train.global_batch": 8,
    "train.dtype": "fp32",
    "schedule.power.warmup_steps": 5,
    "schedule.power.decay_steps": 5,
    "checkpoint.every": 20,
    "validation.every": 20,
    "validation.sequences": 8,
}


@dataclass
class New:
    """Changes to the model of scripts/smoke, and the family that can express it."""

    family: str
    settings: dict


# Models that moerun trains from the start, one for each family that can express such a model.
NEW = {
    "smoke": New("mixtral", {"model.dense_layers": 0}),
    # vLLM does not normalize the routing weights of olmoe, whatever norm_topk_prob says.
    "smoke-olmoe": New(
        "olmoe",
        {
            "model.dense_layers": 0,
            "model.qk_norm": "full",
            "model.moe.router.normalize": "false",
        },
    ),
    "smoke-qwen3_moe": New("qwen3_moe", {"model.qk_norm": "head"}),
    "smoke-granite": New(
        "granitemoeshared",
        {
            "model.dense_layers": 0,
            "model.moe.shared_experts": 1,
            "model.multipliers.embedding": 12.0,
            "model.multipliers.residual": 0.5,
            "model.multipliers.logits": 0.25,
        },
    ),
    "smoke-glm4_moe": New(
        "glm4_moe",
        {
            "model.moe.shared_experts": 1,
            "model.moe.router.score": "sigmoid",
            "model.moe.router.scale": 2.5,
            "model.moe.bias_update_rate": 0.001,
        },
    ),
}
WORDS = "the then other here in on an are rain near 3 42 one two three.".split()


class Moerun:
    """The program to check, in a folder of its own."""

    def __init__(self, program, work):
        self.program = program
        self.work = work
        work.mkdir(parents=True, exist_ok=True)
        assert not any(work.iterdir()), f"{work} is not empty"

    def __call__(self, *arguments):
        """Runs a command and returns its output."""
        command = [self.program, *map(str, arguments)]
        done = subprocess.run(command, cwd=self.work, text=True, capture_output=True)
        if done.returncode:
            words = " ".join(map(str, arguments))
            raise RuntimeError(f"moerun {words}: {done.stderr.strip() or done.stdout.strip()}")
        return done.stdout

    def path(self, *parts):
        """Returns a path in the folder, and makes its parent."""
        path = self.work.joinpath(*parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def prepare_golden(self):
        """Writes drawn texts as tokens of the golden folders' tokenizer."""
        if self.path("data/golden/dataset.json").exists():
            return
        drawn = random.Random(1)
        texts = [" ".join(drawn.choice(WORDS) for _ in range(60)) for _ in range(60)]
        lines = self.path("texts.jsonl")
        lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        tokenizer = TOKENIZER / "tokenizer.json"
        fraction = ("--validation-fraction", 0.1)
        self("data", "prepare", lines, "-o", "data/golden", "--tokenizer", tokenizer, *fraction)

    def export_golden(self, name, change_config):
        """Trains a copy of a golden folder and exports it. Returns source, run and export."""
        self.prepare_golden()
        source = self.path("sources", name)
        shutil.copytree(FOLDERS / name / "model", source)
        if not (source / "tokenizer.json").exists():
            for file in TOKENIZER_FILES:
                shutil.copy(TOKENIZER / file, source / file)
        if change_config:
            file = source / "config.json"
            file.write_text(json.dumps(change_config(json.loads(file.read_text()))))
        run, config = self.path("runs", name), self.path("configs", f"{name}.yaml")
        config.write_text(FINE_TUNE.format(run=run, source=source, steps=STEPS))
        self("train", config)
        return source, run, self.export(name)

    def prepare_smoke(self):
        """Prepares text that is already here: the Python sources of torch."""
        if self.path("data/smoke/dataset.json").exists():
            return
        corpus = Path(torch.__file__).parent
        limits = ("--extensions", "py", "--max-mb", 4, "--vocab-size", 4096)
        self("data", "prepare", corpus, *limits, "-o", "data/smoke")

    def export_new(self, name):
        """Trains a model from the start for a few steps, and exports it. Returns run and export."""
        self.prepare_smoke()
        run = self.path("runs", name)
        settings = {"run.dir": run, **SHORT, **NEW[name].settings}
        options = [word for item in settings.items() for word in ("--set", "{}={}".format(*item))]
        self("train", PROJECT / "configs/smoke.yaml", "-n", 2, *options)
        return run, self.export(name)

    def export(self, name):
        """Exports a run as fp32. Returns the folder."""
        folder = self.path("exports", name)
        run = self.path("runs", name)
        self("model", "export", "--checkpoint", run, "-o", folder, "--dtype", "fp32")
        return folder

    def scores(self, option, model, requests):
        """Returns (log-likelihood, is greedy, number of tokens) of each context and continuation.

        `option` is --checkpoint or --model.
        """
        file = self.path("requests.jsonl")
        lines = [json.dumps({"context": c, "continuation": w}) for c, w in requests]
        file.write_text("".join(f"{line}\n" for line in lines))
        output = self("evaluate", option, model, "--requests", file)
        scores = [json.loads(line) for line in output.splitlines()]
        assert len(scores) == len(requests), f"{len(scores)} scores of {len(requests)} requests"
        return [(s["log_likelihood"], s["is_greedy"], s["tokens"]) for s in scores]
