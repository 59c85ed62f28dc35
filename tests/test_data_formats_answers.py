"""Answers, options, media and scenes of foreign rows, each in the forms in which they occur."""

import base64

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spatial_jax.data.formats.answers import (
  answer_fields,
  embedded_fields,
  final_answer,
  find_letter,
  letter_of,
  number_in,
  split_options,
  with_letters,
)
from spatial_jax.data.formats.benchmarks import SAT
from spatial_jax.data.formats.fields import Fields
from spatial_jax.data.formats.media import image_of, images_of_base64, scene_of, videos_of
from spatial_jax.data.formats.phyx import PhyX
from spatial_jax.data.formats.sharegpt import ShareGPT
from spatial_jax.data.formats.spar7m import Spar7m
from spatial_jax.data.formats.tables import parse_options
from spatial_jax.data.rows import RowProblem
from tests.format_fixtures import png

OPTIONS = ["A. sofa", "B. lamp"]


@pytest.mark.parametrize(
  ("text", "answer"),
  [
    ("<answer>B</answer>", "B"),
    ("<think>A?</think><answer> 3 </answer>", "3"),
    ("<answer>A</answer> no, <answer>B</answer>", "B"),
    ("<think>long</think>\nthe lamp", "the lamp"),
    ("<ANSWER>7</ANSWER>", "7"),
    ("the lamp", "the lamp"),
    ("", ""),
  ],
)
def test_the_final_answer_is_in_the_last_element(text, answer):
  assert final_answer(text) == answer


@pytest.mark.parametrize(
  "answer", ["B", "b", "(B)", "B.", "[B]", "B)", "lamp", "LAMP", " lamp. ", "B. lamp", "(B) lamp"]
)
def test_a_choice_may_be_a_letter_or_a_text(answer):
  assert letter_of(answer, OPTIONS) == "B"


@pytest.mark.parametrize("answer", ["C", "", "the sofa and the lamp", "A. lamp", "AB", None, 3])
def test_an_answer_that_is_no_option_is_refused(answer):
  with pytest.raises(RowProblem, match="not one of"):
    letter_of(answer, OPTIONS)


def test_a_text_of_two_options_is_refused():
  with pytest.raises(RowProblem, match="not one of"):
    letter_of("x", with_letters(["x", "x"]))


@pytest.mark.parametrize(
  "options",
  [["sofa", "lamp"], ["A. sofa", "B. lamp"], ["(A) sofa", "(B) lamp"], ["A: sofa", "B: lamp"]],
)
def test_options_get_the_same_letters(options):
  assert with_letters(options) == OPTIONS


def test_options_whose_first_letters_are_no_letters_of_a_list_are_kept():
  assert with_letters(["B. Bach", "A. Vivaldi"]) == ["A. B. Bach", "B. A. Vivaldi"]
  assert with_letters([1, 2.5]) == ["A. 1", "B. 2.5"]


@pytest.mark.parametrize("options", [["a"], [], ["a", ""], ["a", None], ["a"] * 27, ["a", True]])
def test_broken_options_are_refused(options):
  with pytest.raises(RowProblem, match="options"):
    with_letters(options)


@settings(max_examples=50)
@given(st.lists(st.text(min_size=1, max_size=5), min_size=2, max_size=26))
def test_each_option_is_found_by_its_letter(texts):
  if any(not text.strip() or "\ud800" <= max(text) <= "\udfff" for text in texts):
    return
  options = with_letters(texts)
  assert [find_letter(option[0], options) for option in options] == [o[0] for o in options]


@pytest.mark.parametrize(
  ("answer", "number", "unit"),
  [
    (4, 4, None),
    (2.5, 2.5, None),
    ("4", 4, None),
    ("+4", 4, None),
    ("-0.5", -0.5, None),
    ("1,200", 1200, None),
    (".5", 0.5, None),
    ("2.", 2.0, None),
    ("1e3", 1000.0, None),
    ("\u22123", -3, None),
    ("6.1 meters", 6.1, "m"),
    ("6.1m", 6.1, "m"),
    ("12 m²", 12, "m^2"),
    ("90°", 90, "deg"),
    ("113 cm.", 113, "cm"),
  ],
)
def test_numbers_keep_their_type_and_name_their_unit(answer, number, unit):
  fields = answer_fields(answer, kind="number")
  assert fields == {"kind": "number", "answer": number} | ({"unit": unit} if unit else {})
  assert type(fields["answer"]) is type(number)


