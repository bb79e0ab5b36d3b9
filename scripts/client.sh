#!/bin/sh
# What mptunnel's client changes on this host, and how it takes that back.  The program runs this script; so
# can you:  MPT_DEVICE=mpt0 MPT_...=... client.sh VERB.  Every command is printed, behind [#].  A failure
# leaves with 1 and ends stderr with what failed; a line `warning: ...` there is no failure.
#
# up          addresses, routes, masquerade and name servers; again, with other values, replaces what was
# keep        after the main table has changed: the routes of kept connections follow it, rules that are missing are made
# dns         ask other name servers (MPT_DNS), or the former ones again (MPT_DNS empty), past the tunnel or not
# mtu         another MTU of the device
# path-up     let one path's datagrams leave by its interface; again, with other values, replaces what was
# path-down   forget one path
# down        take everything back; harmless where there is nothing, or only a part
#
# MPT_DEVICE     the tunnel device, mpt0 to mpt31                                              all verbs
# MPT_TABLE      first of our 16 routing tables and rule priorities (5200 + 16 x number)       optional
# MPT_SAVED      file that holds values as they were (/run/mptunnel/DEVICE.saved)              optional
# MPT_DRY_RUN    not empty: print the commands, run none                                       optional
# MPT_MTU        of the device                                                                 up mtu
# MPT_ADDRESS4   its IPv4 address, with the server's as MPT_PEER4; without a peer ADDR/PREFIX  up keep, may be empty
# MPT_ADDRESS6   the same for IPv6, with MPT_PEER6                                             up keep, may be empty
# MPT_ROUTES     networks to be reached through the tunnel; 0.0.0.0/0 and ::/0 are everything  up, may be empty
#                one to which the host has a route of its own, as to a LAN without a metric, stays with that
# MPT_DNS        name servers to be asked, whatever an application believes                    up dns, may be empty
# MPT_OUTSIDE    1: questions leave as if there were no tunnel, until `dns` or `up` comes again   dns, optional
# MPT_SERVERS    outer addresses of the server, which the DNS rule leaves alone                up dns, may be empty
# MPT_KEEP       connections that stay outside the tunnel: LOCAL,REMOTE pairs                  up keep, may be empty
# MPT_PATH       number of the path, 0 to 7                                                    path-up path-down
# MPT_INTERFACE  MPT_ADDRESS  MPT_GATEWAY (may be empty)  MPT_SERVER: the path's way out       path-up
# MPT_SHARED     1: another interface has the same address, so replies may come by either      path-up, optional
# MPT_CARRIER  MPT_CARRIER_GATEWAY (may be empty): the way out of what a CLAT makes IPv6 of    path-up, optional
#
# Ours are: rules with table = priority = MPT_TABLE + 0 to 8, those tables, nft table inet mptunnel_DEVICE, and
# whatever hangs on the device.  If the program is killed, the device goes and all routes by it.  Rules, their
# tables and the nft table stay until `down`; of these the DNS rule goes on sending questions to MPT_DNS.

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

number=${device#mpt}
base=${MPT_TABLE:-$((5200 + 16 * number))}
kept=$((base + 8))                       # table and priority of kept connections

main() {
    command -v ip >/dev/null || fail 'ip: not found; install iproute2'
    case ${1:-} in
        up) up ;;
        keep) keep add ;;
        dns) outside; dns ;;
        mtu) batch -4 "link set dev $device mtu $MPT_MTU" ;;
        path-up) path_up ;;
        path-down) path_down ;;
        down) down ;;
        *) fail "no such verb: ${1:-}; the head of $0 lists them" ;;
    esac
}

up() {
    begin
    guard                                # first what protects, then what leads traffic here
    keep just
    routes4='' routes6=''
    for network in ${MPT_ROUTES:-}; do   # everything: as halves, so that default routes stay as they are
        case $network in
            0.0.0.0/0) routes4="$routes4 0.0.0.0/1 128.0.0.0/1" ;;
            ::/0) routes6="$routes6 ::/1 8000::/1" ;;
            *:*) routes6="$routes6 ${network%/128}" ;;
            *) routes4="$routes4 ${network%/32}" ;;
        esac
    done
    link="link set dev $device mtu $MPT_MTU txqueuelen 2000"
    # without an fe80 address the kernel sends no router solicitations into the tunnel
    [ ! -d "/proc/sys/net/ipv6/conf/$device" ] || link="$link addrgenmode none"
    batch -4 "$link${newline}link set dev $device up"
    furnish -4 "${MPT_ADDRESS4:-}" "${MPT_PEER4:-}" 32 "$routes4"
    ! has_ipv6 || furnish -6 "${MPT_ADDRESS6:-}" "${MPT_PEER6:-}" 128 "$routes6"
    dns
}

