"""Import and export of a random Qwen3-MoE checkpoint against a plain read of the same files.

    python experiments/bench/checkpoint_io.py [--gigabytes=2] [--repeats=5]

Writes into a temporary directory. Each figure is taken several times, in a fresh process, with the
files in the page cache. The peak is the growth of that process's anonymous memory (what it
allocated); mapped file pages, which the system can drop, don't count.
"""

import argparse
import json
import math
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time


def memory() -> int:
    """Returns the anonymous memory of this process in bytes."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return 1024 * int(line.split()[1])
    return 0


class Peak:
    """Largest growth of anonymous memory while the block runs, in bytes."""

    def __enter__(self):
        self.before, self.peak, self.done = memory(), 0, threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def _watch(self):
        while not self.done.wait(0.002):
            self.peak = max(self.peak, memory() - self.before)

    def __exit__(self, *_):
        self.done.set()
        self.thread.join()


def measure(kind: str, directory: str) -> dict:
    """Times one operation in this (fresh) process. Returns seconds and peak bytes."""
    import ml_dtypes  # noqa: F401  (teaches NumPy bfloat16, for the plain reader)
    from safetensors.numpy import load_file

    files = sorted(pathlib.Path(directory).glob("*.safetensors"))
    if kind == "read":
        with Peak() as peak:
            begin = time.perf_counter()
            kept = [load_file(file) for file in files]
            seconds = time.perf_counter() - begin
        del kept
        return {"seconds": seconds, "peak": peak.peak}

    import jax

    from jaxrl_stable import hf
    from jaxrl_stable.configs import MeshShape
    from jaxrl_stable.sharding import make_mesh

    mesh = make_mesh(MeshShape())
    config = hf.read_config(directory, param_dtype="bfloat16")
    jax.block_until_ready(jax.numpy.zeros(8))
    with Peak() as peak:
        begin = time.perf_counter()
        model = hf.load(directory, mesh, config)
        jax.block_until_ready(model)
        seconds = time.perf_counter() - begin
    if kind == "export":
        with tempfile.TemporaryDirectory() as target:
            hf.save(model, f"{target}/first")  # so that pages exist, as for reads
            shutil.rmtree(f"{target}/first")
            with Peak() as peak:
                begin = time.perf_counter()
                hf.save(model, f"{target}/second")
                seconds = time.perf_counter() - begin
    return {"seconds": seconds, "peak": peak.peak}


def make(directory: str, gigabytes: float) -> None:
    """Writes a random Qwen3-MoE checkpoint in bfloat16, in files of half a gigabyte."""
    import jax

    from jaxrl_stable import hf, model

    layer = 2 * (32 * 3 * 2048 * 768 + 2 * 2048 * 2048 * 1.25)
    config = model.ModelConfig(
        vocab_size=32_000,
        hidden_size=2048,
        num_layers=max(1, math.ceil((gigabytes * 1e9 - 2 * 2 * 32_000 * 2048) / layer)),
        num_heads=16,
        num_kv_heads=4,
        head_dim=128,
        intermediate_size=6144,
        num_experts=32,
        num_experts_per_token=4,
        moe_intermediate_size=768,
        param_dtype="bfloat16",
    )
    policy = jax.jit(lambda: model.init_model(config, 0))()
    hf.save(policy, directory, file_bytes=500_000_000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--directory", default="", help="where to write; temporary if empty")
    parser.add_argument("--measure", choices=("read", "import", "export", "make"), default=None)
    arguments = parser.parse_args()
    if arguments.measure == "make":
        return make(arguments.directory, arguments.gigabytes)
    if arguments.measure:
        return print(json.dumps(measure(arguments.measure, arguments.directory)))

    def child(kind: str, directory: str) -> str:
        command = [sys.executable, __file__, f"--measure={kind}", f"--directory={directory}"]
        command.append(f"--gigabytes={arguments.gigabytes}")
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    with tempfile.TemporaryDirectory() as temporary:
        directory = arguments.directory or temporary
        child("make", directory)
        size = sum(f.stat().st_size for f in pathlib.Path(directory).glob("*.safetensors"))
        print(f"{size / 1e9:.2f} GB of weights")
        results = {kind: [] for kind in ("read", "import", "export")}
        for _ in range(arguments.repeats):  # alternating, so that all kinds see the same machine
            for kind in results:
                results[kind].append(json.loads(child(kind, directory)))
    plain = statistics.median(r["seconds"] for r in results["read"])
    for kind, runs in results.items():
        seconds = sorted(r["seconds"] for r in runs)
        print(
            f"{kind:7s} {size / statistics.median(seconds) / 1e9:5.2f} GB/s "
            f"(median of {len(runs)}; {seconds[0]:.2f} to {seconds[-1]:.2f} s), "
            f"{plain / statistics.median(seconds):.0%} of a plain read, "
            f"peak {max(r['peak'] for r in runs) / 1e9:.2f} GB"
        )


if __name__ == "__main__":
    main()
