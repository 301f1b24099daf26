// lanes.h: a few elements in vector registers, and their way from and to memory. Included by the files that are
// compiled once per instruction set.
//
// A Pack is kLanes elements whatever they are computed in, so a float64 pack takes two registers. The vector types are
// GCC's and Clang's own, as wide as the instruction set the file is compiled for; everything is internal and inlined.
#pragma once

#include <cstdint>

#include "../core/half.h"
#if defined(__SSE2__)
// GCC 12 finds an uninitialized variable inside its own AVX-512 intrinsics.
#pragma GCC diagnostic push
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#define NK_INLINE inline __attribute__((always_inline))
#define NK_INLINED __attribute__((always_inline))  // of a lambda

namespace normkern::cpu::NK_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kRegister = 64;
#elif defined(__AVX2__)
constexpr int kRegister = 32;
#else
constexpr int kRegister = 16;
#endif
constexpr int kLanes = kRegister / 4;

template <class T, int N>
struct VectorOf {
  typedef T type __attribute__((vector_size(sizeof(T) * N)));
};
template <class T, int N>
using Vector = typename VectorOf<T, N>::type;

// Integers as wide as a float type.
template <class A>
struct BitsOf {
  typedef int32_t type;
};
template <>
struct BitsOf<double> {
  typedef int64_t type;
};

template <class To, class From>
NK_INLINE To bit_cast(const From& v) {
  static_assert(sizeof(To) == sizeof(From), "same bits");
  To r;
  __builtin_memcpy(&r, &v, sizeof(r));
  return r;
}

// kLanes values of type A.
template <class A>
struct Pack {
  static constexpr int kParts = sizeof(A) / 4, kWidth = kLanes / kParts;
  using V = Vector<A, kWidth>;
  V part[kParts];
};

#define NK_PACK_OPERATOR(op)                                                      \
  template <class A>                                                              \
  NK_INLINE Pack<A> operator op(Pack<A> a, Pack<A> b) {                           \
    for (int i = 0; i < Pack<A>::kParts; ++i) a.part[i] = a.part[i] op b.part[i]; \
    return a;                                                                     \
  }
NK_PACK_OPERATOR(+)
NK_PACK_OPERATOR(-)
NK_PACK_OPERATOR(*)
NK_PACK_OPERATOR(/)
#undef NK_PACK_OPERATOR

using Floats = Pack<float>;
using Doubles = Pack<double>;

template <class A>
NK_INLINE Pack<A> fill(A value) {
  Pack<A> p;
  for (int i = 0; i < Pack<A>::kParts; ++i) p.part[i] = value - typename Pack<A>::V{};
  return p;
}

// The sum of all lanes, as a tree: the sum of equal values is exact.
template <class A>
NK_INLINE A total(Pack<A> p) {
  typename Pack<A>::V v = p.part[0];
  for (int i = 1; i < Pack<A>::kParts; ++i) v += p.part[i];
  if constexpr (Pack<A>::kWidth == 16)
    v += __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
  if constexpr (Pack<A>::kWidth == 16)
    v += __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
  if constexpr (Pack<A>::kWidth == 8) v += __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3);
  if constexpr (Pack<A>::kWidth == 4) v += __builtin_shufflevector(v, v, 2, 3, 0, 1);
  if constexpr (Pack<A>::kWidth >= 8) return (v[0] + v[2]) + (v[1] + v[3]);
  return v[0] + v[1];
}

// a*b + c, rounded once where the instruction set can. Compilers do not contract across functions in ISO mode.
NK_INLINE Pack<float> fma(Pack<float> a, Pack<float> b, Pack<float> c) {
#if defined(__AVX512F__)
  return {bit_cast<Pack<float>::V>(
      _mm512_fmadd_ps(bit_cast<__m512>(a.part[0]), bit_cast<__m512>(b.part[0]), bit_cast<__m512>(c.part[0])))};
#elif defined(__FMA__)
  return {bit_cast<Pack<float>::V>(
      _mm256_fmadd_ps(bit_cast<__m256>(a.part[0]), bit_cast<__m256>(b.part[0]), bit_cast<__m256>(c.part[0])))};
#else
  return {a.part[0] * b.part[0] + c.part[0]};
#endif
}

