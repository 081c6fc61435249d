"""MiniRL, GSPO and CISPO as policy losses of Tunix, trained by Tunix's own GRPO learner.

    python experiments/integrations/tunix_minirl.py        (needs `pip install google-tunix`)

Tunix looks up its policy loss by name, so a registered function is enough (`policy_loss`). Only one
thing is missing: the learner drops the log-probabilities that the sampler recorded, and without
them MiniRL's weight has nothing to correct. `Cluster` and `Learner` carry them along.

The model is Tunix's Qwen3 with experts, at toy size; the reward is the share of sevens. Written for
google-tunix 0.1.7; its repository has since renamed `RLCluster` to `RLEngine`.
"""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tunix.models.qwen3 import model as qwen3
from tunix.rl import common, function_registry, rl_cluster
from tunix.rl.grpo import grpo_learner
from tunix.rl.rollout import base_rollout

from jaxrl_stable.objectives import aggregate, cispo, divide, gspo, minirl

LENGTH = 4  # longest response


def policy_loss(objective, mode):
    """Wraps an objective of this library in the signature that Tunix calls."""

    def loss_fn(model, batch, algo_config, pad_id, eos_id):
        ids, mask = (batch.prompt_ids, batch.completion_ids), batch.completion_mask
        options = {"stop_gradient": False, "temperature": algo_config.temperature}
        logp = common.compute_per_token_logps(*nnx.split(model), *ids, pad_id, eos_id, **options)
        old, rollout = batch.old_per_token_logps, batch.rollout_per_token_logps
        out = objective(logp, old, rollout, batch.advantages, mask)
        total, count = aggregate(out.loss, mask, mode)
        clipped = divide((out.clipped_high | out.clipped_low).sum(), mask.sum())
        return divide(total, count), {"kl": 0.0, "pg_clipfrac": clipped}  # the learner logs both

    return loss_fn


OBJECTIVES = {
    "minirl": policy_loss(minirl, "seq-mean-token-sum"),
    "gspo": policy_loss(gspo, "seq-mean-token-mean"),
    "cispo": policy_loss(cispo, "token-mean"),
}
for name, loss_fn in OBJECTIVES.items():
    function_registry.register_policy_loss_fn(name)(loss_fn)


@flax.struct.dataclass(frozen=True)
class TrainExample(grpo_learner.TrainExample):
    rollout_per_token_logps: jax.Array | None = None


class Cluster(rl_cluster.RLCluster):
    """A cluster that remembers what the sampler returned last."""

    def generate(self, *args, **kwargs):
        self.sampled = super().generate(*args, **kwargs)
        return self.sampled


class Learner(grpo_learner.GRPOLearner):
    """Adds the sampler's log-probabilities to the trainer's."""

    def _generate_and_compute_advantage(self, training_input, mode=rl_cluster.Mode.TRAIN):
        example = super()._generate_and_compute_advantage(training_input, mode)
        logps = np.zeros(example.completion_ids.shape, np.float32)
        for row, recorded in zip(logps, self.rl_cluster.sampled.logprobs):
            row[: len(recorded)] = recorded
        fields = {f.name: getattr(example, f.name) for f in dataclasses.fields(example)}
        return TrainExample(**fields, rollout_per_token_logps=jnp.asarray(logps))


class Digits:
    """A tokenizer with pad, EOS, BOS and the ten digits."""

    pad_id, eos_id, bos_id = (staticmethod(lambda i=i: i) for i in range(3))

    def encode(self, text, **_):
        return [3 + int(digit) for digit in text]

    def decode(self, ids, **_):
        return "".join(str(i - 3) for i in ids if i >= 3)


def sevens(prompts, completions, **_):
    return [text.count("7") / LENGTH for text in completions]


SIZES = dict(vocab_size=13, num_layers=1, embed_dim=16, num_heads=2, num_kv_heads=1, head_dim=8)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, hidden_dim=16)


def make_learner(policy_loss_fn, updates, seed=0):
    config = qwen3.ModelConfig(**SIZES, **EXPERTS, rope_theta=10_000, norm_eps=1e-6)
    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    roles = (rl_cluster.Role.ACTOR, rl_cluster.Role.REFERENCE, rl_cluster.Role.ROLLOUT)
    cluster = Cluster(
        actor=nnx.jit(lambda: qwen3.Qwen3(config, rngs=nnx.Rngs(seed)))(),
        tokenizer=Digits(),
        cluster_config=rl_cluster.ClusterConfig(
            role_to_mesh=dict.fromkeys(roles, mesh),
            training_config=rl_cluster.RLTrainingConfig(
                actor_optimizer=optax.adam(1e-2), max_steps=updates, eval_every_n_steps=updates
            ),
            rollout_config=base_rollout.RolloutConfig(
                max_prompt_length=4,
                max_tokens_to_generate=LENGTH,
                kv_cache_size=16,
                temperature=1.0,  # Tunix computes log π_old without it
                eos_tokens=[Digits.eos_id(), Digits.pad_id()],  # else a sampled pad leaves a hole
                return_logprobs=True,
            ),
        ),
    )
    algorithm = grpo_learner.GRPOConfig(
        policy_loss_fn=policy_loss_fn,
        advantage_estimator="drgrpo",  # the paper's: not divided by the standard deviation
        beta=0.0,
        num_generations=8,
        num_iterations=2,  # updates per rollout
    )
    return Learner(cluster, algorithm, sevens)


def train(policy_loss_fn="minirl", updates=16):
    """Returns the loss of each update and the mean reward of its rollout, as logged."""
    learner = make_learner(policy_loss_fn, updates)
    learner.train([{"prompts": np.array(["12", "345"])}] * updates)
    cluster = learner.rl_cluster
    losses = cluster.actor_trainer.metrics_logger.get_metric_history("actor", "loss", "train")
    rewards = cluster._rl_metrics_logger.get_metric_history("rewards", "score/mean", "train")
    return losses, np.repeat(rewards, 2)


def main():
    for name in OBJECTIVES:
        for step, (loss, mean) in enumerate(zip(*train(name))):
            print(f"{name:6s} update {step:2d}   loss {loss:7.3f}   reward {mean:.3f}")


if __name__ == "__main__":
    main()
