"""How a prompt starts, and its files: whole, damaged and hostile ones."""

import io
import os
import pickle
import types
import zipfile

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prompt_tuning_jax.checkpoints import t5x
from prompt_tuning_jax.errors import SettingError
from prompt_tuning_jax.prompts import initializers
from prompt_tuning_jax.prompts.files import IN_T5X, OFFICIAL_NAME, read_prompt, write_prompt
from prompt_tuning_jax.prompts.module import SoftPrompt
from prompt_tuning_jax.prompts.peft import write_adapter
from prompt_tuning_jax.t5.network import prepend_prompt
from prompt_tuning_jax.tokenizers.vocabulary import Vocabulary

KEY = jax.random.key(0)
WIDTH = 4
# Row i says i: what is drawn can be read back.
TABLE = jnp.repeat(jnp.arange(6_000.0)[:, None], WIDTH, axis=1)
PIECES = {"good": [10], "not good": [20, 10, 31], "odd": [5, 2], "": []}


def model_of(table=TABLE, encode=PIECES.__getitem__):
    """What an initialiser may read of a base model."""
    return types.SimpleNamespace(
        config=types.SimpleNamespace(emb_dim=table.shape[1]),
        embeddings=table,
        tokenizer=types.SimpleNamespace(encode=encode),
    )


MODEL = model_of()


def drawn(length, population=5_000, key=KEY, table=TABLE):
    prompt = initializers.SampledVocabulary(population)(key, length, model_of(table))
    assert prompt.shape == (length, WIDTH)
    assert prompt.dtype == jnp.float32
    return np.asarray(prompt[:, 0]).astype(int)


@pytest.mark.parametrize(
    ("init", "low", "high"),
    [(initializers.RandomUniform(), -0.5, 0.5), (initializers.OfficialRandomUniform(), 0.0, 0.5)],
)
def test_random_prompts_fill_their_range(init, low, high):
    prompt = np.asarray(init(KEY, 100, model_of(jnp.zeros((9, 64)))))
    assert prompt.shape == (100, 64)
    assert prompt.dtype == np.float32
    assert low <= prompt.min() < low + 0.001
    assert high - 0.001 < prompt.max() < high
    assert abs(prompt.mean() - (low + high) / 2) < 0.01


def test_another_key_draws_another_prompt():
    assert not np.array_equal(drawn(20), drawn(20, key=jax.random.key(1)))
    np.testing.assert_array_equal(drawn(20), drawn(20))


def test_sampled_words_are_common_distinct_and_not_special():
    """<pad>, </s> and <unk>, ids 0 to 2, are no words."""
    ids = drawn(1_000)
    assert len(set(ids)) == len(ids)
    assert ids.min() >= 3
    assert 4_900 < ids.max() < 5_000
    assert set(drawn(7, population=10)) == set(range(3, 10))


def test_sampled_words_repeat_only_where_there_are_too_few():
    assert set(drawn(200, population=10)) == set(range(3, 10))
    assert set(drawn(200, population=5_000, table=TABLE[:10])) == set(range(3, 10))


@pytest.mark.parametrize("vocabulary, words, rows", [("t5", 32_000, 32_128), ("bytes", 248, 384)])
def test_no_sentinel_and_no_padding_row_is_drawn(vocabulary, words, rows, data_dir):
    """However many tokens are asked for; PEFT draws from the whole table."""
    tokenizer = Vocabulary(data_dir / "t5" / "spiece.model" if vocabulary == "t5" else "bytes")
    model = model_of(jnp.repeat(jnp.arange(float(rows))[:, None], WIDTH, axis=1))
    model.tokenizer = tokenizer
    found = initializers.SampledVocabulary(population=rows)(KEY, words - 3, model)
    np.testing.assert_array_equal(np.sort(found[:, 0]), np.arange(3, words))
    model.tokenizer = types.SimpleNamespace(vocab_size=tokenizer.size, extra_ids=tokenizer.sentinels)  # SeqIO's names
    np.testing.assert_array_equal(initializers.SampledVocabulary(population=rows)(KEY, words - 3, model), found)


def test_population_of_special_tokens_alone_is_refused():
    with pytest.raises(ValueError, match="`population` is 3, expected a whole number of at least 4"):
        drawn(2, population=3)


