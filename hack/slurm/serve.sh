#!/usr/bin/env bash
# Serve a model as a Slurm job: hack/slurm/serve.sh [OPTION ...] [-- SERVER_OPTION ...]
#
#   --model PATH_OR_ID    checkpoint folder or hub id (the embedded model)
#   --dcp PATH            instead: a training run's distributed checkpoint, converted at first start
#   --base-model PATH_OR_ID   with --dcp: the model that was trained
#   --cache PATH          where converted checkpoints are kept (~/.cache/vdiff_kserve)
#   --name NAME           model name in requests, and the job's name (llada)
#   --account NAME        who pays
#   --partition NAME      where to run
#   --gpus N              GPUs; the server uses one (1; 0 for none)
#   --cpus N              CPU cores (8)
#   --memory SIZE         host memory, such as 64G (32G)
#   --time LIMIT          such as 04:00:00 (04:00:00)
#   --container IMAGE     run in this image: a .sif file by apptainer, any other by pyxis
#   --python PROGRAM      Python that has vdiff_kserve (python)
#   --port N              port on the node (0: a free one)
#   --dry-run             print the job and submit nothing
#
# Prints the job's number. The log is ~/.cache/vdiff-slurm/NUMBER.log, or below VDIFF_SLURM_DIR.
# connect.sh waits for the model and says how to reach it. Other users of the cluster can reach the
# port too: `-- --host 127.0.0.1` closes it to all but users of the node.
set -euo pipefail

fail() {
    echo "serve.sh: $1" >&2
    exit 2
}

model= dcp= base_model= cache=$HOME/.cache/vdiff_kserve name=llada account= partition= gpus=1 cpus=8 memory=32G time=04:00:00
container= python=python port=0 dry_run=
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help) sed -n '2,23s/^# \{0,1\}//p' "$0" && exit ;;
        --dry-run) dry_run=yes && shift ;;
        --model | --dcp | --base-model | --cache | --name | --account | --partition | --gpus | --cpus | --memory | --time | \
            --container | --python | --port)
            [ $# -gt 1 ] || fail "$1 needs a value"
            option=${1#--}
            printf -v "${option//-/_}" %s "$2"
            shift 2
            ;;
        --) shift && break ;;
        *) fail "unknown option $1; see --help" ;;
    esac
done
[[ $gpus =~ ^[0-9]+$ ]] || fail "--gpus must be a number, got $gpus"
[[ $port =~ ^[0-9]+$ ]] || fail "--port must be a number, got $port"
[ -z "$model" ] || [ -z "$dcp" ] || fail "--model and --dcp contradict each other"
[ -z "$dcp$base_model" ] || { [ -n "$dcp" ] && [ -n "$base_model" ]; } ||
    fail "--dcp and --base-model need each other"
[[ $name =~ ^[A-Za-z0-9._-]+$ ]] || fail "--name must be letters, digits, dots and dashes, got $name"

state=${VDIFF_SLURM_DIR:-$HOME/.cache/vdiff-slurm}
server=("$python" -m vdiff_kserve --model_name "$name" --port "$port" --enable_grpc false)
[ -z "$model" ] || server+=(--model "$model")
[ -z "$dcp" ] || server+=(--dcp_path "$dcp" --base_model "$base_model" --cache_dir "$cache")
server+=("$@")

mounts=()
for path in "$model" "$dcp" "$base_model"; do
    [ ! -e "$path" ] || mounts+=("$path:$path:ro")
done
[ -z "$dcp" ] || mounts+=("$cache:$cache")

case $container in
    "") runner=() ;;
    *.sif)
        runner=(apptainer exec)
        [ "$gpus" = 0 ] || runner+=(--nv)
        for mount in ${mounts[@]+"${mounts[@]}"}; do runner+=(--bind "$mount"); done
        runner+=("$container")
        ;;
    *)
        runner=(srun "--container-image=$container")
        [ ${#mounts[@]} = 0 ] || runner+=("--container-mounts=$(IFS=, && echo "${mounts[*]}")")
        ;;
esac

job() {
    echo "#!/usr/bin/env bash"
    echo "#SBATCH --job-name=$name"
    echo "#SBATCH --output=$state/%j.log"
    echo "#SBATCH --nodes=1"
    echo "#SBATCH --ntasks=1"
    echo "#SBATCH --cpus-per-task=$cpus"
    echo "#SBATCH --mem=$memory"
    echo "#SBATCH --time=$time"
    [ "$gpus" = 0 ] || echo "#SBATCH --gres=gpu:$gpus"
    [ -z "$account" ] || echo "#SBATCH --account=$account"
    [ -z "$partition" ] || echo "#SBATCH --partition=$partition"
    echo 'echo "node $(hostname -f)"'
    echo "export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=$cpus"
    printf 'exec'
    printf ' %q' ${runner[@]+"${runner[@]}"} "${server[@]}"
    echo
}

if [ -n "$dry_run" ]; then
    job
    exit
fi
mkdir -p "$state"
[ -z "$dcp" ] || mkdir -p "$cache"
number=$(job | sbatch --parsable)
number=${number%%;*}
echo "$number" >"$state/latest"
echo "$number"
