"""Launchers that hand a sweep's jobs to something else: a shell, Slurm, xpk, Kubernetes. No cluster is needed."""

import copy
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import jsonschema
import pytest
import yaml

from prompt_tuning_jax.sweeps.jobs import Job
from prompt_tuning_jax.sweeps.launchers import manifests, slurm
from prompt_tuning_jax.sweeps.launchers.jobset import JobSet, pods_of_slice
from prompt_tuning_jax.sweeps.launchers.print_commands import Print, shell_line
from prompt_tuning_jax.sweeps.launchers.slurm import Slurm
from prompt_tuning_jax.sweeps.launchers.xpk import Xpk
from prompt_tuning_jax.sweeps.spec import Trial

SCHEMA = json.loads((Path(__file__).parent / "fixtures" / "jobset_v1alpha2_schema.json").read_text())
# What shells, YAML, str.format and Kubernetes each read in their own way.
ARGUMENTS = [
    "--gin.TASK_FEATURE_LENGTHS={'inputs': 64, 'targets': 8}",
    "--gin.TEXT='a \"b\" $HOME $(date) $$ `id` \\n %s é # ! *'",
    "--gin.LINES='one\n  two\t: three\n'",
    "",
]


def trial(folder: Path, **values: str) -> Trial:
    name = ",".join(f"{axis}={value}" for axis, value in values.items())
    return Trial(name, "train", (), {"MODEL_DIR": str(folder / name)}, (), values)


def job(folder: Path, number: int = 0, arguments: list[str] = ARGUMENTS) -> Job:
    return Job(
        f"{number:03}", (trial(folder, SEED=str(number)),), ["python", "-m", "prompt_tuning_jax.train", *arguments]
    )


def program(folder: Path, name: str, text: str) -> Path:
    """A stand-in for a program."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)
    return path


def run_by_bash(line: str, folder: Path) -> list[str]:
    """The arguments that `python` gets of a line of bash."""
    program(folder, "python", "printf '%s\\0' python \"$@\"")
    environment = {"PATH": f"{folder}:/usr/bin:/bin", "HOME": "/home"}
    ended = subprocess.run(["/bin/bash", "-c", line], env=environment, capture_output=True, check=True)
    return ended.stdout.decode().split("\0")[:-1]


def filled_in(text: str) -> str:
    """What Kubernetes makes of a container's command: $$ is a dollar, $(NAME) of no variable stays, as others do."""
    return re.sub(r"\$\$|\$\([^)]*\)", lambda found: "$" if found[0] == "$$" else found[0], text)


def wait_for(path: Path) -> str:
    end = time.monotonic() + 60
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < end, f"{path} is not written"
        time.sleep(0.05)
    return path.read_text()


# --- print


def test_a_printed_line_runs_these_arguments(tmp_path, capsys):
    jobs = [job(tmp_path, 0), job(tmp_path, 1)]
    assert Print().launch(jobs, str(tmp_path)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    for line in lines:
        assert run_by_bash(line, tmp_path / "bin") == jobs[0].command_line


@hypothesis.given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))))
@hypothesis.settings(max_examples=20)
def test_a_shell_line_is_one_line_that_bash_reads_back(arguments):
    line = shell_line(arguments)
    assert line.isprintable() or not line
    read = subprocess.run(["bash", "-c", f"for a in {line}; do printf '%s\\0' \"$a\"; done"], capture_output=True)
    assert read.stdout.decode().split("\0")[:-1] == arguments


def test_a_job_of_several_trials_is_printed_with_how_they_differ(tmp_path, capsys):
    trials = tuple(trial(tmp_path, SIZE="nano", SEED=str(n), RATE=rate) for n, rate in enumerate(["0.1", "0.3"]))
    Print().launch([Job("007", trials, ["python", "x"])], str(tmp_path))
    assert capsys.readouterr().out == "# 007: 2 trials in one program, of different SEED, RATE\npython x\n"


# --- Slurm


def script(tmp_path: Path, number: int, text: str) -> Job:
    """A job that runs some Python, with FOLDER that of its trial."""
    one = trial(tmp_path, SEED=str(number))
    start = f"import os, pathlib, signal, sys, time; FOLDER = pathlib.Path({str(one.folder)!r})\n"
    return Job(f"{number:03}", (one,), ["python", "-c", start + text])