def test_class_labels_take_the_first_places():
    """Position i is the mean of label i's pieces, and the rest is what sampled vocabulary alone would be."""
    prompt = initializers.ClassLabels(["not good", "good"])(KEY, 6, MODEL)
    expected = np.array(initializers.SampledVocabulary()(KEY, 6, MODEL))
    expected[0], expected[1] = (20 + 10 + 31) / 3, 10
    np.testing.assert_allclose(prompt, expected, rtol=1e-7)
    assert prompt.dtype == jnp.float32


def test_labels_beyond_the_prompt_are_left_out_aloud(caplog):
    prompt = initializers.ClassLabels(["good", "not good"])(KEY, 1, MODEL)
    np.testing.assert_array_equal(prompt, np.full((1, WIDTH), 10))
    assert "2 class labels, but the prompt has 1 positions" in caplog.text


@pytest.mark.parametrize(
    ("labels", "message"),
    [(["good", "odd"], "'odd' tokenises to <unk>"), ([""], "'' tokenises to nothing"), ([], "`labels` is empty")],
)
def test_labels_that_the_vocabulary_cannot_write_are_refused(labels, message):
    with pytest.raises(SettingError, match=message) as error:
        initializers.ClassLabels(labels)(KEY, 3, MODEL)
    assert error.value.setting == "class_labels"


def test_class_labels_of_the_real_vocabulary(data_dir):
    """Pieces as the official code finds them: no end of sequence among them, and "entailment" is four."""
    vocabulary = Vocabulary(data_dir / "t5" / "spiece.model")
    table = jnp.repeat(jnp.arange(32_128.0)[:, None], WIDTH, axis=1)
    labels = ["positive", "False", "entailment"]
    prompt = initializers.ClassLabels(labels)(KEY, 9, model_of(table, vocabulary.encode))
    means = [1465, np.mean([10747, 7, 15]), np.mean([3, 35, 5756, 297])]
    np.testing.assert_allclose(prompt[:3, 0], means, rtol=1e-6)


def test_string_takes_a_place_a_piece():
    prompt = initializers.Text("not good")(KEY, 5, MODEL)
    expected = np.array(initializers.SampledVocabulary()(KEY, 5, MODEL))
    expected[:3] = np.array([20, 10, 31])[:, None]
    np.testing.assert_array_equal(prompt, expected)
    with pytest.raises(SettingError, match="'odd' tokenises to <unk>") as error:
        initializers.Text("odd")(KEY, 5, MODEL)
    assert error.value.setting == "prompt_text"


def test_prompts_of_a_bfloat16_base_are_float32():
    """The prompt and its optimiser state are float32, whatever the frozen table is."""
    table = TABLE[:200].astype(jnp.bfloat16)
    prompt = initializers.ClassLabels(["good"])(KEY, 3, model_of(table))
    assert prompt.dtype == jnp.float32


def test_file_goes_in_as_it_is(tmp_path):
    prompt = np.random.default_rng(0).normal(size=(3, WIDTH)).astype(np.float32)
    write_prompt(tmp_path / "p.npy", prompt)
    init = initializers.FromFile(str(tmp_path / "p.npy"))
    np.testing.assert_array_equal(init(KEY, 3, MODEL), prompt)
    for length, width in ((4, WIDTH), (3, WIDTH + 1)):
        with pytest.raises(ValueError, match=rf"is \[3, {WIDTH}\], expected \[{length}, {width}\]"):
            init(KEY, length, model_of(jnp.zeros((9, width))))


def test_module_starts_from_its_initialiser():
    module = SoftPrompt(3, lambda key, shape: initializers.SampledVocabulary()(key, shape[0], MODEL))
    variables = module.init(KEY, jnp.zeros((2, 5, WIDTH)))
    prompt = variables["params"]["prompt"]
    assert (prompt.shape, prompt.dtype) == ((3, WIDTH), jnp.float32)
    embedded = jnp.ones((2, 5, WIDTH), jnp.bfloat16)
    found = module.apply(variables, embedded)
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, prompt)
    out = prepend_prompt(embedded, found)
    assert out.dtype == jnp.bfloat16  # the prompt follows the activations
    np.testing.assert_array_equal(out[:, 3:], embedded)
    np.testing.assert_array_equal(out[1, :3], prompt.astype(jnp.bfloat16))


@pytest.mark.parametrize("name", ["p.npy", OFFICIAL_NAME, "new/folders/p.npy"])
def test_files_round_trip(tmp_path, name):
    prompt = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)
    write_prompt(tmp_path / name, prompt)
    found = read_prompt(tmp_path / name)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, prompt)
    np.testing.assert_array_equal(np.load(tmp_path / name), prompt)  # anyone can read it
    assert [path.name for path in (tmp_path / name).parent.iterdir()] == [(tmp_path / name).name]


