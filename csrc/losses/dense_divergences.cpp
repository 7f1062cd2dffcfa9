// The sweeps of the divergences whose value is made of sums of logits.
#include "losses/dense_sweep.h"

namespace megakd {

const PairKernel kDivergenceKernels[] = {
    pair_kernel<ForwardKL>("forward_kl"),   pair_kernel<ReverseKL>("reverse_kl"),
    pair_kernel<SymmetricKL>("symmetric_kl"), pair_kernel<AdaptiveKL>("adaptive_kl"),
    pair_kernel<LogitMSE>("logit_mse"),     pair_kernel<CentredLogitMSE>("centred_logit_mse"),
    pair_kernel<Decoupled>("decoupled"),    {},
};

}  // namespace megakd
