"""The published PyTorch system's config.json <-> sections of ours.

A directory `transformer/` of the published pipelines (tang-bd/fuse-dit) is a FuseDiT or a baseline
DiT; its config.json holds the language model's own config as `base_config`. What their names for
the choices of the study are here:

    model_type FuseDiT | DiT           memory.source deep | shallow
    attention self | cross             dit.attention joint | cross
    pos_embed ape                      dit.positions none, and a table (dit.table_size)
    initial_layers, shared_attention_layers    the LLM's layers before the first shared one
"""

from collections.abc import Mapping
from typing import Any

from t2i_jax.interop import llm as language_models

_LANGUAGE_MODELS = ("gemma", "gemma2")
_ATTENTION = {"self": "joint", "cross": "cross"}
_POSITIONS = {"ape": "none", "1d-rope": "1d-rope", "2d-rope": "2d-rope", "m-rope": "m-rope"}
_CONDITIONING = {
    None: "none",
    "adaln-zero": "adaln-zero",
    "adaln-single": "adaln-single",
    "addition": "addition",
}
_DEFAULTS = {  # what the published code takes for a key that config.json lacks
    "attention": "self",
    "dit_num_hidden_layers": 18,
    "text_hidden_states_index": -1,
    "in_channels": 16,
    "initial_layers": 0,
    "out_channels": 16,
    "patch_size": 2,
    "pos_embed": "1d-rope",
    "pos_embed_max_size": 64,
    "qk_norm": False,
    "sample_size": 32,
    "sandwich_norm": False,
    "shared_attention_layers": "all",
    "text_hidden_size": None,
    "text_modulation_embeds_dim": None,
    "timestep_conditioning": "adaln-zero",
}


def sections(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Their config.json -> {'llm', 'memory', 'dit', 'channels'}, as `fusion.build` takes them.

    Raises ValueError naming what no model here can have.
    """
    theirs = with_defaults(theirs)
    fused = theirs["model_type"] == "FuseDiT"
    llm = language_models.section(theirs["base_config"])
    first = theirs["initial_layers"] if fused else 0
    layers, shared = theirs["dit_num_hidden_layers"], theirs["shared_attention_layers"]
    everything = list(range(first, llm["num_layers"]))
    wanted = {
        "model_type": theirs["model_type"] in ("FuseDiT", "DiT"),
        "attention": theirs["attention"] in _ATTENTION,
        "pos_embed": theirs["pos_embed"] in _POSITIONS,
        "timestep_conditioning": theirs["timestep_conditioning"] in _CONDITIONING,
        "out_channels": theirs["out_channels"] == theirs["in_channels"],
        "shared_attention_layers": not fused or shared == "all" or shared == everything,
        "dit_num_hidden_layers": not fused or layers == len(everything),
        "text_hidden_states_index": fused or theirs["text_hidden_states_index"] == -1,
        "text_modulation_embeds_dim": fused or theirs["text_modulation_embeds_dim"] is None,
        "text_hidden_size": theirs["text_hidden_size"] in (None, llm["width"]),
    }
    wrong = [f"{name} = {theirs[name]!r}" for name, good in wanted.items() if not good]
    if wrong:
        raise ValueError(f"No model here is that of {', '.join(wrong)}.")
    dit = {
        "width": theirs.get("dit_hidden_size") or llm["width"],
        "num_layers": layers,
        "mlp_width": llm["mlp_width"],
        "patch_size": theirs["patch_size"],
        "attention": _ATTENTION[theirs["attention"]],
        "positions": _POSITIONS[theirs["pos_embed"]],
        "conditioning": _CONDITIONING[theirs["timestep_conditioning"]],
        "pooled_width": theirs["text_modulation_embeds_dim"] or 0,
        "qk_norm": theirs["qk_norm"],
        "sandwich_norm": theirs["sandwich_norm"],
    }
    if theirs["pos_embed"] == "ape":
        extent = float(theirs["sample_size"] // theirs["patch_size"])
        side = theirs["pos_embed_max_size"]
        dit |= {"table_size": side, "table_range": extent}
    memory = {"source": "deep" if fused else "shallow"}
    return {"llm": llm, "memory": memory, "dit": dit, "channels": theirs["in_channels"]}


def config_json(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of a whole config: `sections` undone.

    Raises ValueError naming what the published models cannot have.
    """
    llm, dit = config["llm"], config["dit"]
    fused = config["memory"]["source"] != "shallow"
    kind = "FuseDiT" if fused else "DiT"
    side, table = config["data"]["image_size"] // config["autoencoder"]["downsample"], {}
    if dit["table_size"]:
        side = round(dit["table_range"] * dit["patch_size"])
        table = {"pos_embed": "ape", "pos_embed_max_size": dit["table_size"]}
    theirs = {
        "architectures": [kind],
        "model_type": kind,
        "base_config": language_models.config_json(llm),
        "attention": _theirs(_ATTENTION, dit["attention"]),
        "dit_hidden_size": dit["width"],
        "dit_num_hidden_layers": dit["num_layers"],
        "in_channels": config["autoencoder"]["channels"],
        "out_channels": config["autoencoder"]["channels"],
        "initial_layers": llm["num_layers"] - dit["num_layers"] if fused else 0,
        "patch_size": dit["patch_size"],
        "pos_embed": dit["positions"],
        "qk_norm": dit["qk_norm"],
        "sample_size": side,
        "sandwich_norm": dit["sandwich_norm"],
        "shared_attention_layers": "all",
        "text_hidden_size": llm["width"],
        "text_hidden_states_index": -1,
        "text_modulation_embeds_dim": dit["pooled_width"] or None,
        "timestep_conditioning": _theirs(_CONDITIONING, dit["conditioning"]),
    } | table
    if wrong := _not_kept(config, theirs):
        raise ValueError(f"No published model has {', '.join(wrong)}.")
    return theirs


def _not_kept(config: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """What of a config gets another value on the way to their config.json and back."""
    if theirs["base_config"]["model_type"] not in _LANGUAGE_MODELS:
        return [f"a language model of the family {theirs['base_config']['model_type']!r}"]
    if theirs["pos_embed"] not in _POSITIONS:
        return [f"dit.positions = {config['dit']['positions']!r} and no dit.table_size"]
    back = sections(theirs)
    back["llm"] |= {"softcap_shared": False, "query_scalar": config["llm"]["query_scalar"]}
    back["memory"] |= {"first_layer": 0}
    back["dit"] = {"table_size": 0, "prediction": "velocity"} | back["dit"]
    return [
        f"{name}.{key} = {config[name][key]!r}"
        for name in ("llm", "memory", "dit")
        for key, value in back[name].items()
        if config[name][key] != value
    ]


def _theirs(table: Mapping[Any, str], ours: str) -> Any:
    return next(theirs for theirs, name in table.items() if name == ours)


def with_defaults(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Their config.json with the keys that it may lack. Raises ValueError where it is no such."""
    if not isinstance(theirs.get("base_config"), dict) or "model_type" not in theirs:
        raise ValueError("This config.json has no base_config or no model_type: of another system?")
    return _DEFAULTS | dict(theirs)
