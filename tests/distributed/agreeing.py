"""Checks what processes share and agree on; run by two processes with two devices each."""

import pathlib
import shutil
import sys
from functools import partial

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxrl_stable import distributed, hf
from jaxrl_stable.distributed import watch
from jaxrl_stable.hf.names import parameters
from jaxrl_stable.rewards import Verdict
from jaxrl_stable.routing import Routing
from jaxrl_stable.run.fingerprint import fingerprint
from jaxrl_stable.run.judge import STATUSES, judge
from jaxrl_stable.run.samples import sample_rows
from jaxrl_stable.run.task import Task
from jaxrl_stable.sharding import MeshShape, make_mesh, row_sharding, shard_rows
from jaxrl_stable.trainer.batch import make_batch
from jaxrl_stable.trajectory import Trajectory

scratch, checkpoint = map(pathlib.Path, sys.argv[1:])
distributed.initialize()
me, B, P, T = jax.process_index(), 8, 2, 6
assert jax.process_count() == 2 and jax.local_device_count() == 2


seen = []


class Words:
    vocab_size, eos_id, eos_ids, pad_id = 64, 9, (9,), 0

    def decode(self, ids):
        return "".join(f"<{i}>" for i in ids)


def trajectory(mesh):
    """Makes rows; row b has a response of 1 + b % 3 tokens, all equal to b."""
    rows, columns = np.arange(B)[:, None], np.arange(T)[None]
    mask = (columns >= P) & (columns < P + 1 + rows % 3)
    place = partial(shard_rows, mesh)
    tokens = place(np.where(mask, rows, 0))
    mask = place(mask)
    routing = Routing(place(np.zeros((B, T, 1))), mask)
    return Trajectory(tokens, mask, mask, tokens * 1.0, routing, place(np.arange(B) > 3), P)


def reward(problems, responses):
    for problem, response in zip(problems, responses, strict=True):
        seen.append(problem["id"])
        assert response == f"<{problem['id']}>" * (1 + problem["id"] % 3)
    return [Verdict(p["id"] / 2, STATUSES[p["id"] % len(STATUSES)]) for p in problems]


def main():
    for sizes, shared in (((4,), False), ((1, 1, 1, 4), True), ((2, 1, 1, 2), None)):
        mesh = make_mesh(MeshShape(*sizes))
        held = distributed.held_rows(row_sharding(mesh), B)
        owners = distributed.row_owners(row_sharding(mesh), B)
        assert (np.bincount(owners, minlength=2) == B // 2).all()
        assert held[owners == me].all() and (shared is None or held.all() == shared)
        task = Task(None, None, Words(), reward)
        problems = [{"id": i} if held[i] else None for i in range(B)]
        with jax.set_mesh(mesh):
            sampled = trajectory(mesh)
            for rows in (B, B - 3):  # the last ones are padding
                seen.clear()
                judged = judge(task, problems[:rows], sampled)
                assert seen == [i for i in range(rows) if owners[i] == me]
                np.testing.assert_array_equal(judged.rewards, np.arange(rows) / 2)
                np.testing.assert_array_equal(judged.status, np.arange(rows) % len(STATUSES))
                np.testing.assert_array_equal(judged.lengths, 1 + np.arange(rows) % 3)
                np.testing.assert_array_equal(judged.finished, np.arange(rows) > 3)
            batch = make_batch(sampled, shard_rows(mesh, np.arange(B) * 1.0))
            shown = sample_rows(
                [{"id": i} for i in range(3)],
                np.array([2, 0, 1]),
                judged,
                batch.advantages,
                batch,
                None,
                task,
            )
            assert [row["response"] for row in shown] == ["<2><2><2>", "<0>", "<1><1>"]
            assert [row["advantage"] for row in shown] == [2.0, 0.0, 1.0]
            assert [row["score"] for row in shown] == [1.0, 0.0, 0.5]

    np.testing.assert_array_equal(distributed.any_process([me == 0, me == 1, False]), [1, 1, 0])

    distributed.check_same("data set", "the same")
    with pytest.raises(ValueError, match=r"\[1\] have a different data set from process 0"):
        distributed.check_same("data set", f"of process {me}")

    with pytest.raises(ValueError, match=r"processes \[1\] do not see what process 0 writes in"):
        distributed.check_shared(scratch / str(me))
    distributed.check_shared(scratch)
    distributed.wait_for_all("checked")
    assert not list(scratch.glob(".shared*"))

    # A checkpoint of transformers: every process reads its own slices, and all judge it alike.
    mesh = make_mesh(MeshShape(fsdp=2, tensor=2))
    own = make_mesh(MeshShape(), jax.local_devices()[:1])
    alone = hf.load(checkpoint, own)
    whole = parameters(alone)
    model = hf.load(checkpoint, mesh)
    assert fingerprint(model, mesh) == fingerprint(alone, own)
    for path, param in parameters(model).items():
        for shard in param.get_value().addressable_shards:
            wanted = np.asarray(whole[path].get_value())[shard.index]
            np.testing.assert_array_equal(shard.data, wanted, err_msg=path)
    with pytest.raises(ValueError, match="spread over several hosts"):
        hf.save(model, scratch / "saved")
    broken = scratch / "broken"
    if me == 0:
        shutil.copytree(checkpoint, broken)
        name = "model.layers.0.self_attn.q_proj.weight"
        file = next(f for f in broken.glob("*.safetensors") if name in load_file(f))
        tensors = load_file(file)
        tensors[name] = tensors[name].copy()
        tensors[name][0, 0] = np.nan  # in the part of one process
        save_file(tensors, file, metadata={"format": "pt"})
    distributed.wait_for_all("broken")
    with pytest.raises(
        ValueError, match=r"non-finite values in model\.layers\.0\.self_attn\.q_proj\.weight"
    ):
        hf.load(broken, mesh)
    (scratch / f"passed.{me}").touch()


with watch.together():
    main()