def test_submitit_runs_a_sweep_of_four_jobs_and_says_which_failed(tmp_path, capsys):
    well = "print('did', FOLDER.name); (FOLDER / 'summary.json').write_text(sys.executable)"
    bad = "print('begun'); sys.exit('error: no such task')"
    jobs = [script(tmp_path, number, bad if number == 2 else well) for number in range(4)]
    jobs[3].trials[0].folder.mkdir()
    (jobs[3].trials[0].folder / "failed.txt").write_text("of the last time")
    assert Slurm({"timeout_min": 5}, "local").launch(jobs, str(tmp_path)) == 1
    assert "job 002 failed" in capsys.readouterr().out
    for one in jobs:
        folder, log = one.trials[0].folder, (tmp_path / "logs" / f"{one.name}.log").read_text()
        assert not (folder / "running").exists()
        if one.name == "002":
            assert (folder / "failed.txt").read_text() == "begun\nerror: no such task\n"
            assert log.endswith("begun\nerror: no such task\n")
        else:
            assert (folder / "summary.json").read_text() == sys.executable
            assert log.endswith(f"did {folder.name}\n") and not (folder / "failed.txt").exists()
    assert Slurm({"timeout_min": 5}, "local").launch(jobs[:1], str(tmp_path)) == 0


# Saves on SIGTERM, as training does; finishes when it is started again.
RESUMES = """
if (FOLDER / 'saved').exists():
    (FOLDER / 'summary.json').write_text('done')
    sys.exit()
def save(*_):
    (FOLDER / 'saved').write_text('saved')
    sys.exit(143)
signal.signal(signal.SIGTERM, save)
(FOLDER / 'pids').write_text(f'{os.getppid()} {os.getpid()}')
time.sleep(60)
"""


def test_a_preempted_job_saves_and_runs_again(tmp_path):
    one = script(tmp_path, 0, RESUMES)
    folder, codes = one.trials[0].folder, []
    launch = threading.Thread(target=lambda: codes.append(Slurm({}, "local").launch([one], str(tmp_path))))
    launch.start()
    task, child = map(int, wait_for(folder / "pids").split())
    os.kill(child, signal.SIGUSR2)  # Slurm sends it to every process of the job
    os.kill(task, signal.SIGUSR2)
    launch.join()
    assert codes == [0] and (folder / "summary.json").read_text() == "done"


