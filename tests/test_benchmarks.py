"""The kernel benchmark: its truth, its clock's books, and whether it would notice a wrong kernel."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu, kernels, suite
from benchmarks.measure import Fit, TensorPeak, pick, rotated, sample
from benchmarks.problem import Answer, Problem, Shape, errors, make_problem, parse_shape
from benchmarks.providers import Provider, providers
from negotiator.loss import grpo_loss

CPU = torch.device("cpu")
SHAPE = Shape(48, 16, 131, 0.45)
FIGURES = ("speedup_vs_best", "speedup_vs_native_ce", "gemm_roofline_fraction", "peak_memory_fraction")


def wrong(problem: Problem) -> Answer:
    """The torch backend with a gradient that is off by 2 %."""
    answer = next(p for p in providers() if p.name == "torch").run(problem)
    return answer._replace(d_weight=answer.d_weight * 1.02)


def broken(problem: Problem) -> Answer:
    raise RuntimeError("no kernel image\nfor this device")


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = kernels.main([*arguments])
    return code, *capsys.readouterr()


def test_the_last_line_and_the_csv_agree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [p.name for p in providers() if p.name != "compiled"]  # compiling takes half a minute
    code, out, _ = run(capsys, "--shapes", str(SHAPE), "--out", str(tmp_path), "--dtype", "fp32", "--providers", *names)
    assert code == 0
    figures = json.loads(out.splitlines()[-1])
    assert all(figures[name] > 0 for name in FIGURES)
    assert figures["logprob_max_abs_error"] < 1e-4
    assert figures["grad_rel_error"] < 1e-4
    assert figures["best_other"] in ("plain", "liger-grpo", "trl")
    assert (figures["shape"], figures["dtype"], figures["torch"]) == (str(SHAPE), "fp32", torch.__version__)

    (path,) = tmp_path.glob("kernels-*.csv")
    rows = {row["provider"]: row for row in csv.DictReader(path.read_text().splitlines())}
    assert set(rows) == {*names, "gemms-float32"}
    assert rows["cce"]["status"] == "off"
    assert rows["cce"]["detail"]
    assert {rows[name]["torch"] for name in rows} == {torch.__version__}
    for name, ms in figures["ms"].items():
        assert float(rows[name]["ms"]) == pytest.approx(ms, abs=1e-3)
    ours, plain = rows[figures["ours"]], rows["plain"]
    assert figures["peak_memory_fraction"] == int(ours["peak_bytes"]) / int(plain["peak_bytes"])
    rivals = [float(rows[name]["ms"]) for name in ("plain", "liger-grpo", "trl")]
    assert float(rows[figures["best_other"]]["ms"]) == min(rivals)
    assert figures["speedup_vs_best"] == min(rivals) / float(ours["ms"])
    native_ce = min(float(rows[name]["ms"]) for name in ("native-ce", "native-ce-chunked"))
    assert figures["speedup_vs_native_ce"] == native_ce / float(ours["ms"])
    assert figures["gemm_roofline_fraction"] == float(rows["gemms-float32"]["ms"]) / float(ours["ms"])
    assert float(ours["tflops"]) == pytest.approx(6 * 22 * 16 * 131 / (float(ours["ms"]) * 1e9))


def test_a_wrong_kernel_shows_and_a_broken_one_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    some = (
        Provider("torch", "ours", wrong, lambda device: None),
        Provider("worse", "ours", broken, lambda device: None),
    )
    monkeypatch.setattr(kernels, "providers", lambda: some)
    code, out, _ = run(capsys, "--shapes", str(SHAPE), "--out", str(tmp_path))
    assert code == 1
    assert json.loads(out.splitlines()[-1])["grad_rel_error"] == pytest.approx(0.02, rel=0.05)
    assert "failed: RuntimeError: no kernel image\n" in out


def test_mistakes_are_told_in_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mistakes = {
        "no provider 'magic'": ("--providers", "magic"),
        "a shape is": ("--shapes", "4096x576"),
        "at least 1": ("--shapes", "0x8x8@0.5"),
        "leave out --shapes": ("--bar", "--shapes", str(SHAPE)),
    }
    if not torch.cuda.is_available():
        mistakes["no CUDA device"] = ("--device", "cuda")
    for words, arguments in mistakes.items():
        code, out, error = run(capsys, *arguments, "--out", str(tmp_path))
        assert code == 2
        assert out == ""
        assert words in error
        assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_truth_is_the_reference_in_fp64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.problem.TRUTH_BYTES", 5 * 131 * 8)  # chunks of 5 rows
    problem = make_problem(SHAPE, torch.float32, CPU)
    hidden, weight = (x.detach().double().requires_grad_() for x in (problem.hidden, problem.weight))
    rest = (problem.targets, problem.advantages, problem.mask)
    old = problem.old_logprobs.double()
    truth = problem.truth

    result = grpo_loss(hidden, weight, *rest, old_logprobs=old, backend="reference")
    torch.testing.assert_close(truth.logprobs, result.logprobs[problem.trained], rtol=1e-12, atol=1e-12)
    d_hidden, d_weight = torch.autograd.grad(result.loss, (hidden, weight))
    torch.testing.assert_close(truth.grpo.hidden, d_hidden[problem.trained][truth.rows], rtol=1e-11, atol=1e-14)
    torch.testing.assert_close(truth.grpo.weight, d_weight[truth.words], rtol=1e-11, atol=1e-14)
    assert 0 < (result.logprobs[problem.trained] - old[problem.trained]).abs().max() < 0.18  # none is clipped

    rows = hidden[problem.trained]
    loss = torch.nn.functional.cross_entropy(rows @ weight.T, problem.targets[problem.trained])
    d_rows, d_weight = torch.autograd.grad(loss, (rows, weight))
    torch.testing.assert_close(truth.cross_entropy.hidden, d_rows[truth.rows], rtol=1e-11, atol=1e-14)
    torch.testing.assert_close(truth.cross_entropy.weight, d_weight[truth.words], rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_provider_solves_the_same_problem(dtype: torch.dtype) -> None:
    """Log-probs of bf16 logits are off in the second digit; those of fp32 logits are not."""
    problem = make_problem(SHAPE, dtype, CPU)
    limit = 1e-4 if dtype == torch.float32 else 3e-2
    for p in providers():
        if p.name == "compiled" or p.off_reason(CPU):
            continue
        found = errors(p.run(problem), problem, p.kind == "cross-entropy")
        assert found.grad_rel < limit, p.name
        assert found.logprob_max_abs is None or found.logprob_max_abs < (1e-4 if p.kind == "ours" else 2 * limit), (
            p.name
        )


def test_errors_see_each_part_of_an_answer() -> None:
    problem = make_problem(SHAPE, torch.float32, CPU)
    answer = next(p for p in providers() if p.name == "plain").run(problem)
    assert answer.logprobs is not None
    good = errors(answer, problem, cross_entropy=False)
    assert errors(answer._replace(logprobs=answer.logprobs + 0.01), problem, False).logprob_max_abs > 0.009
    for name in ("d_hidden", "d_weight"):
        worse = errors(answer._replace(**{name: getattr(answer, name) * 1.02}), problem, False)
        assert worse.grad_rel == pytest.approx(0.02, rel=0.01)
        assert worse.grad_rel > 100 * good.grad_rel
    assert errors(answer, problem, cross_entropy=True).grad_rel > 0.1  # another loss has another gradient


def test_memory_is_the_peak_beyond_what_was_held() -> None:
    held = torch.ones(64 << 18)  # 64 MiB

    def call() -> torch.Tensor:
        part = [torch.ones(48 << 18), torch.ones(48 << 18)]
        return held[0] + part[0] + part[1]

    measured, result = sample(call, CPU)
    assert result.numel() == 48 << 18
    assert measured.peak_bytes == pytest.approx(192 << 20, rel=0.05)  # two sums beside the two parts
    with TensorPeak() as count:
        call()
    assert count.peak == 192 << 20
    assert count.live == 0


def test_what_takes_too_long_where_bf16_is_emulated_is_estimated(monkeypatch: pytest.MonkeyPatch) -> None:
    def rows(fast: bool) -> dict[str, suite.Row]:
        monkeypatch.setattr(suite, "cpu_multiplies_bf16", lambda: fast)
        some = [p for p in providers() if p.name in ("torch", "plain", "trl")]
        found = suite.measure_shape(Shape(2048, 8, 4096, 0.5), some, torch.bfloat16, CPU, budget_s=0)
        return {row.provider: row for row in found}

    measured, estimated = rows(fast=True), rows(fast=False)
    assert {row.status for row in measured.values()} == {"measured"}
    assert [estimated[name].status for name in ("torch", "plain", "trl")] == ["measured", "estimated", "estimated"]
    assert estimated["torch"].rounds == 1
    assert estimated["trl"].detail.endswith(" tokens")
    assert estimated["trl"].ms is not None
    assert estimated["trl"].peak_bytes is None
    assert estimated["plain"].peak_bytes == pytest.approx(measured["plain"].peak_bytes, rel=0.25)  # counted


def test_estimates_and_rounds() -> None:
    fit = Fit([], [])
    fit.add(10, 5.0)
    assert fit.at(100) == 50.0
    fit.add(20, 6.0)
    assert fit.at(100) == pytest.approx(14.0)
    fit.add(40, 4.0)
    assert fit.at(100) == 4.0  # noise: more tokens are never quicker

    costs = {"c": 5.0, "ours": 4.0, "a": 2.0, "floor": 1.0}
    assert pick(costs, ("ours", "floor"), 4.9) == ["a"]
    assert pick(costs, ("ours", "floor"), 5.0) == ["ours", "floor"]
    assert pick(costs, ("ours", "floor"), 12.0) == ["ours", "floor", "a", "c"]
    assert pick(costs, (), 3.0) == ["floor", "a"]
    assert [rotated(["a", "b", "c"], number) for number in (0, 1, 5)] == [
        ["a", "b", "c"],
        ["b", "c", "a"],
        ["c", "a", "b"],
    ]
    assert rotated([], 3) == []


def test_plots_have_a_panel_for_what_varies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shapes = [str(SHAPE._replace(fraction=f)) for f in (0.2, 0.5, 1.0)]
    run(capsys, "--shapes", *shapes, "--out", str(tmp_path), "--providers", "torch", "plain", "--dtype", "fp32")
    assert sorted(p.stem.rpartition("-")[2] for p in tmp_path.glob("*.png")) == ["memory", "time"]


@pytest.mark.parametrize("text", ["4096x576x49152@0.45", "1x2x3@1"])
def test_shapes_read_as_they_are_written(text: str) -> None:
    assert str(parse_shape(text)) == text


def test_the_bar_is_the_shape_of_the_promise(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(kernels, "BAR", SHAPE)
    monkeypatch.setattr(kernels, "measure_shape", lambda *args: seen.append(args) or suite.measure_shape(*args))
    assert kernels.main(["--bar", "--device", "cpu", "--out", str(tmp_path), "--providers", "torch"]) == 0
    ((shape, _, dtype, _, _),) = seen
    assert (shape, dtype) == (SHAPE, torch.bfloat16)
    assert len(list(tmp_path.glob("bar-*.csv"))) == 1


# --- benchmarks.gpu, as far as it goes without one --------------------------------------------------------------------


def small_cases() -> list[gpu.Case]:
    """The cases of the GPU with 60 rows at most of a small model."""
    return [c._replace(shape=Shape(min(c.shape.tokens, 100), 24, 203, c.shape.fraction)) for c in gpu.cases()]


def test_backends_are_exact_in_every_case(capsys: pytest.CaptureFixture[str]) -> None:
    ours = [p.name for p in providers() if p.kind == "ours" and not p.off_reason(CPU)]
    findings = gpu.exactness(small_cases(), ours, CPU, seconds=60)
    assert len(findings) == len(ours) * len(gpu.cases())
    assert [finding for finding in findings if not finding.exact] == []
    assert gpu.exactness(small_cases(), ours, CPU, seconds=-1) == []
    assert "no time for peaked" in capsys.readouterr().out


@pytest.mark.parametrize("part", range(4))
def test_a_backend_that_is_not_exact_is_found(part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    right = gpu.answer

    def off(given: dict[str, Any], dtype: torch.dtype, backend: str) -> tuple[torch.Tensor, ...]:
        parts = [*right(given, dtype, backend)]
        if backend == "torch":
            parts[part] = parts[part] * 1.01 + 0.01 * (part < 2)
        return tuple(parts)

    monkeypatch.setattr(gpu, "answer", off)
    assert not any(finding.exact for finding in gpu.exactness(small_cases(), ["torch"], CPU, seconds=60))


def test_cases_cross_the_clip_on_both_sides_but_never_nearly() -> None:
    for case in small_cases():
        if case.shape.tokens > 1:
            given = gpu.arguments(case, CPU)
            now = grpo_loss(
                **{**given, "hidden": given["hidden"].double(), "lm_head_weight": given["lm_head_weight"].double()}
            )
            ratio = (now.logprobs - given["old_logprobs"]).exp()[given["mask"]]
            low, high = 1 - case.settings.get("clip_low", 0.2), 1 + case.settings.get("clip_high", 0.2)
            assert min((ratio - low).abs().min(), (ratio - high).abs().min()) > 0.01
            assert ratio.min() < low < high < ratio.max()


def test_table_and_profile_of_the_gpu_script(tmp_path: Path) -> None:
    some = [p for p in providers() if p.name in ("torch", "plain")]
    rows = gpu.table([SHAPE], some, CPU, seconds=60, out=tmp_path)
    assert {row.provider for row in rows if row.ms} == {"torch", "plain", "gemms-bfloat16", "gemms-float32"}
    assert gpu.table([SHAPE], some, CPU, seconds=-1, out=tmp_path) == []
    gpu.profile_backend(some[0], SHAPE, CPU, tmp_path)
    assert "aten::mm" in next(tmp_path.glob("profile-*.txt")).read_text()
    assert {path.name.partition("-")[0] for path in tmp_path.iterdir()} == {"kernels", "profile", "trace"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_gpu_script_needs_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main([]) == 2
    assert capsys.readouterr().err == "benchmarks.gpu: torch finds no CUDA device\n"
