"""Registers the ladder's three tasks as one mixture, for multi-task model tuning in figure 1 (figure_1_ladder.gin).

A run reads the same split from all tasks of a mixture. So this module defines the splits `train` and `validation` of
each task as the slices in gin_configs/sweeps/ladder.gin. `DATA_DIR` is the folder with glue/, imdb/ and
super_glue/.
"""

from prompt_tuning_jax.tasks import glue, imdb, super_glue  # noqa: F401  (they register the tasks used below)
from prompt_tuning_jax.tasks.derived import Splits, parts_of
from prompt_tuning_jax.tasks.register import WORDINGS, add_mixture, add_task

NAME = "ladder_mixture"
SPLITS = {
    "glue_sst2_v200": {"train": "train[:-2000]", "validation": "train[-500:]"},
    "imdb_reviews_v100": {"train": "train[:-2000]", "validation": "train[-500:]"},
    "super_glue_cb_v102": {"train": "train", "validation": "validation"},
}
# As in T5, rates are numbers of examples, but at most this many: SST-2 has over 200 times as many examples as CB, so
# without a limit a short run would hardly see CB.
LIMIT = 2_500
EXAMPLES = {"glue_sst2_v200": 65_349, "imdb_reviews_v100": 23_000, "super_glue_cb_v102": 250}

for _name, _splits in SPLITS.items():
    _parts = parts_of(_name)
    add_task(
        f"ladder_{_name}",
        Splits(_parts.source, _splits),
        _parts.text_format,
        postprocess=_parts.postprocess,
        metrics=_parts.metrics,
        wordings=WORDINGS[:1],
        suffixes=("",),
    )
add_mixture(
    NAME,
    {f"ladder_{_name}": float(min(_count, LIMIT)) for _name, _count in EXAMPLES.items()},
    wordings=WORDINGS[:1],
    suffixes=("",),
)
