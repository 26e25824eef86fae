#!/usr/bin/env bash
# Looks for what tests of minutes do not meet: programs killed at any moment, merges of any shape on every device, faults at
# every allocation, random adapters through the whole program, files that ask for much, memory that is not given back.
#
#   scripts/soak.sh              for an hour
#   scripts/soak.sh MINUTES      for as long as that
#
# It ends with the first failure, whose message names a seed: LORAWELD_SOAK_SEED=N starts from there.
set -euo pipefail
cd "$(dirname "$0")/.."

minutes=${1:-60}
seconds=$((minutes * 60))
export LORAWELD_SOAK_SEED=${LORAWELD_SOAK_SEED:-$(date +%s)}
say() { printf '\n== %s\n' "$*"; }

# Debug assertions stay, and with them `--verify` of every merge.
profile=(--profile soak)

say "merges of any shape on every device, from seed $LORAWELD_SOAK_SEED"
LORAWELD_SOAK_SECONDS=$((seconds * 4 / 10)) cargo test "${profile[@]}" --test suite -- --nocapture \
  soak::merges_of_any_shape

say "2,000 kills"
LORAWELD_SOAK_KILLS=${LORAWELD_SOAK_KILLS:-2000} cargo test "${profile[@]}" --test suite -- --nocapture soak::killed_commands

say "random adapters, calibrations, indices and bytes"
LORAWELD_SOAK_SECONDS=$((seconds * 4 / 10)) cargo test "${profile[@]}" --test suite -- --nocapture hostile::

say "a fault at every call to the file system, and at every allocation"
LORAWELD_TEST_ALL_CALLS=1 LORAWELD_TEST_ALL_ALLOCATIONS=1 cargo test "${profile[@]}" --lib -- --nocapture \
  disk::tests gpu::tests

say "files that ask for much, one after another"
LORAWELD_LOAD=1 LORAWELD_LOAD_20GB=1 cargo test "${profile[@]}" --test suite -- --nocapture --test-threads 1 load::

say "40 devices at once, 1,000 merges in one process"
LORAWELD_SOAK_DEVICES=40 cargo test "${profile[@]}" --test suite -- --nocapture soak::many_devices
LORAWELD_SOAK_MERGES=1000 cargo test "${profile[@]}" --test heap -- --nocapture merges_keep

say "nothing was found"
