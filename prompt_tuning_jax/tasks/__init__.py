"""Defines the SeqIO tasks: their sources, text formats and vocabularies, and how answers are parsed and scored.

Only the modules that register tasks import TensorFlow. Vocabularies, postprocessors and metrics do not, so a run that
reads from the cache never loads TensorFlow. A run imports only the module of its task; see `module_for`.
"""

import re

# Maps the beginning of a task's name, without mt5_, byt5_, taskless_ and task_index_, to the module that registers the
# task. The first match counts. MIXTURE_OR_TASK_MODULE adds a user's own module.
_MODULES = {
    r"(super_)?glue_\w+_v\d+_(perceptron|generation|rank_classification)": "perceptron",
    r"pr:|c4_v220_random_positive_negative": "recycling",
    r"spot_": "spot",
    r"sentinel_": "sentinel",
    r"glue_(mrpc_from_qqp|qqp_from_mrpc)_": "glue_transfer",
    r"glue_": "glue",
    r"super_glue_|dpr_": "super_glue",
    r"squad_|mrqa_": "qa",
    r"xsum_|cnn_dailymail_": "summarization",
    r"c4_": "c4",
    r"imdb_reviews": "imdb",
    r"demo_": "demo",
    r"text_": "text",
}

# Modules that register tasks when imported.
TASK_MODULES = tuple(f"{__name__}.{module}" for module in dict.fromkeys(_MODULES.values()))


def module_for(name: str) -> str | None:
    """Returns the module that registers the task or mixture `name`, or None if this project has no such name."""
    stem = re.sub(r"^(mt5_|byt5_)?(taskless_|task_index_)?", "", name)
    for start, module in _MODULES.items():
        if re.match(start, stem):
            return f"{__name__}.{module}"
    return None
