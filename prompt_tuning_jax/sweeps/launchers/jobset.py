"""Writes the jobs of a sweep as Kubernetes JobSets (jobset.x-k8s.io/v1alpha2), for TPU slices, GPUs or CPUs."""

import dataclasses
import math
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from prompt_tuning_jax.errors import Setting, SettingError, near_misses
from prompt_tuning_jax.settings import Count, MappingOf, Settings, String, Switch, Text, check_fields
from prompt_tuning_jax.sweeps.jobs import Job
from prompt_tuning_jax.sweeps.launchers import manifests

CHIPS_PER_HOST = 4  # in every TPU slice with more than one host
SECONDS_KEPT = 3600  # how long a finished JobSet and the logs of its pods are kept

# Maps each TPU to GKE's name for it and to the number of dimensions of its topologies
# (https://cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus).
TPUS = {
    "v4": ("tpu-v4-podslice", 3),
    "v5e": ("tpu-v5-lite-podslice", 2),
    "v5p": ("tpu-v5p-slice", 3),
    "v6e": ("tpu-v6e-slice", 2),
}


class Pods(NamedTuple):
    """Describes the pods of one TPU slice, or the one pod on a GPU or CPU node.

    Attributes:
      count: the number of pods, one per host.
      limits: the number of accelerators per pod, by resource name.
      node_selector: the labels that a node must have.
    """

    count: int
    limits: Mapping[str, int]
    node_selector: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class JobSet:
    """Writes one JobSet per job, and optionally applies it.

    A JobSet that is preempted or crashes is restarted and resumes from its last checkpoint. A JobSet that exits with an
    error is not restarted.

    Attributes:
      image: a container image that has this package installed.
      accelerator: a TPU ("v4", "v5e", "v5p" or "v6e"), or GKE's name of a GPU such as "nvidia-l4"; None for any node.
      topology: the topology of a TPU slice, such as "2x4" or "2x2x1".
      devices: the number of accelerators per pod. None means: on a TPU, all chips of a host, which are 4 or the whole
        of a smaller slice (a 2x4 slice of v5e or v6e may also be one host with 8); on a GPU node, 1; otherwise 0.
      slices: the number of TPU slices per job.
      claim: the PersistentVolumeClaim that holds SWEEP_DIR. Set this or `bucket`.
      bucket: the Cloud Storage bucket that holds SWEEP_DIR, mounted with Cloud Storage FUSE.
      mount: the path where the volume is mounted. It is the pods' working directory, so relative paths start there.
      namespace: the Kubernetes namespace of the JobSets.
      queue: a LocalQueue of Kueue, or None.
      service_account: a Kubernetes service account that may use the bucket.
      node_selector: additional labels that a node must have, such as {"cloud.google.com/gke-spot": "true"}.
      apply: whether to run `kubectl apply` on the manifests.
    """

    image: Text | None = None
    accelerator: Text | None = None
    topology: Text | None = None
    devices: Count | None = None
    slices: Count = 1
    claim: Text | None = None
    bucket: Text | None = None
    mount: Text = "/mnt/sweeps"
    namespace: Text = "default"
    queue: Text | None = None
    service_account: Text | None = None
    node_selector: Annotated[Settings, MappingOf(String())] = dataclasses.field(default_factory=dict)
    apply: Switch = False

    def __post_init__(self):
        check_fields(self)

    def launch(self, jobs: Sequence[Job], sweep_dir: str) -> int:
        """Writes SWEEP_DIR/manifests/<job>.yaml, applies it if `apply` is set, and does not wait for the jobs.

        Raises:
          ValueError: a field is missing or invalid, kubectl is not on PATH, or SWEEP_DIR is not in the volume.
        """
        import yaml

        if self.apply and shutil.which("kubectl") is None:
            raise ValueError("no kubectl on PATH: install it, or set JobSet.apply = False and apply them elsewhere")
        manifests.required("JobSet", image=self.image)
        manifests.check_volume(sweep_dir, self.mount)
        written = {job.name: self.manifest(job, sweep_dir) for job in jobs}
        folder = manifests.empty_folder(sweep_dir)
        for name, manifest in written.items():
            text = yaml.safe_dump(manifest, sort_keys=False, allow_unicode=True, width=120)
            Path(folder, f"{name}.yaml").write_text(text, encoding="utf-8")
        if not self.apply:
            print(f"{len(written)} manifests in {folder}: `kubectl apply -f {folder}` starts them")
            return 0
        return 1 if subprocess.run(["kubectl", "apply", "-f", str(folder)]).returncode else 0

    def manifest(self, job: Job, sweep_dir: str) -> dict[str, Any]:
        """Returns the JobSet of a job, as the dictionary that is written to YAML.

        Raises:
          ValueError: the accelerator or topology is unknown, or not exactly one of `claim` and `bucket` is set.
        """
        pods = pods_of_slice(self.accelerator, self.topology, self.devices)
        name = manifests.workload_name(job, sweep_dir)
        annotations = {}
        if pods.count > 1:
            # A slice is a node pool. Without this, another job's pod could take one of its hosts.
            annotations["alpha.jobset.sigs.k8s.io/exclusive-topology"] = "cloud.google.com/gke-nodepool"
        return {
            "apiVersion": "jobset.x-k8s.io/v1alpha2",
            "kind": "JobSet",
            "metadata": _without_empty(
                {
                    "name": name,
                    "namespace": self.namespace,
                    "labels": {"kueue.x-k8s.io/queue-name": self.queue} if self.queue else {},
                    "annotations": annotations,
                }
            ),
            "spec": {
                "network": {"enableDNSHostnames": True},  # a headless service: a slice's hosts find each other by name
                "ttlSecondsAfterFinished": SECONDS_KEPT,
                "failurePolicy": {
                    "maxRestarts": manifests.MAX_RESTARTS,
                    "rules": [
                        {"name": "error", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]},
                    ],
                },
                "replicatedJobs": [
                    {"name": "slice", "replicas": self.slices, "template": {"spec": self._job(job, pods)}},
                ],
            },
        }

    def _job(self, job: Job, pods: Pods) -> dict[str, Any]:
        # Exit code 2 is a user's mistake and 1 is a traceback. With several hosts, 1 may also be a traceback that the
        # preemption of another host caused, so it does not stop the JobSet.
        errors = [1, 2] if pods.count * self.slices == 1 else [2]
        return {
            "parallelism": pods.count,
            "completions": pods.count,
            "completionMode": "Indexed",
            "backoffLimit": 0,  # only the JobSet restarts: the hosts of a slice must restart together
            "podFailurePolicy": {
                "rules": [
                    {
                        "action": "FailJob",
                        "onExitCodes": {"containerName": "trial", "operator": "In", "values": errors},
                    }
                ]
            },
            "template": self._pod(job, pods),
        }

    def _pod(self, job: Job, pods: Pods) -> dict[str, Any]:
        container = {
            "name": "trial",
            "image": self.image,
            "command": [manifests.escaped(argument) for argument in job.command_line],
            "workingDir": self.mount,
            "env": [{"name": "PYTHONUNBUFFERED", "value": "1"}],
            "resources": {"limits": dict(pods.limits)} if pods.limits else {},
            "volumeMounts": [{"name": "sweeps", "mountPath": self.mount}],
        }
        spec = {
            "restartPolicy": "Never",  # podFailurePolicy requires it
            "terminationGracePeriodSeconds": manifests.GRACE_SECONDS,
            "serviceAccountName": self.service_account,
            "nodeSelector": {**pods.node_selector, **self.node_selector},
            "tolerations": [{"key": resource, "operator": "Exists"} for resource in pods.limits],
            "containers": [_without_empty(container)],
            "volumes": [{"name": "sweeps", **self._volume()}],
        }
        metadata = {"annotations": {"gke-gcsfuse/volumes": "true"}} if self.bucket else {}
        return _without_empty({"metadata": metadata, "spec": _without_empty(spec)})

    def _volume(self) -> dict[str, Any]:
        if bool(self.claim) == bool(self.bucket):
            raise SettingError(
                Setting("sweep_dir"),
                " needs a volume that outlives its pods: set one of JobSet.claim (a PersistentVolumeClaim) and "
                "JobSet.bucket (Cloud Storage)",
            )
        if self.claim:
            return {"persistentVolumeClaim": {"claimName": self.claim}}
        # A checkpoint is written to a temporary folder, which is then renamed. In a bucket without hierarchical
        # namespace, FUSE refuses to rename a folder that has more files than this limit.
        attributes = {"bucketName": self.bucket, "mountOptions": "implicit-dirs,rename-dir-limit=100000"}
        return {"csi": {"driver": "gcsfuse.csi.storage.gke.io", "volumeAttributes": attributes}}


