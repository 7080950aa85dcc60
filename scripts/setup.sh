# Shared by demo.sh, test.sh and .ci/run: a current .venv in the repository root. Source it; it needs Python >= 3.11 and nothing else.
#   . scripts/setup.sh [EXTRA]      EXTRA: optional-dependencies of pyproject.toml, for example test or test,diffusers
cd "$(dirname "${BASH_SOURCE[0]}")/.."
neon_extra="${1:-}"
python_is_new() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }
if [ ! -x .venv/bin/python ]; then
    for candidate in "${PYTHON:-python3}" python3.13 python3.12 python3.11 python; do
        if command -v "$candidate" >/dev/null && python_is_new "$candidate"; then found="$candidate"; break; fi
    done
    if [ -z "${found:-}" ]; then
        echo "setup: Python >= 3.11 is needed; name one with PYTHON=/path/to/python" >&2
        exit 1
    fi
    "$found" -m venv .venv
fi
# installed once per content of pyproject.toml and per extra
stamp=".venv/neon-$(sha256sum pyproject.toml | cut -c1-16)-${neon_extra:-base}"
if [ ! -f "$stamp" ]; then
    echo "setup: installing dependencies into .venv (a few minutes the first time)" >&2
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -e ".${neon_extra:+[$neon_extra]}" >&2
    touch "$stamp"
fi
PATH="$PWD/.venv/bin:$PATH"
export PATH
