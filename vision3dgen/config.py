"""Configuration: YAML files and `a.b=c` overrides on one side, constructors on the other, nothing in between.

A constructor's signature is the schema: `load` reads a file into plain values that remember the line they came from,
and `build` calls the constructor after checking every key and type against its signature. No configuration object
reaches further than that call.

Differs: scalars follow YAML 1.2, not PyYAML's 1.1: `1e-3` is a number, `yes` and `on` are strings, and what starts with
a zero stays a string (the synset id 03001627 is not an octal number).
"""

import dataclasses
import difflib
import inspect
import os
import re
import types
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vision3dgen.files import atomic_write

PRESETS = ("tiny",)  # top-level mappings of a file, merged over the rest of it when asked for


class ConfigError(ValueError):
    """A fault in a configuration; the message names file and line (or override), key, and what is accepted."""


class Config(dict[str, Any]):
    """A mapping of a loaded configuration: a plain dict that knows its dotted key and the source of each value."""

    def __init__(self, values: Mapping[str, Any], source: str, sources: Mapping[str, str], key: str = ""):
        super().__init__(values)
        self.key, self.source, self.sources = key, source, dict(sources)

    def __reduce__(self) -> tuple[Any, ...]:
        return Config, (dict(self), self.source, self.sources, self.key)


@dataclasses.dataclass(frozen=True)
class Named:
    """Marks a parameter whose mapping chooses its class by `name`: `Annotated[Animal, Named(ANIMALS, "cat")]`.

    A mapping without a name means the default.
    """

    table: Mapping[str, Callable[..., Any]]
    default: str


# --------------------------------------------------------------------------------------------------------- YAML


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (PyYAML's own class attribute)

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):  # their expansion is unbounded
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(problem="aliases are not accepted, use ${key} instead", problem_mark=mark)
        return super().compose_node(parent, index)


