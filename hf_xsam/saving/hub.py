"""Pushes to the hub: X-SAM's files in each push, and advice if a push fails."""

import logging
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub.errors import HfHubHTTPError
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

if TYPE_CHECKING:
    from transformers import Trainer

logger = logging.getLogger(__name__)

REFUSED = (401, 403)
ADVICE = (
    "Pass hub_token=... or run `hf auth login` with a write token from https://huggingface.co/settings/tokens, or set "
    "hub_model_id to a repository of your own."
)


class PushCallback(TrainerCallback):
    """Adds X-SAM's settings and a model card to the pushes at each save (`hub_strategy="every_save"`).

    The stock `Trainer` pushes the output folder, into which it copies the checkpoint's weights and configuration. It
    writes no card at that point.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer  # one of X-SAM's, whose module imports this one
        self._watched: set[Future] = set()

    def on_push_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write X-SAM's settings and a card into the folder that is about to be pushed."""
        trainer = self._trainer
        # After training, `push_to_hub` writes both itself.
        if trainer.is_in_train and trainer.is_world_process_zero():
            trainer.xsam_config.save_pretrained(str(args.output_dir))
            try:
                trainer.create_model_card(model_name=str(trainer.hub_model_id).split("/")[-1])
            except Exception as error:  # a card that fails must not end the training
                logger.warning("A checkpoint is pushed without a model card, because writing it failed: %r", error)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Log failures of the pushes in the background; the stock `Trainer` ignores them."""
        push = getattr(self._trainer, "push_in_progress", None)
        jobs = set(push.jobs if push else ())
        for job in jobs - self._watched:
            job.add_done_callback(self._log_failure)
        self._watched = jobs  # a push that has not finished is seen again at the next save

    def _log_failure(self, job: Future) -> None:
        if not job.cancelled() and (error := job.exception()) is not None:
            repo = self._trainer.hub_model_id
            logger.error(
                "A checkpoint was not pushed to %r: %s", repo, with_advice(error, self._trainer), exc_info=error
            )


@contextmanager
def refusal_explained(trainer: "Trainer") -> Iterator[None]:
    """Within the block, add advice to an error of the hub if the token may not write."""
    try:
        yield
    except HfHubHTTPError as error:
        with_advice(error, trainer)
        raise


def with_advice(error: BaseException, trainer: "Trainer") -> BaseException:
    """Add advice about token and repository to an error of the hub that has none yet."""
    if not isinstance(error, HfHubHTTPError) or error.response.status_code not in REFUSED or ADVICE in str(error):
        return error
    repo, folder = trainer.hub_model_id or trainer.args.hub_model_id, str(trainer.args.output_dir)
    error.append_to_message(f"\nThe token may not write to {repo or Path(folder).name!r}. {ADVICE}")
    if trainer.hub_model_id is not None:  # the repository exists, and `push_to_hub` saves before it uploads
        error.append_to_message(
            f" The model is saved in {folder!r}; publish it with trainer.push_to_hub(token=...) or "
            f"`hf upload {trainer.hub_model_id} {folder} --exclude 'checkpoint-*/*'`."
        )
    return error