def test_folder_stands_for_the_official_file_in_it(tmp_path):
    write_prompt(tmp_path / OFFICIAL_NAME, np.ones((2, 3), np.float32))
    np.testing.assert_array_equal(read_prompt(tmp_path), np.ones((2, 3)))


@pytest.mark.parametrize("dtype", ["float16", "float64", ">f4"])
def test_other_floats_are_read_as_float32(tmp_path, dtype):
    np.save(tmp_path / "p.npy", np.array([[0.5, -2.0]], dtype))
    found = read_prompt(tmp_path / "p.npy")
    assert found.dtype == np.dtype("float32")
    np.testing.assert_array_equal(found, [[0.5, -2.0]])


@pytest.mark.parametrize(("name", "spread"), [("sst2", 51.8), ("mrpc", 32.3), ("rte", 34.5)])
def test_released_prompts(data_dir, name, spread):
    """The prompts published with the paper's code, for T5 1.1 base."""
    prompt = read_prompt(data_dir / "t5" / "released_prompts" / f"{name}.npy")
    assert (prompt.shape, prompt.dtype) == ((100, 768), np.float32)
    assert prompt.std() == pytest.approx(spread, abs=0.05)


def test_prompt_of_the_official_trainer(data_dir):
    """The file without suffix that T5X leaves beside a checkpoint."""
    folders = sorted((data_dir / "t5" / "t5x_runs" / "legacy").glob("**/numpy_checkpoints/checkpoint_*"))
    assert folders
    for folder in folders:
        assert read_prompt(folder).shape == (100, 4)


FORMATS = {
    "npy": write_prompt,
    "folder": lambda path, prompt: write_prompt(path / OFFICIAL_NAME, prompt),
    "peft": write_adapter,
    "t5x": lambda path, prompt: t5x.write(path, {IN_T5X[0]: prompt}),
    "official t5x": lambda path, prompt: t5x.write(path, {IN_T5X[1]: prompt}),
    "orbax": lambda path, prompt: t5x.write_orbax(path, {IN_T5X[0]: prompt, "encoder/encoder_norm/scale": prompt[0]}),
    "official orbax": lambda path, prompt: t5x.write_orbax(path, {IN_T5X[1]: prompt}),
}


@pytest.mark.parametrize("form", FORMATS)
def test_a_prompt_is_read_whatever_its_format(tmp_path, form):
    prompt = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)
    FORMATS[form](tmp_path / "prompt", prompt)
    found = read_prompt(tmp_path / "prompt")
    assert found.dtype == np.float32
    assert found.tobytes() == prompt.tobytes()
    assert read_prompt(str(tmp_path / "prompt")).tobytes() == prompt.tobytes()


@pytest.mark.parametrize("write", [t5x.write, t5x.write_orbax])
def test_other_floats_in_t5x_are_read_as_float32(tmp_path, write):
    for dtype in (ml_dtypes.bfloat16, np.float16):
        write(tmp_path / "checkpoint", {IN_T5X[0]: np.array([[0.5, -2.0, 3.25]], dtype)})
        found = read_prompt(tmp_path / "checkpoint")
        assert found.dtype == np.dtype("float32")
        np.testing.assert_array_equal(found, [[0.5, -2.0, 3.25]])


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (np.zeros((2, 3), np.int32), "int32"),
        (np.zeros(3, np.float32), "float32 [3]"),
        (np.zeros((1, 2, 3), np.float32), "float32 [1, 2, 3]"),
        (np.array([[1.0, np.nan]], np.float32), "NaN or infinity"),
    ],
)
@pytest.mark.parametrize("write", [t5x.write, t5x.write_orbax])
def test_what_is_no_prompt_in_t5x_is_refused(tmp_path, write, array, said):
    write(tmp_path / "checkpoint", {IN_T5X[0]: array})
    assert said in refused(tmp_path / "checkpoint")


def test_a_checkpoint_without_a_prompt_is_refused(tmp_path):
    t5x.write(tmp_path / "checkpoint", {"encoder/encoder_norm/scale": np.ones(3, np.float32)})
    assert "has no prompt among its parameters" in refused(tmp_path / "checkpoint")


def refused(path):
    """The one line that a user gets."""
    with pytest.raises(SettingError) as error:
        read_prompt(path)
    assert error.value.setting == "prompt_file"
    message = str(error.value)
    assert "\n" not in message
    assert str(path) in message
    return message


