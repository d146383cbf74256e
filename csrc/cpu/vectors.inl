// Elements in memory and vectors of accumulators; part of kernels.inl.

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <class Acc>
struct Vector;
template <>
struct Vector<float> {
  typedef float type __attribute__((vector_size(NSC_VECTOR_BYTES)));
  typedef float memory __attribute__((vector_size(NSC_VECTOR_BYTES), aligned(4), may_alias));
};
template <>
struct Vector<double> {
  typedef double type __attribute__((vector_size(NSC_VECTOR_BYTES)));
  typedef double memory __attribute__((vector_size(NSC_VECTOR_BYTES), aligned(8), may_alias));
};
template <class Acc>
using Vec = typename Vector<Acc>::type;
template <class Acc>
constexpr int kLanes = NSC_VECTOR_BYTES / sizeof(Acc);

typedef uint32_t Words __attribute__((vector_size(NSC_VECTOR_BYTES)));
typedef int32_t Flags __attribute__((vector_size(NSC_VECTOR_BYTES)));
typedef uint16_t Halves __attribute__((vector_size(NSC_VECTOR_BYTES / 2)));
typedef uint16_t HalvesMemory __attribute__((vector_size(NSC_VECTOR_BYTES / 2), aligned(2), may_alias));

template <class E>
struct AccOf {
  using type = float;
};
template <>
struct AccOf<double> {
  using type = double;
};

inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }
inline int64_t round_up(int64_t n, int64_t multiple) { return ceil_div(n, multiple) * multiple; }

inline Vec<float> load(const float* p) { return *reinterpret_cast<const Vector<float>::memory*>(p); }
inline Vec<double> load(const double* p) { return *reinterpret_cast<const Vector<double>::memory*>(p); }
inline void store(float* p, Vec<float> v) { *reinterpret_cast<Vector<float>::memory*>(p) = v; }
inline void store(double* p, Vec<double> v) { *reinterpret_cast<Vector<double>::memory*>(p) = v; }

// One number in every lane, as a load: added to a vector of zeros it costs an addition and a turn through a register.
#if defined(NSC_AVX512)
inline Vec<float> broadcast(const float* p) { return (Vec<float>)_mm512_set1_ps(*p); }
inline Vec<double> broadcast(const double* p) { return (Vec<double>)_mm512_set1_pd(*p); }
#elif defined(NSC_F16C)
inline Vec<float> broadcast(const float* p) { return (Vec<float>)_mm256_broadcast_ss(p); }
inline Vec<double> broadcast(const double* p) { return (Vec<double>)_mm256_broadcast_sd(p); }
#else
template <class Acc>
inline Vec<Acc> broadcast(const Acc* p) {
  return Vec<Acc>{} + *p;
}
#endif

inline Vec<float> load(const bf16* p) {
  Halves h = *reinterpret_cast<const HalvesMemory*>(p);
  return reinterpret_cast<Vec<float>>(__builtin_convertvector(h, Words) << 16);
}

inline void store(bf16* p, Vec<float> v) {
#if defined(NSC_AVX512_BF16)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh((__m512)v));
#else
  // Round to nearest even by adding half a unit of the last kept place; a NaN must not carry into infinity.
  Words bits = reinterpret_cast<Words>(v);
  Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  Flags is_nan = v != v;
  Words kept = (reinterpret_cast<Words>(~is_nan) & rounded) | (reinterpret_cast<Words>(is_nan) & 0x7fc0u);
  *reinterpret_cast<HalvesMemory*>(p) = __builtin_convertvector(kept, Halves);
#endif
}

