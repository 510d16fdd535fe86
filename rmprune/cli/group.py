"""The command `rmprune`: what it says when something goes wrong."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import ExitStack, redirect_stdout
from pathlib import Path
from typing import Any

import click

from rmprune import __version__, processes
from rmprune.errors import PeerError, RmpruneError, UsageError, first_line


class _Commands(click.Group):
    """Turns every expected error into one line: status 2 for wrong use, 1 for failure."""

    def main(self, args: Sequence[str] | None = None, *_: Any, **options: Any) -> Any:
        """Run a command and exit."""
        # With a CUDA toolkit but no GPU, torch logs this whenever anything is compiled or timed.
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
        words = list(sys.argv[1:] if args is None else args)
        debug = "--debug" in words  # wherever it stands, before the command or behind it
        words = [word for word in words if word != "--debug"]
        try:
            with warnings.catch_warnings(), ExitStack() as stack:
                warnings.showwarning = _show_warning
                stack.enter_context(processes.joined())
                if not processes.is_first():
                    nowhere = stack.enter_context(Path(os.devnull).open("w"))
                    stack.enter_context(redirect_stdout(nowhere))
                status = super().main(words, **{**options, "standalone_mode": False})
        except click.UsageError as error:
            _fail(error.format_message(), 2)
        except click.ClickException as error:
            _fail(error.format_message(), error.exit_code)
        except click.Abort:
            resumes = any("--resume" in parameter.opts for parameter in _parameters(self, words))
            _fail("interrupted; what was saved stays" + ", and --resume goes on" * resumes, 130)
        except UsageError as error:
            if debug:
                raise
            _fail(str(error), 2)
        except PeerError:
            sys.exit(1)
        except RmpruneError as error:
            if debug:
                raise
            _fail(str(error), 1)
        except Exception as error:
            if debug:
                raise
            _fail(f"{type(error).__name__}: {first_line(error)} (--debug shows where)", 1)
        sys.exit(status if isinstance(status, int) else 0)


def _parameters(group: click.Group, words: Sequence[str]) -> list[click.Parameter]:
    """Those of the command that words call."""
    names = [word for word in words if word in group.commands]
    return group.commands[names[0]].params if names else []


def _fail(message: str, status: int) -> None:
    click.echo(f"rmprune: {message}", err=True)
    sys.exit(status)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    if processes.is_first():
        click.echo(f"rmprune: note: {message}", err=True)


@click.group(
    cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 96}
)
@click.version_option(__version__, prog_name="rmprune")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(debug: bool) -> None:
    """Make residual CNNs smaller and faster, and prove it.

    rmprune trains a residual network with an L1 penalty on its BatchNorm scales, rewrites it
    exactly into a plain network without additions, and removes the channels that training
    switched off.

    \b
    Everything at once:    rmprune slim --sparsity 5e-3 --threshold 5e-3
    Step by step:          rmprune train    --sparsity 5e-3 --out runs/a
                           rmprune prune    runs/a --threshold 5e-3
                           rmprune finetune runs/a/threshold-0.005
    See what came out:     rmprune inspect  runs/a/threshold-0.005/net.safetensors
    To the device:         rmprune export   runs/a/threshold-0.005 --format c --quantize int8
    Beside other nets:     rmprune bench    runs/a/threshold-0.005 torchvision:mobilenet_v2
    """
    del debug  # taken from the command line by _Commands.main
