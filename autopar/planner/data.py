"""What a run trains on: the model file's own data where it has some, else its example batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from autopar.ir.run import RunSettings

if TYPE_CHECKING:
    from torch import Tensor

    from autopar.capture.model_source import ModelSource
    from autopar.runtime.feed import Feed, Form

EXAMPLE_ONLY = "every step trains on the example batch: the model file has no dataset() and no make_batch(step)"


def open_feed(
    source: ModelSource, form: Form, example: Sequence[Tensor], settings: RunSettings, first_step: int
) -> tuple[Feed, tuple[str, ...]]:
    """The batches of a rank from a step on, and notes for the reader.

    Args:
        source: of the model.
        form: of batches, and which samples this rank reads.
        example: the whole example batch, in graph order.
        settings: of the run.
        first_step: whose batch comes first.

    Raises:
        InputError: what the file gives is no dataset.
    """
    from autopar.capture.user_code import user_errors
    from autopar.runtime import feed

    text = source.text
    if source.make_batch is not None:
        return feed.Feed(feed.made_by_step(source.make_batch, form, text, first_step)), ()
    if source.dataset is None:
        return feed.Feed(feed.repeated(example), ahead=0), (EXAMPLE_ONLY,)
    with user_errors(f"{text}: dataset() failed", source.user_file):
        found = source.dataset()
    dataset = feed.open_dataset(found, text, settings.data_workers)
    batches = feed.batches_of(dataset, form, form.batch_size, settings.data_seed, first_step)
    return feed.Feed(batches), ()
