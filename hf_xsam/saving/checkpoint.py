"""X-SAM's state in a Trainer checkpoint: `xsam_state.json`, and the eigenvector v in safetensors files.

In a sharded run, every process writes its own part of v and the part's offsets. Nothing is gathered, and any number of
processes can read v back. Each file is written to a temporary name and then renamed; the JSON file comes last.
"""

import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..config import XSAMConfig
from ..functional.power_iteration import Spectrum
from ..functional.tensors import Part, is_sharded, local, norm, offsets, shard_like, whole_shape, wide_dtype
from ..state import XSAMState

logger = get_logger(__name__)  # logs on the main process only

STATE_NAME = "xsam_state.json"
VECTOR_NAME = "xsam_eigenvector-{part:05d}-of-{parts:05d}.safetensors"
TRAINER_STATE_NAME = "trainer_state.json"
REMEDY = "Resume from another checkpoint, or delete its xsam_* files to estimate the eigenvector again."


def save_state(state: XSAMState, config: XSAMConfig, folder: str, accelerator: Accelerator, writes: bool) -> None:
    """Write `state` and `config` into `folder`. Call it on every process.

    Args:
        state: the state to save.
        config: the settings of the run, compared with those of the run that resumes.
        folder: the checkpoint's folder.
        accelerator: the trainer's accelerator.
        writes: whether this process writes the files that all processes share (`args.should_save`).
    """
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    vector = state.eigenvector
    sharded = vector is not None and any(is_sharded(part) for part in vector.values())
    parts = accelerator.num_processes if sharded else 1
    if vector is not None and (sharded or writes):
        part = accelerator.process_index if sharded else 0
        held = {name: local(tensor).contiguous() for name, tensor in vector.items()}
        places = {name: json.dumps(offsets(tensor)) for name, tensor in vector.items()}
        target = path / VECTOR_NAME.format(part=part, parts=parts)
        save_file(held, target.with_suffix(".partial"), metadata=places)
        os.replace(target.with_suffix(".partial"), target)
    accelerator.wait_for_everyone()
    if writes:
        contents = {
            "config": config.to_dict(),
            "step": state.step,
            "refreshed_at": state.refreshed_at,
            "skipped_steps": state.skipped_steps,
            "eigenvalue": None if state.eigenvalue is None else state.eigenvalue.item(),
            "spectrum": None if state.spectrum is None else {k: v.item() for k, v in state.spectrum._asdict().items()},
            "processes": accelerator.num_processes,
            "eigenvector_parts": None if vector is None else parts,
        }
        target = path / STATE_NAME
        target.with_suffix(".partial").write_text(json.dumps(contents, indent=2) + "\n")
        os.replace(target.with_suffix(".partial"), target)


def load_state(
    folder: str, config: XSAMConfig, parameters: Mapping[str, Tensor], accelerator: Accelerator
) -> XSAMState | None:
    """Read the state that `save_state` wrote, sharded as `parameters` are now.

    Args:
        folder: the checkpoint's folder.
        config: the settings of this run; differences from the checkpoint's are logged as a warning.
        parameters: the parameters that the eigenvector may span, by name.
        accelerator: the trainer's accelerator.

    Returns:
        The state, or None, with a warning, if the checkpoint has none.

    Raises:
        ValueError: for a file that is missing, damaged, or from another model; the message names the file.
    """
    path = Path(folder) / STATE_NAME
    if not path.exists():
        logger.warning(
            "%s has no %s: it was written without X-SAM, or with save_only_model. The eigenvector is estimated again.",
            folder,
            STATE_NAME,
        )
        return None
    try:
        contents = json.loads(path.read_text())
        parts = contents["eigenvector_parts"]
        state = XSAMState(
            step=contents["step"], refreshed_at=contents["refreshed_at"], skipped_steps=contents["skipped_steps"]
        )
        eigenvalue, saved = contents["eigenvalue"], dict(contents["config"])
        spectrum = None if contents["spectrum"] is None else Spectrum(**contents["spectrum"])
        processes = contents["processes"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}). {REMEDY}") from error
    _warn_of_differences(folder, saved, config, processes, accelerator.num_processes)
    if parts is not None:
        files = _open_vector(Path(folder), parts)
        if spectrum is None:  # before the first refresh: the vector that the user set
            [file] = files.values()
            state.eigenvector = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no dictionary
        else:
            state.eigenvector = _read_vector(files, parameters)
            first = next(iter(state.eigenvector.values()))
            scalar = partial(torch.tensor, dtype=first.dtype, device=accelerator.device)
            state.eigenvalue, state.spectrum = scalar(eigenvalue), Spectrum(*map(scalar, spectrum))
    return state