@pytest.mark.parametrize("requeued", [True, False])
def test_on_slurm_a_saved_job_waits_to_be_requeued(tmp_path, requeued):
    """SIGTERM comes first, to training too; SIGUSR2 to a preempted job, SIGKILL to a cancelled one."""
    from submitit.core.utils import DelayedSubmission, JobPaths

    one = script(tmp_path, 0, RESUMES)
    folder = one.trials[0].folder
    (tmp_path / "logs").mkdir()
    task = DelayedSubmission(slurm.Run(one, str(tmp_path)))
    task.set_timeout(60, 3)
    task.dump(JobPaths(tmp_path, "7_0").submitted_pickle)
    program(tmp_path / "bin", "scontrol", f'echo "$@" >> {tmp_path}/scontrol.log')
    names = {"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "0", "SUBMITIT_EXECUTOR": "slurm"}
    environment = os.environ | names | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    command = [sys.executable, "-m", "submitit.core._submit", str(tmp_path)]

    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        _, child = map(int, wait_for(folder / "pids").split())
        for pid in (child, process.pid):
            os.kill(pid, signal.SIGTERM)
        wait_for(folder / "saved")
        time.sleep(0.5)
        assert process.poll() is None and not (folder / "failed.txt").exists()
        process.send_signal(signal.SIGUSR2 if requeued else signal.SIGKILL)
        process.wait()
    if not requeued:
        assert not (tmp_path / "scontrol.log").exists()
        return
    assert (tmp_path / "scontrol.log").read_text() == "requeue 7_0\n"
    again = subprocess.run(command, env=environment | {"SLURM_RESTART_COUNT": "1"}, capture_output=True)
    assert again.returncode == 0 and (folder / "summary.json").read_text() == "done"


def slurm_programs(tmp_path: Path, monkeypatch, sbatch: str) -> None:
    program(tmp_path / "bin", "srun", "exit 1")
    program(tmp_path / "bin", "sbatch", sbatch)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")


def test_sbatch_gets_one_array_with_a_gpu_a_job(tmp_path, monkeypatch, capsys):
    slurm_programs(tmp_path, monkeypatch, f'cp "$1" {tmp_path}/script; echo Submitted batch job 12')
    parameters = {"slurm_partition": "a100", "mem_gb": 32, "cpus_per_task": 8, "slurm_array_parallelism": 2}
    jobs = [job(tmp_path, number) for number in range(3)]
    assert Slurm(parameters).launch(jobs, str(tmp_path)) == 0
    flags = re.findall(r"^#SBATCH --(.*)$", (tmp_path / "script").read_text(), re.MULTILINE)
    wanted = {
        *("array=0-2%2", "gpus-per-node=1", "ntasks-per-node=1", "time=1440", "requeue", "signal=USR2@90"),
        *("partition=a100", "mem=32GB", "cpus-per-task=8", "open-mode=append"),
    }
    assert wanted <= set(flags), flags
    assert capsys.readouterr().out.startswith("Slurm has 3 jobs as 12: `scancel 12` stops them")


def one_line(error: pytest.ExceptionInfo) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def test_slurm_errors(tmp_path, monkeypatch):
    jobs = [job(tmp_path)]
    slurm_programs(tmp_path, monkeypatch, "echo 'sbatch: error: invalid partition specified: a10' >&2; exit 1")
    with pytest.raises(ValueError, match="sbatch refused the jobs: .*invalid partition specified: a10") as error:
        Slurm({"slurm_partition": "a10"}).launch(jobs, str(tmp_path))
    one_line(error)
    with pytest.raises(ValueError, match="Slurm.parameters: .*slurm_partitoin") as error:
        Slurm({"slurm_partitoin": "a100"}).launch(jobs, str(tmp_path))
    one_line(error)
    with pytest.raises(ValueError, match="Slurm.cluster is 'lcoal', expected one of slurm, local"):
        Slurm(cluster="lcoal").launch(jobs, str(tmp_path))
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ValueError, match="no sbatch on PATH: .*--launcher=local"):
        Slurm().launch(jobs, str(tmp_path))
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(ValueError, match=r"submitit is not installed: pip install 'prompt_tuning_jax\[slurm\]'"):
        Slurm().launch(jobs, str(tmp_path))


# --- Kubernetes


@hypothesis.given(st.text(min_size=1), st.text())
def test_a_workload_name_is_a_short_dns_label_of_its_trials(name, other):
    hypothesis.assume(name != other)
    folder = Path("sweeps")
    names = {
        manifests.workload_name(Job(number, (trial(folder, A=value),), []), sweep_dir)
        for number in ("000", "001")  # the number changes when other trials are finished
        for value in (name, other)
        for sweep_dir in (name, f"{name}2")
    }
    assert len(names) == 4
    for one in names:
        assert re.fullmatch("[a-z]([-a-z0-9]*[a-z0-9])?", one) and len(one) <= 28


def jobset(**fields) -> JobSet:
    return JobSet(**{"image": "registry/image:1", "claim": "sweeps"} | fields)


def validate(manifest) -> None:
    jsonschema.Draft202012Validator(SCHEMA).validate(manifest)