NK_INLINE Pack<double> fma(Pack<double> a, Pack<double> b, Pack<double> c) {
  Pack<double> r;
  for (int i = 0; i < Pack<double>::kParts; ++i) {
#if defined(__AVX512F__)
    r.part[i] = bit_cast<Pack<double>::V>(
        _mm512_fmadd_pd(bit_cast<__m512d>(a.part[i]), bit_cast<__m512d>(b.part[i]), bit_cast<__m512d>(c.part[i])));
#elif defined(__FMA__)
    r.part[i] = bit_cast<Pack<double>::V>(
        _mm256_fmadd_pd(bit_cast<__m256d>(a.part[i]), bit_cast<__m256d>(b.part[i]), bit_cast<__m256d>(c.part[i])));
#else
    r.part[i] = a.part[i] * b.part[i] + c.part[i];
#endif
  }
  return r;
}

// The last n lanes of a, and zero before them.
template <class A>
NK_INLINE Pack<A> last_lanes(Pack<A> a, int64_t n) {
  using Bits = typename BitsOf<A>::type;
  using I = Vector<Bits, Pack<A>::kWidth>;
  for (int i = 0; i < Pack<A>::kParts; ++i) {
    I lane;
    for (int j = 0; j < Pack<A>::kWidth; ++j) lane[j] = i * Pack<A>::kWidth + j;
    const I keep = lane >= I{} + Bits(kLanes - n);
    a.part[i] = bit_cast<typename Pack<A>::V>(bit_cast<I>(a.part[i]) & keep);
  }
  return a;
}

// The pack that ends n elements of which the first `done` had their turn, done being whole packs: `count` elements from
// `from` on, of which the last `left` lanes count. All lanes do where there is less than a pack, the rest being zero.
struct LastPack {
  int64_t from, count, left;
};
NK_INLINE LastPack last_pack(int64_t n, int64_t done) {
  if (n < kLanes) return {0, n, kLanes};
  return {n - kLanes, kLanes, n - done};
}

// `yes` where a < b (a <= b), else `no`; a NaN gives `no`.
template <class A>
NK_INLINE Pack<A> where_less(Pack<A> a, Pack<A> b, Pack<A> yes, Pack<A> no) {
  for (int i = 0; i < Pack<A>::kParts; ++i) no.part[i] = a.part[i] < b.part[i] ? yes.part[i] : no.part[i];
  return no;
}

template <class A>
NK_INLINE Pack<A> where_at_most(Pack<A> a, Pack<A> b, Pack<A> yes, Pack<A> no) {
  for (int i = 0; i < Pack<A>::kParts; ++i) no.part[i] = a.part[i] <= b.part[i] ? yes.part[i] : no.part[i];
  return no;
}

// The larger (the smaller) of two, or b where either is NaN.
NK_INLINE Pack<float> largest(Pack<float> a, Pack<float> b) {
#if defined(__AVX512F__)
  return {bit_cast<Pack<float>::V>(_mm512_max_ps(bit_cast<__m512>(a.part[0]), bit_cast<__m512>(b.part[0])))};
#elif defined(__AVX__)
  return {bit_cast<Pack<float>::V>(_mm256_max_ps(bit_cast<__m256>(a.part[0]), bit_cast<__m256>(b.part[0])))};
#else
  return where_less(b, a, a, b);
#endif
}

NK_INLINE Pack<float> smallest(Pack<float> a, Pack<float> b) {
#if defined(__AVX512F__)
  return {bit_cast<Pack<float>::V>(_mm512_min_ps(bit_cast<__m512>(a.part[0]), bit_cast<__m512>(b.part[0])))};
#elif defined(__AVX__)
  return {bit_cast<Pack<float>::V>(_mm256_min_ps(bit_cast<__m256>(a.part[0]), bit_cast<__m256>(b.part[0])))};
#else
  return where_less(a, b, a, b);
#endif
}

// ---- N storage elements to and from N floats ----

// N 16-bit integers as 32-bit ones and back. Generic forms exist for all of what is spelled out in intrinsics here and
// below, but GCC 12 takes them apart or sends them through the stack.
template <int N>
NK_INLINE Vector<uint32_t, N> integers(const void* p) {
#if defined(__AVX2__)
  if constexpr (N == 4) {
    return bit_cast<Vector<uint32_t, 4>>(_mm_cvtepu16_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(p))));
  } else if constexpr (N == 8) {
    return bit_cast<Vector<uint32_t, 8>>(_mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p))));
  } else {
#if defined(__AVX512F__)
    return bit_cast<Vector<uint32_t, 16>>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(p))));
