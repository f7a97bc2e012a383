"""Comparisons about plain pictures, which only who sees them can decide."""

from pathlib import Path

from PIL import Image as PILImage

from mm_gpt.alignment.reward_model import answer_of
from mm_gpt.datasets.comparisons import Comparison, write_comparisons
from mm_gpt.document import Image, Message

COLOURS = {"red": (220, 30, 30), "blue": (30, 30, 220)}


def user(*content: str | Image) -> Message:
    return {"role": "user", "content": list(content)}


def colour_comparisons(folder: Path, count: int) -> list[Comparison]:
    """Pictures of one colour each; the better answer names it."""
    comparisons = []
    for number in range(count):
        right, wrong = ("red", "blue") if number % 2 else ("blue", "red")
        r, g, b = COLOURS[right]
        path = folder / f"{number}.png"
        PILImage.new("RGB", (32, 32), (r - number % 16, g + number // 16, b - number % 7)).save(path)
        completions = tuple(
            type(answer_of(""))(answer_of(f"A {name} ground.").messages, rank=rank)
            for rank, name in enumerate((right, wrong))
        )
        comparisons.append(Comparison(f"picture {number}", (user(Image(path), "Describe the image."),), completions))
    return comparisons


def write_colours(folder: Path, count: int) -> Path:
    """`comparisons.jsonl` in the folder, images beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    write_comparisons(colour_comparisons(folder, count), folder / "comparisons.jsonl")
    for path in folder.glob("*.png"):
        path.unlink()
    return folder
