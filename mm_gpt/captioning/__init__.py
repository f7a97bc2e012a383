"""Captions for many images, into a file that survives being killed.

Inputs are files, folders, globs, WebDataset tars and URLs; each image becomes one line with its caption or its error.
Lines are appended and synced batch by batch. The next run reads what is there, cuts off a torn last line and goes on.

Memory: threads bring each image into the model's pixels and let its own go. What they decode at a time takes at most
DECODING_BYTES, beside the undecoded files of LOADER_THREADS images; an image that needs more is decoded alone. (The C
library may keep what a thread has freed: up to 4 bytes for each pixel of its largest image.)
"""

import itertools
import os
from collections import Counter, deque
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from mm_gpt.captioning.inputs import ImageItem, find_images, identity, without_name
from mm_gpt.captioning.output import CaptionFile, CaptionLine, CaptionStream
from mm_gpt.document import Image
from mm_gpt.errors import ImageError
from mm_gpt.images import BYTES_PER_PIXEL, ByteBudget, image_size
from mm_gpt.system.stopping import Stopper
from mm_gpt.templates.prompts import CAPTION_PROMPT

if TYPE_CHECKING:
    from mm_gpt.inference.assistant import Assistant, GenerationOptions
    from mm_gpt.processor import Processor

LOADER_THREADS = 4
DECODING_BYTES = 2**30


def share_cores() -> None:
    """Let torch's threads sleep while they wait for each other, which otherwise spin. Call before torch is imported.

    On cores that are busy with something else, be it the threads that load images, a thread that spins keeps the one
    that it waits for from running: captions took seven times as long. An OMP_WAIT_POLICY that is set stays.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def caption_lines(
    assistant: "Assistant",
    items: Sequence[ImageItem],
    *,
    batch_size: int = 8,
    prompt: str = CAPTION_PROMPT,
    options: "GenerationOptions | None" = None,
) -> Iterator[list[CaptionLine]]:
    """The lines of each batch, in the order of `items`. While the model runs, threads load the images that follow.

    Raises MMGPTError when the prompt does not fit, an option is impossible or the model takes no images; a broken image
    is a line with its error.
    """
    budget = ByteBudget(DECODING_BYTES)
    pool = ThreadPoolExecutor(LOADER_THREADS, thread_name_prefix="load-image")
    errors: dict[int, str] = {}

    def loaded() -> Iterator[Image | None]:
        ahead: deque[Future[Image | str]] = deque()
        left = iter(items)
        for number in range(len(items)):
            for item in itertools.islice(left, batch_size + 1 - len(ahead)):
                ahead.append(pool.submit(_load, item, assistant.processor, budget))
            image = ahead.popleft().result()
            if isinstance(image, str):
                errors[number] = image
            yield None if isinstance(image, str) else image

    try:
        captions = assistant.captions(loaded(), batch_size=batch_size, prompt=prompt, **(options or {}))
        numbered = zip(enumerate(items), captions, strict=True)
        while batch := list(itertools.islice(numbered, batch_size)):
            yield [
                CaptionLine(item.name, error=errors[number])
                if caption is None
                else CaptionLine(item.name, caption=caption.text)
                for (number, item), caption in batch
            ]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _load(item: ImageItem, processor: "Processor", budget: ByteBudget) -> Image | str:
    """The image in the model's pixels, or why there is none."""
    try:
        data = item.read()
        try:
            height, width = image_size(data)
            with budget.take(height * width * BYTES_PER_PIXEL):
                return processor.tiled(Image(data))
        except ImageError as error:
            raise without_name(error, data) from error
    except ImageError as error:
        return str(error)


@dataclass(frozen=True)
class Summary:
    total: int
    """Images that the inputs lead to."""
    before: int
    """Lines of those that were there already."""
    written: int
    """Lines that this run wrote, errors included."""
    errors: int
    """Lines of those images that hold an error, also from before."""
    stopped: bool
    """Ctrl-C or SIGTERM came before the end."""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """What else the inputs hold: files by suffix, such as ".json"; "" for none."""

    def __str__(self) -> str:
        """`done 10 of 12 (3 from before), errors 1; left out: 12 .txt, 3 .heic`"""
        before = f" ({self.before} from before)" if self.before else ""
        kinds = sorted(self.left_out.items(), key=lambda kind: (-kind[1], kind[0]))
        named = [f"{count} {suffix if len(suffix) <= 12 else 'other'}".rstrip() for suffix, count in kinds[:5]]
        named += [f"{rest} more"] if (rest := sum(count for _, count in kinds[5:])) else []
        left_out = f"; left out: {', '.join(named)}" if named else ""
        return f"done {self.before + self.written} of {self.total}{before}, errors {self.errors}{left_out}"


def caption_images(
    load: "Callable[[], Assistant]",
    inputs: Sequence[str | Path],
    out: Path | BinaryIO,
    *,
    batch_size: int = 8,
    prompt: str = CAPTION_PROMPT,
    overwrite: bool = False,
    retry_errors: bool = False,
    progress: bool | None = None,
    options: "GenerationOptions | None" = None,
) -> Summary:
    """Caption all images of `inputs` into `out`: a `.jsonl` or `.csv` file, continued if it exists, or a binary stream.

    `load` is called when there is something to do. `retry_errors` redoes the lines with an error, `overwrite` all.
    Ctrl-C and SIGTERM finish and write the current batch. `progress` None shows a bar when stderr is a terminal.
    Raises MMGPTError for inputs without images, an output that cannot be continued, that is being written by another
    process, or whose disk is full: the lines before stay, and the next call goes on behind them.
    """
    from tqdm import tqdm

    left_out: Counter[str] = Counter()
    items = find_images(inputs, left_out)
    wanted = {identity(item.name): item for item in items}
    retry: Container[str] = wanted if retry_errors else ()
    output = CaptionFile(out, overwrite=overwrite, retry=retry) if isinstance(out, Path) else CaptionStream(out)
    with closing(output):
        pending = [item for key, item in wanted.items() if key not in output.done]
        before = len(items) - len(pending)
        errors = sum(output.done.get(key, False) for key in wanted)
        written, stopped = 0, False
        if pending:
            assistant = load()
            bar = tqdm(
                total=len(items),
                initial=before,
                unit="image",
                disable=None if progress is None else not progress,
                dynamic_ncols=True,
            )
            lines_of = caption_lines(assistant, pending, batch_size=batch_size, prompt=prompt, options=options)
            with Stopper() as stopper, bar, closing(lines_of):  # type: ignore[type-var]
                for lines in lines_of:
                    # Lines on a terminal would be printed into the bar.
                    with nullcontext() if isinstance(output, CaptionFile) else tqdm.external_write_mode():
                        output.write(lines)
                    written += len(lines)
                    errors += sum(line.error is not None for line in lines)
                    bar.update(len(lines))
                    if stopper.requested and written < len(pending):
                        stopped = True
                        break
    return Summary(len(items), before, written, errors, stopped, left_out)
