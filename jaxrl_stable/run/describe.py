"""Sizes of a run: shapes, parameters and memory, from abstract shapes alone."""

from __future__ import annotations

import math

import jax
import numpy as np

from jaxrl_stable.configs import Experiment
from jaxrl_stable.model.attention import attention_implementation
from jaxrl_stable.model.cache import empty_cache
from jaxrl_stable.model.config import ModelConfig
from jaxrl_stable.model.dispatch import experts_implementation
from jaxrl_stable.model.transformer import init_model
from jaxrl_stable.objective import Objective, name_of
from jaxrl_stable.routing import expert_dtype
from jaxrl_stable.run.wandb_log import check_installed
from jaxrl_stable.sampler.quantize import quantize, resolve_products, sampling_copy
from jaxrl_stable.text import byte_size
from jaxrl_stable.trainer.optimizer import init_state, make_optimizer


def describe(experiment: Experiment) -> str:
    """Returns a table of an experiment's resolved sizes, as totals over all devices.

    Raises:
      ValueError: if wandb is needed but not installed.
    """
    check_installed(experiment.wandb_project)
    model_config, rl = experiment.model, experiment.reinforcement
    model = jax.eval_shape(lambda: init_model(model_config, experiment.seed))
    optimizer = make_optimizer(rl.optimizer)
    state = jax.eval_shape(lambda: init_state(init_model(model_config, 0), optimizer))
    copy = sampling_copy if rl.rollout_cache else quantize
    sampler = jax.eval_shape(lambda m: copy(m, rl.rollout_format), model)
    rows = rl.prompts * rl.group_size
    width = experiment.data.prompt_width + rl.max_tokens
    at_once = rl.rollout_rows or rows
    cache = jax.eval_shape(lambda: empty_cache(model_config, at_once, width))
    mini_batch = rows // rl.objective.mini_batches
    layers, k = model_config.num_moe_layers, model_config.num_experts_per_token
    routing = (layers, rows, width, k)
    routing_bytes = math.prod(routing) * expert_dtype(model_config.num_experts).itemsize
    columns = min(max(model_config.head_chunk // rl.micro_batch_size, 1), rl.max_tokens)
    logits = (rl.micro_batch_size, columns, model_config.vocab_size)
    state_bytes = (
        _size(model)
        + _size(state.opt_state)
        + 4 * sum(leaf.size for leaf in jax.tree.leaves(model))
    )
    parameters = sum(leaf.size for leaf in jax.tree.leaves(model))
    experts = model_config.num_experts
    active = parameters
    if experts:
        unused = (experts - k) * 3 * model_config.hidden_size * model_config.moe_intermediate_size
        active -= layers * unused
    lines = [
        ("parameters", f"{parameters:,} ({active:,} active per token)"),
        ("layers", f"{model_config.num_layers} ({layers} with {experts} experts, {k} per token)"),
        ("starts from", start_line(experiment)),
        ("rollout batch", f"{rl.prompts} prompts × {rl.group_size} = {rows} rows × {width} tokens"),
        ("gradient step", f"{mini_batch} rows, {rl.micro_batch_size} at a time"),
        ("gradient steps", f"{rl.steps} rollouts × {rl.objective.mini_batches}"),
        ("objective", objective_line(rl.objective)),
        (f"the paper at N = {rl.objective.mini_batches}", recommendation(rl.objective, layers)),
        ("weights", byte_size(_size(model))),
        ("optimiser state", byte_size(_size(state.opt_state))),
        ("gradient sum (float32)", byte_size(4 * parameters)),
        ("state while updating", f"{byte_size(state_bytes)}  (these three, no activations)"),
        *([("reference policy", byte_size(_size(model)))] if rl.objective.kl_coefficient else []),
        (f"sampling copy ({rl.rollout_format})", byte_size(_size(sampler))),
        ("key/value cache", f"{byte_size(_size(cache))}  {cache.keys.shape}, {cache.values.shape}"),
        ("routing of a rollout", f"{byte_size(routing_bytes)}  {routing}"),
        ("logits of a head chunk", f"{byte_size(4 * math.prod(logits))}  {logits}"),
    ]
    lines.append(("computed by", implementations(experiment)))
    if experiment.wandb_project:
        lines.append(("metrics copied to", f"wandb project {experiment.wandb_project!r}"))
    name_width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{name_width}}  {value}" for name, value in lines)


def start_line(experiment: Experiment) -> str:
    """Describes what a run's first policy is made from."""
    origin, cold_start = experiment.init_from, experiment.cold_start
    start = origin or f"random weights (seed {experiment.seed})"
    return f"{start}, then {cold_start.steps} supervised steps" if cold_start else start


def objective_line(objective: Objective) -> str:
    """Returns the names of loss, corrections, advantages and reduction."""
    parts = [objective.loss, *objective.corrections, objective.advantages]
    return ", ".join([*(name_of(part) for part in parts), objective.aggregation])


def recommendation(objective: Objective, moe_layers: int) -> str:
    """Returns what arXiv:2512.01374 (§4.3, §4.4) recommends for this number of updates."""
    n, replay = objective.mini_batches, "none"
    advice = "token weights truncated at 5, no length normalisation"
    if n > 1:
        replay = "R2" if n < 4 else "R3"
        advice += f", clipping, {replay}"
    else:
        advice += ", no replay"
    if not moe_layers:
        return f"{advice}; this model has no experts to replay"
    same = objective.replay == replay
    return f"{advice}; this run: {'the same replay' if same else f'replay {objective.replay!r}'}"


def implementations(experiment: Experiment) -> str:
    """Describes the implementations that run on this machine, with "auto" resolved."""
    config, format = experiment.model, experiment.reinforcement.rollout_format
    sampler = f"sampler {format}"
    if format.endswith("_w8a8"):
        sampler += f" with {sampler_products(config, format)} products"
    return (
        f"attention {attention_implementation(config)}, experts {experts_implementation(config)}, "
        f"{sampler}, {config.dtype} on {jax.device_count()} × {jax.devices()[0].device_kind}"
    )


def sampler_products(config: ModelConfig, format: str) -> str:
    """Returns how the sampler multiplies; experts may differ, see `dispatch.grouped_matmul`."""
    products = resolve_products(format)
    if products == "native" and config.num_experts and experts_implementation(config) == "tokamax":
        return "native (experts: emulated)"
    return products


def _size(tree: object) -> int:
    return sum(leaf.size * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))
