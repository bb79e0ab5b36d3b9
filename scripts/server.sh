#!/bin/sh
# What mptunnel's server changes on this host, and how it takes that back.  The program runs this script; so
# can you:  MPT_DEVICE=mpt0 MPT_...=... server.sh VERB.  Every command is printed, behind [#].  A failure
# leaves with 1 and ends stderr with what failed; a line `warning: ...` there is no failure.
#
# up          addresses, forwarding, masquerade and the rules of the gateway; again, with other values,
#             replaces what was
# admit       only: chains of other firewalls let our device through; for after one of them has started anew
# peer-up     the way to one client, with the MTU its paths carry; again: another MTU
# peer-down   forget that
# down        take everything back; harmless where there is nothing, or only a part
#
# MPT_DEVICE     the tunnel device, mpt0 to mpt31                                              all verbs
# MPT_SAVED      file that holds values as they were (/run/mptunnel/DEVICE.saved)              optional
# MPT_DRY_RUN    not empty: print the commands, run none                                       optional
# MPT_MTU        of the device; of one client                                                  up peer-up
# MPT_ADDRESS4   the server's address in the tunnel, as ADDR/PREFIX                            up
# MPT_ADDRESS6   the same for IPv6                                                             up, may be empty
# MPT_NETWORK4   the network of the clients                                                    up
# MPT_NETWORK6   the same for IPv6                                                             up, may be empty
# MPT_PORT       UDP port of the server, which no client may appear to send from               up
# MPT_LAN        1: clients reach private networks and the server's own addresses, too         up
# MPT_DNS        name servers offered to clients, open to them even at a private address       up, may be empty
# MPT_PEER       addresses of one client                                                       peer-up peer-down
#
# Ours are: nft table inet mptunnel_DEVICE; rules with the comment "mptunnel DEVICE" in chains of others that
# would drop what we forward; and whatever hangs on the device.  Forwarding, and accept_ra with it, get their
# old values back when the last instance goes.

# -- the same in client.sh and server.sh ------------------------------------------------------------
set -uf                                  # no file names from * or ?, but where a function says so
trap '' HUP INT TERM                     # a script is short, and half a set-up helps nobody

device=${MPT_DEVICE:?is the tunnel device, such as mpt0}
saved=${MPT_SAVED:-/run/mptunnel/$device.saved}
dry=${MPT_DRY_RUN:-}
ours=mptunnel_$device                    # our nft table
newline='
'

fail() { printf '%s\n' "$*" >&2; exit 1; }
warn() { printf 'warning: %s\n' "$*" >&2; }
show() { printf '[#] %s\n' "$*"; }

show_lines() {      # COMMAND LINES
    while IFS= read -r line; do [ -z "$line" ] || show "$1 $line"; done <<END
$2
END
}

batch() {           # FAMILY LINES: all of them by one ip(8); the first that fails ends the script
    show_lines "ip $1" "$2"
    [ -z "$dry" ] || return 0
    said=$(ip "$1" -batch - 2>&1 <<END
$2
END
    ) || fail "ip $1 $(printf '%s\n' "$2" | sed -n "${said##*-:}p"): ${said%%"$newline"*}"
}

attempt() {         # FAMILY LINES: the same, whether or not there is anything to do
    show_lines "ip $1" "$2"
    [ -n "$dry" ] || ip "$1" -force -batch - >/dev/null 2>&1 <<END || :
$2
END
}

rules() {           # LINES: all of them or none, by one nft(8); false, and $said, if it would not
    show_lines nft "$1"
    [ -z "$dry" ] || return 0
    said=$(nft -f - 2>&1 <<END
$1
END
    ) || { said=${said%%"$newline"*}; return 1; }
}

is() {              # FAMILY ADDRESS: -6 or ip6 for one with colons, -4 or ip for others
    case $2 in *:*) [ "${1#*6}" = '' ] ;; *) [ "${1#*6}" != '' ] ;; esac
}

has_ipv6() {        # whether the device may have IPv6 addresses
    for conf in "$device" default; do
        ! value "/proc/sys/net/ipv6/conf/$conf/disable_ipv6" || { [ "$value" = 0 ]; return; }
    done
    return 1
}

# Values of /proc/sys outlive the device.  Before one is changed, "path old new" goes into the saved file, whose
# head names the boot and the network namespace it speaks of.  What another instance has changed already is
# copied from its file, so that each file holds the true old value; who goes while another file has the path
# leaves the value alone, and the last one restores it, if it is still what we made it.

