"""What the GPU kernels cost on Hopper, read in their machine code on any machine, without a GPU.

Triton's are compiled here; those of `csrc/` have been, if there was a CUDA compiler when it was built.

    python -m benchmarks.aot            all variants
    python -m benchmarks.aot gemm       those whose label contains "gemm"

Per variant: registers a thread, bytes spilled, shared memory a block, and how often the instructions occur that tell a
good kernel from a slow one: HGMMA and HMMA (tensor cores, a warpgroup and a warp at a time), UTMALDG and UTMASTG (the
copy engine), LDGSTS (device to shared memory, behind the back of the registers), LDG and STG (device memory), those of
them that move 16 bytes. Exits with 1 if a kernel spills or needs more shared memory than
a block can have, which Triton itself finds out only at the launch. The last line on stdout is JSON.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from negotiator_kernels import triton_attention, triton_exponentials, triton_gemm, triton_objective, triton_sampling
from negotiator_kernels.availability import native_has_cuda, native_off_reason

HOPPER = GPUTarget("cuda", 90, 32)
SHARED_LIMIT = 232_448  # bytes a block, static and dynamic together
INSTRUCTIONS = {
    "HGMMA": r"HGMMA",
    "HMMA": r"\bHMMA",
    "UTMALDG": r"UTMALDG",
    "UTMASTG": r"UTMASTG",
    "LDGSTS": r"\bLDGSTS",
    "LDG": r"\bLDG\.",
    "LDG.128": r"\bLDG\.\S*\b128\b",
    "STG": r"\bSTG\.",
    "STG.128": r"\bSTG\.\S*\b128\b",
}


class Variant(NamedTuple):
    """A kernel with what the launcher specialises it for."""

    label: str
    kernel: Any
    arguments: dict[str, str]  # type by name; ":16" after it: an address or number that 16 divides
    constants: dict[str, Any]  # constexprs, and None for the pointers that are not there
    warps: int
    stages: int = 1


class Report(NamedTuple):
    label: str
    kernel: str
    registers: int
    spilled: int  # bytes stored to and loaded from local memory, each instruction counted once
    shared: int  # bytes
    instructions: dict[str, int]

    @property
    def fits(self) -> bool:
        return self.spilled == 0 and self.shared <= SHARED_LIMIT


def variants() -> list[Variant]:
    """Every kernel that the package launches, in its hot variants."""
    return [*_row_kernels(), *_gemms(), *_objectives(), *_attention(), _sampling()]


def _row_kernels() -> list[Variant]:
    constants = {"BLOCK": triton_exponentials.BLOCK}
    found = []
    for dtype, divides, label in (
        ("bf16", ":16", "bf16"),
        ("bf16", "", "bf16, odd vocabulary"),
        ("fp32", ":16", "fp32"),
    ):
        tile = {
            "logits": "*fp32:16", "anchors": "*fp32:16", "values": f"*{dtype}{divides}", "sums": "*fp32:16",
            "moments": "*fp32:16", "columns": f"i32{divides}", "logits_stride": f"i32{divides}",
            "values_stride": f"i32{divides}", "inverse_temperature": "fp32",
        }  # fmt: skip
        entropy = {
            "values": f"*{dtype}{divides}", "alpha": "*fp32:16", "beta": "*fp32", "vocabulary": f"i32{divides}",
            "values_stride": f"i32{divides}",
        }  # fmt: skip
        warps = triton_exponentials.WARPS
        found += [
            Variant(f"exponentials of a tile, {label}", triton_exponentials._tile_exponentials, tile, constants, warps),
            Variant(f"entropy gradient, {label}", triton_exponentials._entropy_gradient, entropy, constants, warps),
        ]
    sums_only = {name: type_ for name, type_ in tile.items() if name != "values"}
    kernel, absent = triton_exponentials._tile_exponentials, {"values": None}
    return [*found, Variant("sums of a tile", kernel, sums_only, constants | absent, triton_exponentials.WARPS)]


def _gemms() -> list[Variant]:
    rows, columns, depth = triton_gemm.ROWS, triton_gemm.COLUMNS, triton_gemm.DEPTH
    arguments = {
        "hidden": f"tensordesc<bf16[{rows}, {depth}]>", "weight": f"tensordesc<bf16[{columns}, {depth}]>",
        "anchors": "*fp32:16", "values": f"tensordesc<bf16[{rows}, {triton_gemm.HALF}]>", "parts": "*fp32:16",
        "rows": "i32", "vocabulary": "i32:16", "inverse_temperature": "fp32",
    }  # fmt: skip
    sums_only = {name: type_ for name, type_ in arguments.items() if name != "values"}
    return [
        Variant(
            f"{label} as a gemm, D = {size:,}",
            triton_gemm._gemm_exponentials,
            types,
            {"SIZE": size, "GROUP": triton_gemm.GROUP, "UPCAST": False, **absent},
            triton_gemm.WARPS,
            triton_gemm.STAGES,
        )
        for label, size, types, absent in (
            ("exponentials", 576, arguments, {}),
            ("exponentials", 4096, arguments, {}),
            ("sums", 4096, sums_only, {"values": None}),
        )
    ]


def _objectives() -> list[Variant]:
    pointers = {
        "logprobs": "*fp32", "advantages": "*fp32", "sampling_logprobs": "*fp32", "old_logprobs": "*fp32",
        "ref_logprobs": "*fp32", "sequence": "*i64", "sequence_rows": "*i64", "out": "*fp32:16",
    }  # fmt: skip
    scalars = ("ratio_low", "ratio_high", "beta", "entropy_coef", "weight_low", "weight_high", "denominator")
    arguments = pointers | {"count": "i32"} | dict.fromkeys(scalars, "fp32")
    optional = ("sampling_logprobs", "old_logprobs", "ref_logprobs", "sequence", "sequence_rows")
    return [
        Variant(
            f"objective gradient, {label}",
            triton_objective._objective_gradient,
            arguments,
            {"CISPO": cispo, "TRUNCATE": truncate, "BLOCK": triton_objective.BLOCK, **dict.fromkeys(absent)},
            triton_objective.WARPS,
        )
        for label, cispo, truncate, absent in (
            ("dapo on-policy", False, False, optional),
            ("grpo with everything", False, True, ()),
            ("cispo, mask", True, False, optional[2:]),
        )
    ]


def _attention() -> list[Variant]:
    found = []
    for dtype, kv_heads, group, dim in (
        ("bf16", 3, 3, 64), ("bf16", 8, 2, 128), ("bf16", 32, 1, 80), ("fp16", 4, 8, 128), ("fp32", 8, 2, 128),
    ):  # fmt: skip
        shape = triton_attention.SHAPES[4 if dtype == "fp32" else 2]
        constants = {
            "KV_HEADS": kv_heads, "GROUP": group, "DIM": dim, "HEADER": triton_attention.HEADER,
            "TILE": triton_attention.TILE, "BLOCK": shape.block, "UPCAST": False,
        }  # fmt: skip
        arguments = _pointers(dtype, "q", "k_cache", "v_cache") | TABLES | PARTS | _strides("q", "k", "v")
        label = f"attention of {kv_heads} x {group} heads of {dim}, {dtype}, parts"
        kernel = triton_attention._attend_pieces
        found.append(Variant(label, kernel, arguments | {"scale": "fp32"}, constants, shape.warps, shape.stages))
    merge = PARTS | {"queries": "*i32:16"} | _pointers("bf16", "out")
    caches = ("k", "v", "k_cache", "v_cache")
    store = TABLES | _pointers("bf16", *caches) | _strides(*caches)
    store.pop("pieces")
    merged = {"DIM": 128, "BLOCK": triton_attention.MERGED}
    return [
        *found,
        Variant("attention of heads of 128, parts merged", triton_attention._merge_parts, merge, merged, 1),
        Variant("keys and values stored", triton_attention._store, store, {"HEADS": 8, "DIM": 128}, 1),
    ]


def _sampling() -> Variant:
    arguments = {
        "logits": "*fp32:16", "candidates": "*fp32:16", "temperatures": "*fp32", "top_ps": "*fp32", "seeds": "*i64",
        "positions": "*i64", "ids": "*i64", "logprobs": "*fp32", "vocabulary": "i32:16", "stride": "i32:16",
        "scale": "fp32",
    }  # fmt: skip
    constants = {"BLOCK": triton_sampling.BLOCK, "STAGES": triton_sampling.STAGES}
    return Variant("sampling", triton_sampling._sample, arguments, constants, triton_sampling.WARPS)


TABLES = {"slots": "*i32:16", "queries": "*i32:16", "pieces": "*i32:16"}
PARTS = {"sums": "*fp32:16", "logs": "*fp32:16"}


def _pointers(dtype: str, *names: str) -> dict[str, str]:
    return {name: f"*{dtype}:16" for name in names}


def _strides(*names: str) -> dict[str, str]:
    return {f"{name}{of}_stride": "i32:16" for name in names for of in ("", "_head")}


def compile_variant(variant: Variant) -> Report:
    types = variant.arguments | dict.fromkeys(variant.constants, "constexpr")
    signature, multiples = {}, {}
    for place, name in enumerate(variant.kernel.arg_names):
        signature[name], _, divisor = types[name].partition(":")
        if divisor == "16":
            multiples[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(variant.kernel, signature, variant.constants, multiples)
    options = {"num_warps": variant.warps, "num_stages": variant.stages}
    compiled = triton.compile(source, target=HOPPER, options=options)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        code = _run(knobs.nvidia.nvdisasm.path, "-c", str(cubin))
        usage = _run(knobs.nvidia.cuobjdump.path, "-res-usage", str(cubin))
    return _report(variant.label, variant.kernel.__name__, usage, code, compiled.metadata.shared)


def native_reports() -> list[Report]:
    """The kernels in `csrc/`'s library; none where it was built without a CUDA compiler."""
    if native_off_reason() is not None or not native_has_cuda():
        return []
    spec = importlib.util.find_spec("negotiator_kernels._C")
    assert spec is not None and spec.origin is not None
    command = (knobs.nvidia.cuobjdump.path, "-arch", "sm_90a")
    usages = re.split(r"Function (\S+):", _run(*command, "-res-usage", spec.origin))
    codes = re.split(r"Function : (\S+)", _run(*command, "-sass", spec.origin))
    code_of = dict(zip(codes[1::2], codes[2::2], strict=True))
    return [
        _report(f"csrc, {_template_of(name)}", "exponentiate", usage, code_of[name], dynamic_shared=0)
        for name, usage in zip(usages[1::2], usages[2::2], strict=True)
    ]


