"""Base models by their hub id, against a hub on loopback: what is fetched, what is said, and offline mode."""

import dataclasses
import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import gin
import pytest
from fixtures.fake_hub import TOKEN, serving
from tiny import CONFIG, LENGTHS, ROOT, own_caches, random_params

import prompt_tuning_jax as pt
from prompt_tuning_jax import convert, eval, infer
from prompt_tuning_jax.batches.data import dataset_of
from prompt_tuning_jax.checkpoints import hub, huggingface
from prompt_tuning_jax.checkpoints.base import load_base, open_model, resolve
from prompt_tuning_jax.checkpoints.t5x_names import CHECKPOINTS
from prompt_tuning_jax.errors import SettingError
from prompt_tuning_jax.prompts.files import write_prompt
from prompt_tuning_jax.train import main as train_main
from prompt_tuning_jax.training import loop
from prompt_tuning_jax.training.eval_run import evaluate_prompt
from prompt_tuning_jax.training.run import TrainConfig

OTHERS = {"README.md": b"read me", "pytorch_model.bin": b"pickle", "flax_model.msgpack": b"flax", "tf_model.h5": b"tf"}
EXPECTED = "; expected a folder, an id on the hub or one of nano: set `where`"
ROWS = [{"inputs": "good", "targets": "positive"}, {"inputs": "bad", "targets": "negative"}]
DESCRIPTION = ["config.json", "spiece.model"]


def forget_hub():
    """Closes `huggingface_hub` and returns its modules: it reads the environment when it is imported."""
    if package := sys.modules.get("huggingface_hub"):
        package.close_session()
    modules = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "huggingface_hub"}
    for name in modules:
        del sys.modules[name]
    return modules


@pytest.fixture
def server():
    with serving() as server:
        yield server


