"""What may stand in a config: the values of every key, and which of them go together.

`contradictions` says all of it that a config breaks, every line naming a key.
"""

from collections.abc import Iterator, Sequence
import difflib
import math
import re
from typing import Any

from ml_collections import ConfigDict

from t2i_jax.data.buckets import parse as parse_shape
from t2i_jax.data.sources import FILES, SOURCES, ingredients
from t2i_jax.values import CHOICES, POSITIVE, RANGES


def flat(config: ConfigDict, prefix: str = "") -> dict[str, Any]:
    """{'train.steps': 1000, ...}; an empty section is a key of its own."""
    out = {}
    for key, value in config.items():
        nested = isinstance(value, ConfigDict) and len(value)
        out.update(flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value})
    return out


def did_you_mean(nearest: Sequence[str]) -> str:
    return f" Did you mean {' or '.join(nearest)}?" if nearest else ""


def contradictions(config: ConfigDict) -> list[str]:
    """What cannot work in a config that has all keys, in their types."""
    problems = []
    for key, value in flat(config).items():
        if key in CHOICES and value not in CHOICES[key]:
            hint = did_you_mean(difflib.get_close_matches(value, CHOICES[key], 1, 0.4))
            problems.append(f"{key} = {value!r} is unknown; known: {list(CHOICES[key])}.{hint}")
        if type(value) in (int, float):
            allowed, words = RANGES.get(key, POSITIVE)
            if not (math.isfinite(value) and allowed(value)):
                problems.append(f"{key} = {value} must be {words}")
    for rules in (
        _model_rules,
        _lora_rules,
        _data_rules,
        _training_rules,
        _sampling_rules,
        _evaluation_rules,
    ):
        problems += rules(config)
    return problems


def _divides(config: ConfigDict, whole: str, part: str) -> Iterator[str]:
    values = flat(config)
    if values[part] > 0 and values[whole] % values[part]:
        yield f"{whole} = {values[whole]} is not divisible by {part} = {values[part]}"


def _model_rules(config: ConfigDict) -> Iterator[str]:
    llm, weights, autoencoder = config.llm, config.weights, config.autoencoder
    yield from _divides(config, "llm.num_heads", "llm.num_kv_heads")
    if llm.head_width % 4:
        yield f"llm.head_width = {llm.head_width} is not divisible by 4 (rotary pairs, two axes)"
    plain = not llm.softcap and llm.query_scalar in (0, llm.head_width)
    if llm.softcap_shared and plain:
        yield (
            f"llm.softcap_shared = True, but llm.softcap = {llm.softcap} and llm.query_scalar = "
            f"{llm.query_scalar} leave nothing to share"
        )
    yield from _memory_rules(config)
    if not weights.llm and not config.pretrain.steps:
        yield "weights.llm = '' and pretrain.steps = 0: an LLM is loaded or trained here"
    if weights.llm and not weights.tokenizer:
        yield f"weights.tokenizer = '', but weights.llm = {weights.llm!r} needs its own"
    if not weights.tokenizer and not config.pretrain.vocab_size:
        yield "weights.tokenizer = '' and pretrain.vocab_size = 0: how large is the one made here?"
    if not weights.tokenizer and config.pretrain.vocab_size > llm.vocab_size:
        yield (
            f"pretrain.vocab_size = {config.pretrain.vocab_size} is more than llm.vocab_size = "
            f"{llm.vocab_size}: every token needs an embedding"
        )
    if autoencoder.kind == "identity":
        for key, wanted in (("channels", 3), ("downsample", 1), ("tile", 0)):
            if autoencoder[key] != wanted:
                yield (
                    f"autoencoder.{key} = {autoencoder[key]}, but autoencoder.kind = 'identity' "
                    f"(pixels) has {wanted}"
                )
        if weights.autoencoder:
            yield (
                f"weights.autoencoder = {weights.autoencoder!r}, but autoencoder.kind = 'identity' "
                "has no weights"
            )
    elif not weights.autoencoder:
        yield f"weights.autoencoder = '', but autoencoder.kind = {autoencoder.kind!r} needs weights"


