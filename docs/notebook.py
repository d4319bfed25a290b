"""What a researcher writes in a notebook, with no gin and no files. It must run unchanged on the embedded base.

    python notebook.py [FOLDER]        # about two minutes on 2 CPU cores; prints one line per method

The names used here are the public API. Everything else is for you to shape.
"""

import dataclasses
import sys
import threading

import jax.numpy as jnp
import numpy as np
import optax

import prompt_tuning_jax as pt

folder = sys.argv[1] if len(sys.argv) > 1 else "runs/notebook"
labels = ["negative", "positive"]
words = {
    "positive": "wonderful touching brilliant joyful charming moving superb delightful".split(),
    "negative": "dull clumsy awful boring tedious pointless stale lifeless".split(),
}
nouns = "film story cast script ending plot music dialogue".split()
rows = [
    {"inputs": f"sentence: the {noun} is {word}", "targets": label}
    for label in labels
    for word in words[label]
    for noun in nouns
]
np.random.default_rng(0).shuffle(rows)
train, validation = rows[:96], rows[96:]

# A base model knows its own size, tokenizer and fingerprint.
model = pt.load("nano")
print(model)

# Train a prompt on rows in memory, with any optax optimiser. Nothing is written unless `folder` is given.
options = dict(labels=labels, steps=60, batch_size=16, eval_every=20, seed=0)
records = []
result = pt.train(
    model,
    pt.PromptTuning(length=20, init=pt.init.ClassLabels(labels)),
    train,
    validation,
    optimizer=optax.adamw(0.05),
    on_record=records.append,
    **options,
)
assert result.prompt.shape == (20, model.config.emb_dim) and result.prompt.dtype == np.float32
assert any("loss" in record for record in records) and any("accuracy" in record for record in records)
print("PromptTuning", result.trainable_parameters, result.metrics)

# Metrics of the same prompt, evaluated again, and the base model alone.
again = pt.evaluate(model, validation, prompt=result.prompt, labels=labels)
assert again["accuracy"] == result.metrics["accuracy"], (again, result.metrics)
print("base model alone", pt.evaluate(model, validation, labels=labels))

# Many prompts on one frozen model, mixed in a batch.
predictor = pt.Predictor(model, {"sentiment": result.prompt, "noise": np.zeros((3, model.config.emb_dim), np.float32)})
for answer in predictor.predict(
    [
        {"prompt": "sentiment", "inputs": "sentence: the scenery is superb", "labels": labels},
        {"prompt": "noise", "inputs": "sentence: the scenery is superb"},
    ]
):
    print(answer["prediction"], answer["score"])

# Another method is another object.
for method in (
    pt.ResidualPrompt(length=20, bottleneck=64),
    pt.PerLayerPrompt(length=5),
    pt.LoRA(rank=4),
    pt.IA3(),
    pt.ModelTuning(),
):
    other = pt.train(model, method, train, validation, optimizer=optax.adamw(0.003), **options)
    print(type(method).__name__, other.trainable_parameters, other.metrics)


# A method of one's own: this class is all it takes.
@dataclasses.dataclass(frozen=True)
class ScaledPrompt(pt.Method):
    """P' = scale * P + shift, one scale and one shift per feature."""

    length: int

    def init(self, key, model):
        start = pt.init.SampledVocabulary()(key, self.length, model)
        width = start.shape[1]
        return {"prompt": start, "scale": jnp.ones(width), "shift": jnp.zeros(width)}

    def apply(self, trained, frozen):
        return pt.Injection(prompt=trained["scale"] * trained["prompt"] + trained["shift"])


own = pt.train(model, ScaledPrompt(20), train, validation, optimizer=optax.adamw(0.05), folder=folder, **options)
print("ScaledPrompt", own.trainable_parameters, own.metrics)

# What is saved is what was evaluated: it folds into one [P, D] matrix, which the plain model runs with.
own.save(f"{folder}/scaled.npy")
folded = np.load(f"{folder}/scaled.npy")
assert np.array_equal(folded, own.prompt)
assert pt.evaluate(model, validation, prompt=folded, labels=labels)["accuracy"] == own.metrics["accuracy"]

# The same call resumes (here: is already done); another configuration in the same folder is refused.
same = pt.train(model, ScaledPrompt(20), train, validation, optimizer=optax.adamw(0.05), folder=folder, **options)
assert np.array_equal(same.prompt, own.prompt)
for change in (dict(seed=1), dict(batch_size=8)):
    try:
        pt.train(
            model, ScaledPrompt(20), train, validation, optimizer=optax.adamw(0.05), folder=folder, **(options | change)
        )
    except ValueError as error:
        print("refused:", error)
    else:
        raise AssertionError(f"a run with {change} went on in the folder of another")
try:
    pt.train(model, ScaledPrompt(20), train[:50], validation, optimizer=optax.adamw(0.05), folder=folder, **options)
except ValueError as error:
    print("refused:", error)
else:
    raise AssertionError("a run on other rows went on in the folder of another")

# It works in a thread: no signal handlers, no exits.
done = []
worker = threading.Thread(
    target=lambda: done.append(
        pt.train(
            model,
            pt.PromptTuning(length=5),
            train,
            validation,
            optimizer=optax.adamw(0.05),
            **(options | dict(steps=20)),
        )
    )
)
worker.start()
worker.join()
assert done and done[0].prompt.shape[0] == 5
assert "tensorflow" not in sys.modules, "rows in memory need no TensorFlow"
print("ok")
