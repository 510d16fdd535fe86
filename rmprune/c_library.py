"""Networks in C as functions of this process, by the C compiler of this machine."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rmprune.c_source import CSource
from rmprune.errors import ExportError

Run = Callable[[Tensor], Tensor]


def find_compiler() -> str | None:
    """The path of a C compiler, if there is one."""
    return next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)


def compiled(written: CSource, name: str = "net", *options: str) -> Run:
    """What C source computes, compiled by ``-O3`` into a library that exists in this process.

    Args:
        written: See `rmprune.c_source.c_source`.
        name: That it was written with.
        options: For the compiler, besides.

    Returns:
        A function of ``(N, …)``, which computes one image after the other, to ``(N, outputs)``.

    Raises:
        ExportError: There is no compiler, or the source does not compile.
    """
    compiler = find_compiler()
    if compiler is None:
        raise ExportError("there is no C compiler here: none of cc, gcc and clang is on the PATH")
    with tempfile.TemporaryDirectory(prefix="rmprune-") as folder:
        source, library = Path(folder) / f"{name}.c", Path(folder) / f"{name}.so"
        source.with_suffix(".h").write_text(written.header, encoding="utf-8")
        source.write_text(written.source, encoding="utf-8")
        command = ["-std=c99", "-O3", *options, "-shared", "-fPIC", source, "-o", library, "-lm"]
        done = subprocess.run(  # noqa: S603
            [compiler, *map(str, command)], capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            raise ExportError(f"{name}.c does not compile: {done.stderr.strip().splitlines()[0]}")
        function = getattr(ctypes.CDLL(str(library)), f"{name}_run")

    def run(images: Tensor) -> Tensor:
        outputs = np.zeros((len(images), written.outputs), np.float32)
        for given, output in zip(images.contiguous().numpy(), outputs, strict=True):
            function(ctypes.c_void_p(given.ctypes.data), ctypes.c_void_p(output.ctypes.data))
        return torch.from_numpy(outputs)

    return run
