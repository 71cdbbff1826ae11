// The equations of softmax cross entropy for one element, and for one row's scalars.
//
// With z = softcap(a) = s tanh(a / s) (or z = a), f = dz/da = 1 - (z/s)^2, weight w:
//   l = logsumexp z,  p = e^(z-l),  kappa = 1 + 2 zeta l,  t_j = (1-eps) [j = y] + eps / V
//   loss = l - sum_j t_j z_j + zeta l^2
//   G    = f g,  g = w (kappa p - t)
//   zd   = f u,  mu = <p, zd>
//   H u  = f w p (kappa (zd - mu) + 2 zeta mu) - (2 z / s^2) zd g
// p (zd - mu) and not p zd - p mu: less cancels.
#ifndef CURVAX_COMMON_SOFTMAX_CE_TERMS_H_
#define CURVAX_COMMON_SOFTMAX_CE_TERMS_H_

#include "common/host_device.h"
#include "curvax/softmax_ce.h"

namespace curvax::CURVAX_TARGET {

// What a row's elements share. C is the compute type; V below is C, or a vector of it.
template <typename C>
struct SoftmaxCeTerms {
  C mu, kappa;
  C constant;     // 2 zeta mu
  C inverse_cap;  // 1 / s
  C curve;        // 2 / s^2

  CURVAX_HOST_DEVICE SoftmaxCeTerms(const SoftmaxCeArgs& args, double kappa, double mu)
      : mu(C(mu)),
        kappa(C(kappa)),
        constant(C(2 * args.z_loss * mu)),
        inverse_cap(args.softcap > 0 ? C(1 / args.softcap) : C{0}),
        curve(args.softcap > 0 ? C(2 / (args.softcap * args.softcap)) : C{0}) {}

  template <typename V>
  CURVAX_HOST_DEVICE V Slope(V z) const {  // f
    return C{1} - (z * inverse_cap) * (z * inverse_cap);
  }

  // Element of H u from p, which has been multiplied by w, u, z and w t.
  template <bool kCap, typename V, typename T>
  CURVAX_HOST_DEVICE V Product(V p, V u, V z, T target) const {
    if constexpr (kCap) {
      const V slope = Slope(z), tangent = slope * u;
      const V product = p * (kappa * (tangent - mu) + constant);
      return slope * product - curve * z * tangent * (kappa * p - target);
    } else {
      return p * (kappa * (u - mu) + constant);
    }
  }

  // Element of G from p, which has been multiplied by w, z and w t.
  template <bool kCap, typename V, typename T>
  CURVAX_HOST_DEVICE V Gradient(V p, V z, T target) const {
    const V g = kappa * p - target;
    if constexpr (kCap) {
      return Slope(z) * g;
    } else {
      return g;
    }
  }
};

// Targets of a row's elements: `rest`, and `label` for the label.
struct SoftmaxCeTargets {
  double label, rest;
  CURVAX_HOST_DEVICE explicit SoftmaxCeTargets(const SoftmaxCeArgs& args)
      : label(1 - args.label_smoothing), rest(0) {
    if (args.label_smoothing == 0) return;  // spares every row a division
    rest = args.label_smoothing / static_cast<double>(args.vocab);
    label += rest;
  }
};

// A row's loss from its log-sum-exp, the label's z and the sum of all z.
CURVAX_HOST_DEVICE double SoftmaxCeLoss(const SoftmaxCeArgs& args, double lse, double z_label,
                                        double z_sum) {
  const double eps = args.label_smoothing;
  const double loss = lse - (1 - eps) * z_label + args.z_loss * lse * lse;
  return eps == 0 ? loss : loss - eps / static_cast<double>(args.vocab) * z_sum;
}

}  // namespace curvax::CURVAX_TARGET

#endif  // CURVAX_COMMON_SOFTMAX_CE_TERMS_H_
