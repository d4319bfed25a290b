"""Measures how fast predictions are decoded, and compares it to PEFT with the same weights.

    python -m experiments.benchmarks.decode [--size=small] [--peer=peft] [--threads=2]

It writes random weights and a prompt, loads them in one process per contender, and lets the contenders decode the same
batch greedily, in turns. No contender can stop early: the weights never give the end of sequence, and PEFT is told how
many tokens to generate. The last line printed is one JSON object:

  ratio: examples per second, divided by PEFT's, from the medians;
  busy_elsewhere: cores that other processes kept busy in the meantime; see `train_step`;
  same_tokens: the fraction of tokens on which both agree (with random weights, rounding may change tokens);
  step_seconds: seconds per further token, by input length, from two target lengths;
  read_seconds: the part of `step_seconds` for reading the encoder's keys and values, measured alone. If a step does
    nothing else with the encoder's output, its time grows with the input length by no more than this.

Linux only.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from experiments.benchmarks.contenders import (
    CORES,
    EOS,
    Contender,
    medians,
    random_inputs,
    random_prompt,
    used_elsewhere,
    work,
    write_base,
)

LONGER = 4  # the ratio of the second input length and target length to the first


class Ours:
    """Greedy decoding by this project."""

    def __init__(self, folder: Path, size: str):
        import jax
        from flax.traverse_util import unflatten_dict

        from experiments.sizes import SIZES
        from prompt_tuning_jax.checkpoints.base import load_base
        from prompt_tuning_jax.prompts.peft import read_adapter
        from prompt_tuning_jax.t5.decoding import greedy
        from prompt_tuning_jax.t5.network import Transformer

        prompt = read_adapter(folder / "prompt")
        model = Transformer(SIZES[size])
        params = unflatten_dict(load_base(str(folder / "base"), SIZES[size]).params, sep="/")
        decode = jax.jit(
            lambda params, inputs, length, prompt: greedy(model, params, inputs, length, prompt=prompt)[0],
            static_argnums=2,
        )
        self.decode = lambda inputs, length: np.asarray(decode(params, inputs, length, prompt))

    @staticmethod
    def read(size: str, batch: int, length: int) -> Callable[[], object]:
        """Returns a function that only computes the cross-attention matmuls of one step."""
        import jax
        import jax.numpy as jnp

        from experiments.sizes import SIZES

        layers, heads, width = SIZES[size].num_decoder_layers, SIZES[size].num_heads, SIZES[size].head_dim
        draws = jax.random.split(jax.random.key(0), 2 * layers)
        keys_and_values = [jax.random.normal(draw, (batch, heads, length, width)) for draw in draws]

        @jax.jit
        def attend(query, arrays):
            for key, value in zip(arrays[::2], arrays[1::2], strict=True):
                weights = jax.nn.softmax(jnp.einsum("bhqd,bhkd->bhqk", query, key))
                query = query + jnp.einsum("bhqk,bhkd->bhqd", weights, value)
            return query

        return lambda: attend(jnp.ones((batch, heads, 1, width)), keys_and_values).block_until_ready()


class Peft:
    """Greedy decoding by PEFT, called in the usual way."""

    def __init__(self, folder: Path, size: str):
        del size
        import torch
        from peft import PeftModel
        from transformers import T5ForConditionalGeneration

        torch.set_num_threads(CORES)
        base = T5ForConditionalGeneration.from_pretrained(folder / "base")
        model = PeftModel.from_pretrained(base, str(folder / "prompt")).eval()

        def decode(inputs: np.ndarray, length: int) -> np.ndarray:
            tokens = torch.from_numpy(inputs).long()
            options = {"max_new_tokens": length, "min_new_tokens": length, "do_sample": False, "num_beams": 1}
            with torch.inference_mode():
                found = model.generate(input_ids=tokens, attention_mask=torch.ones_like(tokens), **options)
            return found[:, 1:].numpy()

        self.decode = decode


def contend(arguments: argparse.Namespace) -> None:
    """Runs a contender in its process. It answers lines `INPUT_LENGTH TARGET_LENGTH` and `read LENGTH`."""
    contender = {"ours": Ours, "peft": Peft}[arguments.contender](arguments.folder, arguments.size)

    def prepare(line: str) -> Callable[[], object]:
        first, second = line.split()
        if first == "read":
            return Ours.read(arguments.size, arguments.batch, int(second))
        inputs, length = random_inputs(arguments.batch, int(first)), int(second)
        tokens = contender.decode(inputs, length)
        assert tokens.shape == (arguments.batch, length) and not np.any(tokens == EOS)
        np.save(arguments.folder / f"{arguments.contender}-{first}-{second}.npy", tokens)
        return lambda: contender.decode(inputs, length)

    work(prepare)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="small")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--input-length", type=int, default=128)
    parser.add_argument("--target-length", type=int, default=8)
    parser.add_argument("--prompt-length", type=int, default=100)
    parser.add_argument("--peer", choices=["peft"], help="needs the extra [hf]")
    parser.add_argument("--threads", type=int, default=CORES)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.contender:
        return contend(arguments)
    names = ["ours", arguments.peer] if arguments.peer else ["ours"]
    inputs, targets = arguments.input_length, arguments.target_length
    record = {name: value for name, value in vars(arguments).items() if name not in ("contender", "folder")}
    from prompt_tuning_jax.prompts.peft import write_adapter

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_base(folder / "base", arguments.size)
        write_adapter(folder / "prompt", random_prompt(0, arguments.prompt_length, arguments.size))
        flags = [f"--size={arguments.size}", f"--batch={arguments.batch}", f"--folder={folder}"]
        contenders = {
            name: Contender(__spec__.name, [*flags, "--contender", name], arguments.threads) for name in names
        }
        lines = [(name, f"{inputs} {targets}") for name in names]
        before, began = used_elsewhere(contenders.values()), time.perf_counter()
        found = dict(zip(names, medians(contenders, lines, arguments.rounds), strict=True))
        elsewhere = (used_elsewhere(contenders.values()) - before) / (time.perf_counter() - began)
        record["busy_elsewhere"] = round(elsewhere, 3)
        record["seconds"] = {name: round(seconds, 4) for name, seconds in found.items()}
        if arguments.peer:
            contenders[arguments.peer].end()
            record["ratio"] = round(found[arguments.peer] / found["ours"], 3)
            answers = [np.load(folder / f"{name}-{inputs}-{targets}.npy") for name in names]
            record["same_tokens"] = round(float(np.mean(answers[0] == answers[1])), 4)

        lengths = (inputs, LONGER * inputs)
        decodes = [("ours", f"{length} {count}") for length in lengths for count in (targets, LONGER * targets)]
        reads = [("ours", f"read {arguments.prompt_length + length}") for length in lengths]
        short, short_more, long, long_more, *read = medians(contenders, [*decodes, *reads], arguments.rounds)
        steps = [(more - few) / (targets * (LONGER - 1)) for few, more in ((short, short_more), (long, long_more))]
        record["step_seconds"] = {length: round(value, 5) for length, value in zip(lengths, steps, strict=True)}
        record["read_seconds"] = {length: round(value, 5) for length, value in zip(lengths, read, strict=True)}
        contenders["ours"].end()
    print(json.dumps(record))


if __name__ == "__main__":
    main()
