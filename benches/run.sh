#!/usr/bin/env bash
# Runs the benches and the same work in PyTorch, part by part in turn, on one machine.
#
#   benches/run.sh [ops] [ssr] [merge] [fusion] [scaling]      all parts without arguments
#
# LORAWELD_BENCH_RESULTS  where results go; target/bench-results.jsonl by default. They are appended.
# LORAWELD_BENCH_BIN      a folder of prebuilt bench binaries (ops, or ops-<hash>; ...), for machines without Rust;
#                         made by `cargo bench --no-run`, in target/release/deps
# LORAWELD_BENCH_ALL      set: every benchmark, also those that BENCHMARKS.md does not compare
# PYTHON                  the Python that has torch; `none` leaves PyTorch out
#
# Each half of a part has a time limit; those of all parts but `scaling` add up to ten and a half minutes. One that fails
# or reaches its limit is said at the end, and the others run all the same.
set -uo pipefail
cd "$(dirname "$0")/.."
: "${LORAWELD_BENCH_RESULTS:=$PWD/target/bench-results.jsonl}" "${PYTHON:=python3}"
mkdir -p "$(dirname "$LORAWELD_BENCH_RESULTS")"
export LORAWELD_BENCH_RESULTS XDG_RUNTIME_DIR="${XDG_RUNTIME_DIR:-/tmp}"
failed=()

# Of a part: seconds that it may take here; a pattern of what is compared, or `all`; and the scripts that do the same in
# PyTorch, each with the seconds that it may take.
limits() {
  case $1 in
  ops) echo "140 accumulate/.*/bf16|solve ops:70" ;;
  ssr) echo "50 ssr ssr:75" ;;
  merge) echo "75 projectors|np-lora|ties|dare|knots merge:35 merge_entries:60" ;;
  fusion) echo "60 selection/.*/b?f16,.(kl|fixed)/|slider|encode fusion:35" ;;
  scaling) echo "200 all" ;;
  *) return 1 ;;
  esac
}

binary() {
  find "$LORAWELD_BENCH_BIN" -maxdepth 1 -type f \( -name "$1" -o -name "$1-*" \) ! -name '*.d' -printf '%T@ %p\n' |
    sort -n | tail -1 | cut -d' ' -f2-
}

run() {
  local limit=$1 name=$2 started=$SECONDS
  shift 2
  printf '\n== %s\n' "$name"
  timeout "$limit" "$@" || failed+=("$name (status $?)")
  printf '== %s took %s s\n' "$name" $((SECONDS - started))
}

rust() {
  local part=$1 limit=$2 filter=$3
  [ -n "${LORAWELD_BENCH_ALL:-}" ] || [ "$filter" = all ] && filter=
  # Results of whole merges are gigabytes of fresh memory: glibc would hand small ones out again and map large ones
  # anew, page by page, and the curves would show that.
  local memory=()
  [ "$part" = scaling ] && memory=(env MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=34359738368)
  # What criterion itself prints is in the lines that the benches print.
  if [ -n "${LORAWELD_BENCH_BIN:-}" ]; then
    local binary
    binary=$(binary "$part")
    [ -n "$binary" ] || { failed+=("$part (no binary in $LORAWELD_BENCH_BIN)") && return; }
    CRITERION_HOME=$(mktemp -d) run "$limit" "$part" "${memory[@]}" "$binary" --bench ${filter:+"$filter"} >&2
  else
    cargo bench --bench "$part" --no-run && run "$limit" "$part" "${memory[@]}" cargo bench --bench "$part" -- ${filter:+"$filter"}
  fi
}

[ $# -gt 0 ] || set -- ops ssr merge fusion scaling
for part; do
  parsed=$(limits "$part") || { echo "no such part: $part (ops, ssr, merge, fusion, scaling)" >&2; exit 2; }
  read -r ours filter scripts <<<"$parsed"
  rust "$part" "$ours" "$filter"
  [ "$PYTHON" = none ] && continue
  for script in $scripts; do
    run "${script#*:}" "$part in PyTorch, ${script%:*}.py" "$PYTHON" "benches/pytorch/${script%:*}.py"
  done
done
[ ${#failed[@]} = 0 ] || { printf 'failed: %s\n' "${failed[@]}" >&2; exit 1; }
