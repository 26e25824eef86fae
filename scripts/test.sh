#!/usr/bin/env bash
# All checks: formatting, lints, tests on a GPU or software adapter, documentation, other platforms.
# On Debian and Ubuntu it installs what is missing: a software Vulkan driver if there is none.
set -euo pipefail
cd "$(dirname "$0")/.."

say() { printf '\n== %s\n' "$*"; }

as_root() {
  if [ "$(id -u)" = 0 ]; then "$@"; elif command -v sudo >/dev/null; then sudo "$@"; else
    echo "cannot become root to run: $*" >&2
    return 1
  fi
}

has_vulkan() {
  compgen -G '/usr/share/vulkan/icd.d/*.json' >/dev/null || compgen -G '/etc/vulkan/icd.d/*.json' >/dev/null ||
    [ -n "${VK_DRIVER_FILES:-}${VK_ICD_FILENAMES:-}" ]
}

# Without this, Mesa complains on stderr where there is no desktop.
if [ -z "${XDG_RUNTIME_DIR:-}" ]; then
  XDG_RUNTIME_DIR=$(mktemp -d)
  export XDG_RUNTIME_DIR
  trap 'rm -rf "$XDG_RUNTIME_DIR"' EXIT
fi

case "$(uname -s)" in
Linux)
  if ! has_vulkan || ! ldconfig -p 2>/dev/null | grep -q libvulkan.so.1; then
    say "installing a software Vulkan driver"
    if command -v apt-get >/dev/null; then
      as_root apt-get update -qq
      as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq libvulkan1 mesa-vulkan-drivers
    else
      echo "no Vulkan driver found; install one (Mesa's lavapipe will do), or accept with" >&2
      echo "LORAWELD_ALLOW_NO_GPU=1 that no GPU path is tested" >&2
      [ -n "${LORAWELD_ALLOW_NO_GPU:-}" ]
    fi
  fi
  ;;
esac

if command -v rustup >/dev/null; then
  rustup component add rustfmt clippy 2>/dev/null || true
fi

say "formatting"
cargo fmt --all --check

# Built with the rest, the Python package needs no second build of what all depend on.
packages=(-p loraweld -p loraweld-capi)
if python3 -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
  packages+=(-p loraweld-python)
else
  say "the Python package is left out: it takes Python 3.10 or newer with venv"
fi

say "lints"
cargo clippy "${packages[@]}" --all-targets -- -D warnings
cargo clippy --lib --no-default-features -- -D warnings

say "tests"
cargo test "${packages[@]}"

if [[ "${packages[*]}" == *python* ]]; then
  say "the Python package"
  # With the tests, since what these want of dependencies holds for all.
  cargo build --quiet "${packages[@]}" --lib --bins --tests
  LORAWELD_PYTHON_BUILT=1 LORAWELD=$PWD/target/debug/loraweld scripts/python.sh test -q
fi

say "the C header"
cargo run --quiet --manifest-path capi/header/Cargo.toml --target-dir target/header -- --check

say "documentation"
RUSTDOCFLAGS="-D warnings" cargo doc --no-deps -p loraweld -p loraweld-capi --quiet

# DX12, Metal and a browser are not run here; this keeps them compiling.
if command -v rustup >/dev/null; then
  for target in x86_64-pc-windows-gnu aarch64-apple-darwin wasm32-unknown-unknown; do
    say "the library for $target"
    rustup target add "$target" 2>/dev/null || rustup target list --installed | grep -qx "$target"
    cargo check --quiet --lib --no-default-features --target "$target"
  done
  say "the page's program"
  cargo check --quiet --package loraweld-web --target wasm32-unknown-unknown
fi

say "all checks passed"
