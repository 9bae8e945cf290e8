"""The micro-batches of an optimizer step under DeepSpeed, whose engine holds their gradient and steps."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field

from torch import Tensor

from .deepspeed import Engine
from .replay import Window


@dataclass
class EngineWindow(Window):
    """The training steps of one accumulation window under DeepSpeed, whose last backward pass takes no step."""

    engine: Engine = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.engine.begin()

    def run(self, synchronize: bool = True) -> Tensor:
        """See [`Window.run`]; the gradient is in `.grad` of the engine's parts."""
        loss = super().run(synchronize)
        self.engine.take_gradient()
        return loss

    def zero_grad(self) -> None:
        """Leave no gradient."""
        self.engine.drop_gradient()

    def gradients_set_aside(self) -> AbstractContextManager[None]:
        """Give the block no gradient, and put back after it the one that there was."""
        return self.engine.gradient_set_aside()

    def optimizer_waits(self) -> AbstractContextManager[None]:
        """Have no optimizer step within the block, where DeepSpeed's engine takes it in the last backward pass."""
        return self.engine.waiting()

    def end(self) -> None:
        """End the first passes."""
        self.engine.take_gradient()

    def step_optimizer(self) -> None:
        """Step, where the Trainer's call of `optimizer.step()` does nothing."""
        self.engine.step()

    @contextmanager
    def _synchronizing(self, synchronizes: bool) -> Iterator[None]:
        state = self.accelerator.gradient_state
        state._set_sync_gradients(synchronizes)  # the engine's boundary of accumulation follows it
        try:
            yield
        finally:
            state._set_sync_gradients(True)