def _memory_rules(config: ConfigDict) -> Iterator[str]:
    memory, dit, llm, clip = config.memory, config.dit, config.llm, config.clip
    if memory.source in ("deep", "mixture") and dit.num_layers > llm.num_layers:
        yield (
            f"dit.num_layers = {dit.num_layers} is more than llm.num_layers = {llm.num_layers}: "
            f"a layer of the DiT shares one of the LLM (memory.source = {memory.source!r})"
        )
    if memory.source == "middle":
        if not memory.first_layer < llm.num_layers <= dit.num_layers:
            yield (
                f"memory.source = 'middle' shares the layers from memory.first_layer = "
                f"{memory.first_layer} to the last of llm.num_layers = {llm.num_layers}; there "
                f"must be one, and dit.num_layers = {dit.num_layers} must have them"
            )
    elif memory.first_layer:
        yield (
            f"memory.first_layer = {memory.first_layer}, but memory.source = {memory.source!r} "
            "does not read it"
        )
    if llm.softcap_shared and memory.source in ("shallow", "middle"):
        yield (
            f"llm.softcap_shared = True, but memory.source = {memory.source!r} shares no layer, or "
            "not all of the DiT's"
        )
    if dit.positions == "none" and not dit.table_size:
        yield (
            "dit.positions = 'none' and dit.table_size = 0: no image token would know where it is"
        )
    if not dit.pooled_width:
        return
    if dit.conditioning == "none":
        yield (
            f"dit.pooled_width = {dit.pooled_width}, but dit.conditioning = 'none' has nothing "
            "that a pooled embedding is added to"
        )
    if dit.pooled_width != (clip.projection_width or clip.width):
        yield (
            f"dit.pooled_width = {dit.pooled_width}, but the embedding that CLIP gives has "
            f"clip.projection_width = {clip.projection_width}"
        )
    if not config.weights.clip:
        yield f"weights.clip = '', but dit.pooled_width = {dit.pooled_width} needs CLIP"
    yield from _divides(config, "clip.width", "clip.num_heads")


def _lora_rules(config: ConfigDict) -> Iterator[str]:
    rank, weights = config.lora.rank, config.weights
    if rank <= 0:
        return
    if not weights.start:
        yield (
            f"weights.start = '', but lora.rank = {rank} trains factors of a model that is there: "
            "name it, an import, an export or a run"
        )
    if not weights.llm:
        yield (
            f"weights.llm = '', but lora.rank = {rank} needs the language model that its base was "
            "trained with: name a directory that has it, such as an export of the base"
        )
    if config.optimizer.name == "muon":
        yield (
            f"optimizer.name = 'muon' is for whole matrices, not for the factors of lora.rank = "
            f"{rank}: set optimizer.name = 'adamw'"
        )


def _data_rules(config: ConfigDict) -> Iterator[str]:
    data = config.data
    if data.max_text_tokens > config.llm.max_tokens:
        yield (
            f"data.max_text_tokens = {data.max_text_tokens} is more than llm.max_tokens = "
            f"{config.llm.max_tokens}, up to which the language model is exact"
        )
    cell = config.autoencoder.downsample * config.dit.patch_size
    if cell > 0 and data.image_size % cell:
        yield (
            f"data.image_size = {data.image_size} is not divisible by autoencoder.downsample * "
            f"dit.patch_size = {cell}"
        )
    side = data.image_size // cell if cell > 0 else 0
    if 0 < config.dit.table_size < side:
        yield (
            f"dit.table_size = {config.dit.table_size} is less than the {side} patches that "
            f"data.image_size = {data.image_size} has along a side"
        )
    if config.dit.table_size and config.dit.width % 4:
        yield f"dit.width = {config.dit.width} is not divisible by 4, as dit.table_size > 0 needs"
    if data.chat_template and not config.weights.tokenizer:
        yield "data.chat_template = True, but weights.tokenizer = '' makes one that has none"
    if data.add_generation_prompt and not data.chat_template:
        yield "data.add_generation_prompt = True, but data.chat_template = False"
    yield from _source_rules(config)
    yield from _bucket_rules(config, cell)
    if config.validation.every and not data.validation_size:
        yield f"validation.every = {config.validation.every}, but data.validation_size = 0"


def _source_rules(config: ConfigDict) -> Iterator[str]:
    data = config.data
    try:
        mixed = ingredients(data)
    except ValueError as error:
        yield str(error)
        return
    for section, _ in mixed:
        name = section.source
        if name not in SOURCES and data.mixture:
            yield f"data.mixture: source = {name!r} is unknown; known: {list(SOURCES)}"
        if name in FILES:
            for key in ("path", "image_field", "caption_field"):
                if not getattr(section, key):
                    yield f"data.{key} = '', but data.source = {name!r} needs it"
            if data.original_caption_rate > 0 and not section.original_caption_field:
                yield (
                    f"data.original_caption_rate = {data.original_caption_rate}, but "
                    "data.original_caption_field = '' names none"
                )
        else:
            if data.flip:
                yield f"data.flip = True, but data.source = {name!r} has a left and a right"
            if data.original_caption_rate:
                yield (
                    f"data.original_caption_rate = {data.original_caption_rate}, but data.source "
                    f"= {name!r} has one caption a sample"
                )
        if name == "latents" and (data.flip or not data.center_crop):
            yield (
                f"data.flip = {data.flip}, data.center_crop = {data.center_crop}: stored latents "
                "are neither mirrored nor cropped"
            )
    if len({section.source == "latents" for section, _ in mixed}) > 1:
        yield "data.mixture: latents and images cannot be mixed; encode all of it"


