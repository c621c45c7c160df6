"""Configurations: ml-collections at the command line, typed frozen dataclasses in code.

A config file returns a `ConfigDict`; a command turns it into a `Config` once, at its edge, and
everything behind it is typed and immutable. Parts with their own options (mixers, MLPs, data
sources) are named by a *spec*: `type` is a registry key or `package.module:Class`, the other keys
are keyword-only arguments of that class. So the constructor's signature is the list of options.
"""

import ast
import dataclasses
import difflib
import importlib
import inspect
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict


class UserError(ValueError):
    """A fault that the user can mend: one line that says what is wrong and what to do."""


# ---------------------------------------------------------------- the typed configuration


@dataclasses.dataclass(frozen=True)
class BlockConfig:
    """One letter of the stack: its mixers in order, each a residual branch, then the MLP."""

    mixers: tuple[Mapping[str, Any], ...]
    mlp: Mapping[str, Any] | None
    residual: str = "standard"  # "bypass": the last mixer reaches the stream through the MLP only
    norms: str = "pre"  # "sandwich": a second norm on each branch's output
    scale: float = 1.0  # of each branch's output (muP's depth scale)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    layers: str  # the stack, one letter per layer
    blocks: Mapping[str, BlockConfig]  # the legend
    width: int
    vocab: int
    tied: bool = False
    norm_eps: float = 1e-6
    embedding_std: float = 0.02
    dtype: str = "float32"  # of activations; parameters are always float32
    remat: str = "none"  # none | names | dots | full
    scan: bool = True  # scan over repeats; False unrolls them, with identical numbers


@dataclasses.dataclass(frozen=True)
class DataConfig:
    tokenizer: str  # "bytes" or the path of a tokenizer.json
    sources: Mapping[str, Mapping[str, Any]]  # name -> spec of a source, with its weight
    packing: str = "concat"  # concat | best_fit
    streams: int = 1  # parts of the data that are read side by side; on many hosts, one for each


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    name: str = "adamw"  # adamw | muon
    learning_rate: float = 1e-3
    final_learning_rate: float = 0.0
    schedule: str = "cosine"  # cosine | wsd | constant
    warmup_steps: int = 0
    decay_fraction: float = 0.1  # wsd: the last part of training, over which the rate falls
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float = 1.0  # global norm
    frozen: tuple[str, ...] = ()  # globs of parameter paths that are not trained


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; one of them may be -1: all that remain."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    context: int = 1


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    every: int = 1000  # steps
    keep: int = 2  # newest ones, besides the best
    best: str = "heldout_bits_per_byte"  # the metric whose lowest value is also kept


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    every: int = 1000  # steps between the evaluations during training
    split: str = "heldout"  # "tune" while hyper-parameters are chosen
    heldout_tokens: int = 32768  # of held-out text, at each length
    lengths: tuple[int, ...] = (1, 2, 4, 8, 16, 32)  # multiples of the training length
    facts: tuple[int, ...] = (4,)  # one asked for, the others distractors of the same form
    examples: int = 200  # needle tests per length
    logit_bases: tuple[float, ...] = ()  # candidates for the log scaling of attention logits
    task: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # form of the facts
    tasks: tuple[str, ...] = ()  # sources of `data` that are tasks, to be asked too


@dataclasses.dataclass(frozen=True)
class Config:
    name: str  # of the run: names its default work directory
    model: ModelConfig
    data: DataConfig
    optimizer: OptimizerConfig
    steps: int
    batch_size: int  # sequences per step, over all devices
    seq_len: int
    seed: int = 0
    accumulate: int = 1  # microbatches per step
    z_loss: float = 0.0
    log_every: int = 50  # steps
    init_from: str = ""  # another run's work directory, optionally `@step`, or Hugging Face's
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()


# ---------------------------------------------------------------- from ConfigDict to dataclass


def typed(config: Mapping[str, Any], cls: type = Config, path: str = "config"):
    """The dataclass `cls` with the values of `config`.

    Raises:
      UserError: a key that `cls` does not have (near names are suggested), a missing key, or a
        value of another type.
    """
    hints = typing.get_type_hints(cls)
    for key in config:
        if key not in hints:
            raise UserError(f"{path}.{key}: no such setting{_did_you_mean(key, hints)}")
    values = {
        name: _convert(config[name], hint, f"{path}.{name}")
        for name, hint in hints.items()
        if name in config
    }
    for field in dataclasses.fields(cls):
        required = field.default is field.default_factory is dataclasses.MISSING
        if required and field.name not in values:
            raise UserError(f"{path}.{field.name} is missing: set it in the config file")
    return cls(**values)