class _Dumper(yaml.SafeDumper):
    """Quotes exactly the strings that `_Loader` would not read as strings."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012


_TAG = "tag:yaml.org,2002:"
_SCALARS = {  # tried in this order
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?(0|[1-9][0-9_]*)|0x[0-9a-fA-F]+", list("-+0123456789")),
    "float": (
        r"[-+]?((0|[1-9][0-9_]*)(\.[0-9_]*)?|\.[0-9][0-9_]*)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
}
for _kind, (_pattern, _first) in _SCALARS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_TAG + _kind, re.compile(rf"^(?:{_pattern})$"), _first)


_WORD = r"[\w-]*"  # empty for a whole, as in `weights: {"": ...}`; unquoted that is no string, so it is refused
_DOTTED = r"[\w-]+(\.[\w-]+|\[\d+\])*"  # a key of `load`'s overrides


def _parse(text: str, name: str, *, with_lines: bool = True, key_pattern: str = _WORD) -> Any:
    """The one YAML document in `text`, mappings as `Config`."""

    def at(mark: Any) -> str:
        return f"{name}, line {mark.line + 1}" if with_lines else name

    def read(node: Any) -> Any:
        kind = node.tag.removeprefix(_TAG)
        if isinstance(node, yaml.SequenceNode) and kind == "seq":
            return [read(item) for item in node.value]
        if isinstance(node, yaml.MappingNode) and kind == "map":
            mapping = Config({}, at(node.start_mark), {})
            for key_node, value_node in node.value:
                key, source = key_node.value, at(key_node.start_mark)
                if key_node.tag != _TAG + "str" or not re.fullmatch(key_pattern, key):
                    shown = key if isinstance(key, str) else "a collection"
                    raise ConfigError(f"{source}: a key must be a word (quoted if it reads as a number), got {shown}")
                if key in mapping:
                    raise ConfigError(f"{source}: key {key!r} is given twice, first at {mapping.sources[key]}")
                mapping.sources[key] = source
                mapping[key] = read(value_node)
            return mapping
        if not isinstance(node, yaml.ScalarNode) or kind not in (*_SCALARS, "str"):
            tag = f"!!{kind}" if node.tag.startswith(_TAG) else node.tag
            raise ConfigError(f"{at(node.start_mark)}: YAML tag {tag} is not accepted, only plain values are")
        try:
            return loader.construct_object(node)
        except (ValueError, KeyError) as error:  # `!!int word`, or thousands of digits
            raise ConfigError(f"{at(node.start_mark)}: {node.value[:40]!r} is not a valid {kind}") from error

    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        return None if root is None else read(root)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise ConfigError(f"{at(mark)}: {error.problem or error.context}") from error
    except yaml.YAMLError as error:  # a character that YAML does not allow
        raise ConfigError(f"{name}: not YAML, {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise ConfigError(f"{name}: nested too deeply") from error


# ------------------------------------------------------------------------------------------------------ loading


def load(path: str | os.PathLike[str], overrides: Iterable[str] = (), *, preset: str | None = None) -> Config:
    """Read a YAML file, then its preset, then the overrides, and resolve `${...}`: later values win.

    `inherit: other.yaml` (a file in the same folder) is read first and merged under. Mappings merge key by key, except
    that one giving another `name` replaces the inherited one whole: the keys of another class mean nothing to it. An
    override `a.b[0]=value` (the value in YAML) sets exactly that key, whether the file has it or not: the constructor
    decides. Interpolations are OmegaConf's. Raises ConfigError naming file, line and key.
    """
    config = _read_file(Path(path), ())
    presets = {name: config.pop(name) for name in PRESETS if name in config}
    if preset is not None:
        if preset not in presets:
            raise ConfigError(f"{path}: no preset {preset!r}; it has {sorted(presets) or 'none'}")
        config = merge(config, presets[preset])
    for override in overrides:
        _override(config, override)
    try:
        values = OmegaConf.to_container(OmegaConf.create(_plain(config)), resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        key = str(getattr(error, "full_key", None) or "")
        raise ConfigError(f"{_source(config, key)}: {key}: {str(error).splitlines()[0]}") from error
    return _attach(values, config, config.source, "")


def load_flat(path: str | os.PathLike[str]) -> Config:
    """Read a YAML mapping whose keys may be dotted (`a.b[0].c`), as it stands: nothing inherited, nothing resolved."""
    return _read_mapping(Path(path), "", _DOTTED)


def save(config: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write a resolved configuration, atomically; `load` gives it back equal."""
    text = yaml.dump(_plain(config, escaped=True), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
    with atomic_write(path) as file:
        file.write(text.encode())


def _plain(value: Any, *, escaped: bool = False) -> Any:
    """Plain dicts and lists; `escaped` keeps a string that holds "${" after resolution from resolving again."""
    if isinstance(value, Mapping):
        return {key: _plain(item, escaped=escaped) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, escaped=escaped) for item in value]
    return value.replace("${", r"\${") if escaped and isinstance(value, str) else value


def _read_mapping(path: Path, named: str = "", key_pattern: str = _WORD) -> Config:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start})") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot read, {error.strerror}{named}") from error
    config = _parse(text, str(path), key_pattern=key_pattern)
    if config is None:
        raise ConfigError(f"{path}: the file is empty")
    if not isinstance(config, Config):
        raise ConfigError(f"{path}: must be a mapping of keys to values, got {_show(config)}")
    return config


def _read_file(path: Path, above: tuple[Path, ...]) -> Config:
    config = _read_mapping(path, f", inherited by {above[-1]}" if above else "")
    for name in PRESETS:
        if not isinstance(config.get(name, config), Config):
            raise ConfigError(f"{config.sources[name]}: {name} must be a mapping, got {_show(config[name])}")
    if "inherit" not in config:
        return config
    parent, source = config.pop("inherit"), config.sources["inherit"]
    if not isinstance(parent, str) or Path(parent).name != parent or "\\" in parent:
        raise ConfigError(f"{source}: inherit must be the name of a file in {path.parent}, got {_show(parent)}")
    if path.parent / parent in (*above, path):
        raise ConfigError(f"{source}: {path} inherits itself through {parent}")
    return merge(_read_file(path.parent / parent, (*above, path)), config)


VARIED = ("runs", "across")  # sections that are no part of an experiment but stand for several


def merge(base: Config, over: Config) -> Config:
    """`base` with the values of `over`, key by key; a mapping that gives another `name` replaces the old one whole."""
    merged = Config(base, over.source, base.sources | over.sources)
    for key, value in over.items():
        old = base.get(key)
        if isinstance(old, Config) and isinstance(value, Config) and _same_name(old, value):
            value = merge(old, value)
        merged[key] = value
    return merged


