"""Runs the jobs of a sweep on TPU slices of a GKE cluster, through Google's `xpk` (Accelerated Processing Kit)."""

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
    """One workload a job. xpk knows how many hosts a TPU type has.

    A workload that is preempted or crashes starts again, and goes on from its last checkpoint; one that ends with an
    error (exit code 1 or 2) does not. Where a workload of a job's name is there, xpk asks before it replaces it.

    Attributes:
      cluster: its name.
      tpu_type: "v5litepod-16", "v6e-8", ...
      docker_image: which has this package installed; used as it is.
      project: of Google Cloud.
      zone: of the cluster.
      num_slices: slices a workload.
      storage: names of the cluster's storages (`xpk storage list`), besides those that it mounts for every workload.
      mount: where the storage of SWEEP_DIR is mounted. Workloads run in it, so a relative path is taken from there.
      dry_run: only write each workload's manifest, to SWEEP_DIR/manifests; needs neither a cluster nor gcloud.
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
          0, or 1 where xpk failed; the workloads after that one are not created.

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
            # Not captured outside of a dry run: xpk asks, and tells what it waits for.
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
        """The command line of xpk that creates a job's workload."""
        # xpk sends SIGTERM to the subshell that runs this, which bash before 5.1 keeps beside training: `exec`.
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
