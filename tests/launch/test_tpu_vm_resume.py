"""launch/tpu_vm.sh and worker.sh at work, on machines that fake_gcloud.py plays.

The run is a small program that counts and keeps its count in a file on the shared storage. Each
time it runs, something goes wrong.
"""

import contextlib
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest

HERE = pathlib.Path(__file__).parent
LAUNCH = HERE.parents[1] / "launch"

PROGRAM = """
import os, pathlib, signal, sys, time
storage, mishaps = pathlib.Path(sys.argv[1]), sys.argv[2].split(",")
host, version = os.environ["FAKE_HOST"], 1
count, life = storage / f"count-{host}", len(list(storage.glob("mishap-*")))
step = int(count.read_text()) if count.exists() else 0
print(f"version {version} goes on from {step}", flush=True)
mishap, signals = mishaps[life] if life < len(mishaps) else "", []
signal.signal(signal.SIGTERM, lambda *_: signals.append(1))
(storage / f"here-{life}-{host}").touch()
while step < 9:
    time.sleep(0.01)
    step += 1
    count.write_text(str(step))
    if mishap.isdecimal() and host.endswith("w-1"):
        sys.exit(int(mishap))
    while mishap and not mishap.isdecimal() and not signals:  # as if a peer were missing
        time.sleep(0.02)
        all_here = len(list(storage.glob(f"here-{life}-*"))) == 2
        if host == "run-0-w-0" and all_here and not (storage / f"mishap-{life}").exists():
            (storage / f"mishap-{life}").touch()
            pathlib.Path(os.environ["FAKE_CLOUD"], "event").write_text(mishap)
    if signals:
        print("saved", flush=True)
        sys.exit(0)
"""

# The remote machine: what worker.sh calls there.
TOOLS = {
    "hostname": 'echo "$FAKE_HOST"',
    "sudo": 'exec "$@"',
    "mountpoint": '[ -f "$HOME/mounted" ]',
    "gcsfuse": 'echo "$*" >"$HOME/mounted"',
    "python3": """
[ "$*" = "-m pip install --quiet --upgrade --target $HOME/jaxrl/uv uv" ] || exit 9
mkdir -p "$HOME/jaxrl/uv/bin"
cp "$FAKE_CLOUD/bin/uv" "$HOME/jaxrl/uv/bin/uv"
""",
    "uv": f"""
echo "$*" >>"$HOME/uv_calls"
[ "$1" = pip ] || {{ mkdir -p "${{@: -1}}/bin"; ln -sf {sys.executable} "${{@: -1}}/bin/python"; }}
""",
}


class Cloud:
    """A repository to launch from, and the machines."""

    def __init__(self, folder: pathlib.Path):
        self.folder, self.repository = folder / "cloud", folder / "repository"
        self.storage = self.folder / "storage"
        for each in (self.folder / "bin", self.folder / "local", self.storage, self.repository):
            each.mkdir(parents=True)
        for name, text in TOOLS.items():
            self.script(self.folder / "bin" / name, text)
        gcloud = self.folder / "local" / "gcloud"
        gcloud.write_text(f"#!{sys.executable} -IS\n{(HERE / 'fake_gcloud.py').read_text()}")
        gcloud.chmod(0o755)
        (self.folder / "fate").write_text("PROVISIONING\nACTIVE\n")
        shutil.copytree(LAUNCH, self.repository / "launch")
        (self.repository / "program.py").write_text(PROGRAM)
        (self.repository / ".gitignore").write_text("runs/\n")
        for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
            identity = ["-c", "user.name=x", "-c", "user.email=x@x"]
            subprocess.run(["git", *identity, *words], cwd=self.repository, check=True)

    @staticmethod
    def script(path: pathlib.Path, text: str) -> None:
        path.write_text(f"#!/usr/bin/env bash\n{text}\n")
        path.chmod(0o755)

    def call(self, action: str, *flags: str, mishap: str | None = None):
        command = ["bash", "launch/tpu_vm.sh", action, "--name=run", "--zone=z", "--poll=0"]
        command += ["--topology=v6e:2x4", f"--mount={self.storage}", "--storage=gs://b", *flags]
        if mishap is not None:
            command += ["--", "python", "program.py", str(self.storage), mishap]
        environment = os.environ | {
            "PATH": f"{self.folder}/local:{os.environ['PATH']}",
            "FAKE_CLOUD": str(self.folder),
            "JAXRL_PAUSE": "0.05",
        }
        return subprocess.run(
            command,
            cwd=self.repository,
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def verbs(self) -> list[str]:
        """Returns the calls of gcloud, without status queries and repetitions."""
        calls = [line.split("\t") for line in (self.folder / "calls").read_text().splitlines()]
        return [c[3] if c[2] == "queued-resources" else c[-2] for c in calls if c[3] != "list"]

    def count(self, verb: str) -> int:
        return self.verbs().count(verb)

    def remote(self, text: str) -> int:
        """Returns how many ssh commands begin with this."""
        lines = (self.folder / "calls").read_text().splitlines()
        return sum(f"--command=bash worker.sh {text}" in line for line in lines)

    def logs(self) -> str:
        files = sorted((self.storage / "logs" / "run").glob("*.log"))
        return "".join(f"{file.stem}: {file.read_text()}" for file in files)


@pytest.fixture
def cloud(tmp_path):
    made = Cloud(tmp_path)
    yield made
    for home in made.folder.glob("machines/*/*/jaxrl"):  # left by a test that failed
        if not (home / "exit").exists():
            for file in home.glob("[ps]*[dr]"):  # pid, supervisor
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(file.read_text()), signal.SIGKILL)


