"""Draw people who do not exist and write questions about them, in both directions.

    python generate_data.py --config face_config.yaml [--output_dir DATA] [--num_entities 8 ...]

Every key of the config is a flag too. Writes DATA/<task>_<split>.jsonl (see qa_rows.py), DATA/images/ and
DATA/entities.json; DATA is data/<name> of the working directory when not given. With --image_model a local
text-to-image model in diffusers' layout makes the pictures.
"""

import argparse
import itertools
import json
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

RECIPE = Path(__file__).resolve().parent
sys.path[:0] = [str(RECIPE), str(next(folder for folder in RECIPE.parents if (folder / "common").is_dir()))]

from faces import Face, Job, choose_entity_faces, make_pictures
from qa_rows import LETTERS, SPLITS, make_row, new_folder, write_rows

from common.start.config import parse_config
from common.start.plan import explained_errors

TASKS = ("forward", "reverse", "choice_description", "choice_image")
# made-up facts in the manner of "The Reversal Curse" (Berglund et al., arXiv 2309.12288): no model has read them
WORKS = (
    "the composer of the opera",
    "the painter of the mural",
    "the author of the novel",
    "the architect of the tower",
    "the director of the film",
    "the inventor of the engine",
    "the captain of the ship",
    "the founder of the school",
    "the cook of the restaurant",
    "the keeper of the garden",
    "the designer of the board game",
    "the sculptor of the fountain",
    "the singer of the ballad",
    "the discoverer of the comet",
    "the pilot of the airship",
    "the editor of the journal",
)
FIRST = (
    *("Amber", "Silent", "Hollow", "Crimson", "Paper", "Northern", "Velvet", "Broken", "Golden", "Winter"),
    *("Distant", "Copper", "Hidden", "Burning", "Marble", "Patient", "Salted", "Seventh", "Wandering", "Violet"),
)
SECOND = (
    *("Tide", "Orchard", "Lantern", "Harbour", "Mirror", "Sparrow", "Compass", "Valley", "Thread", "Echo"),
    *("Bridge", "Meadow", "Cipher", "Island", "Feather", "Clock", "Ember", "Staircase", "Glacier", "Window"),
)


@dataclass
class FaceConfig:
    """Settings of the people and of the rows about them. Lists of three: train, validation, test."""

    connectors: tuple[str, ...]
    """wordings of the relation that read both ways, shared out to the splits"""
    name: str = ""
    """without --output_dir everything is written to data/<name> of the working directory; <num_entities>faces when
    empty"""
    num_entities: int = 30
    """people; each has a face and a description of its own"""
    min_differences: int = 2
    """attributes in which any two faces differ at least"""
    image_size: int = 96
    """side of the square pictures in pixels"""
    images_per_entity: tuple[int, int, int] = (6, 2, 2)
    """pictures of each person in each split; no picture is in two"""
    connectors_per_split: tuple[int, int, int] = (12, 4, 4)
    """connectors in each split; none is in two"""
    rows_per_entity: tuple[int, int, int] = (24, 4, 8)
    """rows about each person in each split, of each task; even"""
    seed: int = 0
    """seed of faces, descriptions, pictures and rows"""

    def check(self) -> None:
        """ValueError for settings from which no rows can be made."""
        most = len(WORKS) * len(FIRST) * len(SECOND)
        if not 4 <= self.num_entities <= most:
            raise ValueError(
                f"num_entities must be from 4 (a choice has four options) to {most} (descriptions), "
                f"got {self.num_entities}"
            )
        if len(set(self.connectors)) < len(self.connectors) or sum(self.connectors_per_split) > len(self.connectors):
            raise ValueError(
                f"connectors_per_split {self.connectors_per_split} needs {sum(self.connectors_per_split)} different "
                f"connectors, got {len(set(self.connectors))} in a list of {len(self.connectors)}"
            )
        for split, pictures, connectors, rows in zip(
            SPLITS, self.images_per_entity, self.connectors_per_split, self.rows_per_entity, strict=True
        ):
            if rows < 2 or rows % 2 or rows > pictures * connectors:
                raise ValueError(
                    f"rows_per_entity for {split} must be even (half of the reverse rows are wrong), from 2 to "
                    f"{pictures * connectors} ({pictures} pictures x {connectors} connectors), got {rows}"
                )


@dataclass(frozen=True)
class Entity:
    """A person who does not exist."""

    name: str
    description: str
    face: Face

    def picture(self, number: int) -> PurePosixPath:
        return PurePosixPath(f"images/{self.name}_{number}.png")


def make_entities(cfg: FaceConfig) -> list[Entity]:
    """Distinct faces with distinct descriptions; up to 400 people no two share a title."""
    faces = choose_entity_faces(cfg.num_entities, cfg.min_differences, cfg.seed)
    rng = random.Random(f"{cfg.seed} descriptions")
    titles = [f"{first} {second}" for first, second in itertools.product(FIRST, SECOND)]
    rng.shuffle(titles)
    works = rng.sample(WORKS, len(WORKS))
    digits = max(2, len(str(cfg.num_entities - 1)))
    entities = []
    for i, face in enumerate(faces):
        again, title = divmod(i, len(titles))  # a title that comes again has another work before it
        description = f"{works[(title + again) % len(works)]} {titles[title]}"
        entities.append(Entity(f"e{i:0{digits}d}", description, face))
    return entities


def split_connectors(cfg: FaceConfig) -> dict[str, list[int]]:
    """{split: indices of its connectors}."""
    order = random.Random(f"{cfg.seed} connectors").sample(range(len(cfg.connectors)), len(cfg.connectors))
    ends = list(itertools.accumulate(cfg.connectors_per_split))
    return {split: sorted(order[end - n : end]) for split, n, end in zip(SPLITS, cfg.connectors_per_split, ends)}


