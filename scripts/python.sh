#!/usr/bin/env bash
# The Python package: `build` makes a wheel in target/python/wheels and tries it in a clean environment, `test` runs the tests.
#
#   scripts/python.sh build [OPTION of maturin]...
#   scripts/python.sh test [OPTION of pytest]...
#
# Tests run on the library in target/debug, which is built unless LORAWELD_PYTHON_BUILT=1 says that it was. Those of torch
# are skipped, and say so, unless LORAWELD_PYTHON_TORCH=1 asks for it to be installed. PYTHON names the interpreter, 3.10 or
# newer. Those of the nodes for ComfyUI are skipped, and say so, unless COMFYUI names a checkout; COMFYUI_PYTHON is the
# interpreter that runs it, which also needs pytest.
set -euo pipefail
cd "$(dirname "$0")/.."

root=$PWD/target/python
python=${PYTHON:-python3}

# A virtual environment with these packages, which is kept while they are the same.
environment() {
  local venv=$root/$1
  shift
  [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
  if [ "$(cat "$venv/packages" 2>/dev/null)" != "$*" ]; then
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@"
    echo "$*" >"$venv/packages"
  fi
}

build() {
  environment build 'maturin>=1.9,<2'
  rm -rf "$root/wheels"
  "$root/build/bin/maturin" build --release --manifest-path python/Cargo.toml --out "$root/wheels" "$@"
  rm -rf "$root/clean"
  "$python" -m venv "$root/clean"
  "$root/clean/bin/python" -m pip install --quiet --disable-pip-version-check "$root"/wheels/*.whl
  (cd "$root" && clean/bin/loraweld --version && clean/bin/python -c 'import loraweld; print(*loraweld.methods())')
  ls -l "$root"/wheels/*.whl
}

test() {
  local packages=(pytest 'numpy>=1.24')
  if [ "${LORAWELD_PYTHON_TORCH:-}" = 1 ]; then packages+=(torch); fi
  environment test "${packages[@]}"
  if [ "${LORAWELD_PYTHON_BUILT:-}" != 1 ]; then cargo build --quiet -p loraweld-python; fi
  rm -rf "$root/package"
  mkdir -p "$root/package"
  cp -r python/loraweld "$root/package/"
  case "$(uname -s)" in
  Darwin) cp target/debug/lib_loraweld.dylib "$root/package/loraweld/_loraweld.abi3.so" ;;
  Linux) cp target/debug/lib_loraweld.so "$root/package/loraweld/_loraweld.abi3.so" ;;
  *) cp target/debug/_loraweld.dll "$root/package/loraweld/_loraweld.pyd" ;;
  esac
  PYTHONPATH=$root/package COMFYUI='' "$root/test/bin/python" -m pytest -c python/pyproject.toml \
    --doctest-modules python/tests "$root/package/loraweld" "$@"
  if [ -n "${COMFYUI:-}" ]; then
    PYTHONPATH=$root/package "${COMFYUI_PYTHON:-$python}" -m pytest -c python/pyproject.toml python/tests/test_comfyui.py "$@"
  else
    echo "The nodes for ComfyUI were skipped: COMFYUI names no checkout." >&2
  fi
}

case "${1:-}" in
build | test) "$@" ;;
*)
  echo "usage: $0 build|test [OPTION]..." >&2
  exit 2
  ;;
esac
