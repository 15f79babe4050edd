#!/usr/bin/env bash
# cluster.sh - a REAL multi-node SLURM cluster on one machine (root, Linux namespaces, no systemd).
#
#   cluster.sh up [N]          bring up a controller "ctl", a "login" and nodes n1..nN (default 2); downs first
#   cluster.sh down            end everything (one SIGKILL to the outer PID namespace); idempotent
#   cluster.sh exec NODE CMD.. run CMD inside NODE (ctl, login, n1..nN), same directory and environment
#   cluster.sh kill NODE       power NODE off: link first, then every process in it at once
#   cluster.sh fail NODE       kill, and tell slurmctld at once (state=down) instead of after its timeout
#   cluster.sh boot NODE       power a killed NODE on again
#   cluster.sh linkdown|linkup NODE   cut / restore NODE's network cable (its processes go on)
#   cluster.sh status          sinfo + squeue
#   $SIM_BASE/bin/{sbatch,squeue,..}  shims that run the SLURM clients inside "login": put it first on PATH
#
# One outer "fabric" PID+net+mount namespace holds the bridge and is the ancestor of every node; each node
# is its own PID+net+UTS+mount+IPC namespace with its own munged, slurmd, sshd, IP, /proc, /sys, /run,
# /dev/shm, /etc/hosts. All other files are shared (the "shared filesystem"). The host's own network
# namespace and /etc stay untouched, so clusters with different SIM_BASE run side by side, same subnet.
# Debian packages: slurm-wlm munge iproute2 openssh-server (and, for SIM_DBD=1, mariadb-server slurmdbd).
#
# shellcheck disable=SC2016  # single-quoted code is meant for `await` and for shells inside namespaces
set -euo pipefail
SIM_BASE=${SIM_BASE:-${TMPDIR:-/tmp}/slurm-sim}
SIM_NET=${SIM_NET:-10.77.0}         # ctl is .1, login is .2, node i is .(10+i)
SIM_CPUS=${SIM_CPUS:-8}             # CPUs each node claims (config_overrides: need not be real)
SIM_MEM=${SIM_MEM:-8000}            # MB each node claims
SIM_GPUS=${SIM_GPUS:-4}             # fake GPUs per node
SIM_LOCAL=${SIM_LOCAL:-}            # directories every node gets as a private tmpfs, e.g. "/mnt/scratch"
SIM_DBD=${SIM_DBD:-0}               # 1: slurmdbd + mariadb in ctl, so that sacct works
SIM_CONF_EXTRA=${SIM_CONF_EXTRA:-}  # lines appended to slurm.conf
export SIM_BASE SIM_NET SIM_LOCAL SIM_DBD
SELF=$(readlink -f "${BASH_SOURCE[0]}"); B=$SIM_BASE
die() { echo "cluster.sh: $*" >&2; exit 1; }
await() { # TRIES CONDITION: evaluate CONDITION every 50 ms until it holds
    local i; for i in $(seq "$1"); do eval "$2" && return 0; sleep 0.05; done; return 1; }
ip_of() {
    case $1 in ctl) echo "$SIM_NET.1";; login) echo "$SIM_NET.2";; n[1-9]*) echo "$SIM_NET.$((10 + ${1#n}))";;
        *) die "no such node: $1";; esac; }

# A recorded pid counts only while it still is the process we started (its start time matches).
ticks() { # PID: when it started; fails for a process that is gone or a zombie
    local s f; s=$(cat "/proc/$1/stat" 2>/dev/null) || return 1
    read -ra f <<< "${s##*) }"; [ "${f[0]}" != Z ] && echo "${f[19]}"; }
remember() { echo "$2 $(ticks "$2")" > "$B/pid/$1"; }
pid_of() { # NAME: its pid, if it still runs
    local p t; { read -r p t < "$B/pid/$1"; } 2>/dev/null && [ "$(ticks "$p")" = "$t" ] && echo "$p"; }
child_of() { # PARENT [PATTERN]: host pid of its one child (whose command line ends so)
    local c; for _ in $(seq 300); do
        c=$(ps -o pid=,args= --ppid "$1" |
            awk -v e="${2:-}" 'e == "" || substr($0, length($0)-length(e)+1) == e {print $1; exit}')
        [ -n "$c" ] && { echo "$c"; return; }; sleep 0.01; done; die "no child of $1 ${2:-}"; }

