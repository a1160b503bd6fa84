"""What installing promises: both packages importable from anywhere, their data with them, nothing shadowed."""

import os
import shutil
import subprocess
import sys
import time
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "models" / "SmolLM2-135M-Instruct"


def run(*arguments: str, cwd: Path = ROOT) -> str:
    return subprocess.run(arguments, cwd=cwd, check=True, capture_output=True, text=True).stdout


def test_transformers_does_not_take_the_kernels_folder_for_a_package(tmp_path):
    """With an __init__.py it would shadow Hugging Face's `kernels`, which transformers imports."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    code = "from transformers.utils.import_utils import is_kernels_available as found; print(found())"
    for folder in (ROOT, tmp_path):
        assert run(sys.executable, "-c", code, cwd=folder).strip() == "False"


def test_both_packages_import_from_another_folder(tmp_path):
    code = "import negotiator, negotiator_kernels; print(negotiator.__version__, negotiator_kernels.__all__)"
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    out = run(sys.executable, "-c", code, cwd=tmp_path)
    assert out.startswith(version)
    assert "paged_attention" in out


def test_the_table_of_backends(tmp_path):
    lines = [line.split() for line in run(sys.executable, "-m", "negotiator_kernels", cwd=tmp_path).splitlines()]
    assert [line[:2] for line in lines] == [["native", "cpu"], ["native", "cuda"], ["triton", "cuda"]]
    assert lines[0][2] == "on"
    assert all(line[2] == "on" or len(line) > 4 for line in lines)  # what is off says why


def test_a_wheel_holds_native_code_data_and_prompts(tmp_path):
    run(
        sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps",
        "--config-settings", f"build-dir={tmp_path / 'build'}", "--wheel-dir", str(tmp_path), str(ROOT),
    )  # fmt: skip
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = [*ROOT.glob("negotiator/**/*"), *ROOT.glob("kernels/negotiator_kernels/**/*")]
    files = {path for path in sources if path.suffix in (".py", ".jsonl", ".txt")}
    assert {path.suffix for path in files} == {".py", ".jsonl", ".txt"}
    assert {str(path.relative_to(ROOT)).removeprefix("kernels/") for path in files} <= names
    assert "negotiator_kernels/_C.so" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"negotiator", "negotiator_kernels"}


def test_the_lock_holds_every_pinned_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    direct = (
        project["dependencies"] + project["optional-dependencies"]["model"] + project["optional-dependencies"]["dev"]
    )

    def normalized(lines: list[str]) -> set[str]:
        return {line.lower().replace("_", "-") for line in lines if line and not line.startswith("#")}

    lock = normalized((ROOT / "requirements.txt").read_text().splitlines())
    assert normalized(direct) <= lock
    assert not [line for line in lock if line.startswith(("nvidia", "cuda", "triton")) or "==" not in line]


def test_a_fetched_model_is_left_alone_without_importing_torch():
    code = f"""
import sys
sys.argv = ["fetch_model", "--to", {str(MODEL)!r}]
from negotiator.fetch_model import main
main()
assert "torch" not in sys.modules and "transformers" not in sys.modules
"""
    before = {path: path.stat().st_mtime_ns for path in MODEL.iterdir()}
    assert "is there" in run(sys.executable, "-c", code)
    assert {path: path.stat().st_mtime_ns for path in MODEL.iterdir()} == before


def test_fetching_over_something_else_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    command = [sys.executable, "-m", "negotiator.fetch_model", "--to", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "exists but is not a complete model" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_the_fetched_model_is_a_plain_llama_with_its_tokenizer():
    from transformers import AutoConfig, AutoTokenizer

    config = AutoConfig.from_pretrained(MODEL)
    assert config.model_type == "llama"
    assert not hasattr(config, "quantization_config")
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
    )
    for text in [
        "Hello  world\n\n\tit's 2024 — naïve 漢字 🙂",
        " leading and trailing ",
        "<|im_start|>user\nhi<|im_end|>",
    ]:
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.convert_ids_to_tokens(tokenizer("count  1024").input_ids)[-4:] == ["1", "0", "2", "4"]


INSTALL_ALL, INSTALL_PACKAGE, FETCH = "--requirement requirements.txt", "--no-build-isolation", "fetch_model"


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        (None, set()),
        ("negotiator/train.py", set()),
        ("csrc/kernels.cpp", {INSTALL_PACKAGE}),
        ("pyproject.toml", {INSTALL_PACKAGE}),
        ("requirements.txt", {INSTALL_ALL, INSTALL_PACKAGE}),
    ],
)
def test_make_does_only_what_a_change_asks_for(tmp_path, changed, expected):
    shutil.copy(ROOT / "Makefile", tmp_path)
    inputs = ["requirements.txt", "pyproject.toml", "CMakeLists.txt", "csrc/kernels.cpp", "negotiator/train.py"]
    made = [".venv/dependencies.stamp", ".venv/package.stamp", "models/SmolLM2-135M-Instruct/model.safetensors"]
    for age, name in enumerate(reversed(inputs + made)):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        os.utime(path, (time.time() - 60 - age,) * 2)
    if changed:
        (tmp_path / changed).touch()
    plan = run("make", "--dry-run", "train", cwd=tmp_path)
    assert {step for step in (INSTALL_ALL, INSTALL_PACKAGE, FETCH) if step in plan} == expected
    assert "-m negotiator.train --config configs/quickstart.yaml" in plan
