"""Where the prompt lies on T5X's mesh (t5x/partitioning.py)."""

# Axes of the prompt that T5X's rules do not name. "embed" is not used for the second: a partitioner that splits it
# would leave no host with the whole prompt to write.
PROMPT_AXES = ("prompt", "prompt_embed")


def prompt_axis_rules() -> list[tuple[str, str | None]]:
    """For `partitioning.standard_logical_axis_rules(additional_rules=...)`: the prompt is whole on every device."""
    return [(axis, None) for axis in PROMPT_AXES]
