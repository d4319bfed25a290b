"""Registers variants of GLUE, SuperGLUE and IMDB whose targets begin with `<extra_id_0>` ("<extra_id_0> positive").

This is the ablation of section 2.2: a model that was trained only on span corruption begins every answer with a
sentinel, and may do better if the targets do too. `taskless_sentinel_glue_sst2_v200` is the variant of
`taskless_glue_sst2_v200`.
"""

from prompt_tuning_jax.tasks import glue, imdb, super_glue  # noqa: F401  (imdb registers the task used below)
from prompt_tuning_jax.tasks.derived import parts_of, wrapped
from prompt_tuning_jax.tasks.preprocessors import prepend_sentinel
from prompt_tuning_jax.tasks.register import WORDINGS, add_mixture, add_task
from prompt_tuning_jax.tasks.wrapped_postprocessors import SENTINEL, after_sentinel

# The task's number, for `task_index_`; None for IMDB, whose inputs do not begin with the task's name.
NUMBERS: dict[str, int | None] = (
    {f"glue_{name}_v200": config.number for name, config in glue.CONFIGS.items()}
    | {f"super_glue_{name}_v102": config.number for name, config in super_glue.CONFIGS.items()}
    | {f"super_glue_wsc_v102_simple_{end}": super_glue.WSC_NUMBER for end in ("train", "eval")}
    | {"imdb_reviews_v100": None}
)

for _name, _number in NUMBERS.items():
    _parts = parts_of(_name)
    _answers = {"translate": {f"{SENTINEL} {label}": label for label in _parts.labels}} if _parts.labels else {}
    add_task(
        f"sentinel_{_name}",
        _parts.source,
        _parts.text_format,
        postprocess=wrapped(after_sentinel, _parts.postprocess, **_answers),
        metrics=_parts.metrics,
        wordings=WORDINGS if _number is not None else WORDINGS[:1],
        index=_number,
        suffixes=("",),
        after_tokens=[prepend_sentinel("targets", 0)],
    )

for _name, _tasks in {
    "glue_mnli_and_dev_v200": ("glue_mnli_v200", "glue_mnli_matched_v200", "glue_mnli_mismatched_v200"),
    "super_glue_wsc_and_dev_v102_simple": ("super_glue_wsc_v102_simple_train", "super_glue_wsc_v102_simple_eval"),
}.items():
    add_mixture(f"sentinel_{_name}", [f"sentinel_{_task}" for _task in _tasks], wordings=WORDINGS, suffixes=("",))
