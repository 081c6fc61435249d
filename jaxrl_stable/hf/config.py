"""Converts `config.json` to `ModelConfig` and back.

An unimplemented option raises an error that names it. Options are never silently approximated.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import math
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

from jaxrl_stable.checks import local_path
from jaxrl_stable.files import read_json
from jaxrl_stable.hf.architectures import ARCHITECTURES, Architecture, Json, no_experts
from jaxrl_stable.model.config import EXECUTION_FIELDS, ModelConfig, Yarn

# Maps execution fields to the model of the run that is being resumed, or to None.
ModelOfRun = Callable[..., ModelConfig | None]
_model_of_run: contextvars.ContextVar[ModelOfRun] = contextvars.ContextVar(
    "model_of_run", default=lambda **execution: None
)


@contextlib.contextmanager
def resuming(model_of_run: ModelOfRun) -> Iterator[None]:
    """Lets `read_config` return the resumed run's own model if the directory is gone."""
    token = _model_of_run.set(model_of_run)
    try:
        yield
    finally:
        _model_of_run.reset(token)


def read_config(directory: str | pathlib.Path, **execution: Any) -> ModelConfig:
    """Reads the architecture of a checkpoint directory.

    A resumed run does not need the directory: its checkpoints hold the architecture (`resuming`).

    Args:
      directory: directory with a `config.json`.
      **execution: fields of `ModelConfig` that a checkpoint does not specify, such as `dtype`,
        `param_dtype`, `remat` or `head_chunk`; also `max_positions`, which overrides the
        checkpoint's value.

    Raises:
      FileNotFoundError: if `config.json` does not exist.
      ValueError: if the architecture or one of its options is not supported.
    """
    wrong = sorted(execution.keys() - set(EXECUTION_FIELDS))
    if wrong:
        raise ValueError(
            f"read_config got {wrong[0]}, which the checkpoint determines; pass only "
            f"{', '.join(EXECUTION_FIELDS)}"
        )
    directory = local_path("read_config.directory", directory)
    file = pathlib.Path(directory) / "config.json"
    if not file.exists() and (model := _model_of_run.get()(**execution)) is not None:
        return model
    content = read_config_json(directory)
    try:
        return ModelConfig(**from_json(content) | execution)
    except KeyError as error:
        raise ValueError(f"{file}: {error.args[0]} is missing; restore it") from None
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}: {error}") from None


def read_config_json(directory: str | pathlib.Path) -> Json:
    """Returns the parsed `config.json` of a directory.

    Raises:
      FileNotFoundError: if the file does not exist.
      ValueError: if it is not a JSON object.
    """
    file = pathlib.Path(directory) / "config.json"
    if not file.exists():
        raise FileNotFoundError(f"{file} does not exist; use a Hugging Face model directory")
    return read_json(file)


def from_json(content: Json) -> Json:
    """Converts a parsed `config.json` to fields of `ModelConfig`.

    Raises:
      KeyError: if a field is missing.
      ValueError: if a field is invalid or requires an unimplemented option.
    """
    known = {architecture.model_type: architecture for architecture in ARCHITECTURES}
    kind = content.get("model_type")
    if kind not in known:
        raise ValueError(f"model_type {kind!r} is not supported; supported are {', '.join(known)}")
    _refuse(content)
    fields = _common(content) | known[kind].read(content)
    for field in dataclasses.fields(ModelConfig):
        value = fields.get(field.name, 0)
        if field.type == "int" and (not isinstance(value, int) or isinstance(value, bool)):
            raise ValueError(f"{field.name} is {value!r}; it must be a whole number")
    return fields


def to_json(config: ModelConfig) -> tuple[Architecture, Json]:
    """Returns the transformers architecture that computes this model, and its `config.json`.

    The result is the first architecture whose JSON reads back as the same `ModelConfig`. Other
    programs therefore compute the same function as the exported model.

    Raises:
      ValueError: if no supported architecture has this combination of options.
    """
    if not config.num_experts:  # the expert fields are meaningless then
        config = dataclasses.replace(config, **no_experts())
    wanted = config.architecture()
    for architecture in ARCHITECTURES:
        content = _common_json(config) | architecture.write(config)
        content |= {
            "architectures": [architecture.class_name],
            "model_type": architecture.model_type,
        }
        try:
            same = ModelConfig(**from_json(content)).architecture() == wanted
        except (ValueError, KeyError):
            same = False
        if same:
            return architecture, content
    raise ValueError(
        "no transformers architecture computes this ModelConfig; the supported ones are "
        f"{', '.join(a.model_type for a in ARCHITECTURES)}, each with its own router and attention"
    )


def _refuse(content: Json) -> None:
    """Raises ValueError if an unimplemented option is set to a value that has an effect."""
    harmless = {
        "attention_bias": (False, None),
        "mlp_bias": (False, None),
        "hidden_act": ("silu", None),
        "quantization_config": (None,),
        "use_sliding_window": (False, None),
        "partial_rotary_factor": (1, None),
        "moe_layer_freq": (1, None),
        "scoring_func": ("sigmoid", None),
        "topk_method": ("noaux_tc", None),
        "router_jitter_noise": (0, None),
    }
    for option, values in harmless.items():
        if content.get(option) not in values:
            advice = "use a checkpoint without it"
            if option == "quantization_config":
                advice = "convert the weights to bfloat16, then remove it"
            raise ValueError(f"{option} = {content[option]!r} is not implemented; {advice}")
    window = content.get("sliding_window")
    context = content.get("max_position_embeddings", math.inf)
    if content.get("model_type") == "mixtral" and window is not None and window < context:
        raise ValueError(
            f"sliding_window = {window} is not implemented; set it to null if your sequences stay "
            "shorter"
        )


