"""TensorBoard and Weights & Biases."""

from __future__ import annotations

import logging
import os
import secrets
from pathlib import Path
from typing import Any

from megasparse.config import Recipe
from megasparse.files import write_atomic
from megasparse.metrics.environment import layout_of

logger = logging.getLogger("megasparse")


def tensorboard(run_dir: Path, first_step: int) -> Any:
    from torch.utils.tensorboard.writer import SummaryWriter

    return SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step)


class Wandb:
    """Weights & Biases, which may slow down or stop a run for nothing: its failures are a warning.

    WANDB_MODE (online, offline, disabled) goes before the recipe. A resumed run continues under the same id.
    """

    def __init__(self, run_dir: Path, recipe: Recipe) -> None:
        self.run: Any = None
        mode = os.environ.get("WANDB_MODE", recipe.logging.wandb)
        if mode == "disabled":
            return
        id_file = run_dir / "wandb_id"
        if not id_file.exists():
            write_atomic(id_file, secrets.token_hex(4))
        for attempt in dict.fromkeys([mode, "offline"]):
            try:
                self.run = self._init(run_dir, recipe, attempt, id_file.read_text())
                return
            except Exception as error:  # noqa: BLE001  # whatever it is, the run goes on
                logger.warning("wandb (%s) does not start: %s", attempt, str(error).partition("\n")[0])

    @staticmethod
    def _init(run_dir: Path, recipe: Recipe, mode: Any, run_id: str) -> Any:
        import wandb

        settings = wandb.Settings(
            console="off",
            silent=True,
            init_timeout=20,
            login_timeout=1,
            finish_timeout=60,
            finish_timeout_raises=False,
            disable_git=True,
            disable_code=True,
            x_disable_stats=True,
            x_disable_meta=True,
        )
        run = wandb.init(
            project=recipe.logging.wandb_project,
            name=f"{recipe.name}-{layout_of(recipe)}",
            id=run_id,
            resume="allow" if mode == "online" else None,
            mode=mode,
            dir=run_dir,
            config=recipe.model_dump(mode="json"),
            settings=settings,
        )
        run.define_metric("*", step_metric="step")
        return run

    def log(self, values: dict[str, Any]) -> None:
        self._try(lambda: self.run.log(values))

    def close(self) -> None:
        self._try(lambda: self.run.finish())

    def _try(self, call: Any) -> None:
        if self.run is None:
            return
        try:
            call()
        except Exception as error:  # noqa: BLE001  # whatever it is, the run goes on
            logger.warning("wandb stops: %s", str(error).partition("\n")[0])
            self.run = None
