"""Downloads base models by their hub id: `google/flan-t5-base`, or `google/flan-t5-base@REVISION`.

`huggingface_hub` downloads into its own cache, and reads its own environment variables: HF_HOME, HF_ENDPOINT, HF_TOKEN,
HF_HUB_OFFLINE and others. It is imported only for text that has the form of an id. A snapshot is the folder that the
cache has for one commit of the repository.
"""

import re
from collections.abc import Collection
from pathlib import Path

from prompt_tuning_jax.array_files.shards import INDEX, read_index
from prompt_tuning_jax.array_files.stored import ArrayError, first_line

CONFIG = "config.json"
# The files that describe a base model: everything but its parameters.
DESCRIPTION = (
    CONFIG,
    "generation_config.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
)
# The files of parameters, the preferred format first. Shards have an index, such as model.safetensors.index.json.
WEIGHTS = ("model.safetensors", "pytorch_model.bin", "flax_model.msgpack")

_ID = re.compile(r"([A-Za-z0-9][\w.-]*(?:/[\w.-]+)?)(?:@([^@\s]+))?", re.ASCII)
_SNAPSHOT = re.compile(r".*/models--([^/]+)/snapshots/([0-9a-f]{40})")


class HubError(ValueError):
    """Says in one line why a base model on the hub cannot be found or downloaded."""


def is_id(text: str) -> bool:
    """Returns whether `text` has the form of an id: NAME or OWNER/NAME, and @REVISION or nothing.

    >>> is_id("google/flan-t5-base@main"), is_id("/bases/flan-t5-base")
    (True, False)
    """
    return _ID.fullmatch(text) is not None


def fetch(text: str) -> str:
    """Returns the snapshot of a base model with its configuration and tokenizer; no parameters are downloaded.

    If the hub cannot be reached, or HF_HUB_OFFLINE is set, the snapshot in the cache is returned.

    Args:
      text: an id. Its revision is a branch, a tag or a commit; without one it is the main branch.

    Raises:
      HubError: there is no such repository or revision, or its files cannot be downloaded.
    """
    found = _ID.fullmatch(text)
    if found is None:
        raise HubError(f"{text} is no id on the hub")
    from huggingface_hub import constants, is_offline_mode, resolve_revision

    repository, revision = found.groups()
    try:
        # Only once, so that all files are of the same commit. In offline mode the library's own fallback would warn.
        commit = resolve_revision(repository, revision=revision, local_files_only=is_offline_mode()).resolved
    except Exception as error:
        raise HubError(_reason(error, repository, revision)) from None
    cache = Path(constants.HF_HUB_CACHE).expanduser().resolve()
    folder = cache / f"models--{repository.replace('/', '--')}" / "snapshots" / commit
    _download(folder, DESCRIPTION)
    if not (folder / CONFIG).is_file():
        raise HubError(f"{repository} on the hub has no {CONFIG}, which every model in Hugging Face's layout has")
    return str(folder)


def fetch_weights(folder: str) -> None:
    """Downloads the parameters of a snapshot that are not in the cache yet. Does nothing if `folder` is not a snapshot.

    Raises:
      HubError: the repository has no parameters, or they cannot be downloaded.
    """
    snapshot = _SNAPSHOT.fullmatch(folder)
    if snapshot is None:
        return
    path, first = Path(folder), first_weights(files(folder))
    if first is None:
        formats = ", ".join(WEIGHTS)
        raise HubError(f"{name_of(folder)} has no parameters, expected {formats}, or shards of one of these")
    try:
        _download(path, [first])
        if first.endswith(INDEX):
            _download(path, _shards(path / first))
    except HubError:
        if not _has_weights(path):  # another program may have downloaded them in another format
            raise


def first_weights(names: Collection[str]) -> str | None:
    """Returns the name of the file of parameters to read, or of the index of its shards; None if `names` has neither.

    >>> first_weights(["pytorch_model.bin", "model.safetensors.index.json", "flax_model.msgpack"])
    'model.safetensors.index.json'
    """
    return next((name for file in WEIGHTS for name in (file, file + INDEX) if name in names), None)


def files(folder: str) -> dict[str, int]:
    """Returns the size in bytes of each file of a snapshot's commit, whether or not it is downloaded.

    If the cache has no list of the commit's files, or `folder` is no snapshot, the files in the folder are returned.
    """
    listed = _listed(Path(folder))
    if listed is not None:
        return listed
    return {path.name: path.stat().st_size for path in Path(folder).iterdir() if path.is_file()}


