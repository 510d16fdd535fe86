"""Networks in C: compiled with every warning and sanitizer, and compared with torch."""

import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from strategies import networks_of_all_pieces, residual_networks, scramble
from torch import nn

from rmprune.c_source import c_source
from rmprune.convert import convert
from rmprune.errors import ExportError
from rmprune.export import deployable
from rmprune.lowering import lower
from rmprune.models import create_model

onnx_graph = pytest.importorskip("rmprune.onnx_graph")
pytest.importorskip("onnxscript")
pytestmark = pytest.mark.skipif(not shutil.which("gcc"), reason="there is no gcc")

WARNINGS = ["-Wall", "-Wextra", "-Wshadow", "-Werror", "-pedantic"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
GCC = shutil.which("gcc") or ""
MAIN = """
#include "net.h"
#include <stdio.h>
static INPUT given[NET_INPUT_SIZE];
static float output[NET_OUTPUT_SIZE];
int main(void)
{
    while (fread(given, sizeof(INPUT), NET_INPUT_SIZE, stdin) == NET_INPUT_SIZE) {
        net_run(given, output);
        fwrite(output, sizeof(float), NET_OUTPUT_SIZE, stdout);
    }
    return 0;
}
"""


def run_in_c(graph, images, folder):
    """What the C of a graph computes, under sanitizers; and what was written."""
    written = c_source(graph)
    (folder / "net.h").write_text(written.header)
    (folder / "net.c").write_text(written.source)
    kind = "uint8_t" if images.dtype == torch.uint8 else "float"
    (folder / "main.c").write_text(
        MAIN.replace("INPUT ", f"{kind} ").replace("(INPUT)", f"({kind})")
    )
    command = [
        GCC,
        "-std=c99",
        "-O3",
        *WARNINGS,
        *SANITIZERS,
        "net.c",
        "main.c",
        "-o",
        "net",
        "-lm",
    ]
    subprocess.run(command, cwd=folder, check=True)
    done = subprocess.run(
        [folder / "net"], input=images.numpy().tobytes(), stdout=subprocess.PIPE, check=True
    )
    found = torch.from_numpy(np.frombuffer(done.stdout, np.float32).copy())
    return found.view(len(images), -1), written


def check_in_c(net, images, folder):
    net = deployable(net)
    found, written = run_in_c(onnx_graph.to_onnx(net, images[:1]), images, folder)
    with torch.no_grad():
        expected = torch.cat([net(image[None]) for image in images])
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
    return written


@settings(max_examples=3, phases=[Phase.generate])
@given(residual_networks())
def test_random_networks(tmp_path_factory, model):
    x = torch.randn(2, 3, 13, 10)
    folder = tmp_path_factory.mktemp("c")
    plain = convert(model.float(), x, keep_bn=False)
    check_in_c(plain, x, folder)
    check_in_c(lower(plain, x, lambda _, forms, __: forms[-1]), x, folder)


@settings(max_examples=3, phases=[Phase.generate])
@given(networks_of_all_pieces())
def test_networks_of_all_pieces(tmp_path_factory, model):
    """Gates, shifted and partial activations, groups, pooling, any activation."""
    x = torch.randn(2, 3, 16, 32)
    plain = convert(model.float().eval(), x, keep_bn=False)
    check_in_c(plain, x, tmp_path_factory.mktemp("c"))


@pytest.mark.parametrize("carry", ["auto", "prelu", "partial"])
def test_every_way_of_carrying(tmp_path, carry):
    model = scramble(create_model("mobilenetv2_rm")).eval()
    x = torch.randn(2, 3, 16, 16)
    check_in_c(convert(model, x, keep_bn=False, carry=carry), x, tmp_path)


@pytest.mark.parametrize("counts_padding", [True, False])
def test_windows_that_end_beyond_the_image(tmp_path, counts_padding):
    pool = nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=counts_padding)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), pool, nn.Flatten()).eval()
    check_in_c(net, torch.randn(1, 3, 10, 12), tmp_path)


def test_residual_networks_too(tmp_path):
    stem = nn.Sequential(nn.Conv2d(3, 3, 7, 2, 3), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
    model = nn.Sequential(stem, scramble(create_model("resnet20"))).eval()
    check_in_c(model, torch.randn(1, 3, 33, 40), tmp_path)


def test_the_arena_is_what_was_planned(tmp_path):
    net = create_model("resnet20").eval()
    x = torch.randn(1, 3, 16, 16)
    written = check_in_c(convert(net, x, keep_bn=False), x, tmp_path)
    subprocess.run([GCC, "-std=c99", "-O3", "-c", "net.c"], cwd=tmp_path, check=True)
    symbols = subprocess.run(
        [shutil.which("nm") or "nm", "-S", "net.o"],
        cwd=tmp_path,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout
    arenas = re.findall(r"^\w+ (\w+) [bB] \w+_arena$", symbols, re.MULTILINE)
    assert sum(int(size, 16) for size in arenas) == written.arena_bytes
    assert f"NET_ARENA_BYTES {written.arena_bytes}\n" in written.header
    assert not re.search(r"\b(malloc|calloc|realloc|alloca)\b", written.source)
    # A plain net is a chain: of its activations two live at once.
    assert written.arena_bytes == 4 * (16 + 32) * 16 * 16
    undefined = re.findall(r"^ +U (\w+)$", symbols, re.MULTILINE)
    assert set(undefined) <= {"memset", "memcpy", "fminf", "fmaxf"}


def test_nothing_that_is_told_ends_the_comment():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten()).eval()
    graph = onnx_graph.to_onnx(net, torch.randn(1, 3, 2, 2))
    comment, *_ = c_source(graph, about=["data: folder:a*/b/*"]).header.split(" */\n")
    assert "*/" not in comment
    assert comment.count("/*") == 1


def test_what_there_is_no_c_for_is_named():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Softmax(1)).eval()
    graph = onnx_graph.to_onnx(model, torch.zeros(1, 3, 8, 8))
    with pytest.raises(ExportError, match="no C for the operation Softmax"):
        c_source(graph)
    with pytest.raises(ExportError, match="fixed batch of one image"):
        c_source(onnx_graph.to_onnx(nn.Conv2d(3, 4, 3), torch.zeros(2, 3, 8, 8)))
    with pytest.raises(ExportError, match="is no name in C"):
        c_source(graph, "my-net")