def _convert(value: Any, hint: Any, path: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return _plain(value)
    if origin in (typing.Union, types.UnionType):  # only `X | None` is used
        return None if value is None else _convert(value, args[0], path)
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping | ConfigDict):
        return typed(value, hint, path)
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(_convert(v, args[0], f"{path}[{i}]") for i, v in enumerate(value))
    if origin is Mapping and isinstance(value, Mapping | ConfigDict):
        return {k: _convert(value[k], args[1], f"{path}.{k}") for k in value}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and type(value) is hint:
        return value
    wanted = getattr(hint, "__name__", str(hint))
    raise UserError(f"{path} is {value!r}, a {type(value).__name__}; it must be a {wanted}")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping | ConfigDict):
        return {key: _plain(value[key]) for key in value}
    return tuple(map(_plain, value)) if isinstance(value, list | tuple) else value


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    known = list(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if not known:
        return ""
    return f"; did you mean {' or '.join(near)}?" if near else f"; there are {', '.join(known)}"


# ---------------------------------------------------------------- presets of a config file


def choose(
    arg: str | None,
    presets: Mapping[str, Callable[[], ConfigDict]],
    variants: Mapping[str, Callable[[ConfigDict], None]] = types.MappingProxyType({}),
    cls: type = Config,
) -> ConfigDict:
    """The config that `PRESET[,VARIANT...][,key=value...]` names; no argument: the first preset.

    `cls`: what a command makes of it, whose defaults are filled in.

    Raises:
      UserError: a preset, variant or key that does not exist, or a value of another type.
    """
    preset, *changes = (arg or next(iter(presets))).split(",")
    if preset not in presets:
        raise UserError(f"unknown preset {preset!r}{_did_you_mean(preset, presets)}")
    config = presets[preset]()
    config.name = "-".join([config.name, preset, *(c for c in changes if c in variants)])
    _fill_defaults(config, cls)
    for change in changes:
        key, equals, value = change.partition("=")
        if equals:
            override(config, key, value)
        elif change in variants:
            variants[change](config)
        else:
            raise UserError(f"unknown variant {change!r}{_did_you_mean(change, variants)}")
    return config


def override(config: ConfigDict, path: str, text: str) -> None:
    """Sets `config.PATH` to what the text says.

    Raises:
      UserError: there is no such setting, or it is of another type.
    """
    section, *keys = re.split(r"[.\[\]]+", path.rstrip("]"))
    for key in keys:
        config = config[_known(config, section, path)]
        section = key
    key = _known(config, section, path)
    try:
        config[key] = text if isinstance(config[key], str) else ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError) as error:
        wanted = type(config[key]).__name__
        raise UserError(f"config.{path} is {text!r}; it must be a {wanted}") from error


def _known(config: Any, key: str, path: str) -> str | int:
    if isinstance(config, list | tuple) and key.isdigit() and int(key) < len(config):
        return int(key)
    known = list(config) if isinstance(config, ConfigDict) else []
    if key not in known:
        raise UserError(f"config.{path}: no such setting as {key!r}{_did_you_mean(key, known)}")
    return key


def _fill_defaults(config: ConfigDict, cls: type) -> None:
    """Adds the settings that have a default, so that each can be overridden."""
    for field in dataclasses.fields(cls):
        value = config.get(field.name, _default(field))
        given = isinstance(value, ConfigDict)
        section = next((t for t in _alternatives(field.type) if dataclasses.is_dataclass(t)), None)
        if section and (given or section is field.type):
            if not given:
                config[field.name] = ConfigDict()
            _fill_defaults(config[field.name], section)
        elif value is not dataclasses.MISSING:
            config[field.name] = value


def _default(field: dataclasses.Field) -> Any:
    made = field.default_factory is not dataclasses.MISSING
    return field.default_factory() if made else field.default


def _alternatives(hint: Any) -> tuple[Any, ...]:
    """X and None of `X | None`; any other type alone."""
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


# ---------------------------------------------------------------- components named by a spec


def spec(type: str, registry: Mapping[str, str], **options: Any) -> ConfigDict:
    """The spec of a component, with the defaults of its constructor filled in.

    Filled in so that each option can be overridden at the command line.
    """
    signature = _options(resolve(type, registry))
    for name in options:
        if name not in signature:
            raise UserError(f"{type} has no option {name}{_did_you_mean(name, signature)}")
    values = {**signature, **options}
    missing = [name for name, value in values.items() if value is inspect.Parameter.empty]
    if missing:
        raise UserError(f"{type} needs the option {missing[0]}: give it in the config file")
    return ConfigDict({"type": type, **values}, convert_dict=True)


def build(spec: Mapping[str, Any], registry: Mapping[str, str], *args: Any, **kwargs: Any):
    """The component that a spec names, from the spec's options and what the caller adds."""
    options = {name: value for name, value in spec.items() if name != "type"}
    return resolve(spec["type"], registry)(*args, **kwargs, **options)


def resolve(type: str, registry: Mapping[str, str]) -> type:
    """The class behind a registry key or `package.module:Class`."""
    target = registry.get(type, type)
    if ":" not in target:
        raise UserError(f"unknown component {type!r}{_did_you_mean(type, registry)}")
    module, _, name = target.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"cannot import {target!r}: {error}") from error


def _options(cls: type) -> dict[str, Any]:
    """The constructor's keyword-only parameters and their defaults (positional: the caller's)."""
    parameters = inspect.signature(cls.__init__).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
