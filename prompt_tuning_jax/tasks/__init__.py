"""SeqIO tasks: sources, text formats, vocabularies, and how an answer is read and scored.

Only the modules that register tasks import TensorFlow; vocabularies, postprocessors and metrics do not, so that a run
fed from a cache never loads it.
"""

# Modules that register tasks when imported; MIXTURE_OR_TASK_MODULE adds a user's own.
TASK_MODULES = (
    "prompt_tuning_jax.tasks.glue",
    "prompt_tuning_jax.tasks.imdb",
    "prompt_tuning_jax.tasks.demo",
    "prompt_tuning_jax.tasks.text",
)