def name_of(folder: str) -> str | None:
    """Returns the id of a snapshot with its commit; None if `folder` is not a snapshot.

    >>> name_of("/cache/models--google--flan-t5-base/snapshots/7bcac572ce56db69c1ea7c8af255c5d7c9672fc2")
    'google/flan-t5-base@7bcac572ce56db69c1ea7c8af255c5d7c9672fc2'
    """
    snapshot = _SNAPSHOT.fullmatch(folder)
    return snapshot and f"{_repository(snapshot)}@{snapshot[2]}"


def _repository(snapshot: re.Match[str]) -> str:
    return snapshot[1].replace("--", "/", 1)  # an id has no "--" of its own


def _listed(folder: Path) -> dict[str, int] | None:
    """Returns the size of each file of a snapshot's commit; None if the cache has no list of them."""
    snapshot = _SNAPSHOT.fullmatch(str(folder))
    if snapshot is None:
        return None
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    try:
        tree = get_cached_repo_tree(_repository(snapshot), revision=snapshot[2], cache_dir=folder.parents[2])
    except CachedRepoTreeNotFoundError:
        return None
    return {file.path: file.size for file in tree}


def _shards(index: Path) -> list[str]:
    """Returns the names of the shards that an index lists."""
    try:
        return sorted(set(read_index(index).values()))
    except ArrayError as error:
        raise HubError(str(error)) from None


def _has_weights(folder: Path) -> bool:
    first = first_weights([path.name for path in folder.iterdir()])
    if first is None:
        return False
    return not first.endswith(INDEX) or all((folder / shard).is_file() for shard in _shards(folder / first))


def _download(folder: Path, names: Collection[str]) -> None:
    """Downloads those of the named files that the repository of a snapshot has and the snapshot lacks.

    Several processes may call this at the same time: the cache's locks let one of them download a file.

    Raises:
      HubError: a file cannot be downloaded.
    """
    listed = _listed(folder)
    if all((folder / name).is_file() for name in names if listed is None or name in listed):
        return
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import tqdm

    class Bar(tqdm):
        def __init__(self, *args, **options):
            # Shows the bar of bytes, and hides the bar of files.
            hidden = {} if options.get("unit") == "B" else {"disable": True}
            super().__init__(*args, **options | hidden)

    snapshot = _SNAPSHOT.fullmatch(str(folder))
    assert snapshot is not None
    try:
        snapshot_download(
            _repository(snapshot),
            revision=snapshot[2],
            cache_dir=folder.parents[2],
            allow_patterns=[*names],
            tqdm_class=Bar,
        )
    except Exception as error:  # errors of HTTP, of Xet and of the disk have many types
        raise HubError(_reason(error, _repository(snapshot), snapshot[2])) from None


def _reason(error: Exception, repository: str, revision: str | None) -> str:
    """Returns the message for users about an exception of `huggingface_hub`."""
    from huggingface_hub import constants, errors, is_offline_mode

    named = repository if revision is None else f"{repository}@{revision}"
    # Before a download, the HTTP error is the cause of another error, which says that the file is not in the cache.
    before = isinstance(error, (errors.RevisionResolutionError, errors.LocalEntryNotFoundError))
    cause = error.__cause__ if before and error.__cause__ else error
    status = cause.response.status_code if isinstance(cause, errors.HfHubHTTPError) else None
    if before and is_offline_mode():
        return f"HF_HUB_OFFLINE is set, and {constants.HF_HUB_CACHE} does not have all files of {named}"
    if isinstance(cause, errors.HFValidationError):
        return f"no repository on the hub has such a name ({first_line(cause)})"
    if isinstance(cause, errors.GatedRepoError):
        page = f"{constants.ENDPOINT}/{repository}"
        return f"{repository} on the hub is gated ({status}): accept its terms at {page} and set HF_TOKEN"
    if isinstance(cause, errors.RepositoryNotFoundError):
        return f"there is no repository {repository} on the hub ({status}; for a private one, set HF_TOKEN)"
    if isinstance(cause, errors.RevisionNotFoundError):
        return f"{repository} on the hub has no revision {revision} ({status})"
    if status in (401, 403):
        return f"the hub refuses access to {repository} ({status}): set HF_TOKEN to a token that may read it"
    if status is not None:
        return f"the hub at {constants.ENDPOINT} answers {status} for {repository}"
    if before:
        return f"the hub at {constants.ENDPOINT} cannot be reached ({first_line(cause)})"
    failed = f"the download of {named} from {constants.ENDPOINT} failed ({first_line(error)})"
    return f"{failed}; the same command downloads the files that are missing"
