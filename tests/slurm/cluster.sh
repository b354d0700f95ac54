#!/usr/bin/env bash
# A real SLURM on this one machine, for tests: munge, a controller and two nodes of four pretended processors each. As root,
# without systemd, cgroups or files outside its own folder; several may run side by side.
#   cluster.sh install          Debian's slurm-wlm and munge, where they are missing; exit 3 with the reason where it cannot
#   cluster.sh start FOLDER     prints the SLURM_CONF to use
#   cluster.sh stop FOLDER      ends what `start` began, by process id, and removes the folder
set -euo pipefail
export PATH=$PATH:/usr/sbin:/sbin
command=${1:?usage: cluster.sh install | start FOLDER | stop FOLDER}

missing() {
  local program
  for program in slurmctld slurmd sbatch srun munged; do command -v "$program" >/dev/null || return 0; done
  return 1
}

install() {
  missing || return 0
  [ "$(id -u)" = 0 ] || { echo "no SLURM here, and only root can install it: apt-get install slurm-wlm munge" >&2; exit 3; }
  command -v apt-get >/dev/null || { echo "no SLURM here and no apt-get to install it" >&2; exit 3; }
  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends slurm-wlm munge; } \
    >/dev/null 2>&1 || { echo "apt-get could not install slurm-wlm and munge" >&2; exit 3; }
}

configure() {
  local host ports version
  host=$(hostname -s)
  read -r -a ports < <(python3 -c '
import socket
held = [socket.socket() for _ in range(3)]
for s in held: s.bind(("127.0.0.1", 0))
print(*(s.getsockname()[1] for s in held))')
  version=$(slurmctld -V | sed 's/[^0-9]*\([0-9]*\)\.\([0-9]*\).*/\1\2/')
  mkdir -p etc run log state spool
  chmod 755 . run
  mkdir -m 700 munge
  head -c 1024 /dev/urandom > munge/key
  chmod 400 munge/key
  cat > etc/slurm.conf <<C
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmdUser=root
SlurmctldPort=${ports[0]}
AuthType=auth/munge
# cred_expire is also how long a requeued job waits (120 s by default; below 5 it falls back to 120)
AuthInfo=socket=$PWD/run/munge,cred_expire=5
CredType=cred/munge
StateSaveLocation=$PWD/state
SlurmdSpoolDir=$PWD/spool/%n
SlurmctldPidFile=$PWD/run/slurmctld.pid
SlurmdPidFile=$PWD/run/slurmd-%n.pid
SlurmctldLogFile=$PWD/log/slurmctld.log
SlurmdLogFile=$PWD/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0
SlurmdParameters=config_overrides
MpiDefault=none
ReturnToService=2
KillWait=20
MinJobAge=900
JobRequeue=1
PropagateResourceLimits=NONE
NodeName=n0 NodeHostname=$host NodeAddr=127.0.0.1 Port=${ports[1]} CPUs=4 RealMemory=64000 State=UNKNOWN
NodeName=n1 NodeHostname=$host NodeAddr=127.0.0.1 Port=${ports[2]} CPUs=4 RealMemory=64000 State=UNKNOWN
PartitionName=test Nodes=n0,n1 Default=YES DefaultTime=10 MaxTime=1440 State=UP
C
  # the word for "no control groups" changed
  if [ "$version" -ge 2311 ]; then echo "CgroupPlugin=disabled"; else echo "CgroupAutomount=no"; fi > etc/cgroup.conf
}

start() {
  mkdir -p "$1"
  cd "$1"
  configure
  export SLURM_CONF=$PWD/etc/slurm.conf
  munged --force --key-file="$PWD/munge/key" --socket="$PWD/run/munge" --pid-file="$PWD/run/munged.pid" \
    --log-file="$PWD/log/munged.log" --seed-file="$PWD/munge/seed" >&2
  slurmctld -c -f "$SLURM_CONF" >&2
  local node
  for node in n0 n1; do
    mkdir -p "spool/$node"
    slurmd -c -f "$SLURM_CONF" -N "$node" >&2
  done
  for _ in $(seq 150); do
    if [ "$(sinfo -h -t idle -o %D 2>/dev/null)" = 2 ]; then echo "$SLURM_CONF"; return; fi
    sleep 0.1
  done
  tail -n 20 log/*.log >&2
  echo "the nodes did not come up" >&2
  exit 1
}

stop() {
  [ -d "$1/run" ] || return 0
  cd "$1"
  export SLURM_CONF=$PWD/etc/slurm.conf
  scancel --user="$(id -un)" --signal=KILL --full 2>/dev/null || true
  scancel --user="$(id -un)" 2>/dev/null || true
  for _ in $(seq 30); do
    [ -n "$(squeue -h 2>/dev/null)" ] || break
    sleep 0.1
  done
  local file pid
  for file in run/slurmd-n0.pid run/slurmd-n1.pid run/slurmctld.pid run/munged.pid; do
    [ -s "$file" ] || continue
    pid=$(cat "$file")
    kill "$pid" 2>/dev/null || continue
    for _ in $(seq 50); do
      kill -0 "$pid" 2>/dev/null || break
      sleep 0.1
    done
    kill -KILL "$pid" 2>/dev/null || true
  done
  # what a job left running, should the controller have died first: all of it was started with this SLURM_CONF
  for file in /proc/[0-9]*/environ; do
    pid=${file//[!0-9]/}
    if [ "$pid" != $$ ] && grep -qzxF "SLURM_CONF=$SLURM_CONF" "$file" 2>/dev/null; then kill -KILL "$pid" 2>/dev/null || true; fi
  done
  cd /
  rm -rf "$1"
}

case $command in
  install) install ;;
  start) start "${2:?a folder}" ;;
  stop) stop "$(realpath "${2:?a folder}")" ;;
  *) echo "usage: cluster.sh install | start FOLDER | stop FOLDER" >&2; exit 2 ;;
esac