def _bucket_rules(config: ConfigDict, cell: int) -> Iterator[str]:
    data = config.data
    for text in data.buckets:
        try:
            height, width = parse_shape(text)
        except (TypeError, ValueError) as error:
            yield f"data.buckets: {error}"
            continue
        if cell > 0 and (height % cell or width % cell or not height * width):
            yield f"data.buckets: {text} is not divisible by the {cell} pixels of a patch"
        elif 0 < config.dit.table_size < max(height, width) // cell:
            yield (
                f"data.buckets: {text} has more than dit.table_size = {config.dit.table_size} "
                "patches a side"
            )
    if len(set(data.buckets)) < len(data.buckets):
        yield "data.buckets: a shape is named twice"
    lengths = data.text_buckets
    if not all(type(n) is int and 2 <= n <= data.max_text_tokens for n in lengths):
        yield (
            f"data.text_buckets = {lengths} must be lengths from 2 to data.max_text_tokens = "
            f"{data.max_text_tokens}"
        )


def _profile_rules(config: ConfigDict) -> Iterator[str]:
    profile, steps = config.profile, config.train.steps
    if profile.steps and profile.start + profile.steps > steps:
        yield (
            f"profile.start = {profile.start} + profile.steps = {profile.steps} is more than "
            f"train.steps = {steps}: they would not all be traced"
        )


def _training_rules(config: ConfigDict) -> Iterator[str]:
    train, optimizer, mesh = config.train, config.optimizer, config.mesh
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)*", config.name):
        yield f"name = {config.name!r} must be letters, digits and any of _ . - /, for runs/<name>"
    yield from _divides(config, "train.batch_size", "train.accumulation")
    if optimizer.warmup_steps >= train.steps:
        yield (
            f"optimizer.warmup_steps = {optimizer.warmup_steps} is not less than train.steps = "
            f"{train.steps}: it would never reach its learning rate"
        )
    if optimizer.decay_steps and optimizer.warmup_steps + optimizer.decay_steps > train.steps:
        yield (
            f"optimizer.warmup_steps = {optimizer.warmup_steps} + optimizer.decay_steps = "
            f"{optimizer.decay_steps} is more than train.steps = {train.steps}"
        )
    if optimizer.decay_steps and optimizer.schedule == "constant":
        yield (
            f"optimizer.decay_steps = {optimizer.decay_steps}, but optimizer.schedule = 'constant' "
            "does not decay"
        )
    yield from _profile_rules(config)
    saved = config.checkpoint
    if saved.keep_every % max(saved.every, 1):
        yield (
            f"checkpoint.keep_every = {saved.keep_every} is no multiple of checkpoint.every = "
            f"{saved.every}: most of its multiples would never be saved"
        )
    times = config.validation.timesteps
    if config.validation.every and not times:
        yield f"validation.every = {config.validation.every}, but validation.timesteps is empty"
    if not all(0 < t <= 1 for t in times):
        yield f"validation.timesteps = {times} must be above 0 (data) and at most 1 (noise)"
    free = [f"mesh.{axis}" for axis in mesh if mesh[axis] == -1]
    if len(free) > 1 and free != ["mesh.data", "mesh.fsdp"]:
        yield f"{' = '.join(free)} = -1: one axis takes the rest, or mesh.data and mesh.fsdp both"
    shards, rows = mesh.data * mesh.fsdp, train.batch_size // max(train.accumulation, 1)
    if "mesh.data" not in free and "mesh.fsdp" not in free and shards > 0 and rows % shards:
        yield (
            f"train.batch_size / train.accumulation = {rows} is not divisible by mesh.data * "
            f"mesh.fsdp = {shards}"
        )


def _sampling_rules(config: ConfigDict) -> Iterator[str]:
    sampling = config.sampling
    if sampling.steps > config.flow.num_timesteps:
        yield (
            f"sampling.steps = {sampling.steps} is more than flow.num_timesteps = "
            f"{config.flow.num_timesteps}, the levels there are"
        )
    if sampling.every and not sampling.prompts:
        yield f"sampling.every = {sampling.every}, but sampling.prompts is empty"
    limits = sampling.guidance_interval
    if len(limits) != 2 or not 0 <= limits[0] < limits[1] <= 1:
        yield f"sampling.guidance_interval = {limits} must be two levels, 0 <= low < high <= 1"
    if sampling.zero_steps >= sampling.steps and sampling.guidance_method == "cfg-zero":
        yield (
            f"sampling.zero_steps = {sampling.zero_steps} leaves none of sampling.steps = "
            f"{sampling.steps} in which anything moves"
        )


def _evaluation_rules(config: ConfigDict) -> Iterator[str]:
    evaluation, source = config.evaluation, config.data.source
    if not evaluation.every or source in ("scenes", "digits"):
        return
    if not (evaluation.inception or evaluation.clip):
        yield (
            f"evaluation.every = {evaluation.every}, but data.source = {source!r} has no score of "
            "its own: name evaluation.inception or evaluation.clip"
        )
    if evaluation.inception and source == "latents":
        yield "evaluation.inception is given, but data.source = 'latents' has no pictures"
    if not config.data.validation_size:
        yield f"evaluation.every = {evaluation.every}, but data.validation_size = 0"
