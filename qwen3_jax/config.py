"""The architecture of a Qwen3 model, in Hugging Face's field names (report, section 2).

`ModelConfig` defines the network. How it is computed (dtype, rematerialisation, expert dispatch) is set by the
attributes of `qwen3_jax.model.Qwen3`. A `config.json` is read in both existing spellings, that of the released files
and that of transformers 5. It is written in the released spelling, which transformers 4.51 and later read.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from etils import epath

# Keys of a config.json that do not affect the network: provenance, generation, output switches of transformers.
_NEUTRAL_KEYS = frozenset(
    """_attn_implementation _name_or_path add_cross_attention architectures attn_implementation auto_map
    chunk_size_feed_forward cross_attention_hidden_size dtype finetuning_task id2label is_decoder is_encoder_decoder
    label2id max_window_layers model_type name_or_path output_attentions output_hidden_states output_router_logits
    prefix problem_type return_dict task_specific_params tokenizer_class torch_dtype transformers_version unsloth_fixed
    unsloth_version use_cache use_return_dict""".split()
)
# Keys that must have one of these values: any other value is a network that this project does not implement.
_FIXED_VALUES: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "attention_dropout": (0, None),
    "use_sliding_window": (False, None),
    "pruned_heads": ({}, None),
    "qkv_bias": (False, None),
    "mlp_bias": (False, None),
    "use_qk_norm": (True, None),
    "shared_expert_intermediate_size": (0, None),
}
# By the annotation of a field: the types of its values, and what to use instead of others.
_KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "int": ((int,), "a whole number"),
    "float": ((int, float), "a number"),
    "bool": ((bool,), "true or false"),
}
_MOE_KEYS = frozenset(
    """num_experts num_experts_per_tok moe_intermediate_size norm_topk_prob decoder_sparse_step mlp_only_layers
    router_aux_loss_coef""".split()
)
_YARN_KEYS = frozenset("rope_type type factor original_max_position_embeddings rope_theta".split())


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """YaRN context extension (Peng et al. 2023) as transformers defines it; Qwen3 uses factor 4 over 32,768."""

    factor: float
    original_max_position_embeddings: int
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0

    def __post_init__(self) -> None:
        _check_kinds(self, "rope_scaling.")
        if not self.factor >= 1:
            raise ValueError(f"rope_scaling.factor: {self.factor!r}; use a number >= 1")

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any], where: str) -> RopeScaling | None:
        """From a `rope_scaling` or `rope_parameters` table; None for plain RoPE."""
        kind = raw.get("rope_type", raw.get("type", "default"))
        if kind == "default":
            _refuse_unknown(raw, {"rope_type", "type", "rope_theta"}, where)
            return None
        if kind != "yarn":
            raise ValueError(f"{where}.rope_type: {kind!r} is not supported; use 'default' or 'yarn'")
        optional = {"attention_factor", "beta_fast", "beta_slow"}
        _refuse_unknown(raw, _YARN_KEYS | optional, where)
        # transformers derives a missing factor or length from other keys, differently in each version: never guess.
        missing = {key for key in ("factor", "original_max_position_embeddings") if raw.get(key) is None}
        if missing:
            raise ValueError(f"{where}: YaRN needs {', '.join(sorted(missing))}; no default is used")
        given = {key: raw[key] for key in optional if raw.get(key) is not None}
        return cls(raw["factor"], raw["original_max_position_embeddings"], **given)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A Qwen3 network. Fields have Hugging Face's names and meanings; `num_experts == 0` is a dense model.

    Raises:
      ValueError: naming the field, its value and what to use instead.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    max_position_embeddings: int
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = True
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()
    router_aux_loss_coef: float = 0.001
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        for name, alone, instead in (
            ("mlp_only_layers", (), "a list of whole numbers"),
            ("eos_token_id", (int, type(None)), "a whole number or a list of them"),
        ):
            value = getattr(self, name)
            if isinstance(value, list | tuple) and all(type(item) is int for item in value):
                object.__setattr__(self, name, value[0] if len(value) == 1 and alone else tuple(value))
            elif type(value) not in alone:
                raise ValueError(f"{name}: {value!r}; use {instead}")
        _check_kinds(self)
        positive = ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"]
        positive += ["head_dim", "intermediate_size", "max_position_embeddings", "rope_theta", "decoder_sparse_step"]
        if self.num_experts:
            positive += ["num_experts", "num_experts_per_tok", "moe_intermediate_size"]
        for name in positive:
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: {getattr(self, name)!r}; use a number > 0")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads: {self.num_key_value_heads} does not divide num_attention_heads "
                f"({self.num_attention_heads}); use a divisor"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim: {self.head_dim} is odd; rotary embedding needs an even number")
        if self.num_experts and self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f"num_experts_per_tok: {self.num_experts_per_tok}; use at most num_experts ({self.num_experts})"
            )

    def is_moe_layer(self, layer: int) -> bool:
        """Whether layer `layer` (from 0) routes to experts, by transformers' rule."""
        sparse = (layer + 1) % self.decoder_sparse_step == 0
        return self.num_experts > 0 and layer not in self.mlp_only_layers and sparse

    @property
    def layer_runs(self) -> tuple[tuple[int, int], ...]:
        """The runs `(start, stop)` of consecutive layers of the same kind, in order; each run is one scan."""
        kinds = [self.is_moe_layer(layer) for layer in range(self.num_hidden_layers)]
        starts = [i for i in range(len(kinds)) if i == 0 or kinds[i] != kinds[i - 1]]
        return tuple(zip(starts, [*starts[1:], len(kinds)], strict=True))

    @property
    def num_params(self) -> int:
        """Number of weights, tied ones counted once."""
        return self._count_params(self.num_experts)

    @property
    def num_active_params(self) -> int:
        """Number of weights that one token uses: of the experts, `num_experts_per_tok`."""
        return self._count_params(self.num_experts_per_tok)

    def _count_params(self, experts: int) -> int:
        d, h = self.hidden_size, self.head_dim
        attention = 2 * d * h * (self.num_attention_heads + self.num_key_value_heads) + 2 * h + 2 * d
        dense = 3 * d * self.intermediate_size
        sparse = self.num_experts * d + experts * 3 * d * self.moe_intermediate_size
        num_sparse = sum(self.is_moe_layer(layer) for layer in range(self.num_hidden_layers))
        layers = self.num_hidden_layers * attention + num_sparse * sparse
        layers += (self.num_hidden_layers - num_sparse) * dense
        return layers + self.vocab_size * d * (1 if self.tie_word_embeddings else 2) + d

    @classmethod
    def preset(cls, name: str) -> ModelConfig:
        """The configuration `configs/model/<name>.yaml`: a released size, or `qwen3-tiny`."""
        folder = presets_dir()
        path = folder / f"{name}.yaml"
        if not path.is_file():
            known = ", ".join(sorted(p.stem for p in folder.glob("*.yaml")))
            raise ValueError(f"model preset: {name!r} is unknown; use one of {known}")
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
        if raw.get("rope_scaling"):
            raw["rope_scaling"] = RopeScaling(**raw["rope_scaling"])
        return cls(**raw)

    @classmethod
    def from_hf(cls, source: str | Path | Mapping[str, Any]) -> ModelConfig:
        """From a Hugging Face `config.json`: its path, its directory, or its content.

        No default is filled in, since the defaults of transformers' classes are not Qwen3's values.

        Raises:
          ValueError: a key that defines the network is missing, or a key cannot be represented.
        """
        raw = dict(source) if isinstance(source, Mapping) else _read_config_json(epath.Path(source))
        model_type = raw.get("model_type")
        if model_type not in ("qwen3", "qwen3_moe"):
            raise ValueError(f"model_type: {model_type!r} is not supported; use 'qwen3' or 'qwen3_moe'")
        for key, allowed in _FIXED_VALUES.items():
            if key in raw and raw[key] not in allowed:
                raise ValueError(f"{key}: {raw[key]!r} is not supported; use {allowed[0]!r}")
        layer_types = raw.get("layer_types") or []
        if not isinstance(layer_types, list) or any(kind != "full_attention" for kind in layer_types):
            raise ValueError(f"layer_types: {raw['layer_types']!r} is not supported; use all 'full_attention'")
        if raw.get("quantization_config"):
            kind = raw["quantization_config"]
            kind = kind.get("quant_method", "unknown") if isinstance(kind, Mapping) else kind
            raise ValueError(f"quantization_config: the weights are quantised ({kind}); use bfloat16 weights")

        moe = model_type == "qwen3_moe"
        names = {field.name for field in dataclasses.fields(cls)} - {"rope_theta", "rope_scaling"}
        names -= frozenset() if moe else _MOE_KEYS
        fields = {name: raw[name] for name in names if raw.get(name) is not None}
        fields["rope_theta"], fields["rope_scaling"] = _read_rope(raw)
        if moe:
            fields["num_experts"] = _agreed({name: raw.get(name) for name in ("num_experts", "num_local_experts")})
        required = """vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim
            intermediate_size max_position_embeddings rope_theta rms_norm_eps tie_word_embeddings""".split()
        if moe:
            required += ["num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"]
            required += ["decoder_sparse_step", "mlp_only_layers"]
        missing = [name for name in required if fields.get(name) is None]
        if missing:
            raise ValueError(
                f"config.json: {', '.join(missing)} missing; transformers' defaults are not Qwen3's values"
            )
        known = names | _NEUTRAL_KEYS | _FIXED_VALUES.keys() | ({"num_local_experts"} if moe else set())
        known |= {"rope_theta", "rope_scaling", "rope_parameters", "layer_types", "sliding_window"}
        _refuse_unknown(raw, known, "config.json")
        return cls(**fields)

    def to_hf(self) -> dict[str, Any]:
        """The content of a `config.json`, in the spelling of the released files."""
        moe = self.num_experts > 0
        raw = dataclasses.asdict(self)
        raw["mlp_only_layers"] = list(self.mlp_only_layers)
        scaling = raw.pop("rope_scaling")
        if scaling is not None:
            scaling = {"rope_type": "yarn", **{key: value for key, value in scaling.items() if value is not None}}
        if not moe:
            for key in _MOE_KEYS:
                del raw[key]
        return {
            "architectures": ["Qwen3MoeForCausalLM" if moe else "Qwen3ForCausalLM"],
            "model_type": "qwen3_moe" if moe else "qwen3",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "hidden_act": "silu",
            "sliding_window": None,
            "use_sliding_window": False,
            **{key: value for key, value in raw.items() if value is not None},
            "rope_scaling": scaling,
        }