value() { value=$(cat "$1" 2>/dev/null); }

change() {          # PATH NEW: false if the kernel would not
    show "echo $2 >$1"
    [ -n "$dry" ] || { echo "$2" >"$1"; } 2>/dev/null
}

where() {           # $head: the head of a saved file of this boot and namespace
    [ -n "${head:-}" ] || { read -r head </proc/sys/kernel/random/boot_id; head="$head $(readlink /proc/self/ns/net)"; }
}

alone() {           # COMMAND...: while no other instance does so
    [ -z "$dry" ] || { "$@"; return; }
    [ -d "${saved%/*}" ] || mkdir -p "${saved%/*}" || return
    ( ! command -v flock >/dev/null || flock 9; "$@" ) 9>>"${saved%/*}/saved.lock"
}

begin() {           # before anything is changed: from now on `down` has something to take back
    where
    [ -z "$dry" ] || return 0
    [ -d "${saved%/*}" ] || mkdir -p "${saved%/*}" || exit 1
    holds "$saved" "$head" || printf '%s\n' "$head" >"$saved" || fail "cannot write $saved"
}

holds() {           # FILE START: $line is the first line of FILE with that start
    [ -f "$1" ] || return 1
    while IFS= read -r line; do case $line in "$2"*) return 0 ;; esac; done <"$1"
    return 1
}

