// 2:4 sparsity on CPU: LANES groups of four, or blocks of 4x4, at a time, one in each lane of a vector.
//
// Arithmetic is naive.py's, step by step, in float or, for double, in double. Nothing is divided or multiplied and then
// added, so that no compiler and no device may round it otherwise.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <limits>

namespace {

using at::Tensor;

constexpr int64_t LANES = 16;
constexpr int64_t GRAIN = 4096;  // groups of a task, at least

template <typename T>
struct Lanes;
template <>
struct Lanes<float> {
  typedef float F __attribute__((vector_size(LANES * 4)));
  typedef int32_t I __attribute__((vector_size(LANES * 4)));
};
template <>
struct Lanes<double> {
  typedef double F __attribute__((vector_size(LANES * 8)));
  typedef int64_t I __attribute__((vector_size(LANES * 8)));
};
typedef uint32_t Words __attribute__((vector_size(LANES * 4)));
typedef uint64_t LongWords __attribute__((vector_size(LANES * 8)));

template <typename T>
using F = typename Lanes<T>::F;
template <typename T>
using I = typename Lanes<T>::I;
template <typename T>
using Four = std::array<F<T>, 4>;

// NaN is the largest number.
template <typename V>
V least(V a, V b) {
  return (a < b) | (b != b) ? a : b;
}
template <typename V>
V most(V a, V b) {
  return (a < b) | (b != b) ? b : a;
}

template <typename T>
F<T> magnitude(F<T> x) {
  return x < 0 ? -x : x + T(0);  // -0 + 0 = 0
}

// |x|, and infinity for NaN: it is kept, so that it is seen.
template <typename T>
F<T> weight(F<T> x) {
  F<T> infinity = F<T>{} + std::numeric_limits<T>::infinity();
  return x == x ? magnitude<T>(x) : infinity;
}

// Place of each of four in ascending order; of equals, the first comes first.
template <typename T>
std::array<I<T>, 4> ranks(const Four<T>& a) {
  std::array<I<T>, 4> rank{};
  for (int i = 0; i < 4; ++i)
    for (int j = i + 1; j < 4; ++j) {
      I<T> above = a[i] > a[j];  // -1 where true
      rank[i] -= above;
      rank[j] -= ~above;
    }
  return rank;
}

// Places of the two largest: of equals, the first one wins.
template <typename T>
std::array<I<T>, 4> two_largest(const Four<T>& a) {
  std::array<I<T>, 4> beaten{};
  for (int i = 0; i < 4; ++i)
    for (int j = i + 1; j < 4; ++j) {
      I<T> above = a[j] > a[i];
      beaten[i] -= above;
      beaten[j] -= ~above;
    }
  for (auto& b : beaten) b = b < 2;
  return beaten;
}

template <typename T>
Four<T> soft_threshold(const Four<T>& x) {
  Four<T> a, y;
  for (int i = 0; i < 4; ++i) a[i] = magnitude<T>(x[i]);
  F<T> second = least(most(least(a[0], a[1]), least(a[2], a[3])), least(most(a[0], a[1]), most(a[2], a[3])));
  for (int i = 0; i < 4; ++i) {
    F<T> over = a[i] - second;
    over = over <= 0 ? F<T>{} : over;  // NaN stays
    y[i] = x[i] < 0 ? -over : over;
  }
  return y;
}

// Random numbers -------------------------------------------------------------------------------------------------------

void multiply(Words a, uint32_t b, Words& high, Words& low) {
  LongWords product = __builtin_convertvector(a, LongWords) * b;
  high = __builtin_convertvector(product >> 32, Words);
  low = __builtin_convertvector(product, Words);
}

// Philox4x32-10 of the counters (c0, c1, 0, 0): its first two words.
std::array<Words, 2> philox(uint64_t seed, Words c0, Words c1) {
  uint32_t key0 = seed, key1 = seed >> 32;
  Words c2{}, c3{};
  for (int round = 0; round < 10; ++round) {
    Words high0, low0, high1, low1;
    multiply(c0, 0xD2511F53u, high0, low0);
    multiply(c2, 0xCD9E8D57u, high1, low1);
    c0 = high1 ^ c1 ^ key0;
    c1 = low1;
    c2 = high0 ^ c3 ^ key1;
    c3 = low0;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return {c0, c1};
}

template <typename T>
F<T> uniform(Words word) {
  return __builtin_convertvector(__builtin_convertvector(word >> 8, Lanes<float>::I), F<T>) * T(0x1p-24);
}

// Minimum-variance unbiased estimates ----------------------------------------------------------------------------------

template <typename T>
Four<T> exact(const Four<T>& a, F<T> u) {
  std::array<I<T>, 4> rank = ranks<T>(a);
  Four<T> ordered{};
  for (int i = 0; i < 4; ++i)
    for (int r = 0; r < 4; ++r) ordered[r] = rank[i] == r ? a[i] : ordered[r];
  auto [a1, a2, a3, a4] = ordered;
  F<T> three = (a1 + a2) + a3, total = three + a4, none{};
  auto near = 2 * a1 + a3 > a4;
  F<T> width13 = near ? (2 * a1 + a3) - a4 : none;
  F<T> width14 = near ? 2 * a1 + (a4 - a3) : 4 * a1;
  F<T> width23 = near ? (2 * a2 + a3) - a4 : 2 * (three - a4);
  F<T> width24 = near ? 2 * a2 + (a4 - a3) : 2 * ((a2 - a1) + (a4 - a3));
  F<T> draw = u * (2 * total), upto14 = width13 + width14, upto23 = upto14 + width23, upto24 = upto23 + width24;
  I<T> zero{}, one = zero + 1, two = zero + 2, three_ = zero + 3;
  I<T> lower = draw < upto14 ? zero : (draw < upto24 ? one : two);
  I<T> upper = draw < width13 ? two : (((draw >= upto14) & (draw < upto23)) ? two : three_);
  auto alone = a4 > three;
  draw = u * three;
  lower = alone ? (draw < a1 ? zero : (draw < a1 + a2 ? one : two)) : lower;
  upper = alone ? three_ : upper;
  F<T> half = total * T(0.5), largest = alone ? a4 : half, other = alone ? three : half;
  Four<T> values;
  for (int i = 0; i < 4; ++i)
    values[i] = a[i] > 0 ? (rank[i] == upper ? largest : (rank[i] == lower ? other : none)) : none;
  return values;
}

template <typename T>
I<T> drawn(const Four<T>& a, F<T> u) {
  F<T> draw = u * (((a[0] + a[1]) + a[2]) + a[3]);
  I<T> place{};
  place -= draw >= a[0];
  place -= draw >= a[0] + a[1];
  place -= draw >= (a[0] + a[1]) + a[2];
  return place;
}

template <typename T>
Four<T> approx(const Four<T>& a, F<T> u, F<T> v) {
  I<T> first = drawn<T>(a, u);
  Four<T> rest, odds, values;
  F<T> none{};
  for (int i = 0; i < 4; ++i) rest[i] = first == i ? none : a[i];
  I<T> second = drawn<T>(rest, v);
  F<T> total = ((a[0] + a[1]) + a[2]) + a[3];
  for (int i = 0; i < 4; ++i) {
    F<T> others = none;
    for (int j = 0; j < 4; ++j)
      if (j != i) others += a[j];
    odds[i] = a[i] > 0 ? a[i] / others : none;
  }
  for (int i = 0; i < 4; ++i) {
    F<T> over = none;
    for (int j = 0; j < 4; ++j)
      if (j != i) over += odds[j];
    F<T> value = total / (1 + over);
    values[i] = ((first == i) | (second == i)) & (a[i] > 0) ? value : none;
  }
  return values;
}

template <typename T>
Four<T> estimate(const Four<T>& x, uint64_t seed, Words group, Words column, bool is_exact) {
  auto [first, second] = philox(seed, group, column);
  Four<T> a, y;
  for (int i = 0; i < 4; ++i) a[i] = magnitude<T>(x[i]);
  Four<T> values = is_exact ? exact<T>(a, uniform<T>(first)) : approx<T>(a, uniform<T>(first), uniform<T>(second));
  auto finite = ((a[0] + a[1]) + a[2]) + a[3] < std::numeric_limits<T>::infinity();
  for (int i = 0; i < 4; ++i) {
    F<T> marked = F<T>{} + (i < 2 ? std::numeric_limits<T>::quiet_NaN() : T(0));
    y[i] = finite ? (x[i] < 0 ? F<T>{} - values[i] : values[i]) : marked;
    y[i] = y[i] == 0 ? F<T>{} : y[i];  // no -0
  }
  return y;
}

// Groups in memory -----------------------------------------------------------------------------------------------------

// [outer, n, inner] by groups of four along n, in rows of groups that lie side by side: f(four, group, column).
template <typename T, typename In, typename Out, typename Function>
void for_groups(const Tensor& x, Tensor& y, Function f) {
  int64_t n = x.size(1), inner = x.size(2), groups = n / 4;
  bool last = inner == 1;
  int64_t width = last ? groups : inner, rows = last ? x.size(0) : x.size(0) * groups;
  int64_t step = last ? 1 : inner, lane_step = last ? 4 : 1;
  const In* source = x.const_data_ptr<In>();
  Out* target = y.mutable_data_ptr<Out>();
  at::parallel_for(0, rows, std::max<int64_t>(1, GRAIN / std::max<int64_t>(1, width)), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      for (int64_t first = 0; first < width; first += LANES) {
        int64_t lanes = std::min(LANES, width - first), at = row * 4 * width + first * lane_step;
        alignas(64) T staged[4][LANES] = {};
        for (int i = 0; i < 4; ++i)
          for (int64_t lane = 0; lane < lanes; ++lane)
            staged[i][lane] = static_cast<T>(source[at + i * step + lane * lane_step]);
        Words group{}, column{};
        for (int64_t lane = 0; lane < LANES; ++lane) {
          group[lane] = last ? first + lane : row % groups;
          column[lane] = last ? row : row / groups * inner + first + lane;
        }
        Four<T> four;
        for (int i = 0; i < 4; ++i) four[i] = *reinterpret_cast<F<T>*>(staged[i]);
        auto result = f(four, group, column);
        for (int i = 0; i < 4; ++i)
          for (int64_t lane = 0; lane < lanes; ++lane)
            target[at + i * step + lane * lane_step] = static_cast<Out>(result[i][lane]);
      }
  });
}

template <typename Function>
void dispatch(const Tensor& x, Function f) {
  switch (x.scalar_type()) {
    case at::kDouble: return f.template operator()<double, double>();
    case at::kFloat: return f.template operator()<float, float>();
    case at::kHalf: return f.template operator()<float, at::Half>();
    case at::kBFloat16: return f.template operator()<float, at::BFloat16>();
    default: TORCH_CHECK(false, "not a float type: ", x.scalar_type());
  }
}

Tensor prune_mask(const Tensor& score) {
  Tensor mask = at::empty(score.sizes(), score.options().dtype(at::kBool));
  dispatch(score, [&]<typename T, typename In>() {
    for_groups<T, In, bool>(score, mask, [](const Four<T>& x, Words, Words) {
      Four<T> a;
      for (int i = 0; i < 4; ++i) a[i] = weight<T>(x[i]);
      return two_largest<T>(a);
    });
  });
  return mask;
}

Tensor soft_thresholded(const Tensor& w) {
  Tensor y = at::empty_like(w);
  dispatch(w, [&]<typename T, typename In>() {
    for_groups<T, In, In>(w, y, [](const Four<T>& x, Words, Words) { return soft_threshold<T>(x); });
  });
  return y;
}

Tensor mvue(const Tensor& g, bool is_exact, int64_t seed, int64_t first_group, int64_t first_column) {
  Tensor y = at::empty_like(g);
  dispatch(g, [&]<typename T, typename In>() {
    for_groups<T, In, In>(g, y, [=](const Four<T>& x, Words group, Words column) {
      return estimate<T>(x, seed, group + uint32_t(first_group), column + uint32_t(first_column), is_exact);
    });
  });
  return y;
}

// Transposable masks ---------------------------------------------------------------------------------------------------

constexpr int PAIRS[6][2] = {{0, 1}, {0, 2}, {0, 3}, {1, 2}, {1, 3}, {2, 3}};  // kept of four, in naive.py's order

constexpr int bits(int pair) { return 1 << PAIRS[pair][0] | 1 << PAIRS[pair][1]; }

// The upper two rows of a block leave to the lower two what their columns still may have. Two pairs of rows with the
// same column sums are alternatives, so the best of each 19 sums is the best upper half plus the best lower half.
struct Search {
  int classes = 0;
  int size[19] = {};        // alternatives of the upper half
  int upper[19][6][2] = {};  // pairs of its rows
  int lower_size[19] = {};
  int lower[19][6][2] = {};

