"""The finder reads back what was drawn, also through blur and noise, and says no to what was not asked for."""

import itertools
import random

import numpy as np
import pytest
from PIL import Image, ImageFilter

from tiny.shapes import (
    BACKGROUNDS,
    COLOURS,
    PLACES,
    SHAPES,
    Found,
    caption,
    draw,
    find_background,
    find_shapes,
    place_box,
    read_caption,
    shows,
)

SIZE = (64, 64)


def scenes(seed: int, share: float = 0.1):
    """(objects, background, caption) of a random share of all single-object scenes."""
    rng = random.Random(seed)
    for colour, shape, place, background in itertools.product(COLOURS, SHAPES, PLACES, BACKGROUNDS):
        if rng.random() < share:
            objects = [Found(colour, shape, place_box(place, SIZE, rng.uniform(24, 30), rng))]
            yield objects, background, caption(objects, background)


def blurred_and_noisy(image: Image.Image) -> Image.Image:
    pixels = np.asarray(image.filter(ImageFilter.GaussianBlur(1)), dtype=np.float32)
    noise = np.random.RandomState(0).standard_normal(pixels.shape) * 15
    return Image.fromarray(np.clip(pixels + noise, 0, 255).astype(np.uint8))


def tinted(image: Image.Image) -> Image.Image:
    return Image.fromarray(
        np.clip(np.asarray(image, dtype=np.float32) * (0.92, 1.05, 0.9) + 8, 0, 255).astype(np.uint8)
    )


@pytest.mark.parametrize("change", [lambda image: image, blurred_and_noisy, tinted])
def test_finds_every_scene(change):
    for objects, background, text in scenes(seed=1):
        image = change(draw(objects, background, SIZE))
        assert shows(image, text, check_place=True), (text, find_shapes(image))
        assert find_background(image) == background, text


def test_bbox_is_in_the_pictures_pixels():
    for size in ((64, 64), (96, 64), (640, 448)):
        box = (size[0] * 0.5, size[1] * 0.2, size[0] * 0.5 + size[1] * 0.4, size[1] * 0.6)
        (found,) = find_shapes(draw([Found("red", "circle", box)], "white", size))
        assert np.abs(np.subtract(found.bbox, box)).max() <= 1.5 * max(1, max(size) / 128), (size, found)
        assert (found.colour, found.shape) == ("red", "circle")


def test_several_objects():
    objects = [
        Found("red", "circle", (4, 6, 28, 30)),
        Found("blue", "star", (36, 4, 60, 28)),
        Found("yellow", "cross", (20, 38, 42, 60)),
    ]
    image = blurred_and_noisy(draw(objects, "black", SIZE))
    assert {(item.colour, item.shape) for item in find_shapes(image)} == {(o.colour, o.shape) for o in objects}
    assert shows(image, caption(objects, "black"))
    assert not shows(image, caption(objects[:2], "black")), "one object too many must not pass"
    assert not shows(draw(objects[:2], "black", SIZE), caption(objects, "black")), "a missing object must not pass"
    swapped = [Found("blue", "circle", objects[0].bbox), Found("red", "star", objects[1].bbox), objects[2]]
    assert not shows(image, caption(swapped, "black")), "colours given to the wrong shapes must not pass"


def test_touching_objects_of_two_colours_are_two():
    objects = [Found("red", "square", (8, 20, 32, 44)), Found("blue", "square", (32, 20, 56, 44))]
    found = find_shapes(draw(objects, "white", SIZE))
    assert [(item.colour, item.shape) for item in found] == [("red", "square"), ("blue", "square")]


@pytest.mark.parametrize("change", [lambda image: image, blurred_and_noisy])
def test_says_no_to_wrong_colour_shape_and_place(change):
    for objects, background, _ in scenes(seed=2, share=0.05):
        (item,) = objects
        image = change(draw(objects, background, SIZE))
        for colour in set(COLOURS) - {item.colour}:
            assert not shows(image, caption([Found(colour, item.shape, item.bbox)], background))
        for shape in set(SHAPES) - {item.shape}:
            assert not shows(image, caption([Found(item.colour, shape, item.bbox)], background))
        for place in PLACES:
            moved = caption([Found(item.colour, item.shape, place_box(place, SIZE, 27))], background)
            right = moved == caption(objects, background)
            assert shows(image, moved, check_place=True) == right and shows(image, moved)


def test_says_no_to_empty_and_noise():
    text = "a red circle in the centre, on a white background"
    noise = Image.fromarray(np.random.RandomState(0).randint(0, 255, (64, 64, 3), dtype=np.uint8))
    smooth = noise.resize((8, 8)).resize(SIZE, Image.Resampling.BICUBIC)
    for image in (draw([], "white", SIZE), noise, smooth):
        assert not shows(image, text)
    assert find_shapes(draw([], "navy", SIZE)) == []


def test_caption_reads_back():
    objects = [
        Found("red", "circle", place_box("on the left", SIZE, 20)),
        Found("cyan", "ring", place_box("on the right", SIZE, 20)),
    ]
    text = caption(objects, "sand")
    assert text == "a red circle on the left and a cyan ring on the right, on a sand background"
    assert read_caption(text) == ([("red", "circle", "on the left"), ("cyan", "ring", "on the right")], "sand")
    assert read_caption(caption(objects, "sand", colours=False))[0][0] == ("", "circle", "on the left")
    assert read_caption(caption([], "navy")) == ([], "navy")
    with pytest.raises(ValueError, match="not a caption of drawn shapes: 'a dog'; expected"):
        read_caption("a dog")


def test_colourless_caption_takes_any_colour():
    objects = [Found("green", "square", place_box("at the top", SIZE, 26))]
    assert shows(draw(objects, "white", SIZE), caption(objects, "white", colours=False), check_place=True)


@pytest.mark.parametrize("item", [("pink", "circle"), ("red", "hexagon")])
def test_unknown_names_are_refused(item):
    with pytest.raises(ValueError, match="expected one of"):
        draw([Found(*item, (0, 0, 20, 20))], "white", SIZE)
    with pytest.raises(ValueError, match="unknown background"):
        draw([], "plaid", SIZE)
    with pytest.raises(ValueError, match="unknown place"):
        place_box("somewhere", SIZE, 20)