write_conf() { # N
    local i nodes="" gres="" accounting=AccountingStorageType=accounting_storage/none
    [ "$SIM_DBD" != 1 ] ||
        accounting=AccountingStorageType=accounting_storage/slurmdbd$'\n'AccountingStorageHost=$(ip_of ctl)
    [ "$SIM_GPUS" -gt 0 ] && gres="Gres=gpu:$SIM_GPUS"
    for i in $(seq "$1"); do
        nodes+="NodeName=n$i NodeAddr=$(ip_of "n$i") CPUs=$SIM_CPUS RealMemory=$SIM_MEM $gres State=UNKNOWN"$'\n'
    done
    cat > "$B/slurm.conf" <<E
ClusterName=sim
SlurmctldHost=ctl($(ip_of ctl))
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# cred_expire is also how long a requeued job waits before it may start again (default 120 s)
AuthInfo=cred_expire=5
StateSaveLocation=$B/state
SlurmdSpoolDir=$B/spool/%n
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldLogFile=$B/log/slurmctld.log
SlurmdLogFile=$B/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
JobRequeue=1
ReturnToService=2
SlurmctldTimeout=10
SlurmdTimeout=10
TCPTimeout=2
MessageTimeout=10
KillWait=5
MinJobAge=3600
GresTypes=gpu
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/filetxt
JobCompLoc=$B/log/jobcomp.txt
$accounting
$nodes
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=REQUEUE GraceTime=5
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=100 PreemptMode=OFF
$SIM_CONF_EXTRA
E
    # without this slurmd 22.05 looks for /sys/fs/cgroup at start and refuses to run where it is not mounted
    echo CgroupPlugin=cgroup/v1 > "$B/cgroup.conf"
    : > "$B/gres.conf"   # File= must be a device node (a link to /dev/null will do); its number is the CUDA index
    for i in $(seq 0 $((SIM_GPUS - 1))); do ln -s /dev/null "$B/dev/nvidia$i"; done
    [ "$SIM_GPUS" = 0 ] ||
        echo "Name=gpu Flags=nvidia_gpu_env File=$B/dev/nvidia[0-$((SIM_GPUS - 1))]" > "$B/gres.conf"
    { echo "127.0.0.1 localhost"
      for i in ctl login $(seq -f 'n%g' "$1"); do echo "$(ip_of "$i") $i"; done; } > "$B/hosts"
    printf '%s\n' "HostKey $B/ssh/host_key" "AuthorizedKeysFile $B/ssh/id.pub" "PidFile none" "StrictModes no" \
        "UsePAM no" "PermitRootLogin yes" "PasswordAuthentication no" "PrintMotd no" \
        "SetEnv SLURM_CONF=$B/slurm.conf" "MaxStartups 200" "Subsystem sftp internal-sftp" > "$B/sshd_config"
    printf '%s\n' "Host *" "IdentityFile $B/ssh/id" "StrictHostKeyChecking no" "UserKnownHostsFile /dev/null" \
        "LogLevel ERROR" > "$B/ssh_config"
    printf '%s\n' DbdHost=ctl DbdAddr="$(ip_of ctl)" SlurmUser=root AuthType=auth/munge PidFile=/run/slurmdbd.pid \
        LogFile="$B/log/slurmdbd.log" StorageType=accounting_storage/mysql StorageLoc=slurm_acct StorageUser=root \
        StorageHost=localhost > "$B/slurmdbd.conf"
    chmod 600 "$B/slurmdbd.conf"
}

daemon() { # a node's daemon; should it end by itself during "up", up says so
    local me=$1; shift
    { "$@" >> "$B/log/$(basename "$1")-$me.out" 2>&1; echo "$me: $1 exited with $?" >> "$B/log/exits"; } & }

