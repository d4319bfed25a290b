"""Makes the rows of the SeqIO task `demo_reviews` without TensorFlow (see `demo` and `review_grammar`)."""

import dataclasses
from collections.abc import Sequence

from prompt_tuning_jax.errors import Setting, SettingError
from prompt_tuning_jax.tasks.review_grammar import LABELS, SPLIT_SIZES, sentences
from prompt_tuning_jax.tasks.rows import Row

NAME = "demo_reviews"


@dataclasses.dataclass(frozen=True)
class Reviews:
    """A `RowSource` of generated review sentences.

    Attributes:
      name: MIXTURE_OR_TASK_NAME, which must be "demo_reviews".
    """

    name: str = NAME

    def __post_init__(self):
        if self.name != NAME:
            raise SettingError(
                Setting("mixture_or_task_name"), f" is {self.name!r}, but runs/demo.gin trains on {NAME!r} alone: ",
                "use runs/prompt_tune.gin for other tasks",
            )  # fmt: skip

    @property
    def labels(self) -> Sequence[str]:
        return LABELS

    @property
    def metrics(self) -> Sequence[str]:
        return ("accuracy",)

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(SPLIT_SIZES)

    def rows(self, split: str) -> Sequence[Row]:
        return [
            {"inputs": f"sentence: {sentence.text}", "targets": LABELS[sentence.label], "idx": index}
            for index, sentence in enumerate(sentences(split))
        ]
