"""Replicates the prompt on T5X's mesh (t5x/partitioning.py)."""

# The prompt's logical axes, which T5X's rules do not name. The second is not "embed": if a partitioner sharded that
# axis, no host would have the whole prompt to write.
PROMPT_AXES = ("prompt", "prompt_embed")


def prompt_axis_rules() -> list[tuple[str, str | None]]:
    """Returns `additional_rules` for `partitioning.standard_logical_axis_rules`: the prompt is replicated."""
    return [(axis, None) for axis in PROMPT_AXES]
