#!/usr/bin/env bash
# Runs what the machine's own instruments watch: Miri over what it can run, threads under ThreadSanitizer, the C interface
# under valgrind. It takes a nightly compiler with miri and rust-src, and valgrind; about an hour.
#
#   scripts/sanitize.sh [miri] [threads] [valgrind]
set -euo pipefail
cd "$(dirname "$0")/.."

parts=("$@")
[ ${#parts[@]} -gt 0 ] || parts=(miri threads valgrind)
say() { printf '\n== %s\n' "$*"; }
host=$(rustc -vV | sed -n 's/^host: //p')

for part in "${parts[@]}"; do
  case $part in
    miri)
      say "Miri: the readers, keys, matrices, numbers of checkpoints, and the C interface"
      # No GPU, no maps of files, and no more threads than it takes. What rayon keeps lives as long as the process, and
      # its queues make pointers of integers.
      export MIRIFLAGS="-Zmiri-disable-isolation -Zmiri-ignore-leaks -Zmiri-tree-borrows -Zmiri-permissive-provenance"
      export RAYON_NUM_THREADS=2
      cargo +nightly miri test --target-dir target/miri --test suite -- hostile::corpora
      cargo +nightly miri test --target-dir target/miri --lib -- \
        keys:: words:: names:: fuse:: strengths:: read:: quantised:: matrix:: batch::tests follower::tests::work \
        what_is_damaged
      cargo +nightly miri test --target-dir target/miri -p loraweld-capi --lib --test calls -- status:: calls_in
      ;;
    threads)
      say "ThreadSanitizer: what shares state between threads"
      RUSTFLAGS=-Zsanitizer=thread CARGO_TARGET_DIR=target/tsan \
        TSAN_OPTIONS="suppressions=$PWD/scripts/tsan.supp halt_on_error=1" \
        cargo +nightly test -Zbuild-std --target "$host" --profile soak --test threads -- --nocapture
      ;;
    valgrind)
      say "valgrind: the C interface, with cancellation from other threads"
      # As tests build it: it is there already, and reports name lines.
      cargo build -p loraweld-capi
      out=$(mktemp -d)
      trap 'rm -rf "$out"' EXIT
      cc -std=c11 -D_POSIX_C_SOURCE=200809L -g -Icapi/include capi/tests/check.c -o "$out/check" \
        -Ltarget/debug -Wl,-rpath,"$PWD/target/debug" -lloraweld_c -lpthread
      mkdir "$out/scratch"
      valgrind --suppressions=capi/tests/valgrind.supp --leak-check=full --errors-for-leak-kinds=definite \
        --error-exitcode=1 "$out/check" tests/data "$out/scratch"
      ;;
    *)
      echo "there is no part $part: miri, threads, valgrind" >&2
      exit 2
      ;;
  esac
done
say "nothing was found"
