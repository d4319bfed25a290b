"""Measures batches whose rows belong to many tasks, and compares them to PEFT, which needs a sub-batch per task.

    python -m experiments.benchmarks.mixed_tasks [--size=small] [--peer=peft] [--threads=2]

Weights and prompts are random. The contenders predict the same batch in turns, with 1, 8 and 32 prompts. PEFT calls
`set_adapter` before each sub-batch. (It accepts `adapter_names` for a mixed batch without an error, but then uses the
active prompt for every row.) All contenders generate TARGET_LENGTH tokens per row: the weights never give the end of
sequence, and PEFT is told the number of tokens. The last line printed is one JSON object:

  cost: seconds divided by those with one prompt, by number of prompts;
  ratio: examples per second divided by PEFT's, by number of prompts;
  same_tokens: the fraction of tokens on which both agree, by number of prompts (with random weights, rounding may
    change tokens);
  bank: a bank with 1,000 prompts: their bytes, the growth of the process, and the milliseconds from adding a new prompt
    to the end of the first prediction with it, by the prediction's number of tokens (one row of 16 tokens; a label has
    2 tokens).

Linux only.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from experiments.benchmarks.contenders import (
    CORES,
    EOS,
    Contender,
    medians,
    random_inputs,
    random_prompt,
    work,
    write_base,
)

COUNTS = (1, 8, 32)
BANK = 1000
LABEL = 2  # tokens of a label with its end of sequence


def ours(arguments: argparse.Namespace) -> Callable[[int], np.ndarray]:
    """Returns a function that predicts the batch with a number of prompts in this project's `Predictor`, as tokens."""
    import jax

    predictor = make_predictor(load(arguments), arguments, arguments.target_length)
    for number in range(max(COUNTS)):
        predictor.bank.add(str(number), random_prompt(number, arguments.prompt_length, arguments.size))
    inputs = random_inputs(arguments.batch, arguments.input_length)

    def answer(count: int) -> np.ndarray:
        names = [str(row % count) for row in range(arguments.batch)]
        injection, mask, _ = predictor.bank.take(names, arguments.batch)
        generate = predictor._engine.greedy
        return jax.device_get(generate(injection, predictor._frozen, inputs, mask, arguments.target_length))[0]

    return answer


def load(arguments: argparse.Namespace) -> Any:
    """Loads the base model's parameters."""
    from experiments.sizes import SIZES
    from prompt_tuning_jax.checkpoints.base import load_base

    return load_base(str(arguments.folder / "base"), SIZES[arguments.size]).params


def make_predictor(params: Any, arguments: argparse.Namespace, tokens: int, bank: Any = None) -> Any:
    """Returns a predictor without prompts. Its inputs are token ids, so its vocabulary only counts tokens."""
    from types import SimpleNamespace

    from experiments.sizes import SIZES
    from prompt_tuning_jax.checkpoints.model import Model
    from prompt_tuning_jax.inference.bank import PromptBank
    from prompt_tuning_jax.inference.predictor import Predictor

    config: Any = SIZES[arguments.size]
    tokenizer: Any = SimpleNamespace(encode=lambda text: [3], decode=len, fingerprint="", pad_id=0, eos_id=EOS)
    predictor = Predictor(Model(None, config, params, tokenizer, ""), max_new_tokens=tokens)
    bank = bank if bank is not None else PromptBank(config.emb_dim)
    predictor.bank = bank
    return predictor


def peft(arguments: argparse.Namespace) -> Callable[[int], np.ndarray]:
    """Returns a function that predicts the batch with a number of prompts in PEFT, by its public API."""
    import torch
    from peft import PeftModel
    from transformers import T5ForConditionalGeneration

    torch.set_num_threads(CORES)
    base = T5ForConditionalGeneration.from_pretrained(arguments.folder / "base")
    model = PeftModel.from_pretrained(base, str(arguments.folder / "0"), adapter_name="0")
    for number in range(1, max(COUNTS)):
        model.load_adapter(str(arguments.folder / str(number)), adapter_name=str(number))
    model.eval()
    tokens = torch.from_numpy(random_inputs(arguments.batch, arguments.input_length)).long()
    length = arguments.target_length
    options = {"max_new_tokens": length, "min_new_tokens": length, "do_sample": False, "num_beams": 1}

    def answer(count: int) -> np.ndarray:
        found = np.zeros((len(tokens), length), np.int32)
        with torch.inference_mode():
            for number in range(min(count, len(tokens))):
                rows = torch.arange(number, len(tokens), count)
                model.set_adapter(str(number))
                part = tokens[rows]
                written = model.generate(input_ids=part, attention_mask=torch.ones_like(part), **options)
                found[rows.numpy()] = written[:, 1:].numpy()
        return found

    return answer


