"""Configuration: what a file may say, where each fault is reported, and what reaches the constructor."""

import dataclasses
import errno
import os
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import pytest

from vision3dgen import files
from vision3dgen.config import Config, ConfigError, build, construct, load, save, variants


@dataclasses.dataclass
class Schedule:
    kind: Literal["cosine", "step"]
    warmup: int = 0


class Size(NamedTuple):
    height: int
    width: int


class Trunk:
    def __init__(self, channels: int, *, dropout: float = 0.0, bias: bool = True, act: str | None = None):
        if channels % 2:
            raise ValueError(f"channels must be even, got {channels}")
        self.channels, self.dropout, self.bias, self.act = channels, dropout, bias, act


class Head:
    def __init__(self, trunk: Trunk, hidden: int = 256, blocks: tuple[int, ...] = (3, 5)):
        self.trunk, self.hidden, self.blocks = trunk, hidden, blocks


TABLE = {"trunk": Trunk, "head": Head}


@pytest.fixture
def write(tmp_path):
    def write(text: str | bytes, name: str = "a.yaml") -> Path:
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def fault(call: Callable[[], Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        call()
    return str(caught.value)


# ------------------------------------------------------------------------------------------------------ loading


def test_scalars_are_yaml_1_2(write):
    pairs = {
        "1e-3": 1e-3, "03001627": "03001627", "02691156": "02691156", "04401088e": "04401088e", "yes": "yes",
        "off": "off", "true": True, "null": None, "~": None, "": None, "100_000": 100_000, "0x1F": 31, "-2.5": -2.5,
        ".inf": float("inf"), "'7'": "7", "1.": 1.0, "-.5": -0.5, "12:30": "12:30", "2024-01-02": "2024-01-02", "-0": 0,
        "1.5.2": "1.5.2", "2E3": 2e3,
    }  # fmt: skip
    config = load(write("".join(f"k{index}: {text}\n" for index, text in enumerate(pairs))))
    assert list(config.values()) == list(pairs.values())
    assert [type(value) for value in config.values()] == [type(value) for value in pairs.values()]


def test_interpolations_resolve(write, monkeypatch):
    monkeypatch.setenv("VISION3DGEN_TEST", "7")
    text = "n: 3\na: {x: '${n}', y: '${.x}', z: 'v${n}'}\nb: '${a}'\nc: ['${n}', {d: '${c[0]}'}]\n"
    text += "e: '${oc.env:VISION3DGEN_TEST}'\n"
    config = load(write(text), ["n=5"])
    assert config == {
        "n": 5,
        "a": {"x": 5, "y": 5, "z": "v5"},
        "b": {"x": 5, "y": 5, "z": "v5"},
        "c": [5, {"d": 5}],
        "e": "7",
    }


@pytest.mark.parametrize(
    "value", ["${nowhere}", "${m.nowhere}", "${.k}", "${k", "${nosuch:1}", "${oc.env:VISION3DGEN_NOT_SET}", "???"]
)
def test_faulty_interpolation_names_file_line_and_key(write, value):
    path = write(f"m:\n  j: 1\n  k: '{value}'\n")
    assert fault(lambda: load(path)).startswith(f"{path}, line 3: m.k: ")
    assert fault(lambda: load(write("m: {}\n"), [f"m.k='{value}'"])).startswith("override ")


def test_interpolation_inside_a_list_is_located(write):
    path = write("m:\n  - 1\n  - k: '${nowhere}'\n")
    assert fault(lambda: load(path)).startswith(f"{path}, line 3: m[1].k: ")


@pytest.mark.parametrize(
    "text, line, words",
    [
        ("a: 1\nb: !!python/object/apply:os.system ['true']\n", 2, "python/object/apply:os.system is not accepted"),
        ("a: 1\nb: !!python/tuple [1, 2]\n", 2, "!!python/tuple is not accepted"),
        ("a: !mine 3\n", 1, "!mine is not accepted"),
        ("a: !!set {x, y}\n", 1, "!!set is not accepted"),
        ("a: 1\nb:\n  c: 1\n  c: 2\n", 4, "key 'c' is given twice"),
        ("a: 1\n3: 2\n", 2, "must be a word"),
        ("? \n: 1\n", 1, "must be a word"),
        ("a.b: 1\n", 1, "must be a word"),
        ("[1, 2]: 3\n", 1, "must be a word"),
        ("<<: {a: 1}\n", 1, "must be a word"),
        ("a: 1\nb: [1, 2\n", 3, "expected ',' or ']'"),
        ("a: 1\n---\nb: 2\n", 2, "another document"),
        ("a: &x [1]\nb: *x\n", 2, "aliases are not accepted"),
        ("a: 1\nb: !!int word\n", 2, "not a valid int"),
        ("a: 1\nb: " + "9" * 5000 + "\n", 2, "not a valid int"),
        ("a: 1\ntiny: 3\n", 2, "tiny must be a mapping, got 3 (int)"),
        ("a: 1\ninherit: ../b.yaml\n", 2, "must be the name of a file in"),
        ("a: 1\ninherit: /etc/b.yaml\n", 2, "must be the name of a file in"),
        ("inherit: a.yaml\n", 1, "inherits itself"),
    ],
)
def test_faulty_file_names_file_and_line(write, text, line, words):
    path = write(text)
    message = fault(lambda: load(path))
    assert message.startswith(f"{path}, line {line}: ")
    assert words in message


def test_python_tag_runs_nothing(write, tmp_path):
    fault(lambda: load(write(f"b: !!python/object/apply:pathlib.Path.touch ['{tmp_path}/ran']\n")))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "the file is empty"),
        (b"# only a comment\n", "the file is empty"),
        (b"- 1\n- 2\n", "must be a mapping of keys to values, got [1, 2] (list)"),
        (b"words\n", "must be a mapping"),
        (b"a: caf\xe9\n", "not UTF-8 text (byte 6)"),
        (b"a: \x01\n", "not YAML"),
        (b"a: " + b"[" * 5000, "nested too deeply"),
    ],
)
def test_file_that_is_no_configuration(write, content, words):
    path = write(content)
    message = fault(lambda: load(path))
    assert message.startswith(str(path))
    assert words in message


