"""`python -m prompt_tuning_jax.tasks`: the list of tasks, and what one makes of its rows."""

import re
import subprocess
import sys
import time

import pytest

from prompt_tuning_jax.errors import SettingError
from prompt_tuning_jax.tasks import __main__ as command
from prompt_tuning_jax.tasks import find, sources
from prompt_tuning_jax.tokenizers.vocabulary import Vocabulary


@pytest.fixture(autouse=True)
def tfds_again():
    yield
    sources.set_data_dir(None)


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a command line and gives what it prints, in lines."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["tasks", *map(str, arguments)])
        command.main()
        captured = capsys.readouterr()
        assert captured.err == ""
        return captured.out.splitlines()

    return run


@pytest.fixture
def refused(monkeypatch, capsys):
    """Runs a command line that is refused, and gives its one line."""

    def refused(*arguments):
        monkeypatch.setattr(sys, "argv", ["tasks", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            command.main()
        captured = capsys.readouterr()
        assert exit.value.code == 2
        assert captured.err.count("\n") == 1 and captured.err.startswith("error: ")
        return captured.err.removeprefix("error: ").strip()

    return refused


def test_tasks_are_listed_by_module_with_what_scores_them(run):
    lines = run("sst2_v200")
    assert "prompt_tuning_jax.tasks.glue" in lines
    place = lines.index("  [byt5_|mt5_][task_index_|taskless_]glue_sst2_v200[_examples]")
    assert lines[place + 1] == "      metrics accuracy; splits train, validation, test; labels negative, positive"


def test_every_name_is_listed_once(run):
    """What the brackets stand for, written out, are the registered names."""
    from prompt_tuning_jax.tasks import find

    listed = []
    for line in run():
        if line.startswith("  ") and not line.startswith("      "):
            names = [""]
            for part in re.findall(r"\[[^]]+\]|\([^)]+\)|[^[(]+", line.strip()):
                choices = part[1:-1].split("|") if part[0] in "[(" else [part]
                choices += [""] * (part[0] == "[")
                names = [name + choice for name in names for choice in choices]
            listed += names
    assert len(listed) == len(set(listed))
    ours = {name for name in find.names() if find.module_for(name)}
    assert ours <= set(listed)


def test_a_mixture_is_listed_with_its_rates(run):
    text = " ".join(run("glue_mnli_and_dev_v200"))
    assert "mixture of glue_mnli_matched_v200 1, glue_mnli_mismatched_v200 1, glue_mnli_v200 1" in text
    lines = run("show", "glue_mnli_and_dev_v200")
    assert lines[1:] == [f"  glue_{name}_v200  rate 1" for name in ("mnli_matched", "mnli_mismatched", "mnli")]


@pytest.fixture
def sst2(tmp_path):
    (tmp_path / "SST-2").mkdir()
    rows = ["a fine film \t1", "it was dull \t0", f"{'very ' * 60}long \t1"]
    (tmp_path / "SST-2" / "train.tsv").write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
    return tmp_path


def test_rows_are_shown_before_and_after_each_preprocessor(run, sst2):
    lines = run("show", "taskless_glue_sst2_v200", f"--data_dir={sst2}", "--rows=1", "--inputs_length=20")
    stages = [lines.index("source"), *(lines.index(line) for line in lines if re.match(r"\d\. ", line))]
    assert stages == sorted(stages)
    assert [lines[at].partition(". ")[2] for at in stages[1:]] == [
        "label_text: to_text", "remove_first_word", "tokenize", "append_eos_after_trim",
    ]  # fmt: skip
    ids = Vocabulary(command.EMBEDDED).encode("sentence: a fine film ")
    shown = ["'a fine film '", "'sst2 sentence: a fine film '", "'sentence: a fine film '"]
    shown += [f"{len(ids)} ids {ids}", f"{len(ids) + 1} ids {[*ids, 1]}"]
    for at, text in zip(stages, shown, strict=True):
        assert any(line.endswith(text) for line in lines[at : at + 5]), text
    assert not any("dull" in line for line in lines), "of the first row alone"


def test_lengths_and_labels_are_counted_over_the_whole_split(run, sst2):
    lines = run("show", "glue_sst2_v200", f"--data_dir={sst2}", "--rows=0", "--inputs_length=20")
    words = Vocabulary(command.EMBEDDED)
    texts = ["a fine film ", "it was dull ", f"{'very ' * 60}long "]
    counts = sorted(len(words.encode(f"sst2 sentence: {text}")) + 1 for text in texts)
    assert "3 examples" in lines
    found = next(line.split() for line in lines if line.startswith("inputs  "))
    assert (found[2], found[5]) == (str(counts[1]), str(counts[2]))
    assert found[1] == f"{sum(counts) / 3:.1f}"
    over = sum(count > 20 for count in counts)
    assert " ".join(found[6:]) == f"20: {over} ({100 * over / 3:.2f}%)"
    assert lines[-2:] == ["  'negative'  1 (33.3%)", "  'positive'  2 (66.7%)"]


def test_a_label_that_the_vocabulary_cannot_write_is_shown(run, tmp_path):
    (tmp_path / "RTE").mkdir()
    (tmp_path / "RTE" / "train.tsv").write_text("index\tsentence1\tsentence2\tlabel\n0\ta\tb\tnot_entailment\n")
    lines = run("show", "glue_rte_v200", f"--data_dir={tmp_path}", "--rows=0")
    written = Vocabulary(command.EMBEDDED).written("not_entailment")
    assert written != "not_entailment"
    assert lines[-1] == f"  'not_entailment'  1 (100.0%); in this vocabulary {written!r}"


def test_the_data_check_is_shown(run, tmp_path):
    """With the rows that training has too, where the split is another."""
    folder = tmp_path / "RTE"
    folder.mkdir()
    rows = {"train": ["a\tb\tnot_entailment", "c\t{d\tentailment"], "dev": ["a\tb\tnot_entailment", "e\tf\tentailment"]}
    for name, lines in rows.items():
        numbered = [f"{n}\t{line}" for n, line in enumerate(lines)]
        (folder / f"{name}.tsv").write_text("\n".join(["index\tsentence1\tsentence2\tlabel", *numbered]) + "\n")
    show = ("show", "glue_rte_v200", f"--data_dir={tmp_path}", "--rows=0")
    lines = run(*show)
    place = lines.index("data check")
    assert re.fullmatch(
        r"  unknown tokens are .*% of inputs \(in 1 of 2 rows\) and .*% of targets \(in 1 of .*", lines[place + 1]
    )
    written = Vocabulary(command.EMBEDDED).written("not_entailment")
    changed = f"  targets of 1 of 2 rows do not decode to themselves: 'not_entailment' becomes {written!r}"
    assert lines[place + 2 : place + 4] == [changed, ""]
    assert "  inputs of 1 of 2 rows are those of a training row" in run(*show, "--split=validation")
    (folder / "train.tsv").unlink()
    reason = f"no RTE/train.tsv under --data_dir {tmp_path}: set --data_dir to the folder that holds it"
    lines = run(*show, "--split=validation", "--targets_length=3")
    assert f"  the inputs are not compared with those of train: {reason}" in lines
    assert "  no answer is generated as 'entailment', 'not_entailment': the length of targets truncates it" in lines


def test_data_without_a_fault(run):
    lines = run("show", "demo_reviews", "--rows=0", "--split=validation")
    assert lines[lines.index("data check") + 1] == "  nothing found"


def test_a_download_without_a_connection_is_given_up_within_seconds(monkeypatch, tmp_path):
    """All addresses of TFDS's downloads are those of a proxy that is not there."""
    monkeypatch.setattr("tensorflow_datasets.core.constants.DATA_DIR", str(tmp_path))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    started = time.monotonic()
    with pytest.raises(
        SettingError, match=r"^TFDS cannot give glue/sst2:2.0.0 \(.*Max retries .*: set `data_dir` to the"
    ):
        find.find("glue_sst2_v200").source.get_dataset("train")
    assert time.monotonic() - started < 60, "ten retries with TFDS's waits take 200 s"


def test_another_split_and_vocabulary(run, data_dir):
    path = data_dir / "t5" / "spiece.model"
    lines = run(
        "show", "glue_rte_v200", f"--data_dir={data_dir / 'glue'}", "--split=validation", f"--vocabulary={path}"
    )
    assert lines[0].startswith("glue_rte_v200, validation; metrics accuracy") and str(path) in lines[1]
    assert "277 examples" in lines
    assert "  'not_entailment'  131 (47.3%)" in lines


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["zzzz"], "no task has 'zzzz' in its name; python -m prompt_tuning_jax.tasks lists all"),
        (["show", "glue_sts2_v200"], "no task 'glue_sts2_v200'; did you mean 'glue_sst2_v200'"),
        (["show"], "the following arguments are required: name; python -m prompt_tuning_jax.tasks show --help lists"),
        (["show", "demo_reviews", "--split=test"], "demo_reviews has no split 'test', only train, validation, unseen"),
        (["show", "demo_reviews", "--vocabulary=absent"], "no vocabulary at absent (No such file or directory)"),
        (["show", "demo_reviews", "--rows=x"], "--rows is 'x', expected a whole number of at least 0"),
        (["show", "demo_reviews", "--inputs_length=0"], "--inputs_length is 0, expected a whole number of at least 1"),
        (
            ["show", "demo_reviews", "--rows=2.0"],
            "--rows is 2.0, expected a whole number of at least 0; did",
        ),
        (["show", "glue_sst2_v200", "--data_dir=absent"], "no SST-2/train.tsv under --data_dir absent: set --data_dir"),
        (["--module=absent"], "no module absent: set --module to one that Python finds"),
        (["--what"], "unrecognized arguments: --what; python -m prompt_tuning_jax.tasks --help lists what there is"),
    ],
)
def test_a_mistake_is_one_line(refused, arguments, message):
    assert refused(*arguments).startswith(message)


def test_a_row_that_is_not_sound_is_one_line(refused, tmp_path):
    (tmp_path / "a.txt").write_bytes(b"a film\ncaf\xe9\n")
    message = refused("show", "text_prefix_lm", f"--data_dir={tmp_path}")
    assert message.startswith(f"{tmp_path / 'a.txt'}, line 2: not UTF-8")


def test_the_command_in_a_process_of_its_own():
    """Nothing but its lines: no word of TensorFlow's."""
    command = [sys.executable, "-m", "prompt_tuning_jax.tasks"]
    done = subprocess.run([*command, "demo_reviews"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[:2] == ["prompt_tuning_jax.tasks.demo", "  demo_reviews"]
    assert done.stdout.count("\n") == 3