def contend(arguments: argparse.Namespace) -> None:
    """Runs a contender in its process. Each line that it answers is a number of prompts, or `bank`."""
    answer = {"ours": ours, "peft": peft}[arguments.contender](arguments)

    def prepare(line: str) -> Callable[[], object]:
        tokens = answer(int(line))
        assert tokens.shape == (arguments.batch, arguments.target_length) and not np.any(tokens == EOS)
        np.save(arguments.folder / f"{arguments.contender}-{line}.npy", tokens)
        return lambda: answer(int(line))

    work(prepare)


def resident() -> int:
    """Returns the bytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def measure_bank(arguments: argparse.Namespace) -> None:
    """Measures a bank of 1,000 prompts. It must run in its own process, whose memory is measured."""
    from prompt_tuning_jax.inference.requests import Request

    params = load(arguments)
    before = resident()
    first = make_predictor(params, arguments, LABEL)
    bank = first.bank
    second = make_predictor(params, arguments, arguments.target_length, bank)
    predictors = {LABEL: first, arguments.target_length: second}

    def ask(name: str, tokens: int) -> None:
        inputs = np.arange(2, 18, dtype=np.int32)
        request = Request(name, inputs, False, "greedy", (), None, 0.0, 0, 1.0, 0)
        assert predictors[tokens].answer([request])[0]["prediction"] == tokens

    def prompt(number: int) -> np.ndarray:
        return random_prompt(number, arguments.prompt_length, arguments.size)

    late = range(BANK - 20, BANK)
    for number in range(late[0]):
        bank.add(str(number), prompt(number))
    grown = resident() - before
    times = {}
    for tokens in predictors:
        ask("0", tokens)  # compiled
        times[tokens] = []
        for number in late:
            values = prompt(number)
            start = time.perf_counter()
            bank.add(str(number), values)
            ask(str(number), tokens)
            times[tokens].append(time.perf_counter() - start)
    found = {
        "prompts": len(bank),
        "array_mb": round(bank.nbytes / 1e6, 1),
        "grown_mb": round(grown / 1e6, 1),
        "first_answer_ms": {tokens: round(1e3 * statistics.median(seconds), 1) for tokens, seconds in times.items()},
    }
    print(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="small")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--input-length", type=int, default=128)
    parser.add_argument("--target-length", type=int, default=8)
    parser.add_argument("--prompt-length", type=int, default=100)
    parser.add_argument("--peer", choices=["peft"], help="needs the extra [hf]")
    parser.add_argument("--threads", type=int, default=CORES)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.contender:
        return measure_bank(arguments) if arguments.contender == "bank" else contend(arguments)
    record: dict[str, Any] = {n: value for n, value in vars(arguments).items() if n not in ("contender", "folder")}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        from prompt_tuning_jax.prompts.peft import write_adapter

        write_base(folder / "base", arguments.size)
        for number in range(max(COUNTS)):
            write_adapter(folder / str(number), random_prompt(number, arguments.prompt_length, arguments.size))
        flags = ["size", "batch", "input_length", "target_length", "prompt_length"]
        given = [f"--{flag.replace('_', '-')}={getattr(arguments, flag)}" for flag in flags] + [f"--folder={folder}"]
        names = ["ours", arguments.peer] if arguments.peer else ["ours"]
        contenders = {
            name: Contender(__spec__.name, [*given, "--contender", name], arguments.threads) for name in names
        }
        lines = [(name, str(count)) for count in COUNTS for name in names]
        found = dict(zip(lines, medians(contenders, lines, arguments.rounds), strict=True))
        for name in names[1:]:
            contenders[name].end()
        # Measure the cost of many prompts without the peer's work in between.
        own = medians(contenders, [("ours", str(count)) for count in COUNTS], 2 * arguments.rounds)
        contenders["ours"].end()
        record["seconds"] = {name: {count: round(found[name, str(count)], 4) for count in COUNTS} for name in names}
        record["cost"] = {count: round(seconds / own[0], 3) for count, seconds in zip(COUNTS, own, strict=True)}
        if arguments.peer:
            record["ratio"] = {
                count: round(found[arguments.peer, str(count)] / found["ours", str(count)], 3) for count in COUNTS
            }
            answers = {(name, count): np.load(folder / f"{name}-{count}.npy") for name, count in lines}
            record["same_tokens"] = {
                count: round(float(np.mean(answers["ours", str(count)] == answers[arguments.peer, str(count)])), 4)
                for count in COUNTS
            }
        command = [sys.executable, "-m", __spec__.name, *given, "--contender", "bank"]
        record["bank"] = json.loads(subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE).stdout)
    print(json.dumps(record))


if __name__ == "__main__":
    main()