node_init() { # NAME: PID 1 of a node, inside its fresh namespaces
    local me=$1 d sock=/run/mysqld/mysqld.sock
    export SLURM_CONF=$B/slurm.conf HOME=/root PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
    hostname "$me"
    mount -t tmpfs -o mode=1777 tmpfs /dev/shm
    mount -t tmpfs -o mode=755 tmpfs /run; mkdir -p /run/munge /run/sshd /run/mysqld
    mount -t sysfs sysfs /sys
    echo "$me" > /run/hostname
    mount --bind "$B/hosts" /etc/hosts
    if [ -e /etc/hostname ]; then mount --bind /run/hostname /etc/hostname; fi
    if [ -e /etc/ssh/ssh_config ]; then mount --bind "$B/ssh_config" /etc/ssh/ssh_config; fi
    for d in $SIM_LOCAL; do mkdir -p "$d"; mount -t tmpfs -o mode=1777 tmpfs "$d"; done
    ip link set lo up
    await 200 '[ -e /sys/class/net/eth0 ]' || die "$me: no eth0"
    ip addr add "$(ip_of "$me")/24" dev eth0; ip link set eth0 up
    daemon "$me" munged -F --force --key-file="$B/munge.key" --log-file="$B/log/munged-$me.log" \
        --seed-file=/run/munge/seed
    await 100 '[ -S /run/munge/munge.socket.2 ]' || die "$me: munged did not start"
    if [ -x /usr/sbin/sshd ]; then daemon "$me" /usr/sbin/sshd -D -f "$B/sshd_config" -E "$B/log/sshd-$me.log"; fi
    case $me in
    login) ;;
    ctl)
        if [ "$SIM_DBD" = 1 ]; then
            [ -d "$B/mysql/mysql" ] || mariadb-install-db --no-defaults --user=root --datadir="$B/mysql" \
                --auth-root-authentication-method=socket --skip-test-db > "$B/log/mariadb-install.log" 2>&1
            daemon "$me" mariadbd --no-defaults --user=root --datadir="$B/mysql" --socket=$sock --skip-networking \
                --innodb-buffer-pool-size=64M --innodb-log-file-size=16M --innodb-flush-log-at-trx-commit=0 \
                --innodb-lock-wait-timeout=900 --pid-file=/run/mysqld/pid
            await 400 "mariadb-admin --no-defaults --socket=$sock ping > /dev/null 2>&1" || die "no mariadb"
            daemon "$me" slurmdbd -D
            await 200 'sacctmgr -n show cluster > /dev/null 2>&1' || die "no slurmdbd"
            sacctmgr -i add cluster sim > /dev/null 2>&1 || true
        fi
        daemon "$me" slurmctld -D;;
    *)  mkdir -p "$B/spool/$me"; daemon "$me" slurmd -D -N "$me";;
    esac
    [ ! -x /usr/sbin/sshd ] || await 100 '(exec 3<> /dev/tcp/127.0.0.1/22) 2> /dev/null' || die "$me: no sshd"
    : > /run/up
    trap : TERM INT
    while :; do sleep infinity & wait $! || true; done   # bash reaps whatever is reparented to it
}

start_node() { # NAME, from the host
    local me=$1 fab pid
    fab=$(pid_of fabric) || die "no cluster"
    # "&" inside: the node's parent is the fabric's PID 1, nothing of it hangs off the host's
    setsid nsenter -t "$fab" -p -m -n -- bash -c '
        unshare --net --uts --ipc --mount --pid --fork --mount-proc --kill-child=KILL bash "$0" __init "$1" &' \
        "$SELF" "$me" < /dev/null >> "$B/log/init-$me.log" 2>&1
    pid=$(child_of "$fab" " __init $me"); pid=$(child_of "$pid"); remember "$me" "$pid"
    nsenter -t "$fab" -n ip link del "p-$me" 2> /dev/null || true
    # born in its own namespace, never seen in the host's; same MAC after every boot, or ARP caches are stale
    ip link add name eth0 address "$(printf '02:00:00:00:00:%02x' "$(ip_of "$me" | cut -d. -f4)")" netns "$pid" \
        type veth peer name "p-$me" netns "$fab"
    nsenter -t "$fab" -n ip link set "p-$me" master br0 up
}

sinfo_in() { # ARGUMENTS, as one string
    local a; read -ra a <<< "$1"; "$B/bin/sinfo" "${a[@]}" 2> /dev/null; }

await_node() { # NODE: its daemons run and slurmctld takes it for usable
    await 200 "[ -e /proc/$(pid_of "$1")/root/run/up ]" || die "$1 did not come up"
    case $1 in
        login) ;;
        ctl) await 200 '"$B/bin/scontrol" -Q ping 2> /dev/null | grep -q " UP"' || die "slurmctld is not up";;
        *) await 200 "sinfo_in '-h -n $1 -o %t' | grep -qxE 'idle|mix|alloc|comp'" || die "$1 is not usable";;
    esac
}

power_off() { # NODE
    local p up; p=$(pid_of "$1") || die "$1 is not up"; up=$(ps -o ppid= -p "$p" | tr -d ' ')   # its unshare
    nsenter -t "$(pid_of fabric)" -n ip link set "p-$1" down || true   # no FIN, no RST: the power is gone
    kill -KILL "$p"
    await 400 "! ticks $p > /dev/null && ! ticks $up > /dev/null" || die "$1 would not die"
    rm -f "$B/pid/$1"
}