def test_missing_file_and_missing_parent(write, tmp_path):
    message = fault(lambda: load(tmp_path / "none.yaml"))
    assert str(tmp_path / "none.yaml") in message
    assert "No such file" in message
    path = write("inherit: none.yaml\n")
    assert f"inherited by {path}" in fault(lambda: load(path))
    assert "Is a directory" in fault(lambda: load(tmp_path))


def test_byte_order_mark_is_skipped(write):
    assert load(write(b"\xef\xbb\xbfa: 1\n")) == {"a": 1}


def test_inherit_merges_and_a_new_name_replaces(write):
    write(
        "data: {root: x, views: 24}\nhead: {name: voxel, base: 32}\nlist: [1, 2, 3]\ntiny: {data: {views: 1}}\n",
        "b.yaml",
    )
    path = write(
        "inherit: b.yaml\ndata: {views: 12}\nhead: {name: occupancy, hidden: 5}\nlist: [7]\ntiny: {head: {hidden: 2}}\n"
    )
    assert load(path) == {"data": {"root": "x", "views": 12}, "head": {"name": "occupancy", "hidden": 5}, "list": [7]}
    tiny = load(path, preset="tiny")
    assert tiny == {"data": {"root": "x", "views": 1}, "head": {"name": "occupancy", "hidden": 2}, "list": [7]}
    assert load(write("inherit: b.yaml\nhead: {base: 64}\n"))["head"] == {"name": "voxel", "base": 64}


def test_inheritance_cycle(write):
    path = write("inherit: b.yaml\n")
    other = write("inherit: a.yaml\n", "b.yaml")
    assert fault(lambda: load(path)) == f"{other}, line 1: {other} inherits itself through a.yaml"


def test_preset_must_be_there(write):
    path = write("a: 1\n")
    assert fault(lambda: load(path, preset="tiny")) == f"{path}: no preset 'tiny'; it has none"
    path = write("a: 1\ntiny: {a: 2}\n")
    assert fault(lambda: load(path, preset="small")) == f"{path}: no preset 'small'; it has ['tiny']"


