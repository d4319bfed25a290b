"""Writes predictions in the formats of the GLUE and SuperGLUE servers, one file per test set.

GLUE (gluebenchmark.com) takes tab-separated files such as SST-2.tsv with the columns "index" and "prediction".
SuperGLUE (super.gluebenchmark.com) takes files such as BoolQ.jsonl with a JSON object per line, which has "idx" and
"label". Both servers take a zip archive of these files.
"""

import collections
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from prompt_tuning_jax.batches.examples import Examples
from prompt_tuning_jax.batches.loader import Batches
from prompt_tuning_jax.errors import Setting, SettingError
from prompt_tuning_jax.tasks import postprocessors
from prompt_tuning_jax.training.evaluation import Predictions
from prompt_tuning_jax.training.run_folder import write_text


class ServerFile(NamedTuple):
    """Describes the file that a server takes for one test set.

    Attributes:
      name: the file's name; .tsv for GLUE, .jsonl for SuperGLUE.
      rows: the number of examples in the test set. For MultiRC, it counts answers; for ReCoRD, queries.
      format_answer: returns the prediction as the server expects it, from a postprocessed answer and the task's labels.
      number: the field of an example with its index in the test set.
    """

    name: str
    rows: int
    format_answer: Callable[[Any, Sequence[str]], Any]
    number: str = "idx"


def _index(value: int, labels: Sequence[str]) -> int:
    return value


def _label(value: int, labels: Sequence[str]) -> str:
    return labels[value]


def _lowercase_label(value: int, labels: Sequence[str]) -> str:
    return labels[value].lower()


def _referent(value: int, labels: Sequence[str]) -> str:
    return ("False", "True")[value]  # WSC's labels are capitalised, those of BoolQ and WiC are not


def _similarity(value: float | int, labels: Sequence[str]) -> str:
    return f"{min(max(value, 0.0), 5.0):.3f}"


def _text(value: str, labels: Sequence[str]) -> str:
    return value


FILES = {
    "glue_cola": ServerFile("CoLA.tsv", 1_063, _index),
    "glue_sst2": ServerFile("SST-2.tsv", 1_821, _index),
    "glue_mrpc": ServerFile("MRPC.tsv", 1_725, _index),
    "glue_qqp": ServerFile("QQP.tsv", 390_965, _index),
    "glue_stsb": ServerFile("STS-B.tsv", 1_379, _similarity),
    "glue_mnli_matched": ServerFile("MNLI-m.tsv", 9_796, _label),
    "glue_mnli_mismatched": ServerFile("MNLI-mm.tsv", 9_847, _label),
    "glue_qnli": ServerFile("QNLI.tsv", 5_463, _label),
    "glue_rte": ServerFile("RTE.tsv", 3_000, _label),
    "glue_wnli": ServerFile("WNLI.tsv", 146, _index),
    "glue_ax": ServerFile("AX.tsv", 1_104, _label),
    "super_glue_boolq": ServerFile("BoolQ.jsonl", 3_245, _lowercase_label),
    "super_glue_cb": ServerFile("CB.jsonl", 250, _label),
    "super_glue_copa": ServerFile("COPA.jsonl", 500, _index),
    "super_glue_multirc": ServerFile("MultiRC.jsonl", 9_693, _index, "idx/answer"),
    "super_glue_record": ServerFile("ReCoRD.jsonl", 10_000, _text, "idx/query"),
    "super_glue_rte": ServerFile("RTE.jsonl", 3_000, _label),
    "super_glue_wic": ServerFile("WiC.jsonl", 1_400, _lowercase_label),
    "super_glue_wsc": ServerFile("WSC.jsonl", 146, _referent),
    "super_glue_axb": ServerFile("AX-b.jsonl", 1_104, _label),
    "super_glue_axg": ServerFile("AX-g.jsonl", 356, _label),
}


def server_file(task: str, split: str) -> ServerFile | None:
    """Returns the file for a task, whatever its wording and version; None if no server takes the task."""
    match = re.fullmatch(r"(?:mt5_|byt5_)?(?:taskless_|task_index_)?((?:super_)?glue_\w+?)_v\d+(?:_\w+)?", task)
    name = match[1] if match else ""
    if name == "glue_mnli":  # the split is test_matched or test_mismatched
        name += "_" + split.removeprefix("test_")
    return FILES.get(name)


