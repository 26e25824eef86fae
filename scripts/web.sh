#!/usr/bin/env bash
# The page: `build` makes it in target/web/dist, a folder of static files; `serve` shows it here and prints the address;
# `test` runs its tests in a real browser.
#
#   scripts/web.sh build
#   scripts/web.sh serve
#   scripts/web.sh test [PART OF A NAME]...
#
# It takes Rust with rustup, Node 20 or newer with npm, and for tests Chromium: CHROMIUM names it, /usr/bin/chromium else.
# PORT is where it is served, 8080 else. Tests compare with the command line: LORAWELD names it, and it is built else.
set -euo pipefail
cd "$(dirname "$0")/.."

root=$PWD/target/web
dist=$root/dist
target=wasm32-unknown-unknown

# The version that the program was linked with: the two have to be the same.
bindgen=$(sed -n '/^name = "wasm-bindgen"$/{n;s/^version = "\(.*\)"$/\1/p}' Cargo.lock)

tools() {
  if command -v rustup >/dev/null; then
    rustup target add "$target" 2>/dev/null || rustup target list --installed | grep -qx "$target"
  fi
  if [ "$("$root/bin/wasm-bindgen" --version 2>/dev/null)" != "wasm-bindgen $bindgen" ]; then
    cargo install --quiet --root "$root" --force --version "$bindgen" wasm-bindgen-cli
  fi
  [ web/node_modules/.package-lock.json -nt web/package-lock.json ] || (cd web && npm ci --no-audit --no-fund)
}

build() {
  tools
  # SIMD is in every browser that is kept up to date. The stack is as large as a thread's of the command line.
  RUSTFLAGS="-C target-feature=+simd128 -C link-arg=-zstack-size=4194304" \
    cargo build --package loraweld-web --profile web --target "$target"
  rm -rf "$dist"
  "$root/bin/wasm-bindgen" --target web --out-dir "$dist" "target/$target/web/loraweld_web.wasm" --out-name loraweld
  # What of the glue is for TypeScript alone is read where the worker is compiled.
  cp "$dist/loraweld.d.ts" web/src/
  (cd web && npx tsc -p tsconfig.json && npx tsc -p tsconfig.worker.json)
  rm "$dist"/*.d.ts
  cp web/page/* "$dist/"
  cp src/cli/report/style.css "$dist/report.css"
  cp src/cli/report/script.js "$dist/report.js"
  local version
  version=$(cat "$dist"/* | sha256sum | cut -c1-16)
  sed -i "s/@VERSION@/$version/" "$dist/offline.js"
  echo "built      $dist ($(du -sh "$dist" | cut -f1); $(gzip -9c "$dist/loraweld_bg.wasm" | wc -c) bytes of program, compressed)"
}

case ${1:-} in
build) build ;;
serve)
  [ -d "$dist" ] || build
  node web/serve.mjs
  ;;
test)
  shift
  [ -d "$dist" ] || build
  if [ -z "${LORAWELD:-}" ]; then
    cargo build --quiet
    LORAWELD=$PWD/target/debug/loraweld
  fi
  LORAWELD=$LORAWELD node web/test/run.mjs "$@"
  ;;
*)
  sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2
  exit 2
  ;;
esac
