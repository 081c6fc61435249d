"""How far each `Reinforcement.rollout_format` takes the sampler from the trainer.

    python experiments/bench/rollout_gap.py [--steps=300] [--rows=512]

Three small Mixture-of-Experts policies: one of 2 layers after a cold start on the quickstart's
arithmetic, and two of 8 and 24 layers with random weights, as they are initialised. Each samples
responses to the same prompts with each format, and the trainer scores them in float32 without
replay. Prints one Markdown table; README.md beside this file says what its columns are.
"""

import argparse
import pathlib
import tempfile
import time
from functools import partial

import jax
import jax.numpy as jnp

from jaxrl_stable.configs import FORMATS, Optimizer
from jaxrl_stable.data import (
    ArithmeticSource,
    encode_prompts,
    load_tokenizer,
    packed_iterator,
    train_sentencepiece,
)
from jaxrl_stable.diagnostics import as_floats, finalize
from jaxrl_stable.model import init_model, tiny
from jaxrl_stable.sampler.quantize import resolve_products, sampling_copy
from jaxrl_stable.sampler.rollout import Sampling, rollout
from jaxrl_stable.trainer.batch import make_batch
from jaxrl_stable.trainer.optimizer import init_state, make_optimizer
from jaxrl_stable.trainer.score import score
from jaxrl_stable.trainer.supervised import supervised_update

VOCABULARY, WIDTH, MAX_TOKENS, TEMPLATE = 256, 34, 24, "{prompt}\n"
COLUMNS = {
    "k3": "mismatch/kl_k3_token_mean",
    "k1": "mismatch/kl_k1_token_mean",
    "max abs Δ": "mismatch/abs_token_max",
    "agreement": "routing/agreement",
    "differing tokens": "routing/differing_tokens_share",
}


def cold_start(config, source, tokenizer, steps):
    """A policy after some supervised steps, as `sft` makes them."""
    settings = Optimizer(learning_rate=6e-3, warmup_steps=30, decay_steps=max(steps - 30, 1))
    optimizer = make_optimizer(settings)
    rows = dict(batch_size=32, length=128, seed=0, template=TEMPLATE)
    batches = packed_iterator(source, tokenizer, **rows)
    state = init_state(init_model(config, 0), optimizer)
    step = jax.jit(partial(supervised_update, optimizer=optimizer), donate_argnums=0)
    for _ in range(steps):
        state, metrics = step(state, next(batches))
    loss = as_floats(finalize(metrics))["sft/loss"]
    print(f"cold start: {steps} steps, loss {loss:.3f} nats/token", flush=True)
    return state.model


def gaps(name, model, prompts, mask, sampling):
    """Prints one row of the table for each format."""
    sample = jax.jit(partial(rollout, sampling=sampling))
    settings = dict(replay="none", micro_batch_size=64, temperature=1.0)
    trainer = jax.jit(partial(score, **settings))
    for format in FORMATS:
        sampler = jax.jit(partial(sampling_copy, format=format))(model)
        trajectory = sample(sampler, prompts, mask, jax.random.key(1))
        scored = trainer(model, make_batch(trajectory, jnp.zeros(len(prompts))))
        values = as_floats(finalize(scored.metrics))
        figures = " | ".join(f"{values[metric]:.3g}" for metric in COLUMNS.values())
        tokens = int(trajectory.response_mask.sum())
        print(f"| {name} | `{format}` | {figures} | {tokens} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300, help="of the cold start")
    parser.add_argument("--rows", type=int, default=512, help="responses per format")
    options = parser.parse_args()
    begin = time.perf_counter()
    source = ArithmeticSource(size=4096, largest=20, slips=0.3)
    problems = [source[i] for i in range(options.rows)]
    with tempfile.TemporaryDirectory() as directory:
        path = pathlib.Path(directory, "tokenizer.model")
        texts = [text for p in problems for text in (p["prompt"], p["answer"])]
        train_sentencepiece([*texts, TEMPLATE], path, VOCABULARY)
        tokenizer = load_tokenizer(path)
    sampling = Sampling(MAX_TOKENS, 1.0, 0, 1.0, tuple(tokenizer.eos_ids), tokenizer.pad_id)
    prompts, mask = encode_prompts(problems, tokenizer, WIDTH, TEMPLATE)
    device = jax.devices()[0]
    print(f"products of int8_w8a8 on this {device.device_kind}: {resolve_products('int8_w8a8')}")
    trained = cold_start(tiny(vocab_size=VOCABULARY), source, tokenizer, options.steps)
    print(f"| policy | format | {' | '.join(COLUMNS)} | tokens |")
    print("|---|---|" + "---|" * (len(COLUMNS) + 1))
    gaps("2 layers, trained", trained, prompts, mask, sampling)
    for layers in (8, 24):
        model = init_model(tiny(vocab_size=VOCABULARY, num_layers=layers), 0)
        gaps(f"{layers} layers, random", model, prompts, mask, sampling)
    print(f"{time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()
