"""The benchmarks' own arithmetic and page; what they measure is nothing that a test could hold fast."""

import argparse
import json
import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from tiny import ROOT
from torch.utils.flop_counter import FlopCounterMode

from experiments.benchmarks import page
from experiments.benchmarks.matmuls import matmul_rates
from experiments.benchmarks.train_step import compare_to_matmuls, figures, in_any_order
from experiments.sizes import SIZES
from prompt_tuning_jax.batches.loader import Batch
from prompt_tuning_jax.checkpoints.base import expected_shapes
from prompt_tuning_jax.methods.method import Injection
from prompt_tuning_jax.t5.config import T5Config
from prompt_tuning_jax.t5.network import Transformer
from prompt_tuning_jax.training.flop import PEAKS, StepShape, step_flop
from prompt_tuning_jax.training.step import batch_loss

CONFIG = T5Config(512, 128, 4, 1, 2, 256, head_dim=24)


def flop_in_torch(config, shape):
    """FLOP of the matmuls that PyTorch does for a step of the transformers model, counted as it does them."""
    theirs = transformers.T5Config(
        vocab_size=config.vocab_size,
        d_model=config.emb_dim,
        d_kv=config.head_dim,
        d_ff=config.mlp_dim,
        num_layers=config.num_encoder_layers,
        num_decoder_layers=config.num_decoder_layers,
        num_heads=config.num_heads,
        feed_forward_proj="gated-gelu",
    )
    theirs.decoder_start_token_id, theirs._attn_implementation = 0, "eager"
    model = transformers.T5ForConditionalGeneration(theirs)
    inputs, targets = (torch.ones(shape.batch, length, dtype=torch.long) for length in (shape.inputs, shape.targets))
    embedded = model.shared(inputs)
    if shape.prompt:
        prompt = torch.zeros(shape.batch, shape.prompt, config.emb_dim, requires_grad=True)
        embedded = torch.cat([prompt, embedded.detach()], dim=1)
        model.requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        model(inputs_embeds=embedded, labels=targets).loss.backward()
    return counter.get_total_flops()


def flop_in_xla(config, shape):
    """FLOP of the compiled loss and its gradients, the arithmetic between the products included."""
    params = {path: jnp.zeros(found) for path, found in expected_shapes(config).items()}
    prompt, model = jnp.zeros((shape.prompt, config.emb_dim)), Transformer(config)
    injection, frozen = (Injection(prompt), params) if shape.prompt else (Injection(parameters=params), {})
    tokens = [jnp.ones((shape.batch, length), jnp.int32) for length in (shape.inputs, shape.targets)]
    loss = jax.value_and_grad(lambda given, kept, *pair: batch_loss(model, given, kept, *pair).loss)
    analysis = jax.jit(loss).lower(injection, frozen, *tokens).compile().cost_analysis()
    assert analysis
    return analysis["flops"]


@pytest.mark.parametrize("shape", [StepShape(3, 40, 8, 24), StepShape(2, 12, 20, 40), StepShape(2, 30, 9, 0)])
def test_the_formula_counts_every_product(shape):
    """Without a prompt, the model is trained."""
    assert step_flop(CONFIG, shape, trains_model=not shape.prompt) == flop_in_torch(CONFIG, shape)


@pytest.mark.parametrize("shape", [StepShape(3, 40, 8, 24), StepShape(2, 30, 9, 0)])
def test_the_program_does_these_products_and_little_else(shape):
    assert 1.0 < flop_in_xla(CONFIG, shape) / step_flop(CONFIG, shape, trains_model=not shape.prompt) < 1.03


def test_prompt_tuning_is_two_thirds_of_model_tuning():
    """At the paper's lengths, and where there is no prompt to make the sequence longer for one of them."""
    shape = StepShape(32, 228, 8, 0)
    prompt, model = (step_flop(SIZES["small"], shape, trains_model=trains) for trains in (False, True))
    assert prompt == step_flop(SIZES["small"], StepShape(32, 128, 8, 100), trains_model=False)
    assert 2 / 3 < prompt / model < 0.7


def asked(**changed):
    return argparse.Namespace(**{"size": "nano", "mode": "prompt", "prompt_length": 5, "lengths": "fixed"} | changed)


def test_rates_and_shares():
    rows = [(np.ones((4, 6), np.int32), np.ones((4, 2), np.int32))]
    flop = step_flop(SIZES["nano"], StepShape(4, 6, 2, 5), trains_model=False)
    found = figures([1.0, 2.0, 9.0], rows, asked())
    assert found["examples_per_second"] == 2.0
    assert found["flop_per_second"] == flop / 2.0
    shares = compare_to_matmuls(found, {"slow": flop / 10, "fast": 2.0 * flop})
    assert shares["product_flop_per_second"] == 2.0 * flop
    assert shares["roofline_share"] == 0.25 and "mfu" not in shares
    on_a_card = compare_to_matmuls(found | {"device": "NVIDIA H200"}, {"fast": 2.0 * flop})
    assert on_a_card["mfu"] == flop / 2.0 / PEAKS["NVIDIA H200"]


def test_rows_of_other_lengths_count_by_their_sum():
    """Each step is on a batch of its own, and the last has a row without an example."""
    rows = [(np.ones((2, width), np.int32), np.ones((2, 2), np.int32)) for width in (3, 7)]
    rows[1][0][1] = 0
    found = figures([1.0, 2.0], rows, asked(mode="model", lengths="rte"))
    assert found["examples_per_second"] == pytest.approx(1.0)
    assert found["tokens"] == {"read": 6 + 7, "padded": 6 + 14}
    flop = [step_flop(SIZES["nano"], StepShape(2, width, 2, 0), trains_model=True) for width in (3, 7)]
    assert found["flop"] == sum(flop) / 2


