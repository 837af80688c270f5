"""How examples are made: mutations of valid files, grammars, and raw bytes."""

import copy
import json
from collections.abc import Iterator
from typing import Any

import yaml
from hypothesis import strategies as st

# What parsers stumble over, alone or many times
_TOKENS = (
    "---\n", "...\n", "- ", "? ", ": ", "[", "]", "{", "}", "<<: ", "&a ", "*a ", "!!bool ", "!!int ", "!!float ",
    "!!timestamp ", "!!binary ", "!!set ", "!!omap ", "!!null ", "%YAML 1.1\n", "|\n", ">-\n", "\n", "\r", "\t",
    "\0", "\ufeff", "\u2028", "\ud7ff", "1:", "0x", "0x_", "9" * 70, "1e999", ".nan", "~", "'", '"', "\\", "#", "](",
    "<!--", "license: mit\n", "license: llama2\n", "base_model: x\n", "2026-02-30", "20260101", "a" * 300,
    "gpt-4o ", "mit and (", "LICENSE", "true", "null",
)  # fmt: skip
tokens = st.sampled_from(_TOKENS)
counts = st.one_of(st.integers(1, 70), st.integers(1, 70), st.sampled_from([500, 3000, 20_000]))

junk = st.one_of(
    st.sampled_from(
        [
            None,
            True,
            False,
            0,
            -1,
            1,
            1.5,
            10**9,
            10**15,
            2**53 + 1,
            1e300,
            "",
            "x",
            "\0",
            "\ud800",
            "a" * 300,
            "漢" * 150,
        ]
    ),
    st.sampled_from(
        ["../x", "/etc/hostname", "model.safetensors", "own", "mit", "llama2", "unknown", "self", "2026-11-24"]
    ),
    st.sampled_from([[], {}, [[]], [None], [{}], {"x": []}, [1], ["x"], {"model": ["x"]}]),
    st.integers(100, 900).map(lambda depth: json.loads("[" * depth + "]" * depth)),
    st.text(max_size=8),
)


@st.composite
def mutated(draw: Any, seeds: tuple[bytes, ...]) -> bytes:
    """Change some places of a valid file: bytes flipped, dropped, doubled, and tokens put in, some of them often."""
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        match draw(st.sampled_from(["token", "token", "flip", "byte", "drop", "double"])):
            case "token":
                data[at:at] = (draw(tokens) * draw(counts)).encode("utf-8", "surrogatepass")
            case "flip" if data:
                data[at] ^= 1 << draw(st.integers(0, 7))
            case "byte" if data:
                data[at] = draw(st.integers(0, 255))
            case "drop":
                del data[at : at + draw(st.integers(1, 60))]
            case "double":
                piece = data[at : at + draw(st.integers(1, 60))]
                data[at:at] = piece * draw(st.integers(1, 3))
    return bytes(data)


def raw(max_size: int = 300) -> st.SearchStrategy[bytes]:
    """Bytes, and rows of tokens, that follow no grammar."""
    rows = st.lists(st.one_of(tokens, st.text(max_size=4)), max_size=12).map("".join)
    return st.one_of(st.binary(max_size=max_size), rows.map(lambda text: text.encode("utf-8", "surrogatepass")))


@st.composite
def written(draw: Any, values: st.SearchStrategy[Any]) -> tuple[Any, str]:
    """Draw a value, and one of the many ways in which YAML can say it."""
    value = draw(values)
    if draw(st.integers(0, 4)) == 0:
        return value, json.dumps(value, ensure_ascii=draw(st.booleans())) + "\n"
    text = yaml.safe_dump(
        value,
        default_flow_style=draw(st.sampled_from([False, False, True, None])),
        default_style=draw(st.sampled_from([None, None, '"', "'"])),
        sort_keys=draw(st.booleans()),
        indent=draw(st.sampled_from([None, 4, 9])),
        allow_unicode=draw(st.booleans()),
        width=draw(st.sampled_from([20, 10_000])),
    )
    if draw(st.booleans()):
        text = f"# a comment\n{text}# another\n"
    return value, text


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of everything inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


@st.composite
def changed(draw: Any, value: Any, all_places: tuple[tuple[Any, ...], ...]) -> Any:
    """Change some places of a JSON value: another value, one from elsewhere in it, none, two, or a key more."""
    made = copy.deepcopy(value)
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        path = draw(st.sampled_from(all_places))
        other = draw(st.sampled_from(all_places))
        try:
            holder = at(made, path[:-1])
            match draw(st.sampled_from(["junk", "junk", "swap", "drop", "double", "key"])):
                case "junk":
                    holder[path[-1]] = copy.deepcopy(draw(junk))
                case "swap":
                    holder[path[-1]] = copy.deepcopy(at(value, other))
                case "drop":
                    del holder[path[-1]]
                case "double" if isinstance(holder, list):
                    holder.append(copy.deepcopy(holder[path[-1]]))
                case "key" if isinstance(holder, dict):
                    holder[
                        draw(st.sampled_from(["x", "signature", "voice", "undeclared", "sure", "overrides", ""]))
                    ] = copy.deepcopy(draw(junk))
        except (KeyError, IndexError, TypeError):
            continue  # an earlier change took that place away
    return made


def at(value: Any, path: tuple[Any, ...]) -> Any:
    """Return what lies at a path."""
    for key in path:
        value = value[key]
    return value