#endif
  }
#else
  Vector<uint16_t, N> h;
  __builtin_memcpy(&h, p, sizeof(h));
  return __builtin_convertvector(h, Vector<uint32_t, N>);
#endif
}

// kLanes of them; all are below 2^16.
NK_INLINE void put_integers(void* p, Vector<uint32_t, kLanes> v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_cvtepi32_epi16(bit_cast<__m512i>(v)));
#elif defined(__AVX2__)
  const __m256i i = bit_cast<__m256i>(v);
  const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(i), _mm256_extracti128_si256(i, 1));
  _mm_storeu_si128(static_cast<__m128i*>(p), packed);
#else
  const Vector<uint16_t, kLanes> h = __builtin_convertvector(v, Vector<uint16_t, kLanes>);
  __builtin_memcpy(p, &h, sizeof(h));
#endif
}

template <int N>
NK_INLINE Vector<float, N> floats(const float* p) {
  Vector<float, N> v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

template <int N>
NK_INLINE Vector<float, N> floats(const bf16* p) {
  return bit_cast<Vector<float, N>>(integers<N>(p) << 16);
}

template <int N>
NK_INLINE Vector<float, N> floats(const f16* p) {
#if defined(__F16C__)
  if constexpr (N == 4) {
    return bit_cast<Vector<float, 4>>(_mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  } else if constexpr (N == 8) {
    return bit_cast<Vector<float, 8>>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  } else {
#if defined(__AVX512F__)
    const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return bit_cast<Vector<float, 16>>(_mm512_cvtph_ps(h));
#endif
  }
#elif defined(__aarch64__)
  Vector<__fp16, N> h;
  __builtin_memcpy(&h, p, sizeof(h));
  return __builtin_convertvector(h, Vector<float, N>);
#else
  // The exponent is rebased by a product with 2^112, which also normalizes subnormals; infinity and NaN are put back.
  using U = Vector<uint32_t, N>;
  const U u = integers<N>(p), sign = (u & 0x8000) << 16, magnitude = (u & 0x7fff) << 13;
  const U finite = bit_cast<U>(bit_cast<Vector<float, N>>(magnitude) * 0x1p112f);
  const U special = bit_cast<U>(magnitude >= U{} + 0x0f800000);
  return bit_cast<Vector<float, N>>(sign | (special & (magnitude | 0x7f800000)) | (~special & finite));
#endif
}

template <int N>
NK_INLINE void put_floats(float* p, Vector<float, N> v) {
  __builtin_memcpy(p, &v, sizeof(v));
}

// The high halves are v as bfloat16, rounded to nearest, ties to even; the low ones are whatever is left. NaNs keep
// their high half, and must not have all of its bits set: see canonical() in layout.h.
template <int N>
NK_INLINE Vector<uint32_t, N> rounded_high(Vector<float, N> v) {
  using U = Vector<uint32_t, N>;
  const U u = bit_cast<U>(v);
#if defined(__AVX512F__)
  if constexpr (N == 16) {  // GCC 12 makes no mask of the test
    const __mmask16 odd = _mm512_test_epi32_mask(bit_cast<__m512i>(u), _mm512_set1_epi32(0x10000));
    const __m512i even = _mm512_add_epi32(bit_cast<__m512i>(u), _mm512_set1_epi32(0x7fff));
    return bit_cast<U>(_mm512_mask_add_epi32(even, odd, bit_cast<__m512i>(u), _mm512_set1_epi32(0x8000)));
  }
#endif
  return u + 0x7fff + ((u >> 16) & 1);
}

template <int N>
NK_INLINE void put_floats(bf16* p, Vector<float, N> v) {
  put_integers(p, rounded_high<N>(v) >> 16);
}

template <int N>
NK_INLINE void put_floats(f16* p, Vector<float, N> v) {
#if defined(__F16C__)
  if constexpr (N == 4) {
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_cvtps_ph(bit_cast<__m128>(v), _MM_FROUND_TO_NEAREST_INT));
  } else if constexpr (N == 8) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(bit_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
  } else {
#if defined(__AVX512F__)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(bit_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
#endif
  }
#elif defined(__aarch64__)
  const Vector<__fp16, N> h = __builtin_convertvector(v, Vector<__fp16, N>);
  __builtin_memcpy(p, &h, sizeof(h));
#else
  // As to_f16 in half.h, with every branch taken and the right one kept.
  using U = Vector<uint32_t, N>;
  using F = Vector<float, N>;
  const U u = bit_cast<U>(v), sign = (u >> 16) & 0x8000, magnitude = u & 0x7fffffff;
  const U normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  const U small = bit_cast<U>(bit_cast<F>(magnitude) + 0.5f) - 0x3f000000;
  const U is_small = bit_cast<U>(magnitude < U{} + 0x38800000), is_large = bit_cast<U>(magnitude >= U{} + 0x477ff000);
  const U is_nan = bit_cast<U>(magnitude > U{} + 0x7f800000), nan = 0x7e00 | ((magnitude >> 13) & 0x3ff);
  const U large = (is_nan & nan) | (~is_nan & 0x7c00);
  const U bits = (is_large & large) | (~is_large & ((is_small & small) | (~is_small & normal)));
  put_integers(p, sign | bits);
#endif
}

// Floats to the doubles of a register and back.

NK_INLINE Vector<double, kLanes / 2> widen(Vector<float, kLanes / 2> v) {
#if defined(__AVX512F__)
  return bit_cast<Vector<double, 8>>(_mm512_cvtps_pd(bit_cast<__m256>(v)));
#elif defined(__AVX2__)
  return bit_cast<Vector<double, 4>>(_mm256_cvtps_pd(bit_cast<__m128>(v)));
#else
  return __builtin_convertvector(v, Vector<double, kLanes / 2>);
#endif
}

NK_INLINE Vector<float, kLanes / 2> narrow(Vector<double, kLanes / 2> v) {
#if defined(__AVX512F__)
  return bit_cast<Vector<float, 8>>(_mm512_cvtpd_ps(bit_cast<__m512d>(v)));
#elif defined(__AVX2__)
  return bit_cast<Vector<float, 4>>(_mm256_cvtpd_ps(bit_cast<__m256d>(v)));
#else
  return __builtin_convertvector(v, Vector<float, kLanes / 2>);
#endif
}

// The halves of a float register.
using Half = Vector<float, kLanes / 2>;

NK_INLINE Half low_half(Vector<float, kLanes> v) {
#if defined(__AVX512F__)
  return bit_cast<Half>(_mm512_castps512_ps256(bit_cast<__m512>(v)));
#elif defined(__AVX2__)
  return bit_cast<Half>(_mm256_castps256_ps128(bit_cast<__m256>(v)));
#else
  return Half{v[0], v[1]};
#endif
}

NK_INLINE Half high_half(Vector<float, kLanes> v) {
#if defined(__AVX512F__)
  return bit_cast<Half>(_mm512_extractf32x8_ps(bit_cast<__m512>(v), 1));
#elif defined(__AVX2__)
  return bit_cast<Half>(_mm256_extractf128_ps(bit_cast<__m256>(v), 1));
#else
  return Half{v[2], v[3]};
#endif
}

NK_INLINE Vector<float, kLanes> join(Half low, Half high) {
#if defined(__AVX512F__)
  const __m512 v = _mm512_castps256_ps512(bit_cast<__m256>(low));
  return bit_cast<Vector<float, kLanes>>(_mm512_insertf32x8(v, bit_cast<__m256>(high), 1));
#elif defined(__AVX2__)
  const __m256 v = _mm256_castps128_ps256(bit_cast<__m128>(low));
  return bit_cast<Vector<float, kLanes>>(_mm256_insertf128_ps(v, bit_cast<__m128>(high), 1));
#else
  return Vector<float, kLanes>{low[0], low[1], high[0], high[1]};
#endif
}

// ---- packs to and from memory ----

template <class A, class T>
NK_INLINE Pack<A> load(const T* p) {
  Pack<A> r;
  if constexpr (sizeof(A) == sizeof(T)) {
    // Part by part: a copy of the whole struct would go through the stack.
    for (int i = 0; i < Pack<A>::kParts; ++i) __builtin_memcpy(&r.part[i], p + i * Pack<A>::kWidth, sizeof(r.part[i]));
  } else if constexpr (sizeof(A) == 4) {
    r.part[0] = floats<kLanes>(p);
  } else {
    for (int i = 0; i < 2; ++i) r.part[i] = widen(floats<kLanes / 2>(p + i * (kLanes / 2)));
  }
  return r;
}

template <class T, class A>
NK_INLINE void store(T* p, Pack<A> v) {
  if constexpr (sizeof(A) == sizeof(T)) {
    for (int i = 0; i < Pack<A>::kParts; ++i) __builtin_memcpy(p + i * Pack<A>::kWidth, &v.part[i], sizeof(v.part[i]));
  } else if constexpr (sizeof(A) == 4) {
    put_floats<kLanes>(p, v.part[0]);
  } else {
    for (int i = 0; i < 2; ++i) put_floats<kLanes / 2>(p + i * (kLanes / 2), narrow(v.part[i]));
  }
}

// n < kLanes elements: a memcpy of run-time length is a call, and several times slower than these few branches.
template <class T>
NK_INLINE void copy_some(T* to, const T* from, int64_t n) {
  int64_t i = 0;
  if constexpr (kLanes > 8) {
    if (n & 8) __builtin_memcpy(to, from, 8 * sizeof(T)), i = 8;
  }
  if constexpr (kLanes > 4) {
    if (n & 4) __builtin_memcpy(to + i, from + i, 4 * sizeof(T)), i += 4;
  }
  if (n & 2) __builtin_memcpy(to + i, from + i, 2 * sizeof(T)), i += 2;
  if (n & 1) __builtin_memcpy(to + i, from + i, sizeof(T));
}

// The first n < kLanes elements, the rest zero. Calls, since inlined these would be most of the code.
template <class A, class T>
__attribute__((noinline)) Pack<A> load(const T* p, int64_t n) {
  T buffer[kLanes] = {};
  copy_some(static_cast<T*>(buffer), p, n);
  return load<A>(static_cast<const T*>(buffer));
}

template <class T, class A>
__attribute__((noinline)) void store(T* p, Pack<A> v, int64_t n) {
  T buffer[kLanes];
  store(buffer, v);
  copy_some(p, static_cast<const T*>(buffer), n);
}

template <class A, class T>
NK_INLINE Pack<A> load_some(const T* p, int64_t n) {
  return n == kLanes ? load<A>(p) : load<A>(p, n);
}

template <class T, class A>
NK_INLINE void store_some(T* p, Pack<A> v, int64_t n) {
  n == kLanes ? store(p, v) : store(p, v, n);
}

// The elements of two packs in any order, the same one on their way in and out. Of bfloat16 one pack has the even ones
// and the other the odd ones: no instruction has to bring an element into another lane.
template <class A>
struct Pair {
  Pack<A> a, b;
};
template <class T>
constexpr bool kPaired = false;
template <>
constexpr bool kPaired<bf16> = true;
using PairBits = Vector<uint32_t, kLanes>;

// 2*kLanes floats as load_pair would bring them from bfloat16.
NK_INLINE Pair<float> in_pair_order(Pack<float> first, Pack<float> second) {
  Vector<uint32_t, kLanes> even;
  for (uint32_t i = 0; i < kLanes; ++i) even[i] = 2 * i;
  return {{__builtin_shuffle(first.part[0], second.part[0], even)},
          {__builtin_shuffle(first.part[0], second.part[0], even + 1)}};
}

// And back.
NK_INLINE Pair<float> from_pair_order(Pair<float> v) {
  Vector<uint32_t, kLanes> low;
  for (uint32_t i = 0; i < kLanes; ++i) low[i] = i / 2 + i % 2 * kLanes;
  return {{__builtin_shuffle(v.a.part[0], v.b.part[0], low)},
          {__builtin_shuffle(v.a.part[0], v.b.part[0], low + kLanes / 2)}};
}

template <class A, class T>
NK_INLINE Pair<A> load_pair(const T* p) {
  if constexpr (kPaired<T> && sizeof(A) == 4) {
    PairBits bits;
    __builtin_memcpy(&bits, p, sizeof(bits));
    return {{bit_cast<Vector<float, kLanes>>(bits << 16)}, {bit_cast<Vector<float, kLanes>>(bits & 0xffff0000)}};
  } else {
    return {load<A>(p), load<A>(p + kLanes)};
  }
}

// Of bfloat16 alone; rounded as by put_floats.
NK_INLINE PairBits rounded(Pair<float> v) {
  return (rounded_high<kLanes>(v.a.part[0]) >> 16) | (rounded_high<kLanes>(v.b.part[0]) & 0xffff0000);
}

// Stores past the caches; p is a multiple of what one store writes.
template <class T>
constexpr int64_t kStreamed = kLanes * sizeof(T) < kRegister ? kLanes * sizeof(T) : kRegister;
template <class T>
constexpr int64_t kStreamedPair = kStreamed<T> < 16 ? 16 : kStreamed<T>;  // see stream_bits

template <class T, class A>
NK_INLINE void stream(T* p, Pack<A> v) {
#if defined(__SSE2__)
  alignas(kRegister) T buffer[kLanes];  // never leaves the registers
  store(static_cast<T*>(buffer), v);
  char* to = reinterpret_cast<char*>(p);
  const char* from = reinterpret_cast<const char*>(buffer);
  for (int64_t i = 0; i < int64_t(sizeof(buffer)); i += kStreamed<T>) {
#if defined(__AVX512F__)
    if constexpr (kStreamed<T> == 64) {
      _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i), _mm512_load_si512(from + i));
      continue;
    }
#endif
#if defined(__AVX2__)
    if constexpr (kStreamed<T> == 32) {
      _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i),
                          _mm256_load_si256(reinterpret_cast<const __m256i*>(from + i)));
      continue;
    }
#endif
    if constexpr (kStreamed<T> == 16) {
      _mm_stream_si128(reinterpret_cast<__m128i*>(to + i), _mm_load_si128(reinterpret_cast<const __m128i*>(from + i)));
    } else {
      __builtin_memcpy(to + i, from + i, kStreamed<T>);
    }
  }
#else
  store(p, v);
#endif
}

// A register; p is a multiple of 16 bytes.
NK_INLINE void stream_bits(void* p, PairBits bits) {
#if defined(__SSE2__)
  __m128i* to = static_cast<__m128i*>(p);
#if defined(__AVX512F__)
  const __m512i v = bit_cast<__m512i>(bits);
  _mm_stream_si128(to, _mm512_castsi512_si128(v));
  _mm_stream_si128(to + 1, _mm512_extracti32x4_epi32(v, 1));
  _mm_stream_si128(to + 2, _mm512_extracti32x4_epi32(v, 2));
  _mm_stream_si128(to + 3, _mm512_extracti32x4_epi32(v, 3));
#elif defined(__AVX2__)
  const __m256i v = bit_cast<__m256i>(bits);
  _mm_stream_si128(to, _mm256_castsi256_si128(v));
  _mm_stream_si128(to + 1, _mm256_extracti128_si256(v, 1));
#else
  _mm_stream_si128(to, bit_cast<__m128i>(bits));
#endif
#else
  __builtin_memcpy(p, &bits, sizeof(bits));
#endif
}

