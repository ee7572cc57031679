"""Files of cluster/: each against its schema or linter, and the scripts with stand-ins for the programs they call."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml
from packaging.requirements import Requirement
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.runtime_env import RuntimeEnv

import t2idist
from t2idist import config as configuration

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
SCRIPTS = sorted(CLUSTER.glob("*.sh"))
HEALTH = {"period_ms": "2000", "timeout_ms": "2000", "failure_threshold": "3"}
LAUNCHER_SCHEMA = json.loads((Path(ray.__file__).parent / "autoscaler/ray-schema.json").read_text())
KUBERAY_SCHEMA = json.loads((ROOT / "tests/cluster/schemas/kuberay.json").read_text())


def load(name: str) -> Any:
    return yaml.safe_load((CLUSTER / name).read_text())


def linter(name: str) -> str:
    """Return the path of a program that the test extra installs."""
    return str(Path(sys.executable).parent / name)


def lint(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


# ------------------------------------------------------------ ray up
@pytest.mark.parametrize("cloud", ["aws", "gcp"])
def test_ray_up_accepts_the_cluster_file(cloud: str) -> None:
    config = load(f"{cloud}.yaml")
    jsonschema.validate(config, LAUNCHER_SCHEMA)
    types = config["available_node_types"]
    head, worker = types.pop(config["head_node_type"]), types.pop("gpu_worker")
    assert types == {} and head["resources"] == {"CPU": 0, "GPU": 0}
    assert 0 < worker["min_workers"] <= worker["max_workers"] <= config["max_workers"]
    assert worker["resources"]["GPU"] == 4
    spot = {"aws": ("InstanceMarketOptions", {"MarketType": "spot"}), "gcp": ("scheduling", None)}[cloud]
    assert spot[0] not in head["node_config"]
    market = worker["node_config"][spot[0]]
    assert market == spot[1] or market["provisioningModel"] == "SPOT"
    assert config["provider"]["type"] == cloud and config["provider"]["cache_stopped_nodes"] is False


@pytest.mark.parametrize("cloud", ["aws", "gcp"])
def test_machines_install_this_version_and_watch_for_notices(cloud: str) -> None:
    config = load(f"{cloud}.yaml")
    (setup,) = config["setup_commands"]
    assert f"t2idist-{t2idist.__version__}-py3-none-any.whl" in setup
    pinned = (CLUSTER / "constraints.txt").read_text()
    for package in setup.split(".whl ")[1].split():
        assert f"\n{package}==" in pinned
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    for source in config["file_mounts"].values():
        assert source in ("dist", "~/.ray/auth_token") or (ROOT / source).is_dir()
    filled = prepare_config(config)  # with Ray's own defaults, which must not apply
    validate_config(filled)
    assert filled["head_setup_commands"] == filled["worker_setup_commands"] == [setup]
    assert filled["initialization_commands"] == [] and not filled["docker"]
    assert config["head_start_ray_commands"] == ["bash ~/t2idist/cluster/start_ray.sh head"]
    assert config["worker_start_ray_commands"] == [f"bash ~/t2idist/cluster/start_ray.sh worker {cloud}"]


def test_values_that_a_user_must_set_are_marked() -> None:
    for name in ("aws.yaml", "gcp.yaml", "kuberay.yaml"):
        lines = (CLUSTER / name).read_text().splitlines()
        for number, line in enumerate(lines):
            if "CHANGE-ME" in line and "entrypoint" not in "".join(lines[number - 5 : number]):
                assert any("# CHANGE" in near for near in lines[max(0, number - 1) : number + 1]), f"{name}: {line}"


def test_versions_match_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (CLUSTER / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    extras = project["optional-dependencies"]
    for requirement in map(Requirement, [*project["dependencies"], *extras["scores"]]):
        assert requirement.specifier.contains(pins[requirement.name]), requirement
    for item in kinds("RayCluster"):
        assert item["spec"]["rayVersion"] == pins["ray"]
    for name in ("Dockerfile", "kuberay.yaml"):
        assert f"t2idist:{t2idist.__version__}" in (CLUSTER / name).read_text()


# ------------------------------------------------------------ Kubernetes
def kinds(kind: str) -> list[dict[str, Any]]:
    return [item for item in load("kuberay.yaml")["items"] if item["kind"] == kind]


@pytest.mark.parametrize("kind", ["RayCluster", "RayJob", "NetworkPolicy"])
def test_kubernetes_accepts_the_objects(kind: str) -> None:
    schema = {**KUBERAY_SCHEMA, "$ref": f"#/$defs/{kind}"}
    versions = {"NetworkPolicy": "networking.k8s.io/v1"}
    items = kinds(kind)
    assert items
    for item in items:
        assert item.keys() == {"apiVersion", "kind", "metadata", "spec"}
        assert item["apiVersion"] == versions.get(kind, "ray.io/v1")
        assert item["metadata"]["labels"]["t2idist"] in ("cluster", "job")
        jsonschema.validate(item["spec"], schema)


def test_schema_rejects_an_unknown_field() -> None:
    (item,) = kinds("RayCluster")
    item["spec"]["workerGroupSpecs"][0]["template"]["spec"]["terminationGracePeriod"] = 60
    with pytest.raises(jsonschema.ValidationError, match="terminationGracePeriod"):
        jsonschema.validate(item["spec"], {**KUBERAY_SCHEMA, "$ref": "#/$defs/RayCluster"})


def test_deleted_pods_drain_their_node_within_the_grace_period() -> None:
    (item,) = kinds("RayCluster")
    (group,) = item["spec"]["workerGroupSpecs"]
    pod = group["template"]["spec"]
    (container,) = pod["containers"]
    command = container["lifecycle"]["preStop"]["exec"]["command"]
    assert command[:-1] == ["python", "-m", "t2idist.cli", "drain", "--seconds"]
    assert 15 <= float(command[-1]) <= pod["terminationGracePeriodSeconds"] - 5
    names = {variable["name"]: variable["value"] for variable in container["env"]}
    assert names["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] == "0"  # else the node is drained twice
    for name, value in HEALTH.items():
        assert names[f"RAY_health_check_{name}"] == value


def test_a_stopped_job_has_the_time_to_save_its_state() -> None:
    (item,) = kinds("RayCluster")
    (container,) = item["spec"]["headGroupSpec"]["template"]["spec"]["containers"]
    assert {"name": "RAY_JOB_STOP_WAIT_TIME_S", "value": "60"} in container["env"]
    assert "export RAY_JOB_STOP_WAIT_TIME_S=60" in (CLUSTER / "start_ray.sh").read_text()


def test_kubernetes_pods_are_locked_down() -> None:
    (item,), (job,) = kinds("RayCluster"), kinds("RayJob")
    for spec in (item["spec"], job["spec"]["rayClusterSpec"]):
        assert spec["authOptions"] == {"mode": "token", "secretName": "t2idist-ray-token"}
        (group,) = spec["workerGroupSpecs"]
        assert 0 < group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        pods = [spec["headGroupSpec"]["template"], group["template"]]
        for pod in pods:
            assert pod["metadata"]["labels"] == {"app.kubernetes.io/part-of": "t2idist"}
            assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
            (container,) = pod["spec"]["containers"]
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["envFrom"] == [{"secretRef": {"name": "t2idist-object-store"}}]
            assert not [v for v in container["env"] if re.search("KEY|SECRET|TOKEN|PASSWORD", v["name"])]
            assert {"name": "shared-memory", "mountPath": "/dev/shm"} in container["volumeMounts"]
        head, worker = (pod["spec"]["containers"][0]["resources"]["limits"] for pod in pods)
        assert "nvidia.com/gpu" not in head and worker["nvidia.com/gpu"] == 4
        assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert item["spec"]["headGroupSpec"]["rayStartParams"]["dashboard-host"] == "127.0.0.1"
    for policy in kinds("NetworkPolicy"):
        assert policy["spec"]["podSelector"]["matchLabels"] == {"app.kubernetes.io/part-of": "t2idist"}
        open_to = [rule for rule in policy["spec"]["ingress"] if "from" not in rule]
        assert open_to == []


def test_entrypoint_of_the_kubernetes_job_is_a_valid_run(monkeypatch: pytest.MonkeyPatch) -> None:
    (job,) = kinds("RayJob")
    command = job["spec"]["entrypoint"].split()
    assert "cluster.require_token=true" in command
    assert command[:3] == ["python", "-m", "t2idist.run"] and job["spec"]["shutdownAfterJobFinishes"] is True
    config = configuration.load(command[3], command[4:])
    (group,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    limits = container["resources"]["limits"]
    gpus = int(limits["nvidia.com/gpu"])
    assert config.cluster.workers == (gpus * group["minReplicas"], gpus * group["maxReplicas"])
    assert gpus * config.cluster.cpus_per_worker <= float(limits["cpu"]) and config.cluster.gpus_per_worker == 1
    assert max(config.cluster.workers) <= min(stage.groups for stage in config.stages.values())


# ------------------------------------------------------------ scripts and image
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda s: s.name)
def test_scripts_pass_shellcheck(script: Path) -> None:
    assert os.access(script, os.X_OK) and script.read_text().startswith("#!/usr/bin/env bash\n")
    assert "\nset -euo pipefail\n" in script.read_text()
    lint("bash", "-n", str(script))
    lint(linter("shellcheck"), str(script))


def test_dockerfile_passes_hadolint_and_its_sources_exist() -> None:
    file = CLUSTER / "Dockerfile"
    lint(linter("hadolint"), str(file))
    text = file.read_text()
    kept = [line[1:] for line in (CLUSTER / "Dockerfile.dockerignore").read_text().splitlines() if line[:1] == "!"]
    for line in re.findall(r"^COPY (?!--from)(.*)$", text, re.MULTILINE):
        for source in line.split()[:-1]:
            assert (ROOT / source).exists() and source in kept, source
    for image in re.findall(r"^(?:FROM |COPY --from=)(\S+)", text, re.MULTILINE):
        assert re.search(r":[0-9][^:/]*$", image), image
    assert (
        re.findall(r"^USER (.*)$", text, re.MULTILINE)[-1] == "1000"
    )  # numeric, so that Kubernetes can check that it is not root


def test_runtime_environment_is_valid_and_has_no_secrets() -> None:
    values = load("runtime_env.yaml")
    RuntimeEnv(**values)
    assert not [name for name in values["env_vars"] if re.search("KEY|SECRET|TOKEN|AWS", name)]
    for needed in ("t2idist", "configs", "tools", "cluster"):
        assert f"/{needed}" not in values["excludes"]


def test_scripts_start_ray_with_the_same_settings() -> None:
    for name in ("start_ray.sh", "slurm.sh"):
        text = (CLUSTER / name).read_text()
        assert "RAY_AUTH_MODE=token" in text and "dashboard-host=0.0.0.0" not in text
        for key, value in HEALTH.items():
            assert f"RAY_health_check_{key}={value}" in text


# ------------------------------------------------------------ running scripts with stand-ins
def stand_in(folder: Path, name: str, body: str = "") -> None:
    """Write a program that appends its arguments to `calls`, one call per line, and runs `body`."""
    folder.mkdir(exist_ok=True)
    file = folder / name
    note = f'printf "%s\\n" "{name} $(printf "%q " "$@")" >>"{folder}/calls"'
    file.write_text(f"#!/usr/bin/env bash\n{note}\n{body}\n")
    file.chmod(0o755)


def script(name: str, *arguments: str, env: dict[str, str], cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "SLURM_", "T2IDIST_"))}
    return subprocess.run(
        [str(CLUSTER / name), *arguments], cwd=cwd, env={**clean, **env}, capture_output=True, text=True, check=False
    )


def test_submit_passes_the_name_and_no_secret(tmp_path: Path) -> None:
    stand_in(tmp_path, "ray")
    env = {"RAY": str(tmp_path / "ray"), "HOME": str(tmp_path), "RAY_AUTH_TOKEN": "not-to-be-seen"}
    done = script("submit.sh", "mine", "attngan", "cluster.workers=[2,8]", "storage=s3://b/runs", env=env)
    assert done.returncode == 0, done.stderr
    call = (tmp_path / "calls").read_text()
    assert "--address http://127.0.0.1:8265 " in call and f"--working-dir {ROOT} " in call
    assert (
        "-- env T2IDIST_GIT=" in call
        and r" python -m t2idist.run attngan name=mine cluster.require_token=true cluster.workers=\[2\,8\] storage="
        in call
    )
    assert "--submission-id mine-" in call and "not-to-be-seen" not in call


def test_submit_rejects_missing_tokens_and_bad_names(tmp_path: Path) -> None:
    env = {"RAY": "/bin/false", "HOME": str(tmp_path)}
    done = script("submit.sh", "mine", "attngan", env=env)
    assert done.returncode == 1 and "error: no token" in done.stderr
    done = script("submit.sh", "../mine", "attngan", env=env)
    assert done.returncode == 2 and "error: NAME '../mine'" in done.stderr
    assert script("submit.sh", "mine", env=env).returncode == 2


def test_start_ray_requires_a_token_and_a_known_cloud(tmp_path: Path) -> None:
    env = {"HOME": str(tmp_path)}
    done = script("start_ray.sh", "head", env=env)
    assert done.returncode == 1 and "auth_token is missing" in done.stderr
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray/auth_token").write_text("a" * 64)
    done = script("start_ray.sh", "worker", "azure", env=env)
    assert done.returncode == 2 and "allowed are aws and gcp" in done.stderr
    stand_in(tmp_path / "t2idist-venv", "unused")
    stand_in(tmp_path / "t2idist-venv/bin", "ray")
    done = script("start_ray.sh", "head", env=env)
    assert done.returncode == 0, done.stderr
    assert "--dashboard-host=127.0.0.1" in (tmp_path / "t2idist-venv/bin/calls").read_text()
    assert (tmp_path / ".ray/auth_token").stat().st_mode & 0o777 == 0o600


def test_aws_roles_have_access_to_one_bucket(tmp_path: Path) -> None:
    stand_in(tmp_path, "aws", "[[ $2 != get-* ]]")
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    assert script("aws_roles.sh", "create", "../b", env=env).returncode == 2
    done = script("aws_roles.sh", "create", "my-bucket", env=env)
    assert done.returncode == 0, done.stderr
    rights = {}
    for call in map(shlex.split, (tmp_path / "calls").read_text().replace("$'", "'").replace("\\n", " ").splitlines()):
        if "put-role-policy" in call:
            document = json.loads(call[call.index("--policy-document") + 1])
            rights[call[call.index("--role-name") + 1]] = document["Statement"]
    assert rights.keys() == {"t2idist-head", "t2idist-worker"}
    for statement in rights["t2idist-worker"]:
        assert statement["Resource"] in ("arn:aws:s3:::my-bucket", "arn:aws:s3:::my-bucket/*")
    (passed,) = [s["Resource"] for s in rights["t2idist-head"] if "iam" in str(s["Action"])]
    assert passed == "arn:aws:iam::*:role/t2idist-worker"
    types = load("aws.yaml")["available_node_types"].values()
    assert {node["node_config"]["IamInstanceProfile"]["Name"] for node in types} == rights.keys()


def test_setup_machine_installs_the_wheel_with_pinned_versions(tmp_path: Path) -> None:
    env = {"HOME": str(tmp_path)}
    done = script("setup_machine.sh", str(tmp_path / "no.whl"), env=env)
    assert done.returncode == 1 and "no.whl does not exist; build it with" in done.stderr
    (tmp_path / "t2idist.whl").touch()
    (tmp_path / ".local").mkdir()
    stand_in(tmp_path / ".local/bin", "uv")
    (tmp_path / "t2idist-venv").mkdir()
    stand_in(tmp_path / "t2idist-venv/bin", "python")
    for _ in range(2):
        done = script("setup_machine.sh", str(tmp_path / "t2idist.whl"), "boto3", env=env)
        assert done.returncode == 0, done.stderr
    calls = (tmp_path / ".local/bin/calls").read_text()
    assert f"--constraint {CLUSTER}/constraints.txt {tmp_path}/t2idist.whl\\[scores\\,serve\\] boto3" in calls
    lines = (tmp_path / ".bashrc").read_text().splitlines()
    assert lines == ["export PATH=$HOME/t2idist-venv/bin:$PATH", "export RAY_AUTH_MODE=token"]


def test_setup_machine_waits_for_the_driver_of_a_gpu(tmp_path: Path) -> None:
    for folder in (".local/bin", "t2idist-venv/bin", "bin"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "t2idist.whl").touch()
    stand_in(tmp_path / ".local/bin", "uv")
    stand_in(tmp_path / "t2idist-venv/bin", "python", "[[ $* != *cuda* || ! -e $HOME/old_driver ]]")
    stand_in(tmp_path / "bin", "lspci", "echo '00:1e.0 3D controller: NVIDIA Corporation GA102GL [A10G]'")
    stand_in(tmp_path / "bin", "nvidia-smi", "[[ -e $HOME/driver ]]")
    path = f"{tmp_path}/bin:{os.environ['PATH']}"
    env = {"HOME": str(tmp_path), "PATH": path, "T2IDIST_DRIVER_SECONDS": "0"}
    done = script("setup_machine.sh", str(tmp_path / "t2idist.whl"), env=env)
    assert done.returncode == 1 and "has an NVIDIA GPU and no driver that works" in done.stderr
    (tmp_path / "driver").touch()
    assert script("setup_machine.sh", str(tmp_path / "t2idist.whl"), env=env).returncode == 0
    assert "torch.cuda.is_available()" in (tmp_path / "t2idist-venv/bin/calls").read_text().replace("\\", "")
    (tmp_path / "old_driver").touch()
    assert script("setup_machine.sh", str(tmp_path / "t2idist.whl"), env=env).returncode == 1


def slurm_environment(tmp_path: Path, step: str) -> dict[str, str]:
    """Fake a Slurm job of two nodes with two GPUs each, whose training step runs `step`."""
    bin_ = tmp_path / "venv/bin"
    bin_.parent.mkdir()
    stand_in(bin_, "ray")
    (bin_ / "python").symlink_to(sys.executable)  # as in a virtual environment; the machine may have no python
    stand_in(bin_, "scontrol", 'if [[ $1 == show ]]; then printf "node1\\nnode2\\n"; fi')
    stand_in(bin_, "srun", f'case "$*" in *hostname*) echo 10.1.2.3 ;; *symmetric-run*) {step} ;; esac')
    return {
        "PATH": f"{bin_}:{os.environ['PATH']}",
        "T2IDIST_VENV": str(tmp_path / "venv"),
        "SLURM_JOB_ID": "41007",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_GPUS_PER_TASK": "a100:2",
        "SLURM_CPUS_PER_TASK": "16",
    }


def test_slurm_starts_ray_on_all_nodes_and_returns_the_status_of_the_run(tmp_path: Path) -> None:
    env = slurm_environment(tmp_path, "exit 7")
    done = script("slurm.sh", "mine", "attngan", "storage=s3://b/runs", env=env)
    assert done.returncode == 7, done.stderr
    calls = (tmp_path / "venv/bin/calls").read_text()
    assert "ray symmetric-run --address 10.1.2.3:21007 --min-nodes 2 " in calls
    assert "--num-cpus=16 --num-gpus=2 " in calls
    assert r"name=mine cluster.require_token=true cluster.workers=\[1\,4\] cluster.gpus_per_worker=1 " in calls
    assert " cluster.cpus_per_worker=8 storage=" in calls
    assert "rm -rf /tmp/ray-41007" in calls and "requeue" not in calls
    assert not re.search("[0-9a-f]{64}", calls + done.stdout + done.stderr)


def test_slurm_drains_and_requeues_on_its_signal(tmp_path: Path) -> None:
    env = {**os.environ, **slurm_environment(tmp_path, "sleep 3; exit 143")}
    job = subprocess.Popen([str(CLUSTER / "slurm.sh"), "mine", "attngan"], cwd=ROOT, env=env, stdout=subprocess.DEVNULL)
    calls = tmp_path / "venv/bin/calls"
    deadline = time.monotonic() + 60
    while not calls.exists() or "symmetric-run" not in calls.read_text():
        assert time.monotonic() < deadline and job.poll() is None
        time.sleep(0.02)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(60) == 0
    after = calls.read_text().splitlines()[-2:]
    assert "t2idist.cli drain --seconds 60" in after[0] and after[1].strip() == "scontrol requeue 41007"


def test_local_cluster_reports_bad_arguments() -> None:
    env = {"PYTHON": sys.executable}
    for arguments, message in (
        (("--name", "nosuch", "kill", "1"), "there is no local cluster named nosuch"),
        (("--name", "nosuch", "down"), "there is no local cluster named nosuch"),
        (("--name", "../tmp", "up"), "--name '../tmp'"),
        (("up", "--hosts", "0"), "--hosts 0"),
    ):
        done = script("local.sh", *arguments, env=env)
        assert done.returncode == 2 and message in done.stderr