guard() {           # our nft table: what leaves by the device has its address, what is for that came by it, or by an
                    # interface that has the same address itself, as one in a LAN of our tunnel's numbers may
    command -v nft >/dev/null || { warn 'nft: not found; no masquerade, no DNS rule; install nftables'; return; }
    address4=${MPT_ADDRESS4:-} address6='' spoofed='' foreign='' homeless=''
    [ -n "$address4" ] || homeless="${newline}        oifname \"$device\" meta nfproto ipv4 reject"
    if has_ipv6; then
        address6=${MPT_ADDRESS6:-}
        [ -n "$address6" ] || homeless="$homeless${newline}        oifname \"$device\" meta nfproto ipv6 reject"
    fi
    for address in ${address4%/*} ${address6%/*}; do
        case $address in *:*) ip=ip6 ;; *) ip=ip ;; esac
        spoofed="$spoofed${newline}        iifname != \"$device\" $ip daddr $address fib daddr . iif type != local"
        spoofed="$spoofed fib saddr type != local drop"
        foreign="$foreign${newline}        oifname \"$device\" $ip saddr != $address masquerade"
    done
    rules "table inet $ours
delete table inet $ours
table inet $ours {
    chain spoofed {
        type filter hook prerouting priority raw; policy accept;$spoofed
    }
    chain homeless {
        type filter hook output priority filter; policy accept;$homeless
    }
    chain foreign {
        type nat hook postrouting priority srcnat; policy accept;$foreign
    }
    chain names {
        type nat hook output priority -100; policy accept;
    }
}" || warn "no masquerade, no DNS rule; nft: $said"
}

furnish() {         # FAMILY ADDRESS PEER LENGTH ROUTES: the device has just these
    address=$2 lines=
    [ -z "$2" ] || [ -z "$3" ] || address="${2%/*} peer $3/$4"
    [ -z "$2" ] || lines="addr replace $address dev $device"
    case ${3:-${2%/*}} in                # the kernel makes this route with the address, and never again
        "${2%/*}") ;;
        *:*) lines="$lines${newline}route replace $3/$4 dev $device proto kernel metric 256" ;;
        *) lines="$lines${newline}route replace $3/$4 dev $device proto kernel scope link src ${2%/*}" ;;
    esac
    # `replace` takes away whoever's route has the same network and metric, and a LAN's has none with dhclient or
    # Docker: nothing would bring it back.  With a metric that is nobody's, ours stands beside the host's own: behind
    # those of the kernel, before the 50 and more of NetworkManager's IPv4; for IPv6 behind the 1024 of ip(8)
    case $1 in -4) metric=32 ;; *) metric=1056 ;; esac
    for network in $5; do lines="$lines${newline}route replace $network dev $device metric $metric"; done
    ip "$1" -o route show table main 2>/dev/null | sed '/ dev mpt[0-9]/d' | while read -r network more; do
        case " $5 " in *" $network "*) ;; *) continue ;; esac
        case $more in *' metric '*) theirs=${more##* metric } ;; *) theirs=0 ;; esac
        more=${more#*dev }
        [ "${theirs%% *}" -gt "$metric" ] || warn "$network stays with ${more%% *}, by the host's own route"
    done
    stale=$(                             # goes first: the kernel would take a second address for an appendix
        ip "$1" -o addr show dev "$device" | while read -r _ _ _ there word peer _; do
            [ "$word" != peer ] || there="$there peer $peer"
            [ "$there" = "$address" ] || printf '%s\n' "addr del $there dev $device"
        done
        ip "$1" route show dev "$device" | while read -r network more; do
            case " $5  $more " in *" $network "* | *' proto kernel '*) continue ;; esac
            printf '%s\n' "route del $network dev $device"
        done
    ) 2>/dev/null
    [ -z "$stale" ] || attempt "$1" "$stale"
    batch "$1" "$lines"
}

keep() {            # MPT_KEEP: what goes by the main table now still does, by a copy of it; so does an answer of sshd
    for family in -4 -6; do          # just: by these rules and no others; add: these too
        our_rules "$family" "$kept" "$kept"
        asked='' wanted=''
        [ "$1" = just ] || [ -z "$found" ] || wanted=$found$newline
        for pair in ${MPT_KEEP:-}; do
            ! is "$family" "$pair" || asked="${asked}route get ${pair#*,} from ${pair%,*}$newline"
        done
        [ -n "$asked$found" ] || continue
        answers=$newline$(printf '%s' "$asked" | ip "$family" -o -force -batch - 2>/dev/null)$newline
        for pair in ${MPT_KEEP:-}; do
            local=${pair%,*} remote=${pair#*,}
            case " ${MPT_ADDRESS4:-} ${MPT_ADDRESS6:-} " in *" $local "* | *" $local/"*) continue ;; esac
            case $answers in
                *"$newline$remote from $local "*)
                    more=${answers#*"$newline$remote from $local "}
                    case " ${more%%"$newline"*} " in *" table $kept "*) ;; *' table '*) continue ;; esac ;;
                *)                   # the address is away: its rules stay, for the connection outlives that
                    case $newline$found$newline in *" from $local to $remote lookup "*) ;; *) continue ;; esac ;;
            esac
            for rule in "from $local to $remote" "from $local ipproto tcp sport 22"; do
                rule="priority $kept $rule lookup $kept"
                case $newline$wanted in *"$newline$rule$newline"*) ;; *) wanted=$wanted$rule$newline ;; esac
            done
        done
        if [ -n "$wanted" ]; then copy_main "$family"; else attempt "$family" "route flush table $kept"; fi
        settle "$family" "$kept" "${wanted%"$newline"}"
    done
}

copy_main() {       # FAMILY: the main table without the tunnels' routes, in our table
    attempt "$1" "route flush table $kept
$(ip "$1" -o route show table main | sed -e '/ dev mpt[0-9]/d' -e 's/\\//g' -e 's/ nhid [0-9]*//' \
    -e 's/ expires [0-9]*sec//' -e 's/ linkdown//g' -e 's/ dead//g' -e "s/^/route append table $kept /")"
}

outside() {         # MPT_OUTSIDE: questions go by the copy of the main table, or no longer
    for family in -4 -6; do
        our_rules "$family" "$kept" "$kept"
        lines='' others=''
        while read -r rule; do
            case $rule in
                '') ;;
                *' dport 53 '*) lines="${lines}rule del $rule$newline" ;;
                *) others=$others$rule ;;
            esac
        done <<END
