"""launch/gke.py: the manifest against schemas, the commands, and the entry point of its image."""

import importlib.util
import json
import pathlib
import shlex
import signal
import subprocess
import sys
import time

import pytest
import yaml

HERE = pathlib.Path(__file__).parent
LAUNCH = HERE.parents[1] / "launch"
FLAGS = ["--name=run", "--image=r/jaxrl:1", "--topology=v5p:4x4x4", "--bucket=b"]
COMMAND = ["python", "-m", "x", "--gin.a='b c'", "$(HOME) $$ é", 'yes: "no"']

spec = importlib.util.spec_from_file_location("launch_gke", LAUNCH / "gke.py")
gke = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gke)


def manifest(*flags):
    return gke.manifest(*gke.parse(["run", *FLAGS, *flags, "--", *COMMAND]))


def job(document):
    return document["spec"]["replicatedJobs"][0]["template"]["spec"]


def pod(document):
    return job(document)["template"]["spec"]


@pytest.mark.parametrize(
    "flags", [(), ("--slices=4", "--spot"), ("--bucket=", "--claim=nfs"), ("--topology=v6e:2x2",)]
)
def test_manifest_fits_the_schemas(flags):
    jsonschema = pytest.importorskip("jsonschema", reason="comes with kubernetes-validate")
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    document = yaml.safe_load(manifest(*flags))
    jsonschema.validate(document, json.loads((HERE / "jobset_schema.json").read_text()))
    alone = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}}
    kubernetes_validate.validate(alone | {"spec": job(document)}, "1.35", strict=True)


def test_schemas_notice_mistakes():
    jsonschema = pytest.importorskip("jsonschema", reason="comes with kubernetes-validate")
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    document = yaml.safe_load(manifest())
    document["spec"]["failurePolicy"]["maxRestart"] = 1
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(document, json.loads((HERE / "jobset_schema.json").read_text()))
    pod(document)["nodeSelectors"] = {}
    alone = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(alone | {"spec": job(document)}, "1.35", strict=True)


def test_manifest_is_tidy_yaml():
    yamllint = pytest.importorskip("yamllint.linter")
    config = pytest.importorskip("yamllint.config").YamlLintConfig(
        "{extends: default, rules: {line-length: disable, document-start: disable, "
        "commas: {min-spaces-after: 1}, braces: {max-spaces-inside: 1}}}"
    )
    assert [str(problem) for problem in yamllint.run(manifest("--spot"), config)] == []


def test_one_job_for_each_slice_and_one_pod_for_each_machine():
    document = yaml.safe_load(manifest("--topology=v5p:4x4x4*2", "--spot"))
    assert document == yaml.safe_load(manifest("--slices=2", "--spot"))
    slices = document["spec"]["replicatedJobs"][0]
    assert slices["replicas"] == 2
    assert job(document)["parallelism"] == job(document)["completions"] == 64 // 4
    assert pod(document)["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
        "cloud.google.com/gke-tpu-topology": "4x4x4",
        "cloud.google.com/gke-spot": "true",
    }
    container = pod(document)["containers"][0]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    # Kubernetes turns $$ into $, and replaces $(NAME).
    assert [word.replace("$$", "$") for word in container["args"]] == COMMAND
    assert "$(" not in container["args"][4].replace("$$", "")
    annotations = document["metadata"]["annotations"]
    assert annotations["alpha.jobset.sigs.k8s.io/exclusive-topology"].endswith("gke-nodepool")


def test_small_slices_and_large_machines():
    one = yaml.safe_load(manifest("--topology=v5e:1x1"))
    assert pod(one)["containers"][0]["resources"]["limits"]["google.com/tpu"] == 1
    assert job(one)["parallelism"] == 1
    eight = yaml.safe_load(manifest("--topology=v6e:2x4", "--chips_per_host=8"))
    assert job(eight)["parallelism"] == 1