def test_the_unit_of_the_answer_wins_over_that_of_the_type():
  assert answer_fields("250 cm", kind="number", unit="m")["unit"] == "cm"
  assert answer_fields("2.5", kind="number", unit="m")["unit"] == "m"


@pytest.mark.parametrize(
  "answer",
  [
    "",
    "four",
    "2 or 3",
    "1e999",
    "nan",
    "inf",
    "9" * 50,
    "3 kg",
    "2-3",
    ".",
    "-",
    True,
    None,
    [],
    1e39,
  ],
)
def test_what_is_no_number_is_refused(answer):
  with pytest.raises(RowProblem, match="answer"):
    answer_fields(answer, kind="number")


def test_without_a_kind_a_bare_number_is_a_number_and_a_text_is_words():
  assert answer_fields("3")["kind"] == "number"
  assert answer_fields("3 kg") == {"kind": "words", "answer": "3 kg"}
  assert answer_fields("2.4 meters") == {"kind": "number", "answer": 2.4, "unit": "m"}
  assert answer_fields("red") == {"kind": "words", "answer": "red"}
  assert answer_fields("12", kind="words") == {"kind": "words", "answer": "12"}


@pytest.mark.parametrize(
  ("sentence", "number"),
  [
    ("towel's central depth is estimated to be about 1.5 meters.", "1.5 meters"),
    ("The sofa in image 2 is 3 m away.", "3 m"),
    ("In image 2, 3 m.", "3 m"),
    ("There are 4 chairs.", "4"),
    ("There are 3 in the room.", "3"),
    ("The room has about 20.5 m^2.", "20.5 m^2"),
    ("The room has about 20.5 square meters.", "20.5 square meters"),
    ("It is about 3 feet away.", "3 feet"),
    ("It is 1,200 mm wide.", "1,200 mm"),
    ("About 1.5 Meters.", "1.5 Meters"),
    ("1,200", "1,200"),
    ("1.5e3", "1.5e3"),
    ("2.4", "2.4"),
    ("yes", "yes"),
  ],
)
def test_a_sentence_gives_its_number(sentence, number):
  assert number_in(sentence) == number


@pytest.mark.parametrize(
  "sentence",
  ["1 or 2", "between 1 m and 2 m", "about 2-3 m", "2 to 3 m", "1.5 m, or 150 cm"],
)
def test_a_sentence_with_several_numbers_is_refused(sentence):
  with pytest.raises(RowProblem, match="several numbers"):
    number_in(sentence)


@pytest.mark.parametrize("sentence", ["see scene0261_00", "about 1,2 m"])
def test_a_sentence_whose_digits_are_no_number_is_refused(sentence):
  with pytest.raises(RowProblem, match="digits but no number"):
    number_in(sentence)


@pytest.mark.parametrize(
  ("text", "question"),
  [
    ("What is left?\nOptions:\nA. sofa\nB. lamp", "What is left?"),
    ("What is left? A. sofa B. lamp", "What is left?"),
    ("What is left? Options: A: sofa, B: lamp", "What is left?"),
    ("What is left? Choices: (A) sofa (B) lamp", "What is left?"),
    ("What is left?\n(A) sofa\n(B) lamp\n", "What is left?"),
    ("Near A. What is left?\nA. sofa\nB. lamp", "Near A. What is left?"),
    ("Left?\nA. sofa\nB. lamp\nAnswer with the option's letter directly.", "Left?"),
    ("Left?\nA. sofa\nB. lamp\nThe room is dark.", "Left?\nThe room is dark."),
  ],
)
def test_options_in_the_question_are_taken_out(text, question):
  assert split_options(text) == (question, OPTIONS)
  fields = embedded_fields(text, "(B)")
  assert fields == {"question": question, "kind": "choice", "options": OPTIONS, "answer": "B"}