$found
END
        protocols=
        [ "${MPT_OUTSIDE:-0}" != 1 ] || protocols='udp tcp'
        for protocol in $protocols; do
            lines="${lines}rule add priority $kept ipproto $protocol dport 53 lookup $kept protocol kernel$newline"
        done
        [ -n "$lines" ] || continue
        attempt "$family" "$lines"       # before Linux 4.17 there is no such rule
        if [ -n "$protocols$others" ]; then
            copy_main "$family"
        else
            attempt "$family" "route flush table $kept"
        fi
    done
}

dns() {             # MPT_DNS: by systemd-resolved where it rules, else our nft table turns questions round
    if resolved; then
        if [ -z "${MPT_DNS:-}" ]; then
            tell resolvectl revert "$device"
        else
            # shellcheck disable=SC2086  # an argument each
            tell resolvectl dns "$device" $MPT_DNS && tell resolvectl domain "$device" '~.' && return
        fi
    fi
    command -v nft >/dev/null || return 0
    lines="flush chain inet $ours names"
    for ip in ip ip6; do
        question='meta l4proto { tcp, udp } th dport 53' targets='' count=0
        for address in 127.0.0.0/8 ::1 ${MPT_SERVERS:-} ${MPT_DNS:-}; do
            ! is "$ip" "$address" || question="$question $ip daddr != $address"
        done
        for address in ${MPT_DNS:-}; do
            ! is "$ip" "$address" || { targets="$targets${targets:+, }$count : $address"; count=$((count + 1)); }
        done
        case $count in
            0) continue ;;
            1) targets=${targets#0 : } ;;
            *) targets="numgen inc mod $count map { $targets }" ;;
        esac
        lines="$lines${newline}add rule inet $ours names $question dnat $ip to $targets"
    done
    rules "$lines" || warn "names are asked as before; nft: $said"
}

tell() {            # COMMAND...: false if it would not
    show "$*"
    [ -n "$dry" ] || "$@" >/dev/null 2>&1
}

