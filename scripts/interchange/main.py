"""Checks exports of moerun with transformers and lm-evaluation-harness.

scripts/check-interchange calls it. Each check prints a line, and a table at the end has the largest
differences of each export.
"""

import argparse
import json
import logging
import subprocess
import sys
import warnings
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import harness
import scores
from exports import FOLDERS, NEW, Moerun
from readers import READINGS, Reading, faults, load
from safetensors.torch import load_file

LOGITS = 1e-5
LIKELIHOODS = 1e-4
# Exports that lm-evaluation-harness scores.
HARNESS = ("smoke", "qwen3_moe")
COLUMNS = ("class", "logits", "log-likelihoods", "lm-eval", "vLLM")


class Report:
    """Results of checks."""

    def __init__(self):
        self.failed, self.passed, self.rows = 0, 0, {}

    def check(self, name, what, passed, text):
        """Prints the result of a check."""
        self.passed += passed
        self.failed += not passed
        self.line("ok" if passed else "fail", name, what, text)

    def line(self, label, name, what, text):
        """Prints a line."""
        print(f"{label:5}{name:20}{what:17}{text}", flush=True)

    def cell(self, name, column, value):
        """Puts a value into the table of exports."""
        text = value if isinstance(value, str) else f"{value:.1e}"
        self.rows.setdefault(name, {})[column] = text

    def summary(self):
        """Prints the table of exports, and the number of checks."""
        print(f"\n| export | {' | '.join(COLUMNS)} |\n{'|---' * (len(COLUMNS) + 1)}|")
        for name, cells in self.rows.items():
            print(f"| {name} | {' | '.join(cells.get(column, '') for column in COLUMNS)} |")
        print(f"\n{self.passed} checks passed, {self.failed} failed")


@dataclass
class Exported:
    """A trained model, and the texts to compare."""

    run: Path
    folder: Path
    # Pairs of a context and a continuation.
    texts: list
    # Contexts after which tokens of the whole vocabulary are compared.
    contexts: list


def export_new(name, moerun, report):
    """Returns the export of a model that moerun trains from the start."""
    run, folder = moerun.export_new(name)
    family = json.loads((folder / "config.json").read_text())["model_type"]
    report.check(name, "export", family == NEW[name].family, f"a new model, as {family}")
    return Exported(run, folder, scores.SMOKE_TEXTS, scores.SMOKE_CONTEXTS)


def export_golden(name, reading, moerun, report):
    """Returns the export of a golden folder that moerun trained further."""
    source, run, folder = moerun.export_golden(name, reading.source_config)
    changed, count = changed_tensors(source, folder)
    report.check(name, "export", changed > 0, f"{changed} of {count} tensors changed in training")
    copied = [file.name for file in source.glob("*token*")]
    equal = all((source / file).read_bytes() == (folder / file).read_bytes() for file in copied)
    report.check(name, "tokenizer files", equal, f"{len(copied)} copied")
    return Exported(run, folder, scores.GOLDEN_TEXTS, scores.GOLDEN_CONTEXTS)


def changed_tensors(source, folder):
    """Returns the number of tensors that differ from those of the source, and that of all."""

    def tensors(folder):
        files = sorted(folder.glob("*.safetensors"))
        return {name: t for file in files for name, t in load_file(file).items()}

    before, after = tensors(source), tensors(folder)
    same = [
        name
        for name, tensor in after.items()
        if name in before and before[name].dtype == tensor.dtype and before[name].equal(tensor)
    ]
    return len(after) - len(same), len(after)


def largest(ours, theirs):
    """Returns the largest difference of two lists of scores."""
    return max(abs(a[0] - b[0]) for a, b in zip(ours, theirs, strict=True))


def compare(report, name, column, ours, theirs):
    """Checks scores of texts: all values that theirs have."""
    difference = largest(ours, theirs)
    same = all(a[1 : len(b)] == b[1:] for a, b in zip(ours, theirs, strict=True))
    text = f"{difference:.1e} of {LIKELIHOODS:.0e}, {len(ours)} texts"
    text = text if same else f"{text}; the likeliest tokens differ"
    report.check(name, column, same and difference <= LIKELIHOODS, text)
    report.cell(name, column, difference)


