"""Writes `drawing_corpus.json`: 200 turns, valid or with one obvious mistake, and their operations.

The operations come first and the text is written from them, without the parser:

    python -m tests.golden.make_drawing_corpus
"""

import json
import pathlib
import random
import re
from collections.abc import Callable

PATH = pathlib.Path(__file__).parent / "drawing_corpus.json"
SIZES = [[616, 336], [448, 448], [168, 168], [640, 480]]
LABELS = ["table", "left chair", "sofa bed", "lamp 2", "plant-pot", "TV (wall)", "bin", "shelf"]
Item = dict
Case = dict


def main() -> None:
  cases = [*_valid(56), *_repaired(), *_by_hand()]
  names = [case["name"] for case in cases]
  assert len(cases) == len(set(names)) == 200, len(cases)
  lines = ",\n".join(json.dumps(case, ensure_ascii=True) for case in cases)
  PATH.write_text(f"[\n{lines}\n]\n")


# --- operations --------------------------------------------------------------------------------


def _items(random_: random.Random, tool: str, count: int) -> list[Item]:
  """Items as a model writes them, with distinct labels, inside the smallest image."""
  items = []
  for label in random_.sample(LABELS, count):
    x1, x2 = sorted(random_.sample(range(168), 2))
    y1, y2 = sorted(random_.sample(range(168), 2))
    item: Item = {"index": random_.randint(1, len(SIZES))}
    if tool == "box":
      item["bbox_2d"] = [x1, y1, x2, y2]
    else:
      item["start_point_2d"], item["end_point_2d"] = [x2, y1], [x1, y2]
    items.append(item | {"label": label})
  return items


def _operations(items: list[Item]) -> list[list]:
  """[tool, image, points, label] of items in pixels."""
  return [
    ["box", item["index"], item["bbox_2d"], item["label"]]
    if "bbox_2d" in item
    else ["line", item["index"], item["start_point_2d"] + item["end_point_2d"], item["label"]]
    for item in items
  ]


def _turn(block: str, action: str = "Object Mapper") -> str:
  return f"<think> I mark it. </think> Action: {action}\n```json\n{block}\n```"


def _case(name: str, text: str, operations: list[list], unit: str = "pixels", sizes=None) -> Case:
  return {
    "name": name,
    "unit": unit,
    "sizes": SIZES if sizes is None else sizes,
    "operations": operations,
    "text": text,
  }


# --- valid turns -------------------------------------------------------------------------------


def _valid(count: int) -> list[Case]:
  styles: list[Callable[[list[Item]], str]] = [
    lambda items: json.dumps(items),
    lambda items: json.dumps(items, separators=(",", ":")),
    lambda items: json.dumps(items, indent=2),
    lambda items: "[\n" + ",\n".join(json.dumps(item) for item in items) + "\n]",
    lambda items: json.dumps([dict(reversed(item.items())) for item in items]),
  ]
  cases = []
  for number in range(count):
    random_ = random.Random(number)
    tool = random_.choice(["box", "line"])
    items = _items(random_, tool, random_.randint(1, 4))
    action = "Object Mapper" if tool == "box" else "Path Tracer"
    text = _turn(styles[number % len(styles)](items), action)
    cases.append(_case(f"valid {number}", text, _operations(items)))
  return cases


# --- one mistake each --------------------------------------------------------------------------


def _each(items: list[Item], change: Callable[[str], str], separator: str = ", ") -> str:
  return "[" + separator.join(change(json.dumps(item)) for item in items) + "]"


