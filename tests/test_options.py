"""What can be chosen, and the table of what data sets and students change in it."""

import itertools
import os

import pytest

from training.checkpoint import DATASETS, read
from training.options import PRESETS, Recipe, preset

OF_DATA = [f"{name}{more}" for name, more in itertools.product(DATASETS, ("", " student"))]


@pytest.mark.parametrize("words", dict.fromkeys([*PRESETS, *OF_DATA]))
def test_every_preset_makes_a_recipe(words):
    """Of fields that a Recipe has, some unlike its own. What is changed in it leaves the table."""
    changes = preset(words)
    assert changes and Recipe(**changes) != Recipe()
    changes["steps"] = -1
    assert preset(words) != changes


@pytest.mark.parametrize("name", ["pipe", "/dev/zero"])
def test_what_never_ends_is_not_read(tmp_path, name):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match=f"{name}: it is no regular file"):
        read(tmp_path / name)


def test_rows_of_the_table_add_up():
    """A row counts where all its words are said, later ones win, and those of students change
    students only."""
    toy, mlp = PRESETS["toy2d"], PRESETS["toy2d --network mlp"]
    assert preset("toy2d") == preset("toy2d --network mlp") == toy | mlp and mlp["lr"] != toy["lr"]
    assert preset("toy2d --network mmdit") == preset("toy2d --network unet") == toy
    student = PRESETS["student"] | PRESETS["toy2d student"]
    assert preset("toy2d student") == preset("toy2d --network mmdit student") == student
    assert preset("toy2d --guidance fixed student") == student | {"dropout": 0.0}
    assert preset("digits") == {} and preset("digits student") == PRESETS["student"]
    assert preset("toy2d --guidance fixed") == toy | mlp  # of no student
