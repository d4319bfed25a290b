"""Gives short names to the checkpoints that T5X publishes, such as `t5x:t5_1_1_lm100k_base`.

Names and steps are from T5X's docs/models.md. The bucket is public.
"""

from prompt_tuning_jax.errors import Setting, SettingError, near_misses

PREFIX = "t5x:"
BUCKET = "gs://t5-data/pretrained_models/t5x"

_SIZES = ("small", "base", "large", "xl", "xxl")
_MILLION = dict.fromkeys(_SIZES, 1_000_000)
_STEPS = {
    "t5": {"small": 1_000_000, "base": 999_900, "large": 1_000_700, "3B": 1_000_000, "11B": 1_000_000},
    "t5_1_1": _MILLION,
    "t5_1_1_lm100k": dict.fromkeys(_SIZES, 1_100_000),
    "mt5": _MILLION,
    "byt5": _MILLION,
    "flan_t5": dict(zip(_SIZES, (1_198_000, 1_184_000, 1_164_000, 1_138_000, 1_114_000), strict=True)),
}
CHECKPOINTS = {
    f"{family}_{size}": f"{BUCKET}/{family}_{size}/checkpoint_{step}"
    for family, steps in _STEPS.items()
    for size, step in steps.items()
}


def t5x_url(text: str) -> str:
    """Returns the URL of a checkpoint that T5X publishes.

    Args:
      text: the checkpoint's short name, "t5x:NAME".

    Raises:
      SettingError: there is no such name.

    >>> t5x_url("t5x:t5_1_1_lm100k_base")
    'gs://t5-data/pretrained_models/t5x/t5_1_1_lm100k_base/checkpoint_1100000'
    """
    name = text.removeprefix(PREFIX)
    if name not in CHECKPOINTS:
        known = near_misses(name, CHECKPOINTS, few=len(CHECKPOINTS))
        raise SettingError(f"T5X publishes no {name!r}; {known}: set ", Setting("initial_checkpoint_path"))
    return CHECKPOINTS[name]
