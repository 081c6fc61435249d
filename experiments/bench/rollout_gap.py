"""How far each `Reinforcement.rollout_format` takes the sampler from the trainer.

    python experiments/bench/rollout_gap.py [--steps=300] [--rows=512]

Three small Mixture-of-Experts policies of `model.tiny` (width 64, 8 experts, 2 per token, float32):
2 layers after a cold start of 300 steps on the quickstart's arithmetic, and 8 and 24 layers
**untrained**, with the random weights of their initialisation. Each samples 512 responses of up to
24 tokens to the same prompts with each format, with one sampler seed. The trainer scores them in
float32 without replay. A format names the grid of the sampler's weights and, with `_w8a8`, of the
activations too.

Prints one Markdown table:

- k3, k1: estimates of KL(μ_old ‖ π_old) on the sampled tokens, nats per token
  (`mismatch/kl_k3_token_mean`, `mismatch/kl_k1_token_mean`); k1 has the larger variance.
- max abs Δ: the largest |log π_old − log μ_old| of a token, nats.
- agreement: share of the sampler's experts that the trainer's routers choose too.
- differing tokens: share of tokens with another choice in at least one layer.

On a CPU it gave:

    policy             format     k3        k1        max abs Δ  agreement  differing tokens  tokens
    2 layers, trained  none       1.02e-13  -5.8e-09  7.63e-06   1          0                 9628
    2 layers, trained  int8       4.5e-05   -3.16e-05 0.175      0.99       0.0387            9655
    2 layers, trained  int4       0.00818   0.00812   4.08       0.934      0.228             9672
    2 layers, trained  fp8        0.000862  0.000446  2.96       0.983      0.0621            9621
    2 layers, trained  int8_w8a8  0.000118  -8.85e-05 0.514      0.987      0.0486            9652
    2 layers, trained  fp8_w8a8   0.00152   0.00144   2.91       0.976      0.0846            9618
    8 layers, random   none       2.12e-13  8.65e-10  2.86e-06   1          0                 11373
    8 layers, random   int8       0.00918   0.00967   2.15       0.972      0.239             11284
    8 layers, random   int4       0.134     0.136     3.02       0.793      0.951             11383
    8 layers, random   fp8        0.0303    0.028     1.79       0.923      0.591             11387
    8 layers, random   int8_w8a8  0.0123    0.0137    1.73       0.964      0.311             11282
    8 layers, random   fp8_w8a8   0.0408    0.0358    2.46       0.907      0.678             11382
    24 layers, random  none       5.37e-09  2.49e-07  0.00582    1          3.95e-05          11528
    24 layers, random  int8       0.0166    0.0139    1.53       0.949      0.674             11529
    24 layers, random  int4       0.2       0.202     2.72       0.728      1                 11468
    24 layers, random  fp8        0.0507    0.0531    1.87       0.874      0.979             11567
    24 layers, random  int8_w8a8  0.0228    0.023     1.45       0.935      0.772             11510
    24 layers, random  fp8_w8a8   0.0628    0.0661    2.17       0.859      0.982             11555

`none` is not quantised: the remaining gap is the order of summation with a cache and without. At 24
layers a choice between two nearly equal experts flips now and then, and one token then differs
visibly.

Read it with care. The order int8 < fp8 < int4 holds throughout, and quantised activations always
add to the gap. Depth and training can't be separated here: untrained routers are undecided and so
flip more easily. A maximum belongs to one token, not to a format. On a CPU the products of `_w8a8`
are "emulated": the grid's values are multiplied in float32, which is exact for int8 at these
widths. A device with int8 or fp8 units computes the same up to the order of float32 sums.
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
    """Returns a policy after `steps` supervised steps, as `sft` makes them."""
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
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=300, help="steps of the cold start")
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
