"""The AVX-512 kernels on a processor without AVX-512: the same sources, its own instructions written out in C++.

It takes a build of its own, so the tests of the operators, the decoder and the loss run in a process that loads it.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent
RUN = """
import sys
import pytest, torch

torch.ops.load_library(sys.argv[1])
torch.ops.load_library = lambda path: None  # the operators are there already
names = ["native_ops", "native_attention", "native_decoder", "native_layers", "packed_attention", "loss_backends"]
sys.exit(pytest.main(["-q", "-x", "-k", "native and not built", *(f"{sys.argv[2]}/test_{name}.py" for name in names)]))
"""


def test_emulated_avx512_kernels_pass_the_tests_of_the_native_backend(tmp_path: Path) -> None:
    configure = ["cmake", "-S", TESTS.parent, "-B", tmp_path, "-G", "Ninja", "-DNEGOTIATOR_EMULATE_AVX512=ON"]
    # No CUDA compiler: the kernels of the GPU are not what is tested.
    for command in (
        [*configure, "-DCMAKE_CUDA_COMPILER=", f"-DPython_EXECUTABLE={sys.executable}"],
        ["cmake", "--build", tmp_path],
    ):
        done = subprocess.run([Path(sys.executable).parent / command[0], *command[1:]], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    done = subprocess.run(
        [sys.executable, "-c", RUN, tmp_path / "_C.so", TESTS], capture_output=True, text=True, cwd=TESTS.parent
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
