"""What X-SAM adds around pushes to the hub: its files in each of them, and a word where one fails."""

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
    "Pass hub_token=... or run `hf auth login` with a token of type write from https://huggingface.co/settings/tokens, "
    "or name a repository of yours in hub_model_id."
)


class PushCallback(TrainerCallback):
    """Completes the pushes that the stock `Trainer` makes when it saves a checkpoint (`hub_strategy="every_save"`).

    They publish the output folder, into which the stock method copies the checkpoint's weights and configuration by
    name, and write no card.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer  # one of X-SAM's, whose module imports this one
        self._watched: set[Future] = set()

    def on_push_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Put X-SAM's settings and a card into the folder that is about to be pushed."""
        trainer = self._trainer
        # After training, `push_to_hub` goes on to write both itself.
        if trainer.is_in_train and trainer.is_world_process_zero():
            trainer.xsam_config.save_pretrained(str(args.output_dir))
            try:
                trainer.create_model_card(model_name=str(trainer.hub_model_id).split("/")[-1])
            except Exception as error:  # at this point the stock Trainer writes none: a card may not end a training
                logger.warning("A checkpoint is pushed without a model card, which could not be written: %r", error)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Have a failure of the pushes in the background logged; the stock `Trainer` drops it."""
        push = getattr(self._trainer, "push_in_progress", None)
        jobs = set(push.jobs if push else ())
        for job in jobs - self._watched:
            job.add_done_callback(self._log_failure)
        self._watched = jobs  # a push that is still under way comes again at the next save

    def _log_failure(self, job: Future) -> None:
        if not job.cancelled() and (error := job.exception()) is not None:
            repo = self._trainer.hub_model_id
            logger.error(
                "A checkpoint was not pushed to %r: %s", repo, with_advice(error, self._trainer), exc_info=error
            )


@contextmanager
def refusal_explained(trainer: "Trainer") -> Iterator[None]:
    """Have an error of the hub within the block say what to do where the token may not write."""
    try:
        yield
    except HfHubHTTPError as error:
        with_advice(error, trainer)
        raise


def with_advice(error: BaseException, trainer: "Trainer") -> BaseException:
    """Add to a refusal by the hub, where there is no such advice yet, which token and repository it takes."""
    if not isinstance(error, HfHubHTTPError) or error.response.status_code not in REFUSED or ADVICE in str(error):
        return error
    repo, folder = trainer.hub_model_id or trainer.args.hub_model_id, str(trainer.args.output_dir)
    error.append_to_message(f"\nThe token may not write to {repo or Path(folder).name!r}. {ADVICE}")
    if trainer.hub_model_id is not None:  # the repository was there, and `push_to_hub` saves before it uploads
        error.append_to_message(
            f" The model is saved in {folder!r}; publish it with trainer.push_to_hub(token=...) or "
            f"`hf upload {trainer.hub_model_id} {folder} --exclude 'checkpoint-*/*'`."
        )
    return error
