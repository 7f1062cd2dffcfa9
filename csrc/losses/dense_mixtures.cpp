// Sweeps of the divergences whose value needs the probabilities of both models.
#include "losses/mixtures.h"
#include "losses/dense_sweep.h"

namespace megakd {

const DenseKernel kMixtureKernels[] = {
    dense_kernel<Pointwise<GeneralisedJSD>>("generalised_jsd"),
    dense_kernel<Pointwise<SkewForwardKL>>("skew_forward_kl"),
    dense_kernel<Pointwise<SkewReverseKL>>("skew_reverse_kl"),
    dense_kernel<Pointwise<TotalVariation>>("total_variation"),
    dense_kernel<Pointwise<AlphaBeta>>("alpha_beta"),
    {},
};

}  // namespace megakd