def pods_of_slice(accelerator: str | None, topology: str | None, devices: int | None = None) -> Pods:
    """Returns the pods of one slice on GKE's nodes; see `JobSet` for the arguments.

    Raises:
      ValueError: the topology is given without a TPU or is invalid, or no host has that many chips.
    """
    if accelerator not in TPUS:
        if topology:
            hint = near_misses(str(accelerator), TPUS, otherwise=f"expected one of {', '.join(TPUS)}")
            raise ValueError(f"JobSet.topology is of a TPU slice, and JobSet.accelerator {accelerator} is none: {hint}")
        count = (1 if accelerator else 0) if devices is None else devices
        selector = {"cloud.google.com/gke-accelerator": accelerator} if accelerator else {}
        return Pods(1, {"nvidia.com/gpu": count} if count else {}, selector)
    name, dimensions = TPUS[accelerator]
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)" + f"{{{dimensions - 1}}}", topology or ""):
        example = "x".join("224"[:dimensions])
        raise ValueError(f"JobSet.topology of a {accelerator} slice is {topology!r}, expected one like {example!r}")
    chips = math.prod(map(int, str(topology).split("x")))
    whole = (8,) if dimensions == 2 and chips == 8 else ()
    hosts_have = (min(chips, CHIPS_PER_HOST), *whole)
    chosen = hosts_have[0] if devices is None else devices
    if chosen not in hosts_have or chips % chosen:
        known = " or ".join(map(str, hosts_have))
        raise ValueError(
            f"a {accelerator} slice of {topology} has {chips} chips, {known} a host, not {chosen}: "
            "set JobSet.topology to one that GKE has, and JobSet.devices to None"
        )
    labels = {"cloud.google.com/gke-tpu-accelerator": name, "cloud.google.com/gke-tpu-topology": str(topology)}
    return Pods(chips // chosen, {"google.com/tpu": chosen}, labels)


def _without_empty(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value not in (None, {}, [])}