def _common(content: Json) -> Json:
    """Returns the fields that have the same names in all architectures."""
    heads = content["num_attention_heads"]
    theta, scaling = _rotary(content)
    return dict(
        vocab_size=content["vocab_size"],
        hidden_size=content["hidden_size"],
        num_layers=content["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=content.get("num_key_value_heads") or heads,
        head_dim=content.get("head_dim") or content["hidden_size"] // heads,
        intermediate_size=content["intermediate_size"],
        rms_norm_eps=content["rms_norm_eps"],
        tie_embeddings=content.get("tie_word_embeddings", False),
        rope_theta=theta,
        rope_scaling=scaling,
        max_positions=_context(content, scaling),
    )


def _context(content: Json, scaling: Yarn | None) -> Any:
    """Returns the number of positions that a model was trained or stretched for; 0 if unknown.

    YaRN stretches `original_max_position_embeddings` by its factor. DeepSeek stores the
    product in `max_position_embeddings`; Qwen's instructions leave the original value there.
    """
    context = content.get("max_position_embeddings") or 0
    if scaling is None or not isinstance(context, int):
        return context
    return max(context, int(scaling.factor * scaling.original_context))


def _common_json(config: ModelConfig) -> Json:
    content = dict(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        intermediate_size=config.intermediate_size,
        rms_norm_eps=config.rms_norm_eps,
        tie_word_embeddings=config.tie_embeddings,
        hidden_act="silu",
        attention_bias=False,
        # If one is missing, transformers uses the id from the architecture's first model.
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        # Both spellings: transformers 5 reads the first; version 4 and other engines, the second.
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        rope_theta=config.rope_theta,
    )
    if config.max_positions:
        content["max_position_embeddings"] = config.max_positions
    yarn = config.rope_scaling
    if yarn is not None:
        # Transformers 4 derives the factor from this field; 5.23 reads `factor` below.
        content["max_position_embeddings"] = round(yarn.factor * yarn.original_context)
        content["rope_scaling"] = dict(
            rope_type="yarn",
            factor=yarn.factor,
            original_max_position_embeddings=yarn.original_context,
            beta_fast=yarn.beta_fast,
            beta_slow=yarn.beta_slow,
            attention_factor=yarn.rotation_scale,
            truncate=yarn.truncate,
        )
        if yarn.softmax_mscale:
            content["rope_scaling"]["mscale_all_dim"] = yarn.softmax_mscale
        content["rope_parameters"] = content["rope_scaling"] | {"rope_theta": config.rope_theta}
    return content


def _rotary(content: Json) -> tuple[float, Yarn | None]:
    """Returns the base and scaling of rotary embeddings.

    They come from `rope_parameters` (transformers 5) or from the two fields of version 4. If a
    version-5 config also has `rope_scaling`, both versions use that, and so does this function.
    Both versions then replace the base in `rope_parameters` with a default; here, such a config
    is an error.
    """
    parameters = content.get("rope_parameters") or {}
    scaling = dict(content.get("rope_scaling") or parameters)
    theta = scaling.get("rope_theta", content.get("rope_theta"))
    if theta is None:
        if parameters.get("rope_theta") is not None:
            raise ValueError(
                "rope_scaling has no rope_theta and replaces rope_parameters, whose rope_theta = "
                f"{parameters['rope_theta']!r} would be ignored; add rope_theta to rope_scaling"
            )
        raise KeyError("rope_theta")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if scaling.get("partial_rotary_factor", 1) != 1:
        raise ValueError("partial_rotary_factor is not implemented; no supported model uses it")
    if kind == "default":
        return float(theta), None
    if kind != "yarn":
        raise ValueError(f"rope_type {kind!r} is not implemented; 'default' and 'yarn' are")
    factor = scaling["factor"]

    def magnitude(mscale: int | float) -> float:  # arXiv:2309.00071, eq. 22
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    mscale, all_dims = scaling.get("mscale"), scaling.get("mscale_all_dim")
    rotation = scaling.get("attention_factor")
    if rotation is None:
        rotation = magnitude(1)
        if mscale and all_dims:
            rotation = magnitude(mscale) / magnitude(all_dims)
    latent = content["model_type"] == "deepseek_v3"  # the only type that also scales its softmax
    return float(theta), Yarn(
        factor=float(factor),
        original_context=scaling["original_max_position_embeddings"],
        beta_fast=float(scaling.get("beta_fast") or 32),
        beta_slow=float(scaling.get("beta_slow") or 1),
        rotation_scale=float(rotation),
        softmax_mscale=float(all_dims or 0) if latent else 0.0,
        truncate=scaling.get("truncate", True),
    )