@pytest.mark.parametrize(
  "text",
  [
    "What is left?",
    "A. sofa B. lamp",
    "What is left? A. sofa",
    "What is left? A. sofa C. lamp",
    "What is left? B. sofa A. lamp",
    "Point A: red, point B: blue. Which is closer?",
    "Is plan A. or plan B. better?",
    "What is left? A. B. lamp",
  ],
)
def test_a_question_without_options_stays(text):
  assert split_options(text) is None
  assert embedded_fields(text, "A")["question"] == text


def test_a_lone_letter_without_options_is_refused_where_letters_are_options():
  with pytest.raises(RowProblem, match="no such option"):
    embedded_fields("What is left?", "A", letters=True)


@pytest.mark.parametrize(
  ("value", "options"),
  [
    (["A. x", "B. y"], ["A. x", "B. y"]),
    (None, []),
    ("nan", []),
    ("[]", []),
    ('["A. x", "B. y"]', ["A. x", "B. y"]),
    ("['A. x', \"B. it's\"]", ["A. x", "B. it's"]),
    ("['it\\'s', 'y']", ["it's", "y"]),
    ("A. x\nB. y", ["A. x", "B. y"]),
    ('A:"x, or z", B:"y"', ["A. x, or z", "B. y"]),
    ({"A": "x", "B": "y", "C": None}, ["A. x", "B. y"]),
  ],
)
def test_options_of_tables(value, options):
  assert parse_options(value, "options") == options


@pytest.mark.parametrize("value", ["x", "['x'", "['x', 5]", "[", 5, b"x", "['x' 'y']"])
def test_a_text_that_is_no_list_of_options_is_refused(value):
  with pytest.raises(RowProblem, match="options"):
    parse_options(value, "options")


def test_the_answer_of_sat_is_a_text_even_if_it_looks_like_a_letter():
  row = {
    "question": "Which?",
    "answers": ["B", "A"],
    "correct_answer": "A",
    "image_bytes": [png(1)],
  }
  converted = SAT().convert(Fields(row, "sat.parquet"))
  assert (converted["options"], converted["answer"]) == (["A. B", "B. A"], "B")


# --- media ---------------------------------------------------------------------------------------


def test_images_in_all_published_forms():
  text = base64.b64encode(png(1)).decode()
  for value in (png(1), {"bytes": png(1), "path": "x"}, f"data:image/png;base64,{text}"):
    assert image_of(value, "image") == png(1)
  assert images_of_base64(text, "image") == [png(1)]
  assert images_of_base64(f"{text[:60]}\n{text[60:]}\n", "image") == [png(1)]
  assert images_of_base64(f'["{text}", "{text}"]', "image") == [png(1), png(1)]
  for value in ("a.jpg", "./a.jpg", {"path": "a.jpg"}, {"bytes": None, "path": "a.jpg"}):
    assert image_of(value, "image") == "a.jpg"
  assert videos_of(["a.mp4", {"video": "file:///x/b.mp4"}, ["0.jpg", "1.jpg"]], "videos") == [
    "a.mp4",
    "/x/b.mp4",
    {"frames": ["0.jpg", "1.jpg"]},
  ]


@pytest.mark.parametrize(
  "value",
  [b"GARBAGE", b"", {"bytes": None, "path": None}, 5, "http://x.org/a.jpg", "gs://b/a.jpg", "a\0b"],
)
def test_what_is_no_image_is_refused(value):
  with pytest.raises(RowProblem, match=r"^image: "):
    image_of(value, "image")


PNG = base64.b64encode(png(1)).decode()


@pytest.mark.parametrize(
  "value", [f"{PNG[:40]}!{PNG[40:]}", "@@@", "QUJD", "[1]", "[", "a", '["@"]']
)
def test_what_is_no_image_in_base64_is_refused(value):
  with pytest.raises(RowProblem, match=r"^image"):
    images_of_base64(value, "image")


@pytest.mark.parametrize(
  ("media", "scene"),
  [
    (["scannet/scene0011_00.mp4"], "scene0011_00"),
    (["scene0011_00/color/7.jpg", "scene0011_00/color/8.jpg"], "scene0011_00"),
    (["arkitscenes/41069025.mp4"], "41069025"),
    (["x/09c1414f1b/dslr/1.jpg"], "09c1414f1b"),
    (["room_1/a.jpg", "room_1/b.jpg"], "room_1"),
    (["room_1/a.jpg"], "room_1/a"),
    (["a.jpg", "b.jpg"], "a"),
    ([b"x"], None),
    ([], None),
  ],
)
def test_rows_about_one_scan_have_one_scene(media, scene):
  assert scene_of(media) == scene