def check(name, moerun, report):
    """Exports one model and checks it."""
    reading = READINGS.get(name, Reading())
    if reading.note:
        report.line("note", name, "", reading.note)
    if name in NEW:
        exported = export_new(name, moerun, report)
    else:
        exported = export_golden(name, reading, moerun, report)

    model, tokenizer, loading = load(exported.folder, reading, moerun.path("twins", name))
    kind = type(model).__name__
    wrong = faults(loading, reading.unused)
    text = "; ".join(wrong[:3]) or f"{kind}, no key missing, unexpected or mismatched"
    report.check(name, "load", not wrong, text)
    report.cell(name, "class", kind)

    prompt = exported.contexts[0]
    new = scores.generated(model, tokenizer, prompt)
    continued = tokenizer.decode(new)
    report.check(name, "generate", True, f"{len(new)} tokens: {continued!r}")

    probes = scores.probes(model, tokenizer, exported.contexts)
    requests = [*exported.texts, *[(probe.context, probe.text) for probe in probes]]
    ours = moerun.scores("--checkpoint", exported.run, requests)
    count = len(exported.texts)
    logits = largest(ours[count:], [(probe.value,) for probe in probes])
    text = f"{logits:.1e} of {LOGITS:.0e}, {len(probes)} tokens"
    report.check(name, "logits", logits <= LOGITS, text)
    report.cell(name, "logits", logits)
    theirs = [scores.score(model, tokenizer, *pair) for pair in exported.texts]
    compare(report, name, "log-likelihoods", ours[:count], theirs)
    if scores.is_text(tokenizer, prompt, continued, new):
        greedy = moerun.scores("--checkpoint", exported.run, [(prompt, continued)])[0][1]
        report.check(name, "likeliest", greedy, "moerun would have generated the same")
    again = moerun.scores("--model", exported.folder, requests)
    difference = largest(again, ours)
    report.check(name, "read by moerun", difference <= LOGITS, f"{difference:.1e} of {LOGITS:.0e}")

    if name in HARNESS:
        theirs = harness.scores(exported.folder, requests, moerun.path("harness", name))
        compare(report, name, "lm-eval", ours, theirs)


def check_vllm(name, python, moerun, report):
    """Loads the export of a new model with vLLM, and compares log-likelihoods."""
    script = Path(__file__).parent / "with_vllm.py"
    pairs = [pair for pair in scores.SMOKE_TEXTS if pair[0]]
    request = json.dumps({"folder": str(moerun.path("exports", name)), "pairs": pairs})
    done = subprocess.run([python, script], input=request, text=True, capture_output=True)
    if done.returncode:
        lines = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()
        report.check(name, "vLLM", False, lines[-1])
        return
    answer = json.loads(done.stdout.splitlines()[-1])
    report.check(name, "load in vLLM", True, f"vLLM {answer['version']} also generates")
    ours = moerun.scores("--checkpoint", moerun.path("runs", name), pairs)
    compare(report, name, "vLLM", ours, [(value,) for value in answer["log_likelihoods"]])


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--moerun", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--vllm-python")
    parser.add_argument("names", nargs="*")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    known = [*sorted(folder.name for folder in FOLDERS.iterdir() if folder.is_dir()), *NEW]
    names = arguments.names or known
    unknown = [name for name in names if name not in known]
    if unknown:
        sys.exit(f"error: no model {unknown[0]}\nhint: the names are {', '.join(known)}")
    moerun = Moerun(arguments.moerun, arguments.work)
    packages = ("torch", "transformers", "safetensors", "lm_eval")
    print(", ".join(f"{package} {version(package)}" for package in packages), flush=True)
    report = Report()
    for name in names:
        try:
            check(name, moerun, report)
        except Exception as error:
            text = " ".join(str(error).split())
            report.check(name, "stopped", False, f"{type(error).__name__}: {text}")
    for name in NEW if arguments.vllm_python else ():
        if moerun.path("exports", name).exists():
            check_vllm(name, arguments.vllm_python, moerun, report)
    report.summary()
    sys.exit(1 if report.failed else 0)


main()