def _repaired() -> list[Case]:
  blocks: dict[str, Callable[[list[Item]], str]] = {
    "python quotes": lambda items: repr(items),
    "trailing commas": lambda items: _each(items, lambda s: s.replace("}", ",}"))[:-1] + ",]",
    "double commas": lambda items: _each(items, lambda s: s.replace(", ", ",, "), ",,"),
    "no commas between items": lambda items: _each(items, str, "\n"),
    "no commas at all": lambda items: _each(items, lambda s: s.replace(",", " "), " "),
    "list not closed": lambda items: json.dumps(items)[:-1],
    "item and list not closed": lambda items: json.dumps(items)[:-2],
    "points not closed": lambda items: _each(items, lambda s: s.replace("],", ",")),
    "items not closed": lambda items: "[" + ", ".join(json.dumps(i)[:-1] for i in items) + "]",
    "too many brackets": lambda items: json.dumps(items) + "]}",
    "line comments": lambda items: _each(items, lambda s: s + " // here, or near\n"),
    "hash comments": lambda items: "# my boxes: [1]\n" + _each(items, lambda s: s + " # {\n"),
    "block comments": lambda items: _each(items, lambda s: s.replace("{", "{/* a \n b */ ")),
    "bare keys": lambda items: re.sub(r'"(\w+)":', r"\1:", json.dumps(items)),
    "no brackets": lambda items: ", ".join(json.dumps(item) for item in items),
    "one object per line": lambda items: "\n".join(json.dumps(item) for item in items),
    "one list per line": lambda items: "\n".join(json.dumps([item]) for item in items),
    "tuples": lambda items: json.dumps(items).replace("[", "(").replace("]", ")"),
    "curly quotes": lambda items: re.sub(r'"([^"]*)"', "\u201c\\1\u201d", json.dumps(items)),
    "windows line ends": lambda items: json.dumps(items, indent=1).replace("\n", "\r\n"),
    "floats": lambda items: re.sub(r"(\d+)([,\]])", r"\1.0\2", json.dumps(items)),
    "exponents": lambda items: _each(items, lambda s: re.sub(r"(\d)([,\]])", r"\1e0\2", s)),
    "extra keys": lambda items: _each(items, lambda s: s[:-1] + ', "sure": True, "z": None}'),
    "nan in another key": lambda items: _each(
      items, lambda s: '{"score": NaN, "n": [null], ' + s[1:]
    ),
  }
  cases = []
  for name, write in blocks.items():
    for number, tool in enumerate(("box", "line", "box")):
      items = _items(random.Random(f"{name} {number}"), tool, number + 1)
      cases.append(_case(f"{name} {number}", _turn(write(items)), _operations(items)))
  fences: dict[str, Callable[[str], str]] = {
    "fence not closed": lambda text: text.removesuffix("```"),
    "fence not closed before </think>": lambda text: text.removesuffix("```") + "</think> Fine.",
    "fence indented": lambda text: text.replace("```json", "  ```json  "),
    "fence in capitals": lambda text: text.replace("```json", "```JSON"),
    "fence with a space": lambda text: text.replace("```json", "``` json"),
    "block on the fence's line": lambda text: text.replace("```json\n", "```json "),
    "fence closed on the block's line": lambda text: text.replace("\n```", "```", 2)
    .replace("Mapper```", "Mapper\n```"),
    "within the reasoning": lambda text: text.replace("</think>", "") + " </think> Action: none",
    "no reasoning": lambda text: text.split("Action: ")[1],
    "text after the block": lambda text: text + "\nI wait for the image ``` and continue.",
  }  # fmt: skip
  for name, write in fences.items():
    for number, tool in enumerate(("box", "line", "box")):
      items = _items(random.Random(f"{name} {number}"), tool, number + 1)
      cases.append(_case(f"{name} {number}", write(_turn(json.dumps(items))), _operations(items)))
  return cases


# --- by hand -----------------------------------------------------------------------------------