VARIANTS = {
    "v5e slice": {"accelerator": "v5e", "topology": "4x4"},
    "two v5p slices": {"accelerator": "v5p", "topology": "2x2x4", "slices": 2, "queue": "research"},
    "gpu": {"accelerator": "nvidia-l4", "namespace": "team"},
    "bucket": {"claim": None, "bucket": "b", "service_account": "writer", "node_selector": {"a": "b"}},
}


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_a_jobset_is_valid_and_runs_these_arguments(tmp_path, fields):
    jobs = [job(tmp_path, number) for number in range(2)]
    stale = tmp_path / "manifests" / "009.yaml"
    stale.parent.mkdir()
    stale.write_text("of a finished trial")
    assert jobset(mount=str(tmp_path), **fields).launch(jobs, str(tmp_path)) == 0
    files = sorted((tmp_path / "manifests").iterdir())
    assert [file.name for file in files] == ["000.yaml", "001.yaml"]
    read = [yaml.safe_load(file.read_text(encoding="utf-8")) for file in files]
    assert read[0]["metadata"]["name"] != read[1]["metadata"]["name"]
    for manifest in read:
        validate(manifest)
        template = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
        pod = template["template"]["spec"]
        (container,) = pod["containers"]
        assert list(map(filled_in, container["command"])) == jobs[0].command_line
        # Of what the pods write only what lies in the volume stays.
        (mount,) = container["volumeMounts"]
        assert container["workingDir"] == mount["mountPath"] == str(tmp_path)
        assert [volume["name"] for volume in pod["volumes"]] == [mount["name"]]
        # 143, of a run that has saved, restarts the JobSet; an error does not.
        (rule,) = template["podFailurePolicy"]["rules"]
        assert rule["action"] == "FailJob" and rule["onExitCodes"]["operator"] == "In"
        assert 143 not in rule["onExitCodes"]["values"] and 2 in rule["onExitCodes"]["values"]
        assert template["backoffLimit"] == 0 and manifest["spec"]["failurePolicy"]["maxRestarts"] > 0


def test_the_schema_refuses_what_a_cluster_would(tmp_path):
    good = jobset(accelerator="v5e", topology="4x4").manifest(job(tmp_path), "runs/sweep")
    validate(good)

    def broken(change) -> dict:
        manifest = copy.deepcopy(good)
        change(manifest["spec"], manifest["spec"]["replicatedJobs"][0]["template"]["spec"])
        return manifest

    for change in (
        lambda spec, job: job.update(paralellism=job.pop("parallelism")),
        lambda spec, job: job.update(parallelism="4"),
        lambda spec, job: job["template"]["spec"]["containers"][0].pop("name"),
        lambda spec, job: job["template"]["spec"]["containers"][0]["env"][0].update(value=1),
        lambda spec, job: spec["failurePolicy"]["rules"][0].update(action="Fail"),
        lambda spec, job: spec["network"].update(enableDNSHostNames=True),
    ):
        with pytest.raises(jsonschema.ValidationError):
            validate(broken(change))


# Accelerator, topology, hosts, chips a host, label: from GKE's tables of TPU slices
# (https://cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus) and xpk's.
SLICES = [
    ("v4", "2x2x1", 1, 4, "tpu-v4-podslice"),
    ("v4", "2x2x4", 4, 4, "tpu-v4-podslice"),
    ("v4", "4x4x8", 32, 4, "tpu-v4-podslice"),
    ("v5e", "1x1", 1, 1, "tpu-v5-lite-podslice"),
    ("v5e", "2x2", 1, 4, "tpu-v5-lite-podslice"),
    ("v5e", "2x4", 2, 4, "tpu-v5-lite-podslice"),
    ("v5e", "4x4", 4, 4, "tpu-v5-lite-podslice"),
    ("v5e", "16x16", 64, 4, "tpu-v5-lite-podslice"),
    ("v5p", "2x2x1", 1, 4, "tpu-v5p-slice"),
    ("v5p", "4x4x4", 16, 4, "tpu-v5p-slice"),
    ("v6e", "1x1", 1, 1, "tpu-v6e-slice"),
    ("v6e", "8x16", 32, 4, "tpu-v6e-slice"),
]


@pytest.mark.parametrize("accelerator, topology, hosts, chips, label", SLICES)
def test_a_slice_has_a_pod_a_host(tmp_path, accelerator, topology, hosts, chips, label):
    manifest = jobset(accelerator=accelerator, topology=topology, slices=3).manifest(job(tmp_path), "runs/sweep")
    (slices,) = manifest["spec"]["replicatedJobs"]
    one = slices["template"]["spec"]
    assert slices["replicas"] == 3
    assert (one["parallelism"], one["completions"], one["completionMode"]) == (hosts, hosts, "Indexed")
    pod = one["template"]["spec"]
    assert pod["containers"][0]["resources"] == {"limits": {"google.com/tpu": chips}}
    selector = {"cloud.google.com/gke-tpu-accelerator": label, "cloud.google.com/gke-tpu-topology": topology}
    assert pod["nodeSelector"] == selector
    # Only a slice of several hosts is a node pool of its own.
    assert ("annotations" in manifest["metadata"]) == (hosts > 1)