def test_preemptions_restart_all_as_often_as_needed():
    document = yaml.safe_load(manifest("--max_restarts=7"))
    policy = document["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 7  # applies if no rule matches
    assert [(r["action"], r["onJobFailureReasons"]) for r in policy["rules"]] == [
        ("RestartJobSetAndIgnoreMaxRestarts", ["PodFailurePolicy"])
    ]
    (rule,) = job(document)["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob"
    assert rule["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    assert job(document)["backoffLimit"] == 0
    assert pod(document)["restartPolicy"] == "Never"  # a podFailurePolicy demands it


def test_storage():
    bucket = pod(yaml.safe_load(manifest()))
    (volume,) = bucket["volumes"]
    assert volume["csi"]["driver"] == "gcsfuse.csi.storage.gke.io"
    assert volume["csi"]["volumeAttributes"]["bucketName"] == "b"
    (mount,) = bucket["containers"][0]["volumeMounts"]
    assert mount == {"name": volume["name"], "mountPath": "/mnt/jaxrl"}
    claim = yaml.safe_load(manifest("--bucket=", "--claim=nfs"))
    assert pod(claim)["volumes"][0]["persistentVolumeClaim"] == {"claimName": "nfs"}


def printed(capsys, *words):
    assert gke.main([*words, "--dry_run"]) == 0
    return capsys.readouterr().out


def test_dry_run_prints_the_commands(capsys):
    where, one = "kubectl --namespace=default", "jobset.sigs.k8s.io/jobset-name=run"
    assert printed(capsys, "status", "--name=run").splitlines() == [
        f"{where} get jobset run",
        f"{where} get pods --selector={one} --output=wide",
    ]
    worker = "jobset.sigs.k8s.io/job-index=1,batch.kubernetes.io/job-completion-index=3"
    logs = printed(capsys, "logs", "--name=run", "--slice=1", "--worker=3", "--context=c")
    assert shlex.split(logs)[:5] == [
        *where.split(),
        "--context=c",
        "logs",
        f"--selector={one},{worker}",
    ]
    stop = shlex.split(printed(capsys, "stop", "--name=run"))
    assert json.loads(stop[-1].removeprefix("--patch=")) == {"spec": {"suspend": True}}
    assert printed(capsys, "delete", "--name=run") == f"{where} delete jobset run\n"
    build, push = printed(capsys, "image", "--image=r/jaxrl:1").splitlines()
    assert build.endswith("| docker build --file=launch/gke/Dockerfile --tag=r/jaxrl:1 -")
    assert push == "docker push r/jaxrl:1"


def test_run_hands_the_manifest_to_kubectl(tmp_path):
    script = tmp_path / "kubectl"
    script.write_text('#!/bin/sh\necho "$@"\ncat\nexit $STATUS\n')
    script.chmod(0o755)
    for status in ("0", "1"):  # 1: such a JobSet exists
        command = [sys.executable, "-S", LAUNCH / "gke.py", "run", *FLAGS, "--", *COMMAND]
        environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "STATUS": status}
        result = subprocess.run(
            command, capture_output=True, text=True, env=environment, check=False
        )
        assert result.returncode == 2 * int(status)
        call, _, text = result.stdout.partition("\n")
        assert call == "--namespace=default create --filename=-"
        assert text == manifest()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", *FLAGS, "--topology=v5p-128", "--", "x"], "--topology must be like v5p:4x4x4"),
        (["run", *FLAGS, "--topology=v9:2x2", "--", "x"], "v4, v5e, v5p, v6e, tpu7x"),
        (["run", *FLAGS, "--topology=v6e:2x3", "--", "x"], "not a multiple of --chips_per_host"),
        (["run", *FLAGS, "--claim=c", "--", "x"], "--bucket=NAME or --claim=NAME"),
        (["run", *FLAGS, "--bucket=", "--", "x"], "--bucket=NAME or --claim=NAME"),
        (["run", *FLAGS, "--image=", "--", "x"], "--image is missing"),
        (["run", *FLAGS], "command is missing"),
        (["status"], "--name is missing"),
        (["stop", "--name=run", "--", "x"], "takes no command"),
    ],
)
def test_mistakes_end_in_one_line(words, message, capsys):
    assert gke.main(words) == 2
    output = capsys.readouterr()
    assert message in output.err and output.err.count("\n") == 1 and not output.out


SLOW = """
import signal, sys, time
signals = []
signal.signal(signal.SIGTERM, lambda *_: signals.append(1))
print("up", flush=True)
while not signals: time.sleep(0.01)
time.sleep(0.1)
print("saved", flush=True)
"""


def test_entry_point_passes_the_status_on_and_marks_what_was_stopped(tmp_path):
    entry = ["bash", LAUNCH / "gke" / "entrypoint.sh"]
    for status in (0, 2):
        command = [*entry, "bash", "-c", f"exit {status}"]
        assert subprocess.run(command, check=False).returncode == status
    output = tmp_path / "output"
    with (
        output.open("w") as file,
        subprocess.Popen([*entry, sys.executable, "-c", SLOW], stdout=file) as process,
    ):
        while not output.read_text():
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 143
        assert output.read_text() == "up\nsaved\n"  # the child was waited for, not left behind
