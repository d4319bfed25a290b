"""`infer` as one types it: lines in, lines out, whatever the lines are."""

import io
import json
import os
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from tiny import CONFIG

from prompt_tuning_jax import infer
from prompt_tuning_jax.checkpoints.tuned import write_prompts
from prompt_tuning_jax.inference.predictor import Predictor
from prompt_tuning_jax.methods.method import Injection
from prompt_tuning_jax.prompts.files import write_prompt

ROWS = [
    {"prompt": "long", "inputs": "a movie", "id": 7},
    {"prompt": "short", "inputs": "the cast is warm", "labels": ["negative", "positive"]},
    {"prompt": None, "inputs": "Ünïcode \u2028 text"},
    {"prompt": "short", "inputs": "a movie", "decode": "beam"},
]
SMALL = ["--input_length=24", "--max_new_tokens=4", "--batch_size=4", "--beams=2"]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prompts")
    for name, length in (("short", 2), ("long", 5)):
        write_prompt(folder / f"{name}.npy", np.random.default_rng(length).normal(size=(length, CONFIG.emb_dim)))
    (folder / "broken.npy").write_bytes(b"half")
    return folder


@pytest.fixture(scope="module")
def flags(tiny, prompts):
    return [f"--base={tiny.base}", f"--prompts={prompts}", *SMALL]


@pytest.fixture
def run(flags, monkeypatch, capfdbinary):
    """The command in this process: stdin in, stdout and stderr back."""

    def go(stdin, *more, only=None):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        monkeypatch.setattr(sys, "argv", ["infer", *(flags if only is None else only), *more])
        monkeypatch.setattr(infer, "keep_compiled_programs", lambda: None)
        code = 0
        try:
            infer.main()
        except SystemExit as exit:
            code = exit.code
        sys.stdout.flush()
        out, err = capfdbinary.readouterr()
        return code, out.decode(), err.decode()

    return go


def jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def test_rows_come_back_in_order_with_what_the_predictor_says(run, tiny, prompts):
    code, out, err = run(jsonl(ROWS))
    answers = [json.loads(line) for line in out.split("\n")[:-1]]
    predictor = Predictor.load(str(tiny.base), prompts, input_length=24, max_new_tokens=4, batch_size=4)
    expected = [*predictor.predict(ROWS[:3])]
    assert code == 0 and answers[:3] == expected and answers[0]["id"] == 7
    assert answers[3].keys() == {"prompt", "inputs", "decode", "prediction", "score"}
    assert "prompt broken is left out: " in err and "Ünïcode" in out


def test_prompts_per_layer_are_answered_beside_others(run, tiny, tmp_path):
    """A folder with one of each kind: what replaces, what is added, an ordinary prompt, and the base model alone."""
    rng, shape = np.random.default_rng(0), (CONFIG.num_encoder_layers, 3, CONFIG.emb_dim)
    write_prompt(tmp_path / "ordinary.npy", rng.normal(size=(5, CONFIG.emb_dim)))
    write_prompt(tmp_path / "replacing.npy", rng.normal(size=shape))
    adding = Injection(*(jnp.asarray(rng.normal(size=size), jnp.float32) for size in (shape[1:], shape)))
    write_prompts(tmp_path / "adding", adding)
    rows = [{"prompt": name, "inputs": "a movie"} for name in ("adding", "ordinary", None, "replacing")]
    code, out, err = run(jsonl(rows), only=[f"--base={tiny.base}", f"--prompts={tmp_path}", *SMALL])
    answers = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [answer["prompt"] for answer in answers] == [row["prompt"] for row in rows]
    assert len({answer["score"] for answer in answers}) == 4
    for answer, path in zip(answers, ("adding", "ordinary.npy", None, "replacing.npy"), strict=True):
        given = None if path is None else tmp_path / path
        alone = Predictor.load(str(tiny.base), given, input_length=24, max_new_tokens=4)
        (expected,) = alone.predict([{"prompt": answer["prompt"], "inputs": "a movie"}])
        assert answer["prediction"] == expected["prediction"]
        assert answer["score"] == pytest.approx(expected["score"], rel=1e-5, abs=1e-5)