def test_overrides_are_yaml_and_set_exactly_one_key(write):
    path = write("a: {b: 1, c: {d: 2}}\nl: [1, {m: 2}]\nn:\n")
    overrides = [
        "a.b=null",
        "a.c.d=[1, 2.5, x]",
        "l[0]=9",
        "l[1].m=03001627",
        "n.new.deep=1e-3",
        "s='1'",
        "u=x=y",
        " v = {w: 1} ",
    ]
    assert load(path, overrides) == {
        "a": {"b": None, "c": {"d": [1, 2.5, "x"]}},
        "l": [9, {"m": "03001627"}],
        "n": {"new": {"deep": 1e-3}},
        "s": "1",
        "u": "x=y",
        "v": {"w": 1},
    }
    assert load(path, ["a.c=5", "a.c=6"])["a"] == {"b": 1, "c": 6}
    assert load(path, ["a={z: 1}"])["a"] == {"z": 1}


@pytest.mark.parametrize("text", ["a", "a=", "=3", "a..b=1", "a b=1", "a[x]=1", ".a=1", "a[0=1"])
def test_malformed_override(write, text):
    path = write("a: 1\n")
    assert fault(lambda: load(path, [text])) == f"override {text!r} must look like a.b=value (a.b=null for none)"


@pytest.mark.parametrize(
    "text, words",
    [
        ("a.b=1", "a is 5 (int), with no key 'b'"),
        ("l[2]=1", "l is [1, {'m': 2}] (list), with no item 2"),
        ("l.m=1", "l is [1, {'m': 2}] (list), with no key 'm'"),
        ("l[1].m.x=1", "l[1].m is 2 (int), with no key 'x'"),
        ("a=[1", "expected ',' or ']'"),
        ("a=!!python/name:os.system x", "not accepted"),
        ("a={b: 1, b: 2}", "given twice"),
    ],
)
def test_override_that_fits_nowhere(write, text, words):
    message = fault(lambda: load(write("a: 5\nl: [1, {m: 2}]\n"), [text]))
    assert message.startswith(f"override {text!r}: ")
    assert words in message


def test_preset_comes_before_overrides(write):
    path = write("a: 1\nb: 1\nc: 1\ntiny: {a: 2, b: 2}\n")
    assert load(path, ["b=3"], preset="tiny") == {"a": 2, "b": 3, "c": 1}


def test_save_round_trips(write, tmp_path):
    text = (
        "a: 1e-5\nb: '03001627'\nc: '1e-3'\nd: 'yes'\ne: 'true'\nf: '12'\ng: ''\nh: null\ni: '\\${x}'\n"
        "j: [1, {k: '~'}]\nl: .inf\nm: é\nn: {}\no: []\np: '0x10'\nq: '.5'\nr: \"two\\nlines\"\n"
        "s: '${a}'\ntiny: {a: 2}\n"
    )
    config = load(write(text))
    assert config["i"] == "${x}"
    save(config, tmp_path / "saved.yaml")
    again = load(tmp_path / "saved.yaml")
    assert again == config
    assert [type(again[key]) for key in again] == [type(config[key]) for key in config]
    assert list(again) == list(config)
    save(again, tmp_path / "twice.yaml")
    assert (tmp_path / "twice.yaml").read_bytes() == (tmp_path / "saved.yaml").read_bytes()


def test_save_on_a_full_disk_keeps_the_old_file(write, tmp_path, monkeypatch):
    path = write("old: 1\n")

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left.*a\.yaml"):
        save({"new": 1}, path)
    assert path.read_text() == "old: 1\n"
    assert os.listdir(tmp_path) == ["a.yaml"]


def test_loaded_configuration_pickles(write):
    config = load(write("a: {b: [1, {c: 2}]}\n"))
    again = pickle.loads(pickle.dumps(config))
    assert again == config
    assert isinstance(again["a"], Config)
    assert again["a"]["b"][1].key == "a.b[1]"


# ----------------------------------------------------------------------------------------------------- building