def variants(config: Config) -> dict[str, Config]:
    """What a configuration with `runs` stands for: one per entry, whose values replace those of the rest, by name.

    With `across`, another such mapping, each run is there once with each of its entries, under RUN_ENTRY. A
    configuration without `runs` is refused.
    """
    shared = Config({k: v for k, v in config.items() if k not in VARIED}, config.source, config.sources)
    for key in VARIED:
        entries = config.get(key, Config({}, config.source, {}) if key == "across" else None)
        if not isinstance(entries, Config) or not all(isinstance(own, Config) for own in entries.values()):
            raise ConfigError(f"{config.source}: needs {key}: a mapping of names to what differs between them")
    across = config.get("across", {})
    found: dict[str, Config] = {}
    for name, own in config["runs"].items():
        merged = merge(shared, own)
        found |= {f"{name}_{also}": merge(merged, more) for also, more in across.items()} or {name: merged}
    return found


def _same_name(old: Config, new: Config) -> bool:
    return old.get("name", new.get("name")) == new.get("name", old.get("name"))


def _steps(key: str) -> list[str | int]:
    """`a.b[0]` -> ["a", "b", 0]."""
    return [int(index) if index else word for index, word in re.findall(r"\[(\d+)\]|([\w-]+)", key)]


def _override(config: Config, text: str) -> None:
    source = f"override {text!r}"
    key, _, value = (part.strip() for part in text.partition("="))
    if not value or not re.fullmatch(_DOTTED, key):
        raise ConfigError(f"{source} must look like a.b=value (a.b=null for none)")
    steps = _steps(key)
    node: Any = config
    holder, entry = config, str(steps[0])  # the mapping, and its key, that the value or its list stands in
    for depth, step in enumerate(steps):
        fits = isinstance(node, Config) if isinstance(step, str) else isinstance(node, list) and step < len(node)
        if not fits:
            what = f"no key {step!r}" if isinstance(step, str) else f"no item {step}"
            raise ConfigError(f"{source}: {''.join(map(_subscript, steps[:depth]))[1:]} is {_show(node)}, with {what}")
        if isinstance(step, str):
            holder, entry = node, step
        if depth == len(steps) - 1:
            node[step] = _parse(value, source, with_lines=False)
            in_list = isinstance(step, int)
            holder.sources[entry] = f"{holder.sources[entry]} with {source}" if in_list else source
        elif isinstance(step, str) and node.get(step) is None:
            node[step] = Config({}, source, {})
            node.sources[step] = source
        node = node[step]


def _subscript(step: str | int) -> str:
    return f".{step}" if isinstance(step, str) else f"[{step}]"


def _source(config: Config, key: str) -> str:
    """Where the value at a dotted key came from, or the nearest mapping above it."""
    node: Any = config
    source = config.source
    for step in _steps(key):
        if isinstance(node, Config):
            source = node.sources.get(str(step), source)
        node = node[step]
    return source


def _attach(value: Any, raw: Any, source: str, key: str) -> Any:
    """Resolved values with the sources and keys of the unresolved ones."""
    if isinstance(value, dict):
        raw = raw if isinstance(raw, Config) else Config({}, source, {})  # what an interpolation brought here
        sources = {name: raw.sources.get(name, source) for name in value}
        children = {name: _attach(item, raw.get(name), sources[name], _join(key, name)) for name, item in value.items()}
        return Config(children, source, sources, key)
    if isinstance(value, list):
        raw = raw if isinstance(raw, list) else [None] * len(value)
        return [
            _attach(item, old, old.source if isinstance(old, Config) else source, f"{key}[{index}]")
            for index, (item, old) in enumerate(zip(value, raw))
        ]
    return value


# ----------------------------------------------------------------------------------------------------- building


def build(node: Any, table: Mapping[str, Callable[..., Any]], /, *, where: str = "", **built: Any) -> Any:
    """Call the entry of `table` that `node["name"]` names with the rest of `node`, checked, and with `built`.

    `built` are objects made by code (a backbone for a head); their names may not be set in the file. `where` is the
    dotted key for the messages, needed only when `node` is not a mapping loaded from a file. Raises ConfigError on the
    first unknown or missing key, wrong type, or ValueError of the constructor.
    """
    target, rest = choose(node, table, where=where)
    return construct(target, rest, called=repr(node["name"]), **built)