in_node() { # NODE CMD...
    local pid path=:$PATH:; pid=$(pid_of "$1") || die "$1 is not up"; shift
    path=${path//:$B\/bin:/:}; path=${path#:}; export PATH=${path%:} SLURM_CONF=$B/slurm.conf   # no shims inside
    exec nsenter -t "$pid" -m -u -i -n -p -- setpriv --pdeathsig TERM \
        bash -c 'cd "$0" 2>/dev/null || cd /; exec "$@"' "$PWD" "$@"
}

down() {
    local p outer pids=()
    [ ! -e "$B" ] || [ -e "$B/.slurm-sim" ] || die "$B is not mine: not removing it"
    # "outer" is recorded before the namespace exists, so an "up" cut short at any point leaves nothing unknown
    ! p=$(pid_of fabric) || pids+=("$p")
    if outer=$(pid_of outer); then
        pids+=("$outer"); for p in $(ps -o pid= --ppid "$outer"); do pids+=("$p"); done
    fi
    for p in "${pids[@]}"; do
        kill -KILL "$p" 2> /dev/null || true   # a PID namespace's init is gone only after everything in it is
        await 400 "! ticks $p > /dev/null" || die "$p would not die"
    done
    rm -rf "$B"
}

fabric() { # the outer namespace: bridge, and PID 1 over every node
    remember outer $$
    exec unshare --net --mount --pid --fork --mount-proc --kill-child=KILL bash -c '
        ip link set lo up; ip link add br0 type bridge; ip link set br0 up; : > "$0/pid/.ready"
        trap : TERM INT; while :; do sleep infinity & wait $! || :; done' "$B"
}

up_failed() {
    [ "${SIM_KEEP:-0}" = 1 ] && return
    tail -n 5 "$B"/log/*.out "$B"/log/*.log >&2 || true
    [ -z "$un" ] || kill -KILL "$un" || true
    down
}

up() { # N
    local n=${1:-2} i c; un=
    [ "$(id -u)" = 0 ] || die "needs root (CAP_SYS_ADMIN, CAP_NET_ADMIN)"
    for c in ip nsenter unshare setpriv munged slurmctld slurmd ssh-keygen; do
        command -v $c > /dev/null || die "missing: $c"
    done
    down
    mkdir -p "$B"/{state,spool,log,pid,ssh,bin,dev}; chmod 755 "$B"; : > "$B/.slurm-sim"
    trap 'exit 143' TERM INT HUP
    trap up_failed EXIT   # SIM_KEEP=1 leaves the ruins for a look
    head -c 128 /dev/urandom > "$B/munge.key"; chmod 600 "$B/munge.key"
    for i in id host_key; do ssh-keygen -q -t ed25519 -N '' -f "$B/ssh/$i"; done
    write_conf "$n"
    setsid "$SELF" __fabric < /dev/null > "$B/log/fabric.log" 2>&1 &
    un=$!; await 200 '[ -e "$B/pid/.ready" ]' || die "fabric did not start"
    remember fabric "$(child_of "$un")"
    for c in sbatch squeue srun salloc scancel scontrol sinfo sacct sacctmgr sstat sprio sdiag; do
        printf '#!/bin/sh\nSIM_BASE=%q exec %q exec login %s "$@"\n' "$B" "$SELF" $c > "$B/bin/$c"
        chmod 755 "$B/bin/$c"
    done
    for i in ctl login $(seq -f 'n%g' "$n"); do start_node "$i"; done
    await 300 '[ -e "$B/log/exits" ] || [ "$(sinfo_in "-h -N -p main -t idle -o %N" | wc -l)" = '"$n"' ]' ||
        die "nodes did not come up"
    [ ! -e "$B/log/exits" ] || die "$(cat "$B/log/exits")"
    for i in ctl login $(seq -f 'n%g' "$n"); do await_node "$i"; done
    trap - EXIT TERM INT HUP; disown -a
}

cmd=${1:-}; [ $# -gt 0 ] && shift
case $cmd in
    up) up "$@";;
    down) down;;
    exec) in_node "$@";;
    kill) power_off "$1";;
    fail) power_off "$1"; "$B/bin/scontrol" update nodename="$1" state=down reason=failed;;
    boot) pid_of "$1" > /dev/null && die "$1 is up"; start_node "$1"; await_node "$1";;
    linkdown|linkup) nsenter -t "$(pid_of fabric)" -n ip link set "p-$1" "${cmd#link}";;
    status) "$B/bin/sinfo"; "$B/bin/squeue";;
    __fabric) fabric;;
    __init) node_init "$1";;
    *) sed -n '2,19p' "$SELF"; exit 2;;
esac