@pytest.mark.parametrize(
    ("array", "found"),
    [
        (np.zeros((2, 3), np.int32), r"int32 [2, 3]"),
        (np.zeros(3, np.float32), r"float32 [3]"),
        (np.zeros((1, 2, 3), np.float32), r"float32 [1, 2, 3]"),
        (np.zeros((0, 3), np.float32), r""),
        (np.array([[1.0, np.nan]], np.float32), "NaN or infinity"),
        (np.array([[1.0, -np.inf]], np.float32), "NaN or infinity"),
        (np.array([[1e300]]), "NaN or infinity"),
    ],
)
def test_arrays_that_are_no_prompt_are_refused(tmp_path, array, found):
    np.save(tmp_path / "p.npy", array)
    assert found in refused(tmp_path / "p.npy")


def test_absent_files_are_refused(tmp_path):
    assert "no prompt file" in refused(tmp_path / "absent.npy")
    with pytest.raises(ValueError, match=f"no prompt file .*{OFFICIAL_NAME}"):
        read_prompt(tmp_path)  # an empty folder


def test_only_regular_files_are_opened(tmp_path):
    """A named pipe would be waited for without end."""
    os.mkfifo(tmp_path / "pipe.npy")
    (tmp_path / "device.npy").symlink_to("/dev/zero")
    for name in ("pipe.npy", "device.npy"):
        assert "is no regular file" in refused(tmp_path / name)


def saved(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


WHOLE = saved(np.arange(6, dtype=np.float32).reshape(2, 3))
HEADER = len(WHOLE) - 24


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
@given(content=st.binary(max_size=200) | st.binary(max_size=100).map(lambda tail: b"\x93NUMPY\x01\x00" + tail))
def test_random_bytes_are_refused(tmp_path, content):
    (tmp_path / "p.npy").write_bytes(content)
    refused(tmp_path / "p.npy")


def test_truncated_files_are_refused(tmp_path):
    for length in range(len(WHOLE)):
        (tmp_path / "p.npy").write_bytes(WHOLE[:length])
        refused(tmp_path / "p.npy")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
@given(place=st.integers(0, HEADER - 1), byte=st.integers(0, 255) | st.sampled_from(b"'\"()[]9,: \n#\\"))
def test_damaged_headers_are_refused_or_harmless(tmp_path, place, byte):
    """A changed byte in a file's header: a prompt all the same, or one line; never another error, never a crash."""
    damaged = bytearray(WHOLE)
    damaged[place] = byte
    (tmp_path / "p.npy").write_bytes(damaged)
    try:
        prompt = read_prompt(tmp_path / "p.npy")
    except ValueError:
        refused(tmp_path / "p.npy")
    else:
        assert prompt.ndim == 2
        assert prompt.dtype == np.float32


def test_sizes_that_the_file_cannot_hold_are_refused(tmp_path):
    """A header that promises 4 TB is found out before any memory is asked for."""
    header = WHOLE.replace(b"(2, 3), }" + b" " * 12, b"(1048576, 1048576), }")
    assert header != WHOLE
    (tmp_path / "p.npy").write_bytes(header)
    refused(tmp_path / "p.npy")


class Exploit:
    """Unpickling this writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_reading_never_unpickles(tmp_path):
    """A prompt from a stranger runs no code, whatever kind of file it is."""
    harm = tmp_path / "harm"
    objects = np.empty((1, 1), object)
    objects[0, 0] = Exploit(harm)
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("arr_0.npy", saved(objects))
    for content in (saved(objects), pickle.dumps(Exploit(harm)), archive.getvalue()):
        (tmp_path / "p.npy").write_bytes(content)
        refused(tmp_path / "p.npy")
        assert not harm.exists()


def test_gradients_of_the_rows_are_summed_in_the_prompts_dtype():
    """In bfloat16 activations a sum of 1 and 255 times 2**-8 would be 1, or what the order of adding makes of it."""
    rows = np.full((256, 2, 4), 2.0**-8, np.float32)
    rows[0] = 1.0
    weights = jnp.asarray(rows, jnp.bfloat16)

    def loss(prompt):
        return jnp.sum(
            prepend_prompt(jnp.zeros((256, 3, 4), jnp.bfloat16), prompt)[:, :2].astype(jnp.float32) * weights
        )

    gradient = jax.grad(loss)(jnp.ones((2, 4), jnp.float32))
    assert gradient.dtype == jnp.float32
    np.testing.assert_array_equal(gradient, np.full((2, 4), 1 + 255 / 256, np.float32))
