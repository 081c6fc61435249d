"""A run that starts from a Hugging Face checkpoint, from gin file to export."""

import json
import pathlib

import jax
import numpy as np
from safetensors.numpy import load_file

from jaxrl_stable import gin_files, hf, train
from jaxrl_stable.data import ArithmeticSource, train_sentencepiece
from jaxrl_stable.hf.__main__ import main, parse
from jaxrl_stable.model import init_model, tiny

EXPERIMENT = pathlib.Path(__file__).parents[1] / "experiment.gin"


def test_from_a_checkpoint_through_a_run_to_a_checkpoint(tmp_path):
    origin = tmp_path / "origin"
    config = tiny(
        vocab_size=96, hidden_size=32, num_layers=1, num_experts=4, moe_intermediate_size=16
    )
    hf.save(init_model(config, 5), origin)
    source = ArithmeticSource(size=64, steps=1, largest=9)
    texts = [text for i in range(64) for text in source[i].values()]
    train_sentencepiece([*texts, "\n"], origin / "tokenizer.model", 96)
    gin = tmp_path / "experiment.gin"
    gin.write_text(
        EXPERIMENT.read_text()
        + "from jaxrl_stable import hf\n"
        + "configs.Experiment.model = @hf.read_config()\n"
        + f"hf.read_config.directory = '{origin}'\n"
        + f"configs.Experiment.init_from = '{origin}'\n"
        + "configs.Reinforcement.steps = 1\n"
        + "configs.Evaluation.every = 9\n"
        # A random policy earns no reward, so the loss alone would not change it.
        + "rl/configs.Optimizer.weight_decay = 0.1\n"
    )
    gin.write_text("\n".join(x for x in gin.read_text().split("\n") if "model.tiny" not in x))
    experiment = gin_files.load_experiment([str(gin)])
    assert experiment.model == config
    state = train.train(experiment, tmp_path / "run")

    main(parse(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--dtype=float32"]))
    before = load_file(origin / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    expected = jax.device_get(state.model.embedding.get_value())
    np.testing.assert_array_equal(after["model.embed_tokens.weight"], expected)
    moved = {name: np.abs(after[name] - before[name]).max() for name in before}
    assert max(moved.values()) > 0  # trained,
    assert max(moved.values()) < 0.1  # from the checkpoint: a fresh model is far away
    content = json.loads((tmp_path / "out" / "config.json").read_text())
    assert content["architectures"] == ["Qwen3MoeForCausalLM"]