resolved() {        # does systemd-resolved answer this host's applications, and is this the host's own namespace?
    grep -qs '^nameserver 127\.0\.0\.5[34]' /etc/resolv.conf && command -v resolvectl >/dev/null &&
        [ "$(readlink /proc/self/ns/net)" = "$(readlink /proc/1/ns/net)" ] && systemctl -q is-active systemd-resolved
}

path_up() {
    table=$((base + MPT_PATH)) family=-4 other=-6
    case $MPT_ADDRESS in *:*) family=-6 other=-4 ;; esac
    case $family${MPT_GATEWAY:-} in              # onlink: the kernel need not find the gateway in its tables
        -[46]) hop='' ;;
        -4*:*) hop="via inet6 $MPT_GATEWAY onlink" ;;
        *) hop="via $MPT_GATEWAY onlink" ;;
    esac
    batch "$family" "route replace default $hop dev $MPT_INTERFACE table $table proto kernel"
    [ "$family${MPT_SHARED:-0}" != -41 ] || alone loosen || exit 1
    [ "$family" != -4 ] || stand_behind
    settle "$family" "$table" "priority $table from $MPT_ADDRESS to $MPT_SERVER lookup $table"
    translated=''
    if [ -n "${MPT_CARRIER:-}" ]; then           # what the CLAT makes of our datagrams would enter the tunnel
        hop=${MPT_CARRIER_GATEWAY:+via $MPT_CARRIER_GATEWAY onlink}
        batch "$other" "route replace default $hop dev $MPT_CARRIER table $table proto kernel"
        translated="priority $table from all iif $MPT_INTERFACE lookup $table"
    fi
    settle "$other" "$table" "$translated"
}

stand_behind() {    # nft's fib sees an IPv4 address at one interface only, that of its first local route: not ours here
    case $newline$(ip -4 route show table local dev "$device" 2>/dev/null) in
        *"${newline}local $MPT_ADDRESS "*) ;;
        *) return 0 ;;
    esac
    attempt -4 "route del local $MPT_ADDRESS dev $device table local
route append local $MPT_ADDRESS dev $device table local proto kernel scope host src $MPT_ADDRESS"
}

loosen() {          # a strict rp_filter drops what comes by the interface the kernel would not choose itself
    begin
    filter=/proc/sys/net/ipv4/conf/$MPT_INTERFACE/rp_filter
    remember 2 "$filter"
    change "$filter" 2 || warn "rp_filter of $MPT_INTERFACE could not be set to 2"
}

path_down() {
    table=$((base + MPT_PATH))
    for family in -4 -6; do
        settle "$family" "$table" ''
        attempt "$family" "route flush table $table"
    done
}

settle() {          # FAMILY PRIORITY RULES: ours of that priority are just these
    our_rules "$1" "$2" "$2"
    each 'rule del ' "$found" '' "$3"
    [ -z "$lines" ] || attempt "$1" "$lines"
    each 'rule add ' "$3" ' protocol kernel' "$found"   # systemd-networkd leaves those alone
    [ -z "$lines" ] || batch "$1" "$lines"
}

our_rules() {       # FAMILY LOW HIGH: $found: those with such a priority and the table of that number
    shown=$(ip "$1" rule show 2>/dev/null)
    found=
    while read -r priority rule; do
        priority=${priority%:}
        case "$rule " in *" lookup $priority "*) ;; *) continue ;; esac
        case $rule in *' [detached] '*) rule="${rule%% \[*}${rule#*\]}" ;; esac  # its interface is gone
        if [ "$priority" -ge "$2" ] && [ "$priority" -le "$3" ]; then
            found="$found${found:+$newline}priority $priority ${rule%% proto *}"
        fi
    done <<END
$shown
END
}

each() {            # BEFORE LINES AFTER BUT: $lines: each that is not among BUT, with this before and behind it
    lines=
    while IFS= read -r line; do
        case $newline$newline$4$newline in *"$newline$line$newline"*) ;; *) lines="$lines$1$line$3$newline" ;; esac
    done <<END
$2
END
}

down() {
    ! resolved || ! [ -d "/proc/sys/net/ipv4/conf/$device" ] || tell resolvectl revert "$device"
    for family in -4 -6; do
        our_rules "$family" "$base" "$kept"
        each 'rule del ' "$found" '' ''
        table=$base
        while [ "$table" -le "$kept" ]; do
            lines="${lines}route flush table $table$newline" table=$((table + 1))
        done
        attempt "$family" "$lines"
    done
    take_back
}

main "$@"