def choose(
    node: Any, table: Mapping[str, Callable[..., Any]], /, *, where: str = ""
) -> tuple[Callable[..., Any], Config]:
    """The entry of `table` that `node["name"]` names, and the rest of `node`; ConfigError where there is none."""
    node = _node(node, where)
    name = node.get("name")
    if not isinstance(name, str) or name not in table:
        what = f"unknown name {_show(name)}" + _near(name, table) if "name" in node else "needs a name"
        raise ConfigError(f"{_at(node, 'name')}: {what}; choose from {sorted(table)}")
    rest = {key: value for key, value in node.items() if key != "name"}
    return table[name], Config(rest, node.source, node.sources, node.key)


def construct(target: Callable[..., Any], node: Any, /, *, where: str = "", called: str = "", **built: Any) -> Any:
    """Call `target` with the values of `node`, checked against its signature, and with `built`.

    Values of a parameter annotated with a dataclass or named tuple are constructed in turn from their mapping, those
    marked with `Named` from the class their mapping names. int is
    accepted where float is expected, bool never for a number; lists become tuples where the annotation says so.
    `called` is what the messages call the target. Raises as `build` does.
    """
    node = _node(node, where)
    called = called or getattr(target, "__name__", repr(target))
    values = arguments(target, node, called=called, built=built)
    try:
        return target(**values, **built)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{_at(node, '')}: {called}: {error}") from error