def test_run_status_logs_stop(cloud):
    (cloud.repository / "program.py").write_text(PROGRAM.replace("], 1", "], 7"))
    assert cloud.call("create").returncode == 0
    assert cloud.call("install").returncode == 0
    assert (cloud.folder / "machines/run/1/mounted").read_text() == (
        "--implicit-dirs --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 "
        f"b {cloud.storage}\n"
    )
    installed = (cloud.folder / "machines/run/1/uv_calls").read_text()
    assert "source[tpu,kernels]" in installed and "--python 3.12" in installed
    assert cloud.call("run", mishap="wait").returncode == 0
    assert "run-w-0 running\nrun-w-1 running\n" in cloud.call("status").stdout

    refused = cloud.call("run", mishap="wait")
    assert refused.returncode != 0 and "a run is in progress" in refused.stderr
    assert cloud.remote("start") == 1  # not even on one of the workers
    assert cloud.call("install").returncode != 0  # nor is the code replaced below it

    assert cloud.call("stop").returncode == 0
    assert "run-w-0 exit 0\nrun-w-1 exit 0\n" in cloud.call("status").stdout
    log = cloud.call("logs", "--worker=1").stdout
    assert log == "version 7 goes on from 0\nsaved\n"  # the working tree, not the last commit
    assert "run-w-0: version 7" in cloud.logs() and "run-w-1: version 7" in cloud.logs()
    assert cloud.call("delete").returncode == 0
    assert not (cloud.repository / "runs/launch/run/source.tar.gz").exists()


def test_resume(cloud):
    flags = ["--topology=v6e:2x2", "--slices=2", "--spot", "--delete_when_done", "--patience=2"]
    mishaps = ["preempt request", "preempt run-1", "reboot run-1", "silence all"]
    result = cloud.call("resume", *flags, mishap=",".join(mishaps))
    assert result.returncode == 0, result.stderr
    counts = sorted(file.read_text() for file in cloud.storage.glob("count-*"))
    assert counts == ["9"] * 2  # each worker came to the end,
    assert "run-1-w-0: version 1 goes on from 4\n" in cloud.logs()  # starting where it was
    assert cloud.count("create") == 4  # a reboot needs no new machines
    assert cloud.count("delete") == 4  # and nothing is left that costs money
    assert not (cloud.folder / "request").exists()
    assert cloud.remote("start") == 2 * (1 + len(mishaps))


def test_resume_starts_a_failed_run_again_a_few_times(cloud):
    result = cloud.call("resume", "--retries=1", mishap="3")
    assert result.returncode == 2 and "COMMAND failed 3, 2 times" in result.stderr
    assert "still cost money" in result.stderr
    assert cloud.remote("start") == 2
    assert cloud.count("create") == 1 and cloud.count("delete") == 0


def test_requests_that_fail(cloud):
    (cloud.folder / "fate").write_text("PROVISIONING\nFAILED\n")
    result = cloud.call("create")
    assert result.returncode == 2 and "the request is FAILED" in result.stderr
    result = cloud.call("resume", "--retries=1", mishap="")
    assert result.returncode == 2 and "refused 2 times" in result.stderr
    assert cloud.count("create") == 2


def test_resume_gives_up_machines_that_never_answered(cloud):
    (cloud.folder / "no_ssh").touch()
    result = cloud.call("resume", "--patience=2", mishap="")
    assert result.returncode == 2 and "no ssh to the workers" in result.stderr
    assert cloud.count("create") == 1


def test_resume_gives_up_what_cannot_be_installed(cloud):
    Cloud.script(cloud.folder / "bin" / "uv", "exit 1")
    result = cloud.call("resume", "--retries=1", "--delete_when_done", mishap="")
    assert result.returncode == 2 and "could not install or start, 2 times" in result.stderr
    assert cloud.remote("start") == 0 and not (cloud.folder / "request").exists()


def test_second_life_installs_what_the_first_had(cloud):
    cloud.call("install")  # there are no machines yet, but the archive for them is packed
    (cloud.repository / "program.py").write_text("raise SystemExit(9)")
    assert cloud.call("resume", mishap="").returncode == 0
    assert "version 1 goes on from 0" in cloud.logs()


def test_a_run_that_does_not_hear_is_killed(cloud):
    deaf = PROGRAM.replace("signals.append(1)", "None")
    (cloud.repository / "program.py").write_text(deaf)
    for action in ("create", "install"):
        assert cloud.call(action).returncode == 0
    assert cloud.call("run", mishap="wait").returncode == 0
    begin = time.monotonic()
    result = cloud.call("stop", "--grace=0")
    assert time.monotonic() - begin < 5
    assert "run-w-0: still there after 0 s; killed" in result.stderr
    assert "run-w-1 exit 137\n" in cloud.call("status").stdout