def test_a_line_that_is_no_row_has_an_error_and_the_rest_go_on(run):
    lines = [
        jsonl(ROWS[:1]),
        b"{not json}\n",
        b'{"prompt": "long", "inputs": "\xff\xfe"}\n',
        b"\n",
        b'{"prompt": "lon", "inputs": "a"}\n',
        b"[" * 100_000 + b"\n",
        b'{"prompt": "long", "inputs": "a", "id": NaN}\n',
        b'{"prompt": "long", "inputs": "a", "id": -1e999}\n',
        b'{"prompt": "long", "inputs": "\\ud800", "id": "\\udfff"}\n',
        jsonl(ROWS[:1]).rstrip(b"\n"),
    ]
    code, out, err = run(b"".join(lines))
    first, no_json, no_utf8, near, deep, nan, infinite, surrogate, last = [
        json.loads(line) for line in out.split("\n")[:-1]
    ]
    assert code == 0 and first == last and "error" not in first
    assert "line 2 is not JSON (Expecting property name" in no_json["error"]
    assert no_utf8["error"] == "line 3 is not UTF-8 (byte 30), expected a row"
    assert "did you mean long?" in near["error"]
    assert "line 6 is not JSON" in deep["error"]
    assert "line 7 is not JSON (NaN is not a finite number)" in nan["error"] and "-1e999" in infinite["error"]
    assert "half a surrogate pair" in surrogate["error"] and surrogate["id"] == "\udfff"
    assert "7 of 9 rows have an error" in err


def test_a_byte_order_mark_in_front_of_the_rows_is_no_part_of_them(run):
    for text, more in (jsonl(ROWS[:2]), ()), (b"a movie\nthe cast is warm\n", ("--text", "--prompt=long")):
        plain, marked = (run(mark + text, *more) for mark in (b"", b"\xef\xbb\xbf"))
        assert plain == marked and "error" not in plain[1]
    _, out, _ = run(jsonl(ROWS[:1]) + b"\xef\xbb\xbf" + jsonl(ROWS[:1]))
    assert ["error" in json.loads(line) for line in out.splitlines()] == [False, True]  # only there is it no text


def test_the_exit_code_says_that_no_row_has_an_answer(run, tmp_path):
    rows = [{"prompt": "lon", "inputs": "a movie"}, {"prompt": "long"}]
    code, out, err = run(jsonl(rows))
    assert code == 2 and all(json.loads(line)["error"] for line in out.splitlines())
    assert err.splitlines()[-1] == (
        "error: each of 2 rows has an error in place of an answer, the first: no prompt 'lon'; did you mean long?"
    )
    assert run(jsonl([]))[0] == 0
    target = tmp_path / "answers.jsonl"  # what was answered before counts, and so does what failed before
    assert run(jsonl(ROWS[:1]), f"--output={target}")[0] == 0
    assert run(jsonl([*ROWS[:1], *rows]), f"--output={target}", "--resume")[0] == 0
    target.unlink()
    assert run(jsonl(rows), f"--output={target}")[0] == 2
    assert run(jsonl(rows), f"--output={target}", "--resume")[0] == 2


def test_lines_of_text_are_inputs_of_the_prompt_named(run):
    _, out, _ = run(b"a movie\n\nthe cast is warm\n", "--text", "--prompt=long")
    _, rows, _ = run(jsonl([{"prompt": "long", "inputs": text} for text in ("a movie", "the cast is warm")]))
    for text, row in zip(out.splitlines(), rows.splitlines(), strict=True):
        assert json.loads(row) == {"prompt": "long"} | json.loads(text)
    _, out, _ = run(b"a movie\n", "--text", "--prompt=long", "--labels=negative,positive")
    assert [*json.loads(out)["scores"]] == ["negative", "positive"]