def presets_dir() -> Path:
    """`configs/model`: beside the package in a checkout, inside it in an installed wheel."""
    package = Path(__file__).parent
    inside = package / "configs" / "model"
    return inside if inside.is_dir() else package.parent / "configs" / "model"


def refuse_other_than_directory(directory: str | Path | epath.Path, field: str) -> None:
    """Refuses the name of a model on the Hugging Face Hub, and a directory that holds an adapter only, with what to do.

    Raises:
      ValueError: beginning with `field`.
    """
    path = epath.Path(directory)
    if not path.exists():
        is_name = re.fullmatch(r"[\w.-]+/[\w.-]+", str(directory)) and not path.parent.exists()
        hint = f"; if it is a name on the Hugging Face Hub: hf download {directory} --local-dir {path.name}"
        raise ValueError(f"{field}: {str(directory)!r} does not exist; use a directory{hint if is_name else ''}")
    if (path / "adapter_config.json").exists() and not (path / "config.json").exists():
        raise ValueError(
            f"{field}: {str(directory)!r} holds an adapter (LoRA), not a model; merge it into its base model first "
            "(peft: merge_and_unload, save_pretrained)"
        )


def _read_config_json(path: epath.Path) -> dict[str, Any]:
    refuse_other_than_directory(path, "model")
    path = path / "config.json" if path.is_dir() else path
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"model: {str(path)!r} does not exist; use a directory with a config.json") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: {raw!r:.60}; use a JSON object")
    return raw


