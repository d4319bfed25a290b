"""Compiles a training step for a mesh, without running it, and prints its memory per device and its collectives.

    python -m experiments.scaling --size=xxl --devices=16 --mesh="{'fsdp': 16}"
    python -m experiments.scaling --size=xxl --topology=v5e:4x4 --mesh="{'fsdp': 16}"     # with libtpu: jax[tpu]
    python -m experiments.scaling --page     # all of PAGE that results/scaling.json lacks, to results/scaling.md

No devices are needed: they are emulated CPU devices of this process, in any number, or with --topology a TPU slice, for
which the TPU's own compiler compiles the step. The step is prompt tuning of T5 1.1 in bfloat16 with a prompt of length
100, and with the remat policy of models/*.gin. Models with two and three layers per stack are compiled, and the results
are extrapolated to the size's own depth, since each layer adds the same. It prints one JSON object:

    frozen_bytes       bytes of the parameters per device, as compiled; `planned_bytes`: the same by the memory plan,
                       which is exact
    state_bytes        bytes of the prompt and its optimiser state per device, by the memory plan
    temporary_bytes    bytes of the step's temporary arrays; only for a TPU with --whole, otherwise null. The TPU's
                       compiler uses free memory for speed, so shallow models do not predict it; the CPU's compiler
                       keeps gathered weights in memory
    sent               the step's collectives by kind: their number, the number of elements in their results, and the
                       bytes of these; in float32 on a CPU, in bfloat16 elsewhere
"""

import argparse
import ast
import json
import math
import os
import re
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

RESULTS = Path(__file__).parent / "results"
KINDS = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter|collective-broadcast"
PROMPT_LENGTH, LEAST_BATCH = 100, 32
SHALLOW = ((2, 2), (3, 2), (2, 3))
REMAT_POLICY = {"xl": "minimal", "xxl": "full"}  # as in models/*.gin; "none" for other sizes


class Case(NamedTuple):
    """Describes a row of the page's table."""

    size: str
    devices: int
    mesh: dict[str, int]
    topology: str | None = None
    whole: bool = False

    @property
    def flags(self) -> list[str]:
        more = [f"--topology={self.topology}"] if self.topology else [f"--devices={self.devices}"]
        return [f"--size={self.size}", f"--mesh={self.mesh}", *more, *(["--whole"] if self.whole else [])]


PAGE = (
    Case("small", 1, {}),
    Case("small", 8, {}),
    Case("base", 8, {}),
    Case("large", 8, {}),
    Case("xl", 1, {}),
    Case("xl", 8, {}),
    Case("xl", 8, {"fsdp": 8}),
    Case("xl", 64, {"fsdp": 4}),
    Case("xxl", 8, {"fsdp": 8}),
    Case("xxl", 8, {"model": 8}),
    Case("xxl", 16, {"fsdp": 16}),
    Case("xxl", 32, {"fsdp": 8, "model": 4}),
    Case("xxl", 256, {"fsdp": 16}),
    Case("xxl", 1024, {"fsdp": 16}),
    Case("base", 8, {}, "v5e:2x4"),
    Case("large", 8, {}, "v5e:2x4"),
    Case("xl", 8, {}, "v5e:2x4"),
    Case("xl", 8, {"fsdp": 8}, "v5e:2x4"),
    Case("xxl", 16, {"fsdp": 16}, "v5e:4x4", whole=True),
    Case("xxl", 16, {"model": 16}, "v5e:4x4"),
    Case("xxl", 8, {"fsdp": 8}, "v6e:2x4"),
)


class CollectiveTotals(NamedTuple):
    """Holds the totals of the collectives of one kind.

    Attributes:
      count: the number of collectives.
      numbers, bytes: the number of elements, and of bytes, in their results.
    """

    count: int
    numbers: int
    bytes: int


