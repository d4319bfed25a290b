"""The features every task has: tokenised inputs and targets, each with an end of sequence."""

import seqio

from prompt_tuning_jax.tasks.vocabularies import EXTRA_IDS

# The vocabulary of T5 1.1's public checkpoints; it is read only when a task is used without VOCABULARY.
T5_VOCABULARY = "gs://t5-data/vocabs/cc_all.32000/sentencepiece.model"

FEATURES = {
    name: seqio.Feature(seqio.SentencePieceVocabulary(T5_VOCABULARY, extra_ids=EXTRA_IDS), add_eos=True)
    for name in ("inputs", "targets")
}
