// What a matrix instruction does inside, for the emulator and the mirror: an accumulator and 16 exact products become one
// float32. PTX leaves the order and the rounding open. Here are the two ends of what can be expected:
//
//   rounding     summed exactly, rounded to nearest once.
//   truncating   every addend cut off two bits below the last place of the largest one, their sum rounded towards zero:
//                what tensor cores were measured to do, but for the number of extra bits, which differs between them (Fasi,
//                Higham, Mikaitis and Pranesh, "Numerical behavior of NVIDIA tensor cores", PeerJ Computer Science 2021).
//
// A result that is right under one and wrong under the other says something about the criterion and not about the kernel.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace nsc::cuda {

enum class Unit : int { rounding, truncating };

// Towards zero, where the narrowing went away from it.
inline float cut(double value) {
  const float nearest = float(value);
  return std::fabs(double(nearest)) > std::fabs(value) ? std::nextafterf(nearest, 0.0f) : nearest;
}

template <class Product>
float inner_sum(Unit unit, float acc, int count, Product product) {
  double sum = acc;
  if (unit == Unit::rounding) {
    for (int k = 0; k < count; ++k) sum += product(k);
    return float(sum);
  }
  double largest = std::fabs(double(acc));
  for (int k = 0; k < count; ++k) largest = std::fmax(largest, std::fabs(product(k)));
  if (!(largest > 0) || std::isinf(largest)) {
    for (int k = 0; k < count; ++k) sum += product(k);
    return float(sum);
  }
  const double place = std::ldexp(1.0, std::ilogb(largest) - 25);
  sum = std::trunc(acc / place) * place;
  for (int k = 0; k < count; ++k) sum += std::trunc(product(k) / place) * place;
  return cut(sum);
}

}  // namespace nsc::cuda