def test_an_output_that_was_broken_off_goes_on(run, tmp_path):
    rows = [{"prompt": "long", "inputs": f"a movie of {'very ' * n}warm acting"} for n in range(7)]
    target = tmp_path / "answers.jsonl"
    assert run(jsonl(rows), f"--output={target}")[0] == 0
    whole = target.read_bytes()
    code, _, err = run(jsonl(rows), f"--output={target}")
    assert code == 2 and "is there already: set --output to a new file, or give --resume" in err
    assert target.read_bytes() == whole

    lines = whole.splitlines(keepends=True)
    target.write_bytes(b"".join(lines[:3]) + lines[3][:20])
    code, out, err = run(jsonl(rows), f"--output={target}", "--resume")
    assert code == 0 and not out and "3 rows are answered already" in err
    assert [json.loads(line)["prediction"] for line in target.read_bytes().splitlines()] == [
        json.loads(line)["prediction"] for line in lines
    ]
    code, _, err = run(jsonl(rows[::-1]), f"--output={target}", "--resume")
    assert code == 2 and "holds the answers to other rows" in err


def test_typed_lines_are_answered_and_prompts_switched(flags, tiny, prompts, monkeypatch, capsys):
    typed = iter(["a movie", ":prompts", ":prompt shor", ":prompt short", "a movie", ":prompt", "a movie", "", ":quit"])
    monkeypatch.setattr("builtins.input", lambda prompt="": next(typed))
    infer.run(infer.parse([*flags, "--interactive", "--prompt=long"]))
    lines = capsys.readouterr().out.splitlines()
    predictor = Predictor.load(str(tiny.base), prompts, input_length=24, max_new_tokens=4)
    expected = [
        f"{answer['prediction']}   ({answer['score']:.2f})"
        for answer in predictor.predict([{"prompt": name, "inputs": "a movie"} for name in ("long", "short", None)])
    ]
    assert lines[1:] == [
        expected[0], "long [5]  short [2]", "error: no prompt 'shor'; did you mean short?", *expected[1:]
    ]  # fmt: skip


def test_whoever_waits_for_an_answer_gets_it(flags, tiny):
    """One row in, its answer out, while stdin stays open; then a reader that leaves, which is no error."""
    command = [sys.executable, "-m", "prompt_tuning_jax.infer", *flags]
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | tiny.environment,
        cwd=tiny.folder,
    )
    for row in ROWS[:2]:
        process.stdin.write(jsonl([row]))
        process.stdin.flush()
        assert json.loads(process.stdout.readline())["inputs"] == row["inputs"]
    process.stdout.close()
    process.stdin.write(jsonl(ROWS[:1] * 200))
    process.stdin.close()
    assert process.wait(timeout=120) == 0
    assert b"Traceback" not in process.stderr.read()
    process.stderr.close()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--bse=x"], "unrecognized arguments: --bse=x"),
        (["--base=nowhere"], "no base model at nowhere: no folder is there, and HF_HUB_OFFLINE is set"),
        (["--prompts=nowhere"], "no folder of prompts at nowhere: set --prompts"),
        (["--prompt=none"], "no prompt 'none'"),
        (["--decode=best"], "--decode is 'best', expected one of 'greedy', 'beam', 'sample'"),
        (["--temperature=-1"], "--temperature is -1, expected a number from 0 to 100"),
        (["--labels=a,a"], "the labels 'a' and 'a' are the same tokens"),
        (["--input=nowhere.jsonl"], "no file nowhere.jsonl: set --input"),
        (["--resume"], "--resume goes on with an --output, and none is given"),
        (["--batch_size=0"], "--batch_size is 0, expected a whole number of at least 1"),
        (["--batch_size=16.0"], "--batch_size is 16.0, expected a whole number of at least 1; did you mean 16?"),
        (["--input_length=many"], "--input_length is 'many', expected a whole number of at least 2"),
        (["--beams=65"], "--beams is 65, expected a whole number from 1 to 64"),
        (["--top_p=nan"], "--top_p is nan, expected a number from 1.18e-38 to 1"),
        (["--dtype=float8"], "--dtype is 'float8'"),
        (["--vocabulary=nowhere"], "set --vocabulary"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(run, flags, arguments, message):
    code, out, err = run(b"", *arguments)
    assert code == 2 and not out
    last = err.splitlines()[-1]
    assert last.startswith("error: ") and message in last
    assert "Traceback" not in err