def _read_rope(raw: Mapping[str, Any]) -> tuple[Any, RopeScaling | None]:
    """`rope_theta` and the scaling. Both have two places: the released files' keys, and `rope_parameters` of
    transformers 5."""
    thetas, scalings = {"rope_theta": raw.get("rope_theta")}, dict[str, Any]()
    for name in ("rope_scaling", "rope_parameters"):
        if (table := raw.get(name)) is not None:
            if not isinstance(table, Mapping):
                raise ValueError(f"{name}: {table!r}; use an object or null")
            thetas[f"{name}.rope_theta"] = table.get("rope_theta")
            scalings[name] = RopeScaling.from_hf(table, name) or "default"
    scaling = _agreed(scalings)
    return _agreed(thetas), None if scaling == "default" else scaling


def _agreed(values: Mapping[str, Any]) -> Any:
    """The value of a setting that several keys give; None where none does."""
    given = [(name, value) for name, value in values.items() if value is not None]
    for name, value in given[1:]:
        if value != given[0][1]:
            raise ValueError(f"{given[0][0]}: {given[0][1]!r}, but {name}: {value!r}; use the same in both, or one")
    return given[0][1] if given else None


def _check_kinds(config: Any, prefix: str = "") -> None:
    """Refuses values of a wrong type, and numbers that are not finite."""
    for field in dataclasses.fields(config):
        kind, _, optional = str(field.type).partition(" | ")
        value = getattr(config, field.name)
        if kind not in _KINDS or optional not in ("", "None") or (optional and value is None):
            continue
        types, instead = _KINDS[kind]
        is_kind = isinstance(value, types) and isinstance(value, bool) == (bool in types)
        # Not math.isfinite: it raises for whole numbers that no float can hold.
        if not is_kind or not abs(value) <= sys.float_info.max:
            raise ValueError(f"{prefix}{field.name}: {value!r}; use {instead}")


def _refuse_unknown(raw: Mapping[str, Any], known: set[str] | frozenset[str], where: str) -> None:
    unknown = sorted(key for key in raw if key not in known and raw[key] is not None)
    if unknown:
        raise ValueError(f"{where}: {', '.join(unknown)} not supported; remove keys that do not affect the network")
