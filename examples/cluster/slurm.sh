#!/usr/bin/env bash
#SBATCH --job-name=cca
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --time=00:30:00
# sbatch slurm.sh [option...]: SmolLM2 over one rank for each node, with all of its cores. Run examples/cluster/run.sh once in
# this folder before, which builds and prepares; all nodes have to see it. Options go to the program.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?submit it by sbatch from the root of the repository}"

threads=${SLURM_CPUS_ON_NODE:?}
export OMP_NUM_THREADS=$threads OMP_PROC_BIND=spread OMP_PLACES=cores
srun --mpi=pmix --cpus-per-task="$threads" build/example/examples/cluster/cluster_prefill build/smollm2-data \
  --threads "$threads" --check "$@"