def test_gpus_and_single_hosts_of_eight_chips():
    assert pods_of_slice("v5e", "2x4", 8)[:2] == (1, {"google.com/tpu": 8})
    assert pods_of_slice("nvidia-l4", None, 2) == (
        1,
        {"nvidia.com/gpu": 2},
        {"cloud.google.com/gke-accelerator": "nvidia-l4"},
    )
    assert pods_of_slice(None, None) == (1, {}, {})


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"image": None}, "set JobSet.image"),
        ({"claim": None}, "set one of JobSet.claim .* and JobSet.bucket"),
        ({"bucket": "b"}, "set one of JobSet.claim .* and JobSet.bucket"),
        ({"accelerator": "v5"}, None),
        ({"accelerator": "v5", "topology": "2x4"}, "JobSet.accelerator v5 is none: did you mean v5[ep]"),
        ({"accelerator": "v5e"}, "topology of a v5e slice is None, expected one like '2x2'"),
        ({"accelerator": "v5e", "topology": "2x2x1"}, "topology of a v5e slice is '2x2x1', expected one like '2x2'"),
        ({"accelerator": "v4", "topology": "4x4"}, "topology of a v4 slice is '4x4', expected one like '2x2x4'"),
        ({"accelerator": "v4", "topology": "2x2x2", "devices": 8}, "has 8 chips, 4 a host, not 8"),
        ({"accelerator": "v6e", "topology": "3x3"}, "has 9 chips, 4 a host"),
        ({"mount": "/elsewhere"}, "lies outside /elsewhere, where the pods' volume is"),
    ],
)
def test_jobset_errors_leave_nothing_written(tmp_path, fields, message):
    launcher = jobset(**{"mount": str(tmp_path)} | fields)
    if message is None:  # a GPU's name is not known here
        assert launcher.launch([job(tmp_path)], str(tmp_path)) == 0
        return
    with pytest.raises(ValueError, match=message) as error:
        launcher.launch([job(tmp_path)], str(tmp_path))
    one_line(error)
    assert not (tmp_path / "manifests").exists()


def test_a_relative_sweep_dir_lies_in_the_volume():
    manifests.check_volume("runs/sweep", "/mnt/sweeps")
    manifests.check_volume("/mnt/sweeps/a", "/mnt/sweeps")
    for outside in ("../runs", "/mnt/sweeps2", "/mnt/sweeps/../a"):
        with pytest.raises(ValueError, match="lies outside"):
            manifests.check_volume(outside, "/mnt/sweeps")


def test_apply_runs_kubectl(tmp_path, monkeypatch):
    launcher = jobset(apply=True, mount=str(tmp_path))
    program(tmp_path / "bin", "kubectl", f'echo "$@" > {tmp_path}/kubectl.log; exit 3')
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    assert launcher.launch([job(tmp_path)], str(tmp_path)) == 1
    assert (tmp_path / "kubectl.log").read_text() == f"apply -f {tmp_path / 'manifests'}\n"
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ValueError, match="no kubectl on PATH"):
        launcher.launch([job(tmp_path)], str(tmp_path))


# --- xpk


def xpk(tmp_path: Path, **fields) -> Xpk:
    known = {
        "cluster": "c",
        "tpu_type": "v5litepod-16",
        "docker_image": "image:1",
        "project": "p",
        "zone": "us-west4-a",
    }
    return Xpk(**known | {"mount": str(tmp_path)} | fields)


