"""The stages of a conversion on a terminal, or as lines in a log."""

import sys
from collections.abc import Mapping
from typing import Any


class Progress:
    """Draws a conversion's stages on standard error: bars on a terminal, a line a stage elsewhere. A converter.conversion.Reporter."""

    def __enter__(self) -> "Progress":
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        self._console = Console(stderr=True, soft_wrap=not sys.stderr.isatty())
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self._bars = Bars(*columns, TextColumn("{task.fields[facts]}"), console=self._console, disable=not self._console.is_terminal)
        self._bars.start()
        self._task: Any = None
        self._stage, self._done, self._total, self._facts = "", 0, 0, ""
        return self

    def __exit__(self, *_: object) -> None:
        self._finish()
        self._bars.stop()

    def stage(self, name: str, total: int) -> None:
        """A stage of `total` units begins."""
        self._finish()
        self._stage, self._done, self._total, self._facts = name, 0, total, ""
        self._task = self._bars.add_task(name, total=total, facts="")
        if not self._console.is_terminal:
            self._console.print(f"{name} ...", markup=False)

    def advance(self, facts: Mapping[str, Any]) -> None:
        """One unit of the stage is done."""
        self._done += 1
        # A resumed stage says at which step it goes on.
        self._done = int(facts["step"]) + 1 if "step" in facts else self._done
        self._facts = " ".join(f"{name} {facts[name]:.4g}" for name in ("kl", "loss", "learning_rate") if name in facts)
        self._bars.update(self._task, completed=self._done, facts=self._facts)

    def note(self, text: str) -> None:
        """A fact worth a line."""
        self._console.print(text, markup=False, highlight=False)

    def _finish(self) -> None:
        if self._stage and not self._console.is_terminal:
            self._console.print(f"{self._stage}: {self._done} of {self._total} {self._facts}".rstrip(), markup=False)
        self._stage = ""