def _by_hand() -> list[Case]:
  """Text and operations, both written by hand; images 1-4 are SIZES."""
  box = '"index": 1, "bbox_2d": [10, 20, 30, 40]'
  one = ["box", 1, [10, 20, 30, 40], "a"]
  rows = {
    "reversed box": ('[{"index": 1, "bbox_2d": [30, 40, 10, 20], "label": "a"}]', [one]),
    "half reversed box": ('[{"index": 1, "bbox_2d": [30, 20, 10, 40], "label": "a"}]', [one]),
    "index as float": ('[{"index": 1.0, "bbox_2d": [10, 20, 30, 40], "label": "a"}]', [one]),
    "leading zeros": ('[{"index": 01, "bbox_2d": [010, 020, 30, 040], "label": "a"}]', [one]),
    "plus signs": ('[{"index": +1, "bbox_2d": [+10, 20, +30, 40], "label": "a"}]', [one]),
    "exponents both ways": (
      '[{"index": 1, "bbox_2d": [1e1, 2.0E+1, 300e-1, 40], "label": "a"}]', [one],
    ),
    "fractions": (
      '[{"index": 1, "bbox_2d": [10.5, .25, 30.75, 40.], "label": "a"}]',
      [["box", 1, [10.5, 0.25, 30.75, 40], "a"]],
    ),
    "beyond the border": (
      '[{"index": 2, "bbox_2d": [-30, -1, 999, 448.5], "label": "a"}]',
      [["box", 2, [0, 0, 448, 448], "a"]],
    ),
    "beyond the right border": (
      '[{"index": 1, "bbox_2d": [600, 300, 700, 336], "label": "a"}]',
      [["box", 1, [600, 300, 616, 336], "a"]],
    ),
    "whole image": (
      '[{"index": 4, "bbox_2d": [0, 0, 640, 480], "label": "room"}]',
      [["box", 4, [0, 0, 640, 480], "room"]],
    ),
    "a box of one point": (
      '[{"index": 3, "bbox_2d": [7, 7, 7, 7], "label": "dot"}]', [["box", 3, [7, 7, 7, 7], "dot"]],
    ),
    "a line of one point": (
      '[{"index": 3, "start_point_2d": [7, 8], "end_point_2d": [7, 8], "label": "dot"}]',
      [["line", 3, [7, 8, 7, 8], "dot"]],
    ),
    "line along the border": (
      '[{"index": 3, "start_point_2d": [0, 168], "end_point_2d": [168, 0], "label": "edge"}]',
      [["line", 3, [0, 168, 168, 0], "edge"]],
    ),
    "box and line in a block": (
      f'[{{{box}, "label": "a"}}, '
      '{"index": 2, "start_point_2d": [1, 2], "end_point_2d": [3, 4], "label": "b"}]',
      [one, ["line", 2, [1, 2, 3, 4], "b"]],
    ),
    "box and line keys in one item": (
      f'[{{{box}, "start_point_2d": [1, 2], "end_point_2d": [3, 4], "label": "a"}}]', [one],
    ),
    "empty label": (f'[{{{box}, "label": ""}}]', [[*one[:3], ""]]),
    "chinese label": (f'[{{{box}, "label": "桌子"}}]', [[*one[:3], "桌子"]]),
    "accents": (f'[{{{box}, "label": "café table"}}]', [[*one[:3], "café table"]]),
    "escaped accents": (f'[{{{box}, "label": "caf\\u00e9"}}]', [[*one[:3], "café"]]),
    "escaped pair": (f'[{{{box}, "label": "\\ud83d\\ude00"}}]', [[*one[:3], "\U0001f600"]]),
    "escaped quotes": (f'[{{{box}, "label": "a \\"big\\" one"}}]', [[*one[:3], 'a "big" one']]),
    "escaped slashes": (f'[{{{box}, "label": "a\\/b\\\\c"}}]', [[*one[:3], "a/b\\c"]]),
    "unknown escape": (f'[{{{box}, "label": "50\\% off"}}]', [[*one[:3], "50% off"]]),
    "brackets in a label": (f'[{{{box}, "label": "box [1] {{x}}, // y"}}]',
                            [[*one[:3], "box [1] {x}, // y"]]),
    "apostrophe in double quotes": (f'[{{{box}, "label": "chair\'s leg"}}]',
                                    [[*one[:3], "chair's leg"]]),
    "apostrophe in single quotes": (f"[{{{box}, 'label': 'chair's leg'}}]",
                                    [[*one[:3], "chair's leg"]]),
    "mixed quotes": (f"[{{{box}, 'label': \"a\"}}]", [one]),
    "same key twice": (f'[{{{box}, "label": "b", "label": "a"}}]', [one]),
    "same label twice": (
      f'[{{{box}, "label": "a"}}, {{"index": 1, "bbox_2d": [1, 2, 3, 4], "label": "a"}}]',
      [one, ["box", 1, [1, 2, 3, 4], "a"]],
    ),
    "same item twice": (f'[{{{box}, "label": "a"}}, {{{box}, "label": "a"}}]', [one, one]),
    "nothing drawn": ("[]", []),
    "an empty item": (f'[, {{{box}, "label": "a"}} ,]', [one]),
  }  # fmt: skip
  cases = [_case(name, _turn(block), operations) for name, (block, operations) in rows.items()]
  item = f'{{{box}, "label": "a"}}'
  halves, quarters = [[500, 250]], [[250, 125]]
  cases += [
    _case("no block", "<think> Nothing to mark. </think> Action: Object Mapper", []),
    _case("an answer", "<think> Four. </think> Action: Answer\n<answer> 4 </answer>", []),
    _case("another fence", f"<think> x </think> Action: y\n```python\n[{item}]\n```", []),
    _case("a fence within a line", f"<think> I write ```json [{item}] </think> Action: z", []),
    _case("empty text", "", []),
    _case(
      "two blocks",
      _turn(f"[{item}]") + '\n```json\n[{"index": 2, "bbox_2d": [1, 2, 3, 4], "label": "b"}]\n```',
      [one, ["box", 2, [1, 2, 3, 4], "b"]],
    ),
    _case(
      "first of two fences not closed",
      f"Action: Object Mapper\n```json\n[{item}]\n```json\n[{item}]\n```",
      [one, one],
    ),
    _case(
      "per mille",
      _turn('[{"index": 1, "bbox_2d": [100, 200, 900, 1000], "label": "a"}]'),
      [["box", 1, [50, 50, 450, 250], "a"]],
      "per_mille",
      halves,
    ),
  ]
  cases += [
    _case(
      "per mille line",
      _turn('[{"index": 1, "start_point_2d": [0, 8], "end_point_2d": [1000, 4], "label": "p"}]'),
      [["line", 1, [0, 1, 250, 0.5], "p"]],
      "per_mille",
      quarters,
    ),
    _case(
      "per mille beyond the border",
      _turn('[{"index": 1, "bbox_2d": [-5, 400, 1100, 1200], "label": "a"}]'),
      [["box", 1, [0, 50, 250, 125], "a"]],
      "per_mille",
      quarters,
    ),
  ]
  return cases


if __name__ == "__main__":
  main()
