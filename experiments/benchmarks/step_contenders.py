"""Runs the contenders of `train_step`: this project's training step, and PEFT's, on the same weights and rows."""

import dataclasses
import functools
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.benchmarks.contenders import age, answer, deviation, peak_bytes, random_prompt, timed

Rows = list[tuple[np.ndarray, np.ndarray]]  # inputs [B, T] and targets [B, U] of each batch; 0 is padding

RATES = {"prompt": 0.3, "model": 1e-3}  # learning rates
MADE_IN_PLACE = ("large", "xl", "xxl")  # sizes whose random weights are made on the device, without a file


class Settings(NamedTuple):
    """Holds the settings of a contender.

    Attributes:
      contender: "ours" or "peft".
      folder: a folder with `prompt.npy`, `<contender>.npz` (inputs0, targets0, inputs1, ...) and, unless the size is
        MADE_IN_PLACE, `base`, a model in Hugging Face's layout.
      size: the model's size.
      mode: "prompt" to train a prompt, or "model" to train the model.
      prompt_length: P; 0 if the model is trained.
      dtype: "float32" or "bfloat16"; for PEFT also "autocast"; for this project also "int8", with bfloat16 activations.
      device: "cpu" or "default".
      threads: the number of cores.
      attention, remat_policy: settings of this project; see `T5Config`.
    """

    contender: str
    folder: str
    size: str
    mode: str
    prompt_length: int
    dtype: str
    device: str
    threads: int
    attention: str = "products"
    remat_policy: str = "none"

    def path(self, name: str) -> Path:
        return Path(self.folder, name)


class Ours:
    """This project's training step."""

    def __init__(self, settings: Settings, rows: Rows):
        import jax
        import jax.numpy as jnp

        from experiments.sizes import SIZES
        from prompt_tuning_jax.batches.loader import Batch
        from prompt_tuning_jax.methods.model_tuning import ModelTuning
        from prompt_tuning_jax.methods.prompt_tuning import PROMPT, PromptTuning
        from prompt_tuning_jax.t5.network import Transformer
        from prompt_tuning_jax.training.optimizer import adafactor
        from prompt_tuning_jax.training.step import TrainState, make_train_step

        self.import_seconds = age()
        self._jax, self._batches = jax, [Batch(*pair, np.arange(len(pair[0]), dtype=np.int32)) for pair in rows]
        changed = {
            "dtype": "bfloat16" if settings.dtype == "int8" else settings.dtype,
            "attention": settings.attention,
            "remat_policy": settings.remat_policy,
        }
        config, length = dataclasses.replace(SIZES[settings.size], **changed), settings.prompt_length
        params = self._base(settings)
        optimizer, method = adafactor(RATES[settings.mode]), PromptTuning(length) if length else ModelTuning()
        trained = {PROMPT: jnp.asarray(random_prompt(0, length, settings.size))} if length else params
        self._frozen = params if length else {}
        del params
        trainable = {path: jnp.array(trained.pop(path), jnp.float32) for path in list(trained)}
        key = jax.random.key_data(jax.random.key(0))
        self._state = TrainState(jnp.zeros((), jnp.int32), trainable, optimizer.init(trainable), key)
        self._train_step = make_train_step(Transformer(config), method, optimizer)
        self.platform, self.device = jax.default_backend(), jax.devices()[0].device_kind

    @staticmethod
    def _base(settings: Settings) -> dict[str, Any]:
        """Returns the base model's parameters: read from the folder, or random and made on the device, one by one."""
        import jax

        from experiments.sizes import SIZES
        from prompt_tuning_jax.checkpoints.base import expected_shapes, load_base
        from prompt_tuning_jax.t5.quantized import quantized

        config = SIZES[settings.size]
        dtype = settings.dtype if settings.mode == "prompt" else "float32"  # trained parameters are float32
        if settings.size not in MADE_IN_PLACE:
            return load_base(str(settings.path("base")), config, dtype).params

        @functools.partial(jax.jit, static_argnums=(1, 2))
        def draw(key: jax.Array, shape: tuple[int, ...], scale: float) -> jax.Array:
            return jax.random.normal(key, shape, "bfloat16" if dtype == "int8" else dtype) * scale

        shapes, params = expected_shapes(config), {}
        for key, (path, shape) in zip(jax.random.split(jax.random.key(0), len(shapes)), shapes.items(), strict=True):
            array = draw(key, shape, deviation(path, shape, config.head_dim))
            params |= quantized(path, array) if dtype == "int8" else {path: array}
        return params

    def step(self, number: int) -> float:
        """Does one update, and returns the loss in nats per target token."""
        self._state, metrics = self._train_step(self._state, self._frozen, self._batches[number])
        self._jax.block_until_ready(self._state)
        sums = self._jax.device_get(metrics.sums)
        return float((sums.loss - sums.z_loss) / sums.tokens)

    def peak(self) -> int:
        statistics = self._jax.devices()[0].memory_stats() if self.platform != "cpu" else None
        return statistics["peak_bytes_in_use"] if statistics else peak_bytes()

    def matmul(self, shape: tuple[int, int, int], dtype: str) -> Callable[[], object]:
        """Returns a function that computes a matmul of (rows, inner, columns)."""
        draw = functools.partial(self._jax.random.normal, self._jax.random.key(0), dtype=dtype)
        left, right = draw(shape[:2]), draw(shape[1:])
        multiply = self._jax.jit(lambda left, right: left @ right)
        return lambda: multiply(left, right).block_until_ready()


