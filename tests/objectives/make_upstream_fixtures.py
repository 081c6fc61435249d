"""Makes `frozen/upstream.npz`: what verl, slime and BAPO compute for the cases of `upstream_cases`.

Needs torch and their repositories. Runs single functions of them, without their imports:

    python -m tests.objectives.make_upstream_fixtures --verl DIR --verl-dro DIR --bapo DIR \\
        --slime DIR --slime-veto DIR [--commits FILE]

`--verl-dro` is a verl that has DRO, `--slime-veto` slime while it still had the veto. A directory
that is not a git checkout takes the commit of each file from `--commits`: JSON, option -> path ->
commit. Besides the commits, the file records a digest of each function without its docstrings,
comments, and annotations of arguments: what is frozen came from functions transcribed by hand,
which a checkout of the same commits has to confirm.
"""

import __future__

import argparse
import ast
import hashlib
import itertools
import json
import logging
import math
import pathlib
import subprocess
import typing
from types import SimpleNamespace

import numpy as np
import torch

from tests.objectives import upstream_cases as cases

FROZEN = pathlib.Path(__file__).parent / "frozen" / "upstream.npz"
CORR, CORE = (f"verl/trainer/ppo/{name}.py" for name in ("rollout_corr_helper", "core_algos"))
MIS, PPO = "examples/train_infer_mismatch_helper/mis.py", "slime/utils/ppo_utils.py"
MASKED, DEBUG = "verl/utils/torch_functional.py", "verl/utils/debug/metrics.py"
BAPO = "recipe/bapo/policy_loss.py"
VERL_LOSSES = ("vanilla", "dppo_tv", "dppo_kl", "gspo", "sapo", "geo_mean", "cispo", "reinforce")
FUNCTIONS = {  # ordered so that each finds what it calls
    "verl": {
        MASKED: ("masked_sum", "masked_mean"),
        DEBUG: (
            "pearson_correlation_coefficient",
            "calculate_log_prob_diff",
            "calculate_debug_metrics",
        ),
        CORR: (
            "SAFETY_BOUND",
            "SUPPORTED_ROLLOUT_RS_OPTIONS",
            "TOKEN_LEVEL_ROLLOUT_RS_OPTIONS",
            "_parse_rollout_is_threshold",
            "_parse_rollout_rs_thresholds",
            "compute_rollout_rejection_mask",
            "compute_rs_metrics",
            "compute_rollout_correction_weights",
            "compute_is_metrics",
            "compute_offpolicy_metrics",
        ),
        CORE: ("agg_loss", *(f"compute_policy_loss_{name}" for name in VERL_LOSSES)),
    },
    "verl-dro": {CORE: ("compute_policy_loss_dro",)},
    "bapo": {BAPO: ("_compute_effective_advantage", "_append_metric", "compute_policy_loss_bapo")},
    "slime": {
        MIS: (
            "masked_sum",
            "masked_mean",
            "masked_min",
            "masked_max",
            "metrics_append",
            "truncate",
            "clip",
            "mask",
            "compute_mis_weights",
            "add_ppl_metrics",
        ),
        PPO: ("compute_policy_loss", "build_opsm_inputs_from_log_probs", "compute_opsm_mask"),
    },
    "slime-veto": {MIS: ("metrics_append", "calculate_veto_mask")},
}


class Config(SimpleNamespace):
    """Of an actor; these are defaults."""

    clip_ratio, clip_ratio_low, clip_ratio_high = 0.2, None, None

    def get(self, name: str, default=None):
        return getattr(self, name, default)


def load(root: pathlib.Path, functions: dict, commits: dict, namespace: dict) -> dict:
    """Defines the functions in the namespace; returns where they are from."""
    about = {}
    for path, names in functions.items():
        found = {}
        for node in ast.parse((root / path).read_text()).body:
            if isinstance(node, ast.FunctionDef):
                node.decorator_list = []
                found[node.name] = node
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                found[node.target.id] = node
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                found[node.targets[0].id] = node
        body = ast.Module([found[name] for name in names], [])
        flags = __future__.annotations.compiler_flag
        exec(compile(body, str(root / path), "exec", flags), namespace)
        commit = commits.get(path) or subprocess.check_output(
            ["git", "-C", str(root), "rev-parse", "HEAD"], text=True
        )
        digests = {name: digest(found[name]) for name in names}
        about[path] = {"commit": commit.strip(), "functions": digests}
    return about


def digest(node: ast.stmt) -> str:
    for part in ast.walk(node):
        if isinstance(part, ast.FunctionDef):
            part.returns = None
            if ast.get_docstring(part) is not None:
                part.body = part.body[1:]
        elif isinstance(part, ast.arg):
            part.annotation = None
    return hashlib.sha256(ast.unparse(node).encode()).hexdigest()[:16]


