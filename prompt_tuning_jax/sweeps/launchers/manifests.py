"""What the launchers on Kubernetes share: where manifests lie, what a job is called, and the pods' volume."""

import hashlib
import re
from pathlib import Path, PurePosixPath

from prompt_tuning_jax.errors import Setting, SettingError
from prompt_tuning_jax.sweeps.jobs import Job

# Clusters put a job's name into those of pods, services and node pools, which have 63 characters: xpk takes 40, and 28
# for jobs that span slices of its super-slicing.
LONGEST_NAME = 28
MAX_RESTARTS = 20  # of a job that is preempted or crashes; it goes on from its last checkpoint
GRACE_SECONDS = 120  # from SIGTERM to SIGKILL: to save


def workload_name(job: Job, sweep_dir: str) -> str:
    """A DNS label for the job: the sweep's name, and a hash of SWEEP_DIR and the job's trials.

    It stays the same when the sweep is started again, whatever number the job then has, so that a cluster does not run
    a job twice.
    """
    identity = "\n".join([sweep_dir, *(trial.name for trial in job.trials)])
    code = hashlib.sha256(identity.encode()).hexdigest()[:8]
    name = re.sub(r"[^a-z0-9]+", "-", Path(sweep_dir).name.lower()).strip("-")
    if not name[:1].isalpha():
        name = f"sweep-{name}"
    return f"{name[: LONGEST_NAME - 9].strip('-')}-{code}"


def empty_folder(sweep_dir: str) -> Path:
    """SWEEP_DIR/manifests, without those of an earlier start, which may be of trials that are finished."""
    folder = Path(sweep_dir, "manifests")
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("*.yaml"):
        path.unlink()
    return folder


def check_volume(sweep_dir: str, mount: str) -> None:
    """Pods work in `mount`, so that a relative SWEEP_DIR lies in the volume there.

    Raises:
      ValueError: SWEEP_DIR lies elsewhere, and would end with the pod.
    """
    path = PurePosixPath(mount, sweep_dir)
    if ".." in path.parts or not path.is_relative_to(mount):
        raise SettingError(
            Setting("sweep_dir"),
            f" {sweep_dir} lies outside {mount}, where the pods' volume is, and would end with them: set it to a "
            f"folder below {mount}, or to a relative one, which is taken from there",
        )


def required(launcher: str, **fields: str | None) -> None:
    """Raises:
    ValueError: some of a launcher's fields are not set.
    """
    if missing := [f"{launcher}.{name}" for name, value in fields.items() if not value]:
        raise ValueError(f"set {' and '.join(missing)}")


def escaped(text: str) -> str:
    """A text of a container's command: Kubernetes fills in $(NAME), and takes $$ for a dollar."""
    return text.replace("$", "$$")