class Peft:
    """The training step that users of PEFT write, or of plain transformers if the whole model is trained."""

    def __init__(self, settings: Settings, rows: Rows):
        import torch
        from peft import PromptTuningConfig, TaskType, get_peft_model
        from transformers import T5ForConditionalGeneration
        from transformers.optimization import Adafactor

        self.import_seconds = age()
        self._torch = torch
        torch.set_num_threads(settings.threads)
        self.platform = "cuda" if settings.device == "default" and torch.cuda.is_available() else "cpu"
        self.device = torch.cuda.get_device_name() if self.platform == "cuda" else "cpu"
        self._autocast = settings.dtype == "autocast"
        dtype = torch.bfloat16 if settings.dtype == "bfloat16" else torch.float32
        if settings.size in MADE_IN_PLACE:
            model = self._random_model(settings.size, dtype)
        else:
            model = T5ForConditionalGeneration.from_pretrained(settings.path("base"), dtype=dtype, dropout_rate=0.0)
            model = model.to(self.platform)
        if settings.prompt_length:
            prompts = PromptTuningConfig(
                task_type=TaskType.SEQ_2_SEQ_LM, num_virtual_tokens=settings.prompt_length, prompt_tuning_init="RANDOM"
            )
            model = get_peft_model(model, prompts)
            prompt = torch.from_numpy(np.load(settings.path("prompt.npy")))
            with torch.no_grad():  # PEFT also has a prompt for the decoder, which it never reads
                model.get_parameter("prompt_encoder.default.embedding.weight")[: len(prompt)] = prompt
        self._model = model.train()
        parameters = [value for value in model.parameters() if value.requires_grad]
        fixed = {"scale_parameter": False, "relative_step": False, "warmup_init": False}
        decay = 1e-5 if settings.mode == "prompt" else 0.0
        self._optimizer = Adafactor(parameters, lr=RATES[settings.mode], weight_decay=decay, **fixed)
        self._batches = [self._batch(*pair) for pair in rows]

    def _random_model(self, size: str, dtype: Any) -> Any:
        """Returns a model with random weights, which are made on the device."""
        import transformers

        from experiments.sizes import SIZES

        ours, torch = SIZES[size], self._torch
        config = transformers.T5Config(
            vocab_size=ours.vocab_size,
            d_model=ours.emb_dim,
            d_kv=ours.head_dim,
            d_ff=ours.mlp_dim,
            num_layers=ours.num_encoder_layers,
            num_decoder_layers=ours.num_decoder_layers,
            num_heads=ours.num_heads,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
        )
        config.decoder_start_token_id = 0
        torch.set_default_dtype(dtype)
        with torch.device(self.platform):
            model = transformers.T5ForConditionalGeneration(config)
            # T5 1.1 does not tie the logits to the embedding, but transformers 5 always does, ignoring the
            # configuration.
            model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
        torch.set_default_dtype(torch.float32)
        return model

    def _batch(self, inputs: np.ndarray, targets: np.ndarray) -> dict[str, Any]:
        arrays = {
            "input_ids": inputs,
            "attention_mask": inputs > 0,
            "labels": np.where(targets > 0, targets, -100),  # torch's cross-entropy ignores -100
        }
        return {name: self._torch.from_numpy(array).long() for name, array in arrays.items()}

    def step(self, number: int) -> float:
        """Does one update, and returns the loss in nats per target token."""
        batch = {name: value.to(self.platform) for name, value in self._batches[number].items()}
        self._optimizer.zero_grad()
        with self._torch.autocast(self.platform, self._torch.bfloat16, enabled=self._autocast):
            loss = self._model(**batch).loss
        loss.backward()
        self._optimizer.step()
        return loss.item()

    def peak(self) -> int:
        return self._torch.cuda.max_memory_allocated() if self.platform == "cuda" else peak_bytes()

    def matmul(self, shape: tuple[int, int, int], dtype: str) -> Callable[[], object]:
        """Returns a function that computes a matmul of (rows, inner, columns)."""
        torch = self._torch
        draw = functools.partial(torch.randn, dtype=getattr(torch, dtype), device=self.platform)
        left, right = draw(shape[:2]), draw(shape[1:])

        def multiply() -> None:
            torch.mm(left, right)
            if self.platform == "cuda":
                torch.cuda.synchronize()

        return multiply


