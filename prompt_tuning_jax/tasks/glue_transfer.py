"""Registers zero-shot transfer between MRPC and QQP (paper, table 2): train on one, evaluate on the other.

The two tasks have different words for the same labels. A prompt answers with the words that it was trained on, and the
postprocessor translates them into the labels of the evaluated task.
"""

from prompt_tuning_jax.tasks.glue import CONFIGS, VERSIONS
from prompt_tuning_jax.tasks.register import WORDINGS, add_mixture, add_task

for _version in VERSIONS:
    for _target, _trained in (("mrpc", "qqp"), ("qqp", "mrpc")):
        _config = CONFIGS[_target]
        _name = f"glue_{_target}_from_{_trained}"
        add_task(
            f"{_name}_{_version}",
            _config.source(_target, ("validation",)),
            _config.text_format(),
            postprocess=_config.postprocess(translate=dict(zip(CONFIGS[_trained].labels, _config.labels, strict=True))),
            metrics=_config.metrics,
            wordings=WORDINGS,
            index=_config.number,
        )
        add_mixture(
            f"{_name}_zeroshot_{_version}",
            [f"glue_{_trained}_{_version}", f"{_name}_{_version}"],
            wordings=WORDINGS,
        )