def test_xpk_gets_this_command_line(tmp_path, monkeypatch, capsys):
    program(tmp_path / "bin", "xpk", f"printf '%s\\0' \"$@\" > {tmp_path}/xpk.log; exit $(cat {tmp_path}/code)")
    (tmp_path / "code").write_text("0")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    one = job(tmp_path, arguments=["--gin.A='$(date)'"])
    assert xpk(tmp_path, num_slices=2, storage=["disk", "bucket"]).launch([one], str(tmp_path)) == 0
    assert (tmp_path / "xpk.log").read_text().split("\0")[:-1] == [
        *("workload", "create"),
        f"--workload={manifests.workload_name(one, str(tmp_path))}",
        *("--cluster=c", "--tpu-type=v5litepod-16", "--num-slices=2", "--docker-image=image:1"),
        *("--project=p", "--zone=us-west4-a", "--storage=disk", "--storage=bucket", "--max-restarts=20"),
        *("--termination-grace-period-seconds=120", "--env=PYTHONUNBUFFERED=1"),
        f"--command=cd {tmp_path} && exec python -m prompt_tuning_jax.train '--gin.A='\"'\"'$$(date)'\"'\"''",
        f"--output-manifest-file={tmp_path / 'manifests' / '000.yaml'}",
    ]
    (tmp_path / "code").write_text("1")
    assert xpk(tmp_path).launch([one, one], str(tmp_path)) == 1
    assert "xpk failed with exit code 1 at job 000: 0 workloads are created" in capsys.readouterr().out


def test_xpk_errors(tmp_path, monkeypatch):
    with monkeypatch.context() as nowhere, pytest.raises(ValueError, match="no xpk on PATH: install it with `pipx"):
        nowhere.setenv("PATH", "/nowhere")
        xpk(tmp_path).launch([job(tmp_path)], str(tmp_path))
    program(tmp_path / "bin", "xpk", "echo '[XPK] bad luck' >&2; exit 2")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    with pytest.raises(ValueError, match="set Xpk.cluster and Xpk.project"):
        xpk(tmp_path, cluster=None, project="").launch([job(tmp_path)], str(tmp_path))
    with pytest.raises(ValueError, match=r"xpk refused job 000: \[XPK\] bad luck"):
        xpk(tmp_path, dry_run=True).launch([job(tmp_path)], str(tmp_path))


@pytest.fixture
def real_xpk(tmp_path, monkeypatch):
    """xpk with no gcloud or kubectl beside it, and nothing to tell anyone."""
    found = shutil.which("xpk")
    if found is None:
        pytest.skip("xpk is not installed (it needs an environment of its own: pipx install xpk)")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "xpk").symlink_to(found)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TELEMETRY_ENABLED", "false")


HOSTS = {"v4-16": ("v4", "2x2x2"), "v5litepod-16": ("v5e", "4x4"), "v5p-16": ("v5p", "2x2x2"), "v6e-64": ("v6e", "8x8")}


@pytest.mark.parametrize("tpu_type", HOSTS)
def test_xpks_dry_run_writes_a_jobset_that_runs_these_arguments(tmp_path, real_xpk, tpu_type):
    one = job(tmp_path)
    assert xpk(tmp_path, tpu_type=tpu_type, num_slices=2, dry_run=True).launch([one], str(tmp_path)) == 0
    manifest = yaml.safe_load((tmp_path / "manifests" / "000.yaml").read_text(encoding="utf-8"))
    assert manifest["apiVersion"] == "jobset.x-k8s.io/v1alpha2" and manifest["kind"] == "JobSet"
    assert manifest["metadata"]["name"] == manifests.workload_name(one, str(tmp_path))
    (slices,) = manifest["spec"]["replicatedJobs"]
    template = slices["template"]["spec"]
    pod = template["template"]["spec"]
    (container,) = pod["containers"]
    ours = pods_of_slice(*HOSTS[tpu_type])
    assert slices["replicas"] == 2 and template["parallelism"] == template["completions"] == ours.count
    assert container["resources"]["limits"] == ours.limits
    assert ours.node_selector.items() <= pod["nodeSelector"].items()
    # Restarts on 143, with which training ends when it has saved.
    codes = template["podFailurePolicy"]["rules"][0]["onExitCodes"]
    assert codes["operator"] == "NotIn" and 143 in codes["values"] and manifest["spec"]["failurePolicy"]["maxRestarts"]
    (line,) = (line for line in container["command"][2].splitlines() if "exec python" in line)
    command = filled_in(re.fullmatch(r"\s*\((.*)\) & PID=\$!;", line)[1])
    assert run_by_bash(command, tmp_path / "stand-in") == one.command_line


def test_xpk_names_a_tpu_type_that_it_does_not_have(tmp_path, real_xpk):
    with pytest.raises(ValueError, match="xpk refused job 000: .*v5litepod-17"):
        xpk(tmp_path, tpu_type="v5litepod-17", dry_run=True).launch([job(tmp_path)], str(tmp_path))
