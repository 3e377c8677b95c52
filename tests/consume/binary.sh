#!/bin/sh
# What the binaries promise. usage: binary.sh needed LIBRARY | exported LIBRARY HEADER | isolated OBJECT...
set -eu
check=$1
shift
case $check in
needed) # The shared library needs the C and C++ runtimes and OpenMP's, nothing a user must install.
  wrong=$(readelf -d "$1" | sed -n 's/.*(NEEDED).*\[\(.*\)\]/\1/p' |
    grep -vE '^(libgomp|libomp|libstdc\+\+|libm|libgcc_s|libc|ld-linux[-a-z0-9_]*)\.so\.[0-9]+$' || true)
  ;;
exported) # It gives out its own names only (templates of the standard library are weak), and all functions of the C header.
  wrong=$(nm -DC --defined-only "$1" | grep -vE ' [A-Z] (tw_[a-z_]+$|tilewise::|(typeinfo|vtable)( name)? for tilewise::|\.gomp_critical_)| [VWu] ' || true)
  sed -n 's/^TW_API .*[ *]\(tw_[a-z_]*\)(.*/ T \1/p' "$2" | sort >"$1.promised"
  nm -D --defined-only "$1" | sed -n 's/.*\( T tw_[a-z_]*\)$/\1/p' | sort >"$1.given"
  diff "$1.promised" "$1.given"
  ;;
isolated) # A unit with instructions of newer CPUs must not define anything that the linker may hand to the rest of the library.
  wrong=$(nm -AC "$@" | grep -E ' [VWu] ' | grep -vE ' V DW\.ref\.|tilewise::cpu::(avx512|avx2|sse4|neon)::|hwy::N_' || true)
  ;;
esac
if [ -n "$wrong" ]; then
  printf '%s is broken by:\n%s\n' "$check" "$wrong"
  exit 1
fi
