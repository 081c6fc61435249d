"""Runs a command on TPU slices of a GKE cluster, as a JobSet.

    python launch/gke.py image --image=REGISTRY/NAME:TAG
    python launch/gke.py run --name=qwen3 --image=REGISTRY/NAME:TAG --topology=v5p:4x4x4 \
        --bucket=BUCKET --service_account=trainer -- \
        python -m jaxrl_stable.train --gin_file=... --workdir=/mnt/jaxrl/qwen3

Actions: image, run, logs, status, stop, resume, delete. `--dry_run` prints the manifest and the
commands. Needs kubectl (and docker for `image`) but not the package.
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib
import re
import shlex
import string
import subprocess
import sys
from collections.abc import Sequence

ROOT = pathlib.Path(__file__).resolve().parent.parent
TEMPLATE = ROOT / "launch" / "gke" / "jobset.yaml"

# Values of the node label cloud.google.com/gke-tpu-accelerator.
ACCELERATORS = {
    "v4": "tpu-v4-podslice",
    "v5e": "tpu-v5-lite-podslice",
    "v5p": "tpu-v5p-slice",
    "v6e": "tpu-v6e-slice",
    "tpu7x": "tpu7x",
}
# Workers write checkpoints together, so each must immediately see what the others wrote.
MOUNT_OPTIONS = "implicit-dirs,metadata-cache:ttl-secs:0,metadata-cache:negative-ttl-secs:0"


def manifest(flags: argparse.Namespace, command: Sequence[str]) -> str:
    """Returns the JobSet as YAML. Values are JSON, which is YAML, so nothing needs quoting.

    Raises:
      ValueError: if a flag is missing or wrong.
    """
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)+)(?:\*(\d+))?", flags.topology or "")
    if not match or match[1] not in ACCELERATORS:
        raise ValueError(
            f"--topology must be like v5p:4x4x4, of {', '.join(ACCELERATORS)}; got {flags.topology}"
        )
    chips = math.prod(map(int, match[2].split("x")))
    chips_per_host = min(flags.chips_per_host, chips)
    if chips % chips_per_host:
        raise ValueError(f"{chips} chips are not a multiple of --chips_per_host={chips_per_host}")
    if bool(flags.bucket) == bool(flags.claim):
        raise ValueError("give --bucket=NAME or --claim=NAME, where checkpoints are kept")
    if not flags.image:
        raise ValueError("--image is missing; `image` builds one")
    if not command:
        raise ValueError("the command is missing; write it after --")
    selector = {
        "cloud.google.com/gke-tpu-accelerator": ACCELERATORS[match[1]],
        "cloud.google.com/gke-tpu-topology": match[2],
    }
    tolerations = [{"key": "google.com/tpu", "operator": "Exists", "effect": "NoSchedule"}]
    if flags.spot:
        selector["cloud.google.com/gke-spot"] = "true"
        tolerations.append({"key": "cloud.google.com/gke-spot", "operator": "Exists"})
    bucket = {"bucketName": flags.bucket, "mountOptions": MOUNT_OPTIONS}
    volume = {"csi": {"driver": "gcsfuse.csi.storage.gke.io", "volumeAttributes": bucket}}
    if flags.claim:
        volume = {"persistentVolumeClaim": {"claimName": flags.claim}}
    values = {
        "name": flags.name,
        "image": flags.image,
        "args": [word.replace("$", "$$") for word in command],  # $(NAME) would be replaced
        "slices": int(match[3] or flags.slices),
        "hosts": chips // chips_per_host,
        "chips_per_host": chips_per_host,
        "max_restarts": flags.max_restarts,
        "grace": flags.grace,
        "service_account": flags.service_account,
        "node_selector": selector,
        "tolerations": tolerations,
        "mount": flags.mount,
        "gcsfuse": "false" if flags.claim else "true",
        "volumes": [{"name": "storage", **volume}],
    }
    template = string.Template(TEMPLATE.read_text(encoding="utf-8"))
    return template.substitute({name: json.dumps(value) for name, value in values.items()})


def pods(name: str, **labels: int) -> str:
    """Returns a selector for the pods of a JobSet, narrowed by slice and worker."""
    jobset = "jobset.sigs.k8s.io"
    keys = {"slice": f"{jobset}/job-index", "worker": "batch.kubernetes.io/job-completion-index"}
    chosen = "".join(f",{keys[label]}={value}" for label, value in labels.items())
    return f"--selector={jobset}/jobset-name={name}{chosen}"


class Shell:
    """Runs commands, or prints them in a dry run."""

    def __init__(self, dry_run: bool):
        self._dry_run = dry_run

    def run(self, *command: str, text: str | None = None) -> None:
        """Runs one command, with `text` as its standard input.

        Raises:
          OSError: if the program doesn't exist.
          subprocess.CalledProcessError: if it fails.
        """
        if self._dry_run:
            print(shlex.join(command) + (f" <<'END'\n{text}END" if text else ""))
        else:
            subprocess.run(command, check=True, text=True, input=text)

    def pipe(self, first: Sequence[str], second: Sequence[str]) -> None:
        """Runs `first | second`."""
        if self._dry_run:
            print(f"{shlex.join(first)} | {shlex.join(second)}")
            return
        with subprocess.Popen(first, stdout=subprocess.PIPE) as source:
            subprocess.run(second, check=True, stdin=source.stdout)
        if source.returncode:
            raise subprocess.CalledProcessError(source.returncode, first)


def act(flags: argparse.Namespace, command: Sequence[str]) -> None:
    """Carries out one action."""
    shell = Shell(flags.dry_run)
    where = [f"--namespace={flags.namespace}"]
    if flags.context:
        where.append(f"--context={flags.context}")

    def kubectl(*words: str, text: str | None = None) -> None:
        shell.run("kubectl", *where, *words, text=text)

    if flags.action != "run" and command:
        raise ValueError(f"{flags.action} takes no command")
    if flags.action == "image":
        if not flags.image:
            raise ValueError("--image is missing, like europe-docker.pkg.dev/PROJECT/REPO/jaxrl:1")
        # Only committed files: environments, runs and data stay out of the image.
        archive = ["git", "-C", str(ROOT), "archive", "HEAD"]
        shell.pipe(
            archive,
            ["docker", "build", "--file=launch/gke/Dockerfile", f"--tag={flags.image}", "-"],
        )
        shell.run("docker", "push", flags.image)
        return
    if not flags.name:
        raise ValueError("--name is missing")
    if flags.action == "run":  # create, not apply: a name that is taken is refused
        kubectl("create", "--filename=-", text=manifest(flags, command))
    elif flags.action == "status":
        kubectl("get", "jobset", flags.name)
        kubectl("get", "pods", pods(flags.name), "--output=wide")
    elif flags.action == "logs":
        pod = pods(flags.name, slice=flags.slice, worker=flags.worker)
        kubectl("logs", pod, "--container=train", "--follow", "--tail=100")
    elif flags.action in ("stop", "resume"):
        suspend = json.dumps({"spec": {"suspend": flags.action == "stop"}})
        kubectl("patch", "jobset", flags.name, "--type=merge", f"--patch={suspend}")
    elif flags.action == "delete":
        kubectl("delete", "jobset", flags.name)


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Parses the flags, and the command after `--`."""
    words = list(argv)
    cut = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    actions = ("image", "run", "logs", "status", "stop", "resume", "delete")
    parser.add_argument("action", choices=actions)
    parser.add_argument("--name", help="name of the JobSet")
    parser.add_argument("--image", help="REGISTRY/NAME:TAG")
    parser.add_argument("--topology", help="as in jaxrl_stable.aot: v5p:4x4x4, v5p:4x4x4*2")
    parser.add_argument("--slices", type=int, default=1, help="unless the topology has *N")
    parser.add_argument("--chips_per_host", type=int, default=4, help="of the node pool")
    parser.add_argument("--spot", action="store_true", help="use node pools of Spot VMs")
    parser.add_argument("--bucket", help="mounted on all pods with Cloud Storage FUSE")
    parser.add_argument("--claim", help="instead: a ReadWriteMany PersistentVolumeClaim")
    parser.add_argument("--mount", default="/mnt/jaxrl", help="mount point")
    parser.add_argument("--service_account", default="default", help="may write the bucket")
    parser.add_argument("--max_restarts", type=int, default=10, help="preemptions do not count")
    parser.add_argument("--grace", type=int, default=600, help="seconds from SIGTERM to SIGKILL")
    parser.add_argument("--slice", type=int, default=0, help="slice whose logs to show")
    parser.add_argument("--worker", type=int, default=0, help="worker whose logs to show")
    parser.add_argument("--namespace", default="default")
    parser.add_argument("--context", help="context of kubectl")
    parser.add_argument("--dry_run", action="store_true")
    return parser.parse_args(words[:cut]), words[cut + 1 :]


def main(argv: Sequence[str]) -> int:
    """Runs the action. Returns the exit status."""
    try:
        act(*parse(argv))
    except (ValueError, OSError, subprocess.CalledProcessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
