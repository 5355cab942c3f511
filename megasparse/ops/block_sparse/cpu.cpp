// Block-sparse attention on CPU: FlashAttention-2's loops over lists of blocks.
//
// I is the type of q, k and v, T that of the arithmetic (float or double), E that in which the operands of q k^T and
// dout v^T are multiplied: T, or bfloat16 where the inputs are and the processor has an instruction for it. Products of
// two bfloat16 are exact in float, so that this is the same arithmetic in half the time.
//
// Tensors of tokens are [batch, seq, heads, head_dim]. "head" counts batch * kv_heads. The rows of a query block are its
// (token, head of the group) pairs, token first. Sums are in one order for any number of threads.

#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numeric>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

namespace {

using at::BFloat16;
using at::Tensor;
using at::native::cpublas::brgemm;

constexpr int64_t ROWS = 128;  // of a tile: what a thread has in hand is half a megabyte with 128 keys
constexpr double LOWEST = -1e30;  // a running maximum before the first key: finite, so that exp(-inf - LOWEST) = 0

#ifdef __AVX512BF16__
constexpr bool MULTIPLIES_BFLOAT16 = true;
#else
constexpr bool MULTIPLIES_BFLOAT16 = false;
#endif

// oneDNN's kernels reach twice MKL's speed on AMD processors. Not every processor has them.
bool has_brgemm() {
  static const bool has = [] {
    float x = 1, y = 0;
    try {
      brgemm(1, 1, 1, 1, 1, 1, false, &x, &x, &y, false);
      return true;
    } catch (const c10::Error&) {
      return false;
    }
  }();
  return has;
}

// C [m, n] (+)= A [m, k] B [k, n], all row-major and dense.
template <typename T>
void gemm(int64_t m, int64_t n, int64_t k, const T* __restrict a, const T* __restrict b, T* __restrict c, bool add) {
  if constexpr (std::is_same_v<T, float>) {
    if (has_brgemm()) return brgemm(m, n, k, k, n, n, add, a, b, c, false);
  }
  for (int64_t i = 0; i < m; ++i, c += n, a += k) {
    if (!add) std::fill(c, c + n, T(0));
    for (int64_t p = 0; p < k; ++p)
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) c[j] += a[p] * b[p * n + j];
  }
}

// The same, where B is [k / 2, n, 2]: what ``turn`` makes.
void gemm(int64_t m, int64_t n, int64_t k, const BFloat16* a, const BFloat16* b, float* c, bool add) {
  brgemm(m, n, k, k, n, n, add, a, b, c, true);
}

// exp to one unit in the last place: Cody and Waite's reduction, Cephes' polynomial; 0 below the least normal number.
inline float exponential(float x) {
  float n = std::nearbyint(x * 1.44269504088896341f);
  float r = x - n * 0.693359375f + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof(power));
  return x < -87.0f ? 0.0f : p * power;
}

inline double exponential(double x) { return std::exp(x); }

// [8, 8] of 4 bytes each, in registers: pairs, fours and eights of rows trade halves.
template <typename T>
void transpose_8x8(const T* source, int64_t columns, T* target, int64_t width) {
  typedef T Row __attribute__((vector_size(32), aligned(4), may_alias));
  Row a[8], b[8];
  for (int i = 0; i < 8; ++i) a[i] = *reinterpret_cast<const Row*>(source + i * columns);
  for (int i = 0; i < 8; i += 2) {
    b[i] = __builtin_shufflevector(a[i], a[i + 1], 0, 8, 2, 10, 4, 12, 6, 14);
    b[i + 1] = __builtin_shufflevector(a[i], a[i + 1], 1, 9, 3, 11, 5, 13, 7, 15);
  }
  for (int i = 0; i < 8; i += 4)
    for (int j = i; j < i + 2; ++j) {
      a[j] = __builtin_shufflevector(b[j], b[j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
      a[j + 2] = __builtin_shufflevector(b[j], b[j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    }
  for (int i = 0; i < 4; ++i) {
    *reinterpret_cast<Row*>(target + i * width) = __builtin_shufflevector(a[i], a[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    *reinterpret_cast<Row*>(target + (i + 4) * width) =
        __builtin_shufflevector(a[i], a[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
}

// [rows, columns] -> [columns, rows]
template <typename T>
void transpose(const T* source, int64_t rows, int64_t columns, T* target) {
  int64_t even_rows = sizeof(T) == 4 ? rows / 8 * 8 : 0, even_columns = columns / 8 * 8;
  for (int64_t r = 0; r < rows; r += 8)
    for (int64_t c = 0; c < columns; c += 8) {
      if constexpr (sizeof(T) == 4)
        if (r < even_rows && c < even_columns) {
          transpose_8x8(source + r * columns + c, columns, target + c * rows + r, rows);
          continue;
        }
      for (int64_t i = r; i < std::min(r + 8, rows); ++i)
        for (int64_t j = c; j < std::min(c + 8, columns); ++j)
          std::memcpy(target + j * rows + i, source + i * columns + j, sizeof(T));  // of two bfloat16, perhaps
    }
}

// [rows, columns] -> the second operand [columns, rows] of ``gemm``.
template <typename E>
void turn(const E* source, int64_t rows, int64_t columns, E* target) {
  using Unit = std::conditional_t<std::is_same_v<E, BFloat16>, uint32_t, E>;  // of bfloat16 pairs stay together
  transpose(reinterpret_cast<const Unit*>(source), rows, static_cast<int64_t>(columns * sizeof(E) / sizeof(Unit)),
            reinterpret_cast<Unit*>(target));
}

template <typename A, typename B>
void convert(const A* source, int64_t n, B* target) {
  for (int64_t i = 0; i < n; ++i) target[i] = static_cast<B>(source[i]);
}

enum class Sight { ALL, SOME, NONE };  // of the keys of a tile by its queries

struct Span {  // of queries: their positions among the keys, and their documents
  int64_t first, last, lowest = 0, highest = 0;
};

struct Problem {
  int64_t heads, kv_heads, group, head_dim;  // heads: batch * kv_heads
  int64_t queries, keys, q_blocks, k_blocks, query_block, block;
  bool causal;
  double scale;
  const int64_t* documents;  // [batch, keys] or null
  std::vector<std::pair<int64_t, int64_t>> ranges = {};  // the lowest and highest of each key block, [batch, k_blocks]

  const int64_t* documents_of(int64_t head) const { return documents + head / kv_heads * keys; }

  // How many keys of block kb, from its first, can the query at ``position`` see?
  int64_t limit(int64_t kb, int64_t position) const {
    int64_t end = causal ? std::min(keys, position + 1) : keys;
    return std::clamp<int64_t>(end - kb * block, 0, block);
  }
  int64_t position(int64_t qb, int64_t row) const { return keys - queries + qb * query_block + row / group; }
  Sight sight(int64_t head, int64_t kb, const Span& queries) const {
    if (limit(kb, queries.last) == 0) return Sight::NONE;
    Sight sight = limit(kb, queries.first) == block ? Sight::ALL : Sight::SOME;
    if (!documents) return sight;
    auto [low, high] = ranges[head / kv_heads * k_blocks + kb];
    if (high < queries.lowest || low > queries.highest) return Sight::NONE;
    return low == high && low == queries.lowest && low == queries.highest ? sight : Sight::SOME;
  }
  Span span(int64_t head, int64_t qb, int64_t first, int64_t rows) const {
    Span span{position(qb, first), position(qb, first + rows - 1)};
    if (documents) {
      const int64_t* ids = documents_of(head);
      auto [low, high] = std::minmax_element(ids + span.first, ids + span.last + 1);
      span.lowest = *low, span.highest = *high;
    }
    return span;
  }
  int64_t rows(int64_t qb) const { return std::min(query_block, queries - qb * query_block) * group; }

  // Calls f(row of [batch, queries, heads], n, where) for rows [first, first + count) of a query block, in runs of n
  // that lie together; ``where`` counts from first.
  template <typename F>
  void runs(int64_t head, int64_t qb, int64_t first, int64_t count, const F& f) const {
    for (int64_t row = first; row < first + count;) {
      int64_t n = std::min(group - row % group, first + count - row);
      int64_t token = head / kv_heads * queries + qb * query_block + row / group;
      f((token * kv_heads + head % kv_heads) * group + row % group, n, row - first);
      row += n;
    }
  }
  template <typename A, typename B>
  void gather(const A* x, int64_t head, int64_t qb, int64_t first, int64_t count, B* rows) const {
    runs(head, qb, first, count, [&](int64_t at, int64_t n, int64_t where) {
      convert(x + at * head_dim, n * head_dim, rows + where * head_dim);
    });
  }
};

// Calls task(i) for every i, each on one thread; the next free thread takes the next task.
template <typename F>
void for_each(int64_t tasks, const F& task) {
  std::atomic<int64_t> next{0};
  at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t, int64_t) {
    for (int64_t i = next++; i < tasks; i = next++) task(i);
    if (MULTIPLIES_BFLOAT16) at::native::cpublas::brgemm_release();
  });
}

template <typename T>
const T* pointer(const Tensor& tensor) {
  TORCH_CHECK(tensor.is_contiguous());
  return tensor.const_data_ptr<T>();
}

template <typename T>
const T* pointer(const std::optional<Tensor>& tensor) {
  return tensor ? pointer<T>(*tensor) : nullptr;
}

template <typename T>
at::TensorOptions like(const Tensor& x) {
  return x.options().dtype(c10::CppTypeToScalarType<T>::value);
}

struct Lists {
  const int32_t *count, *index;
  int64_t longest;
  explicit Lists(const Tensor& count_, const Tensor& index_)
      : count(pointer<int32_t>(count_)), index(pointer<int32_t>(index_)), longest(index_.size(-1)) {}

  // A list that is too long, or names a block that is not there or is named already, would be read as other memory.
  void check(const Problem& p) const {
    std::vector<int64_t> named(p.k_blocks, -1);
    for (int64_t task = 0; task < p.heads * p.q_blocks; ++task) {
      int64_t head = task / p.q_blocks;
      auto where = [&] {
        return c10::str("mask: the list of batch ", head / p.kv_heads, ", K/V head ", head % p.kv_heads, ", query block ",
                        task % p.q_blocks);
      };
      TORCH_CHECK_VALUE(count[task] >= 0 && count[task] <= longest, where(), " has count ", count[task],
                        " and room for ", longest);
      for (int32_t i = 0; i < count[task]; ++i) {
        int32_t kb = index[task * longest + i];
        TORCH_CHECK_VALUE(kb >= 0 && kb < p.k_blocks, where(), " names key block ", kb, " of ", p.k_blocks);
        TORCH_CHECK_VALUE(named[kb] != task, where(), " names key block ", kb, " twice");
        named[kb] = task;
      }
    }
  }
};

// [batch, keys, kv_heads, head_dim] -> [heads, k_blocks, block, head_dim], the last block filled up with zeros; turned:
// [.., head_dim, block], the second operand of ``gemm``.
template <typename I, typename E>
Tensor key_blocks(const Problem& p, const Tensor& x, bool turned = false) {
  Tensor blocks = at::empty({p.heads, p.k_blocks, p.block, p.head_dim}, like<E>(x));
  const I* source = pointer<I>(x);
  E* target = blocks.mutable_data_ptr<E>();
  for_each(p.heads * p.k_blocks, [&](int64_t task) {
    int64_t head = task / p.k_blocks, first = task % p.k_blocks * p.block, size = p.block * p.head_dim;
    thread_local std::vector<E> buffer;
    buffer.resize(size);
    E* rows = turned ? buffer.data() : target + task * size;
    for (int64_t j = 0; j < p.block; ++j, rows += p.head_dim) {
      int64_t at = (head / p.kv_heads * p.keys + first + j) * p.kv_heads + head % p.kv_heads;
      if (first + j < p.keys)
        convert(source + at * p.head_dim, p.head_dim, rows);
      else
        std::fill_n(rows, p.head_dim, E(0));
    }
    if (turned) turn(buffer.data(), p.block, p.head_dim, target + task * size);
  });
  return blocks;
}

// One tile's q k^T [rows, block], -inf where a query does not see a key: rows from ``first`` of query block qb, of which
// ``span`` is. False, and nothing, where none sees any.
template <typename T, typename E>
bool products(const Problem& p, const E* q, const E* kt, int64_t head, int64_t qb, int64_t first, int64_t rows,
              const Span& span, int64_t kb, T* logits) {
  Sight sight = p.sight(head, kb, span);
  if (sight == Sight::NONE) return false;
  gemm(rows, p.block, p.head_dim, q, kt + (head * p.k_blocks + kb) * p.head_dim * p.block, logits, false);
  if (sight == Sight::ALL) return true;
  constexpr T hidden = -std::numeric_limits<T>::infinity();
  for (int64_t r = 0; r < rows; ++r, logits += p.block) {
    int64_t position = p.position(qb, first + r), limit = p.limit(kb, position);
    std::fill(logits + limit, logits + p.block, hidden);
    if (!p.documents) continue;
    const int64_t *ids = p.documents_of(head), *theirs = ids + kb * p.block, own = ids[position];
    for (int64_t j = 0; j < limit; ++j) logits[j] = theirs[j] == own ? logits[j] : hidden;
  }
  return true;
}

template <typename I, typename T, typename E>
void forward(const Problem& p, const Lists& lists, const I* q, const E* kt, const T* v, const T* bias, I* out,
             T* lse) {
  for_each(p.heads * p.q_blocks, [&](int64_t task) {
    int64_t head = task / p.q_blocks, qb = task % p.q_blocks, d = p.head_dim, w = p.block;
    thread_local std::vector<T> buffer;
    thread_local std::vector<E> rows_q;
    buffer.resize(ROWS * (w + d));
    rows_q.resize(ROWS * d);
    T *logits = buffer.data(), *sums = logits + ROWS * w, highest[ROWS], total[ROWS], scale = p.scale;
    for (int64_t first = 0; first < p.rows(qb); first += ROWS) {
      int64_t rows = std::min(ROWS, p.rows(qb) - first);
      Span span = p.span(head, qb, first, rows);
      p.gather(q, head, qb, first, rows, rows_q.data());
      std::fill_n(sums, rows * d, T(0));
      std::fill_n(highest, rows, T(LOWEST));
      std::fill_n(total, rows, T(0));
      for (int32_t i = 0; i < lists.count[task]; ++i) {
        int64_t kb = lists.index[task * lists.longest + i];
        T b = bias ? bias[task * p.k_blocks + kb] : T(0);
        if (!products(p, rows_q.data(), kt, head, qb, first, rows, span, kb, logits)) continue;
        for (int64_t r = 0; r < rows; ++r) {
          T *row = logits + r * w, most = highest[r], more = 0;
#pragma omp simd reduction(max : most)
          for (int64_t j = 0; j < w; ++j) most = std::max(most, row[j] * scale + b);
#pragma omp simd reduction(+ : more)
          for (int64_t j = 0; j < w; ++j) {
            row[j] = exponential(row[j] * scale + b - most);
            more += row[j];
          }
          T shrink = exponential(highest[r] - most);
          total[r] = total[r] * shrink + more;
          if (highest[r] != most)
            for (int64_t j = 0; j < d; ++j) sums[r * d + j] *= shrink;
          highest[r] = most;
        }
        gemm(rows, d, w, logits, v + (head * p.k_blocks + kb) * w * d, sums, true);
      }
      p.runs(head, qb, first, rows, [&](int64_t at, int64_t n, int64_t where) {
        for (int64_t r = where; r < where + n; ++r, ++at) {
          T inverse = total[r] > 0 ? 1 / total[r] : T(0);
          for (int64_t j = 0; j < d; ++j) out[at * d + j] = static_cast<I>(sums[r * d + j] * inverse);
          lse[at] = total[r] > 0 ? highest[r] + std::log(total[r]) : -std::numeric_limits<T>::infinity();
        }
      });
    }
  });
}

// The share of its weights that a row gives to each listed key block, the largest of the rows of a query block.
template <typename I, typename T, typename E>
void masses(const Problem& p, const Lists& lists, const I* q, const E* kt, const T* lse, T* mass) {
  for_each(p.heads * p.q_blocks, [&](int64_t task) {
    int64_t head = task / p.q_blocks, qb = task % p.q_blocks, w = p.block;
    thread_local std::vector<T> buffer;
    thread_local std::vector<E> rows_q;
    buffer.resize(ROWS * w);
    rows_q.resize(ROWS * p.head_dim);
    T *logits = buffer.data(), shift[ROWS], scale = p.scale;
    for (int64_t first = 0; first < p.rows(qb); first += ROWS) {
      int64_t rows = std::min(ROWS, p.rows(qb) - first);
      Span span = p.span(head, qb, first, rows);
      p.gather(q, head, qb, first, rows, rows_q.data());
      p.runs(head, qb, first, rows,
             [&](int64_t at, int64_t n, int64_t where) { std::copy_n(lse + at, n, shift + where); });
      for (int32_t i = 0; i < lists.count[task]; ++i) {
        T& largest = mass[task * lists.longest + i];
        int64_t kb = lists.index[task * lists.longest + i];
        if (!products(p, rows_q.data(), kt, head, qb, first, rows, span, kb, logits)) continue;
        for (int64_t r = 0; r < rows; ++r) {
          T total = 0;
#pragma omp simd reduction(+ : total)
          for (int64_t j = 0; j < w; ++j) total += exponential(logits[r * w + j] * scale - shift[r]);
          largest = std::max(largest, total);
        }
      }
    }
  });
}

// delta = dO O - dlse of every row: what the sum of its weights takes from each logit's gradient.
template <typename I, typename T>
void deltas(int64_t rows, int64_t d, const I* out, const I* dout, const T* dlse, T* delta) {
  at::parallel_for(0, rows, 1024, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      T sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t j = 0; j < d; ++j) sum += static_cast<T>(dout[r * d + j]) * static_cast<T>(out[r * d + j]);
      delta[r] = sum - dlse[r];
    }
  });
}

// For each entry of the inverse lists: how many key blocks before it are in the query block's list.
std::vector<int32_t> ranks(const Problem& p, const Lists& inverse) {
  std::vector<int32_t> rank(p.heads * p.k_blocks * inverse.longest), seen(p.heads * p.q_blocks);
  for (int64_t task = 0; task < p.heads * p.k_blocks; ++task)
    for (int64_t at = task * inverse.longest; at < task * inverse.longest + inverse.count[task]; ++at)
      rank[at] = seen[task / p.k_blocks * p.q_blocks + inverse.index[at]]++;
  return rank;
}

// Rows of one or more query blocks that list a key block, gathered; what is made of them.
template <typename T, typename E>
struct Tile {
  struct Part {
    int64_t qb, first, begin, n;  // rows from ``begin`` of the tile are those from ``first`` of a query block
    int32_t rank;
    bool last;  // of the query block
  };
  std::vector<T> q, dout, turned_dq, dq, weights, dlogits;  // [rows, d] x 2, [d, rows], [rows, d], [block, rows] x 2
  std::vector<E> operand, turned_q, turned_dout;            // [rows, d], [d, rows] x 2
  T bias[ROWS], lse[ROWS], delta[ROWS], dbias[ROWS];
  int64_t limits[ROWS], documents[ROWS], rows, wide;  // wide: filled up with zeros to one of few sizes
  Part parts[ROWS];
  int64_t count;  // of parts
  bool all;       // does each row see all keys?

  void resize(int64_t d, int64_t w) {
    for (auto* x : {&q, &dout, &turned_dq, &dq}) x->resize(ROWS * d);
    for (auto* x : {&weights, &dlogits}) x->resize(ROWS * w);
    for (auto* x : {&operand, &turned_q, &turned_dout}) x->resize(ROWS * d);
  }

  // Takes rows of the list from ``first`` of its first query block on, and moves both on. Rows that see none of the
  // keys are a part of none.
  template <typename I>
  void gather(const Problem& p, int64_t head, int64_t kb, const I* q_, const I* dout_, const T* bias_, const T* lse_,
              const T* delta_, const int32_t*& list, const int32_t* end, const int32_t*& rank, int64_t& first) {
    int64_t d = p.head_dim;
    rows = count = 0;
    all = true;
    while (list != end && rows < ROWS && count < ROWS) {
      int64_t qb = *list, n = std::min(ROWS - rows, p.rows(qb) - first), from = first;
      bool last = first + n == p.rows(qb);
      first = last ? 0 : first + n;
      Sight sight = p.sight(head, kb, p.span(head, qb, from, n));
      parts[count++] = {qb, from, rows, sight == Sight::NONE ? 0 : n, *rank, last};
      if (last) ++list, ++rank;
      if (sight == Sight::NONE) continue;
      all = all && sight == Sight::ALL;
      p.gather(q_, head, qb, from, n, q.data() + rows * d);
      p.gather(dout_, head, qb, from, n, dout.data() + rows * d);
      p.runs(head, qb, from, n, [&](int64_t at, int64_t run, int64_t where) {
        std::copy_n(lse_ + at, run, lse + rows + where);
        std::copy_n(delta_ + at, run, delta + rows + where);
      });
      std::fill_n(bias + rows, n, bias_ ? bias_[(head * p.q_blocks + qb) * p.k_blocks + kb] : T(0));
      for (int64_t r = 0; r < n; ++r) {
        int64_t position = p.position(qb, from + r);
        limits[rows + r] = p.limit(kb, position);
        documents[rows + r] = p.documents ? p.documents_of(head)[position] : 0;
      }
      rows += n;
    }
    wide = (rows + 31) / 32 * 32;  // a kernel is compiled for each size
    constexpr T infinity = std::numeric_limits<T>::infinity();
    std::replace(lse, lse + rows, -infinity, infinity);  // sees no key: exp(logit - inf) = 0
    std::fill(lse + rows, lse + wide, infinity);
    std::fill(delta + rows, delta + wide, T(0));
    std::fill(bias + rows, bias + wide, T(0));
    std::fill_n(q.data() + rows * d, (wide - rows) * d, T(0));
    std::fill_n(dout.data() + rows * d, (wide - rows) * d, T(0));
    turn_rows(q, d, turned_q);
    turn_rows(dout, d, turned_dout);
  }

  void turn_rows(const std::vector<T>& x, int64_t d, std::vector<E>& target) {
    if constexpr (std::is_same_v<E, T>) return turn(x.data(), wide, d, target.data());
    convert(x.data(), wide * d, operand.data());  // exact: they were of that type
    turn(operand.data(), wide, d, target.data());
  }

  // Makes dq, and adds to the key block's dk and dv. Weights are [keys, rows]: no product needs a tile turned.
  void multiply(const Problem& p, int64_t head, int64_t kb, bool biased, const E* k, const T* kt, const E* v, T* dk,
                T* dv) {
    int64_t d = p.head_dim, w = p.block;
    T scale = p.scale;
    gemm(w, wide, d, k, turned_q.data(), weights.data(), false);
    gemm(w, wide, d, v, turned_dout.data(), dlogits.data(), false);
    std::fill_n(dbias, wide, T(0));
    for (int64_t j = 0; j < w; ++j) {
      T *x = weights.data() + j * wide, *dx = dlogits.data() + j * wide;
#pragma omp simd
      for (int64_t r = 0; r < wide; ++r) {
        x[r] = exponential(x[r] * scale + bias[r] - lse[r]);
        dx[r] = x[r] * (dx[r] - delta[r]);
      }
      if (!all) {
        int64_t own = p.documents && kb * w + j < p.keys ? p.documents_of(head)[kb * w + j] : 0;
        for (int64_t r = 0; r < rows; ++r)
          if (j >= limits[r] || documents[r] != own) x[r] = dx[r] = 0;
      }
      if (biased)
#pragma omp simd
        for (int64_t r = 0; r < wide; ++r) dbias[r] += dx[r];
    }
    gemm(w, d, wide, weights.data(), dout.data(), dv, true);
    gemm(w, d, wide, dlogits.data(), q.data(), dk, true);
    gemm(d, wide, w, kt, dlogits.data(), turned_dq.data(), false);
    transpose(turned_dq.data(), d, wide, dq.data());
  }
};

// Key block by key block, over the rows of all query blocks that list it: a pair's logit is made once. A task owns its
// key block's dk and dv, and adds to the dq of a query block when the key blocks before it have: these are in the hands
// of threads that wait for none after them.
template <typename I, typename T, typename E>
void backward(const Problem& p, const Lists& inverse, const I* q, const E* k, const T* kt, const E* v, const T* bias,
              const I* dout, const T* lse, const T* delta, T* dq, I* dk, I* dv, T* dbias) {
  std::vector<int32_t> rank = ranks(p, inverse);
  std::vector<std::atomic<int32_t>> added(p.heads * p.q_blocks);
  for_each(p.heads * p.k_blocks, [&](int64_t ticket) {
    int64_t head = ticket % p.heads, kb = ticket / p.heads, d = p.head_dim, w = p.block;
    int64_t task = head * p.k_blocks + kb, at = task * w * d;
    thread_local Tile<T, E> tile;
    thread_local std::vector<T> sums;
    tile.resize(d, w);
    sums.assign(2 * w * d, T(0));
    T *block_dk = sums.data(), *block_dv = block_dk + w * d, scale = p.scale;
    const int32_t *list = inverse.index + task * inverse.longest, *end = list + inverse.count[task];
    const int32_t* place = rank.data() + task * inverse.longest;
    int64_t first = 0;  // row of the query block *list
    while (list != end) {
      tile.gather(p, head, kb, q, dout, bias, lse, delta, list, end, place, first);
      if (tile.rows > 0) tile.multiply(p, head, kb, bias != nullptr, k + at, kt + at, v + at, block_dk, block_dv);
      for (const auto* part = tile.parts; part != tile.parts + tile.count; ++part) {
        int64_t owner = head * p.q_blocks + part->qb;
        while (added[owner].load(std::memory_order_acquire) != part->rank) std::this_thread::yield();
        p.runs(head, part->qb, part->first, part->n, [&](int64_t to, int64_t run, int64_t where) {
          const T* source = tile.dq.data() + (part->begin + where) * d;
          for (int64_t i = 0; i < run * d; ++i) dq[to * d + i] += source[i] * scale;
        });
        const T* rows = tile.dbias + part->begin;
        if (dbias) dbias[owner * p.k_blocks + kb] += std::accumulate(rows, rows + part->n, T(0));
        if (part->last) added[owner].store(part->rank + 1, std::memory_order_release);
      }
    }
    for (int64_t j = 0; j < std::min(w, p.keys - kb * w); ++j) {
      int64_t to = ((head / p.kv_heads * p.keys + kb * w + j) * p.kv_heads + head % p.kv_heads) * d;
      for (int64_t i = 0; i < d; ++i) dk[to + i] = static_cast<I>(block_dk[j * d + i] * scale);
      convert(block_dv + j * d, d, dv + to);
    }
  });
}

// Calls f<I, T, E>().
template <typename F>
void dispatch(const Tensor& q, const F& f) {
  switch (q.scalar_type()) {
    case at::kDouble: return f.template operator()<double, double, double>();
    case at::kFloat: return f.template operator()<float, float, float>();
    case at::kHalf: return f.template operator()<at::Half, float, float>();
    case at::kBFloat16:
      if constexpr (MULTIPLIES_BFLOAT16)
        if (q.size(3) % 2 == 0 && has_brgemm()) return f.template operator()<BFloat16, float, BFloat16>();
      return f.template operator()<BFloat16, float, float>();
    default: TORCH_CHECK(false, "not a float type: ", q.scalar_type());
  }
}

Problem problem(const Tensor& q, const Tensor& k, int64_t query_block, int64_t block, bool causal, double scale,
                const std::optional<Tensor>& documents) {
  int64_t queries = q.size(1), keys = k.size(1), kv_heads = k.size(2);
  Problem p{.heads = q.size(0) * kv_heads,
            .kv_heads = kv_heads,
            .group = q.size(2) / kv_heads,
            .head_dim = q.size(3),
            .queries = queries,
            .keys = keys,
            .q_blocks = (queries + query_block - 1) / query_block,
            .k_blocks = (keys + block - 1) / block,
            .query_block = query_block,
            .block = block,
            .causal = causal,
            .scale = scale,
            .documents = pointer<int64_t>(documents)};
  if (p.documents)
    for (int64_t row = 0; row < q.size(0) * keys; row += keys)
      for (int64_t first = 0; first < keys; first += block) {
        const int64_t* ids = p.documents + row + first;
        auto [low, high] = std::minmax_element(ids, ids + std::min(block, keys - first));
        p.ranges.emplace_back(*low, *high);
      }
  return p;
}

std::tuple<Tensor, Tensor> attend(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& bias,
                                  const Tensor& count, const Tensor& index, int64_t query_block, int64_t block,
                                  bool causal, double scale, const std::optional<Tensor>& documents) {
  Problem p = problem(q, k, query_block, block, causal, scale, documents);
  Lists lists(count, index);
  lists.check(p);
  Tensor out = at::empty_like(q), lse;
  dispatch(q, [&]<typename I, typename T, typename E>() {
    lse = at::empty(q.sizes().slice(0, 3), like<T>(q));
    Tensor kt = key_blocks<I, E>(p, k, true), values = key_blocks<I, T>(p, v);
    forward(p, lists, pointer<I>(q), pointer<E>(kt), pointer<T>(values), pointer<T>(bias), out.mutable_data_ptr<I>(),
            lse.mutable_data_ptr<T>());
  });
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attend_backward(
    const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& bias, const Tensor& out,
    const Tensor& lse, const Tensor& dout, const Tensor& dlse, const Tensor& inverse_count, const Tensor& inverse_index,
    int64_t query_block, int64_t block, bool causal, double scale, const std::optional<Tensor>& documents) {
  Problem p = problem(q, k, query_block, block, causal, scale, documents);
  Tensor dq, dk = at::empty_like(k), dv = at::empty_like(v), delta = at::empty_like(lse);
  Tensor dbias = bias ? at::zeros_like(*bias) : Tensor();
  dispatch(q, [&]<typename I, typename T, typename E>() {
    dq = at::zeros(q.sizes(), like<T>(q));
    Tensor keys = key_blocks<I, E>(p, k), kt = key_blocks<I, T>(p, k, true), values = key_blocks<I, E>(p, v);
    deltas(lse.numel(), p.head_dim, pointer<I>(out), pointer<I>(dout), pointer<T>(dlse), delta.mutable_data_ptr<T>());
    backward(p, Lists(inverse_count, inverse_index), pointer<I>(q), pointer<E>(keys), pointer<T>(kt),
             pointer<E>(values), pointer<T>(bias), pointer<I>(dout), pointer<T>(lse), pointer<T>(delta),
             dq.mutable_data_ptr<T>(), dk.mutable_data_ptr<I>(), dv.mutable_data_ptr<I>(),
             bias ? dbias.mutable_data_ptr<T>() : nullptr);
  });
  return {dq, dk, dv, dbias};
}

Tensor block_mass(const Tensor& q, const Tensor& k, const Tensor& lse, const Tensor& count, const Tensor& index,
                  int64_t query_block, int64_t block, bool causal, double scale,
                  const std::optional<Tensor>& documents) {
  Problem p = problem(q, k, query_block, block, causal, scale, documents);
  Lists lists(count, index);
  lists.check(p);
  Tensor mass = at::zeros_like(index, lse.options());
  dispatch(q, [&]<typename I, typename T, typename E>() {
    Tensor kt = key_blocks<I, E>(p, k, true);
    masses(p, lists, pointer<I>(q), pointer<E>(kt), pointer<T>(lse), mass.mutable_data_ptr<T>());
  });
  return mass;
}

}  // namespace

TORCH_LIBRARY(megasparse_block_sparse, m) {
  m.def("attend", &attend);
  m.def("attend_backward", &attend_backward);
  m.def("block_mass", &block_mass);
}
