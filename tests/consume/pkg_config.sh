#!/bin/sh
# Compiles and runs a C program with nothing but pkg-config's answer, against the library installed under $1.
# usage: pkg_config.sh PREFIX SOURCE OUTPUT COMPILER [FLAG...]
set -eu
prefix=$1 source=$2 output=$3
shift 3
pc=$(find "$prefix" -name tilewise.pc)
export PKG_CONFIG_PATH="${pc%/*}"
libdir=${PKG_CONFIG_PATH%/pkgconfig}
test "$(pkg-config --modversion tilewise)" = "$VERSION"
# shellcheck disable=SC2046  # words on purpose
"$@" "$source" -o "$output" $(pkg-config --cflags --libs tilewise) -lm
LD_LIBRARY_PATH="$libdir${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}" "$output"
