"""How the benchmarks' own files are read: empty lines, and lines that are no row."""

import json

import pytest

from prompt_tuning_jax.errors import SettingError
from prompt_tuning_jax.tasks import c4, qa, sources

DEEP = "[" * 200_000


def write(tmp_path, *lines, name="rows"):
    path = tmp_path / name
    path.write_text("\n".join(lines) + "\n")
    return path


def test_empty_lines_are_skipped(tmp_path):
    rows = [json.dumps({"text": text}) for text in ("a", "b")]
    path = write(tmp_path, rows[0], "", rows[1], "", "")
    assert [*sources.read_jsonl(path, {"text": sources.text})] == [{"text": "a", "idx": 0}, {"text": "b", "idx": 1}]
    assert [*c4._documents(path, "train")] == ["a", "b"]
    path = write(tmp_path, "text\tlabel", "a\t1", "", "b\t0", "", "")
    columns = {"text": sources.text, "label": sources.label(2)}
    assert [(row["text"], row["idx"]) for row in sources.read_tsv(path, columns)] == [("a", 0), ("b", 1)]
    question = json.dumps({"question": "q", "context": "c", "answer": "a"})
    assert [row["id"] for row in qa.read_questions(write(tmp_path, question, "", question, "", name="qa.jsonl"))] == [
        "0",
        "1",
    ]


@pytest.mark.parametrize(
    "line, message",
    [(DEEP, "JSON that is nested too deep"), ('{"text": "a\\uD800"}', "half of a surrogate pair"), (" ", "Expecting")],
)
def test_a_line_that_is_no_row_is_named(tmp_path, line, message):
    path = write(tmp_path, '{"text": "a"}', "", line)
    readers = (
        lambda: [*sources.read_jsonl(path, {"text": sources.text})],
        lambda: [*c4._documents(path, "train")],
    )
    for read in readers:
        with pytest.raises(SettingError) as error:
            read()
        assert str(error.value).startswith(f"{path}, line 3: {message}") and error.value.setting == "data_dir"
    with pytest.raises(SettingError) as error:
        [*qa.read_questions(write(tmp_path, "", line, name="qa.jsonl"))]
    assert str(error.value).startswith(f"{tmp_path / 'qa.jsonl'}, line 2: {message}")


def test_whole_surrogate_pairs_are_text(tmp_path):
    path = write(tmp_path, '{"text": "\\ud83d\\ude00 \\\\ud800"}')
    assert [row["text"] for row in sources.read_jsonl(path, {"text": sources.text})] == ["😀 \\ud800"]


def test_a_table_says_its_line_beside_empty_ones_and_a_column_that_is_there_twice(tmp_path):
    columns = {"text": sources.text, "label": sources.label(2)}
    path = write(tmp_path, "text\tlabel", "", "a\t2")
    with pytest.raises(SettingError, match=rf"^{path}, line 3: label '2', expected 0 .. 1; mend it"):
        [*sources.read_tsv(path, columns)]
    path = write(tmp_path, "text\tlabel\tlabel", "a\t0\t1")
    with pytest.raises(SettingError, match=rf"^{path}, line 1: two columns 'label', expected one; mend it"):
        [*sources.read_tsv(path, columns)]
