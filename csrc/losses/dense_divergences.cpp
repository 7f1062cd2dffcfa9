// Sweeps of the divergences whose value follows from sums of the first pass.
#include "losses/dense_sweep.h"

namespace megakd {

const DenseKernel kDivergenceKernels[] = {
    dense_kernel<ForwardKL>("forward_kl"),   dense_kernel<ReverseKL>("reverse_kl"),
    dense_kernel<SymmetricKL>("symmetric_kl"), dense_kernel<AdaptiveKL>("adaptive_kl"),
    dense_kernel<LogitMSE>("logit_mse"),     dense_kernel<CentredLogitMSE>("centred_logit_mse"),
    dense_kernel<Decoupled>("decoupled"),    {},
};

}  // namespace megakd