def test_build_calls_the_named_constructor(write):
    config = load(write("trunk: {name: trunk, channels: 32, dropout: 1}\nhead: {name: head, blocks: [1, 2, 3]}\n"))
    trunk = build(config["trunk"], TABLE)
    assert (trunk.channels, trunk.dropout, trunk.bias, trunk.act) == (32, 1.0, True, None)
    assert isinstance(trunk.dropout, float)
    head = build(config["head"], TABLE, trunk=trunk)
    assert (head.trunk, head.hidden, head.blocks) == (trunk, 256, (1, 2, 3))
    assert config["trunk"] == {"name": "trunk", "channels": 32, "dropout": 1}


def test_unknown_key_names_everything(write):
    path = write("model:\n  trunk:\n    name: trunk\n    chanels: 32\n")
    assert fault(lambda: build(load(path)["model"]["trunk"], TABLE)) == (
        f"{path}, line 4: model.trunk.chanels: unknown key of 'trunk' (did you mean 'channels'?); "
        "it takes channels: int, dropout: float = 0.0, bias: bool = True, act: str or null = None"
    )


def test_fault_of_an_override_is_reported_as_one(write):
    path = write("trunk: {name: trunk, channels: 32}\n")
    message = fault(lambda: build(load(path, ["trunk.dropuot=0.5"])["trunk"], TABLE))
    assert message.startswith("override 'trunk.dropuot=0.5': trunk.dropuot: unknown key")
    message = fault(lambda: build(load(path, ["trunk.channels=wide"])["trunk"], TABLE))
    assert message == "override 'trunk.channels=wide': trunk.channels: expected int, got 'wide' (str)"


def test_fault_of_an_inherited_or_preset_value_names_its_own_file(write):
    parent = write("trunk: {name: trunk,\n  channels: wide, dropout: 0}\ntiny:\n  trunk:\n    bias: 3\n", "b.yaml")
    path = write("inherit: b.yaml\ntrunk: {dropout: 0.5}\n")
    assert fault(lambda: build(load(path)["trunk"], TABLE)).startswith(
        f"{parent}, line 2: trunk.channels: expected int"
    )
    message = fault(lambda: build(load(path, ["trunk.channels=2"], preset="tiny")["trunk"], TABLE))
    assert message.startswith(f"{parent}, line 5: trunk.bias: expected bool, got 3 (int)")


def test_missing_key_and_unknown_name(write):
    path = write("a: 1\ntrunk: {name: trunk}\nother: {name: trunc}\nlast: {channels: 3}\n")
    config = load(path)
    message = fault(lambda: build(config["trunk"], TABLE))
    assert message.startswith(f"{path}, line 2: trunk: 'trunk' needs channels: int; it takes channels: int, dropout")
    assert fault(lambda: build(config["other"], TABLE)) == (
        f"{path}, line 3: other.name: unknown name 'trunc' (str) (did you mean 'trunk'?); choose from ['head', 'trunk']"
    )
    assert (
        fault(lambda: build(config["last"], TABLE))
        == f"{path}, line 4: last: needs a name; choose from ['head', 'trunk']"
    )
    assert "unknown name [1]" in fault(lambda: build({"name": [1]}, TABLE))
    assert fault(lambda: build(config["a"], TABLE, where="a")) == "a: must be a mapping, got 1 (int)"


def test_built_objects_may_not_come_from_the_file(write):
    path = write("head: {name: head, trunk: resnet}\n")
    message = fault(lambda: build(load(path)["head"], TABLE, trunk=Trunk(2)))
    assert message == (
        f"{path}, line 1: head.trunk: is given to 'head' by the program and cannot be set; "
        "it takes hidden: int = 256, blocks: tuple[int, ...] = (3, 5)"
    )
    assert "expected a Trunk, which only the program can give" in fault(lambda: build(load(path)["head"], TABLE))
    with pytest.raises(TypeError, match="nonsense"):  # a fault of the program, not of the file
        build({"name": "trunk", "channels": 2}, TABLE, nonsense=1)


def test_value_error_of_the_constructor_is_located(write):
    path = write("a: 1\ntrunk: {name: trunk, channels: 3}\n")
    assert fault(lambda: build(load(path)["trunk"], TABLE)) == (
        f"{path}, line 2: trunk: 'trunk': channels must be even, got 3"
    )


