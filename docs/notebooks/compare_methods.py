# %% [markdown]
# # Compare methods
#
# To use another method, give another object to `train`; everything else stays the same. A fair comparison gives each
# method the same rows, the same steps and the same number of learning rates. It also needs several seeds. This notebook
# has only one seed, so its numbers do not show which method is best.

# %%
import time

import matplotlib.pyplot as plt
import optax

import prompt_tuning_jax as pt
from prompt_tuning_jax.tasks.reviews import Reviews

reviews = Reviews()
train, validation = list(reviews.rows("train")), list(reviews.rows("validation"))[:200]
labels = list(reviews.labels)
model = pt.load("nano")
options = {"labels": labels, "lengths": {"inputs": 48, "targets": 8}, "steps": 60, "batch_size": 8, "eval_every": 20}

# %% [markdown]
# Prompts need larger learning rates than weights, so each method has its own two learning rates.

# %%
start = pt.init.ClassLabels(labels)
trials = {
    "prompt tuning": (pt.PromptTuning(length=20, init=start), (0.1, 0.3)),
    "low rank": (pt.LowRankPrompt(length=20, rank=4), (0.1, 0.3)),
    "LoRA": (pt.LoRA(rank=4), (0.003, 0.01)),
    "IA3": (pt.IA3(), (0.003, 0.01)),
}
found = {}
for name, (method, rates) in trials.items():
    for rate in rates:
        curve = []
        began = time.perf_counter()
        result = pt.train(
            model,
            method,
            train,
            validation,
            optimizer=optax.adamw(rate),
            on_record=curve.append,
            progress=False,
            **options,
        )
        found[name, rate] = result, [record for record in curve if record["split"] == "eval"]
        print(f"{name:14} {rate:<6} {result.metrics['accuracy']:6.1f} {time.perf_counter() - began:5.0f} s")

# %% [markdown]
# ## The best learning rate of each method

# %%
best = {
    name: max((found[name, rate] for rate in rates), key=lambda one: one[0].metrics["accuracy"])
    for name, (_, rates) in trials.items()
}
print(f"{'method':14} {'accuracy':>8} {'trained numbers':>16}  folds into one prompt")
for name, (result, _) in best.items():
    folds = result.prompt is not None and result.prompt.ndim == 2
    print(f"{name:14} {result.metrics['accuracy']:8.1f} {result.trainable_parameters:16,}  {'yes' if folds else 'no'}")

# %%
figure, axis = plt.subplots(figsize=(6, 3.2), layout="constrained")
for name, (_, curve) in best.items():
    axis.plot([record["step"] for record in curve], [record["accuracy"] for record in curve], "o-", label=name)
axis.set(xlabel="step", ylabel="accuracy on 200 rows", ylim=(0, 102))
axis.legend()
figure.savefig("methods.png")

# %% [markdown]
# ## What each method saves
#
# A prompt is saved as one matrix, and one batch may mix the prompts of many tasks. LoRA and IA3 are saved as PEFT's
# adapter folders, and can be merged into the model.

# %%
best["low rank"][0].save("low_rank.npy")
best["LoRA"][0].save("lora")
merged = best["LoRA"][0].merged()
print(merged)
assert pt.evaluate(merged, validation, labels=labels)["accuracy"] > 0