def _open_vector(folder: Path, parts: int) -> dict[Path, Any]:
    paths = [folder / VECTOR_NAME.format(part=part, parts=parts) for part in range(parts)]
    files = {}
    for path in paths:
        try:
            files[path] = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is missing or damaged ({error}). {REMEDY}") from error
    return files


def _read_vector(files: Mapping[Path, Any], parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    for path, file in files.items():
        if other := sorted(set(file.keys()) - parameters.keys()):
            raise ValueError(
                f"{path} spans parameters that are not in this run's eigen_scope, such as {other[0]!r}. "
                f"Resume with the model and eigen_scope that wrote it. {REMEDY}"
            )
    vector = {}
    for name in next(iter(files.values())).keys():  # noqa: SIM118  # no dictionary
        parameter = parameters[name]
        whole = torch.zeros(whole_shape(parameter), dtype=wide_dtype(parameter))
        whole = whole.flatten() if isinstance(parameter, Part) else whole  # as its parts are
        for path, file in files.items():
            part, start = file.get_tensor(name), json.loads((file.metadata() or {}).get(name, "[]"))
            place = tuple(slice(at, at + size) for at, size in zip(start, part.shape, strict=False))
            if len(start) != part.dim() or part.dim() != whole.dim() or whole[place].shape != part.shape:
                raise ValueError(
                    f"{path} holds {name!r} in shape {tuple(part.shape)} at {start}, which does not fit the "
                    f"parameter's {tuple(whole.shape)}. Resume with the model that wrote it. {REMEDY}"
                )
            whole[place] = part
        vector[name] = shard_like(whole, parameter)
    length = norm(list(vector.values())).item()
    if not abs(length - 1) < 1e-2:
        raise ValueError(f"{next(iter(files))} is damaged: the eigenvector's norm is {length:g}, not 1. {REMEDY}")
    return vector


def _warn_of_differences(
    folder: str, saved: Mapping[str, Any], config: XSAMConfig, processes: int, processes_now: int
) -> None:
    now = config.to_dict()
    changed = [f"{name} {saved.get(name)!r} -> {now[name]!r}" for name in now if saved.get(name) != now[name]]
    if changed:
        logger.warning("%s was written with other X-SAM settings: %s.", folder, ", ".join(changed))
    if processes != processes_now:
        logger.warning(
            "%s was written by %d processes, and %d resume it: X-SAM continues with the same eigenvector, but the run "
            "will not equal an uninterrupted one bit for bit.",
            folder,
            processes,
            processes_now,
        )


def checkpoints_in(folder: str | os.PathLike[str]) -> list[Path]:
    """Return the Trainer's checkpoints in `folder`, the newest first."""
    prefix = f"{PREFIX_CHECKPOINT_DIR}-"
    numbered = [path for path in Path(folder).glob(f"{prefix}*") if path.name[len(prefix) :].isdecimal()]
    return sorted(numbered, key=lambda path: int(path.name[len(prefix) :]), reverse=True)


def last_complete_checkpoint(folder: str, ranks: Sequence[int] | None = None) -> str:
    """Return the newest complete checkpoint in `folder`; warn about newer ones that are skipped.

    If a process is killed while it saves, it leaves a folder from which the stock Trainer would resume without the
    optimizer state or the step count.

    Args:
        folder: the run's output folder.
        ranks: the processes whose files are in it; None is all that wrote the checkpoint.

    Raises:
        ValueError: if there is none.
    """
    for path in checkpoints_in(folder):
        if _is_complete(path, ranks):
            return str(path)
        logger.warning("%s is skipped: saving it was interrupted.", path)
    # The stock message's words come first: callers match them.
    raise ValueError(
        f"No valid checkpoint found in output directory ({folder}): none was written to its end. Train without "
        "resume_from_checkpoint."
    )


def _is_complete(checkpoint: Path, ranks: Sequence[int] | None) -> bool:
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text())  # the Trainer writes it last
        state = json.loads((checkpoint / STATE_NAME).read_text()) if (checkpoint / STATE_NAME).exists() else {}
    except (OSError, ValueError):
        return False
    # The other processes write their random states in parallel.
    wrote = range(state.get("processes", 1))
    random_states = [checkpoint / f"rng_state_{rank}.pth" for rank in wrote if ranks is None or rank in ranks]
    return len(wrote) == 1 or all(zipfile.is_zipfile(path) for path in random_states)
