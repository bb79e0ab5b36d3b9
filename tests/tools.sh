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

can_install() { [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; }

update() { apt-get update -qq >/dev/null 2>&1; }

install() { DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null 2>&1; }

if [ -n "$missing" ]; then
    # shellcheck disable=SC2086  # a list
    { can_install && update && install $missing; } || {
        echo "missing here:$missing; install them first: sudo apt-get install$missing" >&2
        exit 1
    }
fi
if [ -n "$wanted" ] && can_install; then
    # Lists that are there are not fetched anew for it: a system may not have it, and this may be asked often.
    ls /var/lib/apt/lists/*Packages* >/dev/null 2>&1 || update
    # shellcheck disable=SC2086  # a list
    install $wanted || echo "without$wanted, which would make some things faster" >&2
fi
exit 0