@pytest.fixture
def client(server, tmp_path, monkeypatch):
    """Sets the environment of the hub's client, as for a new process: `client(HF_HUB_OFFLINE="1")`."""
    before = forget_hub()

    def start(**variables):
        forget_hub()
        own = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1"}
        for name in ("HF_HUB_OFFLINE", "HF_TOKEN", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in (own | variables).items():
            monkeypatch.setenv(name, value)
        server.asked.clear()

    start()
    yield start
    forget_hub()
    sys.modules.update(before)


@pytest.fixture(scope="module")
def files(tiny):
    """The files of the tiny base model."""
    return {path.name: path.read_bytes() for path in tiny.base.iterdir()}


def refused(where, call=open_model):
    with pytest.raises(SettingError) as error:
        call(where)
    assert error.value.setting == "initial_checkpoint_path" and "\n" not in str(error.value)
    return str(error.value)


def test_a_model_is_loaded_by_its_id(server, client, files, tiny):
    """As from its folder; nothing is fetched that is not needed, and nothing twice."""
    commit = server.put("me/tiny", files | OTHERS)
    model, own = pt.load("me/tiny"), pt.load(str(tiny.base))
    assert (model.path, model.fingerprint) == (f"me/tiny@{commit}", own.fingerprint)
    assert model.tokenizer.fingerprint == own.tokenizer.fingerprint
    assert sorted(server.downloaded()) == ["config.json", "model.safetensors", "spiece.model"]
    client()
    assert pt.load("me/tiny").fingerprint == own.fingerprint
    assert [path for _, path, _ in server.asked if path != "/api/agent-harnesses"] == ["/api/models/me/tiny"]


def test_generation_config_and_tokenizer_files_are_fetched_if_there_are_any(server, client, files):
    more = dict.fromkeys(("generation_config.json", "tokenizer_config.json", "tokenizer.json"), b"{}")
    server.put("me/tiny", files | more | {"notes.json": b"{}", "onnx/config.json": b"{}"})
    assert {path.name for path in Path(hub.fetch("me/tiny")).iterdir()} == {*DESCRIPTION, *more}
    assert "model.safetensors" not in server.downloaded()


def test_one_set_of_weights_is_chosen():
    """safetensors before pickles before Flax's, whole or in shards; the order of the listing does not matter."""
    names = ["model.safetensors", "pytorch_model.bin", "flax_model.msgpack"]
    for preferred, *rest in (names, names[1:], names[2:]):
        for first in (preferred, f"{preferred}.index.json"):
            assert hub.first_weights([*(f"{name}.index.json" for name in rest), *rest, "tf_model.h5", first]) == first
    assert hub.first_weights(["tf_model.h5", "adapter_model.safetensors", "README.md"]) is None


def test_shards(server, client, tiny, tmp_path):
    params = random_params(0)
    huggingface.write(tmp_path / "sharded", CONFIG, params, tiny.vocabulary, shard_bytes=20_000)
    sharded = {path.name: path.read_bytes() for path in (tmp_path / "sharded").iterdir()}
    shards = [name for name in sharded if name.startswith("model-")]
    assert len(shards) > 1
    server.put("me/tiny", sharded | OTHERS | {"model.fp16-00001-of-00001.safetensors": b"another"})
    assert pt.load("me/tiny").fingerprint == pt.load(str(tiny.base)).fingerprint
    assert sorted(server.downloaded()) == sorted([*DESCRIPTION, *shards, "model.safetensors.index.json"])


def test_a_revision_is_a_tag_or_a_commit(server, client, files, tiny, tmp_path):
    huggingface.write(tmp_path / "other", CONFIG, random_params(1), tiny.vocabulary)
    other = {path.name: path.read_bytes() for path in (tmp_path / "other").iterdir()}
    first, second = server.put("me/tiny", files, "v1"), server.put("me/tiny", other)
    assert pt.load("me/tiny@v1").path == f"me/tiny@{first}"
    assert pt.load("me/tiny").path == f"me/tiny@{second}"
    assert pt.load("me/tiny@v1").fingerprint == pt.load(str(tiny.base)).fingerprint
    assert pt.load("me/tiny").fingerprint == pt.load(str(tmp_path / "other")).fingerprint
    client()
    assert pt.load(f"me/tiny@{first}").path == f"me/tiny@{first}"
    assert server.asked == []  # what a commit is cannot change


def test_a_folder_that_exists_wins(server, client, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny.base, "me/tiny")
    assert pt.load("me/tiny").path == str(tmp_path / "me" / "tiny")
    assert resolve("nano").endswith("bases/nano")
    Path("file").write_text("no folder")
    assert refused("file") == f"no base model at file{EXPECTED}"
    assert refused("no/such/folder") == f"no base model at no/such/folder{EXPECTED}"
    assert server.asked == []


@pytest.mark.parametrize(
    ("where", "setup", "why"),
    [
        ("me/none", {}, "there is no repository me/none on the hub (404; for a private one, set HF_TOKEN)"),
        ("me/tiny@v9", {}, "me/tiny on the hub has no revision v9 (404)"),
        ("me/secret", {}, "there is no repository me/secret on the hub (404; for a private one, set HF_TOKEN)"),
        ("me/gated", {}, "me/gated on the hub is gated (403): accept its terms at {url}/me/gated and set HF_TOKEN"),
        (
            "me/tiny",
            {"HF_TOKEN": "hf_bad"},
            "the hub refuses access to me/tiny (401): set HF_TOKEN to a token that may read it",
        ),
        ("me/tiny", {"down": 503}, "the hub at {url} answers 503 for me/tiny"),
        ("me/tiny", {"HF_ENDPOINT": "http://127.0.0.1:9"}, "the hub at http://127.0.0.1:9 cannot be reached ("),
        ("me..tiny", {}, "no repository on the hub has such a name (Cannot have -- or .. in repo_id: 'me..tiny'.)"),
        ("me/bare", {}, "me/bare on the hub has no config.json, which every model in Hugging Face's layout has"),
        ("me/tiny", {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set, and {cache} does not have all files of me/tiny"),
    ],
)
def test_what_the_hub_does_not_deliver_is_one_line(server, client, files, tmp_path, where, setup, why):
    for name in ("me/tiny", "me/secret", "me/gated"):
        server.put(name, files)
    server.put("me/bare", {"README.md": b"nothing else"})
    server.private.add("me/secret")
    server.gated.add("me/gated")
    server.down = setup.pop("down", None)
    client(**setup)
    line, why = refused(where), why.format(url=server.url, cache=tmp_path / "home" / "hub")
    assert line.startswith(f"no base model at {where}: no folder is there, and {why}")
    assert line.endswith(EXPECTED)


def test_a_token_opens_what_is_gated_or_private(server, client, files):
    server.put("me/gated", files)
    server.put("me/secret", files)
    server.private.add("me/secret")
    server.gated.add("me/gated")
    client(HF_TOKEN=TOKEN)
    assert open_model("me/gated").config == open_model("me/secret").config == CONFIG


def test_a_download_that_breaks_off_goes_on_where_it_broke(server, client, files, tiny, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1_000)
    server.put("me/tiny", files)
    server.broken["model.safetensors"] = 1
    assert pt.load("me/tiny").fingerprint == pt.load(str(tiny.base)).fingerprint
    (first, second) = [again for method, path, again in server.asked if method == "GET" and "model.safetensors" in path]
    size = len(files["model.safetensors"])
    assert first is None and size // 2 - 1_000 <= int(second.removeprefix("bytes=").removesuffix("-")) <= size // 2


def test_after_a_broken_download_only_what_is_missing_is_fetched(server, client, files, tiny, monkeypatch):
    from huggingface_hub import file_download

    monkeypatch.setattr(file_download.time, "sleep", lambda seconds: None)
    commit = server.put("me/tiny", files)
    server.broken["model.safetensors"] = 100
    line = refused("me/tiny")
    assert line.startswith(f"the download of me/tiny@{commit} from {server.url} failed (peer closed connection")
    assert line.endswith(": set `where` to a base model that can be read") and "the files that are missing" in line
    server.broken.clear()
    client()
    assert pt.load("me/tiny").fingerprint == pt.load(str(tiny.base)).fingerprint
    assert server.downloaded() == ["model.safetensors"]


def test_offline_a_filled_cache_is_enough(server, client, files, tiny, monkeypatch):
    """No socket is opened."""
    commit = server.put("me/tiny", files | OTHERS)
    pt.load("me/tiny")
    client(HF_HUB_OFFLINE="1")

    def no_socket(*_, **__):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", no_socket)
    monkeypatch.setattr(socket, "create_connection", no_socket)
    monkeypatch.setattr(socket, "getaddrinfo", no_socket)
    for where in ("me/tiny", f"me/tiny@{commit}"):
        model = pt.load(where)
        assert (model.path, model.fingerprint) == (f"me/tiny@{commit}", pt.load(str(tiny.base)).fingerprint)
    assert "does not have all files of me/tiny@v1" in refused("me/tiny@v1")


def test_offline_a_cache_that_another_program_filled_is_enough(server, client, files, tiny):
    """The cache then has no list of the commit's files."""
    from huggingface_hub import hf_hub_download

    server.put("me/tiny", files)
    for name in files:
        hf_hub_download("me/tiny", name)
    client(HF_HUB_OFFLINE="1")
    model = pt.load("me/tiny")
    assert model.fingerprint == pt.load(str(tiny.base)).fingerprint
    client()
    assert pt.load(resolve(model.path)).path == model.path
    assert "model.safetensors" not in server.downloaded()


def test_a_snapshots_own_path_is_a_folder_like_any_other(server, client, files):
    """Nothing is asked of the hub."""
    from huggingface_hub import hf_hub_download

    commit = server.put("me/tiny", files)
    folder = str(Path([hf_hub_download("me/tiny", name) for name in files][0]).parent)
    client()
    assert pt.load(folder).path == f"me/tiny@{commit}" and server.asked == []


def test_offline_weights_of_another_format_are_taken_if_they_alone_are_there(server, client, files):
    from huggingface_hub import hf_hub_download

    server.put("me/tiny", files | OTHERS)
    folder = hub.fetch("me/tiny")
    hf_hub_download("me/tiny", "pytorch_model.bin")
    client(HF_HUB_OFFLINE="1")
    hub.fetch_weights(folder)
    Path(folder, "pytorch_model.bin").unlink()
    with pytest.raises(hub.HubError, match="HF_HUB_OFFLINE is set"):
        hub.fetch_weights(folder)


def test_offline_a_part_of_the_files_is_not_enough(server, client, files):
    commit = server.put("me/tiny", files)
    hub.fetch("me/tiny")
    client(HF_HUB_OFFLINE="1")
    line = refused("me/tiny")
    assert line.startswith("HF_HUB_OFFLINE is set, and ")
    assert f"does not have all files of me/tiny@{commit}: set `where` to" in line


def test_the_cache_stands_in_for_a_hub_that_is_down(server, client, files):
    server.put("me/tiny", files)
    pt.load("me/tiny")
    client()
    server.down = 503
    assert pt.load("me/tiny").config.emb_dim == CONFIG.emb_dim


def test_what_is_refused_is_refused_before_its_weights_are_fetched(server, client, files):
    other = json.loads(files["config.json"]) | {"feed_forward_proj": "gated-tanh"}
    server.put("me/other", files | {"config.json": json.dumps(other).encode()})
    assert "feed_forward_proj is 'gated-tanh'" in refused("me/other")
    server.put("me/tiny", files)
    larger = dataclasses.replace(CONFIG, emb_dim=24)
    assert "another size than the configuration (emb_dim 16, not 24)" in refused(
        "me/tiny", lambda id: load_base(id, larger)
    )
    assert not [name for name in server.downloaded() if "safetensors" in name]


@pytest.mark.parametrize(
    ("index", "why"),
    [
        (None, "has no parameters, expected model.safetensors, pytorch_model.bin, flax_model.msgpack, or shards"),
        (b"[]", "model.safetensors.index.json is not an index of shards"),
        (b'{"weight_map": {"a": "../../../a"}}', "is not an index of shards (shards are named as files beside it)"),
        (
            b'{"weight_map": {"a": "model-00001-of-00001.safetensors"}}',
            "model-00001-of-00001.safetensors cannot be read",
        ),
    ],
)
def test_weights_that_are_not_there(server, client, files, index, why):
    kept = {name: data for name, data in files.items() if name != "model.safetensors"}
    server.put("me/tiny", kept if index is None else kept | {"model.safetensors.index.json": index})
    assert why in refused("me/tiny")


def test_processes_that_start_together_download_once(server, client, files):
    server.put("me/tiny", files)
    code = "from prompt_tuning_jax.checkpoints import hub; f = hub.fetch('me/tiny'); hub.fetch_weights(f); print(f)"
    processes = [
        subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    folders = {process.communicate(timeout=120)[0].strip() for process in processes}
    assert [process.returncode for process in processes] == [0, 0, 0]
    (folder,) = folders
    assert Path(folder, "model.safetensors").read_bytes() == files["model.safetensors"]
    assert server.downloaded().count("model.safetensors") == 1


def test_a_run_records_the_commit(server, client, files, tmp_path):
    """In summary.json and in the adapter that it writes; the run itself is known by the fingerprint alone."""
    commit = server.put("me/tiny", files)
    model = pt.load("me/tiny")
    options = {"steps": 1, "batch_size": 2, "optimizer": pt.adafactor(1e-3), "progress": False}
    pt.train(model, pt.LoRA(rank=1), ROWS, ROWS, folder=tmp_path, **options)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["base"], summary["base_fingerprint"]) == (f"me/tiny@{commit}", model.fingerprint)
    assert model.fingerprint in (text := (tmp_path / "run.json").read_text()) and commit not in text
    adapter = json.loads((tmp_path / "best" / "adapter" / "adapter_config.json").read_text())
    assert (adapter["base_model_name_or_path"], adapter["revision"]) == ("me/tiny", commit)


@pytest.fixture
def run(monkeypatch, capfd):
    """Runs `convert`, and returns what it prints, and its error."""

    def run(*arguments, main=convert.main):
        monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
        capfd.readouterr()
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code
        out, err = capfd.readouterr()
        assert code == (2 if "error: " in err else 0) and "Traceback" not in err
        return out, err

    return run


def test_command_lines_take_ids(server, client, files, tiny, tmp_path, run):
    server.put("me/tiny", files)
    run("me/tiny", tmp_path / "checkpoint_1", "--to=t5x")
    assert pt.load(str(tmp_path / "checkpoint_1")).fingerprint == pt.load(str(tiny.base)).fingerprint
    (tmp_path / "rows").write_text("")
    out, err = run("--base=me/tiny", "--text", f"--input={tmp_path / 'rows'}", main=infer.main)
    assert (out, err) == ("", "")
    why = "there is no repository me/none on the hub (404; for a private one, set HF_TOKEN)"
    line = f"error: no base model at me/none: no folder is there, and {why}{EXPECTED}".removesuffix("`where`")
    assert run("me/none", tmp_path / "other", "--to=t5x") == ("", f"{line}SOURCE\n")
    assert run("--base=me/none", main=infer.main) == ("", f"{line}--base\n")
    assert not (tmp_path / "other").exists()


def test_inspecting_an_id_fetches_no_weights(server, client, files, tiny, tmp_path, run):
    commit, size = server.put("me/tiny", files), len(files["model.safetensors"])
    out, err = run("--inspect", "me/tiny")
    lines = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert err == "" and lines["base"] == f"me/tiny@{commit}"
    assert lines["files"] == f"Hugging Face, model.safetensors, {size:,} bytes, not downloaded"
    assert lines["parameters"] == f"{sum(value.size for value in random_params(0).values()):,}"
    assert lines["dtype"] == "float32 (config.json)"
    assert "model.safetensors" not in server.downloaded()
    huggingface.write(tmp_path / "sharded", CONFIG, random_params(0), tiny.vocabulary, shard_bytes=20_000)
    sharded = {path.name: path.read_bytes() for path in (tmp_path / "sharded").iterdir()}
    sizes = [len(data) for name, data in sharded.items() if name.startswith("model-")]
    server.put("me/sharded", sharded)
    out, _ = run("--inspect", "me/sharded", "--fingerprint")
    assert f"Hugging Face, model-*.safetensors, {len(sizes)} shards, {sum(sizes):,} bytes\n" in out
    assert pt.load(str(tiny.base)).fingerprint in out


def test_gin_takes_ids(server, client, files, tiny, tmp_path, monkeypatch, run):
    """A base model of another size is refused before its weights are downloaded."""
    rows = dataset_of(ROWS, "train", batch_size=2, lengths={"inputs": 8, "targets": 4})
    data = {"train_dataset": rows, "eval_dataset": rows, "train_steps": 1, "eval_period": 1}
    options = data | {"method": pt.PromptTuning(2), "optimizer": pt.adafactor(0.3)}
    commit = server.put("me/tiny", files)
    config = TrainConfig(size=CONFIG, initial_checkpoint_path="me/tiny", **options)
    assert loop.open_model(config).path == f"me/tiny@{commit}"
    scored = evaluate_prompt(size=CONFIG, initial_checkpoint_path="me/tiny", dataset=rows, prompt_file=None)
    assert scored["base"] == f"me/tiny@{commit}"

    other = files["config.json"].replace(b'"d_model": 16', b'"d_model": 24')
    server.put("me/other", files | {"config.json": other})
    server.asked.clear()
    with own_caches(tiny, monkeypatch):
        macros = {"INITIAL_CHECKPOINT_PATH": "me/other", "MODEL_DIR": str(tmp_path / "run")}
        _, err = run(*tiny.arguments(**macros), main=train_main)
        assert "another size than the configuration (emb_dim 24, not 16)" in err
        assert err.endswith("INITIAL_CHECKPOINT_PATH to a checkpoint of the configured size\n")
        assert "config.json" in server.downloaded() and "model.safetensors" not in server.downloaded()
        gin.clear_config()
        lengths = f"--gin.TASK_FEATURE_LENGTHS={LENGTHS}"
        scored = (
            "--gin_file=runs/eval.gin",
            "--gin.MIXTURE_OR_TASK_NAME='demo_reviews'",
            "--gin.PROMPT_FILE=None",
            lengths,
        )
        _, err = run(f"--gin_file={tiny.gin}", *scored, "--gin.INITIAL_CHECKPOINT_PATH='me/none'", main=eval.main)
        assert "error: no base model at me/none: no folder is there, and there is no repository" in err
        assert err.endswith("set INITIAL_CHECKPOINT_PATH\n")
        assert not (tmp_path / "run").exists()


def test_the_base_of_a_prompt_to_convert_is_an_id(server, client, files, tmp_path, run):
    """Its width is compared if its size can be read; else the line says that it was not."""
    server.put("me/tiny", files)
    write_prompt(tmp_path / "good.npy", random_params(0)["token_embedder/embedding"][:3])
    write_prompt(tmp_path / "wide.npy", random_params(0)["encoder/layers_0/mlp/wi_0/kernel"][:3])
    _, err = run(tmp_path / "wide.npy", tmp_path / "no", "--to=peft", "--base=me/tiny")
    assert "is [3, 32], but me/tiny has d_model 16: set --base to the base it was trained on" in err
    out, _ = run(tmp_path / "good.npy", tmp_path / "peft", "--to=peft", "--base=me/tiny@main")
    assert out == f"{tmp_path / 'peft'}: a prompt, float32 [3, 16]\n"
    adapter = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (adapter["base_model_name_or_path"], adapter["revision"]) == ("me/tiny", "main")
    assert not [name for name in server.downloaded() if "safetensors" in name]
    out, _ = run(tmp_path / "wide.npy", tmp_path / "other", "--to=peft", "--base=me/none")
    assert "; the width of me/none was not checked: there is no repository me/none on the hub" in out


def test_published_t5x_checkpoints_have_short_names():
    bucket = "gs://t5-data/pretrained_models/t5x"
    assert resolve("t5x:t5_1_1_lm100k_xxl") == f"{bucket}/t5_1_1_lm100k_xxl/checkpoint_1100000"
    assert resolve("t5x:flan_t5_xl") == f"{bucket}/flan_t5_xl/checkpoint_1138000"
    assert resolve("t5x:t5_base") == f"{bucket}/t5_base/checkpoint_999900"
    assert len(CHECKPOINTS) == 30
    assert refused("t5x:t5_1_1_lm100k_bse").startswith(
        "T5X publishes no 't5_1_1_lm100k_bse'; did you mean t5_1_1_lm100k_base"
    )
