# Sourced by demo.sh, test.sh and .ci/run: goes to the root of the checkout, installs what is missing, configures and builds.
# shellcheck shell=bash
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
jobs=$(nproc)

# What the library, its tool and the textbook it is measured against are built with.
# shellcheck disable=SC2034  # for the scripts that source this one
build_packages=(g++ cmake make libhwy-dev libcli11-dev libfmt-dev nlohmann-json3-dev libopenblas-dev)

say() { printf '\n== %s\n' "$*"; }

# need PACKAGE...: installs those that are missing, or prints the one line that does and ends the script.
# Touches no network where all are installed.
need() {
  local package missing=() as_root=() line log
  command -v dpkg-query >/dev/null || {
    printf 'This is not a Debian system: taking it that these are installed: %s\n' "$*"
    return 0
  }
  for package in "$@"; do
    dpkg-query -W -f '${db:Status-Status}\n' "$package" 2>/dev/null | grep -qx installed || missing+=("$package")
  done
  ((${#missing[@]})) || return 0
  line="apt-get update && apt-get install -y --no-install-recommends ${missing[*]}"
  if [ "$(id -u)" != 0 ]; then as_root=(sudo); fi
  if ! { [ "$(id -u)" = 0 ] || sudo -n true 2>/dev/null || { [ -t 0 ] && command -v sudo >/dev/null; }; }; then
    printf 'Packages are missing and this account may not install them. As root, run\n\n  %s\n\nand start again.\n' "$line"
    exit 1
  fi
  say "installing: ${missing[*]}"
  log=$(mktemp)
  if ! "${as_root[@]}" sh -c "export DEBIAN_FRONTEND=noninteractive; $line" >"$log" 2>&1; then
    tail -n 20 "$log"
    printf '\nInstalling failed, see above. As root, run\n\n  %s\n\nand start again.\n' "$line"
    exit 1
  fi
  rm -f "$log"
}

# build FOLDER [CMAKE OPTION]...: shows the compiler's output only where something went wrong.
build() {
  local folder=$1 log
  shift
  log=$folder/build.log
  mkdir -p "$folder"
  if ! { cmake -S . -B "$folder" "$@" && cmake --build "$folder" --parallel "$jobs"; } >"$log" 2>&1; then
    grep -nE 'error|Error|FAILED' "$log" | head -n 40 || tail -n 40 "$log"
    printf '\nBuilding failed; the whole log is %s\n' "$log"
    exit 1
  fi
}