BYTES = {"f64": 8, "s64": 8, "u64": 8, "f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "s8": 1, "u8": 1, "pred": 1}


def collectives(program: str) -> dict[str, CollectiveTotals]:
    """Returns the collectives of a compiled program, by kind. A collective in a loop is counted once."""
    found: dict[tuple[str, str], tuple[int, int]] = {}
    for number, line in enumerate(program.splitlines()):
        match = re.match(rf"\s*(?:ROOT )?%?[\w.-]+ = (.*?) ({KINDS})(?:-start)?\(", line)
        if match:
            # A TPU's program repeats a collective in several computations, with the same channel id.
            channel = re.search(r"channel_id=(\d+)", line)
            arrays = [(BYTES[kind], _numbers(shape)) for kind, shape in re.findall(r"(\w+)\[([\d,]*)\]", match[1])]
            key = match[2], channel[1] if channel else f"line {number}"
            found[key] = sum(count for _, count in arrays), sum(size * count for size, count in arrays)
    kinds = defaultdict(list)
    for (kind, _), sizes in found.items():
        kinds[kind].append(sizes)
    return {kind: CollectiveTotals(len(of), sum(n for n, _ in of), sum(b for _, b in of)) for kind, of in kinds.items()}


def _numbers(shape: str) -> int:
    return math.prod(int(size) for size in shape.split(",") if size)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the JSON object that the module's docstring describes, for one mesh."""
    import jax

    if args.topology:
        from jax.experimental import topologies

        devices = topologies.get_topology_desc(platform="tpu", topology_name=args.topology).devices
    else:
        devices = jax.devices()
    # Makes the code trace as on an accelerator, also if it is compiled for CPU devices.
    jax.default_backend = lambda: "tpu"

    from prompt_tuning_jax.parallel.mesh import make_mesh, mesh_shape
    from prompt_tuning_jax.parallel.partitioner import Partitioner
    from prompt_tuning_jax.t5.network import Transformer
    from prompt_tuning_jax.training.memory_plan import device_part, start_shapes
    from prompt_tuning_jax.training.step import make_train_step

    shape = mesh_shape(args.mesh, None, len(devices))
    mesh, found, seconds = make_mesh(shape, devices), [], time.monotonic()
    batch_size = args.batch or LEAST_BATCH * max(1, math.ceil(shape.data * shape.fsdp / LEAST_BATCH))
    whole = run_config(args, None, batch_size)
    for layers in (None,) if args.whole else SHALLOW:
        config = run_config(args, layers, batch_size)
        partitioner = Partitioner(mesh, config.size)
        state, frozen = start_shapes(config)
        shardings = partitioner.state_shardings(state)
        model = Transformer(config.size)
        step = make_train_step(model, config.method, config.optimizer, 1e-4, 1, partitioner, shardings)
        state_shapes = jax.tree.map(_placed, state, shardings)
        frozen_shapes = {
            path: _placed(leaf, partitioner.parameter_sharding(path, leaf.shape)) for path, leaf in frozen.items()
        }
        rows = jax.tree.map(
            lambda leaf, on=partitioner: _placed(leaf, on.batch_sharding(batch_size, leaf.ndim)), _batch(config)
        )
        compiled = step.lower(state_shapes, frozen_shapes, rows).compile()
        memory, sent = compiled.memory_analysis(), collectives(compiled.as_text())
        flat = {f"{kind} {field}": value for kind, of in sent.items() for field, value in of._asdict().items()}
        # The arguments other than the base model are the state and the rows; their bytes do not depend on the depth.
        others = sum(
            math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf in jax.tree.leaves((state_shapes, rows.inputs, rows.targets))
        )
        found.append({"frozen": memory.argument_size_in_bytes - others, "temporary": memory.temp_size_in_bytes, **flat})
    config = whole.size
    deep = (2, 2) if args.whole else (config.num_encoder_layers, config.num_decoder_layers)
    total = {
        name: at_depth(deep, *(one.get(name, 0) for one in (found * 3)[:3]))
        for name in {key for one in found for key in one}
    }
    part = device_part(whole, shape)
    return {
        **{"size": args.size, "devices": len(devices), "topology": args.topology, "mesh": dict(shape._asdict())},
        "batch": batch_size,
        "frozen_bytes": total["frozen"],
        "planned_bytes": part.frozen,
        "state_bytes": part.state,
        "temporary_bytes": total["temporary"] if args.topology and args.whole else None,
        "sent": {
            kind: [total[f"{kind} {field}"] for field in CollectiveTotals._fields] for kind in sorted(_kinds(total))
        },
        "compile_seconds": round(time.monotonic() - seconds, 1),
    }


def _kinds(total: dict[str, int]) -> set[str]:
    return {name.rpartition(" ")[0] for name in total if " " in name}


def at_depth(layers: tuple[int, int], smallest: int, encoder: int, decoder: int) -> int:
    """Extrapolates the values of the models in `SHALLOW` linearly to (encoder, decoder) `layers`."""
    return smallest + (layers[0] - 2) * (encoder - smallest) + (layers[1] - 2) * (decoder - smallest)


def _placed(leaf: Any, sharding: Any) -> Any:
    import jax

    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def run_config(args: argparse.Namespace, layers: tuple[int, int] | None, batch_size: int) -> Any:
    """Returns a prompt-tuning run on a base model without files. If `layers` is None, it has the size's own depth."""
    import dataclasses

    from experiments.sizes import SIZES
    from prompt_tuning_jax.batches.dataset import DatasetConfig
    from prompt_tuning_jax.methods.prompt_tuning import PromptTuning
    from prompt_tuning_jax.prompts.initializers import RandomUniform
    from prompt_tuning_jax.training.optimizer import adafactor
    from prompt_tuning_jax.training.run import TrainConfig

    size = dataclasses.replace(
        SIZES[args.size], dtype="bfloat16", remat_policy=args.remat_policy or REMAT_POLICY.get(args.size, "none")
    )
    if layers is not None:
        size = dataclasses.replace(size, num_encoder_layers=layers[0], num_decoder_layers=layers[1])
    lengths = {"inputs": args.input_length, "targets": args.target_length}
    dataset = DatasetConfig("none", "train", batch_size, lengths)
    return TrainConfig(
        model_dir="no/where",
        size=size,
        initial_checkpoint_path="no/where",
        train_dataset=dataset,
        eval_dataset=dataset,
        method=PromptTuning(PROMPT_LENGTH, RandomUniform()),
        optimizer=adafactor(0.3),
        train_steps=1,
        eval_period=1,
        base_dtype="bfloat16",
        num_microbatches=1,
    )


def _batch(config: Any) -> Any:
    import jax
    import numpy as np

    from prompt_tuning_jax.batches.loader import Batch

    rows, lengths = config.train_dataset.batch_size, config.train_dataset.task_feature_lengths
    inputs, targets = (jax.ShapeDtypeStruct((rows, lengths[name]), np.int32) for name in ("inputs", "targets"))
    return Batch(inputs, targets, jax.ShapeDtypeStruct((rows,), np.int32))


def start(flags: Sequence[str], devices: int) -> dict[str, Any]:
    """Measures one mesh in a child process with `devices` CPU devices."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    flag = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    environment["XLA_FLAGS"] = f"{environment.get('XLA_FLAGS', '')} {flag}"
    environment.setdefault("TPU_SKIP_MDS_QUERY", "1")  # otherwise libtpu asks the network for the machine's metadata
    command = [sys.executable, "-m", "experiments.scaling", "--here", *flags]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise SystemExit(f"{' '.join(flags)} ended with {ended.returncode}: {ended.stderr.strip()[-2000:]}")
    return json.loads(ended.stdout.splitlines()[-1])


def page(cases: Sequence[Case], records: Path) -> str:
    """Returns the page. Cases that are in `records` are not measured again."""
    found = json.loads(records.read_text()) if records.exists() else {}
    lines = [HEAD]
    for case in cases:
        key = " ".join(case.flags)
        if key not in found:
            found[key] = start(case.flags, 1 if case.topology else case.devices)
            print(json.dumps(found[key]), flush=True)
            records.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        lines.append(line(case, found[key]))
    return "\n".join(lines) + "\n"


def line(case: Case, found: Mapping[str, Any]) -> str:
    """Returns a case as a row of the page's table."""
    mesh = " x ".join(f"{name} {size}" for name, size in found["mesh"].items() if size > 1) or "one device"
    sent = "; ".join(f"{kind} {numbers * 2 / 1e9:.4f}" for kind, (_, numbers, _) in found["sent"].items())
    temporary, off = found["temporary_bytes"], found["planned_bytes"] / found["frozen_bytes"] - 1
    gigabytes = [f"{found[name] / 1e9:.3f}" for name in ("frozen_bytes", "planned_bytes")]
    return (
        f"| {case.size} | {case.topology or case.devices} | {mesh} | {found['batch']} | {' | '.join(gigabytes)} "
        f"| {off:+.2%} | {'' if temporary is None else f'{temporary / 1e9:.1f}'} | {sent or 'nothing'} |"
    )


HEAD = """# Before you rent: what a step needs on each device

Written by `python -m experiments.scaling --page` (that module says what is measured; its last lines need libtpu):
prompt tuning of T5 1.1, bfloat16, P=100, 512 input and 16 target tokens, compiled for so many devices and never run.
All of it in GB on each device: the base as compiled and as the memory plan has it; what the step makes on the way (of a
TPU, compiled at its whole depth); and the results of its collectives, at two bytes a number. A `v5e` chip has 16 GB, a
`v6e` chip 32 GB.

| size | devices | mesh | batch | base, compiled | base, planned | off | temporaries | sent |
|---|---|---|---|---|---|---|---|---|"""


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices="pico nano micro mini small base large xl xxl".split(), default="xxl")
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--mesh", type=ast.literal_eval, default={}, help="{'fsdp': 8}; data has what is left")
    parser.add_argument("--topology", help="a TPU slice by JAX's name, v5e:4x4, in place of --devices; needs libtpu")
    parser.add_argument("--batch", type=int, help="default 32, or a row for each part of the batch")
    parser.add_argument("--input-length", type=int, default=512)
    parser.add_argument("--target-length", type=int, default=16)
    parser.add_argument("--remat-policy", choices=("none", "minimal", "full"))
    parser.add_argument("--whole", action="store_true", help="compile the size's own depth: minutes")
    parser.add_argument("--page", action="store_true")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    return parser


def main() -> None:
    args = parser().parse_args()
    if args.page:
        (RESULTS / "scaling.md").write_text(page(PAGE, RESULTS / "scaling.json"), encoding="utf-8")
    elif args.here:
        print(json.dumps(measure(args)))
    else:
        print(json.dumps(start(sys.argv[1:], 1 if args.topology else args.devices)))


if __name__ == "__main__":
    main()
