#!/usr/bin/env bash
# What a release has to pass beside scripts/test.sh. It publishes nothing.
#
#   scripts/release.sh             before the first release
#   scripts/release.sh BASELINE    with the tag or commit that the public interface is compared with
#
# It takes cargo-deny, cargo-semver-checks and dist (`cargo install --locked cargo-deny cargo-semver-checks cargo-dist`), and
# says what it skips for want of one. WITHOUT=advisories leaves out the list of advisories, which is fetched from the network.
set -euo pipefail
cd "$(dirname "$0")/.."

say() { printf '\n== %s\n' "$*"; }
has() {
  command -v "$1" >/dev/null && return
  say "skipped: $1 is not installed (cargo install --locked ${2:-$1})"
  return 1
}

say "packages for crates.io: built from what would be uploaded"
cargo publish --dry-run -p loraweld -p loraweld-capi

if has cargo-deny; then
  say "licences, sources and advisories of dependencies"
  if [ "${WITHOUT:-}" = advisories ]; then cargo deny check bans licenses sources; else cargo deny check; fi
fi

if has cargo-semver-checks; then
  if [ -n "${1:-}" ]; then
    say "the public interface, beside $1"
    cargo semver-checks -p loraweld --only-explicit-features --baseline-rev "$1"
  else
    say "skipped: no BASELINE to compare the public interface with"
  fi
fi

if ! grep -q '^repository' Cargo.toml; then
  say "skipped: dist asks for the repository on GitHub, which Cargo.toml does not name yet"
elif has dist cargo-dist; then
  say "binaries: what the release workflow would make"
  dist generate --check
  dist plan
fi
