"""Runs the jobs of a sweep on TPU slices of a GKE cluster, with Google's `xpk` (Accelerated Processing Kit)."""

import dataclasses
import shlex
import shutil
import subprocess
from collections.abc import Sequence

from prompt_tuning_jax.settings import Count, Switch, Text, Texts, check_fields
from prompt_tuning_jax.sweeps.jobs import Job
from prompt_tuning_jax.sweeps.launchers import manifests
from prompt_tuning_jax.sweeps.launchers.print_commands import shell_line


@dataclasses.dataclass(frozen=True)
class Xpk:
    """Creates one workload per job. xpk knows how many hosts a TPU type has.

    A workload that is preempted or crashes is restarted and resumes from its last checkpoint. A workload that exits
    with an error (exit code 1 or 2) is not restarted. If a workload with the job's name exists, xpk asks before it
    replaces it.

    Attributes:
      cluster: the name of the GKE cluster.
      tpu_type: "v5litepod-16", "v6e-8", ...
      docker_image: a container image that has this package installed. It is used unchanged.
      project: the Google Cloud project.
      zone: the zone of the cluster.
      num_slices: the number of TPU slices per workload.
      storage: names of the cluster's storages (`xpk storage list`), in addition to those that xpk mounts for every
        workload.
      mount: the path where the storage with SWEEP_DIR is mounted. It is the workloads' working directory, so relative
        paths start there.
      dry_run: whether to only write each workload's manifest to SWEEP_DIR/manifests. Needs neither a cluster nor
        gcloud.
    """

    cluster: Text | None = None
    tpu_type: Text | None = None
    docker_image: Text | None = None
    project: Text | None = None
    zone: Text | None = None
    num_slices: Count = 1
    storage: Texts = ()
    mount: Text = "/mnt/sweeps"
    dry_run: Switch = False

    def __post_init__(self):
        check_fields(self)

    def launch(self, jobs: Sequence[Job], sweep_dir: str) -> int:
        """Creates the workloads, and does not wait for them.

        Returns:
          0, or 1 if xpk failed for a workload; the workloads after it are then not created.

        Raises:
          ValueError: xpk is not installed, a field is missing, SWEEP_DIR is not in the volume, or a dry run failed.
        """
        if shutil.which("xpk") is None:
            raise ValueError(
                "no xpk on PATH: install it with `pipx install xpk` (an environment of its own, since its requirements "
                "differ from those of this package), or choose --launcher=jobset"
            )
        required = ("cluster", "tpu_type", "docker_image", "project", "zone")
        manifests.required("Xpk", **{name: getattr(self, name) for name in required})
        manifests.check_volume(sweep_dir, self.mount)
        folder = manifests.empty_folder(sweep_dir)
        for number, job in enumerate(jobs):
            manifest = str(folder / f"{job.name}.yaml")
            command = self.command_line(job, sweep_dir, manifest)
            # Only a dry run's output is captured: otherwise xpk asks questions and says what it waits for.
            ended = subprocess.run(command, capture_output=self.dry_run, text=True)
            if ended.returncode and self.dry_run:
                raise ValueError(f"xpk refused job {job.name}: {_last_line(ended.stderr + ended.stdout)}")
            if ended.returncode:
                print(f"xpk failed with exit code {ended.returncode} at job {job.name}: {number} workloads are created")
                return 1
            if self.dry_run:
                print(manifest)
        if not self.dry_run:
            print(f"{len(jobs)} workloads: `xpk workload list --cluster={self.cluster}` shows them")
        return 0

    def command_line(self, job: Job, sweep_dir: str, manifest: str) -> list[str]:
        """Returns the xpk command line that creates a job's workload."""
        # xpk sends SIGTERM to the subshell that runs this command. Before 5.1, bash keeps that subshell as training's
        # parent, and training would not get the signal; `exec` replaces the subshell by training.
        command = f"cd {shlex.quote(self.mount)} && exec {shell_line(job.command_line)}"
        return [
            *("xpk", "workload", "create"),
            f"--workload={manifests.workload_name(job, sweep_dir)}",
            f"--cluster={self.cluster}",
            f"--tpu-type={self.tpu_type}",
            f"--num-slices={self.num_slices}",
            f"--docker-image={self.docker_image}",
            f"--project={self.project}",
            f"--zone={self.zone}",
            *(f"--storage={name}" for name in self.storage),
            f"--max-restarts={manifests.MAX_RESTARTS}",
            f"--termination-grace-period-seconds={manifests.GRACE_SECONDS}",
            "--env=PYTHONUNBUFFERED=1",
            f"--command={manifests.escaped(command)}",
            f"--output-manifest-file={manifest}",
            *(["--dry-run"] if self.dry_run else []),
        ]


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip() if lines else "it said nothing"