def contend(settings: Settings) -> None:
    """Runs a contender in its process. It answers `start`, `step NUMBER`, `peak` and `products`."""
    with np.load(settings.path(f"{settings.contender}.npz")) as arrays:
        rows = [(arrays[f"inputs{n}"], arrays[f"targets{n}"]) for n in range(len(arrays) // 2)]
    losses: list[float] = []
    try:
        contender = {"ours": Ours, "peft": Peft}[settings.contender](settings, rows)
        seconds = timed(lambda: losses.append(contender.step(0)))
    except RuntimeError as error:  # the errors of both frameworks are subclasses of it
        if not re.search("RESOURCE_EXHAUSTED|out of memory", str(error)):
            raise
        return answer(lambda line: None)
    started = {
        "platform": contender.platform,
        "device": contender.device,
        "import_seconds": contender.import_seconds,
        "start_to_first_step_seconds": age(),
        "first_step_seconds": seconds,
        "first_loss": losses[0],
    }

    def matmul_rates_of_run() -> dict[str, float]:
        from experiments.benchmarks.matmuls import matmul_rates, matmul_shapes
        from experiments.sizes import SIZES
        from prompt_tuning_jax.training.flop import StepShape

        inputs, targets = max(rows, key=lambda pair: pair[0].size)
        shape = StepShape(len(inputs), inputs.shape[1], targets.shape[1], settings.prompt_length)
        shapes = matmul_shapes(SIZES[settings.size], shape, contender.platform)
        dtypes = ["float32"] if settings.dtype == "float32" else ["float32", "bfloat16"]
        return matmul_rates(contender.matmul, shapes, dtypes)

    def respond(line: str) -> Any:
        what, *number = line.split()
        if what == "step":
            return timed(lambda: contender.step(int(*number)))
        return {"start": lambda: started, "peak": contender.peak, "products": matmul_rates_of_run}[what]()

    answer(respond)


if __name__ == "__main__":
    contend(Settings(**json.loads(sys.argv[1])))
