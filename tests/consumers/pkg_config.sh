#!/usr/bin/env bash
# A consumer without CMake, of what is installed.
#
#     tests/consumers/pkg_config.sh PKG_CONFIG PREFIX COMPILER
set -euo pipefail

[ $# = 3 ] || { echo "usage: pkg_config.sh PKG_CONFIG PREFIX COMPILER" >&2; exit 2; }
export PKG_CONFIG_PATH=$2/share/pkgconfig
read -ra flags <<<"$("$1" --cflags --libs "concertina >= 0.2")"
printf '%s\n' "${flags[@]}"
"$3" -std=c++20 -fsyntax-only "$(dirname "$0")/main.cpp" "${flags[@]}"
