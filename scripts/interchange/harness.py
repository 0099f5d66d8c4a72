"""Scores texts with lm-evaluation-harness, as a task whose data is a local file."""

import contextlib
import io
import json

import lm_eval
from lm_eval.tasks import TaskManager

TASK = """\
task: interchange
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{context}}}}"
doc_to_target: "{{{{continuation}}}}"
target_delimiter: ""
metric_list:
  - {{metric: acc}}
"""


def scores(folder, requests, work):
    """Returns (log-likelihood, is greedy) of each context and continuation."""
    work.mkdir(parents=True)
    data = work / "requests.jsonl"
    lines = [json.dumps({"context": c, "continuation": w}) for c, w in requests]
    data.write_text("".join(f"{line}\n" for line in lines))
    (work / "interchange.yaml").write_text(TASK.format(data=data))
    # Progress bars.
    with contextlib.redirect_stderr(io.StringIO()):
        results = lm_eval.simple_evaluate(
            model="hf",
            model_args={"pretrained": str(folder), "dtype": "float32"},
            tasks=["interchange"],
            task_manager=TaskManager(include_path=str(work), include_defaults=False),
            device="cpu",
            batch_size=1,
            bootstrap_iters=0,
        )
    samples = sorted(results["samples"]["interchange"], key=lambda sample: sample["doc_id"])
    answers = [sample["filtered_resps"][0] for sample in samples]
    return [(float(value), bool(is_greedy)) for value, is_greedy in answers]
