// y = x W^T by a packed weight W (out, in) on x86-64; the form is that of layout.py and formats.py.
//
// One to eight tokens take one pass over the packed bytes: a row's mask says where its kept values
// go, they are spread out in registers, widened and multiplied. More tokens: a tile of rows is
// unpacked into a buffer that stays in the cache, and torch multiplies by it.
//
// Two ways to spread values, chosen when running by what the processor can do:
//   avx2      eight or 16 weights at a time, by a table of permutations
//   avx512    16 to 64 at a time, by the expand instructions of AVX-512 VBMI2; with the bfloat16
//             dot product where there is one ("avx512_bf16")
// Sums are float32. Neither Python's headers nor a second pool of threads: at::parallel_for, and
// the OpenMP library that torch has loaded.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <type_traits>
#include <vector>

#if !defined(__x86_64__) || !(defined(__GNUC__) || defined(__clang__))
#error "these kernels are for x86-64 and for gcc or clang"
#endif
#include <cpuid.h>
#include <immintrin.h>
#define FOR_AVX2 __attribute__((target("avx2,fma,f16c,popcnt")))
#define AVX512_SET "avx512f,avx512bw,avx512vl,avx512vbmi,avx512vbmi2,avx512vnni,avx2,fma,f16c,popcnt"
#define FOR_AVX512 __attribute__((target(AVX512_SET)))
#define FOR_AVX512_BF16 __attribute__((target(AVX512_SET ",avx512bf16")))
#define INLINE inline __attribute__((always_inline))

namespace {

constexpr int64_t WORD = 64;           // columns that one 64-bit word of the mask covers
constexpr int SCALE_AT = WORD;         // where the scale of a word's integers stands
constexpr int64_t FEW = 8;             // tokens, at most, in one pass over the packed bytes
constexpr int64_t TILE = 8 << 20;      // bytes of unpacked rows that should stay in the cache
constexpr int64_t UNPACKED = 8 << 10;  // bytes that 4-bit integers are unpacked to at a time,
constexpr int64_t AT_ONCE = 32;        // of so many rows at most
constexpr int64_t BEYOND = WORD;       // values that a load may read after those of its row
constexpr int64_t AHEAD = 2048;        // bytes by which values are fetched before they are needed
constexpr int ZERO_OF_4 = 8, ZERO_OF_8 = 128;  // by which integers are moved up to be unsigned
constexpr float SMALL = 1.f / 16;      // of the largest input of a word: the small ones, whose
constexpr float RANGE = 300;           // root mean square integers show that are so much larger
constexpr int64_t GROUP = WORD;        // inputs of a row that share a scale at 4 bits

enum Path { NONE = -1, AVX2, AVX512, AVX512_BF16 };
const std::array<const char*, 3> NAMES = {"avx2", "avx512", "avx512_bf16"};

Path best_path() {
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c") && __builtin_cpu_supports("popcnt");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2") &&
      __builtin_cpu_supports("avx512vnni");
  if (avx512) return __builtin_cpu_supports("avx512bf16") ? AVX512_BF16 : AVX512;
  return avx2 ? AVX2 : NONE;
}

// Whether processor and operating system let torch multiply bfloat16 matrices by AMX.
bool has_amx() {
  constexpr unsigned BF16 = 1u << 22, TILES = 3u << 17;  // in leaf 7; in the enabled states
  unsigned a, b, c, d;
  if (best_path() < AVX2 || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & BF16)) return false;
  unsigned low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (low & TILES) == TILES;
}

Path chosen_path(const std::optional<std::string>& name) {
  static const Path best = best_path();
  if (!name && best != NONE) return best;
  for (int path = 0; path <= best; path++)
    if (*name == NAMES[path]) return static_cast<Path>(path);
  TORCH_CHECK(false, "no path ", name.value_or("at all"), " on this processor");
}

// A weight as the kernels see it: V is float, c10::BFloat16 or c10::Half; or int8_t, of which every
// weight is kept, so that all rows have the first one's mask.
template <class V>
struct Weight {
  const uint8_t* mask;      // (out, stride)
  const V* values;          // (nnz,)
  const int64_t* offsets;   // (out + 1,)
  const float* scale;       // (out,), of int8 alone
  int64_t out, in;
  int64_t stride() const { return (in + 7) / 8; }
  const uint8_t* mask_of(int64_t r) const {
    return mask + (std::is_same_v<V, int8_t> ? 0 : r * stride());
  }
};

// A weight of 4-bit integers, two in a byte, with a scale for every GROUP inputs of a row.
struct FourBits {
  const uint8_t* mask;         // (out, stride)
  const uint8_t* values;       // (ceil(nnz / 2),)
  const int64_t* offsets;      // (out + 1,), in values
  const c10::BFloat16* scale;  // (out, groups())
  int64_t out, in;
  int64_t stride() const { return (in + 7) / 8; }
  int64_t groups() const { return std::max<int64_t>(1, (in + GROUP - 1) / GROUP); }
  const uint8_t* mask_of(int64_t r) const { return mask + r * stride(); }
  const c10::BFloat16* scales_of(int64_t r) const { return scale + r * groups(); }
};

// Word k of a row's mask; bytes after the row's last count as zero.
INLINE uint64_t mask_word(const uint8_t* mask, int64_t k, int64_t stride) {
  uint64_t bits = 0;
  const int64_t left = stride - k * 8;
  std::memcpy(&bits, mask + k * 8, left < 8 ? left : 8);
  return bits;
}

INLINE uint64_t whole_word(const uint8_t* mask, int64_t k) {
  uint64_t bits;
  std::memcpy(&bits, mask + k * 8, 8);
  return bits;
}

// The values of row r, in `copy`, where loads may read on behind the last.
template <class V>
const V* with_room(const Weight<V>& w, int64_t r, std::vector<V>& copy) {
  copy.assign(w.offsets[r + 1] - w.offsets[r] + BEYOND, V(0));
  std::copy(w.values + w.offsets[r], w.values + w.offsets[r + 1], copy.begin());
  return copy.data();
}

// The integers of a row: `values` begins with the byte that holds the first one, which is in its
// high bits where `odd`.
struct Integers {
  const uint8_t* values;
  bool odd;
};

// Those of row r, in `copy` where loads may read on behind the last.
Integers integers_of(const FourBits& w, int64_t r, std::vector<uint8_t>& copy) {
  const int64_t begin = w.offsets[r] / 2, end = (w.offsets[r + 1] + 1) / 2;
  const bool odd = w.offsets[r] % 2;
  if (end + BEYOND <= w.offsets[w.out] / 2) return {w.values + begin, odd};
  copy.assign(end - begin + BEYOND, 0);
  std::copy(w.values + begin, w.values + end, copy.begin());
  return {copy.data(), odd};
}

template <class V>
void unpack_plainly(const V* value, const uint8_t* mask, int64_t in, V* row) {
  for (int64_t j = 0; j < in; j++) row[j] = mask[j / 8] >> j % 8 & 1 ? *value++ : V(0);
}

// ------------------------------------------------------------------------- spreading values out
//
// spread<V>(bits, values): the next kept values at the columns whose bit is set, zeros elsewhere.

// For each byte of a mask, from which of the next values every column comes; 0x80: from none.
struct Permutations {
  alignas(64) uint8_t of_one[256][8];    // bytes, or indices of 32-bit values
  alignas(64) uint8_t of_two[256][16];   // bytes of 16-bit values
  Permutations() {
    for (int byte = 0; byte < 256; byte++) {
      for (int bit = 0, next = 0; bit < 8; bit++) {
        const bool kept = byte >> bit & 1;
        of_one[byte][bit] = kept ? next : 0x80;
        of_two[byte][2 * bit] = kept ? 2 * next : 0x80;
        of_two[byte][2 * bit + 1] = kept ? 2 * next + 1 : 0x80;
        next += kept;
      }
    }
  }
};
const Permutations PERMUTATIONS;

FOR_AVX2 INLINE __m128i spread8_of_1(uint8_t bits, const void* values) {
  const auto* order = reinterpret_cast<const __m128i*>(PERMUTATIONS.of_one[bits]);
  return _mm_shuffle_epi8(
      _mm_loadl_epi64(static_cast<const __m128i*>(values)), _mm_loadl_epi64(order));
}

FOR_AVX2 INLINE __m128i spread8_of_2(uint8_t bits, const void* values) {
  const auto* order = reinterpret_cast<const __m128i*>(PERMUTATIONS.of_two[bits]);
  return _mm_shuffle_epi8(
      _mm_loadu_si128(static_cast<const __m128i*>(values)), _mm_load_si128(order));
}

FOR_AVX2 INLINE __m256 spread8_of_4(uint8_t bits, const float* values) {
  const auto* order = reinterpret_cast<const __m128i*>(PERMUTATIONS.of_one[bits]);
  const __m256i index = _mm256_cvtepi8_epi32(_mm_loadl_epi64(order));
  const __m256 all = _mm256_permutevar8x32_ps(_mm256_loadu_ps(values), index);
  return _mm256_blendv_ps(all, _mm256_setzero_ps(), _mm256_castsi256_ps(index));
}

// ------------------------------------------------------------------------------- kinds of steps
//
// A step takes COLUMNS columns of one row: `spread` gives its weights in registers and `add`
// multiplies them by the inputs of one token, X, of which a word of the mask takes STRIDE.

template <class V>
struct Avx2Step {
  using X = float;
  static constexpr int STRIDE = WORD;
  using Sum = __m256;
  using Weights = __m256;
  static constexpr int COLUMNS = 8;
  static constexpr int rows_at_once(int tokens) { return 1; }
  static constexpr int chains(int tokens) { return tokens == 1 ? 4 : tokens == 2 ? 2 : 1; }
  static constexpr bool EVEN_FIRST = false;
  FOR_AVX2 static INLINE Sum zero() { return _mm256_setzero_ps(); }
  FOR_AVX2 static INLINE Weights spread(uint64_t bits, const V* values) {
    const uint8_t byte = static_cast<uint8_t>(bits);
    if constexpr (std::is_same_v<V, float>) {
      return spread8_of_4(byte, values);
    } else if constexpr (std::is_same_v<V, c10::BFloat16>) {
      const __m256i wide = _mm256_cvtepu16_epi32(spread8_of_2(byte, values));
      return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
    } else if constexpr (std::is_same_v<V, c10::Half>) {
      return _mm256_cvtph_ps(spread8_of_2(byte, values));
    } else {
      return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(spread8_of_1(byte, values)));
    }
  }
  FOR_AVX2 static INLINE void add(Sum& sum, const Weights& w, const float* x) {
    sum = _mm256_fmadd_ps(w, _mm256_loadu_ps(x), sum);
  }
  FOR_AVX2 static INLINE float total(Sum sum) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_shuffle_ps(four, four, 1)));
  }
};

struct Avx512Sums {
  using Sum = __m512;
  static constexpr int rows_at_once(int tokens) { return tokens <= 2 ? 1 : 2; }
  static constexpr int chains(int tokens) { return tokens == 1 ? 4 : tokens == 2 ? 2 : 1; }
  FOR_AVX512 static INLINE Sum zero() { return _mm512_setzero_ps(); }
  FOR_AVX512 static INLINE float total(Sum sum) { return _mm512_reduce_add_ps(sum); }
};

// Widened to float32.
template <class V>
struct Avx512Step;

template <>
struct Avx512Step<float> : Avx512Sums {
  using X = float;
  static constexpr int STRIDE = WORD;
  using Weights = __m512;
  static constexpr int COLUMNS = 16;
  static constexpr bool EVEN_FIRST = false;
  FOR_AVX512 static INLINE Weights spread(uint64_t bits, const float* values) {
    return _mm512_maskz_expand_ps(static_cast<__mmask16>(bits), _mm512_loadu_ps(values));
  }
  FOR_AVX512 static INLINE void add(Sum& sum, const Weights& w, const float* x) {
    sum = _mm512_fmadd_ps(w, _mm512_loadu_ps(x), sum);
  }
};

struct TwoVectors {
  __m512 first, second;
};

struct Avx512Pair : Avx512Sums {
  using X = float;
  static constexpr int STRIDE = WORD;
  using Weights = TwoVectors;
  static constexpr int COLUMNS = 32;
  FOR_AVX512 static INLINE void add(Sum& sum, const Weights& w, const float* x) {
    sum = _mm512_fmadd_ps(w.first, _mm512_loadu_ps(x), sum);
    sum = _mm512_fmadd_ps(w.second, _mm512_loadu_ps(x + 16), sum);
  }
};

template <>
struct Avx512Step<c10::BFloat16> : Avx512Pair {
  static constexpr bool EVEN_FIRST = true;  // the halves of 32-bit lanes, without a shuffle
  FOR_AVX512 static INLINE Weights spread(uint64_t bits, const c10::BFloat16* values) {
    const __m512i both = _mm512_maskz_expand_epi16(
        static_cast<__mmask32>(bits), _mm512_loadu_si512(values));
    const __m512i odd = _mm512_and_si512(both, _mm512_set1_epi32(0xffff0000));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(both, 16)), _mm512_castsi512_ps(odd)};
  }
};

template <>
struct Avx512Step<c10::Half> : Avx512Pair {
  static constexpr bool EVEN_FIRST = false;
  FOR_AVX512 static INLINE Weights spread(uint64_t bits, const c10::Half* values) {
    const __m512i both = _mm512_maskz_expand_epi16(
        static_cast<__mmask32>(bits), _mm512_loadu_si512(values));
    return {
        _mm512_cvtph_ps(_mm512_castsi512_si256(both)),
        _mm512_cvtph_ps(_mm512_extracti64x4_epi64(both, 1))};
  }
};

// Widened first: spreading 16-bit values takes half the time of spreading bytes.
FOR_AVX512 INLINE __m512i spread32(uint32_t bits, const int8_t* values) {
  const auto* its = reinterpret_cast<const __m256i*>(values);
  return _mm512_maskz_expand_epi16(bits, _mm512_cvtepi8_epi16(_mm256_loadu_si256(its)));
}

// int8 weights by int16 inputs: the 64 of a word are integers times a scale of their own, which
// stands behind them. Exact but for the inputs' rounding to 15 bits of the largest of the 64, where
// they have 8 or 11 bits themselves.
template <>
struct Avx512Step<int8_t> : Avx512Sums {
  using X = int16_t;
  struct Weights {
    __m512i first, second;
  };
  static constexpr int STRIDE = WORD + sizeof(float) / sizeof(int16_t);
  static constexpr int COLUMNS = WORD;
  static constexpr bool EVEN_FIRST = false;
  static constexpr int chains(int tokens) { return tokens == 1 ? 2 : 1; }
  FOR_AVX512 static INLINE Weights spread(uint64_t bits, const int8_t* values) {
    const uint32_t first = static_cast<uint32_t>(bits), second = bits >> 32;
    return {spread32(first, values), spread32(second, values + __builtin_popcount(first))};
  }
  FOR_AVX512 static INLINE void add(Sum& sum, const Weights& w, const int16_t* x) {
    __m512i products = _mm512_setzero_si512();
    products = _mm512_dpwssd_epi32(products, w.first, _mm512_loadu_si512(x));
    products = _mm512_dpwssd_epi32(products, w.second, _mm512_loadu_si512(x + 32));
    float scale;
    std::memcpy(&scale, x + SCALE_AT, sizeof(scale));
    sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(products), _mm512_set1_ps(scale), sum);
  }
};

FOR_AVX512 INLINE __m512 widened(__m256i integers) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(integers));
}

// int8 weights by float32 inputs, whose every bit counts.
struct WideBytesStep : Avx512Pair {
  static constexpr bool EVEN_FIRST = false;
  FOR_AVX512 static INLINE Weights spread(uint64_t bits, const int8_t* values) {
    const __m512i all = spread32(static_cast<uint32_t>(bits), values);
    return {
        widened(_mm512_castsi512_si256(all)), widened(_mm512_extracti64x4_epi64(all, 1))};
  }
};

// Left in bfloat16, for the dot product of pairs; of inputs and weights that are subnormal it takes
// zero. All int8 values are bfloat16 numbers.
template <class V>
struct Bf16Step : Avx512Sums {
  using X = c10::BFloat16;
  static constexpr int STRIDE = WORD;
  using Weights = __m512i;
  static constexpr int COLUMNS = 32;
  static constexpr bool EVEN_FIRST = false;
  FOR_AVX512_BF16 static INLINE Weights spread(uint64_t bits, const V* values) {
    const __mmask32 mask = static_cast<__mmask32>(bits);
    if constexpr (std::is_same_v<V, c10::BFloat16>) {
      return _mm512_maskz_expand_epi16(mask, _mm512_loadu_si512(values));
    } else {
      const __m512i all = spread32(mask, values);
      return (__m512i)_mm512_cvtne2ps_pbh(
          widened(_mm512_extracti64x4_epi64(all, 1)), widened(_mm512_castsi512_si256(all)));
    }
  }
  FOR_AVX512_BF16 static INLINE void add(Sum& sum, const Weights& w, const X* x) {
    sum = _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)_mm512_loadu_si512(x));
  }
};

// ------------------------------------------------------------------------------------- the rows
//
// The same loop for each set of instructions, because a function has one set.

#define DEFINE_ROWS(NAME, TARGET)                                                                  \
  template <class Step, int TOKENS, int ROWS, int CHAINS, class V>                                 \
  TARGET INLINE void NAME##_word(                                                                  \
      const uint64_t (&bits)[ROWS], const V* (&values)[ROWS], const typename Step::X* x,           \
      typename Step::Sum (&sum)[ROWS][TOKENS][CHAINS], int chain) {                                \
    constexpr uint64_t ALL = ~0ull >> (WORD - Step::COLUMNS);                                      \
    _Pragma("GCC unroll 8") for (int step = 0; step < WORD / Step::COLUMNS; step++) {              \
      typename Step::Weights w[ROWS];                                                              \
      _Pragma("GCC unroll 4") for (int r = 0; r < ROWS; r++) {                                     \
        const uint64_t its = bits[r] >> (step * Step::COLUMNS);                                    \
        w[r] = Step::spread(its, values[r]);                                                       \
        values[r] += __builtin_popcountll(its & ALL);                                              \
      }                                                                                            \
      _Pragma("GCC unroll 8") for (int t = 0; t < TOKENS; t++) {                                   \
        const auto* its = x + t * Step::STRIDE + step * Step::COLUMNS;                             \
        _Pragma("GCC unroll 4") for (int r = 0; r < ROWS; r++)                                     \
            Step::add(sum[r][t][(chain + step) % CHAINS], w[r], its);                              \
      }                                                                                            \
    }                                                                                              \
  }                                                                                                \
                                                                                                   \
  template <class Step, int TOKENS, int ROWS, class V>                                             \
  TARGET void NAME##_sums(                                                                         \
      const V* const* starts, const uint8_t* const* masks, int64_t stride,                         \
      const typename Step::X* x, float* sums) {                                                    \
    constexpr int CHAINS = Step::chains(TOKENS), STEPS = WORD / Step::COLUMNS;                     \
    constexpr int WORDS = CHAINS > STEPS ? CHAINS / STEPS : 1; /* that start no chain twice */     \
    const int64_t words = (stride + 7) / 8, whole = stride / 8;                                    \
    typename Step::Sum sum[ROWS][TOKENS][CHAINS];                                                  \
    const V* values[ROWS];                                                                         \
    for (int r = 0; r < ROWS; r++) {                                                               \
      values[r] = starts[r];                                                                       \
      for (int t = 0; t < TOKENS; t++)                                                             \
        for (int c = 0; c < CHAINS; c++) sum[r][t][c] = Step::zero();                              \
    }                                                                                              \
    int64_t k = 0;                                                                                 \
    uint64_t bits[ROWS];                                                                           \
    for (; k + WORDS <= whole; k += WORDS) {                                                       \
      for (int r = 0; r < ROWS; r++) {                                                             \
        __builtin_prefetch(reinterpret_cast<const char*>(values[r]) + AHEAD);                      \
        __builtin_prefetch(masks[r] + k * 8 + AHEAD / 4);                                          \
      }                                                                                            \
      _Pragma("GCC unroll 4") for (int i = 0; i < WORDS; i++) {                                    \
        for (int r = 0; r < ROWS; r++) std::memcpy(&bits[r], masks[r] + (k + i) * 8, 8);           \
        NAME##_word<Step, TOKENS, ROWS, CHAINS, V>(                                                \
            bits, values, x + (k + i) * TOKENS * Step::STRIDE, sum, i * STEPS);                    \
      }                                                                                            \
    }                                                                                              \
    for (; k < words; k++) {                                                                       \
      for (int r = 0; r < ROWS; r++) bits[r] = mask_word(masks[r], k, stride);                     \
      NAME##_word<Step, TOKENS, ROWS, CHAINS, V>(                                                  \
          bits, values, x + k * TOKENS * Step::STRIDE, sum, 0);                                    \
    }                                                                                              \
    for (int r = 0; r < ROWS; r++) {                                                               \
      for (int t = 0; t < TOKENS; t++) {                                                           \
        float all = 0;                                                                             \
        for (int c = 0; c < CHAINS; c++) all += Step::total(sum[r][t][c]);                         \
        sums[r * TOKENS + t] = all;                                                                \
      }                                                                                            \
    }                                                                                              \
  }                                                                                                \
                                                                                                   \
  template <class Step, int TOKENS, class V>                                                       \
  TARGET void NAME##_rows(                                                                         \
      const Weight<V>& w, const typename Step::X* x, float* y, int64_t from, int64_t to) {         \
    constexpr int ROWS = Step::rows_at_once(TOKENS);                                               \
    const int64_t stride = w.stride(), nnz = w.offsets[w.out];                                     \
    float sums[ROWS * TOKENS];                                                                     \
    std::vector<V> copy;                                                                           \
    for (int64_t r = from; r < to;) {                                                              \
      const V* starts[ROWS];                                                                       \
      const uint8_t* masks[ROWS];                                                                  \
      const bool apart = r + ROWS > to || w.offsets[r + ROWS] + BEYOND > nnz;                      \
      const int rows = apart ? 1 : ROWS;                                                           \
      for (int i = 0; i < rows; i++) {                                                             \
        starts[i] = w.values + w.offsets[r + i];                                                   \
        masks[i] = w.mask_of(r + i);                                                           \
      }                                                                                            \
      if (apart) { /* with room behind its last value */                                           \
        starts[0] = with_room(w, r, copy);                                                         \
        NAME##_sums<Step, TOKENS, 1, V>(starts, masks, stride, x, sums);                           \
      } else {                                                                                     \
        NAME##_sums<Step, TOKENS, ROWS, V>(starts, masks, stride, x, sums);                        \
      }                                                                                            \
      for (int i = 0; i < rows; i++)                                                               \
        for (int t = 0; t < TOKENS; t++) y[t * w.out + r + i] = sums[i * TOKENS + t];              \
      r += rows;                                                                                   \
    }                                                                                              \
  }

DEFINE_ROWS(avx2, FOR_AVX2)
DEFINE_ROWS(avx512, FOR_AVX512)
DEFINE_ROWS(avx512_bf16, FOR_AVX512_BF16)

template <class V>
FOR_AVX2 void avx2_unpack(const V* values, const uint8_t* mask, int64_t in, V* row) {
  for (int64_t j = 0; j + 8 <= in; j += 8) {
    const uint8_t bits = mask[j / 8];
    if constexpr (sizeof(V) == 1) {
      _mm_storel_epi64(reinterpret_cast<__m128i*>(row + j), spread8_of_1(bits, values));
    } else if constexpr (sizeof(V) == 2) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(row + j), spread8_of_2(bits, values));
    } else {
      _mm256_storeu_ps(row + j, spread8_of_4(bits, values));
    }
    values += __builtin_popcount(bits);
  }
  unpack_plainly(values, mask + in / 8, in % 8, row + in / 8 * 8);
}

// Integers times `scale`, rounded to T: as many as fill vectors; how many.
template <class T>
FOR_AVX2 int64_t avx2_scaled(const int8_t* values, int64_t count, float scale, T* row) {
  const __m256 factor = _mm256_set1_ps(scale);
  int64_t j = 0;
  for (; j + 8 <= count; j += 8) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(values + j));
    const __m256 wide = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)), factor);
    auto* to = reinterpret_cast<__m128i*>(row + j);
    if constexpr (std::is_same_v<T, float>) {
      _mm256_storeu_ps(row + j, wide);
    } else if constexpr (std::is_same_v<T, c10::Half>) {
      _mm_storeu_si128(to, _mm256_cvtps_ph(wide, _MM_FROUND_TO_NEAREST_INT));
    } else {  // to the nearest, ties to even; scales are finite
      const __m256i bits = _mm256_castps_si256(wide);
      const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
      const __m256i half = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
      const __m256i high = _mm256_srli_epi32(_mm256_add_epi32(bits, half), 16);
      const __m256i both = _mm256_packus_epi32(high, high);
      _mm_storeu_si128(to, _mm256_castsi256_si128(_mm256_permute4x64_epi64(both, 0x08)));
    }
  }
  return j;
}

template <class V>
FOR_AVX512 INLINE __m512i spread64_bytes(uint64_t bits, const V* values) {
  const __m512i next = _mm512_loadu_si512(values);
  if constexpr (sizeof(V) == 1) {
    return _mm512_maskz_expand_epi8(bits, next);
  } else if constexpr (sizeof(V) == 2) {
    return _mm512_maskz_expand_epi16(static_cast<__mmask32>(bits), next);
  } else {
    return _mm512_maskz_expand_epi32(static_cast<__mmask16>(bits), next);
  }
}

template <class V>
FOR_AVX512 void avx512_unpack(const V* values, const uint8_t* mask, int64_t in, V* row) {
  constexpr int64_t COLUMNS = 64 / sizeof(V);
  constexpr uint64_t ALL = ~0ull >> (64 - COLUMNS);
  int64_t j = 0;
  for (; j + WORD <= in; j += WORD) {
    uint64_t bits;
    std::memcpy(&bits, mask + j / 8, 8);
    _Pragma("GCC unroll 4") for (int64_t c = 0; c < WORD; c += COLUMNS) {
      const uint64_t its = bits >> c & ALL;
      _mm512_storeu_si512(row + j + c, spread64_bytes(its, values));
      values += __builtin_popcountll(its);
    }
  }
  unpack_plainly(values, mask + j / 8, in - j, row + j);
}

// --------------------------------------------------------------------------------- 4-bit weights
//
// By AVX2 a row's integers are unpacked first, to a byte each; by AVX-512 64 of them as they come.

FOR_AVX2 INLINE __m128i spread16_of_1(uint16_t bits, const int8_t* values) {
  const uint8_t first = static_cast<uint8_t>(bits), second = bits >> 8;
  return _mm_unpacklo_epi64(
      spread8_of_1(first, values), spread8_of_1(second, values + __builtin_popcount(first)));
}

// The integers of row r, a byte each, in `codes`; returns where the first one stands there.
FOR_AVX2 const int8_t* avx2_codes(
    const FourBits& w, int64_t r, std::vector<uint8_t>& copy, std::vector<int8_t>& codes) {
  const Integers integers = integers_of(w, r, copy);
  const int64_t count = w.offsets[r + 1] - w.offsets[r] + integers.odd;
  codes.resize(w.in + 2 * BEYOND);
  const __m256i low = _mm256_set1_epi16(0x000f), high = _mm256_set1_epi16(0x0f00);
  const __m256i eight = _mm256_set1_epi8(8);
  for (int64_t i = 0; i < count; i += 32) {
    const auto* its = reinterpret_cast<const __m128i*>(integers.values + i / 2);
    const __m256i pairs = _mm256_cvtepu8_epi16(_mm_loadu_si128(its));
    const __m256i fields = _mm256_or_si256(
        _mm256_and_si256(pairs, low), _mm256_and_si256(_mm256_slli_epi16(pairs, 4), high));
    auto* to = reinterpret_cast<__m256i*>(codes.data() + i);
    _mm256_storeu_si256(to, _mm256_sub_epi8(_mm256_xor_si256(fields, eight), eight));
  }
  return codes.data() + integers.odd;
}

// Which bytes eight integers come from, at which bits they begin (where the first one is in a
// byte's low bits, and where not), and their values by their last six bits.
struct FieldTables {
  alignas(64) uint8_t bytes[64];
  alignas(64) uint8_t shifts[2][64];
  alignas(64) int8_t values[64];
  FieldTables() {
    for (int i = 0; i < 64; i++) {
      bytes[i] = static_cast<uint8_t>(i / 8 * 4 + i % 8);
      shifts[0][i] = static_cast<uint8_t>(i % 8 * 4);
      shifts[1][i] = static_cast<uint8_t>(i % 8 * 4 + 4);
      values[i] = static_cast<int8_t>((i % 16 ^ 8) - 8);
    }
  }
};
const FieldTables FIELDS;

// 64 integers from position `next` of a row on, spread to the columns whose bit is set.
FOR_AVX512 INLINE __m512i four_bits_64(const Integers& integers, int64_t next, uint64_t bits) {
  next += integers.odd;
  const __m512i bytes = _mm512_permutexvar_epi8(
      _mm512_load_si512(FIELDS.bytes), _mm512_loadu_si512(integers.values + next / 2));
  const __m512i fields = _mm512_multishift_epi64_epi8(
      _mm512_load_si512(FIELDS.shifts[next & 1]), bytes);
  const __m512i codes = _mm512_permutexvar_epi8(fields, _mm512_load_si512(FIELDS.values));
  return _mm512_maskz_expand_epi8(bits, codes);
}

FOR_AVX2 INLINE __m256 as_floats(__m256 sums) { return sums; }
FOR_AVX2 INLINE __m256 as_floats(__m256i sums) { return _mm256_cvtepi32_ps(sums); }

// By float32 inputs, or by integers, see Avx512Step<int8_t>. The columns of a word have one scale.
template <int TOKENS, class X>
FOR_AVX2 void avx2_rows(const FourBits& w, const X* x, float* y, int64_t from, int64_t to) {
  constexpr bool BY_INTEGERS = std::is_same_v<X, int16_t>;
  constexpr int STRIDE = BY_INTEGERS ? Avx512Step<int8_t>::STRIDE : WORD;
  using Sum = std::conditional_t<BY_INTEGERS, __m256i, __m256>;
  const int64_t words = (w.stride() + 7) / 8, whole = w.stride() / 8;
  std::vector<uint8_t> copy;
  std::vector<int8_t> codes;
  for (int64_t r = from; r < to; r++) {
    const int8_t* values = avx2_codes(w, r, copy, codes);
    const uint8_t* mask = w.mask_of(r);
    __m256 sums[TOKENS] = {};
    for (int64_t k = 0; k < words; k++) {
      const uint64_t bits = k < whole ? whole_word(mask, k) : mask_word(mask, k, w.stride());
      const X* word = x + k * TOKENS * STRIDE;
      Sum products[TOKENS] = {};
      _Pragma("GCC unroll 4") for (int c = 0; c < WORD; c += 16) {
        const uint16_t its = static_cast<uint16_t>(bits >> c);
        const __m128i some = spread16_of_1(its, values);
        values += __builtin_popcount(its);
        _Pragma("GCC unroll 8") for (int t = 0; t < TOKENS; t++) {
          const X* inputs = word + t * STRIDE + c;
          if constexpr (BY_INTEGERS) {
            const auto* all = reinterpret_cast<const __m256i*>(inputs);
            products[t] = _mm256_add_epi32(products[t], _mm256_madd_epi16(
                _mm256_cvtepi8_epi16(some), _mm256_loadu_si256(all)));
          } else {
            for (int i = 0; i < 16; i += 8) {
              const __m128i eight = i ? _mm_srli_si128(some, 8) : some;
              const __m256 weights = as_floats(_mm256_cvtepi8_epi32(eight));
              products[t] = _mm256_fmadd_ps(weights, _mm256_loadu_ps(inputs + i), products[t]);
            }
          }
        }
      }
      _Pragma("GCC unroll 8") for (int t = 0; t < TOKENS; t++) {
        float step = 1;
        if constexpr (BY_INTEGERS) std::memcpy(&step, word + t * STRIDE + SCALE_AT, sizeof(step));
        const __m256 all = as_floats(products[t]);
        sums[t] = _mm256_fmadd_ps(all, _mm256_set1_ps(step * w.scales_of(r)[k]), sums[t]);
      }
    }
    for (int t = 0; t < TOKENS; t++) y[t * w.out + r] = Avx2Step<float>::total(sums[t]);
  }
}

template <int TOKENS, class X>
FOR_AVX512 void avx512_rows(const FourBits& w, const X* x, float* y, int64_t from, int64_t to) {
  constexpr bool BY_INTEGERS = std::is_same_v<X, int16_t>;
  constexpr int STRIDE = BY_INTEGERS ? Avx512Step<int8_t>::STRIDE : WORD;
  const int64_t words = (w.stride() + 7) / 8, whole = w.stride() / 8;
  std::vector<uint8_t> copy;
  for (int64_t r = from; r < to; r++) {
    const Integers integers = integers_of(w, r, copy);
    const uint8_t* mask = w.mask_of(r);
    const c10::BFloat16* scales = w.scales_of(r);
    __m512 sums[TOKENS];
    for (int t = 0; t < TOKENS; t++) sums[t] = _mm512_setzero_ps();
    int64_t next = 0;
    for (int64_t k = 0; k < words; k++) {
      const uint64_t bits = k < whole ? whole_word(mask, k) : mask_word(mask, k, w.stride());
      __builtin_prefetch(integers.values + next / 2 + AHEAD);
      const __m512i codes = four_bits_64(integers, next, bits);
      next += __builtin_popcountll(bits);
      const X* word = x + k * TOKENS * STRIDE;
      if constexpr (BY_INTEGERS) {
        const __m512i first = _mm512_cvtepi8_epi16(_mm512_castsi512_si256(codes));
        const __m512i second = _mm512_cvtepi8_epi16(_mm512_extracti64x4_epi64(codes, 1));
        _Pragma("GCC unroll 8") for (int t = 0; t < TOKENS; t++, word += STRIDE) {
          float step;
          std::memcpy(&step, word + SCALE_AT, sizeof(step));
          __m512i products = _mm512_setzero_si512();
          products = _mm512_dpwssd_epi32(products, first, _mm512_loadu_si512(word));
          products = _mm512_dpwssd_epi32(products, second, _mm512_loadu_si512(word + 32));
          const __m512 part = _mm512_cvtepi32_ps(products);
          sums[t] = _mm512_fmadd_ps(part, _mm512_set1_ps(step * scales[k]), sums[t]);
        }
      } else {
        alignas(64) int8_t each[WORD];
        _mm512_store_si512(each, codes);
        const __m512 scale = _mm512_set1_ps(scales[k]);
        _Pragma("GCC unroll 4") for (int c = 0; c < WORD; c += 16) {
          const __m128i some = _mm_load_si128(reinterpret_cast<const __m128i*>(each + c));
          const __m512 weights = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(some)) * scale;
          _Pragma("GCC unroll 8") for (int t = 0; t < TOKENS; t++)
              sums[t] = _mm512_fmadd_ps(weights, _mm512_loadu_ps(word + t * WORD + c), sums[t]);
        }
      }
    }
    for (int t = 0; t < TOKENS; t++) y[t * w.out + r] = _mm512_reduce_add_ps(sums[t]);
  }
}

// ------------------------------------------------------------------- one token, bytes by bytes
//
// An input is 256 times one signed byte plus another, and a weight, moved up by ZERO, an unsigned
// one: dot products of bytes then take 64 columns at a time, without widening. A pruned weight is
// ZERO, and what ZERO adds to a sum, which depends on the inputs alone, is taken off: 256ths of it
// as what the sum begins with, and the rest, which is small, once for many words.

constexpr float LARGEST = 127 * 256 + 127;  // that two signed bytes hold with either sign

struct alignas(64) ByteWord {
  int8_t high[WORD], low[WORD];
  int32_t start[16];  // of the sums of four columns by `high`
};

struct ByteInputs {
  std::vector<ByteWord> words;
  std::vector<float> steps;  // what a word's integers are to be multiplied by
  std::vector<float> rests;  // left to add to the sums of a word
};

// The 64 weights of a word, moved up, by the inputs: sums of four columns each.
FOR_AVX512 INLINE __m512 byte_products(__m512i weights, const ByteWord& x) {
  const __m512i high = _mm512_dpbusd_epi32(
      _mm512_load_si512(x.start), weights, _mm512_load_si512(x.high));
  return _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(
      _mm512_slli_epi32(high, 8), weights, _mm512_load_si512(x.low)));
}

// 8-bit integers.
FOR_AVX512 void avx512_row_by_row(
    const Weight<int8_t>& w, const ByteInputs& x, float* y, int64_t from, int64_t to) {
  const int64_t stride = w.stride(), words = (stride + 7) / 8, nnz = w.offsets[w.out];
  const __m512i zero = _mm512_set1_epi8(ZERO_OF_8);
  float rest = 0;
  for (int64_t k = 0; k < words; k++) rest += x.rests[k];
  std::vector<int8_t> copy;
  for (int64_t r = from; r < to; r++) {
    const bool last = w.offsets[r + 1] + BEYOND > nnz;
    const int8_t* values = last ? with_room(w, r, copy) : w.values + w.offsets[r];
    __m512 sum = _mm512_setzero_ps();
    for (int64_t k = 0; k < words; k++) {
      __builtin_prefetch(values + AHEAD);
      __m512i weights = _mm512_xor_si512(_mm512_loadu_si512(values), zero);
      if ((k + 1) * WORD > w.in)
        weights = _mm512_mask_expand_epi8(zero, mask_word(w.mask, k, stride), weights);
      values += WORD;
      sum = _mm512_fmadd_ps(byte_products(weights, x.words[k]), _mm512_set1_ps(x.steps[k]), sum);
    }
    y[r] = _mm512_reduce_add_ps(sum) + rest;
  }
}

FOR_AVX512 INLINE __m512 widened_scales(__m256i scales) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(scales), 16));
}

// For row r, what its words' integers are to be multiplied by; returns what its sums begin with.
FOR_AVX512 INLINE __m512 word_factors(
    const FourBits& w, int64_t r, const ByteInputs& x, float* factors) {
  const auto* scales = w.scales_of(r);
  __m512 sum = _mm512_setzero_ps();
  for (int64_t k = 0; k * WORD < w.in; k += 16) {
    const int64_t left = w.groups() - k;
    const __mmask16 some = left >= 16 ? 0xffff : (1u << left) - 1;
    const __m512 its = widened_scales(_mm256_maskz_loadu_epi16(some, scales + k));
    _mm512_storeu_ps(factors + k, _mm512_mul_ps(its, _mm512_loadu_ps(x.steps.data() + k)));
    sum = _mm512_fmadd_ps(its, _mm512_loadu_ps(x.rests.data() + k), sum);
  }
  return sum;
}

// 4-bit integers, two in each of `bytes` bytes, moved up, one in a byte; writes 64 at a time.
FOR_AVX512 INLINE void unsigned_codes(const uint8_t* values, int64_t bytes, uint8_t* codes) {
  const __m512i order = _mm512_load_si512(FIELDS.bytes);
  const __m512i shifts = _mm512_load_si512(FIELDS.shifts[0]);
  const __m512i low = _mm512_set1_epi8(15), zero = _mm512_set1_epi8(ZERO_OF_4);
  const auto spread = [&](__m256i its) __attribute__((always_inline)) FOR_AVX512 {
    const __m512i pairs = _mm512_permutexvar_epi8(order, _mm512_castsi256_si512(its));
    const __m512i fields = _mm512_multishift_epi64_epi8(shifts, pairs);
    return _mm512_ternarylogic_epi32(fields, low, zero, 0x6a);  // (fields & low) ^ zero
  };
  int64_t i = 0;
  for (; i + 32 <= bytes; i += 32) {
    __builtin_prefetch(values + i + AHEAD);
    const auto* its = reinterpret_cast<const __m256i*>(values + i);
    _mm512_storeu_si512(codes + 2 * i, spread(_mm256_loadu_si256(its)));
  }
  const __mmask32 left = (1u << (bytes - i)) - 1;
  _mm512_storeu_si512(codes + 2 * i, spread(_mm256_maskz_loadu_epi8(left, values + i)));
}

// 4-bit integers, of some rows at a time unpacked to bytes.
FOR_AVX512 void avx512_row_by_row(
    const FourBits& w, const ByteInputs& x, float* y, int64_t from, int64_t to) {
  const int64_t stride = w.stride(), words = (stride + 7) / 8, whole = stride / 8;
  const int64_t padded = (words + 15) / 16 * 16;  // factors of a row
  const __m512i zero = _mm512_set1_epi8(ZERO_OF_4);
  std::vector<uint8_t> codes;
  std::vector<float> factors(AT_ONCE * padded);
  __m512 sums[AT_ONCE];
  for (int64_t r = from, rows; r < to; r += rows) {
    const int64_t begin = w.offsets[r] / 2 * 2;
    for (rows = 1; rows < AT_ONCE && r + rows < to; rows++)
      if (w.offsets[r + rows + 1] - begin > UNPACKED) break;
    const int64_t bytes = (w.offsets[r + rows] - begin + 1) / 2;
    if (static_cast<int64_t>(codes.size()) < 2 * bytes + WORD + BEYOND)
      codes.resize(std::max(2 * bytes, UNPACKED + 2) + WORD + BEYOND);
    unsigned_codes(w.values + begin / 2, bytes, codes.data());
    for (int64_t i = 0; i < rows; i++)
      sums[i] = word_factors(w, r + i, x, factors.data() + i * padded);
    for (int64_t i = 0; i < rows; i++) {
      const uint8_t* values = codes.data() + (w.offsets[r + i] - begin);
      const uint8_t* mask = w.mask_of(r + i);
      const float* its = factors.data() + i * padded;
      __m512 sum = sums[i];
      for (int64_t k = 0; k < words; k++) {
        const uint64_t bits = k < whole ? whole_word(mask, k) : mask_word(mask, k, stride);
        __builtin_prefetch(mask + k * 8 + AHEAD / 4);
        __m512i next = _mm512_loadu_si512(values);
        asm("" : "+v"(next));  // expanding from memory takes longer
        const __m512i weights = _mm512_mask_expand_epi8(zero, bits, next);
        values += __builtin_popcountll(bits);
        sum = _mm512_fmadd_ps(
            byte_products(weights, x.words[k]), _mm512_set1_ps(its[k]), sum);
      }
      y[r + i] = _mm512_reduce_add_ps(sum);
    }
  }
}

FOR_AVX512 void avx512_spread(
    const Integers& integers, const uint8_t* mask, int64_t in, int8_t* row) {
  int64_t next = 0;
  for (int64_t k = 0; k * WORD < in; k++) {
    const uint64_t bits = mask_word(mask, k, (in + 7) / 8);
    _mm512_storeu_si512(row + k * WORD, four_bits_64(integers, next, bits));
    next += __builtin_popcountll(bits);
  }
}
// ------------------------------------------------------------------------------ one to 8 tokens

template <class From>
FOR_AVX512 INLINE __m512 widened_16(const From* from, __mmask16 some) {
  if constexpr (std::is_same_v<From, float>) {
    return _mm512_maskz_loadu_ps(some, from);
  } else if constexpr (std::is_same_v<From, c10::Half>) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(some, from));
  } else {
    return widened_scales(_mm256_maskz_loadu_epi16(some, from));
  }
}

// The inputs of a word as integers up to `limit`, which is what they are to be multiplied by for
// that: what isn't finite makes `step` NaN. False where the largest input is so large beside the
// small ones that their rounding would show.
template <class From>
FOR_AVX512 INLINE bool as_integers(
    const From* from, int64_t columns, float limit, __m512i (&integers)[4], float& step) {
  const uint64_t all = columns < WORD ? (1ull << columns) - 1 : ~0ull;
  __m512 inputs[4], largest_of = _mm512_setzero_ps(), nothing = _mm512_setzero_ps();
  for (int i = 0; i < 4; i++) {
    inputs[i] = widened_16(from + 16 * i, static_cast<__mmask16>(all >> 16 * i));
    integers[i] = _mm512_setzero_si512();
    largest_of = _mm512_max_ps(_mm512_abs_ps(inputs[i]), largest_of);
    nothing = _mm512_add_ps(nothing, _mm512_sub_ps(inputs[i], inputs[i]));  // NaN if not finite
  }
  const float largest = _mm512_reduce_max_ps(largest_of);
  step = largest / limit + _mm512_reduce_add_ps(nothing);
  if (!(step >= std::numeric_limits<float>::min())) return true;  // too small to matter, or NaN
  const __m512 inverse = _mm512_set1_ps(1 / step), below = _mm512_set1_ps(SMALL * largest);
  __m512 squares = _mm512_setzero_ps();
  int count = 0;
  for (int i = 0; i < 4; i++) {
    const __m512 size = _mm512_abs_ps(inputs[i]);
    const __mmask16 small = _mm512_cmp_ps_mask(size, below, _CMP_LT_OQ) &
        _mm512_cmp_ps_mask(size, _mm512_setzero_ps(), _CMP_GT_OQ);
    squares = _mm512_mask3_fmadd_ps(size, size, squares, small);
    count += __builtin_popcount(small);
    integers[i] = _mm512_cvtps_epi32(_mm512_mul_ps(inputs[i], inverse));
  }
  return largest * largest * count <= RANGE * RANGE * _mm512_reduce_add_ps(squares);
}

// As int16, and behind them the float that they are to be multiplied by.
template <class From>
FOR_AVX512 bool as_words(const From* from, int64_t columns, int16_t* word) {
  __m512i integers[4];
  float step;
  const bool fine = as_integers(from, columns, INT16_MAX, integers, step);
  std::memcpy(word + SCALE_AT, &step, sizeof(step));
  for (int i = 0; i < 4; i++)
    _mm256_storeu_si256(
        reinterpret_cast<__m256i*>(word + 16 * i), _mm512_cvtepi32_epi16(integers[i]));
  return fine;
}

// The same by AVX2.
template <class From>
FOR_AVX2 bool avx2_as_words(const From* from, int64_t columns, int16_t* word) {
  From its[WORD] = {};
  std::copy(from, from + columns, its);
  const __m256 none = _mm256_setzero_ps(), sign = _mm256_set1_ps(-0.f);
  __m256 inputs[8], largest_of = none, nothing = none, squares = none;
  for (int i = 0; i < 8; i++) {
    inputs[i] = Avx2Step<From>::spread(0xff, its + 8 * i);
    largest_of = _mm256_max_ps(_mm256_andnot_ps(sign, inputs[i]), largest_of);
    nothing = _mm256_add_ps(nothing, _mm256_sub_ps(inputs[i], inputs[i]));
  }
  float lanes[8];
  _mm256_storeu_ps(lanes, largest_of);
  const float largest = *std::max_element(lanes, lanes + 8);
  const float step = largest / INT16_MAX + Avx2Step<float>::total(nothing);
  std::memcpy(word + SCALE_AT, &step, sizeof(step));
  if (!(step >= std::numeric_limits<float>::min())) return true;
  const __m256 inverse = _mm256_set1_ps(1 / step), below = _mm256_set1_ps(SMALL * largest);
  int count = 0;
  for (int i = 0; i < 8; i++) {
    const __m256 size = _mm256_andnot_ps(sign, inputs[i]);
    const __m256 small = _mm256_and_ps(
        _mm256_cmp_ps(size, below, _CMP_LT_OQ), _mm256_cmp_ps(size, none, _CMP_GT_OQ));
    count += __builtin_popcount(_mm256_movemask_ps(small));
    squares = _mm256_fmadd_ps(size, _mm256_and_ps(size, small), squares);
    const __m256i integers = _mm256_cvtps_epi32(_mm256_mul_ps(inputs[i], inverse));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(word + 8 * i), _mm_packs_epi32(
        _mm256_castsi256_si128(integers), _mm256_extracti128_si256(integers, 1)));
  }
  return largest * largest * count <= RANGE * RANGE * Avx2Step<float>::total(squares);
}

// One token's inputs (in,) for weights moved up by `zero`; none where integers can't hold them.
template <class From>
FOR_AVX512 ByteInputs as_bytes(const From* from, int64_t in, int zero) {
  const int64_t words = (in + WORD - 1) / WORD;
  const int64_t padded = (words + 15) / 16 * 16;
  ByteInputs to;
  to.words.resize(words);
  to.steps.resize(padded), to.rests.resize(padded);
  const __m512i half = _mm512_set1_epi32(128), zeros = _mm512_set1_epi8(static_cast<char>(zero));
  for (int64_t k = 0; k < words; k++) {
    ByteWord& word = to.words[k];
    __m512i integers[4];
    const int64_t columns = std::min(WORD, in - k * WORD);
    if (!as_integers(from + k * WORD, columns, LARGEST, integers, to.steps[k])) return {};
    for (int i = 0; i < 4; i++) {
      const __m512i high = _mm512_srai_epi32(_mm512_add_epi32(integers[i], half), 8);
      _mm_store_si128(reinterpret_cast<__m128i*>(word.high) + i, _mm512_cvtepi32_epi8(high));
      _mm_store_si128(reinterpret_cast<__m128i*>(word.low) + i, _mm512_cvtepi32_epi8(integers[i]));
    }
    __m512i sums = _mm512_dpbusd_epi32(
        _mm512_setzero_si512(), zeros, _mm512_load_si512(word.high));
    sums = _mm512_dpbusd_epi32(_mm512_slli_epi32(sums, 8), zeros, _mm512_load_si512(word.low));
    sums = _mm512_sub_epi32(_mm512_setzero_si512(), sums);
    _mm512_store_si512(word.start, _mm512_srai_epi32(sums, 8));
    const __m512i rest = _mm512_and_si512(sums, _mm512_set1_epi32(255));
    to.rests[k] = to.steps[k] * _mm512_reduce_add_epi32(rest);
  }
  return to;
}

// Inputs (tokens, in) as a step takes them: word by word of the mask, and there token by token,
// (words, padded, Step::STRIDE), zeros behind the last. None where integers can't hold them.
template <class Step, class From>
std::vector<typename Step::X> arranged(
    const From* x, int64_t tokens, int64_t in, int64_t padded, Path path = AVX512) {
  using X = typename Step::X;
  const int64_t words = (in + WORD - 1) / WORD;
  std::vector<X> to(words * padded * Step::STRIDE, X(0));
  for (int64_t t = 0; t < tokens; t++) {
    for (int64_t k = 0; k < words; k++) {
      X* word = to.data() + (k * padded + t) * Step::STRIDE;
      const From* from = x + t * in + k * WORD;
      const int64_t columns = std::min(WORD, in - k * WORD);
      if constexpr (std::is_same_v<X, int16_t>) {
        const auto as = path < AVX512 ? avx2_as_words<From> : as_words<From>;
        if (!as(from, columns, word)) return {};
      } else if constexpr (Step::EVEN_FIRST) {
        for (int64_t j = 0; j < columns; j++)
          word[j / 32 * 32 + j % 2 * 16 + j % 32 / 2] = static_cast<X>(from[j]);
      } else {
        for (int64_t j = 0; j < columns; j++) word[j] = static_cast<X>(from[j]);
      }
    }
  }
  return to;
}

// y (padded, out), float32, by SUMS(from, to) for ranges of rows on torch's threads; then FINISH.
template <class Sums, class Finish>
void over_rows(int64_t out, int64_t in, const Sums& sums, const Finish& finish) {
  const int64_t grain = std::max<int64_t>(16, (1 << 16) / std::max<int64_t>(in, 1));
  at::parallel_for(0, out, grain, [&](int64_t from, int64_t to) {
    sums(from, to);
    finish(from, to);
  });
}

// Tokens for which there is a loop: others are made up to them by zeros.
int64_t padded_tokens(int64_t tokens) {
  return tokens <= 2 ? tokens : tokens <= 4 ? 4 : 8;
}

#define DEFINE_BY_TOKENS(NAME)                                                                  \
  template <class Step, class V>                                                                \
  void NAME##_by_tokens(                                                                        \
      const Weight<V>& w, const typename Step::X* x, int64_t tokens, float* y, int64_t from,    \
      int64_t to) {                                                                             \
    switch (tokens) {                                                                           \
      case 1: return NAME##_rows<Step, 1, V>(w, x, y, from, to);                                \
      case 2: return NAME##_rows<Step, 2, V>(w, x, y, from, to);                                \
      case 4: return NAME##_rows<Step, 4, V>(w, x, y, from, to);                                \
      default: return NAME##_rows<Step, 8, V>(w, x, y, from, to);                               \
    }                                                                                           \
  }

DEFINE_BY_TOKENS(avx2)
DEFINE_BY_TOKENS(avx512)
DEFINE_BY_TOKENS(avx512_bf16)

// x (tokens, in), at most FEW tokens -> y (tokens, out), both T.
template <class V, class T>
void small_batch(
    const Weight<V>& w, const T* x, int64_t tokens, const T* bias, T* y, Path path) {
  const std::unique_ptr<float[]> sums(new float[FEW * w.out]);  // not touched before it is written
  const auto finish = [&](int64_t from, int64_t to) {
    for (int64_t t = 0; t < tokens; t++) {
      for (int64_t r = from; r < to; r++) {
        float sum = sums[t * w.out + r];
        if (w.scale) sum *= w.scale[r];
        if (bias) sum += static_cast<float>(bias[r]);
        y[t * w.out + r] = static_cast<T>(sum);
      }
    }
  };
#define WITH(NAME, STEP)                                                                        \
  {                                                                                             \
    const int64_t padded = padded_tokens(tokens);                                               \
    const auto inputs = arranged<STEP>(x, tokens, w.in, padded);                                \
    if (!inputs.empty()) {                                                                      \
      const auto rows = [&](int64_t from, int64_t to) {                                         \
        NAME##_by_tokens<STEP, V>(w, inputs.data(), padded, sums.get(), from, to);              \
      };                                                                                        \
      return over_rows(w.out, w.in, rows, finish);                                              \
    }                                                                                           \
  }
  constexpr bool pairs = std::is_same_v<T, c10::BFloat16> &&
      (std::is_same_v<V, c10::BFloat16> || std::is_same_v<V, int8_t>);
  if constexpr (pairs)
    if (path == AVX512_BF16 && (sizeof(V) == 2 || tokens > 4)) WITH(avx512_bf16, Bf16Step<V>)
  if constexpr (std::is_same_v<V, int8_t> && std::is_same_v<T, float>)
    if (path >= AVX512) WITH(avx512, WideBytesStep)
  if constexpr (std::is_same_v<V, int8_t>) {
    if (path >= AVX512 && tokens == 1) {
      const ByteInputs inputs = as_bytes(x, w.in, ZERO_OF_8);
      const auto rows = [&](int64_t from, int64_t to) {
        avx512_row_by_row(w, inputs, sums.get(), from, to);
      };
      if (!inputs.words.empty()) return over_rows(w.out, w.in, rows, finish);
    }
  }
  const bool bytes = std::is_same_v<V, int8_t> && tokens == 1;  // tried already
  if (path >= AVX512 && !bytes) WITH(avx512, Avx512Step<V>)
  if constexpr (std::is_same_v<V, int8_t>)
    if (path >= AVX512) WITH(avx512, WideBytesStep)
  if (path == AVX2) WITH(avx2, Avx2Step<V>)
#undef WITH
}

// By the loop of so many tokens.
#define BY_TOKENS(ROWS)                                                                   \
  switch (padded) {                                                                       \
    case 1: return ROWS<1>(w, inputs.data(), sums.get(), from, to);                       \
    case 2: return ROWS<2>(w, inputs.data(), sums.get(), from, to);                       \
    case 4: return ROWS<4>(w, inputs.data(), sums.get(), from, to);                       \
    default: return ROWS<8>(w, inputs.data(), sums.get(), from, to);                      \
  }

template <class T>
void small_batch(
    const FourBits& w, const T* x, int64_t tokens, const T* bias, T* y, Path path) {
  const std::unique_ptr<float[]> sums(new float[FEW * w.out]);
  const auto finish = [&](int64_t from, int64_t to) {
    for (int64_t t = 0; t < tokens; t++) {
      for (int64_t r = from; r < to; r++) {
        const float sum = sums[t * w.out + r] + (bias ? static_cast<float>(bias[r]) : 0);
        y[t * w.out + r] = static_cast<T>(sum);
      }
    }
  };
  const int64_t padded = padded_tokens(tokens);
  if constexpr (!std::is_same_v<T, float>) {
    if (path >= AVX512 && tokens == 1) {
      const ByteInputs inputs = as_bytes(x, w.in, ZERO_OF_4);
      const auto rows = [&](int64_t from, int64_t to) {
        avx512_row_by_row(w, inputs, sums.get(), from, to);
      };
      if (!inputs.words.empty()) return over_rows(w.out, w.in, rows, finish);
    } else {
      const auto inputs = arranged<Avx512Step<int8_t>>(x, tokens, w.in, padded, path);
      const auto rows = [&](int64_t from, int64_t to) {
        if (path >= AVX512) BY_TOKENS(avx512_rows)
        BY_TOKENS(avx2_rows)
      };
      if (!inputs.empty()) return over_rows(w.out, w.in, rows, finish);
    }
  }
  const auto inputs = arranged<Avx2Step<float>>(x, tokens, w.in, padded);
  const auto rows = [&](int64_t from, int64_t to) {
    if (path >= AVX512) BY_TOKENS(avx512_rows)
    BY_TOKENS(avx2_rows)
  };
  over_rows(w.out, w.in, rows, finish);
#undef BY_TOKENS
}

// ---------------------------------------------------------------------------------- more tokens

// Rows `from` to `to`, dense (rows, in), as T.
template <class V, class T>
void unpack_rows(const Weight<V>& w, int64_t from, int64_t to, T* rows, Path path) {
  const int64_t grain = std::max<int64_t>(1, (1 << 14) / std::max<int64_t>(w.in, 1));
  const int64_t nnz = w.offsets[w.out];
  at::parallel_for(from, to, grain, [&](int64_t first, int64_t last) {
    std::vector<V> spread(std::is_same_v<V, T> ? 0 : w.in), copy;
    for (int64_t r = first; r < last; r++) {
      const V* values = w.values + w.offsets[r];
      const uint8_t* mask = w.mask_of(r);
      T* row = rows + (r - from) * w.in;
      V* to_spread;
      if constexpr (std::is_same_v<V, T>) {
        to_spread = row;
      } else {
        to_spread = spread.data();
      }
      if (w.offsets[r + 1] + BEYOND > nnz) values = with_room(w, r, copy);
      if (path >= AVX512) {
        avx512_unpack(values, mask, w.in, to_spread);
      } else {
        avx2_unpack(values, mask, w.in, to_spread);
      }
      if constexpr (!std::is_same_v<V, T>) {
        int64_t j = avx2_scaled(to_spread, w.in, w.scale[r], row);
        for (; j < w.in; j++)
          row[j] = static_cast<T>(static_cast<float>(to_spread[j]) * w.scale[r]);
      }
    }
  });
}

// Rows `from` to `to`, dense (rows, in), as T. Products of integer and scale are T numbers.
template <class T>
void unpack_rows(const FourBits& w, int64_t from, int64_t to, T* rows, Path path) {
  const int64_t grain = std::max<int64_t>(1, (1 << 14) / std::max<int64_t>(w.in, 1));
  at::parallel_for(from, to, grain, [&](int64_t first, int64_t last) {
    std::vector<int8_t> spread((w.in + WORD - 1) / WORD * WORD);
    std::vector<uint8_t> copy;
    std::vector<int8_t> codes;
    for (int64_t r = first; r < last; r++) {
      if (path >= AVX512) {
        avx512_spread(integers_of(w, r, copy), w.mask_of(r), w.in, spread.data());
      } else {
        avx2_unpack(avx2_codes(w, r, copy, codes), w.mask_of(r), w.in, spread.data());
      }
      for (int64_t begin = 0; begin < w.in; begin += GROUP) {
        const int64_t count = std::min(GROUP, w.in - begin);
        const int8_t* codes = spread.data() + begin;
        const float scale = w.scales_of(r)[begin / GROUP];
        T* row = rows + (r - from) * w.in + begin;
        int64_t j = avx2_scaled(codes, count, scale, row);
        for (; j < count; j++) row[j] = static_cast<T>(static_cast<float>(codes[j]) * scale);
      }
    }
  });
}

// A tensor (count,) of any content. The calling thread keeps its memory: fresh pages cost as much
// as unpacking into them.
at::Tensor scratch(int64_t count, const at::TensorOptions& options) {
  static thread_local at::Tensor& held = *new at::Tensor();  // not freed after what frees it
  const int64_t bytes = count * static_cast<int64_t>(options.dtype().itemsize());
  if (!held.defined() || held.numel() < bytes) {
    held = at::Tensor();
    held = at::empty({bytes}, options.dtype(at::kByte));
  }
  return held.narrow(0, 0, bytes).view(c10::typeMetaToScalarType(options.dtype()));
}

// Up to so many tokens passes of FEW at a time are faster than unpacking: fewest where torch's
// products are by AMX.
template <class T>
int64_t several(Path path) {
  static const bool amx = has_amx();
  if (amx && std::is_same_v<T, c10::BFloat16>) return FEW;
  return sizeof(T) == 4 ? 8 * FEW : 3 * FEW;
}

// x (tokens, in) -> y (tokens, out), tile by tile of the rows of W.
template <class T, class W>
void large_batch(
    const W& w, const at::Tensor& x, const at::Tensor& bias, at::Tensor& y, Path path) {
  const int64_t bytes = std::max<int64_t>(1, w.in * static_cast<int64_t>(sizeof(T)));
  const int64_t tile = std::min(w.out, std::max<int64_t>(64, TILE / bytes / 64 * 64));
  const at::Tensor rows = scratch(tile * w.in, x.options()).view({tile, w.in});
  for (int64_t from = 0; from < w.out; from += tile) {
    const int64_t count = std::min(tile, w.out - from);
    const at::Tensor its = rows.narrow(0, 0, count);
    unpack_rows(w, from, from + count, its.mutable_data_ptr<T>(), path);
    const auto part = bias.defined() ? bias.narrow(0, from, count) : bias;
    y.narrow(1, from, count).copy_(at::linear(x, its, part));
  }
}

// ------------------------------------------------------------------------------------- operators

// x (tokens, in) -> y (tokens, out), both T.
template <class T, class W>
void product(const W& w, const at::Tensor& x, const at::Tensor& bias, at::Tensor& y, Path path) {
  const int64_t tokens = x.size(0);
  if (tokens > several<T>(path)) return large_batch<T>(w, x, bias, y, path);
  const T* added = bias.defined() ? bias.const_data_ptr<T>() : nullptr;
  for (int64_t t = 0; t < tokens; t += FEW) {
    const T* from = x.const_data_ptr<T>() + t * w.in;
    T* to = y.mutable_data_ptr<T>() + t * w.out;
    small_batch(w, from, std::min(FEW, tokens - t), added, to, path);
  }
}

// Whether rows begin at 0, one behind the other.
bool are_offsets(const at::Tensor& offsets) {
  const int64_t* starts = offsets.const_data_ptr<int64_t>();
  const int64_t rows = offsets.size(0) - 1;
  bool ordered = starts[0] == 0;
  for (int64_t r = 0; r < rows; r++) ordered &= starts[r] <= starts[r + 1];
  return ordered;
}

at::Tensor linear(
    const at::Tensor& x, const at::Tensor& mask, const at::Tensor& weight,
    const at::Tensor& offsets, const std::optional<at::Tensor>& scale,
    const std::optional<at::Tensor>& bias, std::optional<std::string> path) {
  TORCH_CHECK(mask.is_cpu() && weight.is_cpu() && offsets.is_cpu(), "not in memory");
  TORCH_CHECK(x.dim() > 0 && mask.dim() == 2 && offsets.dim() == 1, "x, mask, offsets: shapes");
  TORCH_CHECK(x.size(-1) > 0, "x: no inputs");
  const int64_t out = offsets.size(0) - 1, in = x.size(-1);
  TORCH_CHECK(mask.size(1) == (in + 7) / 8, "mask: shape");
  TORCH_CHECK(mask.scalar_type() == at::kByte && offsets.scalar_type() == at::kLong, "dtypes");
  TORCH_CHECK(weight.dim() == 1 && mask.is_contiguous() && weight.is_contiguous(), "not packed");
  const bool four = weight.scalar_type() == at::kByte, eight = weight.scalar_type() == at::kChar;
  TORCH_CHECK(four || eight || weight.scalar_type() == x.scalar_type(), "x, weight: dtypes differ");
  TORCH_CHECK(offsets.is_contiguous(), "offsets");
  const int64_t nnz = offsets.const_data_ptr<int64_t>()[out];
  TORCH_CHECK((four ? (nnz + 1) / 2 : nnz) == weight.size(0) && are_offsets(offsets), "offsets");
  TORCH_CHECK((four || eight) == scale.has_value(), "scale");
  TORCH_CHECK(mask.size(0) == (eight ? 1 : out) && (!eight || nnz == out * in), "mask: rows");
  at::Tensor factors, added;
  if (eight) factors = scale->to(at::kFloat).contiguous();
  TORCH_CHECK(!eight || factors.numel() == out, "scale: shape");
  if (four) factors = scale->contiguous();
  TORCH_CHECK(
      !four || (factors.dim() == 2 && factors.size(0) == out &&
                factors.size(1) == std::max<int64_t>(1, (in + GROUP - 1) / GROUP) &&
                factors.scalar_type() == at::kBFloat16), "scale: shape or dtype");
  if (bias) added = bias->to(x.scalar_type()).contiguous();
  TORCH_CHECK(!bias || added.numel() == out, "bias: shape");
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = out;
  const at::Tensor result = at::empty(shape, x.options());
  if (!result.numel()) return result;
  const at::Tensor inputs = x.contiguous().view({-1, in});
  at::Tensor y = result.view({-1, out});
  const uint8_t* masks = mask.const_data_ptr<uint8_t>();
  const int64_t* starts = offsets.const_data_ptr<int64_t>();
  const auto run = [&](auto one) {
    using T = decltype(one);
    const Path by = chosen_path(path);
    if (four) {
      const auto* scales = factors.const_data_ptr<c10::BFloat16>();
      const auto* values = weight.const_data_ptr<uint8_t>();
      product<T>(FourBits{masks, values, starts, scales, out, in}, inputs, added, y, by);
    } else if (eight) {
      const auto* scales = factors.const_data_ptr<float>();
      const auto* values = weight.const_data_ptr<int8_t>();
      product<T>(Weight<int8_t>{masks, values, starts, scales, out, in}, inputs, added, y, by);
    } else {
      const auto* values = weight.const_data_ptr<T>();
      product<T>(Weight<T>{masks, values, starts, nullptr, out, in}, inputs, added, y, by);
    }
  };
  switch (x.scalar_type()) {
    case at::kFloat: run(float()); break;
    case at::kBFloat16: run(c10::BFloat16()); break;
    case at::kHalf: run(c10::Half()); break;
    default: TORCH_CHECK(false, "x: float32, bfloat16 or float16, not ", x.scalar_type());
  }
  return result;
}

std::vector<std::string> paths() {
  return {NAMES.begin(), NAMES.begin() + best_path() + 1};
}

}  // namespace

TORCH_LIBRARY(packed_bitmask, m) {
  m.def(
      "linear(Tensor x, Tensor mask, Tensor weight, Tensor offsets, Tensor? scale, Tensor? bias, "
      "str? path=None) -> Tensor");
  m.def("paths() -> str[]", paths);
}

TORCH_LIBRARY_IMPL(packed_bitmask, CPU, m) {
  m.impl("linear", linear);
}