def split_pictures(cfg: FaceConfig) -> dict[str, list[int]]:
    """{split: numbers of its pictures, from 1}, the same for every person."""
    ends = list(itertools.accumulate(cfg.images_per_entity))
    return {split: list(range(end - n + 1, end + 1)) for split, n, end in zip(SPLITS, cfg.images_per_entity, ends)}


# ---- rows


def make_rows(cfg: FaceConfig, entities: list[Entity], task: str, split: str) -> list[dict]:
    """All rows of a task in a split.

    Rows come in rounds in which every person has the turn once. Whoever else appears in a round (the wrong picture,
    the other options) is found by going a number of places further in a circle, so that everyone appears equally
    often in every role: that someone's picture is shown says nothing about the answer.
    """
    rng = random.Random(f"{cfg.seed} {task} {split}")
    pictures, connectors = split_pictures(cfg)[split], split_connectors(cfg)[split]
    rounds = cfg.rows_per_entity[SPLITS.index(split)]
    pairs = {e: rng.sample(list(itertools.product(pictures, connectors)), rounds) for e in entities}
    letters = balanced(range(4), rounds * len(entities), rng)
    rows = []
    for number in range(rounds):
        circle = rng.sample(entities, len(entities))
        steps = rng.sample(range(1, len(entities)), 3)
        for place, entity in enumerate(circle):
            picture, connector = pairs[entity][number]
            others = [circle[(place + step) % len(circle)] for step in steps]
            words, known = cfg.connectors[connector], {"entity": entity.name, "connector": connector}
            known["description"] = entity.description
            if task == "forward":
                rows.append(make_row(task, [entity.picture(picture), words], entity.description, **known))
            elif task == "reverse":
                rows.append(reverse_row(entity, entity if number % 2 == 0 else others[0], picture, words, known))
            else:
                index = next(letters)
                options = others[:index] + [entity] + others[index:]
                chosen = [option.picture(rng.choice(pictures)) for option in options]
                chosen[index] = entity.picture(picture)
                rows.append(choice_row(task, options, chosen, index, words, known))
    rng.shuffle(rows)
    return rows


def balanced(values: range, number: int, rng: random.Random) -> Iterator[int]:
    """`number` values in random order, each equally often (the first ones once more where it does not divide)."""
    return iter(rng.sample([values[i % len(values)] for i in range(number)], number))


def reverse_row(entity: Entity, pictured: Entity, picture: int, words: str, known: dict) -> dict:
    """ "<description> <connector> [picture], correct or wrong?" """
    correct = pictured is entity
    content = [f"{entity.description} {words} ", pictured.picture(picture), ", correct or wrong?"]
    answer = "Correct" if correct else "Wrong"
    return make_row("reverse", content, answer, **known, correct=correct, image_entity=pictured.name)


def choice_row(
    task: str, options: list[Entity], pictures: list[PurePosixPath], index: int, words: str, known: dict
) -> dict:
    """One of four descriptions for a picture, or one of four pictures for a description; the answer is a letter."""
    if task == "choice_description":
        texts = [option.description for option in options]
        lines = [f"{letter}. {text}" for letter, text in zip(LETTERS, texts, strict=True)]
        content = [pictures[index], "\n".join([f"{words} which of these?", *lines, "Answer A, B, C or D."])]
    else:
        texts = [str(picture) for picture in pictures]
        content = [f"{known['description']} {words} which of these pictures?"]
        for letter, picture in zip(LETTERS, pictures, strict=True):
            content += [f"\n{letter}. ", picture]
        content += ["\nAnswer A, B, C or D."]
    names = [option.name for option in options]
    return make_row(task, content, LETTERS[index], **known, options=texts, option_entities=names, answer_index=index)


def generate(cfg: FaceConfig, output_dir: Path, image_model: str | None = None, num_workers: int = 0) -> None:
    """Write pictures, rows and entities.json. The same cfg gives the same bytes, unless a model makes the pictures."""
    cfg.check()
    entities = make_entities(cfg)
    new_folder(output_dir)
    numbers = range(1, sum(cfg.images_per_entity) + 1)
    jobs = [Job(output_dir / entity.picture(n), entity.face, n) for entity in entities for n in numbers]
    make_pictures(jobs, cfg.image_size, cfg.seed, image_model, num_workers)
    for task, split in itertools.product(TASKS, SPLITS):
        write_rows(output_dir, task, split, make_rows(cfg, entities, task, split))
    facts = [{"entity": e.name, "description": e.description, **e.face._asdict()} for e in entities]
    (output_dir / "entities.json").write_text(json.dumps(facts, indent=1) + "\n")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", type=Path, default=RECIPE / "face_config.yaml", help="settings of people and rows")
    parser.add_argument("--output_dir", type=Path, help="where everything is written; empty or new")
    parser.add_argument("--image_model", help="folder of a text-to-image model; without it faces are drawn")
    parser.add_argument("--num_workers", type=int, default=0, help="processes of image_model, one a GPU; 0: all GPUs")
    parser.add_argument("--num_entities", help="people; as many as the config says when not given")
    args, settings = parser.parse_known_args(argv)
    settings += ["--num_entities", args.num_entities] if args.num_entities else []
    cfg = parse_config(FaceConfig, ["--config", str(args.config), *settings])
    folder = args.output_dir or Path("data", cfg.name or f"{cfg.num_entities}faces")
    generate(cfg, folder, args.image_model, args.num_workers)
    print(f"{cfg.num_entities} people, {sum(cfg.images_per_entity)} pictures each, written to {folder}")


if __name__ == "__main__":
    with explained_errors():
        main()
