"""Registers pre-training tasks on C4: span corruption and prefix LM as in section 2.2, and the official noising tasks.

DATA_DIR may contain C4's own files, `c4-train.*.json.gz`, or other JSONL whose file names or rows give the split, or a
data set that TFDS has prepared.
"""

from collections.abc import Iterator
from pathlib import Path

import seqio

from prompt_tuning_jax.errors import SettingError
from prompt_tuning_jax.tasks import preprocessors, sources
from prompt_tuning_jax.tasks.register import add_task
from prompt_tuning_jax.tasks.text import DENSITY, MEAN_SPAN, as_targets, both_lengths, corrupted_length


class C4(sources.FilesOrTfds):
    """Source of C4's documents, {"text"}, which are read lazily."""

    def __init__(self, tfds_name: str):
        super().__init__(tfds_name, {split: f"c4-{split}.*.json.gz" for split in ("train", "validation")})

    def get_dataset(self, split="train", shuffle=True, seed=None, shard_info=None, *, num_epochs=1):
        if sources._data_dir is None:
            return super().get_dataset(split, shuffle, seed, shard_info, num_epochs=num_epochs)
        folder = Path(sources._data_dir)
        if (folder / "features.json").is_file():
            prepared = seqio.TfdsDataSource(tfds_data_dir=str(folder), read_only=True)
            if split not in prepared.splits:
                raise SettingError(
                    sources.DATA_DIR, f" {folder} has no split {split!r}, only {', '.join(prepared.splits)}"
                )
            rows = prepared.get_dataset(split, shuffle, seed, shard_info)
            return rows.map(lambda row: {"text": row["text"]}).repeat(num_epochs)
        files = _files(folder, split)
        dataset = sources.streamed(lambda: (text for path in files for text in _documents(path, split)))
        if shard_info and shard_info.num_shards > 1:
            dataset = dataset.shard(shard_info.num_shards, shard_info.index)
        if shuffle:
            dataset = dataset.shuffle(10_000, seed=seed)
        return dataset.repeat(num_epochs)


def _files(folder: Path, split: str) -> list[Path]:
    """Returns the files whose names contain the split, or else all files whose names contain no split."""
    files = sorted(path for path in folder.glob("*.json*") if path.is_file())
    named = [path for path in files if split in path.name]
    files = named or [path for path in files if not any(other in path.name for other in ("train", "validation"))]
    if not files:
        found = f"no c4-{split}.*.json.gz under "
        raise SettingError(found, sources.DATA_DIR, f" {folder}: set ", sources.DATA_DIR, " to a folder of C4's files")
    return files


def _documents(path: Path, split: str) -> Iterator[str]:
    """Yields the texts of a JSONL file. If its rows name a split, only those of `split`."""
    for number, line in sources.filled_lines(path):
        try:
            row = sources.read_json(line)
            text = sources.text(row["text"])
        except KeyError as error:
            raise SettingError(f"{path}, line {number}: no field {error}; ", *sources.MEND) from None
        except (ValueError, TypeError) as error:
            raise SettingError(f"{path}, line {number}: {error}; ", *sources.MEND) from None
        if row.get("split", split) == split:
            yield text


# 3.1.0 is the newest version, used for pre-training and LM adaptation; the official tasks use 2.2.0.
_adaptation, official = C4("c4/en:3.1.0"), C4("c4/en:2.2.0")
inputs_pieces = preprocessors.split_documents(lambda lengths: lengths["inputs"] - 1)  # 1 is for the end of sequence

for _task, _source, _noise in (
    (
        "c4_v310_span_corruption",
        _adaptation,
        # Documents are joined as in T5's pre-training, so nearly all examples are as long as the inputs allow.
        [preprocessors.concatenate_documents(corrupted_length), preprocessors.span_corruption(DENSITY, MEAN_SPAN)],
    ),
    ("c4_v310_prefix_lm", _adaptation, [preprocessors.split_documents(both_lengths), preprocessors.prefix_lm()]),
    ("c4_v220_bart_text_infilling", official, [inputs_pieces, preprocessors.text_infilling()]),
    ("c4_v220_bart_token_deletion", official, [inputs_pieces, preprocessors.token_deletion()]),
):
    add_task(_task, _source, [as_targets], suffixes=("",), after_tokens=_noise)
