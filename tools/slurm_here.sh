#!/usr/bin/env bash
# A real Slurm with two nodes, n1 and n2, on this machine: for tests. Needs root.
#
#   tools/slurm_here.sh install     Debian's slurm-wlm and munge, and what reaches it by ssh
#   tools/slurm_here.sh start DIR   all state and logs go to DIR; prints where its slurm.conf is
#   tools/slurm_here.sh stop DIR    ends what `start` has started
#
# Processes are tracked by their parents and not by cgroups, so it runs inside a container too. A
# requeued job starts again after seconds instead of two minutes (cred_expire).
set -euo pipefail

install() {
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends slurm-wlm munge \
        openssh-server rsync
}

start() {
    local dir=$1 cores memory
    mkdir -p "$dir"/{munge,state,n1,n2,log}
    for node in n1 n2; do
        grep -qw "$node" /etc/hosts || echo "127.0.0.1 $node" >>/etc/hosts
    done
    cores=$(nproc)
    memory=$(awk '/MemTotal/ {print int($2 / 1024)}' /proc/meminfo)
    cat >"$dir/slurm.conf" <<CONF
ClusterName=here
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$dir/munge/socket,cred_expire=5
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
JobRequeue=1
KillWait=30
MinJobAge=3600
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc=$dir/log/completed
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/%n
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/%n.pid
SlurmctldLogFile=$dir/log/slurmctld
SlurmdLogFile=$dir/log/%n
SlurmctldPort=26817
NodeName=n1 NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 Port=27001 CPUs=$cores RealMemory=$memory
NodeName=n2 NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 Port=27002 CPUs=$cores RealMemory=$memory
PartitionName=debug Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
CONF
    export SLURM_CONF=$dir/slurm.conf
    if [ ! -e "$dir/munge/key" ]; then
        (umask 077 && head -c 1024 /dev/urandom >"$dir/munge/key")
    fi
    chmod 755 "$dir" "$dir/munge"
    munged --force --socket="$dir/munge/socket" --key-file="$dir/munge/key" \
        --pid-file="$dir/munged.pid" --log-file="$dir/log/munged" --seed-file="$dir/munge/seed"
    slurmctld
    slurmd -N n1
    slurmd -N n2
    for _ in $(seq 60); do
        [ "$(sinfo --noheader --format %T | sort -u)" = idle ] && break
        sleep 1
    done
    sinfo >&2
    echo "$SLURM_CONF"
}

stop() {
    local dir=$1 pid
    for name in n1 n2 slurmctld munged; do
        pid=$(cat "$dir/$name.pid" 2>/dev/null) || continue
        kill "$pid" 2>/dev/null || continue
        for _ in $(seq 50); do # a slurmd waits for what runs on it, and keeps its port
            kill -0 "$pid" 2>/dev/null || continue 2
            sleep 0.2
        done
        kill -9 "$pid" 2>/dev/null || true
    done
}

"$@"