#if defined(NSC_AVX512)
inline Vec<float> load(const f16* p) {
  return (Vec<float>)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline void store(f16* p, Vec<float> v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(NSC_F16C)
inline Vec<float> load(const f16* p) {
  return (Vec<float>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline void store(f16* p, Vec<float> v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
}
#else
inline float widen(f16 h) {
  // Exponent and mantissa moved into place and rescaled: exact for normal and subnormal numbers.
  uint32_t magnitude = uint32_t(h.bits & 0x7fff) << 13, sign = uint32_t(h.bits & 0x8000) << 16;
  float f;
  std::memcpy(&f, &magnitude, 4);
  f *= 0x1p112f;
  std::memcpy(&magnitude, &f, 4);
  if ((h.bits & 0x7c00) == 0x7c00) magnitude = 0x7f800000u | uint32_t(h.bits & 0x03ff) << 13;
  uint32_t bits = magnitude | sign;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline f16 narrow(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  uint16_t sign = (bits >> 16) & 0x8000;
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return {uint16_t(sign | 0x7e00)};
  if (bits >= 0x477ff000) return {uint16_t(sign | 0x7c00)};  // 65520 and above round to infinity
  if (bits < 0x38800000) {
    // Subnormal: adding 2^-1 leaves the wanted integer, rounded to nearest even, in the low bits.
    float magnitude;
    std::memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    std::memcpy(&bits, &magnitude, 4);
    return {uint16_t(sign | (bits - 0x3f000000))};
  }
  return {uint16_t(sign | ((bits - 0x38000000 + 0xfff + ((bits >> 13) & 1)) >> 13))};
}
inline Vec<float> load(const f16* p) {
  Vec<float> v;
  for (int i = 0; i < kLanes<float>; ++i) v[i] = widen(p[i]);
  return v;
}
inline void store(f16* p, Vec<float> v) {
  for (int i = 0; i < kLanes<float>; ++i) p[i] = narrow(v[i]);
}
#endif

// The first n < lanes elements, the rest zero; and the first n of a vector.
#if defined(NSC_AVX512)
inline Vec<float> load_part(const float* p, int64_t n) {
  return (Vec<float>)_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p);
}
inline Vec<double> load_part(const double* p, int64_t n) {
  return (Vec<double>)_mm512_maskz_loadu_pd(__mmask8((1u << n) - 1), p);
}
inline void store_part(float* p, Vec<float> v, int64_t n) {
  _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), (__m512)v);
}
inline void store_part(double* p, Vec<double> v, int64_t n) {
  _mm512_mask_storeu_pd(p, __mmask8((1u << n) - 1), (__m512d)v);
}
template <class E>
inline Vec<float> load_part(const E* p, int64_t n) {
  alignas(32) E whole[16];
  _mm256_store_si256(reinterpret_cast<__m256i*>(whole), _mm256_maskz_loadu_epi16(__mmask16((1u << n) - 1), p));
  return load(whole);
}
template <class E>
inline void store_part(E* p, Vec<float> v, int64_t n) {
  alignas(32) E whole[16];
  store(whole, v);
  _mm256_mask_storeu_epi16(p, __mmask16((1u << n) - 1), _mm256_load_si256(reinterpret_cast<const __m256i*>(whole)));
}
#else
#if defined(NSC_F16C)
// Adapters of rank 4 are all parts: through memory each would wait for what was just written there.
inline __m256i first_lanes(int64_t n) {
  alignas(32) static const int32_t kLanesThenNone[16] = {-1, -1, -1, -1, -1, -1, -1, -1};
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kLanesThenNone + 8 - n));
}
inline Vec<float> load_part(const float* p, int64_t n) { return (Vec<float>)_mm256_maskload_ps(p, first_lanes(n)); }
inline void store_part(float* p, Vec<float> v, int64_t n) { _mm256_maskstore_ps(p, first_lanes(n), (__m256)v); }
#endif
template <class E>
inline Vec<typename AccOf<E>::type> load_part(const E* p, int64_t n) {
  alignas(64) E whole[kLanes<typename AccOf<E>::type>] = {};
  std::memcpy(whole, p, n * sizeof(E));
  return load(whole);
}
template <class E>
inline void store_part(E* p, Vec<typename AccOf<E>::type> v, int64_t n) {
  alignas(64) E whole[kLanes<typename AccOf<E>::type>];
  store(whole, v);
  std::memcpy(p, whole, n * sizeof(E));
}
#endif

// f(first element, count): whole vectors with count == lanes, then what is left.
template <class Acc, class F>
inline void for_vectors(int64_t n, F f) {
  int64_t i = 0;
  for (; i + kLanes<Acc> <= n; i += kLanes<Acc>) f(i, int64_t(kLanes<Acc>));
  if (i < n) f(i, n - i);
}
template <class E>
inline Vec<typename AccOf<E>::type> load_n(const E* p, int64_t n) {
  return n == kLanes<typename AccOf<E>::type> ? load(p) : load_part(p, n);
}
template <class E>
inline void store_n(E* p, Vec<typename AccOf<E>::type> v, int64_t n) {
  if (n == kLanes<typename AccOf<E>::type>)
    store(p, v);
  else
    store_part(p, v, n);
}

// Halves added to halves: the same tree as in the tiles below.
template <class Acc>
inline Acc sum_lanes(Vec<Acc> v) {
#if defined(NSC_F16C) || defined(NSC_AVX512)
  if constexpr (sizeof(Acc) == 4) {
#if defined(NSC_AVX512)
    const __m256 half = _mm512_castps512_ps256((__m512)v) + _mm512_extractf32x8_ps((__m512)v, 1);
#else
    const __m256 half = (__m256)v;
#endif
    const __m128 quarter = _mm256_castps256_ps128(half) + _mm256_extractf128_ps(half, 1);
    const __m128 pair = quarter + _mm_movehl_ps(quarter, quarter);
    return pair[0] + pair[1];
  }
#endif
  alignas(64) Acc a[kLanes<Acc>];
  store(a, v);
  for (int n = kLanes<Acc> / 2; n > 0; n /= 2)
    for (int i = 0; i < n; ++i) a[i] += a[i + n];
  return a[0];
}

template <class Acc, class E, class F>
inline Acc dot(const E* a, const F* b, int64_t n) {
  Vec<Acc> sum = {};
  for_vectors<Acc>(n, [&](int64_t i, int64_t m) { sum += load_n(a + i, m) * load_n(b + i, m); });
  return sum_lanes<Acc>(sum);
}