def test_plain_mappings_build_too():
    assert build({"name": "trunk", "channels": 4}, TABLE).channels == 4
    assert fault(lambda: build({"name": "trunk", "channels": "4"}, TABLE, where="model.trunk")) == (
        "configuration: model.trunk.channels: expected int, got '4' (str)"
    )


def accepts(annotation: Any, value: Any) -> Any:
    """What a parameter with this annotation receives when the file says `value`."""

    def target(x):
        return x

    target.__annotations__ = {"x": annotation}
    return construct(target, {"x": value})


@pytest.mark.parametrize(
    "annotation, value, expected",
    [
        (int, 3, 3),
        (float, 3, 3.0),
        (float, 2.5, 2.5),
        (int | float, 3, 3),
        (float | int, 3, 3),
        (bool | int, 1, 1),
        (float | None, None, None),
        (float | None, 1, 1.0),
        (str, "3", "3"),
        (Any, [1, "a"], [1, "a"]),
        (Literal["a", 1, None], 1, 1),
        (Literal["a", 1, None], None, None),
        (list[float], [1, 2.5], [1.0, 2.5]),
        (tuple[int, ...], [], ()),
        (tuple[int, str], [1, "a"], (1, "a")),
        (tuple[tuple[int, int], ...], [[1, 2], [3, 4]], ((1, 2), (3, 4))),
        (list, [1, "a"], [1, "a"]),
        (set[str], ["b", "a", "b"], {"a", "b"}),
        (Sequence[int], [1, 2], [1, 2]),
        (dict[str, float], {"a": 1}, {"a": 1.0}),
        (dict, {"a": [1]}, {"a": [1]}),
        (Path, "a/b", Path("a/b")),
        (str | Path, "a/b", "a/b"),
        (int | list[int], [1], [1]),
        (Annotated[float, "metres"], 1, 1.0),
        (Schedule, {"kind": "step"}, Schedule("step")),
        (list[Schedule], [{"kind": "step", "warmup": 2}], [Schedule("step", 2)]),
        (Schedule | None, {"kind": "cosine"}, Schedule("cosine")),
        (Size, {"height": 2, "width": 3}, Size(2, 3)),
        ("Unknown", 5, 5),
    ],
)
def test_accepted_values(annotation, value, expected):
    received = accepts(annotation, value)
    assert received == expected
    assert type(received) is type(expected) or isinstance(received, Config)


@pytest.mark.parametrize(
    "annotation, value, words",
    [
        (int, True, "x: expected int, got True (bool)"),
        (float, False, "x: expected float, got False (bool)"),
        (int | float, True, "x: expected int or float, got True (bool)"),
        (int, 3.0, "x: expected int, got 3.0 (float)"),
        (float, "1e-3", "x: expected float, got '1e-3' (str)"),
        (bool, 1, "x: expected bool, got 1 (int)"),
        (bool, "yes", "x: expected bool, got 'yes' (str)"),
        (str, 3, "x: expected str, got 3 (int)"),
        (str, None, "x: expected str, got null"),
        (None, 3, "x: expected null, got 3 (int)"),
        (float | None, "a", "x: expected float or null, got 'a' (str)"),
        (Literal["adam", "sgd"], "adm", "x: expected one of 'adam', 'sgd' (did you mean 'adam'?), got 'adm' (str)"),
        (Literal[1, 2], True, "x: expected one of 1, 2, got True (bool)"),
        (list[int], "abc", "x: expected list[int], got 'abc' (str)"),
        (list[int], [1, "a"], "x[1]: expected int, got 'a' (str)"),
        (tuple[int, int], [1, 2, 3], "x: expected 2 values, tuple[int, int], got [1, 2, 3] (list)"),
        (tuple[tuple[int, int], ...], [[1, 2], [3, None]], "x[1][1]: expected int, got null"),
        (dict[str, int], {"a": 1, "b": "c"}, "x.b: expected int, got 'c' (str)"),
        (dict[str, int], [1], "x: expected dict[str, int], got [1] (list)"),
        (dict[str, list[int]] | None, {"a": [1, "b"]}, "x.a[1]: expected int, got 'b' (str)"),
        (Schedule, {"kind": "step", "warmup": "a"}, "x.warmup: expected int, got 'a' (str)"),
        (Schedule, {"kind": "step", "warmpu": 1}, "x.warmpu: unknown key of Schedule (did you mean 'warmup'?)"),
        (Schedule, {}, "x: Schedule needs kind: 'cosine' or 'step'"),
        (Schedule, 3, "x: expected a mapping for Schedule, got 3 (int)"),
        (list[Schedule], [{"kind": "step"}, {"kind": "no"}], "x[1].kind: expected one of 'cosine', 'step', got 'no'"),
        (Callable[[int], int], "f", "x: expected a Callable, which only the program can give, got 'f' (str)"),
        (Trunk, "resnet", "x: expected a Trunk, which only the program can give, got 'resnet' (str)"),
    ],
)
def test_refused_values(annotation, value, words):
    message = fault(lambda: accepts(annotation, value))
    assert message.startswith("configuration: ")
    assert words in message


