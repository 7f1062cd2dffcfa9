// The sweeps of the divergences whose value is made of the probabilities of both models.
#include "losses/mixtures.h"
#include "losses/dense_sweep.h"

namespace megakd {

const PairKernel kMixtureKernels[] = {
    pair_kernel<Pointwise<GeneralisedJSD>>("generalised_jsd"),
    pair_kernel<Pointwise<SkewForwardKL>>("skew_forward_kl"),
    pair_kernel<Pointwise<SkewReverseKL>>("skew_reverse_kl"),
    pair_kernel<Pointwise<TotalVariation>>("total_variation"),
    pair_kernel<Pointwise<AlphaBeta>>("alpha_beta"),
    {},
};

}  // namespace megakd
