# %% [markdown]
# # Tune a prompt, and read it
#
# A prompt of 20 vectors in front of the input makes a frozen T5 solve a task. In this notebook we train the prompt, see
# what it changes, and look at the words that its positions are near. The model is the embedded model, `nano`, and the
# sentences are those of the demo.

# %%
import matplotlib.pyplot as plt
import numpy as np

import prompt_tuning_jax as pt
from prompt_tuning_jax.neighbors import neighbor_line
from prompt_tuning_jax.prompts.initializers import word_ids
from prompt_tuning_jax.prompts.nearest_words import make_lexicon, name_neighbors, nearest
from prompt_tuning_jax.tasks.reviews import Reviews

reviews = Reviews()
train, validation, unseen = (list(reviews.rows(split)) for split in ("train", "validation", "unseen_words"))
labels = list(reviews.labels)
for row in train[:3]:
    print(row["targets"], "|", row["inputs"])

# %% [markdown]
# ## The model alone
#
# The model was pre-trained on film reviews. If it only ranks the two labels, it is better than chance. If it generates
# an answer, the answer is never one of the labels.

# %%
model = pt.load("nano")
options = {"labels": labels, "lengths": {"inputs": 48, "targets": 8}}
alone = pt.evaluate(model, validation[:200], **options)
print("generated", alone["accuracy"], "ranked", alone["ranking"]["accuracy"])
print("what it says instead:", alone["no_label"])

# %% [markdown]
# ## Training
#
# `train` takes rows in memory. Without `optimizer`, it uses the paper's Adafactor with a learning rate of 0.3. It
# writes nothing unless you give it a `folder`.

# %%
records = []
result = pt.train(
    model,
    pt.PromptTuning(length=20, init=pt.init.ClassLabels(labels)),
    train,
    validation[:200],
    steps=120,
    batch_size=16,
    eval_every=20,
    log_every=20,
    seed=0,
    on_record=records.append,
    **options,
)
print(result.trainable_parameters, "trained numbers;", result.metrics, "at step", result.summary["best_step"])

# %%
evaluated = [record for record in records if record["split"] == "eval"]
trained = [record for record in records if record["split"] == "train"]
figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
left.plot([record["step"] for record in evaluated], [record["accuracy"] for record in evaluated], "o-")
left.axhline(alone["ranking"]["accuracy"], color="gray", linestyle="--", label="the model alone, ranked")
left.set(xlabel="step", ylabel="accuracy", ylim=(0, 102))
left.legend()
right.plot([record["step"] for record in trained], [record["loss"] for record in trained])
right.set(xlabel="step", ylabel="training loss per token")
figure.savefig("learning_curve.png")

# %% [markdown]
# ## Words that were not in the training sentences
#
# The sentences of `unseen` have sentiment words that no training sentence has. If the prompt had only memorised words,
# it would fail on these sentences.

# %%
print("unseen words", pt.evaluate(model, unseen[:200], prompt=result, **options)["accuracy"])

# %% [markdown]
# ## Reading the prompt
#
# For each position, this code prints the words of the frozen embedding table with the largest cosine (section 7 of the
# paper). `[negative]` and `[positive]` are the labels. On the command line, `python -m prompt_tuning_jax.neighbors RUN`
# prints the same.

# %%
words = word_ids(model.tokenizer, model.config.vocab_size)
table = np.asarray(model.embeddings)
lexicon = make_lexicon(table, words, model.tokenizer.piece, model.tokenizer.subwords, labels)
for position, neighbors in enumerate(name_neighbors(nearest(result.prompt[:8], lexicon, 5), lexicon)):
    print(neighbor_line(position, neighbors))

# %% [markdown]
# ## Saving the prompt
#
# The prompt is saved as one small file. A predictor that loads the file gives the same answers as here.

# %%
result.save("prompt.npy")
predictor = pt.Predictor(model, {"sentiment": "prompt.npy"})
for answer in predictor.predict(
    {"prompt": "sentiment", "inputs": f"sentence: {text}"} for text in ("a gripping story", "the plot fell flat")
):
    print(answer["prediction"], round(answer["score"], 3), "|", answer["inputs"])
