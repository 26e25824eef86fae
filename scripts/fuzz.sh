#!/usr/bin/env bash
# Lets a fuzzer look for inputs that break the readers; takes cargo-fuzz and a nightly compiler.
#
#   scripts/fuzz.sh              each target for an hour
#   scripts/fuzz.sh MINUTES [TARGET...]
#
# What it finds is in fuzz/artifacts: make a test of it.
set -euo pipefail
cd "$(dirname "$0")/.."

minutes=${1:-60}
shift || true
targets=("$@")
[ ${#targets[@]} -gt 0 ] || targets=(header keys metadata adapter calibration index calls jobs)

command -v cargo-fuzz >/dev/null || cargo install --locked cargo-fuzz
for target in "${targets[@]}"; do
  printf '\n== %s, %s minutes\n' "$target" "$minutes"
  cargo +nightly fuzz run "$target" -- -max_total_time=$((minutes * 60)) -max_len=65536 -malloc_limit_mb=256 -timeout=20
  # What adds nothing goes.
  cargo +nightly fuzz cmin "$target" -- -max_len=65536
done
