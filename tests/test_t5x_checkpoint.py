"""T5X checkpoints in: every array as tensorstore reads it, and each kind of damage named."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorstore

from prompt_tuning_jax.checkpoints import t5x
from prompt_tuning_jax.checkpoints.base import expected_shapes, load_base
from prompt_tuning_jax.t5.config import T5Config

TINY = T5Config(
    32128, 4, 2, 2, 2, 8, head_dim=2, relative_attention_num_buckets=4, relative_attention_max_distance=8
)  # fmt: skip
LARGE = "target.decoder.logits_dense.kernel"  # in zarr; [4, 32128] in chunks of 4096 columns


@pytest.fixture
def checkpoint(data_dir: Path, tmp_path: Path) -> Path:
    return shutil.copytree(data_dir / "t5" / "t5x_tiny_checkpoint", tmp_path / "checkpoint", copy_function=shutil.copy)


def test_reads_every_parameter(checkpoint: Path):
    found = t5x.read(checkpoint)
    assert {name: array.shape for name, array in found.items()} == expected_shapes(TINY)
    for folder in checkpoint.glob("target.*"):
        name = folder.name.removeprefix("target.").replace(".", "/")
        spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{folder}/"}}
        np.testing.assert_array_equal(found[name], tensorstore.open(spec).result().read().result())


def test_is_a_base(checkpoint: Path):
    base = load_base(str(checkpoint), TINY)
    np.testing.assert_array_equal(
        base.params["encoder/relpos_bias/rel_embedding"], t5x.read(checkpoint)["encoder/relpos_bias/rel_embedding"]
    )


def test_another_size_is_refused(checkpoint: Path):
    with pytest.raises(ValueError, match=r"decoder_norm/scale is \[4\], not \[8\]"):
        load_base(str(checkpoint), T5Config(32128, 8, 2, 2, 2, 8, head_dim=2))


def _lose_a_chunk(folder: Path) -> None:
    (folder / LARGE / "0.3").unlink()


def _truncate_a_chunk(folder: Path) -> None:
    chunk = folder / LARGE / "0.3"
    chunk.write_bytes(chunk.read_bytes()[:100])


def _lose_an_array(folder: Path) -> None:
    shutil.rmtree(folder / LARGE)


def _another_shape(folder: Path) -> None:
    meta = folder / LARGE / ".zarray"
    meta.chmod(0o644)
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"shape": [4, 32000]}))


@pytest.mark.parametrize("damage", [_lose_a_chunk, _truncate_a_chunk, _lose_an_array, _another_shape])
def test_damage_is_named(checkpoint: Path, damage):
    for path in [checkpoint, *checkpoint.rglob("*")]:
        path.chmod(0o755)
    damage(checkpoint)
    with pytest.raises(ValueError, match="decoder/logits_dense/kernel") as error:
        t5x.read(checkpoint)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("keep", [0, 1, 100, -1])
def test_a_truncated_index_is_refused(checkpoint: Path, keep: int):
    index = checkpoint / t5x.INDEX
    index.chmod(0o644)
    index.write_bytes(index.read_bytes()[:keep])
    with pytest.raises(ValueError, match="index of a T5X checkpoint"):
        t5x.read(checkpoint)
