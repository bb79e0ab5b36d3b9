#!/bin/sh
# See that programs and libraries are there, given as NAME:PACKAGE. Root gets missing ones by apt-get; others are told.
# A library (*.so.*) only makes some things faster: one that cannot be had is no failure, and is not asked for where the
# processor has no use for it.
set -u
PATH=$PATH:/usr/sbin:/sbin
missing='' wanted=''
for pair in "$@"; do
    case $pair in
    *.so.*)
        grep -qw avx512ifma /proc/cpuinfo || continue
        ldconfig -p 2>/dev/null | grep -qF "${pair%%:*}" || wanted="$wanted ${pair#*:}"
        ;;
    *) command -v "${pair%%:*}" >/dev/null 2>&1 || missing="$missing ${pair#*:}" ;;
    esac
done

install() {
    [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1 || return 1
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@"; } \
        >/dev/null 2>&1
}

if [ -n "$wanted" ]; then
    # shellcheck disable=SC2086  # a list
    install $wanted || echo "faster with:$wanted; to install it: sudo apt-get install$wanted" >&2
fi
[ -n "$missing" ] || exit 0
# shellcheck disable=SC2086  # a list
install $missing && exit 0
echo "missing here:$missing; install them first: sudo apt-get install$missing" >&2
exit 1