# --- conversations -------------------------------------------------------------------------------


def test_a_conversation_needs_a_mark_for_each_image_or_none():
  turns = [{"from": "human", "value": "<image>Which?"}, {"from": "gpt", "value": "red"}]
  row = {"conversations": turns, "images": ["a.jpg", "b.jpg"]}
  with pytest.raises(RowProblem, match="has 1 marks <image> for 2 images"):
    ShareGPT().convert(Fields(row, "x.json"))


def test_content_may_be_a_list_of_parts():
  content = [{"type": "image"}, {"type": "text", "text": "Which?"}]
  turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "red"}]
  row = {"messages": turns, "images": ["a.jpg"]}
  assert ShareGPT().convert(Fields(row, "x.json"))["question"] == "<image>Which?"


# --- marks of SPAR-7M ----------------------------------------------------------------------------


def spar(question_type: str, count: int, **marks) -> list[list[str]]:
  """The colours of the marks of each image."""
  turns = [{"from": "human", "value": "How far?"}, {"from": "gpt", "value": "2.4"}]
  images = [f"scene0000_00/{i}.jpg" for i in range(count)]
  row = {"conversations": turns, "image": images, "type": question_type, **marks}
  found = Spar7m().convert(Fields(row, "fill.jsonl"))["images"]
  return [
    [mark["color"] for mark in image["thousandths"]] if isinstance(image, dict) else []
    for image in found
  ]


POINT, BOX = [[10, 20]], [[1, 2, 3, 4]]


def test_marks_are_in_the_images_that_their_type_says():
  points = {"red_point": POINT, "blue_point": POINT, "green_point": POINT}
  assert spar("depth_prediction_oo", 1, **points) == [["red", "blue", "green"]]
  where = {"point_img_idx": [[2, 0, 1]]}
  assert spar("depth_prediction_oo_mv", 3, **points, **where) == [["blue"], ["green"], ["red"]]
  centre = spar("distance_infer_center_oo_mv", 3, **points, **where)
  assert centre == [["green"], ["blue"], ["red"]]
  boxes = {"red_bbox": BOX, "green_bbox": BOX}
  pair = spar("obj_spatial_relation_oo_mv", 2, **boxes, bbox_img_idx=[[0, 1]])
  assert pair == [["red"], ["green"]]
  assert spar("obj_spatial_relation_oc_mv", 2, **boxes, bbox_img_idx=[[1]]) == [
    [],
    ["red", "green"],
  ]
  assert spar("position_matching", 2, red_bbox=BOX) == [["red"], []]
  assert spar("view_change_infer", 2) == [[], []]


@pytest.mark.parametrize(
  "marks",
  [
    {"red_point": [[1, 2, 3]]},
    {"red_point": [[1001, 2]]},
    {"red_point": "x"},
    {"red_bbox": [[1, 2]]},
    {"red_point": POINT, "point_img_idx": [[7]]},
    {"red_point": POINT, "blue_point": POINT, "point_img_idx": [[0]]},
    {"red_point": POINT, "point_img_idx": [[True]]},
  ],
)
def test_broken_marks_are_refused(marks):
  with pytest.raises(RowProblem, match=r"point|bbox"):
    spar("depth_prediction_oc_mv", 2, **marks)


def test_marks_with_names_are_refused():
  with pytest.raises(RowProblem, match="names drawn beside the marks"):
    spar("spatial_imagination_map_mv", 1)


def test_a_solution_of_phyx_is_kept_for_sft():
  row = {
    "id": 1,
    "question": "How fast?",
    "answer": "3.5 m/s",
    "image": "a.png",
    "category": "Optics",
  }
  converted = PhyX().convert(Fields(row | {"steps": "v = s / t."}, "phyx.jsonl"))
  assert converted["extra"] == {"category": "Optics", "key": "3.5 m/s", "solution": "v = s / t."}
  assert "solution" not in PhyX().convert(Fields(row, "phyx.jsonl"))["extra"]