inherit() {         # KEY START: lines with that START from another instance's file that has KEY; false: none has
    where
    key=$1 start=$2
    set +f
    for other in "${saved%/*}"/*.saved; do
        if [ "$other" = "$saved" ] || ! holds "$other" "$head" || ! holds "$other" "$key "; then continue; fi
        while IFS= read -r line; do
            case $line in "$start"*) printf '%s\n' "$line" ;; esac
        done <"$other"
        set -f
        return 0
    done
    set -f
    return 1
}

remember() {        # NEW PATH...: before those are changed
    new=$1
    shift
    found=$(grep -sH '' "$@" /dev/null)
    [ -n "$found" ] || fail "cannot read $*"
    lines=$(printf '%s\n' "$found" | while IFS=: read -r path old; do
        holds "$saved" "$path " || inherit "$path" "$path " || printf '%s\n' "$path $old $new"
    done)
    [ -z "$lines" ] || [ -n "$dry" ] || printf '%s\n' "$lines" >>"$saved" || fail "cannot write $saved"
}

restore() {         # what is still ours and nobody else's
    [ -f "$saved" ] || return 0
    where
    paths='' lines=''
    ! holds "$saved" "$head" || while read -r path _; do
        case $path in /proc/sys/*) paths="$paths $path" ;; esac
    done <"$saved"
    # shellcheck disable=SC2086  # an argument each
    found=$(grep -sH '' $paths /dev/null) || [ $? -le 2 ] || fail "cannot read$paths"
    [ -z "$paths" ] || while read -r path old new; do
        case $newline$found$newline in *"$newline$path:$new$newline"*) ;; *) continue ;; esac
        inherit "$path" '' >/dev/null || lines="$lines$path $old$newline"
    done <"$saved"
    while read -r path old; do [ -z "$path" ] || change "$path" "$old" || warn "$path stays as it is"; done <<END
$lines
END
    [ -n "$dry" ] || rm -f "$saved"
}

take_back() {       # what both roles leave: the device's addresses and routes, our nft table, changed values
    [ ! -f "$saved" ] || attempt -4 "link set dev $device down${newline}addr flush dev $device"
    ! command -v nft >/dev/null || rules "table inet $ours${newline}delete table inet $ours" ||
        warn "nft table $ours stays: $said"
    alone restore
}
# -- up to here -------------------------------------------------------------------------------------

never4='0.0.0.0/8, 127.0.0.0/8, 169.254.0.0/16, 192.0.0.0/24, 224.0.0.0/4, 240.0.0.0/4, 100.100.100.200, 168.63.129.16'
never6='::/127, ::ffff:0:0/96, 64:ff9b:1::/48, fe80::/10, fec0::/10, ff00::/8, fd00:ec2::254, fd20:ce::254'
private4='10.0.0.0/8, 100.64.0.0/10, 172.16.0.0/12, 192.168.0.0/16, 198.18.0.0/15'
private6='fc00::/7'
mark="mptunnel $device"                  # the comment of what we insert elsewhere

main() {
    command -v ip >/dev/null || fail 'ip: not found; install iproute2'
    case ${1:-} in
        up) up ;;
        admit) admit ;;
        peer-up) peer replace " mtu $MPT_MTU" ;;
        peer-down) peer del '' ;;
        down) down ;;
        *) fail "no such verb: ${1:-}; the head of $0 lists them" ;;
    esac
}

up() {
    command -v nft >/dev/null || fail 'nft: not found; install nftables'
    begin
    guard                                # first what closes, then what opens
    link="link set dev $device mtu $MPT_MTU txqueuelen 2000"
    # without an fe80 address the kernel sends no router solicitations into the tunnel
    [ ! -d "/proc/sys/net/ipv6/conf/$device" ] || link="$link addrgenmode none"
    batch -4 "$link${newline}addr replace ${MPT_ADDRESS4:?} dev $device${newline}link set dev $device up"
    alone forward /proc/sys/net/ipv4 || fail 'net.ipv4.ip_forward is 0 and cannot be set here; set it outside'
    if [ -n "${MPT_ADDRESS6:-}" ] && has_ipv6; then
        batch -6 "addr replace $MPT_ADDRESS6 dev $device"
        alone forward /proc/sys/net/ipv6 || warn 'no IPv6 for clients: net.ipv6.conf.all.forwarding stays 0'
    fi
    admit
}

guard() {           # our nft table: clients reach the internet, under their own addresses, and nothing else
    network4=$MPT_NETWORK4 network6=${MPT_NETWORK6:-100::/128} host6=${MPT_ADDRESS6:-100::}
    low=32768 high=60999                 # ports of masqueraded flows: never ours, or replies to us could be stolen
    if [ "$MPT_PORT" -ge 46884 ] && [ "$MPT_PORT" -le $high ]; then high=$((MPT_PORT - 1)); fi
    if [ "$MPT_PORT" -ge $low ] && [ "$MPT_PORT" -lt 46884 ]; then low=$((MPT_PORT + 1)); fi
    names='' server=drop
    lan="ip daddr { $private4 } drop
        ip6 daddr { $private6 } drop"
    for address in ${MPT_DNS:-}; do
        case $address in *:*) ip=ip6 ;; *) ip=ip ;; esac
        names="$names
        $ip daddr $address meta l4proto { tcp, udp } th dport 53 accept"
    done
    [ "${MPT_LAN:-0}" = 0 ] || lan='' server=accept
    rules "table inet $ours
delete table inet $ours
table inet $ours {
    set flows4 {
        type ipv4_addr
        size 65536
        flags dynamic
    }
    set flows6 {
        type ipv6_addr
        size 65536
        flags dynamic
    }
    chain spoofed {
        type filter hook prerouting priority raw; policy accept;
        iifname { \"$device\", \"lo\" } accept
        ip saddr $network4 drop
        ip daddr $network4 drop
        ip6 saddr $network6 drop
        ip6 daddr $network6 drop
    }
    chain forward {
        type filter hook forward priority filter; policy accept;
        iifname != \"$device\" oifname != \"$device\" accept
        tcp flags & (syn | rst) == syn tcp option maxseg size set rt mtu
        iifname \"$device\" goto clients
        ct state established,related accept
        drop
    }
    chain input {
        type filter hook input priority filter; policy accept;
        iifname != \"$device\" accept
        jump own
        ct state established,related accept
        ip daddr ${MPT_ADDRESS4%/*} icmp type echo-request accept
        ip6 daddr ${host6%/*} icmpv6 type echo-request accept$names
        $server
    }
    chain clients {
        jump own
        oifname \"$device\" drop$names
        ip daddr { $never4 } drop
        ip6 daddr { $never6 } drop
        $lan
        ct state new add @flows4 { ip saddr ct count over 8192 } drop
        ct state new add @flows6 { ip6 saddr ct count over 8192 } drop
    }
    chain own {
        ip saddr != $network4 drop
        ip6 saddr != $network6 drop
        udp sport $MPT_PORT drop
    }
    chain outward {
        type nat hook postrouting priority srcnat; policy accept;
        oifname { \"$device\", \"lo\" } accept
        ip saddr $network4 meta l4proto { tcp, udp } masquerade to :$low-$high fully-random
        ip6 saddr $network6 meta l4proto { tcp, udp } masquerade to :$low-$high fully-random
        ip saddr $network4 masquerade
        ip6 saddr $network6 masquerade
    }
}" || fail "nft: $said"
}

forward() {         # TREE of one family in /proc/sys: on, with the old values of all that changes by it remembered
    switch=$1/conf/all/forwarding        # in IPv4 another name of ip_forward
    value "$switch" || return 1
    if [ "$value" != 0 ]; then           # the administrator's choice, or another instance's
        [ -n "$dry" ] || holds "$saved" "$switch " || inherit "$switch" "$1/" >>"$saved" || :
        return 0
    fi
    set +f
    remember 1 "$switch"                 # first, because it changes the others when it is restored
    remember 1 "$1"/conf/*/forwarding
    remember 0 "$1/conf/all/accept_redirects"
    # forwarding hosts hear router advertisements only with accept_ra=2: without it, IPv6 itself would be lost
    heard=$(grep -sl '^1$' "$1"/conf/*/accept_ra | grep -v -e /all/ -e /default/ -e /lo/ -e "/$device/")
    set -f
    # shellcheck disable=SC2086  # an argument each
    [ -z "$heard" ] || remember 2 $heard
    for path in $heard; do change "$path" 2 || warn "$path stays 1"; done
    change "$switch" 1
}

admit() {           # chains of others that drop what nobody accepted (Docker, ufw, firewalld) let our device through
    while read -r chain; do
        [ -n "$chain" ] || continue
        rules "insert rule $chain oifname \"$device\" counter accept comment \"$mark\"
insert rule $chain iifname \"$device\" counter accept comment \"$mark\"" ||
            warn "nft chain $chain may drop what we forward, and refuses our rule: $said"
    done <<END
$(nft -a -t list ruleset 2>/dev/null | awk -v mark="comment \"$mark\"" '
    $1 == "table" { family = $2; table = $3 }
    $1 == "chain" { chain = $2; forward = drops = ours = 0 }
    /^\t*type filter hook forward / { forward = family ~ /^(ip|ip6|inet)$/ && table !~ /^mptunnel_/ }
    /^\t*type filter hook forward .*policy drop/ { drops = 1 }
    $1 == "}" { if (forward && drops && !ours) print family, table, chain; forward = 0 }
    index($0, mark) { ours = 1 }
    $1 != "}" && /^\t+(counter packets [0-9]+ bytes [0-9]+ )?(drop|reject)/ { drops = 1 }')
END
    legacy -I
}

withdraw() {
    lines=$(nft -a -t list ruleset 2>/dev/null | awk -v mark="comment \"$mark\"" '
    $1 == "table" { table = $2 " " $3 }
    $1 == "chain" { chain = $2 }
    index($0, mark) { print "delete rule", table, chain, "handle", $NF }')
    while read -r line; do
        [ -z "$line" ] || rules "$line" || warn "a rule with the comment \"$mark\" stays; nft: $said"
    done <<END
$lines
END
    legacy -D
}

legacy() {          # -I or -D: the same in the tables of the old iptables, where those are in use
    for tool in iptables ip6tables; do
        grep -qsx filter "/proc/net/${tool%tables}_tables_names" || continue
        ! command -v "$tool-legacy" >/dev/null || tool=$tool-legacy
        [ "$1" = -D ] || "$tool" -S FORWARD | grep -qE '^-P FORWARD DROP|^-A FORWARD -j (DROP|REJECT)' || continue
        for side in -o -i; do
            set -- "$1" FORWARD "$side" "$device" -m comment --comment "$mark" -j ACCEPT
            "$tool" -S FORWARD | grep -q -e "$side $device -m comment --comment \"$mark\"" && there=-D || there=-I
            [ "$1" = "$there" ] || continue
            show "$tool $*"
            [ -n "$dry" ] || "$tool" -w "$@" || warn "$tool refuses"
        done
    done
}

peer() {            # OPERATION SUFFIX
    for family in -4 -6; do
        lines=
        for address in $MPT_PEER; do
            ! is "$family" "$address" || lines="$lines${newline}route $1 $address dev $device$2"
        done
        if [ -z "$lines" ]; then continue; fi
        if [ "$1" = del ]; then
            attempt "$family" "$lines"
        elif [ "$family" = -4 ] || has_ipv6; then
            batch "$family" "$lines"
        fi
    done
}

down() {
    ! command -v nft >/dev/null || withdraw
    take_back
}

main "$@"