def _template_of(mangled: str) -> str:
    arguments = re.search(r"exponentiateI(f|13__nv_bfloat16)Lb([01])ELb([01])E", mangled)
    assert arguments is not None, mangled
    dtype, aligned, store = arguments.groups()
    return f"{'fp32' if dtype == 'f' else 'bf16'}{'' if aligned == '1' else ', odd'}{'' if store == '1' else ', sums'}"


def _report(label: str, kernel: str, usage: str, code: str, dynamic_shared: int) -> Report:
    resources = {name: int(number) for name, number in re.findall(r"\b(REG|SHARED):(\d+)", usage)}
    return Report(
        label,
        kernel,
        resources["REG"],
        sum(int(bits or 32) // 8 for bits in re.findall(r"\b(?:LDL|STL)(?:\.(?!LU)\S*?(64|128))?", code)),
        resources["SHARED"] + dynamic_shared,
        {name: len(re.findall(pattern, code)) for name, pattern in INSTRUCTIONS.items()},
    )


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def main() -> int:
    parser = argparse.ArgumentParser(description="Compiles the Triton kernels for Hopper and reports what they cost.")
    parser.add_argument("label", nargs="?", default="", help="only variants whose label contains this")
    label = parser.parse_args().label
    if knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: kernels are interpreted, there is nothing to compile")
    chosen = [variant for variant in variants() if label in variant.label]
    native = [report for report in native_reports() if label in report.label]
    if not chosen and not native:
        parser.error("no variant has such a label")

    width = max(len(one.label) for one in (*chosen, *native))
    columns = ("registers", "spilled", "shared", *INSTRUCTIONS)
    print(f"triton {triton.__version__}, for sm_90a; at most {SHARED_LIMIT:,} bytes of shared memory\n")
    print(" " * width, *(f"{name:>9}" for name in columns))
    reports = []
    for report in itertools.chain(map(compile_variant, chosen), native):
        reports.append(report)
        numbers = (report.registers, report.spilled, report.shared, *report.instructions.values())
        cells = [f"{report.label:{width}}", *(f"{n:9,}" for n in numbers)]
        print(*cells, *([] if report.fits else ["  DOES NOT FIT"]), flush=True)
    fits = all(report.fits for report in reports)
    print(json.dumps({"triton": triton.__version__, "fits": fits, "kernels": [r._asdict() for r in reports]}))
    return 0 if fits else 1


if __name__ == "__main__":
    sys.exit(main())
