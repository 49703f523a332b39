"""Recipe files with faults put into them: each is read, or refused with file and line; nothing else ever happens.

Prints how many files were read and how many were refused, by kind of error, and the slowest of them. What is read must
come back equal after it is written.

    python benchmarks/fuzz_recipes.py --examples 5000
"""

import argparse
import collections
import re
import tempfile
import time
import warnings
from pathlib import Path

import hypothesis.strategies as st
import yaml
from hypothesis import HealthCheck, Phase, given, settings

import llmcompress as lc
from llmcompress.recipe import parse_recipe, read_recipe, write_recipe

GALLERY = sorted((Path(__file__).resolve().parent.parent / "recipes").glob("*.yaml"))
SNIPPETS = [
    *(
        "&a",
        "*a",
        "&a [*a, *a]",
        "<<: *a",
        "!!python/object:os.system {}",
        "!x",
        "? ",
        ": ",
        "- ",
        "- - ",
        "{",
        "}",
        "[",
        "]",
    ),
    *(
        "\t",
        "\n",
        "\r",
        "#",
        "'",
        '"',
        '"\\U00110000"',
        '"\\xZZ"',
        "|",
        ">-",
        "---",
        "...",
        "%YAML 3",
        "\x00",
        "\ufeff",
        "\U0001f999",
    ),
    *(
        "1e999",
        "-.inf",
        ".nan",
        "0x",
        "9" * 60,
        "2:4",
        "null",
        "~",
        "yes",
        "''",
        "name",
        "steps",
        "recover",
        "version: 2",
        "[" * 40,
    ),
]
_MOST_PLACES = 2000
WRONG = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 300)
    | st.floats()
    | st.sampled_from(["auto", "", "2:4", "layers:3", "gptq", "pipeline", "original", "é", "a" * 300])
    | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8) | st.integers(), inner, max_size=3),
    max_leaves=8,
)


def seeds() -> list[str]:
    """Return recipes without a fault: those of the gallery, and each strategy with all of its fields."""
    steps = [lc.compressors.create(name) for name in lc.compressors if name != "pipeline"]
    single = [yaml.safe_dump({"version": 1, "steps": [step.to_dict()]}, sort_keys=False) for step in steps]
    return [*single, *(path.read_text(encoding="utf-8") for path in GALLERY)]


def _in_text(draw: st.DrawFn, text: str) -> str:
    """Break the text: a piece of it replaced, or a line deleted, repeated, moved or indented."""
    lines = text.splitlines()
    if not lines:
        return draw(st.sampled_from(SNIPPETS))
    at = draw(st.integers(0, len(lines) - 1))
    way = draw(st.sampled_from(["piece", "piece", "delete", "repeat", "move", "indent", "cut"]))
    if way == "piece":
        start = draw(st.integers(0, len(text)))
        return text[:start] + draw(st.sampled_from(SNIPPETS)) + text[start + draw(st.integers(0, 12)) :]
    if way == "cut":
        return text[: draw(st.integers(0, len(text)))]
    line = lines.pop(at)
    if way == "repeat":
        lines[at:at] = [line, line]
    elif way == "move":
        lines.insert(draw(st.integers(0, len(lines))), line)
    elif way == "indent":
        lines.insert(at, " " * draw(st.integers(1, 3)) + line if draw(st.booleans()) else line.lstrip())
    return "\n".join(lines)


def _in_tree(draw: st.DrawFn, text: str) -> str:
    """Put a wrong value or a misspelt key somewhere into what the text says."""
    try:
        tree = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):
        return text
    places = []
    stack = [tree]
    while stack and len(places) <= _MOST_PLACES:  # an earlier fault may have made a list that holds itself
        holder = stack.pop()
        keys = holder if isinstance(holder, dict) else range(len(holder)) if isinstance(holder, list) else ()
        for key in keys:
            places.append((holder, key))
            stack.append(holder[key])
    if not places or stack:
        return text
    holder, key = places[draw(st.integers(0, len(places) - 1))]
    way = draw(st.sampled_from(["value", "value", "key", "more"]))
    if way == "value" or isinstance(holder, list):
        holder[key] = draw(WRONG)
    elif way == "key":
        name = str(key)
        at = draw(st.integers(0, len(name)))
        holder[name[:at] + draw(st.sampled_from(["", "x", "_", name[:1]])) + name[at + 1 :]] = holder.pop(key)
    else:
        holder[draw(st.sampled_from(["name", "steps", "hidden", "bits", "recover"]) | st.text(max_size=5))] = draw(
            WRONG
        )
    try:
        return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
    except (yaml.YAMLError, ValueError, RecursionError):
        return text


@st.composite
def mutated(draw: st.DrawFn, texts: list[str]) -> bytes:
    """Draw a recipe file with one to four faults."""
    text = draw(st.sampled_from(texts))
    for _ in range(draw(st.integers(1, 4))):
        text = (_in_tree if draw(st.booleans()) else _in_text)(draw, text)
    content = text.encode("utf-8", errors="surrogatepass")
    return content if draw(st.integers(0, 19)) else content[:9] + b"\xff" + content[9:]


def check(content: bytes) -> str:
    """Read a file and return what came of it: `"read"`, or the name of the error; anything else is a bug.

    Raises:
        AssertionError: an error without file and line, or a recipe that is another one after it was written.
    """
    lines = len(re.split(rb"\r\n|\r|\n|\xc2\x85|\xe2\x80\xa8|\xe2\x80\xa9", content))
    refusal = None
    try:
        step = parse_recipe(content, "fuzzed.yaml")
    except lc.CompressionError as error:
        refusal = error
    if refusal is not None:
        found = re.match(r"fuzzed\.yaml, line (\d+)[ :]", str(refusal))
        assert found, f"no line in: {refusal}"
        assert 1 <= int(found[1]) <= lines, f"line {found[1]} of {lines}: {refusal}"
        return type(refusal).__name__
    chain = step if isinstance(step, lc.Pipeline) else lc.Pipeline(steps=[step])
    with tempfile.TemporaryDirectory() as folder:
        write_recipe(chain.to_dict(), Path(folder) / "again.yaml", description="1e5")
        again = read_recipe(Path(folder) / "again.yaml")
    assert again == chain, f"written and read, {chain} is {again}"
    return "read"


def run(examples: int) -> tuple[collections.Counter, float]:
    """Check so many files; return what came of them, and the seconds that the slowest took."""
    outcomes: collections.Counter = collections.Counter()
    slowest = [0.0]

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
    @given(mutated(seeds()))
    def one(content: bytes) -> None:
        start = time.perf_counter()
        outcomes[check(content)] += 1
        slowest[0] = max(slowest[0], time.perf_counter() - start)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        one()
    return outcomes, slowest[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=5000)
    outcomes, slowest = run(parser.parse_args().examples)
    print(f"{outcomes.total()} files, the slowest {slowest:.2f} s")
    for outcome, count in outcomes.most_common():
        print(f"- {outcome}: {count}")


if __name__ == "__main__":
    main()