def test_the_peer_has_the_same_rows():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 9, (5, 4))
    lengths[4, 3] = 0  # no example
    batches = [
        Batch(
            np.where(np.arange(16) < row_lengths[:, None], rng.integers(2, 99, (4, 16)), 0).astype(np.int32),
            np.where(row_lengths[:, None] > 0, [[7, 1, 0]], 0).astype(np.int32),
            np.where(row_lengths > 0, 0, -1).astype(np.int32),
        )
        for row_lengths in lengths
    ]

    def rows(pairs):
        return sorted(tuple(row[row > 0]) for inputs, _ in pairs for row in inputs if row.any())

    others = in_any_order(batches, 4)
    assert rows(others) == rows((batch.inputs, batch.targets) for batch in batches)
    assert [len(inputs) for inputs, _ in others] == [4, 4, 4, 4, 3]
    for inputs, targets in others:
        assert inputs[:, -1].any() and targets.shape[1] == 2


def test_rates_of_products():
    def make(shape, dtype):
        left, right = np.ones(shape[:2], dtype), np.ones(shape[1:], dtype)
        return lambda: left @ right

    rates = matmul_rates(make, [(64, 32, 16)], ["float32", "float64"])
    assert rates.keys() == {"float32 64x32x16", "float64 64x32x16"}
    assert all(1e6 < rate < 1e15 for rate in rates.values())


STORED = {
    "decode": {
        "command": "python -m experiments.benchmarks.decode --peer=peft",
        "date": "2020-01-02",
        "machine": {"CPU": "another one, 64 cores"},
        "record": {"peer": "peft", "batch": 32, "seconds": {"ours": 8.0, "peft": 16.0}, "ratio": 2.0},
    }
}
DECODE = "| 4.00 | 2.00 | 2.00 | ratio ≥ 1 |"


@pytest.fixture
def write_page(tmp_path, monkeypatch):
    """Writes the page anew from a result stored before, and gives it and what is stored then."""
    (tmp_path / "benchmarks.json").write_text(json.dumps(STORED))

    def write(*flags):
        monkeypatch.setattr("sys.argv", ["page", f"--out={tmp_path}", *flags])
        page.main()
        return (tmp_path / "benchmarks.md").read_text(), json.loads((tmp_path / "benchmarks.json").read_text())

    return write


def test_a_page_of_what_is_stored(write_page):
    text, stored = write_page("--only=")
    assert stored == STORED
    assert DECODE in text and "- CPU: another one, 64 cores" in text
    assert f"{STORED['decode']['command']}  # 2020-01-02\n" in text


def test_a_busy_machine_is_told(write_page, tmp_path):
    told = "(not to be trusted: 1.5 cores were busy elsewhere)"
    record = STORED["decode"]["record"]
    for busy, expected in ((0.05, False), (1.5, True)):
        changed = {"decode": STORED["decode"] | {"record": record | {"busy_elsewhere": busy}}}
        (tmp_path / "benchmarks.json").write_text(json.dumps(changed))
        assert (told in write_page("--only=")[0]) is expected


def test_a_benchmark_run_again_leaves_the_others(write_page, monkeypatch):
    """A step of the smallest size, whole: in a process of its own, which has its own process for the contender."""
    flags = ("--size=nano", "--batch=2", "--input-length=8", "--prompt-length=4", "--rounds=1", "--device=cpu")
    benchmark = page.BENCHMARKS["step"]._replace(command=("train_step", *flags))
    monkeypatch.setitem(page.BENCHMARKS, "step", benchmark)
    text, stored = write_page("--only=step,step_rte")
    assert stored.keys() == {"decode", "step"} and stored["decode"] == STORED["decode"]
    assert DECODE in text and "Machine 2:" in text

    record = stored["step"]["record"]
    ours = record["contenders"]["ours"]
    assert (record["prompt_length"], ours["platform"]) == (4, "cpu")
    assert f"{ours['examples_per_second']:.2f} |" in text
    assert ours["start_to_first_step_seconds"] >= ours["import_seconds"] + ours["first_step_seconds"]
    assert ours["flop"] == step_flop(SIZES["nano"], StepShape(2, 8, 8, 4), trains_model=False)
    share = ours["flop"] / ours["step_seconds"]["median"] / ours["product_flop_per_second"]
    assert ours["roofline_share"] == pytest.approx(share)
    assert 1e8 < ours["peak_bytes"] < 1e10
    # Logits of unit variance and random targets: ln V + 1/2, and each of the 16 targets is off by 1 on average.
    assert ours["first_loss"] == pytest.approx(math.log(SIZES["nano"].vocab_size) + 0.5, abs=4 / 16**0.5)


def test_a_benchmark_that_fails_leaves_the_page(write_page, monkeypatch, capfd):
    benchmark = page.BENCHMARKS["decode"]._replace(command=("decode", "--no-such-flag"))
    monkeypatch.setitem(page.BENCHMARKS, "decode", benchmark)
    with pytest.raises(SystemExit, match="decode failed"):
        write_page("--only=decode")
    assert "unrecognized arguments" in capfd.readouterr().err
    assert write_page("--only=")[1] == STORED


def test_an_unknown_benchmark(write_page, capsys):
    with pytest.raises(SystemExit):
        write_page("--only=steps")
    assert "no benchmark steps; expected --only=step," in capsys.readouterr().err


def test_the_benchmark_of_mixed_tasks_runs_as_its_guide_says():
    options = ["--size=nano", "--input-length=8", "--target-length=4", "--prompt-length=2", "--rounds=1"]
    command = [sys.executable, "-m", "experiments.benchmarks.mixed_tasks", *options]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["cost"].keys() == {"1", "8", "32"} and found["bank"]["prompts"] == 1000
