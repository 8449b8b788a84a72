"""lm-eval's own task YAMLs on rows of a local folder: `install(data_dir)` patches `datasets.load_dataset`.

data_dir has the public layouts: bbh/bbh/*.json, mmlu/{dev,val,test}/*_{split}.csv, gsm8k/{train,test}.jsonl.
Call it before tasks are loaded. Nothing else of lm-eval is changed; the network is switched off.
"""

import csv
import json
import os
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def _bbh(root, name):
    examples = json.loads((root / "bbh/bbh" / f"{name}.json").read_text(encoding="utf-8"))["examples"]
    return {"test": [{"input": e["input"], "target": e["target"]} for e in examples]}


def _mmlu(root, name):
    splits = {}
    for split, folder in {"dev": "dev", "validation": "val", "test": "test"}.items():
        path = root / "mmlu" / folder / f"{name}_{folder}.csv"
        if not path.is_file():
            continue
        with path.open(encoding="utf-8", newline="") as file:
            splits[split] = [
                {"question": q, "subject": name, "choices": [a, b, c, d], "answer": "ABCD".index(letter)}
                for q, a, b, c, d, letter in csv.reader(file)
            ]
    return splits


def _gsm8k(root, _name):
    def rows(split):
        with (root / "gsm8k" / f"{split}.jsonl").open(encoding="utf-8", newline="\n") as file:
            return [{k: row[k] for k in ("question", "answer")} for row in map(json.loads, file)]

    return {"train": rows("train"), "test": rows("test")}


_READERS = {"SaylorTwift/bbh": _bbh, "cais/mmlu": _mmlu, "openai/gsm8k": _gsm8k}


def install(data_dir):
    """Makes `datasets.load_dataset` read the three data sets from `data_dir`, and refuse all others."""
    import datasets

    root = Path(data_dir)

    def load_dataset(path=None, name=None, **_kwargs):
        if path not in _READERS:
            raise RuntimeError(f"lm_eval_offline knows no data set {path}")
        return datasets.DatasetDict(
            {split: datasets.Dataset.from_list(rows) for split, rows in _READERS[path](root, name).items()}
        )

    datasets.load_dataset = load_dataset


if __name__ == "__main__":
    import sys

    install(sys.argv[1])
    from lm_eval.tasks import TaskManager, get_task_dict

    for task in sys.argv[2:]:
        for key, found in get_task_dict([task], TaskManager()).items():
            print(key, len(found.eval_docs) if hasattr(found, "eval_docs") else found)