def start_submission(folder: str, tasks: Mapping[str, Batches], split: str) -> dict[str, ServerFile]:
    """Makes the folder of a submission, and returns the file that each task will be written to.

    Tasks that no server takes are skipped, with a line on stderr.

    Raises:
      ValueError: no server takes any of the tasks, two tasks would write the same file, the examples of a task have no
        index, or the folder cannot be made.
    """
    files = {task: file for task in tasks if (file := server_file(task, split))}
    others = ", ".join(task for task in tasks if task not in files)
    if not files:
        raise SettingError(
            f"no server takes {split} of {others}: set ",
            Setting("mixture_or_task_name"),
            " to tasks of GLUE or SuperGLUE, such as super_glue_boolq_v102, and ",
            Setting("eval_split"),
            " to their test split",
        )
    for name, count in collections.Counter(file.name for file in files.values()).items():
        if count > 1:
            raise SettingError(
                f"{count} tasks would write {name}: set ", Setting("mixture_or_task_name"), " to tasks of one wording"
            )
    for task, file in files.items():
        if file.number not in tasks[task].examples.fields[0]:
            raise SettingError(
                f"the examples of {task} have no field {file.number}, expected their index in the test set, which "
                f"{file.name} needs: set ",
                Setting("mixture_or_task_name"),
                " to a task that has it",
            )
    if others:
        print(f"no server takes {others}: left out", file=sys.stderr)
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot write to {folder} ({error.strerror}): set --submission to a folder") from None
    return files


def write_file(
    folder: Path, file: ServerFile, task: str, examples: Examples, predictions: Predictions
) -> dict[str, Any]:
    """Writes the predictions of one task.

    An invalid answer is replaced by the task's most frequent valid answer, or by the first label if none is valid. A
    line on stderr reports how many were replaced.

    Returns:
      "file", the path; "task"; "rows", the number of predictions; and "no_label", the number of invalid answers.
    """
    values = [value["value"] if isinstance(value, Mapping) else value for value in predictions.answers]
    valid = [value for value in values if not postprocessors.is_no_label(value)]
    # Among equally frequent answers, `most_common` returns the first one in the split.
    fallback = collections.Counter(valid).most_common(1)[0][0] if valid else 0
    labels = postprocessors.answers(examples.postprocess) or ()
    written = [file.format_answer(fallback if postprocessors.is_no_label(value) else value, labels) for value in values]
    invalid = len(values) - len(valid)
    if invalid:
        most_frequent = ", ".join(f"{text!r} {count} times" for text, count in predictions.no_label().most_common(3))
        print(
            f"{file.name}: {invalid} of {len(values)} answers are no label ({most_frequent}), written as "
            f"{file.format_answer(fallback, labels)}",
            file=sys.stderr,
        )
    if file.name == "MultiRC.jsonl":
        lines, count = _nested(examples.fields, written)
    else:
        rows = sorted(
            {fields[file.number]: word for fields, word in zip(examples.fields, written, strict=True)}.items()
        )
        count = len(rows)
        if file.name.endswith(".tsv"):
            lines = ["index\tprediction", *(f"{number}\t{word}" for number, word in rows)]
        else:
            lines = [json.dumps({"idx": number, "label": word}) for number, word in rows]
    if count != file.rows:
        print(f"{file.name}: {count} rows, but the server expects the {file.rows} of its test set", file=sys.stderr)
    write_text(folder / file.name, "".join(f"{line}\n" for line in lines))
    return {"file": str(folder / file.name), "task": task, "rows": count, "no_label": invalid}


def _nested(fields: Sequence[Mapping[str, Any]], labels: Sequence[int]) -> tuple[list[str], int]:
    """Returns the lines of MultiRC's file, and the number of answers.

    A line has a passage with all its questions and their answers.
    """
    numbers = [tuple(row[f"idx/{name}"] for name in ("paragraph", "question", "answer")) for row in fields]
    passages: dict[int, dict[int, list[dict[str, int]]]] = {}
    for (passage, question, answer), label in sorted(dict(zip(numbers, labels, strict=True)).items()):
        passages.setdefault(passage, {}).setdefault(question, []).append({"idx": answer, "label": label})
    lines = [
        json.dumps(
            {
                "idx": passage,
                "passage": {
                    "questions": [{"idx": number, "answers": answers} for number, answers in questions.items()]
                },
            }
        )
        for passage, questions in passages.items()
    ]
    return lines, len(set(numbers))