def arguments(
    target: Callable[..., Any], node: Any, /, *, where: str = "", called: str = "", built: Collection[str]
) -> dict[str, Any]:
    """The checked arguments that `construct` would call `target` with, beside those named in `built`.

    For finding the faults of a configuration before the slow work that comes first. Raises as `construct` does.
    """
    node = _node(node, where)
    called = called or getattr(target, "__name__", repr(target))
    parameters = _parameters(target)
    open_ended = [p for p in parameters.values() if p.kind is p.VAR_KEYWORD]
    named = {key: p for key, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    settable = {key: p for key, p in named.items() if key not in built}
    takes = "it takes " + (", ".join(_describe(p) for p in settable.values()) or "no key")
    values = {}
    for key, value in node.items():
        if key in built:
            raise ConfigError(f"{_at(node, key)}: is given to {called} by the program and cannot be set; {takes}")
        if key not in named and not open_ended:
            raise ConfigError(f"{_at(node, key)}: unknown key of {called}{_near(key, settable)}; {takes}")
        annotation = (named.get(key) or open_ended[0]).annotation
        try:
            values[key] = _convert(value, annotation, _join(node.key, key), node.sources.get(key, node.source))
        except _MismatchError as error:
            raise ConfigError(f"{_at(node, key)}{error.inside}: {error}") from None
    for key, parameter in settable.items():
        if parameter.default is parameter.empty and key not in values:
            raise ConfigError(f"{_at(node, '')}: {called} needs {_describe(parameter)}; {takes}")
    return values


class _MismatchError(Exception):
    """A value that does not fit an annotation; `inside` says where in the value."""

    def __init__(self, expected: str, value: Any, inside: str = ""):
        super().__init__(f"expected {expected}, got {_show(value)}")
        self.inside = inside


def _convert(value: Any, annotation: Any, key: str, source: str) -> Any:
    """The value as the annotation wants it, or _MismatchError."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation in (Any, object, inspect.Parameter.empty) or isinstance(annotation, str):
        return value  # nothing to check against (a string is a name known only to type checkers)
    if origin is Annotated:
        for mark in arguments[1:]:
            if isinstance(mark, Named) and isinstance(value, Mapping):
                node = value if isinstance(value, Config) else Config(value, source, {}, key)
                return build(Config({"name": mark.default, **node}, node.source, node.sources, node.key), mark.table)
        return _convert(value, arguments[0], key, source)
    if origin is Literal:
        if any(value == choice and type(value) is type(choice) for choice in arguments):
            return value
        raise _MismatchError(f"one of {', '.join(map(repr, arguments))}{_near(value, arguments)}", value)
    if origin in (Union, types.UnionType):
        members = sorted(arguments, key=lambda member: member is not type(value))  # 3 for `float | int` stays an int
        nested: _MismatchError | None = None
        for member in members:
            try:
                return _convert(value, member, key, source)
            except _MismatchError as error:
                nested = nested or (error if error.inside else None)  # the right kind, with a fault inside
        raise nested or _MismatchError(_say(annotation), value)
    if annotation is None or annotation is type(None):
        if value is not None:
            raise _MismatchError("null", value)
        return None
    if not isinstance(origin or annotation, type):
        return value  # a type variable or an alias
    kind: Any = origin or annotation
    if kind is float and type(value) is int:
        return float(value)
    if kind in (int, float) and isinstance(value, bool):
        raise _MismatchError(_say(annotation), value)
    if issubclass(kind, os.PathLike) and isinstance(value, str):
        return Path(value)
    if kind in (tuple, list, set, frozenset, Sequence, Collection, Iterable):
        if not isinstance(value, list | tuple):
            raise _MismatchError(_say(annotation), value)
        fixed = kind is tuple and bool(arguments) and arguments[-1] is not Ellipsis
        if fixed and len(value) != len(arguments):
            raise _MismatchError(f"{len(arguments)} values, {_say(annotation)}", value)
        each = arguments if fixed else (arguments[:1] or (Any,)) * len(value)
        items = [
            _convert_inside(item, member, key, f"[{index}]", source)
            for index, (item, member) in enumerate(zip(value, each))
        ]
        return items if inspect.isabstract(kind) else kind(items)
    if issubclass(kind, Mapping) and isinstance(value, Mapping):
        if not arguments:
            return value
        return Config(
            {name: _convert_inside(item, arguments[1], key, f".{name}", source) for name, item in value.items()},
            source,
            getattr(value, "sources", {}),
            key,
        )
    if isinstance(value, kind):
        return value
    if dataclasses.is_dataclass(kind) or hasattr(kind, "_fields"):
        if isinstance(value, Mapping):
            return construct(kind, value if isinstance(value, Config) else Config(value, source, {}, key))
        raise _MismatchError(f"a mapping for {kind.__name__}", value)
    if kind.__module__ == "builtins":
        raise _MismatchError(_say(annotation), value)
    raise _MismatchError(f"a {kind.__name__}, which only the program can give", value)


def _convert_inside(value: Any, annotation: Any, key: str, inside: str, source: str) -> Any:
    try:
        return _convert(value, annotation, key + inside, source)
    except _MismatchError as error:
        error.inside = inside + error.inside
        raise


def _parameters(target: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(target, eval_str=True).parameters
    except NameError:  # an annotation imported for type checkers only
        return inspect.signature(target).parameters


def _node(node: Any, where: str) -> Config:
    if isinstance(node, Config):
        return node
    if not isinstance(node, Mapping):
        raise ConfigError(f"{where or 'configuration'}: must be a mapping, got {_show(node)}")
    return Config(node, "configuration", {}, where)


def _at(node: Config, key: str) -> str:
    """`configs/a.yaml, line 7: model.head.hidden`, for the start of a message."""
    dotted = _join(node.key, key if key in node else "")
    return node.sources.get(key, node.source) + (f": {dotted}" if dotted else "")


def _join(*keys: str) -> str:
    return ".".join(key for key in keys if key)


def _say(annotation: Any) -> str:
    if isinstance(annotation, str):
        return annotation
    if get_origin(annotation) is Literal:
        return " or ".join(map(repr, get_args(annotation)))
    if get_origin(annotation) in (Union, types.UnionType):
        return " or ".join(_say(member) for member in get_args(annotation))
    if annotation in (None, type(None)):
        return "null"
    return inspect.formatannotation(annotation)


def _describe(parameter: inspect.Parameter) -> str:
    text = parameter.name
    if parameter.annotation is not parameter.empty:
        text += f": {_say(parameter.annotation)}"
    if parameter.default is not parameter.empty:
        text += f" = {'...' if 'object at' in repr(parameter.default) else repr(parameter.default)}"
    return text


def _near(value: Any, choices: Iterable[Any]) -> str:
    near = difflib.get_close_matches(str(value), [str(choice) for choice in choices], n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _show(value: Any) -> str:
    if value is None:
        return "null"
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"
