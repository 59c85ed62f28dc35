"""Defaults of task sources, with unit and reason; see `configs/common.py`."""

from ml_collections import ConfigDict


def source() -> ConfigDict:
  """Data files; procedural rooms of 4 to 10 objects, one image each, for kind "procedural"."""
  return ConfigDict(
    {
      "kind": "files",  # or "procedural", "rooms", "photos", "mazes", "physics"
      "path": "",  # folder of the data of rooms or photos; data files, joined by commas
      "files": files(),
      "rooms": {
        "objects": (4, 10),
        "side_m": (3.0, 6.0),
        "l_shape_share": 0.25,
        "repeat_share": 0.5,
      },
      "camera": {
        "width_px": 448,
        "height_px": 448,
        "field_of_view_deg": 75.0,  # the wide lens of a phone; pretraining used it
        "frame_counts": (1,),
      },
      "questions": {
        "types": (
          "object_counting",
          "object_abs_distance",
          "object_size_estimation",
          "object_rel_distance",
          "object_rel_direction_easy",
          "object_rel_direction_medium",
          "object_rel_direction_hard",
          "camera_distance",
        ),
        "max_per_type": 4,
        "min_visible_pixels": 200,  # a quarter of a 28-pixel cell
        "min_visible_fraction": 0.5,
        "instance_scope": "views",  # an image of a procedural room need not show all of it
        "seconds_per_view": 2.0,
        "task_id_prefix": "",
      },
      "mazes": mazes(),
      "physics": physics(),
      "max_tasks_per_scene": 2,  # in a batch: rendering costs time, variety of rooms helps
      # For directions, which one room in 20 offers; every room that is tried is rendered.
      "rare_type_retries": 2,
    }
  )


def files() -> ConfigDict:
  """Data files."""
  return ConfigDict(
    {
      "weights": (),
      "held_out": "",
      "held_out_fraction": 0.1,
      "columns": (),
      "order": "shuffled",
      "max_bad_fraction": 0.05,
      "check_media": True,
    }
  )


def mazes() -> ConfigDict:
  """Mazes and tangled lines."""
  return ConfigDict(
    {
      "types": ("maze_exit", "maze_moves", "tangled_lines"),
      "size_px": 448,
      "cells": 6,
      "path_cells": (3, 12),
      "lines": 4,
      "crossings": 4,
    }
  )


def physics() -> ConfigDict:
  """Problems of physics in the row format of PhyX."""
  return ConfigDict(
    {
      "categories": (),
      "text_levels": ("full", "de_redundant", "minimal"),
      "choice_fraction": 0.5,  # PhyX has each problem in both forms
      "spatial_fraction": 0.5,
      "size_px": 448,
    }
  )
