// A GPU's arithmetic: 16-bit elements, sums of a tensor core, approximate functions.
//
// The emulation rounds as coarsely as a GPU may, so that a bound that holds here holds there.
#pragma once

#include <cmath>
#include <cstring>

namespace emulator {

inline float float_of(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline unsigned bits_of(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

inline unsigned round_bfloat16(float x) {
  unsigned bits = bits_of(x);
  if (std::isnan(x)) return 0x7fff;
  return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}
[[gnu::noinline]] inline unsigned round_float16(float x) {
  const unsigned sign = (bits_of(x) >> 16) & 0x8000;
  const float a = std::fabs(x);
  if (std::isnan(x)) return 0x7fff;
  if (a >= 65520.f) return sign | 0x7c00;
  // The spacing of float16 at x; rint rounds half to even.
  int exponent = a > 0 ? std::ilogb(a) : -14;
  exponent = exponent < -14 ? -14 : exponent;
  const int units = int(std::rint(std::ldexp(a, 10 - exponent)));  // up to 2048
  return sign | unsigned(units + ((exponent + 14) << 10));
}
[[gnu::noinline]] inline float from_float16(unsigned h) {
  const int exponent = (h >> 10) & 31, mantissa = h & 1023;
  float x = exponent == 31  ? (mantissa ? NAN : INFINITY)
            : exponent == 0 ? std::ldexp(float(mantissa), -24)
                            : std::ldexp(float(mantissa + 1024), exponent - 25);
  return h & 0x8000 ? -x : x;
}
inline float element(bool half, unsigned bits) {
  return half ? from_float16(bits & 0xffff) : float_of(bits << 16);
}
inline float part(bool half, unsigned word, int i) {
  return element(half, word >> (16 * i) & 0xffff);
}

// An accumulator and products of 16-bit elements, which a tensor core adds at once: eight in
// mma.sync, sixteen in wgmma. It aligns all to the largest, keeps a few bits beyond float's (here
// one), and drops the rest (Fasi et al., PeerJ CS 7:e330; Khattak and Mikaitis, arXiv 2512.07004).
template <int PRODUCTS>
struct Sum {
  double summands[PRODUCTS + 1];

  explicit Sum(float accumulator) { summands[PRODUCTS] = accumulator; }
  void set(int i, float a, float b) { summands[i] = double(a) * b; }
  float rounded() const {
    double largest = 0, sum = 0;
    for (double summand : summands) {
      sum += summand;
      const double size = std::fabs(summand);
      largest = size > largest ? size : largest;
    }
    // In units of the last bit that is kept, the summands fit into integers.
    const long long exponent = exponent_of(largest) - 24;
    if (!(largest > 0) || !std::isfinite(sum) || exponent < -900) return float(sum);
    const double unit = power_of_two(exponent), units = power_of_two(-exponent);
    int kept = 0;
    for (double summand : summands) kept += int(summand * units);
    sum = kept * unit;
    const float nearest = float(sum);
    return std::fabs(double(nearest)) > std::fabs(sum) ? std::nextafterf(nearest, 0.f) : nearest;
  }

 private:
  static long long exponent_of(double x) {
    long long bits;
    std::memcpy(&bits, &x, 8);
    return (bits >> 52) - 1023;
  }
  static double power_of_two(long long exponent) {
    const long long bits = (exponent + 1023) << 52;
    double x;
    std::memcpy(&x, &bits, 8);
    return x;
  }
};

// From -1 to 1, of all bits of x.
inline float noise_of(float x) {
  unsigned bits = bits_of(x) * 2654435761u;
  bits = (bits ^ bits >> 15) * 2246822519u;
  return float(bits ^ bits >> 13) / 2147483648.f - 1.f;
}

// ex2.approx.ftz: relative error up to 2^-22, no subnormal results.
inline float approximate_exp2(float x) {
  const float y = std::exp2(x);
  return y < 0x1p-126f ? 0.f : y * (1.f + 0x1p-22f * noise_of(x));
}
// lg2.approx.ftz: error up to 2^-22 from 1/2 to 2, relative to the result elsewhere.
inline float approximate_log2(float x) {
  const float y = std::log2(x);
  return y + 0x1p-22f * noise_of(x) * (std::fabs(y) > 1.f ? std::fabs(y) : 1.f);
}

}  // namespace emulator
