"""A gcloud that plays Cloud TPU in the folder FAKE_CLOUD, for tests of launch/tpu_vm.sh.

Machines are folders `machines/NODE/WORKER`; ssh runs the command in them, with HOME there. The
request for them is the file `request`: the states it will show, one per line; the last one stays.
A file `event` says what happens at the next call: "preempt request", "preempt NODE" (the
request does not show it at once), "reboot NODE" or "silence all" (no ssh to what there is). All
calls are noted in `calls`.

It starts a hundred times in these tests, hence the few and late imports.
"""

import os
import signal
import sys

CLOUD = os.environ["FAKE_CLOUD"]
MACHINES, REQUEST, EVENT = (f"{CLOUD}/{name}" for name in ("machines", "request", "event"))
NO_SSH = f"{CLOUD}/no_ssh"


def main() -> int:
    words = sys.argv[1:]
    with open(f"{CLOUD}/calls", "a", encoding="utf-8") as file:
        file.write("\t".join(words) + "\n")
    names = [word for word in words[4:] if not word.startswith("--")]
    flags = dict(word[2:].partition("=")[::2] for word in words[4:] if word.startswith("--"))
    if os.path.exists(EVENT):
        happen(*take(EVENT).split())
    return globals()["_".join(words[2:4]).replace("-", "_")](names, flags)


def read(path: str) -> str:
    with open(path, encoding="utf-8") as file:
        return file.read()


def write(path: str, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)


def take(path: str) -> str:
    text = read(path)
    os.unlink(path)
    return text


def nodes() -> list[str]:
    return sorted(os.listdir(MACHINES)) if os.path.exists(MACHINES) else []


def workers(node: str, which: str = "all") -> list[str]:
    folder = f"{MACHINES}/{node}"
    names = sorted(filter(str.isdecimal, os.listdir(folder))) if os.path.exists(folder) else []
    return [f"{folder}/{name}" for name in names if which in ("all", name)]


def end(worker: str) -> None:
    """Ends what runs on a machine, as pulling the plug would."""
    if not os.path.exists(f"{worker}/jaxrl/exit"):
        for name in ("supervisor", "pid"):
            if os.path.exists(path := f"{worker}/jaxrl/{name}"):
                os.kill(int(read(path)), signal.SIGKILL)


def remove(folder: str) -> None:
    import shutil

    shutil.rmtree(folder)


def happen(what: str, which: str) -> None:
    if what == "silence":
        write(NO_SSH, "")
    for node in nodes():
        for worker in workers(node) if which in ("request", node) else ():
            end(worker)
            if what == "preempt":
                remove(worker)
            else:
                write(f"{worker}/boot_id", "another\n")
                os.unlink(f"{worker}/mounted")
    if which == "request":
        write(REQUEST, "SUSPENDING\nSUSPENDED\n")
    elif what == "preempt":
        write(f"{MACHINES}/{which}/PREEMPTED", "")


def queued_resources_create(names, flags) -> int:
    if os.path.exists(REQUEST):
        print("ALREADY_EXISTS", file=sys.stderr)
        return 1
    write(REQUEST, read(f"{CLOUD}/fate"))
    made = [flags.get("node-id")]
    if "node-count" in flags:
        made = [f"{flags['node-prefix']}-{index}" for index in range(int(flags["node-count"]))]
    chips = int(flags["accelerator-type"].removeprefix("v6e-"))
    for node in made:
        for worker in range(chips // 4):
            os.makedirs(f"{MACHINES}/{node}/{worker}")
    return 0


def queued_resources_list(names, flags) -> int:
    if os.path.exists(REQUEST):
        state, *rest = read(REQUEST).split()
        print(f"a-neighbour\tFAILED\nrun\t{state}")
        if rest:
            write(REQUEST, "\n".join(rest))
    return 0


def queued_resources_delete(names, flags) -> int:
    if not os.path.exists(REQUEST):
        return 1
    for node in nodes():
        for worker in workers(node):
            end(worker)
    remove(MACHINES)
    os.unlink(REQUEST)
    if os.path.exists(NO_SSH):
        os.unlink(NO_SSH)
    return 0


def tpu_vm_list(names, flags) -> int:
    for node in nodes():
        gone = os.path.exists(f"{MACHINES}/{node}/PREEMPTED")
        print(f"{node}\t{'PREEMPTED' if gone else 'READY'}")
    return 0


def tpu_vm_ssh(names, flags) -> int:
    reached = workers(names[0], flags["worker"])
    if not reached or os.path.exists(NO_SSH):
        return 255
    worst = 0
    for folder in reached:
        environment = os.environ | {
            "HOME": folder,
            "PATH": f"{CLOUD}/bin:{os.environ['PATH']}",
            "FAKE_HOST": f"{names[0]}-w-{os.path.basename(folder)}",
        }
        if os.path.exists(f"{folder}/boot_id"):  # it has booted again; else that of this machine
            environment["JAXRL_BOOT_ID"] = f"{folder}/boot_id"
        os.chdir(folder)
        command = ["bash", "-c", flags["command"]]
        worst = os.spawnvpe(os.P_WAIT, "bash", command, environment) or worst
    return worst


def tpu_vm_scp(names, flags) -> int:
    import shutil

    *files, target = names
    for folder in workers(target.removesuffix(":"), flags["worker"]):
        for file in files:
            shutil.copy(file, folder)
    return 0


sys.exit(main())
