"""Writes prompts.sha256: digests of the prompts and references that lm-eval 0.4.13 makes of the published data.

    python make.py DATA_DIR [TASK...]      (about a quarter of an hour for all tasks)

Lines: subtask, shots, samples, SHA-256 of the prompts joined by NULs, the same of the references.
"""

import hashlib
import logging
import os
import sys
from pathlib import Path

os.environ["TQDM_DISABLE"] = "1"
import lm_eval_offline  # noqa: E402 (beside this file)

lm_eval_offline.install(sys.argv[1])
logging.disable(logging.CRITICAL)
from lm_eval.tasks import TaskManager, get_task_dict  # noqa: E402


def plan(root):
    """Subtasks and the numbers of shots they are asked with: the task's own, none and some."""
    bbh = sorted(path.stem for path in (root / "bbh/bbh").glob("*.json"))
    mmlu = sorted(path.name.removesuffix("_test.csv") for path in (root / "mmlu/test").glob("*.csv"))
    yield from (("gsm8k", (5, 0, 2)), ("gsm8k_cot", (8, 0, 4)))
    yield from ((f"bbh_cot_fewshot_{name}", (3, 0, 2)) for name in bbh)
    yield from ((f"mmlu_{name}", (0, 5, 2)) for name in mmlu)


def digest(texts):
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


def prompts_and_references(task, shots):
    task.set_config(key="num_fewshot", value=shots)
    task.set_fewshot_seed(seed=1234)
    task.build_all_requests()
    if task.OUTPUT_TYPE == "multiple_choice":
        assert all(one.args[1] == " " + "ABCD"[one.idx] for one in task.instances)
        first = [one for one in task.instances if one.idx == 0]
        return [one.args[0] for one in first], ["ABCD"[task.doc_to_target(one.doc)] for one in first]
    return [one.args[0] for one in task.instances], [task.doc_to_target(one.doc) for one in task.instances]


manager = TaskManager()
for name, shot_counts in plan(Path(sys.argv[1])):
    if sys.argv[2:] and name not in sys.argv[2:]:
        continue
    task = get_task_dict([name], manager)[name]
    for shots in shot_counts:
        prompts, references = prompts_and_references(task, shots)
        print(name, shots, len(prompts), digest(prompts), digest(references), flush=True)
