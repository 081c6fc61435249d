"""What launch/tpu_vm.sh would call: exact commands, quoting, and refusals. Nothing is run."""

import pathlib
import re
import shlex
import shutil
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parents[2]
BASH = shutil.which("bash")
WHERE = ["--zone=us-east5-a", "--project=p"]
BASE = ["--name=run", *WHERE]
SLICE = "--topology=v5p:4x4x4"
AWKWARD = ["--gin.a='b c'", "$HOME", "", "two\nlines", 'say "hi"', "back\\slash", "*", "a&b;c"]


@pytest.fixture(scope="module", autouse=True)
def tools(tmp_path_factory):
    """A machine without gcloud and git, on which a dry run must still work."""
    folder = tmp_path_factory.mktemp("bin")
    for name in ("dirname", "cat", "date"):
        (folder / name).symlink_to(shutil.which(name))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(folder))
        yield


def tpu_vm(*words):
    command = [BASH, ROOT / "launch" / "tpu_vm.sh", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def dry_run(*words):
    """Returns the printed commands, parsed as a shell would."""
    action, *rest = words
    cut = rest.index("--") if "--" in rest else len(rest)
    result = tpu_vm(action, *BASE, *rest[:cut], "--dry_run", *rest[cut:])
    assert (result.returncode, result.stderr) == (0, "")
    commands, text = [], ""
    for line in result.stdout.splitlines(keepends=True):
        text += line
        try:
            commands.append(shlex.split(text, comments=True))
        except ValueError:  # a line break within quotes
            continue
        text = ""
    return [command for command in commands if command]


def create(*options):
    return [["gcloud", "compute", "tpus", "queued-resources", "create", "run", *WHERE, *options]]


def ssh(node, command, worker="all", *options):
    words = ["ssh", node, f"--worker={worker}", f"--command=bash worker.sh {command}"]
    patience = ["--ssh-flag=-oConnectTimeout=15", "--ssh-flag=-oServerAliveInterval=30"]
    return ["gcloud", "compute", "tpus", "tpu-vm", *words, *patience, *WHERE, *options]


@pytest.mark.parametrize(
    ("flags", "options"),
    [
        (
            [SLICE],
            ["--accelerator-type=v5p-128", "--runtime-version=v2-alpha-tpuv5", "--node-id=run"],
        ),
        (
            ["--topology=v6e:8x8", "--spot", "--valid_until=6h"],
            [
                "--accelerator-type=v6e-64",
                "--runtime-version=v2-alpha-tpuv6e",
                "--node-id=run",
                "--spot",
                "--valid-until-duration=6h",
            ],
        ),
        (
            ["--topology=v5e:4x4*2", "--reserved"],
            [
                "--accelerator-type=v5litepod-16",
                "--runtime-version=v2-alpha-tpuv5-lite",
                "--node-count=2",
                "--node-prefix=run",
                "--reserved",
            ],
        ),
        (
            ["--accelerator_type=v4-8", "--runtime_version=mine", "--network=n", "--internal_ips"],
            [
                "--accelerator-type=v4-8",
                "--runtime-version=mine",
                "--node-id=run",
                "--network=n",
                "--internal-ips",
            ],
        ),
        (
            ["--topology=v4:2x2x2"],
            ["--accelerator-type=v4-16", "--runtime-version=tpu-ubuntu2204-base", "--node-id=run"],
        ),
    ],
)
def test_create_prints_the_request(flags, options):
    assert dry_run("create", *flags) == create(*options)


def test_install_copies_to_all_workers_of_all_slices():
    commands = dry_run("install", "--slices=2", "--storage=gs://bucket/")
    archive = str(ROOT / "runs/launch/run/source.tar.gz")
    scp = ["gcloud", "compute", "tpus", "tpu-vm", "scp", archive, str(ROOT / "launch/worker.sh")]
    assert commands[3:] == [
        *([*scp, f"run-{i}:", "--worker=all", *WHERE] for i in range(2)),
        *(ssh(f"run-{i}", "mount gs://bucket /mnt/jaxrl") for i in range(2)),
        *(ssh(f"run-{i}", "install 3.12 tpu,kernels") for i in range(2)),
    ]
    assert [command[0] for command in commands[:3]] == ["mkdir", "tree=$(git", "git"]


def test_arguments_reach_the_worker_as_they_are():
    idle, start = dry_run("run", "--", "python", *AWKWARD)
    assert idle == ssh("run", "idle")
    remote = next(word for word in start if word.startswith("--command=")).removeprefix(
        "--command="
    )
    # How bash on the worker reads it; gcloud and ssh pass the text on unchanged.
    script = remote.replace("bash worker.sh start", "printf '%s\\0'")
    words = subprocess.run([BASH, "-c", script], capture_output=True, text=True, check=True).stdout
    assert words.split("\0")[:-1] == ["-", "python", *AWKWARD]


def test_logs_stop_status_delete():
    assert dry_run("logs", "--slices=2", "--slice=1", "--worker=3", "--lines=5") == [
        ssh("run-1", "log 5", 3)
    ]
    (stop,) = dry_run("stop", "--grace=60", "--internal_ips")
    assert stop[-1] == "--internal-ip" and "bash worker.sh stop 60;" in stop[7]
    request, slices, state = dry_run("status", "--slices=1")
    assert request[3:5] == ["queued-resources", "list"]
    assert slices[3:5] == ["tpu-vm", "list"]
    pattern = slices[-1].removeprefix('--filter=name~"').removesuffix('"')
    nodes = ["projects/p/nodes/run", "projects/p/nodes/run-1", "projects/p/nodes/rerun"]
    assert [bool(re.search(pattern, node)) for node in nodes] == [True, True, False]
    assert "bash worker.sh state;" in state[7]
    delete, forget = dry_run("delete")
    assert delete[3:] == ["queued-resources", "delete", "run", *WHERE, "--force", "--quiet"]
    assert forget[:2] == ["rm", "-f"]


def test_resume_prints_the_whole_way():
    flags = [SLICE, "--slices=2", "--spot", "--storage=10.0.0.2:/share"]
    commands = dry_run("resume", *flags, "--", "python", "-m", "x")
    verbs = [c[4] for c in commands if c[:3] == ["gcloud", "compute", "tpus"]]
    assert verbs == [
        *["create", "scp", "scp"],
        *["ssh"] * 8,  # mount, install, idle, start
        *["list", "list", "ssh", "ssh", "delete"],
    ]
    assert ssh("run-1", "mount 10.0.0.2:/share /mnt/jaxrl") in commands
    assert ssh("run-1", "start /mnt/jaxrl/logs/run python -m x") in commands


def test_flags_may_stand_in_a_file(tmp_path):
    (tmp_path / "flags").write_text("# a slice\ntopology=v6e:2x4\nspot\n\nslices=3")
    assert dry_run("create", f"--config={tmp_path}/flags", "--slices=2") == create(
        "--accelerator-type=v6e-8",
        "--runtime-version=v2-alpha-tpuv6e",
        "--node-count=2",
        "--node-prefix=run",
        "--spot",
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["create", *BASE], "--topology must be like v5p:4x4x4, got ''"),
        (["create", *BASE, "--topology=v5p-128"], "got 'v5p-128'"),
        (["create", *BASE, "--topology=tpu7x:2x2x1"], "newer ones need GKE"),
        (["create", *BASE, SLICE, "--spot", "--reserved"], "not both"),
        (["create", *BASE, SLICE, "--spots"], "unknown flag --spots"),
        (["create", *BASE, SLICE, "--spot=yes"], "--spot takes no value"),
        (["create", *BASE, SLICE, "--slices=two"], "--slices must be a number"),
        (["create", *BASE, SLICE, "--slices=0"], "at least 1"),
        (["create", *BASE, SLICE, "--", "python"], "takes no command"),
        (["create", "--zone=z", SLICE], "--name is missing"),
        (["create", "--name=Run_1", "--zone=z", SLICE], "lower case"),
        (["create", "--name=run", SLICE], "--zone is missing"),
        (["install", *BASE, "--storage=gs://b/folder"], "only a whole bucket can be mounted"),
        (["install", *BASE, "--storage=bucket"], "--storage must be"),
        (["run", *BASE], "needs a command"),
        (["run", *BASE, "python"], "COMMAND follows --"),
        (["start", *BASE], "unknown action start"),
        (["run", *BASE, "--config=/nowhere"], "does not exist"),
    ],
)
def test_mistakes_end_in_one_line(words, message):
    cut = words.index("--") if "--" in words else len(words)
    result = tpu_vm(*words[:cut], "--dry_run", *words[cut:])
    assert (result.returncode, result.stdout) == (2, "")
    assert message in result.stderr and result.stderr.count("\n") == 1
