"""Provides what both Kubernetes launchers need: the folder of manifests, the jobs' names, and checks of the volume."""

import hashlib
import re
from pathlib import Path, PurePosixPath

from prompt_tuning_jax.errors import Setting, SettingError
from prompt_tuning_jax.sweeps.jobs import Job

# Clusters put a job's name into the names of pods, services and node pools, which are limited to 63 characters. xpk
# allows 40 characters for it, and 28 for jobs that span slices with its super-slicing.
LONGEST_NAME = 28
MAX_RESTARTS = 20  # for a job that is preempted or crashes; it resumes from its last checkpoint
GRACE_SECONDS = 120  # between SIGTERM and SIGKILL, in which the job saves


def workload_name(job: Job, sweep_dir: str) -> str:
    """Returns a DNS label for the job: the sweep's name, and a hash of SWEEP_DIR and the names of the job's trials.

    The label does not depend on the job's number, so it is the same when the sweep is started again. A cluster thus
    never runs the same job twice.
    """
    identity = "\n".join([sweep_dir, *(trial.name for trial in job.trials)])
    code = hashlib.sha256(identity.encode()).hexdigest()[:8]
    name = re.sub(r"[^a-z0-9]+", "-", Path(sweep_dir).name.lower()).strip("-")
    if not name[:1].isalpha():
        name = f"sweep-{name}"
    return f"{name[: LONGEST_NAME - 9].strip('-')}-{code}"


def empty_folder(sweep_dir: str) -> Path:
    """Returns SWEEP_DIR/manifests after deleting the manifests of an earlier start, whose trials may be finished."""
    folder = Path(sweep_dir, "manifests")
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("*.yaml"):
        path.unlink()
    return folder


def check_volume(sweep_dir: str, mount: str) -> None:
    """Checks that SWEEP_DIR is in the pods' volume. A relative SWEEP_DIR is, since pods work in `mount`.

    Raises:
      ValueError: SWEEP_DIR is outside `mount`, so its files would be deleted with the pod.
    """
    path = PurePosixPath(mount, sweep_dir)
    if ".." in path.parts or not path.is_relative_to(mount):
        raise SettingError(
            Setting("sweep_dir"),
            f" {sweep_dir} lies outside {mount}, where the pods' volume is, and would end with them: set it to a "
            f"folder below {mount}, or to a relative one, which is taken from there",
        )


def required(launcher: str, **fields: str | None) -> None:
    """Checks that a launcher's required fields are set.

    Raises:
      ValueError: some of `fields` are None or empty.
    """
    if missing := [f"{launcher}.{name}" for name, value in fields.items() if not value]:
        raise ValueError(f"set {' and '.join(missing)}")


def escaped(text: str) -> str:
    """Escapes an argument of a container's command: Kubernetes expands $(NAME), and reads $$ as one dollar sign."""
    return text.replace("$", "$$")