def systems(roots: dict[str, pathlib.Path], commits: dict) -> tuple[dict, dict]:
    """Returns the functions of each repository, and where they are from."""
    common = {name: getattr(typing, name) for name in ("Any", "Dict", "Optional")}
    common |= dict(torch=torch, math=math, ActorConfig=Config, OpsmInputs=SimpleNamespace)
    common |= dict(AlgoConfig=type("AlgoConfig", (), {}), logger=logging.getLogger(__name__))
    spaces, about = {}, {}
    for name, functions in FUNCTIONS.items():  # two of the repositories are copies of verl
        space = dict(spaces["verl"].__dict__ if name in ("verl-dro", "bapo") else common)
        about[name] = load(roots[name], functions, commits.get(name, {}), space)
        if name == "verl":
            space["verl_F"] = SimpleNamespace(
                masked_sum=space["masked_sum"], masked_mean=space["masked_mean"]
            )
        spaces[name] = SimpleNamespace(**space)
    return spaces, about


def mean_of_means(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """slime's reduction of its loss and of everything that it records."""
    return ((x * mask).sum(-1) / mask.sum(-1)).mean()


def numbers(metrics: dict) -> dict[str, float]:
    return {name.split("/")[-1]: float(x) for name, x in metrics.items()}


def a_loss(case: cases.Loss, of: dict, batch: SimpleNamespace) -> dict:
    """Returns the value, the gradient by log π_θ, and the shares that they record."""
    system, name = case.theirs.split()
    logp = batch.logp.clone().requires_grad_()
    old = batch.rollout if case.bypass else batch.old
    advantages = batch.advantages[:, None].expand_as(logp)
    config, metrics, weights = Config(**case.settings), {}, None
    config.global_batch_info = dict(loss_scale_factor=case.horizon)
    if case.weights is not None:
        current = logp.detach() if case.bypass else batch.old
        weights, metrics = of["verl"].compute_rollout_correction_weights(
            current - batch.rollout, batch.mask, *case.weights
        )
    arrays = old, logp, advantages, batch.mask, case.aggregation
    if system == "slime":
        loss, _ = of["slime"].compute_policy_loss(old - logp, advantages, **case.settings)
        loss = mean_of_means(loss, batch.mask)
    elif system == "bapo":
        config.policy_loss = Config(eps=1e-8, **case.settings)
        loss, *shares = of["bapo"].compute_policy_loss_bapo(*arrays, config)
        names = "pg_clipfrac", "ppo_kl", "pg_clipfrac_lower"
        metrics = (
            dict(zip(names, map(torch.Tensor.item, shares)))
            | config.policy_loss._bapo_metrics_buffer[-1]
        )
    else:
        config.policy_loss = config
        function = getattr(of[system], f"compute_policy_loss_{name}")
        loss, more = function(*arrays, config, rollout_is_weights=weights)
        metrics = metrics | more
    loss.backward()
    return {"loss": loss.item(), "gradient": logp.grad.numpy(), **numbers(metrics)}


def a_correction(case: cases.Correction, of: dict, batch: SimpleNamespace) -> dict:
    """Returns their weight (0 where they reject) and the shares that they record."""
    old, rollout, mask, metrics = batch.old, batch.rollout, batch.mask, {}
    if case.system == "verl" and "rollout_is" in case.settings:
        function = of["verl"].compute_rollout_correction_weights
        factor, metrics = function(old - rollout, mask, **case.settings)
    elif case.system == "verl":
        function = of["verl"].compute_rollout_rejection_mask
        factor, metrics = function(old - rollout, mask, **case.settings)
    elif case.system == "slime veto":
        recorded = {}
        rows = [
            of["slime-veto"].calculate_veto_mask(
                x, m, case.settings["mis_veto_threshold"], recorded
            )
            for x, m in zip(old - rollout, mask)
        ]
        factor = torch.stack(rows) * mask
        metrics = {key: mean_of_means(torch.stack(x), mask) for key, x in recorded.items()}
    elif case.system == "slime opsm":
        inputs = of["slime"].build_opsm_inputs_from_log_probs(batch.logp, rollout, mask)
        factor, _ = of["slime"].compute_opsm_mask(
            Config(**case.settings), batch.advantages[:, None].expand_as(old), opsm_inputs=inputs
        )
        factor = factor.reshape(mask.shape) * mask
    else:
        weights, kept, _ = mis(of, batch, case.settings)
        factor = kept if case.system == "slime rejection" else weights * kept
    return {"factor": factor.numpy(), **numbers(metrics)}


def mis(of: dict, batch: SimpleNamespace, settings: dict) -> tuple[torch.Tensor, ...]:
    default = dict(use_tis=True, use_rs=False, rs_lower_bound=None, rs_upper_bound=None)
    default |= dict(rs_trust_region=None, rs_tr_threshold=None)
    weights, kept, metrics = of["slime"].compute_mis_weights(
        Config(**default | settings),
        train_log_probs=list(batch.old),
        rollout_log_probs=list(batch.rollout),
        loss_masks=list(batch.mask),
    )
    metrics = {key: mean_of_means(torch.stack(x), batch.mask) for key, x in metrics.items()}
    return torch.stack(weights), torch.stack(kept), metrics


def the_metrics(of: dict, batch: SimpleNamespace) -> dict[str, float]:
    verl, delta, found = of["verl"], batch.old - batch.rollout, {}
    data = dict(old_log_probs=batch.old, rollout_log_probs=batch.rollout)
    data |= dict(response_mask=batch.mask, responses=batch.mask)
    for metrics in (
        verl.compute_offpolicy_metrics(batch.old, batch.rollout, batch.mask),
        verl.calculate_debug_metrics(SimpleNamespace(batch=data)),
    ):
        named = numbers(metrics)
        found |= {f"verl/{key}": named[key] for key in cases.METRICS["verl"] if key in named}
    for level in ("token", "sequence", "geometric"):
        *_, metrics = mis(of, batch, cases.tis(level, "truncate", 2.0))
        name = "tis_weight_before_bound"
        found[f"slime/{level}/{name}"] = float(metrics.pop(name))
    found |= {
        f"slime/{key}": float(metrics[key]) for key in cases.METRICS["slime"] if "/" not in key
    }
    for threshold, names in cases.WEIGHTS.items():
        _, metrics = verl.compute_rollout_correction_weights(delta, batch.mask, "token", threshold)
        found |= {f"verl/{threshold:g}/{key}": metrics[key] for key in names}
    return found


def stack(results: list[dict], prefix: str, names: typing.Iterable[str]) -> dict[str, np.ndarray]:
    return {f"{prefix}/{name}": np.stack([r[name] for r in results]) for name in names}


def computed(of: dict) -> dict[str, np.ndarray]:
    drawn = [cases.draw(seed) for seed in cases.SEEDS]
    batches = []
    for batch in drawn:
        tensors = {key: torch.from_numpy(x) for key, x in batch._asdict().items()}
        batches.append(SimpleNamespace(**tensors | dict(mask=tensors["mask"].long())))
    arrays = stack([batch._asdict() for batch in drawn], "batch", cases.Batch._fields)
    for name, case in cases.LOSSES.items():
        results = [a_loss(case, of, batch) for batch in batches]
        recorded = ["loss", "gradient", *itertools.chain(*case.shares.values())]
        recorded += ["clip_low", "clip_high"] * (case.theirs == "bapo bapo")
        arrays |= stack(results, f"loss/{name}", recorded)
    for name, case in cases.CORRECTIONS.items():
        results = [a_correction(case, of, batch) for batch in batches]
        arrays |= stack(results, f"correction/{name}", ["factor", *case.metrics.values()])
    results = [the_metrics(of, batch) for batch in batches]
    return arrays | stack(results, "metric", results[0])


def packed(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Puts values with one number per batch into one array, which is smaller."""
    small = {name: x for name, x in arrays.items() if x.ndim == 1}
    arrays = {name: x for name, x in arrays.items() if x.ndim > 1}
    return dict(names=np.array(list(small)), numbers=np.stack(list(small.values())), **arrays)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for name in FUNCTIONS:
        parser.add_argument(f"--{name}", type=pathlib.Path, required=True)
    parser.add_argument("--commits", type=argparse.FileType())
    arguments = vars(parser.parse_args())
    roots = {name: arguments[name.replace("-", "_")] for name in FUNCTIONS}
    of, about = systems(roots, json.load(arguments["commits"]) if arguments["commits"] else {})
    about = {"torch": torch.__version__, "sources": about, "settings": cases.settings()}
    about["repositories"] = {
        "verl": "https://github.com/verl-project/verl",
        "verl-dro": "https://github.com/zzx-peter/HACRL-code",
        "bapo": "https://github.com/WooooDyy/BAPO",
        "slime": "https://github.com/THUDM/slime",
        "slime-veto": "https://github.com/THUDM/slime",
    }
    np.savez_compressed(FROZEN, about=json.dumps(about), **packed(computed(of)))
