#!/usr/bin/env bash
# A SLURM cluster of this one machine, to try jobs on: real munged and slurmctld, one slurmd a node. No systemd, nothing under /etc, nothing outlives `down`.
#
#   tools/slurm_local/cluster.sh install       Debian's packages, as root (apt)
#   tools/slurm_local/cluster.sh up [NODES]    2 nodes named n1, n2, ...; seconds
#   eval "$(tools/slurm_local/cluster.sh env)" after which sbatch, srun and squeue talk to it
#   tools/slurm_local/cluster.sh down          cancels its jobs and ends what `up` started
#
# Everything is in SLURM_LOCAL_DIR (default /tmp/slurm-local.UID). Nodes have addresses of their own, 127.0.1.N, so that programs take them for machines.
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin
DIR=${SLURM_LOCAL_DIR:-/tmp/slurm-local.$UID}
PORT=${SLURM_LOCAL_PORT:-27100}
CPUS=8                  # per node; more than the machine has are allowed
export SLURM_CONF=$DIR/slurm.conf

install() {
    command -v slurmctld slurmd munged > /dev/null && return
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends slurmctld slurmd slurm-client munge > /dev/null
}

up() {
    local nodes=${1:-2} node deadline=$((SECONDS + 60))
    command -v slurmctld slurmd munged sbatch > /dev/null || { echo "error: SLURM is not installed; as root: $0 install" >&2; exit 2; }
    if pid_lives "$DIR/slurmctld.pid"; then echo "error: a cluster is up in $DIR; first: $0 down" >&2; exit 2; fi
    mkdir -p -m 755 "$DIR"
    (umask 077; head -c 1024 /dev/urandom > "$DIR/munge.key")
    configure "$nodes"
    munged --force --key-file "$DIR/munge.key" --socket "$DIR/munge.sock" --pid-file "$DIR/munged.pid" --log-file "$DIR/munged.log" --seed-file "$DIR/munge.seed"
    slurmctld -c -f "$SLURM_CONF"
    for ((node = 1; node <= nodes; node++)); do
        mkdir -p "$DIR/spool.n$node"
        slurmd -c -N "n$node" -f "$SLURM_CONF"
    done
    until (($(sinfo -h -N -p main -t idle -o %N 2> /dev/null | wc -l) == nodes)); do
        ((SECONDS < deadline)) || { echo "error: the nodes did not come up; see $DIR/*.log" >&2; exit 1; }
        sleep 0.1
    done
    sinfo
}

down() {
    local pid_file pids=()
    [[ -d $DIR ]] || return 0
    scancel --state=PENDING,RUNNING,SUSPENDED 2> /dev/null || true
    for _ in {1..100}; do [[ -n $(squeue -h 2> /dev/null) ]] || break; sleep 0.1; done
    for pid_file in "$DIR"/slurmd.*.pid "$DIR/slurmctld.pid" "$DIR/munged.pid"; do
        if pid_lives "$pid_file"; then pids+=("$(< "$pid_file")"); fi
    done
    if ((${#pids[@]})); then
        kill "${pids[@]}" 2> /dev/null || true
        for _ in {1..100}; do kill -0 "${pids[@]}" 2> /dev/null || break; sleep 0.1; done
        kill -9 "${pids[@]}" 2> /dev/null || true
    fi
    rm -rf "$DIR"
}

pid_lives() { [[ -s $1 ]] && kill -0 "$(< "$1")" 2> /dev/null; }

configure() {
    local node version
    # cred_expire: else a requeued job waits two minutes. preempt_send_user_signal and GraceTime: jobs hear of a preemption as of a time limit.
    cat > "$SLURM_CONF" << END
ClusterName=local
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthType=auth/munge
AuthInfo=socket=$DIR/munge.sock,cred_expire=5
CredType=cred/munge
SlurmctldPort=$PORT
SlurmctldPidFile=$DIR/slurmctld.pid
SlurmctldLogFile=$DIR/slurmctld.log
SlurmdPidFile=$DIR/slurmd.%n.pid
SlurmdLogFile=$DIR/slurmd.%n.log
SlurmdSpoolDir=$DIR/spool.%n
StateSaveLocation=$DIR/state
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_min_interval=10000,bf_interval=1
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
JobRequeue=1
ReturnToService=2
KillWait=5
SlurmctldTimeout=10
SlurmdTimeout=10
PlugStackConfig=/dev/null
END
    for ((node = 1; node <= $1; node++)); do
        echo "NodeName=n$node NodeHostname=$(hostname -s) NodeAddr=127.0.1.$node Port=$((PORT + node)) CPUs=$CPUS RealMemory=4000 State=UNKNOWN"
    done >> "$SLURM_CONF"
    echo "PartitionName=main Nodes=ALL Default=YES State=UP MaxTime=60 PriorityTier=1 GraceTime=60" >> "$SLURM_CONF"
    echo "PartitionName=urgent Nodes=ALL State=UP MaxTime=60 PriorityTier=10 PreemptMode=OFF" >> "$SLURM_CONF"
    # Nothing here uses cgroups; `disabled` is known from 23.11 on, and before that cgroup/v1 is not touched unless asked for.
    version=$(slurmd -V | grep -oE '[0-9]+\.[0-9]+' | head -n 1)
    if [[ $(printf '%s\n' 23.11 "$version" | sort -V | head -n 1) == 23.11 ]]; then echo CgroupPlugin=disabled; else echo CgroupPlugin=cgroup/v1; fi > "$DIR/cgroup.conf"
}

case ${1:-} in
    install | up | down) "$@" ;;
    env) echo "export SLURM_CONF=$SLURM_CONF" ;;
    *) sed -n '2,10s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac
