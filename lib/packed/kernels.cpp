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
constexpr int64_t FEW = 8;             // tokens, at most, in one pass over the packed bytes
constexpr int64_t TILE = 8 << 20;      // bytes of unpacked rows that should stay in the cache
constexpr int64_t UNPACKED = 8 << 10;  // bytes that 4-bit integers are unpacked to at a time,
constexpr int64_t AT_ONCE = 32;        // of so many rows at most
constexpr int64_t BEYOND = WORD;       // values that a load may read after those of its row
constexpr int64_t AHEAD = 2048;        // bytes by which values are fetched before they are needed
constexpr int ZERO_OF_4 = 8, ZERO_OF_8 = 128;  // by which integers are moved up to be unsigned
constexpr float SMALL = 1.f / 16;      // of the largest input of a word: the small ones, whose
constexpr float RANGE = 300;           // root mean square integers show that are so much larger

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
// weight is kept, so that all rows have the first one's mask; or two 4-bit integers, see FourBits.
template <class V, class S = float>
struct Weight {
  const uint8_t* mask;      // (out, stride)
  const V* values;          // (nnz,), of 4 bits (ceil(nnz / 2),)
  const int64_t* offsets;   // (out + 1,), in kept weights
  const S* scale;           // of int8 (out,), of 4 bits (out, words)
  int64_t out, in;
  int64_t stride() const { return (in + 7) / 8; }
  int64_t words() const { return (in + WORD - 1) / WORD; }
  const uint8_t* mask_of(int64_t r) const {
    return mask + (std::is_same_v<V, int8_t> ? 0 : r * stride());
  }
  const S* scales_of(int64_t r) const { return scale + r * words(); }
};

// A weight of 4-bit integers, two in a byte, with a scale for every word of a row.
using FourBits = Weight<uint8_t, c10::BFloat16>;

// Word k of a row's mask; bytes after the row's last count as zero.
INLINE uint64_t mask_word(const uint8_t* mask, int64_t k, int64_t stride) {
  uint64_t bits = 0;
  const int64_t left = stride - k * 8;
  if (left >= 8) {
    std::memcpy(&bits, mask + k * 8, 8);
  } else {
    std::memcpy(&bits, mask + k * 8, left);
  }
  return bits;
}

// What a thread needs for a row.
struct Buffers {
  std::vector<uint8_t> copy;
  std::vector<int8_t> codes, spread;
};

// What lies from `begin` to `end`, a copy where loads may not read on up to `limit`.
template <class V>
const V* with_room(const V* begin, const V* end, const V* limit, Buffers& buffers) {
  if (end + BEYOND <= limit) return begin;
  buffers.copy.assign((end - begin + BEYOND) * sizeof(V), 0);
  std::memcpy(buffers.copy.data(), begin, (end - begin) * sizeof(V));
  return reinterpret_cast<const V*>(buffers.copy.data());
}

// The values of row r, behind the last of which loads may read on.
template <class V>
const V* values_of(const Weight<V>& w, int64_t r, Buffers& buffers) {
  const auto at = [&](int64_t row) { return w.values + w.offsets[row]; };
  return with_room(at(r), at(r + 1), at(w.out), buffers);
}

// The integers of row r, from the byte on that holds the first one, in its high bits where the
// row's offset is odd.
const uint8_t* values_of(const FourBits& w, int64_t r, Buffers& buffers) {
  const uint8_t* end = w.values + (w.offsets[r + 1] + 1) / 2;
  const uint8_t* limit = w.values + w.offsets[w.out] / 2;
  return with_room(w.values + w.offsets[r] / 2, end, limit, buffers);
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

struct Step {
  using X = float;
  static constexpr int STRIDE = WORD;
  static constexpr bool EVEN_FIRST = false;
  static constexpr int chains(int tokens) { return tokens == 1 ? 4 : tokens == 2 ? 2 : 1; }
};

template <class V>
struct Avx2Step : Step {
  using Instructions = std::integral_constant<Path, AVX2>;
  using Sum = __m256;
  using Weights = __m256;
  static constexpr int COLUMNS = 8;
  static constexpr int rows_at_once(int tokens) { return 1; }
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

struct Avx512Sums : Step {
  using Instructions = std::integral_constant<Path, AVX512>;
  using Sum = __m512;
  static constexpr int rows_at_once(int tokens) { return tokens <= 2 ? 1 : 2; }
  FOR_AVX512 static INLINE Sum zero() { return _mm512_setzero_ps(); }
  FOR_AVX512 static INLINE float total(Sum sum) { return _mm512_reduce_add_ps(sum); }
};

FOR_AVX512 INLINE __m512 widened(const int8_t* values) {
  const auto* its = reinterpret_cast<const __m128i*>(values);
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(its)));
}

// Widened to float32. Of int8 every weight is kept, and what is read behind a row's last one is
// multiplied by 0.
template <class V>
struct Avx512Step : Avx512Sums {
  static constexpr int COLUMNS = sizeof(V) == 4 ? 16 : 32;
  // the halves of 32-bit lanes, without a shuffle
  static constexpr bool EVEN_FIRST = std::is_same_v<V, c10::BFloat16>;
  struct Weights {
    __m512 first, second;
  };
  FOR_AVX512 static INLINE Weights spread(uint64_t bits, const V* values) {
    if constexpr (std::is_same_v<V, int8_t>) {
      return {widened(values), widened(values + 16)};
    } else if constexpr (std::is_same_v<V, float>) {
      const __m512 next = _mm512_loadu_ps(values);
      return {_mm512_maskz_expand_ps(static_cast<__mmask16>(bits), next), _mm512_setzero_ps()};
    } else {
      const __m512i both = _mm512_maskz_expand_epi16(
          static_cast<__mmask32>(bits), _mm512_loadu_si512(values));
      if constexpr (EVEN_FIRST) {
        const __m512i odd = _mm512_and_si512(both, _mm512_set1_epi32(0xffff0000));
        return {_mm512_castsi512_ps(_mm512_slli_epi32(both, 16)), _mm512_castsi512_ps(odd)};
      } else {
        return {
            _mm512_cvtph_ps(_mm512_castsi512_si256(both)),
            _mm512_cvtph_ps(_mm512_extracti64x4_epi64(both, 1))};
      }
    }
  }
  FOR_AVX512 static INLINE void add(Sum& sum, const Weights& w, const float* x) {
    sum = _mm512_fmadd_ps(w.first, _mm512_loadu_ps(x), sum);
    if constexpr (COLUMNS == 32) sum = _mm512_fmadd_ps(w.second, _mm512_loadu_ps(x + 16), sum);
  }
};

// Inputs as int16: the 64 of a word are integers times a scale of their own, which stands behind
// them. Exact but for their rounding to 15 bits of the largest of the 64, where they have 8 or 11
// bits themselves.
constexpr int INTEGERS = WORD + sizeof(float) / sizeof(int16_t);  // from one word to the next

INLINE float scale_behind(const int16_t* x) {
  float scale;
  std::memcpy(&scale, x + WORD, sizeof(scale));
  return scale;
}

FOR_AVX512 INLINE __m512 integer_products(__m512i first, __m512i second, const int16_t* x) {
  __m512i products = _mm512_setzero_si512();
  products = _mm512_dpwssd_epi32(products, first, _mm512_loadu_si512(x));
  products = _mm512_dpwssd_epi32(products, second, _mm512_loadu_si512(x + 32));
  return _mm512_cvtepi32_ps(products);
}

// int8 weights by these.
struct IntegerStep : Avx512Sums {
  using X = int16_t;
  struct Weights {
    __m512i first, second;
  };
  static constexpr int STRIDE = INTEGERS, COLUMNS = WORD;
  static constexpr int chains(int tokens) { return tokens == 1 ? 2 : 1; }
  FOR_AVX512 static INLINE Weights spread(uint64_t bits, const int8_t* values) {
    const auto* its = reinterpret_cast<const __m256i*>(values);
    return {
        _mm512_cvtepi8_epi16(_mm256_loadu_si256(its)),
        _mm512_cvtepi8_epi16(_mm256_loadu_si256(its + 1))};
  }
  FOR_AVX512 static INLINE void add(Sum& sum, const Weights& w, const int16_t* x) {
    const __m512 products = integer_products(w.first, w.second, x);
    sum = _mm512_fmadd_ps(products, _mm512_set1_ps(scale_behind(x)), sum);
  }
};

// Left in bfloat16, for the dot product of pairs; of inputs and weights that are subnormal it takes
// zero. All int8 values are bfloat16 numbers.
template <class V>
struct Bf16Step : Avx512Sums {
  using Instructions = std::integral_constant<Path, AVX512_BF16>;
  using X = c10::BFloat16;
  using Weights = __m512i;
  static constexpr int COLUMNS = 32;
  FOR_AVX512_BF16 static INLINE Weights spread(uint64_t bits, const V* values) {
    if constexpr (std::is_same_v<V, int8_t>) {
      return (__m512i)_mm512_cvtne2ps_pbh(widened(values + 16), widened(values));
    } else {
      return _mm512_maskz_expand_epi16(
          static_cast<__mmask32>(bits), _mm512_loadu_si512(values));
    }
  }
  FOR_AVX512_BF16 static INLINE void add(Sum& sum, const Weights& w, const X* x) {
    sum = _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)_mm512_loadu_si512(x));
  }
};

// ------------------------------------------------------------------------------------- the rows
//
// The same loop for each set of instructions, because a function has one set.

#define DEFINE_ROWS(NAME, PATH, TARGET)                                                            \
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
  /* ROWS rows from `first` on, of y (TOKENS, out). */                                             \
  template <class Step, int TOKENS, int ROWS, class V>                                             \
  TARGET void NAME##_sums(                                                                         \
      const Weight<V>& w, int64_t first, const typename Step::X* x, float* y, Buffers* buffers) {  \
    constexpr int CHAINS = Step::chains(TOKENS), STEPS = WORD / Step::COLUMNS;                     \
    constexpr int WORDS = CHAINS > STEPS ? CHAINS / STEPS : 1; /* that start no chain twice */     \
    const int64_t stride = w.stride(), words = w.words(), whole = stride / 8;                      \
    typename Step::Sum sum[ROWS][TOKENS][CHAINS];                                                  \
    const V* values[ROWS];                                                                         \
    const uint8_t* masks[ROWS];                                                                    \
    for (int r = 0; r < ROWS; r++) {                                                               \
      values[r] = values_of(w, first + r, buffers[r]);                                             \
      masks[r] = w.mask_of(first + r);                                                             \
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
        NAME##_word<Step>(bits, values, x + (k + i) * TOKENS * Step::STRIDE, sum, i * STEPS);      \
      }                                                                                            \
    }                                                                                              \
    for (; k < words; k++) {                                                                       \
      for (int r = 0; r < ROWS; r++) bits[r] = mask_word(masks[r], k, stride);                     \
      NAME##_word<Step>(bits, values, x + k * TOKENS * Step::STRIDE, sum, 0);                      \
    }                                                                                              \
    for (int r = 0; r < ROWS; r++) {                                                               \
      for (int t = 0; t < TOKENS; t++) {                                                           \
        float all = 0;                                                                             \
        for (int c = 0; c < CHAINS; c++) all += Step::total(sum[r][t][c]);                         \
        y[t * w.out + first + r] = all;                                                            \
      }                                                                                            \
    }                                                                                              \
  }                                                                                                \
                                                                                                   \
  template <class Step, int TOKENS, class V>                                                       \
  TARGET void step_rows(                                                                           \
      std::integral_constant<Path, PATH>, const Weight<V>& w, const typename Step::X* x, float* y, \
      int64_t from, int64_t to) {                                                                  \
    constexpr int ROWS = Step::rows_at_once(TOKENS);                                               \
    Buffers buffers[ROWS];                                                                         \
    for (; from + ROWS <= to; from += ROWS)                                                        \
      NAME##_sums<Step, TOKENS, ROWS>(w, from, x, y, buffers);                                     \
    for (; from < to; from++) NAME##_sums<Step, TOKENS, 1>(w, from, x, y, buffers);                \
  }

DEFINE_ROWS(avx2, AVX2, FOR_AVX2)
DEFINE_ROWS(avx512, AVX512, FOR_AVX512)
DEFINE_ROWS(avx512_bf16, AVX512_BF16, FOR_AVX512_BF16)

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

// Integers times `scale`, rounded to T.
template <class T>
FOR_AVX2 void avx2_scaled(const int8_t* values, int64_t count, float scale, T* row) {
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
  for (; j < count; j++) row[j] = static_cast<T>(static_cast<float>(values[j]) * scale);
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
      const __m512i next = _mm512_loadu_si512(values);
      if constexpr (sizeof(V) == 2) {
        _mm512_storeu_si512(row + j + c, _mm512_maskz_expand_epi16(its, next));
      } else {
        _mm512_storeu_si512(row + j + c, _mm512_maskz_expand_epi32(its, next));
      }
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

// The integers of row r, a byte each.
FOR_AVX2 const int8_t* avx2_codes(const FourBits& w, int64_t r, Buffers& buffers) {
  const uint8_t* values = values_of(w, r, buffers);
  const int64_t before = w.offsets[r] % 2, count = w.offsets[r + 1] - w.offsets[r] + before;
  buffers.codes.resize(w.in + 2 * BEYOND);
  const __m256i low = _mm256_set1_epi16(0x000f), high = _mm256_set1_epi16(0x0f00);
  const __m256i eight = _mm256_set1_epi8(8);
  for (int64_t i = 0; i < count; i += 32) {
    const auto* its = reinterpret_cast<const __m128i*>(values + i / 2);
    const __m256i pairs = _mm256_cvtepu8_epi16(_mm_loadu_si128(its));
    const __m256i fields = _mm256_or_si256(
        _mm256_and_si256(pairs, low), _mm256_and_si256(_mm256_slli_epi16(pairs, 4), high));
    auto* to = reinterpret_cast<__m256i*>(buffers.codes.data() + i);
    _mm256_storeu_si256(to, _mm256_sub_epi8(_mm256_xor_si256(fields, eight), eight));
  }
  return buffers.codes.data() + before;
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

// 64 integers from position `next` on, spread to the columns whose bit is set.
FOR_AVX512 INLINE __m512i four_bits_64(const uint8_t* values, int64_t next, uint64_t bits) {
  const __m512i bytes = _mm512_permutexvar_epi8(
      _mm512_load_si512(FIELDS.bytes), _mm512_loadu_si512(values + next / 2));
  const __m512i fields = _mm512_multishift_epi64_epi8(
      _mm512_load_si512(FIELDS.shifts[next & 1]), bytes);
  const __m512i codes = _mm512_permutexvar_epi8(fields, _mm512_load_si512(FIELDS.values));
  return _mm512_maskz_expand_epi8(bits, codes);
}

FOR_AVX2 INLINE __m256 as_floats(__m256 sums) { return sums; }
FOR_AVX2 INLINE __m256 as_floats(__m256i sums) { return _mm256_cvtepi32_ps(sums); }

// By float32 inputs, or by integers. The columns of a word have one scale.
template <Path PATH, class Input>
struct FourBitsStep {
  using Instructions = std::integral_constant<Path, PATH>;
  using X = Input;
  static constexpr bool BY_INTEGERS = std::is_same_v<X, int16_t>, EVEN_FIRST = false;
  static constexpr int STRIDE = BY_INTEGERS ? INTEGERS : WORD;
};

template <class Step, int TOKENS, class X>
FOR_AVX2 void step_rows(
    std::integral_constant<Path, AVX2>, const FourBits& w, const X* x, float* y, int64_t from,
    int64_t to) {
  using Sum = std::conditional_t<Step::BY_INTEGERS, __m256i, __m256>;
  Buffers buffers;
  for (int64_t r = from; r < to; r++) {
    const int8_t* values = avx2_codes(w, r, buffers);
    const uint8_t* mask = w.mask_of(r);
    __m256 sums[TOKENS] = {};
    for (int64_t k = 0; k < w.words(); k++) {
      const uint64_t bits = mask_word(mask, k, w.stride());
      const X* word = x + k * TOKENS * Step::STRIDE;
      Sum products[TOKENS] = {};
      _Pragma("GCC unroll 4") for (int c = 0; c < WORD; c += 16) {
        const uint16_t its = static_cast<uint16_t>(bits >> c);
        const __m128i some = spread16_of_1(its, values);
        values += __builtin_popcount(its);
        _Pragma("GCC unroll 8") for (int t = 0; t < TOKENS; t++) {
          const X* inputs = word + t * Step::STRIDE + c;
          if constexpr (Step::BY_INTEGERS) {
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
        if constexpr (Step::BY_INTEGERS) step = scale_behind(word + t * Step::STRIDE);
        const __m256 all = as_floats(products[t]);
        sums[t] = _mm256_fmadd_ps(all, _mm256_set1_ps(step * w.scales_of(r)[k]), sums[t]);
      }
    }
    for (int t = 0; t < TOKENS; t++) y[t * w.out + r] = Avx2Step<float>::total(sums[t]);
  }
}

template <class Step, int TOKENS, class X>
FOR_AVX512 void step_rows(
    std::integral_constant<Path, AVX512>, const FourBits& w, const X* x, float* y, int64_t from,
    int64_t to) {
  Buffers buffers;
  for (int64_t r = from; r < to; r++) {
    const uint8_t* values = values_of(w, r, buffers);
    const uint8_t* mask = w.mask_of(r);
    const c10::BFloat16* scales = w.scales_of(r);
    __m512 sums[TOKENS];
    for (int t = 0; t < TOKENS; t++) sums[t] = _mm512_setzero_ps();
    int64_t next = w.offsets[r] % 2;
    for (int64_t k = 0; k < w.words(); k++) {
      const uint64_t bits = mask_word(mask, k, w.stride());
      __builtin_prefetch(values + next / 2 + AHEAD);
      const __m512i codes = four_bits_64(values, next, bits);
      next += __builtin_popcountll(bits);
      const X* word = x + k * TOKENS * Step::STRIDE;
      if constexpr (Step::BY_INTEGERS) {
        const __m512i first = _mm512_cvtepi8_epi16(_mm512_castsi512_si256(codes));
        const __m512i second = _mm512_cvtepi8_epi16(_mm512_extracti64x4_epi64(codes, 1));
        _Pragma("GCC unroll 8") for (int t = 0; t < TOKENS; t++, word += Step::STRIDE) {
          const __m512 scale = _mm512_set1_ps(scale_behind(word) * scales[k]);
          sums[t] = _mm512_fmadd_ps(integer_products(first, second, word), scale, sums[t]);
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
  const __m512i zero = _mm512_set1_epi8(ZERO_OF_8);
  float rest = 0;
  for (int64_t k = 0; k < w.words(); k++) rest += x.rests[k];
  Buffers buffers;
  for (int64_t r = from; r < to; r++) {
    const int8_t* values = values_of(w, r, buffers);
    __m512 sum = _mm512_setzero_ps();
    for (int64_t k = 0; k < w.words(); k++, values += WORD) {
      __builtin_prefetch(values + AHEAD);
      // those behind the row's last are multiplied by 0
      const __m512i weights = _mm512_xor_si512(_mm512_loadu_si512(values), zero);
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
    const int64_t left = w.words() - k;
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
  const int64_t stride = w.stride(), words = w.words();
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
        const uint64_t bits = mask_word(mask, k, stride);
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

// The integers of row r where they belong, zeros elsewhere.
FOR_AVX512 void avx512_spread(const FourBits& w, int64_t r, Buffers& buffers) {
  const uint8_t *values = values_of(w, r, buffers), *mask = w.mask_of(r);
  int64_t next = w.offsets[r] % 2;
  for (int64_t k = 0; k < w.words(); k++) {
    const uint64_t bits = mask_word(mask, k, w.stride());
    _mm512_storeu_si512(buffers.spread.data() + k * WORD, four_bits_64(values, next, bits));
    next += __builtin_popcountll(bits);
  }
}

// ------------------------------------------------------------------------------ one to 8 tokens

// The inputs of a word as integers up to `limit`, zeros behind the last, and `step`, which is what
// they are to be multiplied by for that: what isn't finite makes it NaN. False where the largest
// input is so large beside the small ones that their rounding would show.
template <class From>
FOR_AVX2 bool as_integers(
    const From* from, int64_t columns, float limit, int32_t (&integers)[WORD], float& step) {
  From its[WORD] = {};
  std::copy(from, from + columns, its);
  std::fill(integers, integers + WORD, 0);
  const __m256 none = _mm256_setzero_ps(), sign = _mm256_set1_ps(-0.f);
  __m256 inputs[8], largest_of = none, nothing = none, squares = none;
  for (int i = 0; i < 8; i++) {
    inputs[i] = Avx2Step<From>::spread(0xff, its + 8 * i);
    largest_of = _mm256_max_ps(_mm256_andnot_ps(sign, inputs[i]), largest_of);
    nothing = _mm256_add_ps(nothing, _mm256_sub_ps(inputs[i], inputs[i]));  // NaN if not finite
  }
  float lanes[8];
  _mm256_storeu_ps(lanes, largest_of);
  const float largest = *std::max_element(lanes, lanes + 8);
  step = largest / limit + Avx2Step<float>::total(nothing);
  if (!(step >= std::numeric_limits<float>::min())) return true;  // too small to matter, or NaN
  const __m256 inverse = _mm256_set1_ps(1 / step), below = _mm256_set1_ps(SMALL * largest);
  int count = 0;
  for (int i = 0; i < 8; i++) {
    const __m256 size = _mm256_andnot_ps(sign, inputs[i]);
    const __m256 small = _mm256_and_ps(
        _mm256_cmp_ps(size, below, _CMP_LT_OQ), _mm256_cmp_ps(size, none, _CMP_GT_OQ));
    count += __builtin_popcount(_mm256_movemask_ps(small));
    squares = _mm256_fmadd_ps(size, _mm256_and_ps(size, small), squares);
    _mm256_storeu_si256(
        reinterpret_cast<__m256i*>(integers + 8 * i),
        _mm256_cvtps_epi32(_mm256_mul_ps(inputs[i], inverse)));
  }
  return largest * largest * count <= RANGE * RANGE * Avx2Step<float>::total(squares);
}

// As int16, and behind them the float that they are to be multiplied by.
template <class From>
FOR_AVX2 bool as_words(const From* from, int64_t columns, int16_t* word) {
  int32_t integers[WORD];
  float step;
  const bool fine = as_integers(from, columns, INT16_MAX, integers, step);
  for (int i = 0; i < WORD; i += 8) {
    const auto* some = reinterpret_cast<const __m128i*>(integers + i);
    const __m128i eight = _mm_packs_epi32(_mm_loadu_si128(some), _mm_loadu_si128(some + 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(word + i), eight);
  }
  std::memcpy(word + WORD, &step, sizeof(step));
  return fine;
}

// One token's inputs (in,) for weights moved up by `zero`; none where integers can't hold them.
template <class From>
FOR_AVX512 ByteInputs as_bytes(const From* from, int64_t in, int zero) {
  const int64_t words = (in + WORD - 1) / WORD, padded = (words + 15) / 16 * 16;
  ByteInputs to;
  to.words.resize(words);
  to.steps.resize(padded), to.rests.resize(padded);
  const __m512i half = _mm512_set1_epi32(128), zeros = _mm512_set1_epi8(static_cast<char>(zero));
  for (int64_t k = 0; k < words; k++) {
    ByteWord& word = to.words[k];
    int32_t integers[WORD];
    const int64_t columns = std::min(WORD, in - k * WORD);
    if (!as_integers(from + k * WORD, columns, LARGEST, integers, to.steps[k])) return {};
    for (int i = 0; i < 4; i++) {
      const __m512i some = _mm512_loadu_si512(integers + 16 * i);
      const __m512i high = _mm512_srai_epi32(_mm512_add_epi32(some, half), 8);
      _mm_store_si128(reinterpret_cast<__m128i*>(word.high) + i, _mm512_cvtepi32_epi8(high));
      _mm_store_si128(reinterpret_cast<__m128i*>(word.low) + i, _mm512_cvtepi32_epi8(some));
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
    const From* x, int64_t tokens, int64_t in, int64_t padded) {
  using X = typename Step::X;
  const int64_t words = (in + WORD - 1) / WORD;
  std::vector<X> to(words * padded * Step::STRIDE, X(0));
  for (int64_t t = 0; t < tokens; t++) {
    for (int64_t k = 0; k < words; k++) {
      X* word = to.data() + (k * padded + t) * Step::STRIDE;
      const From* from = x + t * in + k * WORD;
      const int64_t columns = std::min(WORD, in - k * WORD);
      if constexpr (std::is_same_v<X, int16_t>) {
        if (!as_words(from, columns, word)) return {};
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

// The inputs and outputs of at most FEW tokens.
template <class T>
struct Batch {
  const T* x;  // (tokens, in)
  int64_t tokens;
  const T* bias;  // (out,), or none
  T* y;  // (tokens, out)
};

// The batch's outputs by sums (tokens or more, out) that `add_up(sums, from, to)` writes for some
// rows, on torch's threads.
template <class W, class T, class AddUp>
void over_rows(const W& w, const Batch<T>& batch, const AddUp& add_up) {
  const std::unique_ptr<float[]> sums(new float[FEW * w.out]);  // not touched before it is written
  const int64_t grain = std::max<int64_t>(16, (1 << 16) / w.in);
  at::parallel_for(0, w.out, grain, [&](int64_t from, int64_t to) {
    add_up(sums.get(), from, to);
    for (int64_t t = 0; t < batch.tokens; t++) {
      for (int64_t r = from; r < to; r++) {
        float sum = sums[t * w.out + r];
        if constexpr (std::is_same_v<W, Weight<int8_t>>) sum *= w.scale[r];
        if (batch.bias) sum += static_cast<float>(batch.bias[r]);
        batch.y[t * w.out + r] = static_cast<T>(sum);
      }
    }
  });
}

// One token, bytes by bytes; false where integers can't hold its inputs.
template <class W, class T>
bool by_bytes(const W& w, const Batch<T>& batch, int zero) {
  const ByteInputs inputs = as_bytes(batch.x, w.in, zero);
  if (inputs.words.empty()) return false;
  over_rows(w, batch, [&](float* sums, int64_t from, int64_t to) {
    avx512_row_by_row(w, inputs, sums, from, to);
  });
  return true;
}

// By inputs as `Step` takes them; false where integers can't hold them. There are loops for some
// numbers of tokens, and others are made up to them by zeros.
template <class Step, class W, class T>
bool by_step(const W& w, const Batch<T>& batch) {
  const int64_t padded = batch.tokens <= 2 ? batch.tokens : batch.tokens <= 4 ? 4 : 8;
  const auto inputs = arranged<Step>(batch.x, batch.tokens, w.in, padded);
  if (inputs.empty()) return false;
  over_rows(w, batch, [&](float* sums, int64_t from, int64_t to) {
    constexpr typename Step::Instructions by{};
    switch (padded) {
      case 1: return step_rows<Step, 1>(by, w, inputs.data(), sums, from, to);
      case 2: return step_rows<Step, 2>(by, w, inputs.data(), sums, from, to);
      case 4: return step_rows<Step, 4>(by, w, inputs.data(), sums, from, to);
      default: return step_rows<Step, 8>(by, w, inputs.data(), sums, from, to);
    }
  });
  return true;
}

// Each of these ends with a way for all inputs, and returns true.
template <class T>
bool small_batch(const Weight<T>& w, const Batch<T>& batch, Path path) {
  if constexpr (std::is_same_v<T, c10::BFloat16>)
    if (path == AVX512_BF16) return by_step<Bf16Step<T>>(w, batch);
  return path >= AVX512 ? by_step<Avx512Step<T>>(w, batch) : by_step<Avx2Step<T>>(w, batch);
}

template <class T>
bool small_batch(const Weight<int8_t>& w, const Batch<T>& batch, Path path) {
  if (path < AVX512) return by_step<Avx2Step<int8_t>>(w, batch);
  if constexpr (std::is_same_v<T, c10::BFloat16>)
    if (path == AVX512_BF16 && batch.tokens > 4) return by_step<Bf16Step<int8_t>>(w, batch);
  if constexpr (!std::is_same_v<T, float>) {
    if (batch.tokens == 1 && by_bytes(w, batch, ZERO_OF_8)) return true;
    if (by_step<IntegerStep>(w, batch)) return true;
  }
  return by_step<Avx512Step<int8_t>>(w, batch);
}

template <Path PATH, class T>
bool four_bits_batch(const FourBits& w, const Batch<T>& batch) {
  if constexpr (!std::is_same_v<T, float>) {
    if (PATH == AVX512 && batch.tokens == 1 && by_bytes(w, batch, ZERO_OF_4)) return true;
    if (by_step<FourBitsStep<PATH, int16_t>>(w, batch)) return true;
  }
  return by_step<FourBitsStep<PATH, float>>(w, batch);
}

template <class T>
bool small_batch(const FourBits& w, const Batch<T>& batch, Path path) {
  return path < AVX512 ? four_bits_batch<AVX2>(w, batch) : four_bits_batch<AVX512>(w, batch);
}

// ---------------------------------------------------------------------------------- more tokens

// Row r, dense (in,), as T.
template <class T>
void unpack_row(const Weight<T>& w, int64_t r, T* row, Path path, Buffers& buffers) {
  const auto unpack = path >= AVX512 ? avx512_unpack<T> : avx2_unpack<T>;
  unpack(values_of(w, r, buffers), w.mask_of(r), w.in, row);
}

template <class T>
void unpack_row(const Weight<int8_t>& w, int64_t r, T* row, Path, Buffers&) {
  avx2_scaled(w.values + r * w.in, w.in, w.scale[r], row);
}

// Products of 4-bit integer and scale are T numbers.
template <class T>
void unpack_row(const FourBits& w, int64_t r, T* row, Path path, Buffers& buffers) {
  buffers.spread.resize(w.words() * WORD);
  const int8_t* codes = buffers.spread.data();
  if (path >= AVX512) {
    avx512_spread(w, r, buffers);
  } else {
    avx2_unpack(avx2_codes(w, r, buffers), w.mask_of(r), w.in, buffers.spread.data());
  }
  for (int64_t j = 0; j < w.in; j += WORD)
    avx2_scaled(codes + j, std::min(WORD, w.in - j), w.scales_of(r)[j / WORD], row + j);
}

// Rows `from` to `to`, dense (rows, in), as T.
template <class W, class T>
void unpack_rows(const W& w, int64_t from, int64_t to, T* rows, Path path) {
  const int64_t grain = std::max<int64_t>(1, (1 << 14) / w.in);
  at::parallel_for(from, to, grain, [&](int64_t first, int64_t last) {
    Buffers buffers;
    for (int64_t r = first; r < last; r++)
      unpack_row(w, r, rows + (r - from) * w.in, path, buffers);
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
int64_t several() {
  static const bool amx = has_amx();
  if (amx && std::is_same_v<T, c10::BFloat16>) return FEW;
  return sizeof(T) == 4 ? 8 * FEW : 3 * FEW;
}

// x (tokens, in) -> y (tokens, out), tile by tile of the rows of W.
template <class T, class W>
void large_batch(
    const W& w, const at::Tensor& x, const at::Tensor& bias, at::Tensor& y, Path path) {
  const int64_t bytes = w.in * static_cast<int64_t>(sizeof(T));
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
  if (tokens > several<T>()) return large_batch<T>(w, x, bias, y, path);
  const T* added = bias.defined() ? bias.const_data_ptr<T>() : nullptr;
  for (int64_t t = 0; t < tokens; t += FEW) {
    const T* from = x.const_data_ptr<T>() + t * w.in;
    T* to = y.mutable_data_ptr<T>() + t * w.out;
    TORCH_INTERNAL_ASSERT(
        small_batch(w, Batch<T>{from, std::min(FEW, tokens - t), added, to}, path));
  }
}

// Whether rows begin at 0, one behind the other.
bool are_offsets(const int64_t* starts, int64_t rows) {
  return rows >= 0 && starts[0] == 0 && std::is_sorted(starts, starts + rows + 1);
}

void check(
    const char* name, const at::Tensor& tensor, at::ScalarType dtype, at::IntArrayRef shape) {
  const bool whole = tensor.is_cpu() && tensor.is_contiguous();
  TORCH_CHECK(
      whole && tensor.scalar_type() == dtype && tensor.sizes() == shape, name, ": not ", dtype, " ",
      shape, " in memory");
}

at::Tensor linear(
    const at::Tensor& x, const at::Tensor& mask, const at::Tensor& weight,
    const at::Tensor& offsets, const std::optional<at::Tensor>& scale,
    const std::optional<at::Tensor>& bias, std::optional<std::string> path) {
  TORCH_CHECK(x.dim() > 0 && x.size(-1) > 0, "x: no inputs");
  const int64_t out = offsets.numel() - 1, in = x.size(-1);
  check("offsets", offsets, at::kLong, {out + 1});
  const int64_t* starts = offsets.const_data_ptr<int64_t>();
  const int64_t nnz = out < 0 ? 0 : starts[out];
  const bool four = weight.scalar_type() == at::kByte, eight = weight.scalar_type() == at::kChar;
  TORCH_CHECK(are_offsets(starts, out) && (!eight || nnz == out * in), "offsets");
  check("mask", mask, at::kByte, {eight ? 1 : out, (in + 7) / 8});
  if (four || eight) {
    check("weight", weight, weight.scalar_type(), {four ? (nnz + 1) / 2 : nnz});
  } else {
    check("weight", weight, x.scalar_type(), {nnz});
  }
  TORCH_CHECK((four || eight) == scale.has_value(), "scale");
  at::Tensor scales, added;
  if (scale) scales = scale->contiguous();
  if (four) check("scale", scales, at::kBFloat16, {out, (in + WORD - 1) / WORD});
  if (eight) check("scale", scales, at::kFloat, {out});
  if (bias) check("bias", added = bias->to(x.scalar_type()).contiguous(), x.scalar_type(), {out});
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = out;
  const at::Tensor result = at::empty(shape, x.options());
  if (!result.numel()) return result;
  const at::Tensor inputs = x.contiguous().view({-1, in});
  at::Tensor y = result.view({-1, out});
  const auto as = [&](auto value, auto factor) {
    using V = decltype(value);
    using S = decltype(factor);
    const S* factors = scale ? scales.const_data_ptr<S>() : nullptr;
    const auto* masks = mask.const_data_ptr<uint8_t>();
    return Weight<V, S>{masks, weight.const_data_ptr<V>(), starts, factors, out, in};
  };
  const auto run = [&](auto one) {
    using T = decltype(one);
    const Path by = chosen_path(path);
    if (four) {
      product<T>(as(uint8_t(), c10::BFloat16()), inputs, added, y, by);
    } else if (eight) {
      product<T>(as(int8_t(), float()), inputs, added, y, by);
    } else {
      product<T>(as(one, float()), inputs, added, y, by);
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
