"""Registers the ladder's four tasks as one mixture, for multi-task model tuning in figure 1 (figure_1_ladder.gin).

A run reads the same split from all tasks of a mixture. So this module defines the splits `train` and `validation` of
each task as the slices in gin_configs/sweeps/ladder.gin. `DATA_DIR` is the folder with glue/ and super_glue/.
"""

from prompt_tuning_jax.tasks import glue, super_glue  # noqa: F401  (they register the tasks used below)
from prompt_tuning_jax.tasks.derived import Splits, parts_of
from prompt_tuning_jax.tasks.register import WORDINGS, add_mixture, add_task

NAME = "ladder_mixture"
WHOLE = {"train": "train", "validation": "validation"}
SPLITS = {
    "glue_sst2_v200": {"train": "train[:-2000]", "validation": "train[-500:]"},
    "glue_rte_v200": WHOLE,
    "super_glue_cb_v102": WHOLE,
    "glue_mrpc_v200": {"train": "train[:-408]", "validation": "train[-408:]"},
}
# As in T5, rates are numbers of examples, but at most this many: SST-2 has over 200 times as many examples as CB, so
# without a limit a short run would hardly see CB.
LIMIT = 2_500
EXAMPLES = {"glue_sst2_v200": 65_349, "glue_rte_v200": 2_490, "super_glue_cb_v102": 250, "glue_mrpc_v200": 3_260}

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