def test_fault_inside_a_list_keeps_file_and_override(write):
    def target(sizes: list[int], schedules: list[Schedule]):
        return sizes, schedules

    path = write("sizes: [1, 2]\nschedules:\n  - kind: step\n  - kind: step\n    warmup: no\n")
    config = load(path)
    assert (
        fault(lambda: construct(target, config)) == f"{path}, line 5: schedules[1].warmup: expected int, got 'no' (str)"
    )
    message = fault(lambda: construct(target, load(path, ["sizes[1]=a"])))
    assert message == f"{path}, line 1 with override 'sizes[1]=a': sizes[1]: expected int, got 'a' (str)"
    message = fault(lambda: construct(target, load(path, ["schedules[1]={kind: no}"])))
    assert message.startswith("override 'schedules[1]={kind: no}': schedules[1].kind: expected one of")


def test_var_keywords_are_open_and_checked(write):
    def target(a: int, *args: int, **rest: float):
        return a, rest

    path = write("a: 1\nb: 2\nc: wide\n")
    assert construct(target, {"a": 1, "b": 2}) == (1, {"b": 2.0})
    assert fault(lambda: construct(target, load(path))) == f"{path}, line 3: c: expected float, got 'wide' (str)"


def test_sections_reach_a_function_as_mappings_with_their_sources(write):
    def train(model: dict[str, Any], data: dict, steps: int = 10):
        return build(model, TABLE)

    path = write("model: {name: trunk,\n channels: no}\ndata: {root: x}\n")
    assert fault(lambda: construct(train, load(path))).startswith(f"{path}, line 2: model.channels: expected int")
    assert "(did you mean 'steps'?)" in fault(lambda: construct(train, load(path, ["step=3"])))


def test_variants_are_runs_times_across(write):
    path = write(
        "a: 1\nmodel: {name: one, width: 2}\n"
        "runs: {plain: {}, wide: {model: {width: 5}}}\nacross: {x: {a: 2}, y: {model: {name: two}}}\n"
    )
    found = variants(load(path))
    assert {name: dict(own) for name, own in found.items()} == {
        "plain_x": {"a": 2, "model": {"name": "one", "width": 2}},
        "plain_y": {"a": 1, "model": {"name": "two"}},
        "wide_x": {"a": 2, "model": {"name": "one", "width": 5}},
        "wide_y": {"a": 1, "model": {"name": "two"}},
    }
    alone = variants(load(write("a: 1\nruns: {plain: {}, other: {a: 3}}\n")))
    assert {name: dict(own) for name, own in alone.items()} == {"plain": {"a": 1}, "other": {"a": 3}}


@pytest.mark.parametrize(
    "text, key", [("a: 1", "runs"), ("runs: [1]", "runs"), ("runs: {x: {}}\nacross: {y: 1}", "across")]
)
def test_variants_refuse_what_is_no_mapping_of_mappings(write, text, key):
    with pytest.raises(ConfigError, match=f"needs {key}: a mapping"):
        variants(load(write(text)))
