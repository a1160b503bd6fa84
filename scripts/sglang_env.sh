#!/usr/bin/env bash
# Makes .venv-sglang, where SGLang lives apart from the trainer with its own torch. `make sglang` calls it.
#     scripts/sglang_env.sh [PYTHON]
set -euo pipefail
cd "$(dirname "$0")/.."
env=.venv-sglang
sglang=$(grep '^sglang==' requirements-sglang.txt)
router=$(grep '^sglang-router==' requirements-sglang.txt)
torch=$(grep '^torch==' requirements-sglang.txt)
triton=triton==3.6.0

say() { echo "$env, ${SECONDS} s: $*"; }
install() { "$env/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }

"${1:-python3}" -m venv "$env"
if nvidia-smi -L >/dev/null 2>&1; then
    say "an NVIDIA GPU is here, so $sglang with everything that it asks for; that takes some minutes"
    install "$sglang" "$router"
else
    say "no NVIDIA GPU is here, so $sglang as far as it runs on a CPU; installing $torch"
    install "$torch"
    "$env/bin/python" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("triton") is None)' ||
        install --no-deps "$triton"
    say "installing the rest"
    install --no-deps --requirement requirements-sglang.txt
    cp scripts/sglang_cpu.py "$("$env/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
fi
say "ready"