// After the last stream(), before anybody else reads.
NK_INLINE void end_stream() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

template <class To, class From>
NK_INLINE Pack<To> convert(Pack<From> v) {
  if constexpr (sizeof(To) == sizeof(From)) {
    return v;
  } else if constexpr (sizeof(To) == 8) {
    return {{widen(low_half(v.part[0])), widen(high_half(v.part[0]))}};
  } else {
    return {{join(narrow(v.part[0]), narrow(v.part[1]))}};
  }
}

// The sums of all lanes of two packs, in float64 and as trees.
template <class A, class B>
NK_INLINE Vector<double, 2> totals(Pack<A> a, Pack<B> b) {
  const Doubles x = convert<double>(a), y = convert<double>(b);
  auto v = x.part[0] + x.part[1], w = y.part[0] + y.part[1];
#if defined(__AVX512F__)
  const __m512d p = bit_cast<__m512d>(v), q = bit_cast<__m512d>(w);
  const __m512d eight = _mm512_add_pd(_mm512_unpacklo_pd(p, q), _mm512_unpackhi_pd(p, q));
  const __m256d four = _mm256_add_pd(_mm512_castpd512_pd256(eight), _mm512_extractf64x4_pd(eight, 1));
#elif defined(__AVX2__)
  const __m256d four = _mm256_hadd_pd(bit_cast<__m256d>(v), bit_cast<__m256d>(w));
#endif
#if defined(__AVX2__)
  const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
  return bit_cast<Vector<double, 2>>(two);
#else
  return Vector<double, 2>{v[0] + v[1], w[0] + w[1]};
#endif
}

// One element.
NK_INLINE double value(const float* p) { return *p; }
NK_INLINE double value(const double* p) { return *p; }
NK_INLINE double value(const bf16* p) { return bit_cast<float>(uint32_t(p->bits) << 16); }
NK_INLINE double value(const f16* p) { return load<float>(p, 1).part[0][0]; }

}  // namespace
}  // namespace normkern::cpu::NK_ISA
