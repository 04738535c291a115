# shellcheck shell=bash
# What every job script does before Python takes over: read the site file, submit where that was not done, find Python.
# Sourced with `root` (the checkout) and `overrides` (what was given after the script's name) set. Every expansion is quoted:
# paths and overrides may hold any character.
# shellcheck disable=SC2154

root=$(cd -- "$root" && printf '%s.' "$PWD") # absolute; the dot keeps a newline at the end of a name
root=${root%.}

fail() {
  printf 'error: %s\n' "$1" >&2
  exit 2
}

# run_job NAME KIND ARGUMENT...: be the job script slurm/NAME.sh that runs launch/KIND.py with the arguments.
run_job() {
  local name=$1 kind=$2 site=${TOKENFLEX_SITE:-$root/slurm/site.sh} python
  shift 2
  [[ -f $site ]] || fail "no site file at $site: cp slurm/site.example.sh slurm/site.sh and fill it in"
  # shellcheck source=slurm/site.example.sh
  source "$site"
  if [[ -z ${SLURM_JOB_ID:-} ]]; then
    exec sbatch "$root/slurm/$name.sh" "${overrides[@]}"
  fi
  if is_elsewhere; then
    hand_over "$name"
    exit 0
  fi
  if [[ -n ${TOKENFLEX_CONTAINER:-} ]]; then
    python=python3 # drives the job from outside of the container, with the standard library alone
  else
    python=${TOKENFLEX_VENV:-$root/.venv}/bin/python
    [[ -x $python ]] || fail "no Python at $python: set TOKENFLEX_VENV or TOKENFLEX_CONTAINER in $site"
  fi
  exec "$python" "$root/slurm/job.py" "$kind" "$@"
}

# Whether this job was sent to SLURM's default partition or account while the site file names another.
is_elsewhere() {
  [[ ${TOKENFLEX_HAND_OVER:-} != never && -z ${SLURM_ARRAY_JOB_ID:-} ]] || return 1
  if [[ -n ${SBATCH_ACCOUNT:-} && ${SLURM_JOB_ACCOUNT:-} != "$SBATCH_ACCOUNT" ]]; then
    return 0
  fi
  [[ -n ${SBATCH_PARTITION:-} && ",$SBATCH_PARTITION," != *",$SLURM_JOB_PARTITION,"* ]] || return 1
  [[ $(scontrol show partition "$SLURM_JOB_PARTITION") == *Default=YES* ]] # else it was chosen by hand
}

# sbatch cannot read a partition from the site file, so a job that lands elsewhere submits itself once more and ends.
hand_over() {
  local limit options variable
  limit=$(squeue --noheader --format=%l --jobs="$SLURM_JOB_ID")
  options=(--nodes="$SLURM_JOB_NUM_NODES" --job-name="$SLURM_JOB_NAME")
  [[ -z $limit || $limit == UNLIMITED ]] || options+=(--time="$limit")
  for variable in "${!SLURM_@}"; do # the new job is not a step of this one
    [[ $variable == SLURM_CONF ]] || unset "$variable"
  done
  export TOKENFLEX_HAND_OVER=never
  sbatch "${options[@]}" "$root/slurm/$1.sh" "${overrides[@]}" || fail "could not submit to partition ${SBATCH_PARTITION:-(default)}, account ${SBATCH_ACCOUNT:-(default)}"
  printf 'handed over to partition %s, account %s, as the site file says; TOKENFLEX_HAND_OVER=never keeps a job where it was sent\n' \
    "${SBATCH_PARTITION:-(default)}" "${SBATCH_ACCOUNT:-(default)}"
}