  constexpr Search() {
    int key[19] = {};
    for (int a = 0; a < 6; ++a)
      for (int b = 0; b < 6; ++b) {
        int sums = columns(a, b), k = 0;
        while (k < classes && key[k] != sums) ++k;
        if (k == classes) key[classes++] = sums;
        upper[k][size[k]][0] = a;
        upper[k][size[k]++][1] = b;
      }
    for (int k = 0; k < classes; ++k)
      for (int c = 0; c < 6; ++c)
        for (int d = 0; d < 6; ++d)
          if (columns(c, d) == 2222 - key[k]) {
            lower[k][lower_size[k]][0] = c;
            lower[k][lower_size[k]++][1] = d;
          }
  }

  static constexpr int columns(int a, int b) {  // four decimal digits
    int sums = 0, power[4] = {1000, 100, 10, 1};
    for (int pair : {a, b})
      for (int column : {PAIRS[pair][0], PAIRS[pair][1]}) sums += power[column];
    return sums;
  }
};

constexpr Search SEARCH;
static_assert(SEARCH.classes == 19);

template <typename T>
using Block = std::array<Four<T>, 4>;

// The best of ``size`` alternatives, and its rows' bits.
template <typename T>
void best_half(const int (&alternatives)[6][2], int size, const F<T> (&x)[6], const F<T> (&y)[6], F<T>& best,
               I<T>& code) {
  for (int i = 0; i < size; ++i) {
    auto [a, b] = alternatives[i];
    F<T> sum = x[a] + y[b];
    I<T> here = I<T>{} + (bits(a) | bits(b) << 4);
    if (i == 0) {
      best = sum, code = here;
    } else {
      auto better = sum > best;
      code = better ? here : code;
      best = better ? sum : best;
    }
  }
}

template <typename T>
I<T> best_pattern(const Block<T>& a) {
  F<T> rows[4][6], best{};
  for (int row = 0; row < 4; ++row)
    for (int pair = 0; pair < 6; ++pair) rows[row][pair] = a[row][PAIRS[pair][0]] + a[row][PAIRS[pair][1]];
  I<T> chosen{};
#pragma GCC unroll 19
  for (int k = 0; k < 19; ++k) {
    F<T> upper, lower;
    I<T> upper_code, lower_code;
    best_half<T>(SEARCH.upper[k], SEARCH.size[k], rows[0], rows[1], upper, upper_code);
    best_half<T>(SEARCH.lower[k], SEARCH.lower_size[k], rows[2], rows[3], lower, lower_code);
    F<T> sum = upper + lower;
    I<T> code = upper_code | lower_code << 8;
    auto better = sum > best;
    chosen = k == 0 ? code : (better ? code : chosen);
    best = k == 0 ? sum : (better ? sum : best);
  }
  return chosen;
}

// The largest of sixteen first, each where its row and its column have room.
template <typename T>
I<T> greedy_pattern(Block<T> a) {
  I<T> chosen{}, zero{};
  std::array<I<T>, 4> rows{}, columns{};
  for (int turn = 0; turn < 16; ++turn) {
    F<T> largest = F<T>{} - 1;
    I<T> place{};
    for (int i = 0; i < 16; ++i) {
      auto larger = a[i / 4][i % 4] > largest;
      largest = larger ? a[i / 4][i % 4] : largest;
      place = larger ? zero + i : place;
    }
    I<T> row = place >> 2, column = place & 3, in_row{}, in_column{};
    for (int i = 0; i < 4; ++i) {
      in_row = row == i ? rows[i] : in_row;
      in_column = column == i ? columns[i] : in_column;
    }
    I<T> free = (in_row < 2) & (in_column < 2);
    chosen |= free & ((zero + 1) << place);
    for (int i = 0; i < 4; ++i) {
      rows[i] -= free & (row == i);
      columns[i] -= free & (column == i);
    }
    for (int i = 0; i < 16; ++i) a[i / 4][i % 4] = place == i ? F<T>{} - 2 : a[i / 4][i % 4];
  }
  return chosen;
}

Tensor transposable_mask(const Tensor& w, bool is_exact) {
  Tensor mask = at::empty(w.sizes(), w.options().dtype(at::kBool));
  int64_t columns = w.size(2), strips = w.size(0) * w.size(1) / 4, across = columns / 4;
  bool* target = mask.mutable_data_ptr<bool>();
  dispatch(w, [&]<typename T, typename In>() {
    const In* source = w.const_data_ptr<In>();
    at::parallel_for(0, strips, std::max<int64_t>(1, GRAIN / 4 / std::max<int64_t>(1, across)), [&](int64_t begin, int64_t end) {
      for (int64_t strip = begin; strip < end; ++strip)
        for (int64_t first = 0; first < across; first += LANES) {
          int64_t lanes = std::min(LANES, across - first), at = strip * 4 * columns + first * 4;
          alignas(64) T staged[4][4][LANES] = {};
          for (int row = 0; row < 4; ++row)
            for (int64_t lane = 0; lane < lanes; ++lane)
              for (int i = 0; i < 4; ++i)
                staged[row][i][lane] = static_cast<T>(source[at + row * columns + lane * 4 + i]);
          Block<T> a;
          for (int row = 0; row < 4; ++row)
            for (int i = 0; i < 4; ++i) a[row][i] = weight<T>(*reinterpret_cast<F<T>*>(staged[row][i]));
          I<T> chosen = is_exact ? best_pattern<T>(a) : greedy_pattern<T>(a);
          for (int row = 0; row < 4; ++row)
            for (int64_t lane = 0; lane < lanes; ++lane)
              for (int i = 0; i < 4; ++i)
                target[at + row * columns + lane * 4 + i] = chosen[lane] >> (4 * row + i) & 1;
        }
    });
  });
  return mask;
}

}  // namespace

TORCH_LIBRARY(megasparse_two_four, m) {
  m.def("prune_mask", &prune_mask);
  m.def("soft_threshold", &soft_thresholded);
  m.def("mvue", &mvue);
  m.def("transposable_mask", &transposable_mask);
}
