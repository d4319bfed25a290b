# %% [markdown]
# # Mixed tasks and serving
#
# One frozen model answers rows of two tasks in the same batch, each row with the prompt of its task. Then an HTTP
# service does the same, which needs the extra `[serve]`.

# %%
import http.client
import itertools
import json
import random
import subprocess
import sys
import time
from pathlib import Path

import prompt_tuning_jax as pt
from prompt_tuning_jax.tasks.reviews import Reviews

model = pt.load("nano")
reviews = Reviews()
topics = {
    "film": "film movie actor director scene script plot camera screenplay sequel".split(),
    "food": "soup dinner cake bread meal cheese fish fruit sauce breakfast".split(),
}
adjectives = "awful boring dull lovely perfect terrible excellent wonderful strange famous".split()
sentences = [
    {"inputs": f"sentence: the {noun} was {adjective}", "targets": topic}
    for topic, nouns in topics.items()
    for noun, adjective in itertools.product(nouns, adjectives)
]
random.Random(0).shuffle(sentences)
tasks = {
    "sentiment": (list(reviews.rows("train")), list(reviews.rows("validation"))[:100], list(reviews.labels)),
    "topic": (sentences[:140], sentences[140:], list(topics)),
}

# %% [markdown]
# ## A prompt per task

# %%
Path("prompts").mkdir(exist_ok=True)
for name, (train, validation, labels) in tasks.items():
    method = pt.PromptTuning(length=10, init=pt.init.ClassLabels(labels))
    result = pt.train(
        model, method, train, validation, steps=80, batch_size=16, eval_every=40, labels=labels,
        lengths={"inputs": 48, "targets": 8}, progress=False,
    )  # fmt: skip
    result.save(f"prompts/{name}.npy")
    print(name, result.metrics)

# %% [markdown]
# ## One batch, two tasks
#
# Each row names its prompt. The prompts in one batch may have different tasks and lengths, and each row gets the same
# answer as it would get alone. If a row has `labels`, these are ranked, and each label gets a probability.

# %%
predictor = pt.Predictor(model, "prompts", input_length=48)
rows = [
    {"prompt": name, "inputs": row["inputs"], "targets": row["targets"]}
    for pair in zip(tasks["sentiment"][1][:20], tasks["topic"][1][:20], strict=True)
    for name, row in zip(tasks, pair, strict=True)
]
answers = list(predictor.predict(rows))
for name in tasks:
    own = [answer for answer in answers if answer["prompt"] == name]
    print(name, sum(answer["prediction"] == answer["targets"] for answer in own), "of", len(own), "right")
ranked = next(predictor.predict([rows[0] | {"labels": tasks["sentiment"][2]}]))
print(ranked["inputs"], ranked["probabilities"])

# %% [markdown]
# ## Over HTTP
#
# `serve` answers as soon as the model is loaded. With port 0, it chooses a free port and prints it.

# %%
server = subprocess.Popen(
    [sys.executable, "-m", "prompt_tuning_jax.serve", "--prompts=prompts", "--port=0", "--input_length=48"],
    stdout=subprocess.PIPE,
    text=True,
)
address = server.stdout.readline().split("//")[1].strip()
print("serving at", address)


def request(method, path, body=None):
    """Returns the status and the JSON of an answer."""
    connection = http.client.HTTPConnection(address, timeout=120)
    content = None if body is None else json.dumps(body)
    connection.request(method, path, content, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read() or "null")


# %%
status, answer = request("POST", "/v1/predict", {"rows": rows[:4]})
print(status)
for row in answer["rows"]:
    print(row["prompt"], "|", row["prediction"], "|", row["inputs"])
assert [row["prediction"] for row in answer["rows"]] == [one["prediction"] for one in answers[:4]]

# %% [markdown]
# If you put a prompt into the folder, it is served within about a second, without a restart.

# %%
Path("prompts/mood.npy").write_bytes(Path("prompts/sentiment.npy").read_bytes())
for _ in range(60):
    time.sleep(0.5)
    status, listed = request("GET", "/v1/prompts")
    if "mood" in json.dumps(listed):
        break
status, answer = request("POST", "/v1/predict", {"rows": [rows[0] | {"prompt": "mood"}]})
print(answer["rows"][0]["prompt"], answer["rows"][0]["prediction"])

# %%
server.terminate()
print("ended with", server.wait(timeout=60))
